"""Reductions: the gradient is spread over, or picked out of, the axes that were reduced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from onnxgbp.emit import Emit, dims_of, numel
from onnxgbp.step import Step
from onnxgbp.vjps.entry import Entry, inputs

__all__ = ["VJPS", "mean_over", "pick_first", "reduced_axes"]


def reduced_axes(s: Step) -> list[int]:
    axes = s.ints("axes")
    if axes:
        return sorted(axis % s.rank() for axis in axes)
    return [] if s.argument("noop_with_empty_axes") else list(range(s.rank()))


def kept(op: Emit, s: Step, value: ir.Value) -> ir.Value:
    """Dy or y with the reduced axes as dims of size 1."""
    axes = reduced_axes(s)
    return value if s.argument("keepdims") or not axes else op.Unsqueeze(value, axes=axes)


def count(op: Emit, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """How many elements the axes hold, in x's type."""
    dims = dims_of(x)
    static = numel([dims[axis] for axis in axes]) if dims is not None else None
    if static is not None:
        return op.like(static, x)
    product = op.ReduceProd(op.Gather(op.Shape(x), list(axes), axis=0), keepdims=0)
    return op.cast_like(product, x)


def spread(op: Emit, dy: ir.Value, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """dy, with 1 in the reduced axes, broadcast to x."""
    dims = dims_of(x)
    if dims is not None:
        dy.shape = ir.Shape([1 if i in axes else dim for i, dim in enumerate(dims)])
    return op.expand_like(dy, x)


def mean_over(op: Emit, dy: ir.Value, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    return spread(op, op.Div(dy, count(op, x, axes)), x, axes)


def pick_first(op: Emit, dy: ir.Value, x: ir.Value, axes: Sequence[int], arg: Callable[..., ir.Value]) -> ir.Value:
    """Dy at the first extreme of each group of elements, 0 elsewhere. dy has 1 in the reduced axes."""
    rank = len(dims_of(x) or ())
    if len(axes) == 1:
        place = op.Equal(op.positions(x, axes[0]), arg(x, axis=axes[0], keepdims=1))
        return op.Where(place, dy, op.like(0, dy))
    # Several axes: bring them to the end as one, so that "first" is the order in memory.
    front = [axis for axis in range(rank) if axis not in axes]
    order = front + list(axes)
    moved = op.Transpose(x, perm=order)
    dims = dims_of(x)
    if dims is not None:
        moved.shape = ir.Shape([dims[axis] for axis in order])
    flat = op.Reshape(moved, [0] * len(front) + [-1])
    lead = op.Reshape(op.Transpose(dy, perm=order), [0] * len(front) + [-1])
    if dims is not None:
        flat.shape = ir.Shape([dims[axis] for axis in front] + [numel([dims[axis] for axis in axes])])
    place = op.Equal(op.positions(flat, len(front)), arg(flat, axis=len(front), keepdims=1))
    picked = op.reshape_like(op.Where(place, lead, op.like(0, dy)), moved)
    return op.Transpose(picked, perm=[order.index(axis) for axis in range(rank)])


def sum_x(op: Emit, s: Step) -> ir.Value:
    return spread(op, kept(op, s, s.dy), s.x, reduced_axes(s))


def mean_x(op: Emit, s: Step) -> ir.Value:
    return mean_over(op, kept(op, s, s.dy), s.x, reduced_axes(s))


def extreme(arg: str) -> Entry:
    """The first extreme takes the gradient, as in MaxPool."""

    def vjp(op: Emit, s: Step) -> ir.Value:
        axes = reduced_axes(s)
        if not axes:
            return s.dy
        named: Any = getattr(op, arg)
        return pick_first(op, kept(op, s, s.dy), s.x, axes, named)

    return inputs(vjp)


def scaled(factor: Callable[[Emit, ir.Value, ir.Value], ir.Value]) -> Entry:
    """dx = dy f, with f written from x and y, where y and dy have 1 in the reduced axes."""

    def vjp(op: Emit, s: Step) -> ir.Value:
        return op.Mul(kept(op, s, s.dy), factor(op, s.x, kept(op, s, s.y)))

    return inputs(vjp)


def log_sum_x(op: Emit, s: Step) -> ir.Value:
    """y = log sum x, so dx = dy / sum x = dy exp(-y)."""
    return spread(op, op.Mul(kept(op, s, s.dy), op.Exp(op.Neg(kept(op, s, s.y)))), s.x, reduced_axes(s))


def l2(op: Emit, x: ir.Value, y: ir.Value) -> ir.Value:
    """x / y, and 0 for a vector of zeros."""
    return op.Div(x, op.Where(op.is_zero(y), op.like(1, y), y))


def product_x(op: Emit, s: Step) -> ir.Value:
    """The product of the others: of all but x where none is 0, of the rest where x alone is 0, else 0."""
    axes = reduced_axes(s)
    zero = op.is_zero(s.x)
    filled = op.Where(zero, op.like(1, s.x), s.x)
    rest = op.ReduceProd(filled, axes=axes, keepdims=1)
    zeros = op.ReduceSum(op.cast_like(zero, s.x), axes=axes, keepdims=1)
    others = op.Where(zero, rest, op.Div(rest, filled))
    alone = op.is_zero(op.Sub(zeros, op.cast_like(zero, s.x)))
    return op.Mul(kept(op, s, s.dy), op.Where(alone, others, op.like(0, s.x)))


def cumsum_x(op: Emit, s: Step) -> ir.Value:
    reverse, exclusive = int(s.argument("reverse")), int(s.argument("exclusive"))
    return op.CumSum(s.dy, s.input(1), reverse=1 - reverse, exclusive=exclusive)


def cumprod_x(op: Emit, s: Step) -> ir.Value:
    """The slope of y[j] by x[i] is the product of the entries before i times that from behind i up to j: no division.

    A `reverse` product is the same from the other end; an `exclusive` one leaves out entry j itself.
    """
    given, rank = s.argument("axis"), s.rank()
    axis, reverse, exclusive = int(given) % rank, int(s.argument("reverse")), int(s.argument("exclusive"))
    order = [i for i in range(rank) if i != axis] + [axis]
    x, dy = op.Transpose(s.x, perm=order), op.Transpose(s.dy, perm=order)
    place = op.Reshape(op.positions(s.x, axis), [1, -1])  # j; every matrix below is [..., i, j]
    mine = op.Reshape(place, [-1, 1])
    behind = op.Less(place, mine) if reverse else op.Greater(place, mine)
    kept = op.Where(behind, op.Unsqueeze(x, axes=[rank - 1]), op.like(1, x))
    tail = op.CumProd(kept, op.int64(rank), exclusive=exclusive, reverse=reverse)
    before = op.CumProd(x, op.int64(rank - 1), exclusive=1, reverse=reverse)
    reached = behind if exclusive else op.Or(behind, op.Equal(place, mine))
    slope = op.Where(reached, op.Mul(op.Unsqueeze(before, axes=[rank]), tail), op.like(0, x))
    dx = op.ReduceSum(op.Mul(slope, op.Unsqueeze(dy, axes=[rank - 1])), axes=[rank], keepdims=0)
    return op.Transpose(dx, perm=[order.index(i) for i in range(rank)])


def top_k_x(op: Emit, s: Step) -> ir.Value:
    return op.ScatterElements(op.zeros_like(s.x), s.node.outputs[1], s.dy, axis=s.axis())


VJPS = {
    "CumProd": inputs(cumprod_x),
    "CumSum": inputs(cumsum_x),
    "ReduceL1": scaled(lambda op, x, y: op.Sign(x)),
    "ReduceL2": scaled(l2),
    "ReduceLogSum": inputs(log_sum_x),
    "ReduceLogSumExp": scaled(lambda op, x, y: op.Exp(op.Sub(x, y))),
    "ReduceMax": extreme("ArgMax"),
    "ReduceMean": inputs(mean_x),
    "ReduceMin": extreme("ArgMin"),
    "ReduceProd": inputs(product_x),
    "ReduceSum": inputs(sum_x),
    "ReduceSumSquare": scaled(lambda op, x, y: op.Mul(x, 2.0)),
    "TopK": inputs(top_k_x),
}
