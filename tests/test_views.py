"""Views of the attribution that are baked in as outputs, against numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, ort_run, reference_run, small_model
from click.testing import CliRunner
from onnx import helper

import onnxgbp
from onnxgbp import Explainer, OnnxgbpError
from onnxgbp.cli import main
from onnxgbp.verify import verify_model

RNG = np.random.default_rng(5)
IMAGES = RNG.standard_normal((3, 3, 6, 5)).astype(np.float32)
IMAGES[2] = 0  # a sample whose map is blank


def network(layout: str = "nchw", classes: int = 4, *, opset: int = 17) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x" if layout == "nchw" else "t", "K"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    shape: list[Any] = ["N", 3, 6, 5]
    if layout == "nhwc":
        nodes.insert(0, helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]))
        shape = ["N", 6, 5, 3]
    kernel = np.random.default_rng(1).standard_normal((classes, 3, 3, 3)).astype(np.float32)
    return small_model(nodes, {"x": shape}, constants={"K": kernel}, opset=opset)


def viewed(a: Array, view: str, reduce: str, axis: int) -> Array:
    a = {"signed": a, "positive": np.maximum(a, 0), "negative": np.maximum(-a, 0), "abs": np.abs(a)}[view]
    if reduce == "none":
        return a
    return {"sum": np.sum, "max": np.max, "l2": lambda b, axis: np.sqrt(np.sum(b * b, axis))}[reduce](a, axis=axis)


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("reduce", ["none", "sum", "max", "l2"])
@pytest.mark.parametrize("view", ["signed", "positive", "negative", "abs"])
def test_views_and_heatmaps(view: str, reduce: str, opset: int) -> None:
    converted = onnxgbp.convert(
        network(opset=opset), view=view, reduce=reduce, heatmap=True, method="gradient", profile="portable"
    )
    names = [output.name for output in converted.graph.output]
    plain = view == "signed" and reduce == "none"
    assert names == ["y", "attribution", "attribution_target", *["attribution_view"] * (not plain), names[-1]]
    assert names[-1] == "attribution_heatmap"
    found = ort_run(converted, {"x": IMAGES})
    want = viewed(found["attribution"], view, reduce, 1)
    if not plain:
        assert np.allclose(found["attribution_view"], want, atol=1e-6)
    largest = np.abs(want).reshape(3, -1).max(1).reshape(3, *[1] * (want.ndim - 1))
    share = want / np.where(largest > 0, largest, 1)
    signed = view == "signed" and reduce != "l2"
    steps = np.floor(128.5 + 127 * share) if signed else np.floor(0.5 + 255 * share)
    heatmap = found["attribution_heatmap"]
    assert heatmap.dtype == np.uint8
    assert heatmap.shape == want.shape
    assert np.abs(heatmap.astype(int) - steps).max() <= 1  # a product that lies between two steps
    assert heatmap[0].max() == 255 or heatmap[0].min() == 1
    assert set(heatmap[2].flat) == {128 if signed else 0}


def test_a_row_does_not_depend_on_the_others() -> None:
    converted = onnxgbp.convert(network(), reduce="sum", heatmap=True)
    together = ort_run(converted, {"x": IMAGES})["attribution_heatmap"]
    for i in range(3):
        assert np.array_equal(ort_run(converted, {"x": IMAGES[i : i + 1]})["attribution_heatmap"][0], together[i])


def test_channels_last() -> None:
    converted = onnxgbp.convert(network("nhwc"), view="abs", reduce="max")
    found = reference_run(converted, {"x": IMAGES.transpose(0, 2, 3, 1)})
    assert np.array_equal(found["attribution_view"], np.abs(found["attribution"]).max(-1))
    said = network()
    helper.set_model_props(said, {"onnxgbp.preprocessing": json.dumps({"layout": "nchw"})})
    found = reference_run(onnxgbp.convert(said, reduce="sum"), {"x": IMAGES})
    assert np.allclose(found["attribution_view"], found["attribution"].sum(1), atol=1e-6)


def test_several_methods_and_classes_have_a_view_each() -> None:
    converted = onnxgbp.convert(network(), methods="gradient,guided", target="top2", reduce="l2", heatmap=True)
    found = reference_run(converted, {"x": IMAGES})
    for method in ("gradient", "guided"):
        attribution = found[f"attribution_{method}"]
        assert attribution.shape == (3, 2, 3, 6, 5)
        assert np.allclose(found[f"attribution_{method}_view"], np.sqrt((attribution**2).sum(2)), atol=1e-6)
        assert found[f"attribution_{method}_heatmap"][:2].reshape(2, 2, -1).max(2).tolist() == [[255] * 2] * 2


def test_the_file_says_so_runs_and_is_verified(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    out = tmp_path / "out.onnx"
    arguments = ["convert", str(tmp_path / "net.onnx"), "-o", str(out), "--view", "abs", "--reduce", "sum", "--heatmap"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    report = verify_model(out, tmp_path / "net.onnx")
    assert report.passed, report.to_text()
    result = Explainer(out)(IMAGES)
    assert result.outputs["attribution_heatmap"].shape == (3, 6, 5)
    model = onnx.load(out)
    (node,) = [node for node in model.graph.node if node.op_type == "Abs" and node.input[0] == "attribution"]
    node.op_type = "Neg"
    onnx.save(model, out)
    failed = {check.name: check.detail for check in verify_model(out, tmp_path / "net.onnx").checks if not check.passed}
    assert "is not the view" in failed["attribution reproduced"]


def test_what_has_no_channels_is_refused() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    with pytest.raises(OnnxgbpError, match="'attribution' has no channels"):
        onnxgbp.convert(small_model(nodes, {"x": ["N", 4]}), reduce="sum")
    heatmap = reference_run(
        onnxgbp.convert(small_model(nodes, {"x": ["N", 4]}), heatmap=True), {"x": np.ones((1, 4), np.float32)}
    )
    assert heatmap["attribution_heatmap"].tolist() == [[255, 128, 128, 128]]
    with pytest.raises(OnnxgbpError, match="no view is called 'grey'"):
        onnxgbp.convert(network(), view="grey")
