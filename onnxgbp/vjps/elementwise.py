"""Arithmetic on elements. Broadcasting is undone by the sweep, so no rule here knows of shapes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import Entry, broadcasting, inputs, variadic

__all__ = ["VJPS"]


def passes(op: Emit, s: Step) -> ir.Value:
    return s.dy


def negated(op: Emit, s: Step) -> ir.Value:
    return op.Neg(s.dy)


def div_b(op: Emit, s: Step) -> ir.Value:
    """d(a / b)/db = -y / b."""
    return op.Neg(op.Div(op.Mul(s.dy, s.y), s.input(1)))


def extreme(compare: str) -> Entry:
    """Max and Min: the gradient goes to the first operand that holds the result, as in MaxPool."""

    def vjp(op: Emit, s: Step, index: int) -> ir.Value:
        beats, mine = getattr(op, compare), s.input(index)
        lost = [op.Not(beats(mine, s.input(other))) for other in range(index)]
        lost += [beats(s.input(other), mine) for other in range(index + 1, len(s.node.inputs))]
        return op.Where(functools.reduce(op.Or, lost), op.like(0, s.dy), s.dy) if lost else s.dy

    return variadic(vjp, broadcast=True)


def cast(op: Emit, s: Step) -> ir.Value:
    return op.cast_like(s.dy, s.x)


def dropout(op: Emit, s: Step) -> ir.Value:
    """At inference the identity."""
    if s.argument("training_mode"):
        raise s.refuse("it is in training mode, where it is random: export the model in eval mode")
    return s.dy


def unary(derivative: Callable[[Emit, ir.Value, ir.Value], ir.Value]) -> Entry:
    """The rule dx = dy f'(x), with f' written from x and y."""
    return inputs(lambda op, s: op.Mul(s.dy, derivative(op, s.x, s.y)))


def pow_a(op: Emit, s: Step) -> ir.Value:
    """dx = dy b x^(b-1); the exponent may be of another type than x."""
    b = op.cast_like(s.input(1), s.x)
    return op.Mul(s.dy, op.Mul(b, op.Pow(s.x, op.Sub(b, 1))))


def pow_b(op: Emit, s: Step) -> ir.Value:
    """db = dy y log x, and 0 where x = 0."""
    log = op.Log(op.Where(op.is_zero(s.x), op.like(1, s.x), s.x))
    return op.cast_like(op.Mul(op.Mul(s.dy, s.y), log), s.input(1))


def mod_b(op: Emit, s: Step) -> ir.Value:
    """y = a - b q, with the quotient q rounded towards 0 (fmod) or down."""
    return op.Div(op.Mul(s.dy, op.Sub(s.y, s.x)), s.input(1))


def where_a(op: Emit, s: Step) -> ir.Value:
    return op.Where(s.input(0), s.dy, op.like(0, s.dy))


def where_b(op: Emit, s: Step) -> ir.Value:
    return op.Where(s.input(0), op.like(0, s.dy), s.dy)


def clip_low(op: Emit, s: Step) -> ir.Value:
    """y = min(max(x, low), high): where low is the larger, and stays below high."""
    taken = op.Greater(s.input(1), s.x)
    if s.has(2):
        taken = op.And(taken, op.Less(s.input(1), s.input(2)))
    return op.Where(taken, s.dy, op.like(0, s.dy))


def clip_high(op: Emit, s: Step) -> ir.Value:
    beaten = op.Max(s.x, s.input(1)) if s.has(1) else s.x
    return op.Where(op.Less(s.input(2), beaten), s.dy, op.like(0, s.dy))


def _root(op: Emit, square: ir.Value) -> ir.Value:
    """1 / sqrt."""
    return op.Reciprocal(op.Sqrt(square))


VJPS = {
    "Add": broadcasting(passes, passes),
    "Sub": broadcasting(passes, negated),
    "Mul": broadcasting(lambda op, s: op.Mul(s.dy, s.input(1)), lambda op, s: op.Mul(s.dy, s.input(0))),
    "Div": broadcasting(lambda op, s: op.Div(s.dy, s.input(1)), div_b),
    "Mod": broadcasting(passes, mod_b),
    "Pow": broadcasting(pow_a, pow_b),
    "Sum": variadic(lambda op, s, index: s.dy, broadcast=True),
    "Mean": variadic(lambda op, s, index: op.Div(s.dy, len(s.node.inputs)), broadcast=True),
    "Max": extreme("Greater"),
    "Min": extreme("Less"),
    "Where": broadcasting(None, where_a, where_b),
    "Neg": inputs(negated),
    "Identity": inputs(passes),
    "Clip": broadcasting(passes, clip_low, clip_high),  # x: without a bound the identity; with one an activation
    "Dropout": inputs(dropout),
    "Cast": inputs(cast),
    "CastLike": Entry(lambda op, s, index: None if index else cast(op, s), rules=(cast,)),  # the second gives its type
    "Abs": unary(lambda op, x, y: op.Sign(x)),
    "Exp": unary(lambda op, x, y: y),
    "Log": unary(lambda op, x, y: op.Reciprocal(x)),
    "Sqrt": unary(lambda op, x, y: op.Div(op.like(0.5, y), y)),
    "Reciprocal": unary(lambda op, x, y: op.Neg(op.Mul(y, y))),
    "Erf": unary(lambda op, x, y: op.Mul(op.Exp(op.Neg(op.Mul(x, x))), 2 / math.sqrt(math.pi))),
    "Sin": unary(lambda op, x, y: op.Cos(x)),
    "Cos": unary(lambda op, x, y: op.Neg(op.Sin(x))),
    "Tan": unary(lambda op, x, y: op.Add(op.Mul(y, y), 1)),
    "Asin": unary(lambda op, x, y: _root(op, op.Sub(op.like(1, x), op.Mul(x, x)))),
    "Acos": unary(lambda op, x, y: op.Neg(_root(op, op.Sub(op.like(1, x), op.Mul(x, x))))),
    "Atan": unary(lambda op, x, y: op.Reciprocal(op.Add(op.Mul(x, x), 1))),
    "Sinh": unary(lambda op, x, y: op.Cosh(x)),
    "Cosh": unary(lambda op, x, y: op.Sinh(x)),
    "Asinh": unary(lambda op, x, y: _root(op, op.Add(op.Mul(x, x), 1))),
    "Acosh": unary(lambda op, x, y: _root(op, op.Sub(op.Mul(x, x), 1))),
    "Atanh": unary(lambda op, x, y: op.Reciprocal(op.Sub(op.like(1, x), op.Mul(x, x)))),
}
