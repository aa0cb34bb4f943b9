"""The rules against literal replicas in numpy, the algebra of the semantics, and every spelling of an activation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checking import Array, evaluated, evaluator, ort_run, reference_run, small_model, to_float64
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxgbp
from onnxgbp.activations import ACTIVATIONS

METHODS = ("gradient", "deconvnet", "guided", "as-relu", "rectgrad:90")


def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, outputs, **attributes)


def attribution(model: ModelProto, x: Array, dy: Array, **options: Any) -> Array:
    """What arrives at x when dy arrives at y."""
    converted = onnxgbp.convert(model, target="seed", output="y", wrt="x", **options)
    return reference_run(converted, {"x": x, "seed": dy})["attribution"]


# --- literal replicas -----------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    """An activation at many points: x, y = f(x), the slope f'(x), each [N, ...]; and whether it is like a ReLU."""

    x: Array
    y: Array
    slope: Array
    like_relu: bool = False


def gradient(at: Point, dy: Array) -> Array:
    return np.where(at.slope == 0, 0, dy * at.slope)


def deconvnet(at: Point, dy: Array) -> Array:
    return np.where(dy > 0, dy, 0)


def guided(at: Point, dy: Array) -> Array:
    return np.where(dy > 0, gradient(at, dy), 0)


def as_relu(at: Point, dy: Array) -> Array:
    return np.where((dy > 0) & (at.x > 0), dy, 0) if at.like_relu else guided(at, dy)


def rectgrad(at: Point, dy: Array, percentile: float = 90) -> Array:
    weight = (at.y * dy).reshape(len(dy), -1)
    threshold = np.percentile(weight, percentile, axis=1, keepdims=True)
    return np.where((weight > threshold).reshape(dy.shape), gradient(at, dy), 0)


RULES = {
    "gradient": gradient,
    "deconvnet": deconvnet,
    "guided": guided,
    "as-relu": as_relu,
    "rectgrad:90": rectgrad,
}
LIKE_RELU = "LeakyRelu PRelu Elu Selu Celu ThresholdedRelu Softplus HardSwish Gelu GeluTanh Swish Mish".split()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def gelu_tanh_slope(x: float) -> float:
    c = math.sqrt(2 / math.pi)
    t = math.tanh(c * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * x * x)


def mish_slope(x: float) -> float:
    t = math.tanh(softplus(x))
    return t + x * (1 - t * t) * sigmoid(x)


SELU = (1.67326319217681884765625, 1.05070102214813232421875)

# operator, opset, attributes, slope at x. Every kind of the table of activations stands here (see the test below).
OPERATORS: dict[str, tuple[str, int, dict[str, Any], Callable[[float], float]]] = {
    "Relu": ("Relu", 17, {}, lambda x: float(x > 0)),
    "Relu6": ("Clip", 9, {"min": 0.0, "max": 6.0}, lambda x: float(0 < x < 6)),
    "Clip": ("Clip", 9, {"min": -1.0, "max": 2.0}, lambda x: float(-1 < x < 2)),
    "LeakyRelu": ("LeakyRelu", 17, {"alpha": 0.125}, lambda x: 1.0 if x > 0 else 0.125),
    "Elu": ("Elu", 17, {"alpha": 1.5}, lambda x: 1.0 if x > 0 else 1.5 * math.exp(x)),
    "Selu": ("Selu", 17, {}, lambda x: SELU[1] * (1.0 if x > 0 else SELU[0] * math.exp(x))),
    "Celu": ("Celu", 17, {"alpha": 2.0}, lambda x: 1.0 if x > 0 else math.exp(x / 2)),
    "ThresholdedRelu": ("ThresholdedRelu", 17, {"alpha": 0.75}, lambda x: float(x > 0.75)),
    "Shrink": ("Shrink", 17, {"lambd": 0.75, "bias": 0.25}, lambda x: float(abs(x) > 0.75)),
    "Sigmoid": ("Sigmoid", 17, {}, lambda x: sigmoid(x) * sigmoid(-x)),
    "Tanh": ("Tanh", 17, {}, lambda x: 1 - math.tanh(x) ** 2),
    "Softplus": ("Softplus", 17, {}, sigmoid),
    "Softsign": ("Softsign", 17, {}, lambda x: 1 / (1 + abs(x)) ** 2),
    "HardSigmoid": ("HardSigmoid", 17, {"alpha": 0.25, "beta": 0.5}, lambda x: 0.25 if -2 < x < 2 else 0.0),
    "HardSwish": ("HardSwish", 17, {}, lambda x: 0.0 if x <= -3 else 1.0 if x >= 3 else x / 3 + 0.5),
    "Gelu": (
        "Gelu",
        20,
        {},
        lambda x: (1 + math.erf(x / math.sqrt(2))) / 2 + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    ),
    "GeluTanh": ("Gelu", 20, {"approximate": "tanh"}, gelu_tanh_slope),
    "Mish": ("Mish", 18, {}, mish_slope),
    "Swish": ("Swish", 24, {"alpha": 1.5}, lambda x: sigmoid(1.5 * x) * (1 + 1.5 * x * sigmoid(-1.5 * x))),
}

SPECIAL = np.array([0.0, -0.0, 1e-30, -1e-30, 6.0, -1.0, 2.0, -2.0, 0.75, 3.0, -3.0, 20.0, -20.0])


def _points() -> tuple[Array, Array]:
    """Each special and random x with a positive, a negative and a zero dy."""
    rng = np.random.default_rng(0)
    x = np.concatenate([SPECIAL, rng.uniform(-8, 8, 200)])
    dy = np.concatenate([np.full(len(x), 0.7), np.full(len(x), -1.3), np.zeros(len(x))])
    return np.tile(x, 3)[None], dy[None]


