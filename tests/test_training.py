"""`convert --builder ort-training`: a recorded graph of that package read back, and what is said without it.

The graphs are what onnxruntime-training 1.19.2 made of the nets of training/small.py; `tools/test --training` records
them, and compares many more nets where that package is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import cosine, ort_run
from click.testing import CliRunner
from training.small import SMALL, small

import onnxgbp
from onnxgbp import training
from onnxgbp.cli import main
from onnxgbp.installed import onnxruntime_distributions
from onnxgbp.verify import verify_model

TESTS = Path(__file__).parent
OWN_FAULTS = {"small_auto_pad", "small_average_3d", "small_dropout"}
METHODS = ("gradient", "deconvnet", "guided", "rectgrad:80")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a net, for which that package's own answer is given."""
    name: str = request.param
    answer = onnx.load(TESTS / "data" / "training" / f"{name}.onnx")
    monkeypatch.setattr(training, "native_gradient", lambda *_: answer)
    monkeypatch.setattr(training, "version", lambda: "ort-training 1.19.2")
    return name


@pytest.mark.parametrize("recorded", SMALL, indirect=True)
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_its_graph_gives_what_ours_does(recorded: str, profile: str, tmp_path: Path) -> None:
    """Also where its own kernels are wrong: its private operators are written by our tables."""
    source = small(recorded)
    options: dict[str, Any] = {"methods": METHODS, "profile": profile, "target": "top2"}
    made = onnxgbp.convert(source, builder="ort-training", **options)
    onnx.checker.check_model(made, full_check=True)
    assert {node.domain for node in made.graph.node} == {""}
    assert {entry.key: entry.value for entry in made.metadata_props}["onnxgbp.builder"] == "ort-training 1.19.2"
    ours = onnxgbp.convert(source, **options)
    assert "onnxgbp.builder" not in {entry.key for entry in ours.metadata_props}
    dims = [dim.dim_value or 3 for dim in source.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.random.default_rng(1).standard_normal(dims).astype(np.float32)}
    found, wanted = ort_run(made, feeds), ort_run(ours, feeds)
    assert list(found) == list(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name].shape, wanted[name].shape)
        assert cosine(found[name], wanted[name]) > 0.999999
    onnx.save(source, tmp_path / "net.onnx")
    onnxgbp.save(made, tmp_path / "out.onnx")
    report = verify_model(tmp_path / "out.onnx")  # a fresh conversion by our own builder is its second opinion
    assert report.passed, report.to_text()


@pytest.mark.parametrize("recorded", ["small_residual"], indirect=True)
def test_a_rule_meets_each_activation(recorded: str) -> None:
    made, ours = (
        onnxgbp.convert(small(recorded), method="gradient", rule=["depth:>=-1=deconvnet"], builder=builder)
        for builder in ("ort-training", "onnxgbp")
    )
    audits = [
        next(json.loads(e.value) for e in model.metadata_props if e.key == "onnxgbp.audit") for model in (made, ours)
    ]
    assert audits[0] == audits[1]
    assert [row["rule"] for row in audits[0]] == ["gradient", "deconvnet"]


@pytest.mark.skipif(
    any("training" in name for name in onnxruntime_distributions()), reason="the package is installed here"
)
def test_without_the_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    onnx.save(small("small_residual"), tmp_path / "net.onnx")
    arguments = ["convert", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "out.onnx"), "--builder", "ort-training"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "pip install 'onnxgbp[training-cpu]'" in line
    assert not (tmp_path / "out.onnx").exists()


def test_another_builder_is_refused() -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match="no builder is called 'torch': choose one of onnxgbp, ort-training"):
        onnxgbp.convert(small("small_residual"), builder="torch")


def test_what_it_did_not_take_is_recorded() -> None:
    """No net on which the two disagree, and for each that it did not take its error."""
    rows = {row["net"]: row for row in json.loads((TESTS / "training.json").read_text())}
    kinds = {name: row["status"].partition(":")[0] for name, row in rows.items()}
    assert set(kinds.values()) <= {"ok", "not taken", "its own fault"}
    assert {name for name, kind in kinds.items() if kind == "its own fault"} == OWN_FAULTS
    taken = [name for name, row in rows.items() if row["status"] == "ok"]
    assert len(taken) >= 15
    assert all(rows[name]["builder"].partition(":")[0] in ("ok", "not taken") for name in rows)
