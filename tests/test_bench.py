"""The table of speed says what `tools/bench.json` says, and the benchmark's networks are what their names promise."""

from __future__ import annotations

import json

import bench_table
import pytest

ROWS = json.loads(bench_table.RESULTS.read_text(encoding="utf-8"))


def test_readme_is_current() -> None:
    text = bench_table.README.read_text(encoding="utf-8")
    if bench_table.BEGIN not in text:
        pytest.skip("the README has no markers for the table yet")
    assert text == bench_table.current(text), "python tools/bench_table.py"


def test_a_stale_table_is_noticed_and_rewritten(tmp_path, monkeypatch, capsys) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench_table.BEGIN}\nold\n{bench_table.END}\nafter\n")
    monkeypatch.setattr(bench_table, "README", readme)
    assert bench_table.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert bench_table.main([]) == 0
    assert bench_table.main(["--check"]) == 0
    assert "resnet50, 1" in readme.read_text()


def test_a_readme_without_markers_is_refused(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "README.md").write_text("nothing")
    monkeypatch.setattr(bench_table, "README", tmp_path / "README.md")
    assert bench_table.main([]) == 1
    assert "bench:begin" in capsys.readouterr().err


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