def test_every_activation_has_a_replica() -> None:
    # PRelu has tests of its own, with a slope per channel; QuantizedRelu stands in no model by that name.
    assert {*OPERATORS, "PRelu", "QuantizedRelu"} >= set(ACTIVATIONS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_replica(kind: str, method: str) -> None:
    operator, opset, attributes, slope = OPERATORS[kind]
    x, dy = _points()
    model = small_model(
        [node(operator, ["x"], ["y"], **attributes)], {"x": list(x.shape)}, opset=opset, dtype=TensorProto.DOUBLE
    )
    slopes = np.vectorize(slope, otypes=[np.float64])(x)
    y = reference_run(model, {"x": x})["y"]
    want = RULES[method](Point(x, y, slopes, kind in LIKE_RELU), dy)
    got = attribution(model, x, dy, method=method)
    # 1e-7: the evaluator rounds the attributes alpha and gamma to float32, as the standard stores them.
    assert np.allclose(got, want, rtol=1e-7, atol=1e-12)
    assert np.array_equal(got == 0, want == 0) or kind in (
        "Sigmoid",
        "Tanh",
        "Elu",
        "Gelu",
        "GeluTanh",
        "Mish",
        "Swish",
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3,), (1,), (3, 1, 1)])
def test_prelu(shape: tuple[int, ...], method: str) -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 4, 3)), rng.standard_normal((2, 3, 4, 3))
    x[0, 0, 0] = 0
    slope = np.array([0.25, -0.5, 2.0])[: shape[0]].reshape(shape)
    model = small_model(
        [node("PRelu", ["x", "s"], ["y"])], {"x": [2, 3, 4, 3]}, constants={"s": slope}, dtype=TensorProto.DOUBLE
    )
    slopes = np.where(x > 0, 1.0, np.broadcast_to(slope, x.shape))
    want = RULES[method](Point(x, x * slopes, slopes, True), dy)
    assert np.allclose(attribution(model, x, dy, method=method), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["Relu", "Relu6", "Clip", "ThresholdedRelu", "HardSigmoid", "HardSwish"])
def test_nan_and_infinity_stop_at_a_closed_gate(kind: str, method: str) -> None:
    operator, opset, attributes, _ = OPERATORS[kind]
    x = np.array([[-5.0, -5.0, -5.0]], np.float32)
    dy = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    model = small_model([node(operator, ["x"], ["y"], **attributes)], {"x": [1, 3]}, opset=opset)
    converted = onnxgbp.convert(model, method=method, target="seed", output="y")
    if method == "deconvnet":  # no gate of the forward pass: what is not positive stops
        assert ort_run(converted, {"x": x, "seed": dy})["attribution"][0, 1:].tolist() == [np.inf, 0]
    else:
        assert ort_run(converted, {"x": x, "seed": dy})["attribution"].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_far_from_zero_nothing_overflows(kind: str, method: str) -> None:
    """In float32, where exp(100) is infinite: the attribution stays finite."""
    operator, opset, attributes, _ = OPERATORS[kind]
    if operator == "Swish":
        pytest.skip("ONNX Runtime has no kernel for Swish of opset 24")
    x = np.array([[1e4, -1e4, 200.0, -200.0, 88.8, -88.8]], np.float32)
    model = small_model([node(operator, ["x"], ["y"], **attributes)], {"x": [1, 6]}, opset=opset)
    converted = onnxgbp.convert(model, method=method, target="seed", output="y")
    result = ort_run(converted, {"x": x, "seed": np.ones_like(x)})["attribution"]
    assert np.isfinite(result).all()
    assert (np.abs(result) <= 2).all()


