"""The activations: their derivative, written from x and y alone, one line each.

A derivative that is 0 or 1 is given as a bool mask (it gates with `Where`, never a product), one that is flat somewhere
as a mask and the factor where it is not, any other as a factor.
`y` is used where it tells the same as `x`: then a runtime can keep the activation fused into the operator before it.
Bounds are strict: at x = 0 of a ReLU, or at either end of a Clip, nothing passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import onnx_ir as ir

from onnxgbp.emit import Emit

__all__ = ["ACTIVATIONS", "Activation", "Derivative", "backward"]

Arguments: TypeAlias = Mapping[str, Any]
Derivative: TypeAlias = Callable[[Emit, ir.Value, ir.Value, Arguments], ir.Value | tuple[ir.Value, ir.Value]]

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875  # the standard's defaults


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """One activation of the forward graph, however it is spelled there.

    kind: the name in ACTIVATIONS; x, y: the tensors before and behind it; node: the forward node that makes y;
    arguments: its parameters (numbers or tensors); spelled: how it stands in the file; gate: why it is no activation
    but a gate, or None.
    """

    kind: str
    node: ir.Node
    x: ir.Value
    y: ir.Value
    arguments: Arguments
    spelled: str
    gate: str | None = None


def backward(op: Emit, activation: Activation, dy: ir.Value) -> ir.Value:
    """Dx = dy * f'(x), the plain step."""
    derivative = ACTIVATIONS[activation.kind](op, activation.x, activation.y, activation.arguments)
    if isinstance(derivative, tuple):
        inside, factor = derivative
        return op.Where(inside, op.Mul(dy, factor), op.like(0, dy))
    if derivative.dtype == ir.DataType.BOOL:
        return op.Where(derivative, dy, op.like(0, dy))
    return op.Mul(dy, derivative)


def _relu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Greater(y, 0)


def _clip(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    above = op.Greater(y, a["min"]) if a.get("min") is not None else None
    below = op.Less(y, a["max"]) if a.get("max") is not None else None
    if above is not None and below is not None:
        return op.And(above, below)
    one = above if below is None else below
    assert one is not None  # a Clip without bounds is not an activation
    return one


def _quantised_relu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    """From x: the integers y cannot tell what rounded to the ends of the range from what was clipped to them."""
    return op.And(op.Greater(x, 0), op.Less(x, op.like(a["max"], x)))


def _leaky_relu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Where(op.Greater(y if a["alpha"] >= 0 else x, 0), op.like(1, x), op.like(a["alpha"], x))


def _prelu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    slope = op.Neg(a["slope"]) if a.get("negated") else a["slope"]  # Keras writes -slope * relu(-x)
    return op.Where(op.Greater(x, 0), op.like(1, x), slope)


def _elu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Where(op.Greater(x, 0), op.like(1, x), op.Add(y, a["alpha"]))


def _selu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Where(op.Greater(x, 0), op.like(a["gamma"], x), op.Add(y, a["alpha"] * a["gamma"]))


def _celu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Where(op.Greater(x, 0), op.like(1, x), op.Add(op.Div(y, a["alpha"]), 1))


def _thresholded_relu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Greater(x, a["alpha"])


def _shrink(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Greater(op.Abs(x), a["lambd"])


def _sigmoid(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Mul(y, op.Sub(op.like(1, y), y))


def _tanh(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Sub(op.like(1, y), op.Mul(y, y))


def _softplus(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    return op.Sigmoid(x)


def _softsign(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    rest = op.Reciprocal(op.Add(op.Abs(x), 1))  # also 1 - |y|, of which large x leave no digit
    return op.Mul(rest, rest)


def _hard_sigmoid(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> tuple[ir.Value, ir.Value]:
    return op.And(op.Greater(y, 0), op.Less(y, 1)), op.like(a["alpha"], x)


def _hard_swish(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> tuple[ir.Value, ir.Value]:
    slope = op.Add(op.Mul(x, 1 / 3), 0.5)
    return op.Greater(x, -3.0), op.Where(op.Less(x, 3.0), slope, op.like(1, x))


def _gelu(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    """Phi(x) + x phi(x)."""
    phi = op.Mul(op.Exp(op.Mul(op.Mul(x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    cdf = op.Mul(op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1), 0.5)
    return op.Add(cdf, op.Mul(x, phi))


def _gelu_tanh(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    """With u = c (x + 0.044715 x^3) and t = tanh u: (1 + t) / 2 + x (1 - t^2) / 2 * u'.

    1 - t^2 comes first in each product: it is 0 long before x^3, which in float16 is infinite from 41 on.
    """
    c = math.sqrt(2 / math.pi)
    tanh = op.Tanh(op.Mul(x, op.Add(op.Mul(op.Mul(x, x), c * 0.044715), c)))
    first = op.Mul(op.Sub(op.like(1, x), op.Mul(tanh, tanh)), x)
    cubic = op.Mul(op.Mul(first, x), op.Mul(x, 3 * c * 0.044715))
    return op.Mul(op.Add(op.Add(tanh, 1), op.Add(op.Mul(first, c), cubic)), 0.5)


def _swish(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    """With s = sigmoid(alpha x): s + alpha y (1 - s), or s (1 + x - y), which takes a step less."""
    alpha = a.get("alpha", 1.0)
    if alpha == 1:
        return op.Mul(op.Sigmoid(x), op.Add(op.Sub(x, y), 1))
    s = op.Sigmoid(op.Mul(x, alpha))
    return op.Add(s, op.Mul(op.Mul(y, op.Sub(op.like(1, s), s)), alpha))


def _mish(op: Emit, x: ir.Value, y: ir.Value, a: Arguments) -> ir.Value:
    """With t = tanh(softplus x): t + x (1 - t^2) sigmoid x."""
    tanh = op.Tanh(op.Softplus(x))
    return op.Add(tanh, op.Mul(op.Mul(x, op.Sub(op.like(1, x), op.Mul(tanh, tanh))), op.Sigmoid(x)))


ACTIVATIONS: dict[str, Derivative] = {
    "Relu": _relu,
    "Relu6": _clip,
    "QuantizedRelu": _quantised_relu,
    "Clip": _clip,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Selu": _selu,
    "Celu": _celu,
    "ThresholdedRelu": _thresholded_relu,
    "Shrink": _shrink,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Gelu": _gelu,
    "GeluTanh": _gelu_tanh,
    "Swish": _swish,
    "Mish": _mish,
}

# f' < 0 for some x: a positive dy can leave negative, which the audit says.
NOT_MONOTONE = frozenset({"HardSwish", "Gelu", "GeluTanh", "Swish", "Mish"})
RELU_KINDS = frozenset({"Relu", "Relu6", "QuantizedRelu"})
# Like a ReLU, though none: near x for large x, small or flat below 0. The rule as-relu takes them for one.
RELU_LIKE = frozenset(
    {"LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Softplus", "HardSwish"}
    | {"Gelu", "GeluTanh", "Swish", "Mish"}
)
