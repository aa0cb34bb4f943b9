"""Arithmetic on elements. Broadcasting is undone by the sweep, so no rule here knows of shapes."""

from __future__ import annotations

import functools

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


VJPS = {
    "Add": broadcasting(passes, passes),
    "Sub": broadcasting(passes, negated),
    "Mul": broadcasting(lambda op, s: op.Mul(s.dy, s.input(1)), lambda op, s: op.Mul(s.dy, s.input(0))),
    "Div": broadcasting(lambda op, s: op.Div(s.dy, s.input(1)), div_b),
    "Sum": variadic(lambda op, s, index: s.dy, broadcast=True),
    "Max": extreme("Greater"),
    "Min": extreme("Less"),
    "Neg": inputs(negated),
    "Identity": inputs(passes),
    "Clip": inputs(passes),  # without a bound the identity; with one an activation
    "Dropout": inputs(dropout),
    "Cast": inputs(cast),
}