@pytest.mark.parametrize("kind", OPERATORS)
def test_far_from_zero_in_float16(kind: str) -> None:
    """There x^2 is infinite from 256 on, x^3 from 41 on: the slope is what it is in float64."""
    operator, opset, attributes, slope = OPERATORS[kind]
    x = np.array([[41, -41, 90, -90, 300, -300, 6e4, -6e4]], np.float16)
    model = small_model(
        [node(operator, ["x"], ["y"], **attributes)], {"x": [1, 8]}, opset=opset, dtype=TensorProto.FLOAT16
    )
    got = attribution(model, x, np.ones_like(x), method="gradient")
    assert got.dtype == np.float16
    assert np.allclose(got, [[slope(float(value)) for value in x[0]]], rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_a_softsign_keeps_its_digits(scale: float) -> None:
    x = (np.array([[-3, -0.5, 0.25, 2]]) * scale).astype(np.float32)
    model = small_model([node("Softsign", ["x"], ["y"])], {"x": [1, 4]})
    got = attribution(model, x, np.ones_like(x), method="gradient")
    assert np.allclose(got, 1 / (1 + np.abs(x.astype(float))) ** 2, rtol=1e-5, atol=0)


TINY = np.float32(1e-45)  # the smallest subnormal


@pytest.mark.parametrize("method", METHODS[:4])
@pytest.mark.parametrize("kind", ["Relu", "Relu6", "LeakyRelu", "Clip"])
def test_subnormals_and_neighbours_of_the_bounds(kind: str, method: str) -> None:
    """In ONNX Runtime's float32: the least x > 0 opens, the bound itself and what lies beyond it are closed."""
    operator, opset, attributes, slope = OPERATORS[kind]
    bounds = np.array([-1, 2, 6], np.float32)
    beside = [np.nextafter(bounds, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([[TINY, -TINY, 0, -0.0], bounds, *beside]).astype(np.float32)
    dy = np.array([1, -1, TINY, -TINY, 0, -0.0], np.float32)
    x, dy = np.tile(x, len(dy))[None], np.repeat(dy, len(x))[None]
    model = small_model([node(operator, ["x"], ["y"], **attributes)], {"x": list(x.shape)}, opset=opset)
    slopes = np.vectorize(slope, otypes=[np.float32])(x)
    want = RULES[method](Point(x, x, slopes, kind in LIKE_RELU), dy)
    converted = onnxgbp.convert(model, method=method, target="seed", output="y")
    assert np.array_equal(ort_run(converted, {"x": x, "seed": dy})["attribution"], want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible_where_the_gate_is_open(bad: float) -> None:
    """A rule hides no overflow of the layers behind it; only what it stops is gone."""
    model = small_model([node("Relu", ["x"], ["y"])], {"x": [1, 3]})
    x, dy = np.array([[1, -1, 1]], np.float32), np.array([[bad, bad, 2]], np.float32)
    for method in ("gradient", "guided", "as-relu"):
        converted = onnxgbp.convert(model, method=method, target="seed", output="y")
        got = ort_run(converted, {"x": x, "seed": dy})["attribution"]
        assert np.array_equal(got, np.array([[bad, 0, 2]], np.float32), equal_nan=True), method


def test_rectgrad_passes_no_tie() -> None:
    """Strictly above the percentile: of equal weights none passes, nor does what ties with the threshold."""
    model = small_model([node("Relu", ["x"], ["y"])], {"x": [2, 4]})
    x = np.array([[1, 1, 1, 1], [1, 2, 2, 3]], np.float32)
    dy = np.ones_like(x)
    for percentile, want in ((0, [1, 1, 1]), (50, [0, 0, 1]), (99, [0, 0, 1])):
        got = attribution(model, x, dy, method=f"rectgrad:{percentile}")
        assert got.tolist() == [[0] * 4, [0, *want]]
        assert np.array_equal(got, rectgrad(Point(x, x, np.ones_like(x)), dy, percentile))


# --- the algebra of the semantics -----------------------------------------------------------------


def _relu_minus_3h() -> ModelProto:
    nodes = [
        node("Identity", ["x"], ["h"]),
        node("Relu", ["h"], ["r"], name="relu"),
        node("Mul", ["h", "three"], ["t"]),
    ]
    nodes.append(node("Sub", ["r", "t"], ["y"]))
    return small_model(nodes, {"x": [1, 2]}, constants={"three": np.array(3, np.float32)})


@pytest.mark.parametrize(("method", "want"), [("gradient", [-2, -3]), ("guided", [-2, -3]), ("deconvnet", [-2, -2])])
def test_the_rule_acts_on_the_edge_not_on_the_sum(method: str, want: list[float]) -> None:
    """relu(h) - 3 h at h = [1, -1]: what h gets from the other branch is not the rule's business."""
    x, dy = np.array([[1, -1]], np.float32), np.ones((1, 2), np.float32)
    assert attribution(_relu_minus_3h(), x, dy, method=method).tolist() == [want]


def test_one_relu_that_feeds_two_branches() -> None:
    """Both arrive at the output of the one Relu, so the rule sees their sum: 2 - 3 is negative, 3 - 2 positive."""
    constants = {"two": np.array([[2, -2]], np.float32), "three": np.array([[-3, 3]], np.float32)}
    nodes = [node("Relu", ["x"], ["r"]), node("Mul", ["r", "two"], ["a"]), node("Mul", ["r", "three"], ["b"])]
    model = small_model([*nodes, node("Add", ["a", "b"], ["y"])], {"x": [1, 2]}, constants=constants)
    x, dy = np.ones((1, 2), np.float32), np.ones((1, 2), np.float32)
    for method, want in (("gradient", [-1, 1]), ("guided", [0, 1]), ("deconvnet", [0, 1])):
        assert attribution(model, x, dy, method=method).tolist() == [want]


def test_two_relus_of_one_tensor() -> None:
    """Each has an edge of its own: 2 passes one, -3 is stopped at the other."""
    constants = {"two": np.array([[2]], np.float32), "three": np.array([[-3]], np.float32)}
    nodes = [node("Relu", ["x"], ["r"]), node("Relu", ["x"], ["s"]), node("Mul", ["r", "two"], ["a"])]
    nodes += [node("Mul", ["s", "three"], ["b"]), node("Add", ["a", "b"], ["y"])]
    model = small_model(nodes, {"x": [1, 1]}, constants=constants)
    x, dy = np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)
    for method, want in (("gradient", -1), ("guided", 2), ("deconvnet", 2)):
        assert attribution(model, x, dy, method=method).item() == want


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_at_zero_a_relu_is_closed(zero: float) -> None:
    model = small_model([node("Relu", ["x"], ["y"])], {"x": [1, 1]})
    x, dy = np.full((1, 1), zero, np.float32), np.ones((1, 1), np.float32)
    assert [attribution(model, x, dy, method=m).item() for m in METHODS] == [0, 1, 0, 0, 0]


def test_at_its_bounds_a_clip_is_closed() -> None:
    constants = {"low": np.array(-1, np.float32), "high": np.array(2, np.float32)}
    model = small_model([node("Clip", ["x", "low", "high"], ["y"])], {"x": [1, 4]}, constants=constants)
    x, dy = np.array([[-1, 2, 1.999, -0.999]], np.float32), np.ones((1, 4), np.float32)
    assert attribution(model, x, dy, method="gradient").tolist() == [[0, 0, 1, 1]]
    assert attribution(model, x, dy, method="guided").tolist() == [[0, 0, 1, 1]]
    assert attribution(model, x, dy, method="deconvnet").tolist() == [[1, 1, 1, 1]]


def test_an_inactive_target_unit_gives_zero() -> None:
    model = small_model([node("Relu", ["x"], ["y"])], {"x": ["N", 3]})
    x = {"x": np.array([[1, -1, 2]], np.float32)}
    inactive, active = (ort_run(onnxgbp.convert(model, target=t), x)["attribution"] for t in (1, 2))
    assert not inactive.any()
    assert active.tolist() == [[0, 0, 1]]


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["Sigmoid", "HardSigmoid", "Tanh"])
@pytest.mark.parametrize("between", [[], [("Unsqueeze", "axes"), ("Squeeze", "axes")]])
def test_a_gate_is_plain(operator: str, between: list[tuple[str, str]]) -> None:
    """Squeeze and excitation: what the gate multiplies comes from elsewhere."""
    nodes, name = [node("MatMul", ["x", "w"], ["z"]), node(operator, ["z"], ["g"], name="gate")], "g"
    for i, (move, axes) in enumerate(between):
        nodes.append(node(move, [name, axes], [f"g{i}"]))
        name = f"g{i}"
    nodes += [node("Relu", ["x"], ["r"], name="relu"), node("Mul", ["r", name], ["y"])]
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((4, 4)).astype(np.float32)} | ({"axes": np.array([2])} if between else {})
    model = small_model(nodes, {"x": ["N", 4]}, constants=constants)
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(model))
    rules = {choice.name: choice.rule for choice in graph.choices(method="guided").values()}
    assert rules == {"gate": "gradient", "relu": "guided"}
    assert all("gate" in choice.reason for choice in graph.choices(method="guided").values() if choice.name == "gate")


def test_a_sigmoid_scaled_by_a_constant_is_no_gate() -> None:
    nodes = [node("Sigmoid", ["x"], ["s"], name="act"), node("Mul", ["s", "c"], ["y"])]
    graph = _graph(small_model(nodes, {"x": ["N", 4]}, constants={"c": np.full(4, 2, np.float32)}))
    assert [choice.rule for choice in graph.choices().values()] == ["guided"]


