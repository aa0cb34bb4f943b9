"""What `tools/bench.json` says of the profiles and the table of peers; and the benchmark's networks are real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_table
import onnx.parser
import pytest

ROWS = json.loads(bench_table.RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", [row for row in ROWS if "cosine_of_profiles" in row], ids=lambda row: row["network"])
def test_the_profiles_agreed_when_it_was_measured(row) -> None:
    assert row["cosine_of_profiles"] >= 0.999999


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50", 25.6), ("mobilenet_v2", 3.5), ("densenet121", 8.0), ("squeezenet", 1.2)]
)
def test_parameters(name: str, millions: float) -> None:
    pytest.importorskip("torch", reason="the networks are written in it")
    from benchmark.networks import build

    count = sum(weight.numel() for weight in build(name).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_peer_that_does_not_take_a_model_gives_a_row_that_says_why(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the networks are written in it")
    from benchmark.__main__ import Limits, measure, rows_of, task

    model = tmp_path / "net.onnx"
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> net (float[N, 3, 8, 8] x) => (float[N, 3, 1, 1] y) '
            "{ y = GlobalAveragePool (x) }"
        ),
        model,
    )
    machine = {"provider": "cpu", "threads": 1}
    given = [
        task("forward", model, "net", 2, 8, machine),
        task("onnx-ad gradient", tmp_path / "missing.onnx", "net", 2, 8, machine),
    ]
    processes = measure([(one, sys.executable) for one in given], Limits(3, 2, 1.0))
    forward, missing = rows_of(processes, {"network": "net", "batch": 2, **machine})
    assert forward["ratio"] == 1.0
    assert forward["least_ms"] > 0
    assert "onnx" in forward["versions"]
    assert "missing.onnx" in missing["error"]
    assert "ratio" not in missing


@pytest.mark.parametrize(
    ("errors", "status", "reason"),
    [
        ("Traceback\nValueError: no rule for LRN\n\n", 1, "ValueError: no rule for LRN"),
        ("a warning\n", -11, "it crashes (SIGSEGV)"),
        ("", 3, "it ends with status 3"),
    ],
)
def test_why_a_process_ended(errors: str, status: int, reason: str) -> None:
    pytest.importorskip("torch", reason="the networks are written in it")
    from benchmark.__main__ import last_words

    assert last_words(errors, status) == reason


def test_the_table_tells_what_was_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"network": "net", "batch": 8, "provider": "cpu", "threads": 2, "cpu": "a processor"}
    times = {
        "forward": 10.0,
        "guided": 24.0,
        "gradient": 20.0,
        "captum guided": 60.0,
        "captum guided channels_last": 48.0,
    }
    rows = [
        common | {"case": case, "median_ms": ms, "ratio": ms / 10, "rss_ratio": 1.5, "versions": {"onnxruntime": "1"}}
        for case, ms in (times | {"openvino forward": 8.0, "openvino guided": 20.0}).items()
    ]
    rows.append(common | {"case": "onnx-ad gradient", "error": "no rule for LRN", "versions": {}})
    monkeypatch.setattr(bench_table, "RESULTS", tmp_path / "bench.json")
    bench_table.RESULTS.write_text(json.dumps(rows))
    table = bench_table.bench_markdown()
    assert "| net, 8 | 10.0 | 24.0 | 2.40 | 2.00 | 1.5 | 2.0 |  |  |  | 2.50 |" in table
    assert "- onnx-ad gradient: no rule for LRN (net, 8)" in table
    assert table.endswith("a processor, 2 threads, provider cpu; onnxruntime 1.")
