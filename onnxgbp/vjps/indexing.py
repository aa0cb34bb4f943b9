"""Reading and writing at computed places: Gather, Scatter and their kin."""

from __future__ import annotations

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs
from onnxgbp.vjps.shape import contract, copies

__all__ = ["VJPS"]


def gather_x(op: Emit, s: Step) -> ir.Value:
    """Contracts the gathered axis with the 0/1 matrix that tells which entry each index took."""
    axis, indices = s.axis(), s.input(1)
    taken = s.rank(indices)
    dy = s.dy
    if taken != 1:  # any other shape of indices becomes a vector
        before: list[ir.Value | int] = [0] * axis  # 0 copies the dim
        after = [op.dim(s.x, i) for i in range(axis + 1, s.rank())]
        dy = op.Unsqueeze(dy, axes=[axis]) if taken == 0 else op.Reshape(dy, op.vector(*before, -1, *after))
    flat = op.Cast(indices, to=int(ir.DataType.INT64))
    flat = op.Where(op.Less(flat, op.int64(0)), op.Add(flat, op.dim(s.x, axis)), flat)  # from the end
    return contract(op, dy, axis, s.rank(), copies(op, s, axis, flat))


def gather_elements_x(op: Emit, s: Step) -> ir.Value:
    return op.ScatterElements(op.zeros_like(s.x), s.input(1), s.dy, axis=s.axis(), reduction="add")


def gather_nd_x(op: Emit, s: Step) -> ir.Value:
    """Dy goes back to where it was taken; a batch dim, which the indices leave out, is written into them."""
    batch = int(s.argument("batch_dims") or 0)
    if not batch:
        return op.ScatterND(op.zeros_like(s.x), s.input(1), s.dy, reduction="add")
    indices, last = s.input(1), s.rank(s.input(1)) - 1
    first = op.Slice(indices, starts=[0], ends=[1], axes=[last])  # for its shape
    ahead = [op.Add(op.Mul(first, [0]), op.positions(indices, axis)) for axis in range(batch)]
    return op.ScatterND(op.zeros_like(s.x), op.Concat(*ahead, indices, axis=last), s.dy, reduction="add")


def compress_x(op: Emit, s: Step) -> ir.Value:
    """A Gather of the places where the condition holds."""
    kept, axis = op.Reshape(op.NonZero(s.input(1)), [-1]), s.argument("axis")
    if axis is not None:
        return contract(op, s.dy, s.axis(), s.rank(), copies(op, s, s.axis(), kept))
    flat = op.Reshape(op.zeros_like(s.x), [-1])
    return op.reshape_like(op.ScatterElements(flat, kept, s.dy, axis=0), s.x)


def _scatter(op: Emit, s: Step, data: ir.Value, updates: ir.Value, reduction: str | None = None) -> ir.Value:
    """Updates into data, at the node's places."""
    if s.node.op_type == "ScatterND":
        return op.ScatterND(data, s.input(1), updates, reduction=reduction)
    return op.ScatterElements(data, s.input(1), updates, axis=s.axis(), reduction=reduction)


def _gather(op: Emit, s: Step, data: ir.Value) -> ir.Value:
    """For each update, the entry of data that stands at its place."""
    if s.node.op_type == "ScatterND":
        return op.GatherND(data, s.input(1))
    return op.GatherElements(data, s.input(1), axis=s.axis())


def _ones(op: Emit, like: ir.Value) -> ir.Value:
    return op.typed(op.Expand(op.like(1, like), op.shape(like)), like)


def _share(op: Emit, s: Step) -> ir.Value:
    """Max and min: dy over the number of those, among an entry and its updates, that hold the result; as in torch."""
    own = op.cast_like(op.Equal(s.x, s.y), s.x)
    theirs = op.cast_like(op.Equal(s.input(2), _gather(op, s, s.y)), s.x)
    return op.Div(s.dy, op.Max(_scatter(op, s, own, theirs, "add"), op.like(1, s.x)))


