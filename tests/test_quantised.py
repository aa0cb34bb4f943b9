"""Quantised models: the straight-through estimator, and the ReLU that a quantiser hides in a zero point."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, ort_run, small_model
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

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
    """The torch reference, with torch's own fake quantisation for the operators that it lacks.

    A quantised tensor is held there as the real numbers for which its integers stand.
    """
    torch = pytest.importorskip("torch")
    import reference

    ranges: dict[str, tuple[int, int]] = {}
    before: dict[str, Any] = {}  # each fake-quantised tensor as it was before the rounding, clipped

    def quantize(n: Any, x: Any, scale: Any, zero: Any) -> Any:
        low, high = ranges[n.inputs[2]]
        before[n.outputs[0]] = x.clamp((low - int(zero)) * float(scale), (high - int(zero)) * float(scale)).detach()
        return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), low, high)

    def dequantize(n: Any, x: Any, scale: Any, zero: Any) -> Any:
        if x.is_floating_point():
            before[n.outputs[0]] = before[n.inputs[0]]
            return x
        shape = [-1 if i == n.get("axis", 1) else 1 for i in range(x.ndim)] if scale.numel() > 1 else []
        return (x - zero.reshape(shape)).double() * scale.reshape(shape)

    def max_pool(n: Any, x: Any) -> Any:
        unrounded = before.get(n.inputs[0], x)
        _, places = torch.nn.functional.max_pool2d(
            unrounded, n.get("kernel_shape"), n.get("strides"), return_indices=True
        )
        return x.flatten(2).gather(2, places.flatten(2)).reshape(places.shape)

    for operator, function in (("QuantizeLinear", quantize), ("DequantizeLinear", dequantize), ("MaxPool", max_pool)):
        monkeypatch.setitem(reference.OPS, operator, function)
    monkeypatch.setattr(reference, "MOVERS", reference.MOVERS | {"QuantizeLinear", "DequantizeLinear"})

    def attribution(model: onnx.ModelProto, *args: Any) -> Array:
        for tensor in model.graph.initializer:
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if np.issubdtype(kind, np.integer):
                ranges[tensor.name] = (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
        gradients, _ = reference.attribution(model, *args)
        return gradients["x"]

    return attribution


CASES = [(name, kind, per_channel) for name in NETS for kind in ("QUInt8", "QInt8") for per_channel in (False, True)]


@pytest.mark.parametrize(("name", "kind", "per_channel"), CASES)
def test_against_fake_quantisation(literal: Any, tmp_path: Path, name: str, kind: str, per_channel: bool) -> None:
    source = NETS[name]()
    model = quantised(source, tmp_path, activation_type=QuantType[kind], per_channel=per_channel)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in model.graph.node}
    feeds = {"x": IMAGES[:4]}
    for method in METHODS:
        converted = onnxgbp.convert(model, method=method)
        onnx.checker.check_model(converted, full_check=True)
        # Without fusions: the fused kernels of ONNX Runtime round where the file does not.
        before, after = ort_run(model, feeds, disable=True), ort_run(converted, feeds, disable=True)
        assert np.array_equal(after["y"], before["y"])
        explained = next(entry.value for entry in converted.metadata_props if entry.key == "onnxgbp.explained")
        wanted = literal(with_relus(model, source), feeds, explained, None, ["x"], method)
        assert cosine(after["attribution"], wanted) >= 0.99999


def kinds(model: onnx.ModelProto) -> list[tuple[str, bool]]:
    found = onnxgbp.GradientGraph.build(onnxgbp.load(model)).found
    return [(activation.kind, activation.gate is not None) for activation in found]


def test_hidden_relus_are_found(tmp_path: Path) -> None:
    assert kinds(quantised(plain_cnn(), tmp_path)) == [("QuantizedRelu", False)] * 2
    # Neither the sum of two ReLUs nor the input's own quantiser is one; Clip and LeakyRelu hide or stay.
    assert kinds(quantised(residual_cnn(), tmp_path)) == [("QuantizedRelu", False)] * 3 + [("LeakyRelu", False)]
    assert kinds(quantised(gated_cnn(), tmp_path)) == [("QuantizedRelu", False), ("Sigmoid", True)]


def test_the_audit_spells_it_out(tmp_path: Path) -> None:
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(quantised(plain_cnn(), tmp_path)))
    assert {a.spelled for a in graph.found} == {"QuantizeLinear DequantizeLinear (zero point)"}
    choices = graph.choices(method="guided", activations="relu")
    assert {choice.rule for choice in choices.values()} == {"guided"}


FLOAT_NET = {"grad_logit": ("gradient", 0.99), "gbp_captum": ("guided", 0.995), "deconv_captum": ("deconvnet", 0.994)}


@pytest.mark.parametrize("kind", FLOAT_NET)
def test_corpus_against_the_float_net(kind: str) -> None:
    """Not 0.999: with nothing but its weights rounded to 8 bits, its activations left in float, this net's maps have
    the cosines 0.9946, 0.9974 and 0.9967 with those of the float net. So much do the weights alone change.
    """
    row = next(r for r in json.loads((CORPUS / "manifest.json").read_text()) if r["id"] == "torch_mnist_relu.qdq")
    arrays = np.load(CORPUS / row["npz"])
    method, lowest = FLOAT_NET[kind]
    converted = onnxgbp.convert(CORPUS / row["onnx"], method=method, target="input", activations="relu")
    after = ort_run(converted, {"x": arrays["x"], "target": arrays["target"].astype(np.int64)})
    assert np.array_equal(after["y"], ort_run(onnx.load(CORPUS / row["onnx"]), {"x": arrays["x"]})["y"])
    assert cosine(after["attribution"], arrays[kind]) >= lowest


def pair(x: str, y: str, name: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", f"{x} {name}_s {name}_z", f"{y}_q", **attributes),
        node("DequantizeLinear", f"{y}_q {name}_s {name}_z", y, **attributes),
    ]


def gradient(model: onnx.ModelProto, x: Array, method: str = "gradient", **options: Any) -> Array:
    converted = onnxgbp.convert(model, method=method, target="seed", output="y", **options)
    return ort_run(converted, {"x": x, "seed": np.ones_like(x)}, disable=True)["attribution"]


def test_the_range_clips_and_its_ends_pass() -> None:
    constants = {"s": np.float32(0.1), "z": np.uint8(100)}  # -10 to 15.5
    model = small_model(pair("x", "y", "k"), {"x": ["N", 6]}, constants={f"k_{n}": a for n, a in constants.items()})
    x = np.array([[-11, -10, 0, 15.5, 15.54, 15.56]], np.float32)
    assert gradient(model, x).tolist() == [[0, 1, 1, 1, 1, 0]]


def test_per_axis() -> None:
    constants = {"k_s": np.array([0.1, 0.2], np.float32), "k_z": np.array([0, -10], np.int8)}
    model = small_model(pair("x", "y", "k", axis=1), {"x": ["N", 2, 2]}, constants=constants)
    x = np.array([[[12.6, 12.8], [27.3, 27.6]]], np.float32)  # the ends are 12.7 and 27.4
    assert gradient(model, x).tolist() == [[[1, 0], [1, 0]]]


@pytest.mark.parametrize(("zero", "kind"), [(0, np.uint8), (-128, np.int8)])
def test_a_hidden_relu_passes_what_rounds_to_zero_but_not_zero(zero: int, kind: Any) -> None:
    constants = {"k_s": np.float32(0.1), "k_z": np.array(zero, kind), "c": np.float32(0)}
    model = small_model([node("Sub", "x c", "h"), *pair("h", "y", "k")], {"x": ["N", 5]}, constants=constants)
    x = np.array([[-1, 0, 0.01, 1, 26]], np.float32)
    assert gradient(model, x).tolist() == [[0, 0, 1, 1, 0]]
    assert gradient(model, x, "guided").tolist() == [[0, 0, 1, 1, 0]]
    assert gradient(model, x, "deconvnet").tolist() == [[1, 1, 1, 1, 1]]


def test_the_rule_meets_the_sum_of_all_that_read_the_integers() -> None:
    """One ReLU, dequantised twice: guided blocks the sum 2 - 3 < 0, where each reader alone would pass 2."""
    nodes = [
        node("Sub", "x c", "h"),
        *pair("h", "a", "k"),
        node("DequantizeLinear", "a_q k_s k_z", "b"),
        node("Mul", "a two", "a2"),
        node("Mul", "b three", "b3"),
        node("Sub", "a2 b3", "y"),
    ]
    constants = {"k_s": np.float32(0.1), "k_z": np.uint8(0), "c": np.float32(0)}
    constants |= {"two": np.float32(2), "three": np.float32(3)}
    model = small_model(nodes, {"x": ["N", 2]}, constants=constants)
    x = np.array([[1, 2]], np.float32)
    assert gradient(model, x).tolist() == [[-1, -1]]
    assert gradient(model, x, "guided").tolist() == [[0, 0]]


def test_another_scale_behind() -> None:
    nodes = [pair("x", "y", "k")[0], node("DequantizeLinear", "y_q j_s k_z", "y")]
    constants = {"k_s": np.float32(0.1), "j_s": np.float32(0.3), "k_z": np.uint8(9)}
    model = small_model(nodes, {"x": ["N", 1]}, constants=constants)
    assert gradient(model, np.ones((1, 1), np.float32)).item() == pytest.approx(3)


def test_integers_that_are_clipped_have_a_narrower_range() -> None:
    """As torch exports 7 bits for activations."""
    quantize, dequantize = pair("x", "y", "k")
    dequantize.input[0] = "clipped"
    nodes = [quantize, node("Clip", "y_q low high", "clipped"), dequantize]
    constants = {"k_s": np.float32(0.1), "k_z": np.uint8(20), "low": np.uint8(0), "high": np.uint8(127)}
    model = small_model(nodes, {"x": ["N", 4]}, constants=constants)
    x = np.array([[-2.1, -2, 10.7, 10.8]], np.float32)  # -2 to 10.7
    assert gradient(model, x).tolist() == [[0, 1, 1, 0]]


def test_16_bits() -> None:
    constants = {"k_s": np.float32(0.01), "k_z": np.int16(0)}
    model = small_model(pair("x", "y", "k"), {"x": ["N", 2]}, constants=constants, opset=21)
    assert gradient(model, np.array([[1, 330]], np.float32)).tolist() == [[1, 0]]


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(onnxgbp.OnnxgbpError) as caught:
        onnxgbp.convert(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_qoperator_format_is_refused(tmp_path: Path) -> None:
    model = quantised(plain_cnn(), tmp_path, quant_format=QuantFormat.QOperator)
    assert "QLinearConv" in {n.op_type for n in model.graph.node}
    said = refusal(model)
    assert "computes in integers" in said
    assert "QDQ" in said


def test_dynamic_quantisation_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(gated_cnn(), tmp_path / "d.onnx")
    said = refusal(onnx.load(tmp_path / "d.onnx"))
    assert "while the model runs" in said
    assert "quantize_static" in said


def test_integers_that_another_operator_reads_are_refused() -> None:
    nodes = [
        pair("x", "a", "k")[0],
        node("Transpose", "a_q", "t", perm=[1, 0]),
        node("DequantizeLinear", "t k_s k_z", "y"),
    ]
    constants = {"k_s": np.float32(0.1), "k_z": np.uint8(9)}
    assert "n_t" in refusal(small_model(nodes, {"x": [2, 2]}, constants=constants))


def test_a_scale_that_is_computed_is_refused() -> None:
    nodes = [node("ReduceMax", "x", "k_s", keepdims=0), *pair("x", "y", "k")]
    assert "n_y_q" in refusal(small_model(nodes, {"x": [2, 2]}, constants={"k_z": np.uint8(9)}))
