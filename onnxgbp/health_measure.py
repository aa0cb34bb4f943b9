"""What the graph measures of its own health: counts, sums and a histogram of each activation, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS, Activation
from onnxgbp.emit import Emit, dims_of, is_float
from onnxgbp.rules import Edge, Measure

__all__ = ["EXPONENTS", "PREFIX", "SIDE", "health_measure", "steepest", "unit_axis"]

PREFIX = "onnxgbp/health/"  # then what is measured, then the tensor

# A histogram has bins of a power of two, half of them on either side of zero. So bins nest, whatever a batch's range.
SIDE = 64
EXPONENTS = range(-100, 128)  # of the powers of two that a largest |y| is compared with

# The largest |f'| where it is not 1; of what depends on the arguments, a function of them.
_STEEPEST: dict[str, Any] = {
    "LeakyRelu": lambda a: max(1.0, abs(a["alpha"])),
    "Elu": lambda a: max(1.0, a["alpha"]),
    "Selu": lambda a: a["gamma"] * max(1.0, a["alpha"]),
    "Sigmoid": 0.25,
    "HardSigmoid": lambda a: a["alpha"],
    "HardSwish": 1.5,
    "Gelu": 1.128904,
    "GeluTanh": 1.128999,
    "Swish": 1.099840,
    "Mish": 1.088498,
}

_FLOAT, _INT32 = int(ir.DataType.FLOAT), int(ir.DataType.INT32)


def steepest(activation: Activation) -> float:
    """The largest |f'(x)| there is; of a PRelu, whose slopes are a tensor, that of its right side."""
    known = _STEEPEST.get(activation.kind, 1.0)
    return float(known(activation.arguments) if callable(known) else known)


def health_measure(axes: Mapping[str, int | None], threshold: float) -> Measure:
    """What `add` reads. axes: of the units, by the name of y."""

    def at_activation(edge: Edge, _passed: ir.Value) -> dict[str, ir.Value]:
        op, axis, rank = edge.op, axes[edge.y.name or ""], len(dims_of(edge.y) or ())
        y, active = _values(op, edge.activation), _active(op, edge.activation, threshold)
        finite = op.Less(op.Abs(y), op.like(np.inf, y))
        active = op.And(active, finite)
        if axis is None:  # one unit
            y, active, finite = (op.Reshape(value, [-1]) for value in (y, active, finite))
        over = {"axes": [i for i in range(rank) if i != axis] if axis is not None else [0]}
        count = op.ReduceSum(op.Cast(finite, to=_INT32), **over)
        clean = op.Where(finite, y, op.like(0, y))
        mean = op.Div(op.ReduceSum(clean, **over), op.Max(op.Cast(count, to=_FLOAT), 1))
        measured = {
            "finite": count,
            "active": op.ReduceSum(op.Cast(active, to=_INT32), **over),
            "mean": mean,
            "spread": op.ReduceSumSquare(op.Where(finite, op.Sub(y, mean), op.like(0, y)), **over),
            "low": op.ReduceMin(op.Where(finite, y, op.like(np.inf, y)), **over),
            "high": op.ReduceMax(op.Where(finite, y, op.like(-np.inf, y)), **over),
        }
        measured["exponent"], measured["bins"] = _histogram(op, clean, finite)
        measured |= _squares(op, edge.dy)
        return {f"{PREFIX}{what}/{edge.y.name}": value for what, value in measured.items()}

    def at_attribution(op: Emit, gradient: ir.Value) -> dict[str, ir.Value]:
        return {f"{PREFIX}{what}/{gradient.name}": value for what, value in _squares(op, gradient).items()}

    return Measure(at_activation, at_attribution)


def _values(op: Emit, activation: Activation) -> ir.Value:
    """Y in float32: where a quantiser hid the activation, what its integers stand for."""
    y, quantiser = activation.y, activation.y.producer()
    if is_float(y):
        return _wide(op, y)
    assert quantiser is not None  # a QuantizeLinear
    axis = quantiser.attributes["axis"].as_int() if "axis" in quantiser.attributes else None
    real = op.DequantizeLinear(y, *quantiser.inputs[1:], axis=axis)
    real.type = activation.x.type
    return _wide(op, real)


def _wide(op: Emit, value: ir.Value) -> ir.Value:
    return value if value.dtype == ir.DataType.FLOAT else op.Cast(value, to=_FLOAT)


