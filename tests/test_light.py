"""The nine architectures of the onnx wheel, with seeded He weights, at a batch other than the exported one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from checking import cosine, forward_error, ort_run, torch_reference
from light import LIGHT, light

import onnxgbp

METHODS = ("gradient", "deconvnet", "guided")
STANDARD = {"", "ai.onnx"}


def _input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in model.graph.initializer}
    (value,) = [value for value in model.graph.input if value.name not in weights]
    return value


def _photo(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)


@pytest.mark.parametrize("name", LIGHT)
def test_against_float64(name: str) -> None:
    reference = torch_reference()
    source = light(name, dynamic=True)
    feeds = {_input(source).name: _photo()}
    before = ort_run(source, feeds)
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(source))
    for method in METHODS:
        converted = graph.render(method=method)
        onnx.checker.check_model(converted)
        after = ort_run(converted, feeds)
        assert forward_error(before, after) <= 1e-5
        wanted, values = reference.attribution(source, feeds, graph.explained.tensor.name, None, list(feeds), method)
        (want,) = wanted.values()
        assert cosine(after["attribution"], want) >= 0.999
        scores = values[graph.explained.tensor.name].reshape(2, -1)
        assert after["attribution_target"].tolist() == scores.argmax(1).tolist()


@pytest.mark.parametrize("name", LIGHT)
def test_structure(name: str) -> None:
    source = light(name, dynamic=True)
    converted = onnxgbp.convert(source)
    assert {node.domain for node in converted.graph.node} <= STANDARD
    assert [value.name for value in converted.graph.input] == [value.name for value in source.graph.input]
    assert [value.name for value in converted.graph.output[:1]] == [value.name for value in source.graph.output]
    (batch, *rest) = converted.graph.output[-2].type.tensor_type.shape.dim
    assert batch.dim_param == "N"
    assert [dim.dim_value for dim in rest] == [3, 224, 224]
    assert {tuple(node.output) for node in source.graph.node} <= {tuple(node.output) for node in converted.graph.node}


def test_resnet50_stays_small(tmp_path: Path) -> None:
    """What runs. The file has more nodes: those that turn a weight round are folded when it is loaded."""
    source = light("resnet50")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    data = onnxgbp.convert(source).SerializeToString()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    assert len(onnx.load(tmp_path / "loaded.onnx").graph.node) <= 3 * len(source.graph.node)