# --- which node gets which ------------------------------------------------------------------------


def _graph(model: ModelProto) -> onnxgbp.GradientGraph:
    return onnxgbp.GradientGraph.build(onnxgbp.load(model), target="seed", output="y", wrt="x")


def _chain() -> ModelProto:
    operators = [("Relu", "layer1/relu"), ("Tanh", "layer1/tanh"), ("Relu", "layer2/relu"), ("Elu", "layer2/elu")]
    nodes = [
        node(operator, ["x" if i == 0 else f"t{i}"], ["y" if i == len(operators) - 1 else f"t{i + 1}"], name=name)
        for i, (operator, name) in enumerate(operators)
    ]
    return small_model(nodes, {"x": ["N", 4]})


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ([], ["guided"] * 4),
        (["layer1/*=deconvnet"], ["deconvnet", "deconvnet", "guided", "guided"]),
        (["layer1/tanh=gradient", "layer1/*=deconvnet"], ["deconvnet", "gradient", "guided", "guided"]),
        (["layer1/*=deconvnet", "layer1/tanh=gradient"], ["deconvnet", "deconvnet", "guided", "guided"]),
        ([("*relu", "gradient")], ["gradient", "guided", "gradient", "guided"]),
        (["*=gradient"], ["gradient"] * 4),
    ],
)
def test_the_first_match_wins(rules: list[Any], want: list[str]) -> None:
    assert [choice.rule for choice in _graph(_chain()).choices(rule=rules).values()] == want


@pytest.mark.parametrize(
    ("activations", "want"),
    [
        ("all", ["guided"] * 4),
        ("relu", ["guided", "gradient", "guided", "gradient"]),
        ("relu,Elu", ["guided", "gradient", "guided", "guided"]),
        (["Tanh"], ["gradient", "guided", "gradient", "gradient"]),
    ],
)
def test_activations(activations: Any, want: list[str]) -> None:
    choices = _graph(_chain()).choices(activations=activations)
    assert [choice.rule for choice in choices.values()] == want
    assert all(choice.reason for choice in choices.values())


def test_a_mix_of_rules_is_the_mix_of_their_steps() -> None:
    x, dy = np.random.default_rng(0).standard_normal((2, 5, 4))
    model = to_float64(_chain())
    got = attribution(model, x, dy, method="guided", rule=["layer1/relu=deconvnet", "layer2/elu=gradient"])
    t1 = np.maximum(x, 0)
    t2 = np.tanh(t1)
    t3 = np.maximum(t2, 0)
    d3 = gradient(Point(t3, t3, np.where(t3 > 0, 1, np.exp(t3))), dy)
    d2 = guided(Point(t2, t3, (t2 > 0).astype(float)), d3)
    d1 = guided(Point(t1, t2, 1 - t2**2), d2)
    assert np.allclose(got, deconvnet(Point(x, t1, np.ones_like(x)), d1))


def test_rectgrad_of_a_free_size_takes_its_percentile_at_run_time() -> None:
    model = small_model([node("Relu", ["x"], ["y"])], {"x": ["N", 2, "H", "W"]}, dtype=TensorProto.DOUBLE)
    for shape in ((3, 2, 5, 7), (2, 2, 1, 1)):
        x, dy = np.random.default_rng(1).standard_normal((2, *shape))
        for percentile in (0, 50, 90, 98):
            got = attribution(model, x, dy, method=f"rectgrad:{percentile}")
            want = rectgrad(Point(x, np.maximum(x, 0), (x > 0).astype(float)), dy, percentile)
            assert np.array_equal(got, want)


def test_a_rule_of_the_callers_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(edge: Any, share: float = 0.5) -> Any:
        return edge.step(edge.op.Mul(edge.dy, share))

    monkeypatch.setitem(onnxgbp.RULES, "half", half)
    model = small_model([node("Relu", ["x"], ["y"])], {"x": [1, 2]})
    x, dy = np.array([[1, -1]], np.float32), np.array([[-4, 4]], np.float32)
    assert attribution(model, x, dy, method="half").tolist() == [[-2, 0]]
    assert attribution(model, x, dy, method="half:0.25").tolist() == [[-1, 0]]
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(model), target="seed", output="y")
    (choice,) = graph.choices(method="half").values()
    assert choice.note == "a rule of the caller's"
    for wrong in ("half:x", "half:1:2", "guided:1", "twice"):
        with pytest.raises(onnxgbp.OnnxgbpError, match=wrong):
            attribution(model, x, dy, method=wrong)


def _fork() -> ModelProto:
    """Two ways to the sum, one of two activations and one of one, and a last activation behind it."""
    nodes = [
        node("Relu", ["x"], ["a"], name="long/first"),
        node("Tanh", ["a"], ["b"], name="long/second"),
        node("Clip", ["x", "zero", "six"], ["c"], name="short"),
        node("Add", ["b", "c"], ["s"]),
        node("Relu", ["s"], ["y"], name="last"),
    ]
    constants = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return small_model(nodes, {"x": [1, 4]}, constants=constants)


@pytest.mark.parametrize(
    ("patterns", "deconvnets"),
    [
        (["long/*=deconvnet"], {"long/first", "long/second"}),
        (["type:Clip=deconvnet"], {"short"}),
        (["type:Relu6=deconvnet"], {"short"}),
        (["type:Relu*=deconvnet"], {"long/first", "last", "short"}),
        (["depth:1=deconvnet"], {"long/first", "short"}),
        (["depth:<=2=deconvnet"], {"long/first", "short", "long/second"}),
        (["depth:>=-1=deconvnet"], {"last"}),
        (["depth:<-1=deconvnet"], {"long/first", "short", "long/second"}),
        (["type:Tanh=gradient", "depth:>=2=deconvnet"], {"last"}),
    ],
)
def test_patterns_of_names_types_and_depth(patterns: list[str], deconvnets: set[str]) -> None:
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(_fork()), target="seed", output="y")
    choices = graph.choices(rule=patterns).values()
    assert {choice.name for choice in choices if choice.rule == "deconvnet"} == deconvnets
    assert {choice.name: choice.depth for choice in choices} == {
        "long/first": 1,
        "long/second": 2,
        "short": 1,
        "last": 3,
    }