def _active(op: Emit, activation: Activation, threshold: float) -> ir.Value:
    """Where the slope is no smaller than that share of the largest, a bool of y's shape."""
    derivative = ACTIVATIONS[activation.kind](op, activation.x, activation.y, activation.arguments)
    inside: ir.Value | None = None
    if isinstance(derivative, tuple):
        inside, derivative = derivative
    elif derivative.dtype == ir.DataType.BOOL:
        return derivative  # in the model's own type, to which its bounds were rounded
    elif derivative.dtype != ir.DataType.FLOAT:
        arguments = {name: _wide(op, v) if isinstance(v, ir.Value) else v for name, v in activation.arguments.items()}
        derivative = ACTIVATIONS[activation.kind](op, _wide(op, activation.x), _wide(op, activation.y), arguments)
        assert isinstance(derivative, ir.Value)  # what it was of the other type
    cutoff = op.like(threshold * steepest(activation), derivative)
    if activation.kind == "PRelu":
        cutoff = op.Mul(op.Max(op.Abs(_wide(op, activation.arguments["slope"])), 1), threshold)
    steep = op.Not(op.Less(op.Abs(derivative), cutoff))
    return steep if inside is None else op.And(inside, steep)


def _histogram(op: Emit, clean: ir.Value, finite: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How many powers of two the largest |y| reaches, and the counts of bins that are the next power / SIDE wide."""
    flat, counted = op.Reshape(clean, [-1]), op.Cast(op.Reshape(finite, [-1]), to=_INT32)
    powers = op.constant(np.array([2.0**e for e in EXPONENTS], np.float32))
    reached = op.Not(op.Less(op.ReduceMax(op.Abs(flat), axes=[0]), powers))
    exponent = op.ReduceSum(op.Cast(reached, to=_INT32), axes=[0])
    scales = np.array([SIDE * 2.0**-e for e in (*EXPONENTS, EXPONENTS.stop)], np.float32)
    places = op.Add(op.Floor(op.Mul(flat, op.Gather(op.constant(scales), exponent, axis=0))), SIDE)
    none = op.constant(np.zeros(2 * SIDE, np.int32))
    index = op.Cast(places, to=int(ir.DataType.INT64))
    return exponent, op.ScatterElements(none, index, counted, axis=0, reduction="add")


def _squares(op: Emit, gradient: ir.Value) -> dict[str, ir.Value]:
    """In float64: the square of a gradient that vanishes is below float32."""
    wide = op.Cast(op.Reshape(gradient, [-1]), to=int(ir.DataType.DOUBLE))
    return {"gradient": op.ReduceSumSquare(wide, axes=[0]), "size": op.Size(wide)}


# Operators behind which the channels stand on axis 1, and on the last.
_CHANNELS_FIRST = frozenset(
    "AveragePool BatchNormalization Conv ConvTranspose Gemm GlobalAveragePool GlobalMaxPool GroupNormalization "
    "InstanceNormalization LRN MaxPool".split()
)
_CHANNELS_LAST = frozenset("LayerNormalization MatMul RMSNormalization".split())
_MIXES_AXES = frozenset("Einsum Expand Flatten Gather Reshape".split())
_FARTHEST = 16  # nodes between an activation and what makes its channels: a bias, a normalisation in parts, a Transpose


def unit_axis(activation: Activation) -> int | None:
    """The axis of y along which its units lie; None where it is one unit as a whole, for want of a size."""
    dims = dims_of(activation.y)
    if dims is None or len(dims) < 2:
        return None
    axis = 1
    if len(dims) > 2:
        found = _channel_axis(activation.x, _FARTHEST)
        axis = found if found is not None else len(dims) - 1 if len(dims) == 3 else 1  # tokens before their features
    return axis if isinstance(dims[axis], int) else None


def _channel_axis(value: ir.Value, steps: int) -> int | None:
    node, rank = value.producer(), len(value.shape) if value.shape is not None else 0
    if node is None or node.op_type in _MIXES_AXES or not steps:
        return None
    if node.op_type in _CHANNELS_FIRST:
        return 1
    if node.op_type in _CHANNELS_LAST:
        return rank - 1
    alike = (v for v in node.inputs if v is not None and v.shape is not None and len(v.shape) == rank)
    found = next((axis for v in alike if (axis := _channel_axis(v, steps - 1)) is not None), None)
    if found is not None and node.op_type == "Transpose":
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(rank)[::-1]
        return list(order).index(found)
    return found
