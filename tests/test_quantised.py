"""Quantised models: the straight-through estimator, and the ReLU that a quantiser hides in a zero point."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, ort_run, small_model
from onnx import helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_static,
)

import onnxgbp

CORPUS = Path(__file__).parent / "data" / "corpus"
METHODS = ("gradient", "guided", "deconvnet")
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((24, 3, 12, 12)).astype(np.float32)


def weights(*shape: int) -> Array:
    fan = int(np.prod(shape[1:])) if len(shape) > 1 else 10
    return (np.random.default_rng(shape).standard_normal(shape) * np.sqrt(2 / fan)).astype(np.float32)


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"n_{output}", **attributes)


def plain_cnn() -> onnx.ModelProto:
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("MaxPool", "r1", "p1", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p1 w2 b2", "c2", pads=[1, 1, 1, 1]),
        node("Relu", "c2", "r2"),
        node("GlobalAveragePool", "r2", "g"),
        node("Flatten", "g", "f"),
        node("Gemm", "f w3 b3", "y", transB=1),
    ]
    shapes = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (8, 6, 3, 3), "b2": (8,), "w3": (5, 8), "b3": (5,)}
    return small_model(nodes, {"x": ["N", 3, 12, 12]}, constants={n: weights(*s) for n, s in shapes.items()})


def residual_cnn() -> onnx.ModelProto:
    """Two ReLU outputs are added without a ReLU behind: nothing can hide there."""
    nodes = [
        node("Conv", "x w1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "c2", pads=[1, 1, 1, 1]),
        node("Add", "c2 r1", "a2"),
        node("Relu", "a2", "r2"),
        node("Conv", "r2 w2", "c3", pads=[1, 1, 1, 1]),
        node("Clip", "c3 zero six", "r3"),
        node("Add", "r3 r2", "a3"),
        node("AveragePool", "a3", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p w2", "c4"),
        node("LeakyRelu", "c4", "r4", alpha=0.1),
        node("Flatten", "r4", "f"),
        node("Gemm", "f w3", "z"),
        node("Softmax", "z", "y", axis=1),
    ]
    shapes = {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), "w3": (96, 5)}
    constants = {n: weights(*s) for n, s in shapes.items()}
    constants |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return small_model(nodes, {"x": ["N", 3, 12, 12]}, constants=constants)


def gated_cnn() -> onnx.ModelProto:
    """Squeeze-and-excitation: the Sigmoid is a gate, with a QuantizeLinear between it and the Mul."""
    nodes = [
        node("Conv", "x w1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("GlobalAveragePool", "r1", "g"),
        node("Conv", "g w2", "c2"),
        node("Sigmoid", "c2", "s"),
        node("Mul", "r1 s", "m"),
        node("GlobalAveragePool", "m", "h"),
        node("Flatten", "h", "f"),
        node("MatMul", "f w3", "y"),
    ]
    shapes = {"w1": (6, 3, 3, 3), "w2": (6, 6, 1, 1), "w3": (6, 5)}
    return small_model(nodes, {"x": ["N", 3, 12, 12]}, constants={n: weights(*s) for n, s in shapes.items()})


NETS = {"plain": plain_cnn, "residual": residual_cnn, "gated": gated_cnn}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left: Iterator[dict[str, Array]] = iter([{"x": IMAGES[:12]}, {"x": IMAGES[12:]}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


def quantised(model: onnx.ModelProto, folder: Path, **options: Any) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantiser's own
        quantize_static(model, str(folder / "q.onnx"), Reader(), weight_type=QuantType.QInt8, **options)
    return onnx.load(folder / "q.onnx")


def with_relus(model: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """The quantised model with every ReLU that the quantiser deleted written out again."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {n.output[0] for n in copy.graph.node if n.op_type in ("Relu", "Clip")}
    deleted = [n for n in source.graph.node if n.op_type in ("Relu", "Clip") and n.output[0] not in kept]
    nodes = list(copy.graph.node)
    for relu in deleted:
        inner = f"{relu.output[0]}_before"
        maker = next(i for i, n in enumerate(nodes) if relu.output[0] in n.output)
        nodes[maker].output[:] = [inner if name == relu.output[0] else name for name in nodes[maker].output]
        again = helper.make_node("Relu", [inner], [relu.output[0]], name=relu.name)
        nodes.insert(maker + 1, again)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


@pytest.fixture
def literal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The torch reference, with torch's own fake quantisation for the two operators that it lacks.

    A quantised tensor is held there as the real numbers for which its integers stand.
    """
    torch = pytest.importorskip("torch")
    import reference

    def parameters(n: Any, x: Any, scale: Any) -> dict[str, Any]:
        return {} if scale.numel() == 1 else {"axis": n.get("axis", 1) % x.ndim}

    def quantize(n: Any, x: Any, scale: Any, zero: Any) -> Any:
        low, high = ranges[n.inputs[2]]
        if scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), low, high)
        return torch.fake_quantize_per_channel_affine(x, scale.float(), zero.int(), n.get("axis", 1), low, high)

    def dequantize(n: Any, x: Any, scale: Any, zero: Any = None) -> Any:
        if x.is_floating_point():
            return x
        shape = [-1 if i == n.get("axis", 1) else 1 for i in range(x.ndim)] if scale.numel() > 1 else []
        offset = 0 if zero is None else zero.reshape(shape)
        return (x - offset).double() * scale.reshape(shape)

    ranges: dict[str, tuple[int, int]] = {}
    monkeypatch.setitem(reference.OPS, "QuantizeLinear", quantize)
    monkeypatch.setitem(reference.OPS, "DequantizeLinear", dequantize)
    monkeypatch.setattr(reference, "MOVERS", reference.MOVERS | {"QuantizeLinear", "DequantizeLinear"})

    def attribution(model: onnx.ModelProto, *args: Any, **options: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        for tensor in model.graph.initializer:
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if np.issubdtype(kind, np.integer):
                ranges[tensor.name] = (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
        return reference.attribution(model, *args, **options)

    return attribution


def check(literal: Any, model: onnx.ModelProto, written: onnx.ModelProto, feeds: Mapping[str, Array]) -> None:
    before = ort_run(model, feeds)
    for method in METHODS:
        converted = onnxgbp.convert(model, method=method)
        onnx.checker.check_model(converted, full_check=True)
        assert not any("onnxgbp" in entry.domain for entry in converted.opset_import)
        after = ort_run(converted, feeds)
        for name, array in before.items():
            assert np.array_equal(after[name], array), "the forward pass changed"
        said = {entry.key.removeprefix("onnxgbp."): entry.value for entry in converted.metadata_props}
        wanted, _ = literal(written, dict(feeds), said["explained"], None, list(feeds), method)
        assert cosine(after["attribution"], wanted["x"]) >= 0.99999


CASES = [(name, kind, per_channel) for name in NETS for kind in ("QUInt8", "QInt8") for per_channel in (False, True)]


@pytest.mark.parametrize(("name", "kind", "per_channel"), CASES)
def test_static_quantisation(literal: Any, tmp_path: Path, name: str, kind: str, per_channel: bool) -> None:
    source = NETS[name]()
    model = quantised(source, tmp_path, activation_type=QuantType[kind], per_channel=per_channel)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in model.graph.node}
    check(literal, model, with_relus(model, source), {"x": IMAGES[:4]})
