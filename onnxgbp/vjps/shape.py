"""Operators that move elements without changing them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgbp.emit import Emit, Operand, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs, variadic

__all__ = ["VJPS"]

_FAR = 1 << 30  # beyond any dim; exporters write INT64_MAX or INT32_MAX for "to the end"


def reshaped(op: Emit, s: Step) -> ir.Value:
    return op.reshape_like(s.dy, s.x)


def transpose_x(op: Emit, s: Step) -> ir.Value:
    perm = s.ints("perm") or list(range(s.rank()))[::-1]
    return op.Transpose(s.dy, perm=[perm.index(axis) for axis in range(len(perm))])


def concat_x(op: Emit, s: Step, index: int) -> ir.Value:
    """The part of dy that came from this input."""
    axis = s.axis()
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
    given = s.ints("pads")
    assert given is not None  # the standard requires it
    rank, mode = s.rank(), str(s.argument("mode"))
    axes = [axis % rank for axis in s.ints("axes") or range(rank)]
    begins, ends = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        begins[axis], ends[axis] = given[position], given[position + len(axes)]
    padded = [axis for axis in range(rank) if begins[axis] or ends[axis]]
    if mode != "constant":
        dy = s.dy
        for axis in padded:
            dy = _gather_back(op, s, dy, axis, begins[axis], ends[axis], mode)
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


def _gather_back(op: Emit, s: Step, dy: ir.Value, axis: int, begin: int, end: int, mode: str) -> ir.Value:
    """Contracts one axis with the 0/1 matrix that tells which element of x each padded one copies."""
    dims = dims_of(s.x)
    size = dims[axis] if dims is not None else None
    if not isinstance(size, int):
        raise s.refuse(f"padding of mode '{mode}' on a free dim; export the model with a fixed input size")
    copied = np.pad(np.arange(size), (begin, end), mode={"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode])  # type: ignore[call-overload]  # numpy types the literal modes only
    matrix = (copied[:, None] == np.arange(size)[None]).astype(np.float64)
    order = [i for i in range(s.rank()) if i != axis] + [axis]
    moved = op.MatMul(op.Transpose(dy, perm=order), op.like(matrix, s.x))
    return op.Transpose(moved, perm=[order.index(i) for i in range(s.rank())])


def slice_x(op: Emit, s: Step) -> ir.Value:
    """Dy goes back to where it was taken, with zeros elsewhere."""
    starts, ends = s.ints("starts"), s.ints("ends")
    axes = [axis % s.rank() for axis in s.ints("axes") or range(len(starts or ()))]
    steps = s.ints("steps") or [1] * len(axes)
    dims = dims_of(s.x)
    if dims is None or starts is None or ends is None:  # rank() has refused an unknown rank
        raise s.refuse("starts or ends are missing")
    begins, rests = [0] * s.rank(), [0] * s.rank()
    scattered = []
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis]
        if isinstance(size, int) and stride == 1:
            first, last, _ = slice(start, end).indices(size)
            begins[axis], rests[axis] = first, size - max(first, last)
        elif stride == 1 and start == 0 and end > _FAR:
            pass  # the whole of a free dim
        else:
            scattered.append((axis, start, end, stride))
    dy = s.dy
    if any(begins) or any(rests):
        dy = op.Pad(dy, pads=begins + rests)
    for axis, start, end, stride in scattered:
        dy = _scatter(op, s, dy, axis, start, end, stride)
    return dy


def _scatter(op: Emit, s: Step, dy: ir.Value, axis: int, start: int, end: int, stride: int) -> ir.Value:
    """One axis of a strided slice, or one of a free dim: contracts it with the 0/1 matrix of the elements taken."""
    dims = dims_of(s.x)
    size = dims[axis] if dims is not None else None
    if stride == -1 and start in (-1, size) and end < -_FAR:  # the whole axis backwards: so is its gradient
        return op.Slice(dy, starts=[-1], ends=[-_FAR - 1], axes=[axis], steps=[-1])
    if isinstance(size, int):
        stop = None if stride < 0 and end < -_FAR else end  # "before the first" is None in Python
        taken = np.arange(size)[start:stop:stride]
        matrix = op.like((taken[:, None] == np.arange(size)[None]).astype(np.float64), s.x)
    else:
        places = op.Reshape(op.positions(s.x, axis), [-1])
        there = op.Slice(places, starts=[start], ends=[end], axes=[0], steps=[stride])
        same = op.Equal(op.Unsqueeze(there, axes=[1]), op.Unsqueeze(places, axes=[0]))
        assert s.x.dtype is not None  # every value has its type before a rule sees it
        matrix = op.Cast(same, to=int(s.x.dtype))
    order = [i for i in range(s.rank()) if i != axis] + [axis]
    moved = op.MatMul(op.Transpose(dy, perm=order), matrix)
    return op.Transpose(moved, perm=[order.index(i) for i in range(s.rank())])


VJPS = {
    "Concat": variadic(concat_x),
    "Flatten": inputs(reshaped),
    "Pad": inputs(pad_x),
    "Reshape": inputs(reshaped),
    "Slice": inputs(slice_x),
    "Split": inputs(split_x),
    "Squeeze": inputs(reshaped),
    "Transpose": inputs(transpose_x),
    "Unsqueeze": inputs(reshaped),
}