@pytest.mark.parametrize("pattern", ["depth:9", "type:Elu", "nothing", "depth:<1"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(_fork()), target="seed", output="y")
    with pytest.raises(
        onnxgbp.OnnxgbpError, match=r"matches no activation.*of type Relu, Relu6, Tanh, at depth 1 to 3"
    ):
        graph.choices(rule=[f"{pattern}=deconvnet"])


def test_a_malformed_depth_is_refused() -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match="'depth:last' is no depth"):
        onnxgbp.convert(_fork(), target="seed", output="y", rule="depth:last=guided")


# --- spellings ------------------------------------------------------------------------------------

Spelling = tuple[list[Any], dict[str, Any], int]


def f32(value: Any) -> Array:
    return np.asarray(value, np.float32)


def _spellings() -> dict[str, tuple[str, Spelling]]:
    """Name -> the kind that it must be recognised as, and its nodes from x to y, constants and opset."""
    zero, six, half, one = f32(0), f32(6), f32(0.5), f32(1)
    root = f32(math.sqrt(2))
    c = f32(math.sqrt(2 / math.pi))
    cube = f32(0.044715)

    def erf(*rest: Any) -> list[Any]:
        return [node("Div", ["x", "root"], ["d"]), node("Erf", ["d"], ["e"]), node("Add", ["e", "one"], ["a"]), *rest]

    gelu = {"root": root, "one": one, "half": half}
    tanh_constants = {"c": c, "cube": cube, "half": half, "one": one, "three": f32(3)}
    return {
        "Max(x, 0)": ("Relu", ([node("Max", ["x", "zero"], ["y"])], {"zero": zero}, 17)),
        "Max(0, x)": ("Relu", ([node("Max", ["zero", "x"], ["y"])], {"zero": f32([0])}, 17)),
        "Clip(min=0) attribute": ("Relu", ([node("Clip", ["x"], ["y"], min=0.0)], {}, 9)),
        "Clip(min=0) input": ("Relu", ([node("Clip", ["x", "zero"], ["y"])], {"zero": zero}, 13)),
        "Clip(min=0, max=inf)": (
            "Relu",
            ([node("Clip", ["x", "zero", "m"], ["y"])], {"zero": zero, "m": f32(np.inf)}, 13),
        ),
        "Clip(min=0, max=FLT_MAX)": ("Relu", ([node("Clip", ["x"], ["y"], min=0.0, max=3.4028234663852886e38)], {}, 9)),
        "Clip(0, 6) attributes": ("Relu6", ([node("Clip", ["x"], ["y"], min=0.0, max=6.0)], {}, 10)),
        "Clip(0, 6) initializers": (
            "Relu6",
            ([node("Clip", ["x", "zero", "six"], ["y"])], {"zero": zero, "six": six}, 17),
        ),
        "Clip(0, 6) Constant nodes": (
            "Relu6",
            (
                [
                    node("Constant", [], ["zero"], value_float=0.0),
                    node("Constant", [], ["six"], value=helper.make_tensor("six", TensorProto.FLOAT, [], [6.0])),
                    node("Clip", ["x", "zero", "six"], ["y"]),
                ],
                {},
                17,
            ),
        ),
        "Min(Max(x, 0), 6)": (
            "Relu6",
            ([node("Max", ["x", "zero"], ["m"]), node("Min", ["m", "six"], ["y"])], {"zero": zero, "six": six}, 17),
        ),
        "Min(Relu(x), 6)": (
            "Relu6",
            ([node("Relu", ["x"], ["m"]), node("Min", ["six", "m"], ["y"])], {"six": six}, 17),
        ),
        "Keras PReLU": (
            "PRelu",
            (
                [
                    node("Relu", ["x"], ["p"]),
                    node("Neg", ["x"], ["n"]),
                    node("Relu", ["n"], ["q"]),
                    node("Mul", ["q", "s"], ["m"]),
                    node("Add", ["p", "m"], ["y"]),
                ],
                {"s": f32([-0.25, -0.5, -0.75, -0.125])},
                17,
            ),
        ),
        "Keras PReLU, sides swapped": (
            "PRelu",
            (
                [
                    node("Neg", ["x"], ["n"]),
                    node("Relu", ["n"], ["q"]),
                    node("Mul", ["s", "q"], ["m"]),
                    node("Relu", ["x"], ["p"]),
                    node("Add", ["m", "p"], ["y"]),
                ],
                {"s": f32([-0.25, -0.5, -0.75, -0.125])},
                17,
            ),
        ),
        "SiLU": ("Swish", ([node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])], {}, 17)),
        "SiLU, sides swapped": ("Swish", ([node("Sigmoid", ["x"], ["s"]), node("Mul", ["s", "x"], ["y"])], {}, 17)),
        "Swish with a factor": (
            "Swish",
            (
                [node("Mul", ["x", "k"], ["z"]), node("Sigmoid", ["z"], ["s"]), node("Mul", ["x", "s"], ["y"])],
                {"k": f32(1.702)},
                17,
            ),
        ),
        "GELU (x * (1 + erf)) * 0.5": (
            "Gelu",
            (erf(node("Mul", ["x", "a"], ["m"]), node("Mul", ["m", "half"], ["y"])), gelu, 17),
        ),
        "GELU (x * 0.5) * (1 + erf)": (
            "Gelu",
            (erf(node("Mul", ["x", "half"], ["m"]), node("Mul", ["m", "a"], ["y"])), gelu, 17),
        ),
        "GELU x * (0.5 * (1 + erf))": (
            "Gelu",
            (erf(node("Mul", ["half", "a"], ["m"]), node("Mul", ["x", "m"], ["y"])), gelu, 17),
        ),
        "GELU with Mul by 1 / sqrt(2)": (
            "Gelu",
            (
                [
                    node("Mul", ["x", "inverse"], ["d"]),
                    node("Erf", ["d"], ["e"]),
                    node("Add", ["one", "e"], ["a"]),
                    node("Mul", ["a", "x"], ["m"]),
                    node("Div", ["m", "two"], ["y"]),
                ],
                {"inverse": f32(math.sqrt(0.5)), "one": one, "two": f32(2)},
                17,
            ),
        ),
        "GELU tanh": (
            "GeluTanh",
            (
                [
                    node("Pow", ["x", "three"], ["x3"]),
                    node("Mul", ["x3", "cube"], ["k"]),
                    node("Add", ["x", "k"], ["u"]),
                    node("Mul", ["u", "c"], ["v"]),
                    node("Tanh", ["v"], ["t"]),
                    node("Add", ["t", "one"], ["a"]),
                    node("Mul", ["x", "half"], ["h"]),
                    node("Mul", ["h", "a"], ["y"]),
                ],
                tanh_constants,
                17,
            ),
        ),
        "GELU tanh with x * x * x": (
            "GeluTanh",
            (
                [
                    node("Mul", ["x", "x"], ["x2"]),
                    node("Mul", ["x2", "x"], ["x3"]),
                    node("Mul", ["cube", "x3"], ["k"]),
                    node("Add", ["k", "x"], ["u"]),
                    node("Mul", ["c", "u"], ["v"]),
                    node("Tanh", ["v"], ["t"]),
                    node("Add", ["one", "t"], ["a"]),
                    node("Mul", ["half", "a"], ["h"]),
                    node("Mul", ["x", "h"], ["y"]),
                ],
                tanh_constants,
                17,
            ),
        ),
        "HardSwish as Mul(x, HardSigmoid)": (
            "HardSwish",
            ([node("HardSigmoid", ["x"], ["s"], alpha=1 / 6, beta=0.5), node("Mul", ["x", "s"], ["y"])], {}, 13),
        ),
        "HardSwish of Paddle": (
            "HardSwish",
            (
                [
                    node("Add", ["x", "three"], ["a"]),
                    node("Clip", ["a", "zero", "six"], ["k"]),
                    node("Mul", ["x", "k"], ["m"]),
                    node("Div", ["m", "six"], ["y"]),
                ],
                {"three": f32(3), "zero": zero, "six": six},
                13,
            ),
        ),
        "HardSigmoid as Clip and Div": (
            "HardSigmoid",
            (
                [
                    node("Add", ["x", "three"], ["a"]),
                    node("Clip", ["a", "zero", "six"], ["k"]),
                    node("Div", ["k", "six"], ["y"]),
                ],
                {"three": f32(3), "zero": zero, "six": six},
                13,
            ),
        ),
        "Mish": (
            "Mish",
            ([node("Softplus", ["x"], ["s"]), node("Tanh", ["s"], ["t"]), node("Mul", ["x", "t"], ["y"])], {}, 17),
        ),
        "Mish with Log and Exp": (
            "Mish",
            (
                [
                    node("Exp", ["x"], ["e"]),
                    node("Add", ["e", "one"], ["a"]),
                    node("Log", ["a"], ["s"]),
                    node("Tanh", ["s"], ["t"]),
                    node("Mul", ["x", "t"], ["y"]),
                ],
                {"one": one},
                17,
            ),
        ),
        "Softplus guarded": (
            "Softplus",
            (
                [
                    node("Exp", ["x"], ["e"]),
                    node("Add", ["e", "one"], ["a"]),
                    node("Log", ["a"], ["s"]),
                    node("Greater", ["x", "twenty"], ["g"]),
                    node("Where", ["g", "x", "s"], ["y"]),
                ],
                {"one": one, "twenty": f32(20)},
                17,
            ),
        ),
        "Softplus operator guarded": (
            "Softplus",
            (
                [
                    node("Softplus", ["x"], ["s"]),
                    node("Greater", ["x", "twenty"], ["g"]),
                    node("Where", ["g", "x", "s"], ["y"]),
                ],
                {"twenty": f32(20)},
                17,
            ),
        ),
        "ELU of jax": (
            "Elu",
            (
                [
                    node("Greater", ["x", "zero"], ["g"]),
                    node("Where", ["g", "zero", "x"], ["safe"]),
                    node("Exp", ["safe"], ["e"]),
                    node("Sub", ["e", "one"], ["m"]),
                    node("Where", ["g", "x", "m"], ["y"]),
                ],
                {"zero": zero, "one": one},
                17,
            ),
        ),
        "LeakyRelu as Max(x, a x)": (
            "LeakyRelu",
            ([node("Mul", ["x", "a"], ["m"]), node("Max", ["x", "m"], ["y"])], {"a": f32(0.1)}, 17),
        ),
        "LeakyRelu as Where": (
            "LeakyRelu",
            (
                [
                    node("Mul", ["x", "a"], ["m"]),
                    node("Greater", ["x", "zero"], ["g"]),
                    node("Where", ["g", "x", "m"], ["y"]),
                ],
                {"a": f32(0.1), "zero": zero},
                17,
            ),
        ),
        "Softsign": (
            "Softsign",
            (
                [node("Abs", ["x"], ["b"]), node("Add", ["b", "one"], ["a"]), node("Div", ["x", "a"], ["y"])],
                {"one": one},
                17,
            ),
        ),
        "Sigmoid written out": (
            "Sigmoid",
            (
                [
                    node("Neg", ["x"], ["n"]),
                    node("Exp", ["n"], ["e"]),
                    node("Add", ["e", "one"], ["a"]),
                    node("Reciprocal", ["a"], ["y"]),
                ],
                {"one": one},
                17,
            ),
        ),
        "Relu as Max(x, a tensor of zeros)": (
            "Relu",
            ([node("Max", ["x", "zeros"], ["y"])], {"zeros": np.zeros((1, 4), np.float32)}, 17),
        ),
        "Relu as Max(x, zeros_like(x))": (
            "Relu",
            (
                [
                    node("Shape", ["x"], ["s"]),
                    node("ConstantOfShape", ["s"], ["z"], value=numpy_helper.from_array(f32([0]))),
                    node("Max", ["z", "x"], ["y"]),
                ],
                {},
                17,
            ),
        ),
        "Relu as Where(x > 0, x, zeros expanded)": (
            "Relu",
            (
                [
                    node("Greater", ["x", "zero"], ["g"]),
                    node("Shape", ["x"], ["s"]),
                    node("Expand", ["zero", "s"], ["z"]),
                    node("Where", ["g", "x", "z"], ["y"]),
                ],
                {"zero": zero},
                17,
            ),
        ),
        "Shrink of torch, hard": (
            "Shrink",
            (
                [
                    node("Abs", ["x"], ["a"]),
                    node("LessOrEqual", ["a", "l"], ["in_"]),
                    node("Where", ["in_", "zero", "x"], ["y"]),
                ],
                {"l": f32(0.7), "zero": zero},
                17,
            ),
        ),
        "Shrink of torch, hard, as two comparisons": (
            "Shrink",
            (
                [
                    node("Greater", ["x", "l"], ["above"]),
                    node("Less", ["x", "minus"], ["below"]),
                    node("Or", ["above", "below"], ["out"]),
                    node("Where", ["out", "x", "zero"], ["y"]),
                ],
                {"l": f32(0.7), "minus": f32(-0.7), "zero": zero},
                17,
            ),
        ),
        "Shrink of torch, soft": (
            "Shrink",
            (
                [
                    node("Abs", ["x"], ["a"]),
                    node("Greater", ["a", "l"], ["out"]),
                    node("Sign", ["x"], ["s"]),
                    node("Mul", ["s", "l"], ["m"]),
                    node("Sub", ["x", "m"], ["shrunk"]),
                    node("Mul", ["x", "zero"], ["none"]),
                    node("Where", ["out", "shrunk", "none"], ["y"]),
                ],
                {"l": f32(0.7), "zero": zero},
                17,
            ),
        ),
        "ThresholdedRelu of torch": (
            "ThresholdedRelu",
            (
                [node("LessOrEqual", ["x", "t"], ["low"]), node("Where", ["low", "zero", "x"], ["y"])],
                {"t": f32(0.3), "zero": zero},
                17,
            ),
        ),
        "Relu through float16": (
            "Relu",
            (
                [
                    node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
                    node("Relu", ["h"], ["r"]),
                    node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
                ],
                {},
                17,
            ),
        ),
    }


