"""Operators that move elements without changing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgbp.broadcast import unbroadcast
from onnxgbp.constants import constant_value
from onnxgbp.emit import Emit, Operand, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs, variadic

__all__ = ["VJPS", "contract", "copies"]

_FAR = 1 << 30  # beyond any dim; exporters write INT64_MAX or INT32_MAX for "to the end"


def reshaped(op: Emit, s: Step) -> ir.Value:
    return op.reshape_like(s.dy, s.x)


def transpose_x(op: Emit, s: Step) -> ir.Value:
    perm = s.ints("perm") or list(range(s.rank()))[::-1]
    if sorted(perm) != list(range(len(perm))):
        raise s.refuse(f"its perm {perm} is no order of axes")
    return op.Transpose(s.dy, perm=[perm.index(axis) for axis in range(len(perm))])


def concat_x(op: Emit, s: Step, index: int) -> ir.Value:
    """The part of dy that came from this input."""
    axis = s.axis()
    for value in s.node.inputs:
        s.rank(value)  # refuses an unknown one
    sizes = [size for size in ((dims_of(s.input(i)) or ())[axis] for i in range(index + 1)) if isinstance(size, int)]
    if len(sizes) == index + 1:
        return op.Slice(s.dy, starts=[sum(sizes[:-1])], ends=[sum(sizes)], axes=[axis])
    start: Operand = [0]
    for i in range(index):
        start = op.Add(op.dim(s.input(i), axis), start)
    end = op.Add(op.dim(s.input(index), axis), start)
    return op.Slice(s.dy, starts=start, ends=end, axes=[axis])


def split_x(op: Emit, s: Step) -> ir.Value:
    parts = [dy if dy is not None else op.zeros_like(y) for dy, y in zip(s.dys, s.node.outputs, strict=True)]
    return op.Concat(*parts, axis=s.axis())


def pad_x(op: Emit, s: Step) -> ir.Value:
    """Constant padding is cut off; reflected, repeated and wrapped elements add to where they came from."""
    value = s.tensor("pads")
    if value is not None and constant_value(value) is None:
        return _pad_by(op, s, value)
    given = s.ints("pads")
    if given is None:
        raise s.refuse("its pads are missing")
    if min(given, default=0) < -_FAR:
        raise s.refuse(f"it crops by {-min(given)}, more than any tensor has")
    rank, mode = s.rank(), str(s.argument("mode"))
    axes = [axis % rank for axis in s.ints("axes") or range(rank)]
    begins, ends = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        begins[axis], ends[axis] = given[position], given[position + len(axes)]
    padded = [axis for axis in range(rank) if begins[axis] or ends[axis]]
    if mode != "constant":
        dy = s.dy
        for axis in padded:
            copied = _padded_places(op, s, axis, begins[axis], ends[axis], mode)
            dy = contract(op, dy, axis, rank, copies(op, s, axis, copied))
        return dy
    dy = s.dy
    cut = [axis for axis in padded if begins[axis] > 0 or ends[axis] > 0]
    if cut:
        dy = op.Slice(
            dy,
            starts=[max(begins[axis], 0) for axis in cut],
            ends=[-ends[axis] if ends[axis] > 0 else _FAR for axis in cut],
            axes=cut,
        )
    if any(pad < 0 for pad in begins + ends):  # a negative pad crops, so its gradient pads
        dy = op.Pad(dy, pads=[max(-pad, 0) for pad in begins + ends])
    return dy


def _pad_by(op: Emit, s: Step, pads: ir.Value) -> ir.Value:
    """The same by pads that are computed while the model runs, which may crop as well: all begins, then all ends."""
    axes = [axis % s.rank() for axis in s.ints("axes") or range(s.rank())]
    count, mode, dy = len(axes), str(s.argument("mode")), s.dy
    if (dims_of(pads) or (2 * count,))[0] != 2 * count:
        raise s.refuse(f"its pads are no two for each of {count} axes; the model is not valid")
    if pads.dtype != ir.DataType.INT64:
        pads = op.Cast(pads, to=int(ir.DataType.INT64))
    if mode != "constant":
        for position, axis in enumerate(axes):
            begin, end = (op.Gather(pads, [at], axis=0) for at in (position, position + count))
            dy = contract(op, dy, axis, s.rank(), copies(op, s, axis, _padded_places(op, s, axis, begin, end, mode)))
        return dy
    given = axes if count < s.rank() or axes != sorted(axes) else None
    uncropped = op.Pad(dy, pads=op.not_negative(op.Neg(pads)), axes=given)
    starts = op.not_negative(op.Slice(pads, starts=[0], ends=[count], axes=[0]))
    return op.Slice(uncropped, starts=starts, ends=op.Add(starts, op.Gather(op.Shape(s.x), axes, axis=0)), axes=axes)


def contract(op: Emit, dy: ir.Value, axis: int, rank: int, matrix: ir.Value) -> ir.Value:
    """Multiplies one axis of dy, [out], by a matrix [out, size] that tells of which entry each was made."""
    order = [i for i in range(rank) if i != axis] + [axis]
    moved = op.MatMul(op.Transpose(dy, perm=order), matrix)
    return op.Transpose(moved, perm=[order.index(i) for i in range(rank)])


def copies(op: Emit, s: Step, axis: int, copied: np.ndarray[Any, Any] | ir.Value) -> ir.Value:
    """The 0/1 matrix [out, size] for an axis whose entries were copied from the places `copied`."""
    size = (dims_of(s.x) or ())[axis]
    if isinstance(copied, np.ndarray) and isinstance(size, int):
        op.sized(len(copied), size)
        return op.like((copied[:, None] == np.arange(size)[None]).astype(np.float64), s.x)
    places = op.Reshape(op.positions(s.x, axis), [1, -1])
    return op.cast_like(op.Equal(op.Reshape(copied, [-1, 1]), places), s.x)


def _padded_places(
    op: Emit, s: Step, axis: int, begin: ir.Value | int, end: ir.Value | int, mode: str
) -> np.ndarray[Any, Any] | ir.Value:
    """From where each entry of a reflected, repeated or wrapped axis was copied."""
    size = (dims_of(s.x) or ())[axis]
    if isinstance(size, int) and isinstance(begin, int) and isinstance(end, int):
        numpy_modes: dict[str, Any] = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
        return np.pad(np.arange(op.sized(size)[0]), (begin, end), mode=numpy_modes[mode])
    return op.Pad(_places(op, s, axis), pads=op.vector(begin, end), mode=mode)


def slice_x(op: Emit, s: Step) -> ir.Value:
    """Dy goes back to where it was taken, with zeros elsewhere."""
    rank, dims = s.rank(), dims_of(s.x) or ()
    starts, ends = _numbers(op, s, "starts"), _numbers(op, s, "ends")
    axes = [axis % rank for axis in s.ints("axes") or range(len(starts))]
    steps = s.ints("steps") or [1] * len(axes)
    if not len(starts) == len(ends) == len(axes) == len(steps) <= rank:
        raise s.refuse("its starts, ends, axes and steps differ in number; the model is not valid")
    begins: list[ir.Value | int] = [0] * rank
    rests: list[ir.Value | int] = [0] * rank
    scattered = []
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis]
        if stride != 1:
            scattered.append((axis, start, end, stride))
        elif isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
            first, last, _ = slice(start, end).indices(size)
            begins[axis], rests[axis] = first, size - max(first, last)
        elif start != 0 or not isinstance(end, int) or end <= _FAR:  # else the whole of a free dim
            if start != 0:  # counted, since it may be negative, or beyond the end
                begins[axis] = op.Shape(op.Slice(_places(op, s, axis), starts=[0], ends=op.vector(start), axes=[0]))
            taken = op.Gather(op.Shape(s.dy), [axis], axis=0)  # no size that a bound may cut is known before the run
            rests[axis] = op.Sub(op.dim(s.x, axis), op.Add(taken, op.vector(begins[axis])) if start != 0 else taken)
    dy = s.dy
    if any(pad != 0 for pad in begins + rests):
        dy = op.Pad(dy, pads=op.vector(*begins, *rests))
    for axis, start, end, stride in scattered:
        dy = _scatter(op, s, dy, axis, start, end, stride)
    return dy


def _numbers(op: Emit, s: Step, name: str) -> Sequence[ir.Value | int]:
    """An argument of integers: numbers, or int64 tensors of shape [1] where they are computed while the model runs."""
    value = s.tensor(name)
    dims = dims_of(value) if value is not None and constant_value(value) is None else None
    if value is not None and dims and isinstance(dims[0], int):
        if dims[0] > s.rank():
            raise s.refuse(f"it has {dims[0]} {name} for {s.rank()} axes; the model is not valid")
        each = [op.Gather(value, [i], axis=0) for i in range(dims[0])]
        return each if value.dtype == ir.DataType.INT64 else [op.Cast(one, to=int(ir.DataType.INT64)) for one in each]
    numbers = s.ints(name)
    if numbers is None:
        raise s.refuse(f"its {name} are missing")
    return numbers


def _places(op: Emit, s: Step, axis: int) -> ir.Value:
    return op.Reshape(op.positions(s.x, axis), [-1])


def _scatter(
    op: Emit, s: Step, dy: ir.Value, axis: int, start: ir.Value | int, end: ir.Value | int, stride: int
) -> ir.Value:
    """One axis of a strided slice: contracts it with the 0/1 matrix of the elements taken."""
    size = (dims_of(s.x) or ())[axis]
    taken: np.ndarray[Any, Any] | ir.Value
    if isinstance(start, int) and isinstance(end, int):
        if stride == -1 and start in (-1, size) and end < -_FAR:  # the whole axis backwards: so is its gradient
            return op.Slice(dy, starts=[-1], ends=[-_FAR - 1], axes=[axis], steps=[-1])
        if isinstance(size, int):
            stop = None if stride < 0 and end < -_FAR else end  # "before the first" is None in Python
            taken = np.arange(op.sized(size)[0])[start:stop:stride]
            return contract(op, dy, axis, s.rank(), copies(op, s, axis, taken))
    taken = op.Slice(_places(op, s, axis), starts=op.vector(start), ends=op.vector(end), axes=[0], steps=[stride])
    return contract(op, dy, axis, s.rank(), copies(op, s, axis, taken))


def expand_x(op: Emit, s: Step) -> ir.Value:
    return unbroadcast(op, s.dy, dims_of(s.y), s.x)


def tile_x(op: Emit, s: Step) -> ir.Value:
    """Each repeated axis becomes two, of which the first is summed."""
    repeats = _numbers(op, s, "repeats")
    if len(repeats) != s.rank():
        raise s.refuse(f"it has {len(repeats)} repeats for {s.rank()} axes; the model is not valid")
    parts: list[ir.Value | int] = []
    summed = []
    dims = dims_of(s.x) or ()
    for axis, repeat in enumerate(repeats):
        if repeat != 1:
            summed.append(len(parts))
            parts.append(repeat)
        size = dims[axis]
        parts.append(size if isinstance(size, int) else op.dim(s.x, axis))
    if not summed:
        return s.dy
    return op.reshape_like(op.ReduceSum(op.Reshape(s.dy, op.vector(*parts)), axes=summed, keepdims=0), s.x)


def depth_to_space_x(op: Emit, s: Step) -> ir.Value:
    block = int(s.argument("blocksize"))
    if s.argument("mode") == "DCR":
        return op.SpaceToDepth(s.dy, blocksize=block)
    # CRD: the channel comes before the place in the block.
    height, width = op.dim(s.x, 2), op.dim(s.x, 3)
    blocks = op.Reshape(s.dy, op.vector(0, -1, height, block, width, block))
    return op.reshape_like(op.Transpose(blocks, perm=[0, 1, 3, 5, 2, 4]), s.x)


def space_to_depth_x(op: Emit, s: Step) -> ir.Value:
    mode = s.argument("mode")  # there from opset 27 on; DCR before
    return op.DepthToSpace(s.dy, blocksize=int(s.argument("blocksize")), mode=None if mode == "DCR" else mode)


def trilu_x(op: Emit, s: Step) -> ir.Value:
    return op.Trilu(s.dy, s.node.inputs[1] if s.has(1) else None, upper=int(s.argument("upper")))


def reverse_sequence_x(op: Emit, s: Step) -> ir.Value:
    batch, time = int(s.argument("batch_axis")), int(s.argument("time_axis"))
    return op.ReverseSequence(s.dy, s.input(1), batch_axis=batch, time_axis=time)


def range_start(op: Emit, s: Step) -> ir.Value:
    """y_i = start + i delta."""
    return op.ReduceSum(s.dy, axes=[0], keepdims=0)


def range_limit(op: Emit, s: Step) -> ir.Value:
    """How many numbers there are is all that it tells."""
    return op.zeros_like(s.input(1))


def range_delta(op: Emit, s: Step) -> ir.Value:
    return op.ReduceSum(op.Mul(s.dy, op.cast_like(op.positions(s.y, 0), s.dy)), axes=[0], keepdims=0)


VJPS = {
    "Concat": variadic(concat_x),
    "DepthToSpace": inputs(depth_to_space_x),
    "Expand": inputs(expand_x),
    "Flatten": inputs(reshaped),
    "Pad": inputs(pad_x),
    "Range": inputs(range_start, range_limit, range_delta),
    "Reshape": inputs(reshaped),
    "ReverseSequence": inputs(reverse_sequence_x),
    "Slice": inputs(slice_x),
    "SpaceToDepth": inputs(space_to_depth_x),
    "Split": inputs(split_x),
    "Squeeze": inputs(reshaped),
    "Tile": inputs(tile_x),
    "Transpose": inputs(transpose_x),
    "Trilu": inputs(trilu_x),
    "Unsqueeze": inputs(reshaped),
}
