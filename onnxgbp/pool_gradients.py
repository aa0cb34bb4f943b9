"""How the gradients of pools are spelled."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir

from onnxgbp.blocked import BLOCK, depthwise, made_by_pad, pick
from onnxgbp.conv_gradients import begin, ints, operands, span, transposed
from onnxgbp.emit import Emit, Operand, dims_of
from onnxgbp.phases import interleaved
from onnxgbp.window import Window

__all__ = [
    "average_pool_grad",
    "average_pool_grad_blocked",
    "max_pool_by_comparison",
    "max_pool_portable",
    "max_pool_scatter",
    "sum_pool_grad",
]

_MOST_COMPARED = 9  # elements of a window: behind them Indices are as fast
_STEEPEST = 2.0**127  # the largest factor: 1 + factor d is 0 or less for every normal d < 0


def max_pool_by_comparison(op: Emit, node: ir.Node) -> ir.Value | None:
    """The elements of each window one by one: the first that equals the maximum takes the gradient, the rest get none.

    MaxPool's Indices take ONNX Runtime 10 to 40 times as long as MaxPool itself. Here every step but the last works on
    tensors of y's size that stay blocked: x_t - y, which is 0 at a maximum; 1 or 0 from that; the part of dy that
    passes, and what is left of it for the elements behind. The last takes what is left. In the end the parts are added
    up by their places in the strides, and laid out over x. None where x or the windows do not suit.
    """
    dy, x, y = operands(node)
    geometry: Window = node.meta["window"]
    elements, channels = math.prod(geometry.kernel), (dims_of(x) or (0, 0))[1]
    pool, maker = y.producer(), x.producer()
    quantised = maker is not None and maker.op_type == "DequantizeLinear"
    if not (
        geometry.static
        and pool is not None
        and pool.inputs[0] is x  # not what a quantiser rounded before the pool
        and not quantised  # ONNX Runtime pools the integers then, and may round y
        and geometry.rank == 2
        and elements <= _MOST_COMPARED
        and set(geometry.dilations) == {1}
        and isinstance(channels, int)
        and channels % BLOCK == 0
        and x.dtype == ir.DataType.FLOAT
    ):
        return None
    begin, sizes, counts = (geometry.pads or [])[:2], ints(geometry.size), ints(geometry.out)
    offsets = [-at for at in begin]
    if not node.meta.get("above_zero"):  # else dy is 0 where y is, and the 0 of a padding is no maximum
        padded = op.typed(_padded(op, x, y, geometry, op.like(_lowest(x), x)), x)
        if padded is not x:
            offsets = [0, 0]
            sizes = [max(size + at, geometry.span(i)) for i, (size, at) in enumerate(zip(sizes, begin, strict=True))]
            padded.shape = ir.Shape([(dims_of(x) or ())[0], channels, *sizes])
            x = padded
    below = depthwise(op, y, -1.0)
    op.sized(elements, elements)
    left, phases = dy, dict[tuple[int, int], ir.Value]()
    for row, column in itertools.product(*map(range, geometry.kernel)):
        part = left
        if (row, column) != (geometry.kernel[0] - 1, geometry.kernel[1] - 1):
            places = [offsets[0] + row, offsets[1] + column]
            picked = op.typed(pick(op, x, geometry.strides, places, counts, sizes), y)
            under = op.typed(op.Add(picked, below), y)  # 0 or negative
            if node.meta.get("positive"):
                part = op.Relu(op.typed(op.Add(depthwise(op, under, _STEEPEST), left), y))
            else:
                part = op.typed(op.Mul(left, op.Relu(depthwise(op, under, _STEEPEST, 1.0))), y)
            left = op.typed(op.Add(depthwise(op, part, -1.0), left), y)
        _add_at(op, phases, part, geometry, row, column)
    return interleaved(op, phases, node.outputs[0], geometry.strides, begin)


def _add_at(op: Emit, phases: dict[tuple[int, int], ir.Value], part: ir.Value, geometry: Window, *element: int) -> None:
    """Adds what one element of all windows gets to the phase of x that it lies in."""
    strides, counts = geometry.strides, ints(geometry.out)
    place = (element[0] % strides[0], element[1] % strides[1])
    shifts = [at // stride for at, stride in zip(element, strides, strict=True)]
    room = [(kernel - 1) // stride for kernel, stride in zip(geometry.kernel, strides, strict=True)]
    if any(room):  # windows overlap: a phase has more elements than there are windows
        channels = (dims_of(part) or ())[1]
        assert isinstance(channels, int)  # it is aligned
        ends = [more - shift for more, shift in zip(room, shifts, strict=True)]
        moved = op.Conv(part, op.like(np.ones([channels, 1, 1, 1]), part), pads=[*shifts, *ends], group=channels)
        moved.shape = ir.Shape([*(dims_of(part) or ())[:2], *(n + more for n, more in zip(counts, room, strict=True))])
        part = moved
    phases[place] = op.typed(op.Add(part, phases[place]), part) if place in phases else part


def max_pool_scatter(op: Emit, node: ir.Node) -> ir.Value:
    """A second MaxPool with Indices, whose gradient is then added where the maxima were."""
    if op.opset < 16:  # ScatterElements cannot add before, and overlapping windows must
        return max_pool_portable(op, node)
    dy, x, _ = operands(node)
    geometry: Window = node.meta["window"]
    if geometry.pads is None:
        return max_pool_portable(op, node)
    _, indices = op.several(
        2,
        "MaxPool",
        x,
        kernel_shape=geometry.kernel,
        strides=geometry.strides,
        dilations=geometry.dilations,
        pads=geometry.pads,
        ceil_mode=int(node.meta["ceil"]),
    )
    indices.type = ir.TensorType(ir.DataType.INT64)
    # ONNX Runtime adds in float32 and float64 only; 16 bits would lose in the sum anyway.
    narrow = x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    flat = op.Reshape(op.Cast(dy, to=int(ir.DataType.FLOAT)) if narrow else dy, [-1])
    zeros = op.Expand(op.like(0, flat), op.Shape(op.Reshape(x, [-1])))
    added = op.ScatterElements(zeros, op.Reshape(indices, [-1]), flat, axis=0, reduction="add")
    return op.reshape_like(op.cast_like(added, x), x)


def max_pool_portable(op: Emit, node: ir.Node) -> ir.Value:
    """Lays each window's elements out as channels with a one-hot convolution, picks the first maximum, and adds back.

    Channels are folded into the batch, so that one small kernel serves all. Padding is the lowest number: it never
    wins.
    """
    dy, x, y = operands(node)
    geometry: Window = node.meta["window"]
    rows = _rows(op, _padded(op, x, y, geometry, op.like(_lowest(x), x)), geometry)
    elements = math.prod(geometry.kernel)
    op.sized(elements, elements)
    one_hot = op.like(np.eye(elements).reshape(elements, 1, *geometry.kernel), x)
    windows = op.Conv(rows, one_hot, strides=geometry.strides, dilations=geometry.dilations)
    order = op.constant(np.arange(elements, dtype=np.int64).reshape(1, -1, *[1] * geometry.rank))
    first = op.Equal(order, op.ArgMax(windows, axis=1, keepdims=1))
    picked = op.Where(first, _rows(op, dy, geometry), op.like(0, dy))
    return op.reshape_like(transposed(op, picked, one_hot, x, geometry), x)


def sum_pool_grad(op: Emit, node: ir.Node) -> ir.Value:
    """Each element gets the sum over the windows that hold it."""
    share, x = operands(node)
    geometry: Window = node.meta["window"]
    ones = op.like(np.ones(op.sized(1, 1, *geometry.kernel)), x)
    return op.reshape_like(transposed(op, _rows(op, share, geometry), ones, x, geometry), x)


def average_pool_grad(op: Emit, node: ir.Node) -> ir.Value:
    dy, x, y = operands(node)
    geometry: Window = node.meta["window"]
    share = op.Div(dy, _window_counts(op, x, y, geometry, node.meta["count_include_pad"]))
    if geometry.whole:
        return op.expand_like(op.typed(share, dy), x)
    return op.private("SumPoolGrad", share, x, like=x, window=geometry)


def average_pool_grad_blocked(op: Emit, node: ir.Node) -> ir.Value:
    """Where each window counts alike: a pool again for a stride of 1; channel by channel where windows tile the input.

    The first is blocked. Neither folds the channels into the batch, behind which its name would be lost.
    """
    dy, x, y = operands(node)
    geometry: Window = node.meta["window"]
    counts = _window_counts(op, x, y, geometry, node.meta["count_include_pad"]) if geometry.static else None
    elements, pads = math.prod(geometry.kernel), geometry.pads or []
    if counts != elements or set(geometry.dilations) != {1} or geometry.whole:
        return average_pool_grad(op, node)
    if set(geometry.strides) == {1} and not made_by_pad(dy):
        rests = [k - 1 - pad for k, pad in zip(geometry.kernel * 2, pads, strict=True)]
        return op.AveragePool(dy, kernel_shape=geometry.kernel, pads=rests, count_include_pad=1)
    channels = (dims_of(x) or (0, 0))[1]
    if geometry.strides != geometry.kernel or any(pads) or not isinstance(channels, int):
        return average_pool_grad(op, node)
    share = op.like(np.full(op.sized(channels, 1, *geometry.kernel), 1 / elements), x)
    return transposed(op, dy, share, x, geometry, channels)


def _window_counts(op: Emit, x: ir.Value, y: ir.Value, geometry: Window, include_pad: bool) -> Operand:
    """By how many elements each window was divided: what lies beyond the padding never counts."""
    rank = geometry.rank
    if geometry.static and geometry.pads is not None:
        counts = np.ones([1, 1, *[1] * rank])
        for i, (size, out) in enumerate(zip(ints(geometry.size), ints(geometry.out), strict=True)):
            begin, end = geometry.pads[i], geometry.pads[i + rank]
            op.sized(out, geometry.kernel[i])
            steps = np.arange(geometry.kernel[i]) * geometry.dilations[i]
            places = np.arange(out)[:, None] * geometry.strides[i] - begin + steps[None]
            low, high = (-begin, size + end) if include_pad else (0, size)
            inside = ((places >= low) & (places < high)).sum(1)
            counts = counts * inside.reshape([1, 1, *[-1 if j == i else 1 for j in range(rank)]])
        return float(counts.flat[0]) if counts.size and (counts == counts.flat[0]).all() else op.like(counts, x)
    sizes = [op.int64([1, 1])] + [op.dim(x, i + 2) for i in range(rank)]
    ones = op.Expand(op.like(1, x), op.Concat(*sizes, axis=0))
    if include_pad and geometry.pads is not None:
        begins, ends = geometry.pads[:rank], geometry.pads[rank:]
        ones = op.Pad(ones, pads=[0, 0, *begins, 0, 0, *ends], constant_value=op.like(1, x))
        geometry = Window(
            geometry.kernel, geometry.strides, geometry.dilations, [0] * 2 * rank, True, geometry.size, geometry.out
        )
        padded = _padded(op, ones, y, geometry, op.like(0, x))
    else:
        padded = _padded(op, ones, y, geometry, op.like(1 if include_pad else 0, x), x)
    ones = op.like(np.ones(op.sized(1, 1, *geometry.kernel)), x)
    return op.Conv(padded, ones, strides=geometry.strides, dilations=geometry.dilations)


def _lowest(x: ir.Value) -> float:
    """The lowest number of x's type, or of float32, which Pad's attribute is before opset 11."""
    assert x.dtype is not None  # every value has its type before a rule sees it
    return max(float(x.dtype.min), float(np.finfo(np.float32).min))


def _rows(op: Emit, value: ir.Value, geometry: Window) -> ir.Value:
    """[N, C, ...] as [N C, 1, ...]; in Reshape, 0 copies a dim."""
    return op.Reshape(value, [-1, 1, *[0] * geometry.rank])


def _padded(
    op: Emit, x: ir.Value, y: ir.Value, geometry: Window, value: ir.Value, sized: ir.Value | None = None
) -> ir.Value:
    """X with its padding written out, as far as the windows reach (`ceil_mode` reaches beyond the pads)."""
    rank, sized = geometry.rank, x if sized is None else sized
    if geometry.static and geometry.pads is not None:
        begins = geometry.pads[:rank]
        ends = [max(geometry.span(i) - size - begins[i], 0) for i, size in enumerate(ints(geometry.size))]
        pads: Operand = [0, 0, *begins, 0, 0, *ends]
        if not any(begins) and not any(ends):
            return x
    else:
        first = [begin(op, y, sized, geometry, i) for i in range(rank)]
        last = [
            op.not_negative(op.Sub(op.Sub(span(op, y, geometry, i), op.dim(sized, i + 2)), first[i]))
            for i in range(rank)
        ]
        none = op.int64([0, 0])
        pads = op.Concat(none, *first, none, *last, axis=0)
    return op.Pad(x, pads=pads, constant_value=value)
