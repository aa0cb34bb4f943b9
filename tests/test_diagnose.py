"""What the program says of a blank map, and of one with numbers that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, small_model
from onnx import TensorProto, helper

from onnxgbp import Explainer


def f32(value: Any) -> Array:
    return np.asarray(value, np.float32)


ONES = np.ones((2, 4), np.float32)


def network(
    hidden: str = "Relu", *, first: Array | None = None, last: Array | None = None, end: str | None = None
) -> onnx.ModelProto:
    """Two weights with an activation between, and perhaps one behind: x [N, 4] -> y [N, 3]."""
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["h"], name="dense1"),
        helper.make_node(hidden, ["h"], ["r"], name="hidden"),
        helper.make_node("MatMul", ["r", "B"], ["z" if end else "y"], name="dense2"),
    ]
    if end:
        nodes.append(helper.make_node(end, ["z"], ["y"], name="end"))
    weights = {"A": np.eye(4) if first is None else first, "B": np.ones((4, 3)) if last is None else last}
    return small_model(nodes, {"x": ["N", 4]}, constants={name: f32(array) for name, array in weights.items()})


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (
            network(end="Relu", last=-np.ones((4, 3))),
            {},
            "the explained unit is inactive: its own ReLU 'end' gives 0",
        ),
        (network(first=-np.eye(4)), {}, "dead path: 'hidden' (Relu) is inactive wherever a gradient arrives"),
        (network(last=-np.ones((4, 3))), {}, "dead path: all that arrives at 'hidden' (Relu) is negative"),
        (network("Tanh", first=99 * np.eye(4)), {}, "'hidden' (Tanh) is saturated wherever a gradient arrives"),
        (network(end="Sigmoid", last=99 * np.ones((4, 3))), {"output": "y"}, "'end' (Sigmoid) is saturated"),
        (network(first=np.zeros((4, 4)), last=np.ones((4, 3))), {"seed": "activation"}, "the seed itself is zero"),
        (network(last=np.zeros((4, 3))), {}, "nothing passes 'dense2'"),
    ],
)
def test_a_blank_map_says_why(model: onnx.ModelProto, options: dict[str, Any], why: str) -> None:
    result = Explainer(model, method="guided", **options)(ONES)
    assert not result.attribution.any()
    assert result.warning.startswith("nothing but zeros for samples [0, 1] (")
    assert why in result.warning


@pytest.mark.parametrize("method", ["guided", "gradient"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("sign", "why"), [(-1, "inactive wherever a gradient arrives"), (1, "negative")])
def test_the_gates_of_convolutions_say_why(sign: int, why: str, pool: bool, method: str) -> None:
    """However they are spelled, and on whichever side of a pool."""
    if sign > 0 and method == "gradient":
        pytest.skip("plain gradients pass where they are negative")
    nodes = [
        helper.make_node("Conv", ["x", "A"], ["h"], name="conv1"),
        helper.make_node("Relu", ["h"], ["r"], name="hidden"),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p" if pool else "r", "B"], ["c"], name="conv2"),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    ones = f32(np.ones((16, 16, 1, 1)))
    model = small_model(
        [node for node in nodes if pool or node.op_type != "MaxPool"],
        {"x": ["N", 16, 8, 8]},
        constants={"A": sign * ones, "B": -sign * ones},
        opset=17,
    )
    result = Explainer(model, method=method)(f32(np.ones((2, 16, 8, 8))))
    assert not result.attribution.any()
    assert f"'hidden' (Relu) is {why}" in result.warning, result.warning


def test_only_the_blank_sample_is_looked_at() -> None:
    x = np.concatenate([ONES, -ONES])
    result = Explainer(network(), method="guided")(x)
    assert result.attribution[:2].all()
    assert result.warning == (
        "nothing but zeros for samples [2, 3] (dead path: 'hidden' (Relu) is inactive wherever a gradient arrives)"
    )
    fixed = network()
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert Explainer(fixed, method="guided")(x).warning == result.warning


def test_several_dead_ends_are_named() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="left"),
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Relu", ["n"], ["b"], name="right"),
        helper.make_node("Sub", ["b", "a"], ["y"]),
    ]
    model = small_model(nodes, {"x": ["N", 4]})
    warning = Explainer(model, method="guided")(ONES, target=0).warning
    assert "all that arrives at 'left' (Relu) is negative" in warning
    assert "'right' (Relu) is inactive wherever a gradient arrives" in warning


def test_a_nan_that_a_gate_blocks_is_said_too() -> None:
    warning = Explainer(network())(np.full((1, 4), np.nan, np.float32)).warning
    assert warning == (
        "nothing but zeros for samples [0] (numbers that are not finite: the input 'x' has some already)"
    )


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (network("Exp"), np.full((1, 4), np.nan), "the input 'x' has some already"),
        (network("Exp"), np.full((1, 4), 99.0), "they arise in the forward pass at 'hidden' (Exp)"),
        (network(first=np.full((4, 4), np.inf)), ONES, "they arise in the forward pass at 'dense1' (MatMul)"),
        (
            network("Sqrt"),
            np.zeros((1, 4)),
            "they arise in the backward step of 'hidden'",
        ),
    ],
)
def test_a_number_that_is_not_finite_names_the_first_node(model: onnx.ModelProto, x: Array, why: str) -> None:
    result = Explainer(model, method="gradient")(f32(x))
    assert "numbers that are not finite for samples [0" in result.warning
    assert why in result.warning


def test_it_can_be_left_out() -> None:
    result = Explainer(network(first=-np.eye(4)), diagnose=False)(ONES)
    assert result.warning == "nothing but zeros for samples [0, 1]"


def test_a_converted_file_tells_as_much() -> None:
    import onnxgbp

    converted = onnxgbp.convert(network(first=-np.eye(4)))
    assert converted.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert "'hidden' (Relu) is inactive" in Explainer(converted)(ONES).warning
