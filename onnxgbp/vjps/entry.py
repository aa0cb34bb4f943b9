"""The language of the tables.

A table maps an operator to an `Entry`: one small function per input that gives the gradient for that input,
`vjp(op, step) -> dx`, or None where the input carries none (an index, a shape, a weight that nobody asks about is never
even emitted). `step` is the forward node: `step.x`, `step.input(1)`, `step.y`, `step.dy`, `step.argument("axis")`.

    "Mul": broadcasting(mul_a, mul_b),      a rule for each input; the sweep undoes the broadcast
    "Sum": variadic(passes, broadcast=True), one rule for any number of inputs; it gets the input's index
    "LSTM": whole(lstm),                     one rule for the whole node: (tensor, dx) for each of the tensors asked
                                             for that it reads, what its sub-graphs capture included
    "Relu": not here: activations are a table of derivatives in activations.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step

__all__ = ["Entry", "Vjp", "broadcasting", "inputs", "variadic", "whole"]

Vjp: TypeAlias = "Callable[[Emit, Step], ir.Value]"
Together: TypeAlias = "Callable[[Emit, Step, Collection[ir.Value]], Iterable[tuple[ir.Value, ir.Value]]]"


@dataclasses.dataclass(frozen=True)
class Entry:
    """vjp: the gradient for input `index`, or None; broadcasts: the inputs were broadcast to y as numpy does.

    rules: the rule of each input as the table gives it, empty where one serves any number; for the table of operators.
    together: gives the gradients of all tensors at once, where they share most of their work.
    """

    vjp: Callable[[Emit, Step, int], ir.Value | None]
    broadcasts: bool = False
    rules: tuple[Vjp | None, ...] = ()
    together: Together | None = None


def inputs(*rules: Vjp | None) -> Entry:
    """One rule per input; an input without a rule carries no gradient, and an error says so if it should."""

    def vjp(op: Emit, step: Step, index: int) -> ir.Value | None:
        rule = rules[index] if index < len(rules) else None
        if rule is None:
            raise step.refuse(
                f"input {index} ('{step.input(index).name}') depends on the explained input, for which there is no rule"
            )
        return rule(op, step)

    return Entry(vjp, rules=rules)


def broadcasting(*rules: Vjp | None) -> Entry:
    return dataclasses.replace(inputs(*rules), broadcasts=True)


def variadic(rule: Callable[[Emit, Step, int], ir.Value], *, broadcast: bool = False) -> Entry:
    return Entry(rule, broadcasts=broadcast)


def whole(rule: Together) -> Entry:
    def vjp(op: Emit, step: Step, index: int) -> ir.Value | None:
        value = step.input(index)
        return dict(rule(op, step, [value])).get(value)

    return Entry(vjp, together=rule)