def scatter_data(op: Emit, s: Step) -> ir.Value:
    reduction, updates = str(s.argument("reduction") or "none"), s.input(2)
    if reduction == "add":
        return s.dy
    if reduction == "mul":
        return op.Mul(s.dy, _scatter(op, s, _ones(op, s.x), updates, "mul"))
    if reduction == "none":
        return _scatter(op, s, s.dy, op.zeros_like(updates))
    return op.Where(op.Equal(s.x, s.y), _share(op, s), op.like(0, s.x))


def scatter_updates(op: Emit, s: Step) -> ir.Value:
    reduction, updates = str(s.argument("reduction") or "none"), s.input(2)
    if reduction in ("none", "add"):
        return _gather(op, s, s.dy)
    if reduction == "mul":
        return op.Mul(_gather(op, s, s.dy), _others(op, s))
    return op.Where(op.Equal(updates, _gather(op, s, s.y)), _gather(op, s, _share(op, s)), op.like(0, updates))


def _others(op: Emit, s: Step) -> ir.Value:
    """The product of all that meet at an update's place but the update itself, which may be 0."""
    updates, one = s.input(2), op.like(1, s.x)
    zero, zeros = op.is_zero(updates), op.is_zero(s.x)
    filled = op.Where(zero, one, updates)
    product = _scatter(op, s, op.Where(zeros, one, s.x), filled, "mul")  # of what is not 0
    count = _scatter(op, s, op.cast_like(zeros, s.x), op.cast_like(zero, s.x), "add")
    alone = op.is_zero(op.Sub(_gather(op, s, count), op.cast_like(zero, s.x)))  # no other is 0
    return op.Where(alone, op.Div(_gather(op, s, product), filled), op.like(0, s.x))


def _written(op: Emit, s: Step) -> tuple[ir.Value, int]:
    """Which place along the axis each entry of the update of a TensorScatter is written to; the axis."""
    update, axis = s.input(1), s.axis()
    places = op.positions(update, axis)
    if s.has(2):
        places = op.Add(places, op.Reshape(s.input(2), [-1, *[1] * (s.rank() - 1)]))
    if str(s.argument("mode")) == "circular":
        places = op.Mod(places, op.dim(s.x, axis))
    return op.Expand(places, op.shape(update)), axis


def tensor_scatter_cache(op: Emit, s: Step) -> ir.Value:
    places, axis = _written(op, s)
    return op.ScatterElements(s.dy, places, op.zeros_like(s.input(1)), axis=axis)


def tensor_scatter_update(op: Emit, s: Step) -> ir.Value:
    places, axis = _written(op, s)
    return op.GatherElements(s.dy, places, axis=axis)


def unique_x(op: Emit, s: Step) -> ir.Value:
    """Those that are alike share the gradient of the one entry that stands for them."""
    axis, ordered = s.argument("axis"), int(s.argument("sorted"))
    _, _, place, count = op.several(4, "Unique", s.x, axis=axis, sorted=ordered)
    for value in (place, count):
        value.type = ir.TensorType(ir.DataType.INT64)
    along = 0 if axis is None else s.axis()
    shape = [1] * (1 if axis is None else s.rank())
    shape[along] = -1
    share = op.Div(s.dy, op.Reshape(op.cast_like(count, s.x), shape))
    return op.reshape_like(op.Gather(share, op.Reshape(place, [-1]), axis=along), s.x)


VJPS = {
    "Compress": inputs(compress_x),
    "Gather": inputs(gather_x),
    "GatherElements": inputs(gather_elements_x),
    "GatherND": inputs(gather_nd_x),
    "Scatter": inputs(scatter_data, None, scatter_updates),
    "ScatterElements": inputs(scatter_data, None, scatter_updates),
    "ScatterND": inputs(scatter_data, None, scatter_updates),
    "TensorScatter": inputs(tensor_scatter_cache, tensor_scatter_update),
    "Unique": inputs(unique_x),
}