SPELLINGS = _spellings()


def _spelled(spelling: Spelling) -> ModelProto:
    nodes, constants, opset = spelling
    return small_model(
        [node("Mul", ["in", "in_w"], ["x"]), *nodes],
        {"in": ["N", 4]},
        constants={"in_w": f32(1.5), **constants},
        opset=opset,
    )


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    kind, spelling = SPELLINGS[name]
    source = onnxgbp.load(_spelled(spelling))
    graph = onnxgbp.GradientGraph.build(source, target="seed")
    assert [choice.activation.kind for choice in graph.choices().values()] == [kind]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_gives_what_the_slope_says(name: str, method: str) -> None:
    """A difference in float64 gives the slope from the spelling itself; the rule does the rest."""
    kind, spelling = SPELLINGS[name]
    model = to_float64(_spelled(spelling))
    rng = np.random.default_rng(5)
    h, dy = rng.uniform(-5, 5, (40, 4)), rng.standard_normal((40, 4))
    forward = evaluator(model)
    step = 1e-6
    above, below = (evaluated(forward, {"in": h + sign * step / 1.5})[0] for sign in (1, -1))
    slope = (above - below) / (2 * step)
    slope[np.abs(slope) < 1e-9] = 0
    at = Point(1.5 * h, evaluated(forward, {"in": h})[0], slope, kind in LIKE_RELU)
    want = 1.5 * RULES[method](at, dy)
    converted = onnxgbp.convert(model, target="seed", method=method)
    got = reference_run(converted, {"in": h, "seed": dy})["attribution"]
    # The recognised slope is the ideal function's; an exporter's float32 constants differ from it by 1e-7.
    assert np.allclose(got, want, rtol=1e-5, atol=3e-6)


