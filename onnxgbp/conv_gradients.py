"""How the gradient of a convolution for its input is spelled, and the arithmetic of windows that pools share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgbp.blocked import BLOCK
from onnxgbp.constants import constant_value, is_constant
from onnxgbp.emit import Emit, dims_of
from onnxgbp.window import Window

__all__ = [
    "begin",
    "by_blocks",
    "conv_as_conv",
    "conv_grad",
    "conv_grad_as_conv",
    "conv_grad_portable",
    "has_blocks",
    "ints",
    "operands",
    "scaled",
    "span",
    "transposed",
    "turned",
    "untied",
]

_FEW = 4  # channels of an image
_LARGE = 5  # a kernel for which ConvTranspose is the slower one
_PIXELS = 4  # on each side of a block
_FIRST = -(1 << 31)  # the end of a slice that runs backwards to the first element


def conv_grad(op: Emit, node: ir.Node) -> ir.Value:
    dy, w, x = operands(node)
    return transposed(op, dy, w, x, node.meta["window"], node.meta["group"])


def conv_grad_portable(op: Emit, node: ir.Node) -> ir.Value:
    """One ConvTranspose for each group, except where a group is a single channel: a single one with groups of several
    is wrong, or refused, outside of the large runtimes (onnx's own evaluator among them).
    """
    (dy, w, x), group = operands(node), node.meta["group"]
    outs, ins = (dims_of(w) or (None, None))[:2]
    if group == 1 or (outs == group and ins == 1) or not isinstance(outs, int):
        return conv_grad(op, node)
    parts = [outs // group] * group
    kernels = op.several(group, "Split", untied(op, w), axis=0, split=parts)
    gradients = op.several(group, "Split", dy, axis=1, split=parts)
    pairs = zip(gradients, kernels, strict=True)
    return op.Concat(*(transposed(op, part, kernel, x, node.meta["window"]) for part, kernel in pairs), axis=1)


def conv_grad_as_conv(op: Emit, node: ir.Node) -> ir.Value:
    """A Conv with the weight turned round, which stays in the blocked layout; the file does not grow by the turning.

    Only for a weight that is constant: ONNX Runtime turns it once, when it loads the file.
    """
    dy, w, x = operands(node)
    return conv_as_conv(op, dy, w, x, node.meta["window"], node.meta["group"])


def conv_as_conv(op: Emit, dy: ir.Value, w: ir.Value, x: ir.Value, geometry: Window, group: int) -> ir.Value:
    dims, pads, rank = dims_of(w), geometry.pads, geometry.rank
    if pads is None or dims is None or not all(isinstance(dim, int) for dim in dims) or not is_constant(w):
        return transposed(op, dy, w, x, geometry, group)
    if has_blocks(geometry, ints(dims), x, group):
        inner, factored = scaled(op, dy, w)
        blocks = by_blocks(op, {(0, 0): inner}, [1, 1], [0, 0], factored, x, geometry)
        if blocks is not None:
            return blocks
    strided = any(stride != 1 for stride in geometry.strides)
    begins = [reach - 1 - pad for reach, pad in zip(geometry.reach, pads, strict=False)]
    ends = [reach - 1 - pad for reach, pad in zip(geometry.reach, pads[rank:], strict=False)]
    if strided and not (geometry.static and group == dims[0] and dims[1] == 1):
        return transposed(op, dy, w, x, geometry, group)
    if min(begins + ends) < 0:  # padded by more than the kernel reaches: Conv cuts nothing off
        return transposed(op, dy, w, x, geometry, group)
    if not strided and ints(dims)[1] <= _FEW and group == 1:  # a block of 16 channels would be made, most for nothing
        return transposed(op, dy, w, x, geometry, group)
    dy, w = scaled(op, dy, w)
    if strided:  # depthwise: dy is laid out with its gaps first, by a kernel of one element
        dy = _spread_out(op, dy, x, geometry, group)
    back_to_front = turned(op, w, ints(dims), group)
    return op.Conv(dy, back_to_front, pads=begins + ends, dilations=geometry.dilations, group=group)


def has_blocks(geometry: Window, dims: Sequence[int], x: ir.Value, group: int) -> bool:
    """Whether `by_blocks` is faster than ConvTranspose: a large kernel over an image of few channels.

    dims: of the Conv's weight.
    """
    return (
        geometry.static
        and geometry.rank == 2
        and group == 1
        and dims[1] <= _FEW
        and dims[0] % BLOCK == 0
        and x.dtype == ir.DataType.FLOAT
        and geometry.strides == [2, 2]
        and geometry.dilations == [1, 1]
        and min(geometry.kernel) >= _LARGE
        and not any(size % _PIXELS for size in ints(geometry.size))
    )


def by_blocks(
    op: Emit,
    dys: Mapping[tuple[int, int], ir.Value],
    strides: Sequence[int],
    begin: Sequence[int],
    w: ir.Value,
    x: ir.Value,
    geometry: Window,
) -> ir.Value | None:
    """The gradient for an image of few channels, by Convs with 4 x 4 pixels as their channels.

    dx[4 i + e] = sum over q of w[e + pad - 2 q] dy[2 i + q]. dy comes as phases, of which (a, b) holds
    dy[..., s j + a - begin, t k + b - begin], each with a Conv of its own; the whole is the phase (0, 0) of the
    strides 1. None where a phase holds more than is read.
    """
    dims, pads, sizes = ints(dims_of(w) or ()), geometry.pads or [], ints(geometry.size)
    channels, total = _PIXELS * _PIXELS * dims[1], None
    padded = op.Pad(w, pads=[0] * 6 + [1, 1], constant_value=op.like(0, x))  # taps outside of the kernel read the 0
    for place, dy in dys.items():
        weight, taps, begins, ends = padded, list[int](), list[int](), list[int]()
        for i, (kernel, stride) in enumerate(zip(geometry.kernel, strides, strict=True)):
            ahead = place[i] - begin[i]
            first = -((ahead + (kernel - 1 - pads[i]) // 2) // stride)
            last = ((_PIXELS - 1 + pads[i]) // 2 - ahead) // stride
            taps.append(last - first + 1)
            begins.append(-first)
            step, count = 2 // stride, ints((dims_of(dy) or ())[2:])[i]
            ends.append((sizes[i] // _PIXELS - 1) * step + taps[i] - count + first)
            reads = [e + pads[i] - 2 * (stride * j + ahead) for e in range(_PIXELS) for j in range(first, last + 1)]
            weight = op.Gather(weight, [at if 0 <= at < kernel else kernel for at in reads], axis=2 + i)
        if min(begins + ends) < 0:
            return None
        weight = op.Reshape(weight, [*dims[:2], _PIXELS, taps[0], _PIXELS, taps[1]])
        weight = op.Reshape(op.Transpose(weight, perm=[2, 4, 1, 0, 3, 5]), [channels, dims[0], *taps])
        weight.shape = ir.Shape([channels, dims[0], *taps])
        blocks = op.Conv(dy, weight, strides=[2 // stride for stride in strides], pads=begins + ends)
        blocks.shape = ir.Shape([(dims_of(x) or ())[0], channels, *(size // _PIXELS for size in sizes)])
        total = blocks if total is None else op.typed(op.Add(blocks, total), blocks)
    return op.DepthToSpace(total, blocksize=_PIXELS)


def scaled(op: Emit, dy: ir.Value, w: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The factor per channel that a BatchNormalization behind the Conv left on dy, put into the weight instead."""
    node, rank = dy.producer(), len(dims_of(w) or ())
    if node is None or node.op_type != "Mul" or node.meta.get("forward") or len(dy.uses()) > 1:
        return dy, w
    inner, factor = node.inputs[0], constant_value(node.inputs[1])
    if inner is None or factor is None or factor.shape != ((dims_of(w) or ())[0], *[1] * (rank - 2)):
        return dy, w
    product = op.Mul(w, factor.reshape(-1, *[1] * (rank - 1)))
    product.shape = w.shape
    return inner, product


def _spread_out(op: Emit, dy: ir.Value, x: ir.Value, geometry: Window, channels: int) -> ir.Value:
    """Dy with stride - 1 zeros between its elements, and behind them what makes a stride of 1 give x's size."""
    pads, rank = geometry.pads or [], geometry.rank
    behind = [size + pads[i] + pads[i + rank] - geometry.span(i) for i, size in enumerate(ints(geometry.size))]
    ones = op.like(np.ones((channels, 1, *[1] * rank)), x)
    return op.ConvTranspose(dy, ones, strides=geometry.strides, group=channels, output_padding=behind)


def turned(op: Emit, w: ir.Value, dims: list[int], group: int) -> ir.Value:
    """W [outputs, inputs / group, ...] as [inputs, outputs / group, ...], each kernel back to front."""
    outputs, inputs, *kernel = dims
    spatial = range(len(kernel))
    if group == 1:
        w = op.Transpose(w, perm=[1, 0, *(i + 2 for i in spatial)])
    elif outputs != group or inputs != 1:
        w = op.Reshape(w, [group, outputs // group, inputs, *kernel])
        w = op.Transpose(w, perm=[0, 2, 1, *(i + 3 for i in spatial)])
        w = op.Reshape(w, [group * inputs, outputs // group, *kernel])
    axes = [i + 2 for i in spatial if kernel[i] > 1]
    if axes and op.opset >= 10:
        w = op.Slice(w, starts=[-1] * len(axes), ends=[_FIRST] * len(axes), axes=axes, steps=[-1] * len(axes))
    else:  # no steps before
        for axis in axes:
            w = op.Gather(w, list(range(kernel[axis - 2]))[::-1], axis=axis)
    w.shape = ir.Shape([group * inputs, outputs // group, *kernel])
    return w


def transposed(op: Emit, dy: ir.Value, w: ir.Value, x: ir.Value, geometry: Window, group: int = 1) -> ir.Value:
    """ConvTranspose to exactly the spatial size of x."""
    common: dict[str, Any] = {
        "kernel_shape": geometry.kernel,
        "strides": geometry.strides,
        "dilations": geometry.dilations,
        "group": group,
    }
    pads, rank = geometry.pads, geometry.rank
    if pads is not None and (geometry.static or all(stride == 1 for stride in geometry.strides)):
        # A stride that does not divide the size leaves a ragged edge, which output_padding covers.
        extra = [0] * rank
        if geometry.static:
            extra = [size - geometry.span(i) + pads[i] + pads[i + rank] for i, size in enumerate(ints(geometry.size))]
            # With ceil_mode the last window may reach beyond the padding: that much is cut off as well.
            pads = pads[:rank] + [pads[i + rank] + max(-extra[i], 0) for i in range(rank)]
            extra = [max(more, 0) for more in extra]
        return op.ConvTranspose(dy, w, pads=pads, output_padding=extra if any(extra) else None, **common)
    # A free size shows its edge only at run time: write it out in full, then cut x's part of it.
    full = op.ConvTranspose(dy, w, output_padding=[stride - 1 for stride in geometry.strides], **common)
    begins = [begin(op, dy, x, geometry, i) for i in range(rank)]
    ends = [op.Add(begin, op.dim(x, i + 2)) for i, begin in enumerate(begins)]
    return op.Slice(full, starts=_vector(op, begins), ends=_vector(op, ends), axes=list(range(2, rank + 2)))


def begin(op: Emit, y: ir.Value, x: ir.Value, geometry: Window, axis: int) -> ir.Value:
    """The padding before the first element, as an int64 tensor of shape [1]."""
    if geometry.pads is not None:
        return op.int64([geometry.pads[axis]])
    total = op.not_negative(op.Sub(span(op, y, geometry, axis), op.dim(x, axis + 2)))
    half = op.Div(total, [2])
    return half if geometry.upper else op.Sub(total, half)


def span(op: Emit, y: ir.Value, geometry: Window, axis: int) -> ir.Value:
    """How many padded elements the windows of one dim cover together, at run time."""
    return op.Add(op.Mul(op.Sub(op.dim(y, axis + 2), [1]), [geometry.strides[axis]]), [geometry.reach[axis]])


def _vector(op: Emit, parts: Sequence[ir.Value]) -> ir.Value:
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=0)


def ints(dims: Sequence[int | str | None]) -> list[int]:
    return [dim for dim in dims if isinstance(dim, int)]


def operands(node: ir.Node) -> tuple[ir.Value, ...]:
    return tuple(value for value in node.inputs if value is not None)


def untied(op: Emit, weight: ir.Value) -> ir.Value:
    """The same numbers, exactly, which no runtime takes for the same tensor; folded when the file is loaded."""
    return op.typed(op.Neg(op.Neg(weight)), weight)
