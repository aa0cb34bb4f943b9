"""LSTM, GRU, RNN: backpropagation through time.

Everything that does not hang on the step after it is computed for all steps at once, from X and the shifted Y: the
gates, the local derivatives, and at the end dX = dgates W. The recurrence alone runs as a `Scan` against the time of
the cell, which takes a sequence of any length; for a runtime without Scan `unroll_scans` writes it out. The three
cells stand in `cells.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np
import onnx_ir as ir

from onnxgbp.constants import constant_value
from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.cells import Cell, Result, gru, lstm, matrix, rnn
from onnxgbp.vjps.entry import whole

__all__ = ["VJPS"]

_X, _W, _R, _B, _LENGTHS, _INITIAL_H, _INITIAL_C, _P = range(8)


def _recurrent(rule: Callable[[Cell], Result]) -> Callable[..., Iterable[tuple[ir.Value, ir.Value]]]:
    """The rule of one direction as the rule of the node: dX is the sum over the directions."""

    def together(op: Emit, s: Step, active: Collection[ir.Value]) -> Iterable[tuple[ir.Value, ir.Value]]:
        for index, value in enumerate(s.node.inputs):
            if index not in (_X, _INITIAL_H, _INITIAL_C) and value is not None and value in active:
                raise s.refuse(f"input {index} ('{value.name}'), a weight, depends on the explained input")
        axis = 1 if s.argument("layout") else 0  # of the batch's neighbour: of time in X, of directions in the states
        cells = _cells(op, s, axis)
        results = [rule(cell) for cell in cells]
        if s.x in active:
            parts = [op.MatMul(dgates, cell.w) for cell, (dgates, _, _) in zip(cells, results, strict=True)]
            dx = parts[0] if len(parts) == 1 else op.Add(*parts)
            yield s.x, op.Transpose(dx, perm=[1, 0, 2]) if axis else dx
        for index, place in ((_INITIAL_H, 1), (_INITIAL_C, 2)):
            if s.has(index) and s.input(index) in active:
                states = [
                    op.Unsqueeze(state, axes=[axis]) for result in results if (state := result[place]) is not None
                ]
                yield s.input(index), states[0] if len(states) == 1 else op.Concat(*states, axis=axis)

    return together


def _cells(op: Emit, s: Step, layout: int) -> list[Cell]:
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[str(s.argument("direction"))]
    hidden = (dims_of(s.input(_R)) or (None,))[-1]
    if not isinstance(hidden, int):
        raise s.refuse("the shape of its weight R is not known")
    length = (dims_of(s.x) or (None,) * 3)[layout]
    _check(s, len(directions))
    names = _activations(s)

    def one(value: ir.Value | None, number: int, axis: int) -> ir.Value | None:
        """One direction's part of a tensor; the axis of directions goes."""
        if value is None:
            return None
        return op.Squeeze(value, axes=[axis]) if len(directions) == 1 else op.Gather(value, op.int64(number), axis=axis)

    def sequence(value: ir.Value) -> ir.Value:
        return op.Transpose(value, perm=[1, 0, 2]) if layout else value

    def given(index: int) -> ir.Value | None:
        return s.node.inputs[index] if s.has(index) else None

    def arriving(index: int) -> ir.Value | None:
        return s.dys[index] if index < len(s.dys) else None

    nothing = op.Expand(op.like(0, s.x), op.vector(op.dim(s.x, 1 - layout), hidden))
    y, x, axis = _all_steps(op, s), sequence(s.x), 2 if layout else 1
    inside = _inside(op, s, layout, length)
    cells = []
    for number, backwards in enumerate(directions):

        def part(index: int, number: int = number) -> ir.Value:
            value = one(given(index), number, 0)
            assert value is not None  # the standard requires it
            return value

        h, dy = one(y, number, axis), one(arriving(0), number, axis)
        assert h is not None
        cells.append(
            Cell(
                op,
                s,
                hidden,
                backwards,
                length,
                names[number] if s.node.op_type == "RNN" else "",
                x,
                sequence(h),
                part(_W),
                part(_R),
                inside,
                one(given(_B), number, 0),
                one(given(_P), number, 0) if s.node.op_type == "LSTM" else None,
                matrix(one(given(_INITIAL_H), number, layout) or nothing),
                matrix(one(given(_INITIAL_C), number, layout) or nothing),
                sequence(dy) if dy is not None else None,
                matrix(one(arriving(1), number, layout) or nothing),
                matrix(one(arriving(2), number, layout) or nothing),
            )
        )
    return cells


def _all_steps(op: Emit, s: Step) -> ir.Value:
    """Output Y: the node's own, or that of a second copy of it, since the forward graph does not change."""
    if s.y.name:
        return s.y
    attributes = {name: attribute.value for name, attribute in s.node.attributes.items()}
    return op.several(1, s.node.op_type, *s.node.inputs, **attributes)[0]


_DEFAULT_ACTIVATIONS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"]}


def _activations(s: Step) -> list[str]:
    names = s.argument("activations") or []
    return [(name.decode() if isinstance(name, bytes) else str(name)).lower() for name in names]


def _inside(op: Emit, s: Step, layout: int, length: int | str | None) -> ir.Value | None:
    """Which steps are within the sequences, [T, N, 1], where `sequence_lens` may cut some of them short."""
    if not s.has(_LENGTHS):
        return None
    lengths = constant_value(s.input(_LENGTHS))
    if lengths is not None and isinstance(length, int) and np.all(lengths == length):
        return None
    ends = op.Reshape(op.Cast(s.input(_LENGTHS), to=int(ir.DataType.INT64)), [1, -1, 1])
    return op.Less(op.Reshape(op.positions(s.x, layout), [-1, 1, 1]), ends)


def _check(s: Step, directions: int) -> None:
    if s.argument("clip"):
        raise s.refuse("clip is set, for which there is no rule")
    if s.node.op_type == "LSTM" and s.argument("input_forget"):
        raise s.refuse("input_forget is set, for which there is no rule")
    names = _activations(s)
    default = _DEFAULT_ACTIVATIONS.get(s.node.op_type)
    usual = set(names) <= {"tanh", "relu"} if default is None else names in ([], default * directions)
    if not usual:
        raise s.refuse(f"its activations {', '.join(names)} are not the usual ones")


VJPS = {
    "GRU": whole(_recurrent(gru)),
    "LSTM": whole(_recurrent(lstm)),
    "RNN": whole(_recurrent(rnn)),
}