def _alike() -> dict[str, tuple[Spelling, list[str]]]:
    """What merely looks like an activation, and the kinds that are left to recognise in it."""
    one, two = f32(1), f32(2)
    return {
        "x * sigmoid(z)": (
            (
                [
                    node("Mul", ["x", "z_w"], ["z"]),
                    node("Relu", ["z"], ["z1"]),
                    node("Sigmoid", ["z1"], ["s"]),
                    node("Mul", ["x", "s"], ["y"]),
                ],
                {"z_w": f32([1, 2, 3, 4])},
                17,
            ),
            ["Relu", "Sigmoid"],
        ),
        "x * sigmoid(w * x), w per channel": (
            (
                [node("Mul", ["x", "w"], ["z"]), node("Sigmoid", ["z"], ["s"]), node("Mul", ["x", "s"], ["y"])],
                {"w": f32([1, 2, 3, 4])},
                17,
            ),
            ["Sigmoid"],
        ),
        "x * 2 + 1": (
            ([node("Mul", ["x", "two"], ["m"]), node("Add", ["m", "one"], ["y"])], {"one": one, "two": two}, 17),
            [],
        ),
        "Max(x, zeros of a larger shape)": (
            ([node("Max", ["x", "zeros"], ["y"])], {"zeros": np.zeros((3, 1, 1), np.float32)}, 17),
            [],
        ),
        "Max(x, a number per channel)": (
            ([node("Max", ["x", "bounds"], ["y"])], {"bounds": f32([0, 0, 0, 1])}, 17),
            [],
        ),
        "x where 2 |x| > 1, a jump that stands nowhere": (
            (
                [
                    node("Abs", ["x"], ["a"]),
                    node("Mul", ["a", "two"], ["m"]),
                    node("Greater", ["m", "one"], ["out"]),
                    node("Where", ["out", "x", "zero"], ["y"]),
                ],
                {"one": f32(0.9), "two": two, "zero": f32(0)},
                17,
            ),
            [],
        ),
        "-Relu(-x)": (
            ([node("Neg", ["x"], ["n"]), node("Relu", ["n"], ["r"]), node("Neg", ["r"], ["y"])], {}, 17),
            ["Relu"],
        ),
        "-Max(-x, 0)": (
            (
                [node("Neg", ["x"], ["n"]), node("Max", ["n", "zero"], ["r"]), node("Neg", ["r"], ["y"])],
                {"zero": f32(0)},
                17,
            ),
            ["Relu"],
        ),
        "x * x": (([node("Mul", ["x", "x"], ["y"])], {}, 17), []),
        "-(-x)": (([node("Neg", ["x"], ["n"]), node("Neg", ["n"], ["y"])], {}, 17), []),
        "x / 2": (([node("Div", ["x", "two"], ["y"])], {"two": two}, 17), []),
    }


ALIKE = _alike()


@pytest.mark.parametrize("name", ALIKE)
def test_what_merely_looks_alike(name: str) -> None:
    spelling, kinds = ALIKE[name]
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(_spelled(spelling)), target="seed")
    assert [choice.activation.kind for choice in graph.choices().values()] == kinds


@pytest.mark.parametrize("alone", ["Max(x, 1)", "Abs"])
def test_a_kink_is_no_relu(alone: str) -> None:
    """Max(x, 1) is a Clip from below and |x| none at all; `--activations relu` touches neither."""
    nodes = [node("Max", ["x", "one"], ["y"])] if alone != "Abs" else [node("Abs", ["x"], ["y"])]
    constants = {"one": f32(1)} if alone != "Abs" else {}
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(_spelled((nodes, constants, 17))), target="seed")
    kinds = [choice.activation.kind for choice in graph.choices().values()]
    assert kinds in ([], ["Clip"])
    assert not {"Relu", "Relu6", "LeakyRelu"} & set(kinds)
    assert all(choice.rule == "gradient" for choice in graph.choices(activations="relu").values())


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6, 1e-12])
def test_the_clamp_of_a_variance_is_no_relu(epsilon: float) -> None:
    """Flax keeps a variance from being negative before its root: plain, whatever the epsilon, and listed as such."""
    nodes = [
        node("Max", ["x", "zero"], ["clamped"], name="clamp"),
        node("Add", ["clamped", "epsilon"], ["safe"]),
        node("Sqrt", ["safe"], ["y"]),
    ]
    model = _spelled((nodes, {"zero": f32(0), "epsilon": f32(epsilon)}, 17))
    (choice,) = onnxgbp.GradientGraph.build(onnxgbp.load(model), target="seed").choices().values()
    assert (choice.name, choice.rule) == ("clamp", "gradient")
    assert "root" in choice.reason


def test_an_epsilon_behind_a_relu_is_no_part_of_it() -> None:
    nodes = [node("Max", ["x", "zero"], ["r"], name="relu"), node("Add", ["r", "epsilon"], ["y"])]
    model = _spelled((nodes, {"zero": f32(0), "epsilon": f32(1e-7)}, 17))
    (choice,) = onnxgbp.GradientGraph.build(onnxgbp.load(model), target="seed").choices().values()
    assert (choice.name, choice.activation.kind, choice.rule) == ("relu", "Relu", "guided")


@pytest.mark.parametrize("made", [["Relu"], ["Sigmoid", "Mul"]])
@pytest.mark.parametrize("behind", [["Identity"], ["Mul"], ["Neg", "Neg"]])
def test_an_identity_behind_an_activation_is_no_part_of_it(made: list[str], behind: list[str]) -> None:
    """The rule meets the sum of what two readers send back, one of them behind an identity, as it would without."""
    nodes = [node("Relu", ["x"], ["r"])]
    if made != ["Relu"]:
        nodes = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["r"])]
    nodes += [node("Mul", ["r", "w"], ["weighed"])]
    through, last = [], "r"
    for i, operator in enumerate(behind):
        through.append(node(operator, [last, "one"] if operator == "Mul" else [last], [f"i{i}"]))
        last = f"i{i}"
    constants = {"w": f32([-2, -2, -0.5, -0.5]), "one": f32(1)}
    direct = _spelled(([*nodes, node("Add", ["r", "weighed"], ["y"])], constants, 17))
    model = _spelled(([*nodes, *through, node("Add", [last, "weighed"], ["y"])], constants, 17))
    feeds = {"in": f32([[1, -1, 2, -2]]), "seed": np.ones((1, 4), np.float32)}
    want, got = (ort_run(onnxgbp.convert(one, target="seed"), feeds)["attribution"] for one in (direct, model))
    assert want[0, 0] == 0 < want[0, 2]
    assert np.array_equal(got, want)
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(model), target="seed")
    assert [choice.activation.y.name for choice in graph.choices().values()] == ["r"]


def test_a_relu_between_two_negations_meets_the_gradient_turned_round() -> None:
    nodes = [node("Neg", ["x"], ["n"]), node("Relu", ["n"], ["r"]), node("Neg", ["r"], ["y"])]
    feeds = {"in": f32([[-1, -1, 1, 1]]), "seed": f32([[1, -1, 1, -1]])}
    for options in ({}, {"activations": "relu"}):
        model = onnxgbp.convert(_spelled((nodes, {}, 17)), target="seed", **options)
        assert ort_run(model, feeds)["attribution"].tolist() == [[0, -1.5, 0, 0]]


def test_the_parts_of_a_group_that_others_read_stay_activations() -> None:
    """SiLU whose sigmoid is read again: the group is one activation, the sigmoid for its other reader another."""
    nodes = [
        node("Sigmoid", ["x"], ["s"], name="sig"),
        node("Mul", ["x", "s"], ["m"], name="silu"),
        node("Add", ["m", "s"], ["y"]),
    ]
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(_spelled((nodes, {}, 17))), target="seed")
    assert sorted(choice.activation.kind for choice in graph.choices().values()) == ["Sigmoid", "Swish"]
    model = to_float64(_spelled((nodes, {}, 17)))
    x, dy = np.random.default_rng(0).standard_normal((2, 5, 4))
    got = reference_run(onnxgbp.convert(model, target="seed", method="gradient"), {"in": x, "seed": dy})["attribution"]
    h = 1.5 * x
    s = 1 / (1 + np.exp(-h))
    assert np.allclose(got, 1.5 * dy * (s + h * s * (1 - s) + s * (1 - s)))


def test_an_integer_clip_is_no_activation() -> None:
    nodes = [node("Cast", ["x"], ["i"], to=TensorProto.INT64), node("Clip", ["i", "zero"], ["j"])]
    nodes += [node("Cast", ["j"], ["f"], to=TensorProto.FLOAT), node("Add", ["x", "f"], ["y"])]
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(_spelled((nodes, {"zero": np.array(0)}, 17))), target="seed")
    assert not graph.choices()


def test_the_forward_graph_is_not_touched() -> None:
    for _, spelling in SPELLINGS.values():
        source = _spelled(spelling)
        kept = onnxgbp.convert(source, target="seed").graph.node[: len(source.graph.node)]
        assert [(n.op_type, list(n.output)) for n in kept] == [(n.op_type, list(n.output)) for n in source.graph.node]
