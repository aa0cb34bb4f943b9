"""How each gradient is spelled in standard operators, per profile; and the clean-up of the graph.

`ort` (default) is the spelling that ONNX Runtime runs fastest, `portable` the one that is right in every runtime.
The table at the end is the one place where a profile decides anything.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgbp.blocked import BLOCK, depthwise, keep_blocked
from onnxgbp.branches import detach
from onnxgbp.constants import constant_value, is_constant
from onnxgbp.emit import PRIVATE, Emit, Operand, dims_of
from onnxgbp.scan import unroll_scans
from onnxgbp.window import Window

__all__ = ["PROFILES", "lower", "merge_equal", "prune", "replace_calls"]

Lowering: TypeAlias = "Callable[[Emit, ir.Node], ir.Value]"

_MOST_COMPARED = 9  # elements of a window: behind them Indices are as fast
_STEEPEST = 2.0**127  # the largest factor: 1 + factor d is 0 or less for every normal d < 0
_FIRST = -(1 << 31)  # the end of a slice that runs backwards to the first element


def replace_calls(op: Emit, table: Mapping[str, Lowering]) -> None:
    """Replaces each private call that the table knows by the nodes that its function writes, in sub-graphs as well."""
    nodes = list(op.graph.all_nodes())
    for node in nodes:
        if node.domain != PRIVATE or node.op_type not in table or node.graph is None:
            continue
        op.scope = (node.name or "").rpartition("/")[0]
        value, call = table[node.op_type](op, node), node.outputs[0]
        new = op.take()
        node.graph.insert_before(node, new)
        nodes.extend(new)  # a spelling may call another
        if value.shape is None:
            op.typed(value, call)
        call.replace_all_uses_with(value, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)


def lower(op: Emit, profile: str) -> None:
    """Spells every gradient for the profile. No private call is left."""
    replace_calls(op, {call: choices[profile] for call, choices in LOWERINGS.items()})
    if profile == "ort":
        keep_blocked(op)
    if profile == "portable":
        unroll_scans(op)
        untie_weights(op)


def _operands(node: ir.Node) -> tuple[ir.Value, ...]:
    return tuple(value for value in node.inputs if value is not None)


def conv_grad(op: Emit, node: ir.Node) -> ir.Value:
    dy, w, x = _operands(node)
    return _transposed(op, dy, w, x, node.meta["window"], node.meta["group"])


def conv_grad_portable(op: Emit, node: ir.Node) -> ir.Value:
    """One ConvTranspose for each group, except where a group is a single channel: a single one with groups of several
    is wrong, or refused, outside of the large runtimes (onnx's own evaluator among them).
    """
    (dy, w, x), group = _operands(node), node.meta["group"]
    outs, ins = (dims_of(w) or (None, None))[:2]
    if group == 1 or (outs == group and ins == 1) or not isinstance(outs, int):
        return conv_grad(op, node)
    parts = [outs // group] * group
    kernels = op.several(group, "Split", _untied(op, w), axis=0, split=parts)
    gradients = op.several(group, "Split", dy, axis=1, split=parts)
    pairs = zip(gradients, kernels, strict=True)
    return op.Concat(*(_transposed(op, part, kernel, x, node.meta["window"]) for part, kernel in pairs), axis=1)


def conv_grad_as_conv(op: Emit, node: ir.Node) -> ir.Value:
    """A Conv with the weight turned round, which stays in the blocked layout; the file does not grow by the turning.

    Only for a weight that is constant: ONNX Runtime turns it once, when it loads the file.
    """
    dy, w, x = _operands(node)
    geometry: Window = node.meta["window"]
    group: int = node.meta["group"]
    dims, pads, rank = dims_of(w), geometry.pads, geometry.rank
    if pads is None or dims is None or not all(isinstance(dim, int) for dim in dims) or not is_constant(w):
        return conv_grad(op, node)
    strided = any(stride != 1 for stride in geometry.strides)
    begins = [reach - 1 - pad for reach, pad in zip(geometry.reach, pads, strict=False)]
    ends = [reach - 1 - pad for reach, pad in zip(geometry.reach, pads[rank:], strict=False)]
    if strided and op.opset >= 10 and _has_blocked_phases(geometry, _ints(dims), group, x):  # Slice has steps since
        return _by_phases(op, *_scaled(op, dy, w), x, geometry)
    if strided and not (geometry.static and group == dims[0] and dims[1] == 1):
        return conv_grad(op, node)
    if min(begins + ends) < 0:  # padded by more than the kernel reaches: Conv cuts nothing off
        return conv_grad(op, node)
    dy, w = _scaled(op, dy, w)
    if strided:  # depthwise: dy is laid out with its gaps first, by a kernel of one element
        dy = _spread_out(op, dy, x, geometry, group)
    turned = _turned(op, w, _ints(dims), group)
    return op.Conv(dy, turned, pads=begins + ends, dilations=geometry.dilations, group=group)


def _has_blocked_phases(geometry: Window, dims: Sequence[int], group: int, x: ir.Value) -> bool:
    return (
        geometry.static
        and group == 1
        and not dims[0] % BLOCK
        and not dims[1] % BLOCK
        and x.dtype == ir.DataType.FLOAT
        and geometry.strides == [2, 2]
        and geometry.dilations == [1, 1]
        and all(min(phase.pads) >= 0 for i in range(2) for phase in _phases(geometry, i))
    )


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Every second element of one dim of dx, from `first` on: a Conv of dy with every second tap of the turned weight.

    tap, taps: the first and how many; pads: of that Conv, at both ends.
    """

    first: int
    tap: int
    taps: int
    pads: tuple[int, int]


def _phases(geometry: Window, axis: int) -> list[_Phase]:
    """dx[s i + e] = sum over j of w[r + s j] dy[q + i - j], with e + pad = s q + r; none for a phase without a tap."""
    stride, kernel, pads = geometry.strides[axis], geometry.kernel[axis], geometry.pads or []
    size, out = _ints(geometry.size)[axis], _ints(geometry.out)[axis]
    count, phases = -(-size // stride), []
    for first in range(stride):
        start, rest = divmod(first + pads[axis], stride)
        taps = len(range(rest, kernel, stride))
        if taps:
            ends = (taps - 1 - start, count - out + start)
            phases.append(_Phase(first, (kernel - 1 - rest) % stride, taps, ends))
    return phases


def _by_phases(op: Emit, dy: ir.Value, w: ir.Value, x: ir.Value, geometry: Window) -> ir.Value:
    """A strided Conv's gradient as a Conv for each phase of x, all blocked, laid out over x at the end.

    No product with a zero, as there would be if dy were spread out first or the phases were one Conv.
    """
    dims = _ints(dims_of(w) or ())
    channels, kernel = dims[1], geometry.kernel
    turned, high, wide = _turned(op, w, dims, 1), *_ints(geometry.size)
    parts, places = list[ir.Value](), list[np.ndarray[Any, Any]]()
    for a, b in itertools.product(_phases(geometry, 0), _phases(geometry, 1)):
        taps = turned
        if [a.taps, b.taps] != kernel:
            taps = op.Slice(turned, starts=[a.tap, b.tap], ends=kernel, axes=[2, 3], steps=[2, 2])
            taps.shape = ir.Shape([channels, dims[0], a.taps, b.taps])
        parts.append(op.Conv(dy, taps, pads=[a.pads[0], b.pads[0], a.pads[1], b.pads[1]]))
        places.append(np.eye(4)[2 * a.first + b.first].reshape(1, 2, 2))
    halves = [-(-high // 2), -(-wide // 2)]
    if len(parts) > 1:  # beside each other for each channel, as a grouped ConvTranspose wants them
        flat = [op.Reshape(part, [0, channels, 1, -1]) for part in parts]
        together = op.Reshape(op.Concat(*flat, axis=2), [0, channels * len(parts), *halves])
    else:
        (together,) = parts
    spread = op.like(np.tile(np.stack(places), (channels, 1, 1, 1)), x)
    return op.ConvTranspose(together, spread, strides=[2, 2], pads=[0, 0, high % 2, wide % 2], group=channels)


def _scaled(op: Emit, dy: ir.Value, w: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The factor per channel that a BatchNormalization behind the Conv left on dy, put into the weight instead."""
    node, rank = dy.producer(), len(dims_of(w) or ())
    if node is None or node.op_type != "Mul" or node.meta.get("forward") or len(dy.uses()) > 1:
        return dy, w
    inner, factor = node.inputs[0], constant_value(node.inputs[1])
    if inner is None or factor is None or factor.shape != ((dims_of(w) or ())[0], *[1] * (rank - 2)):
        return dy, w
    scaled = op.Mul(w, factor.reshape(-1, *[1] * (rank - 1)))
    scaled.shape = w.shape
    return inner, scaled


def _spread_out(op: Emit, dy: ir.Value, x: ir.Value, geometry: Window, channels: int) -> ir.Value:
    """Dy with stride - 1 zeros between its elements, and behind them what makes a stride of 1 give x's size."""
    pads, rank = geometry.pads or [], geometry.rank
    behind = [size + pads[i] + pads[i + rank] - geometry.span(i) for i, size in enumerate(_ints(geometry.size))]
    ones = op.like(np.ones((channels, 1, *[1] * rank)), x)
    return op.ConvTranspose(dy, ones, strides=geometry.strides, group=channels, output_padding=behind)


def _turned(op: Emit, w: ir.Value, dims: list[int], group: int) -> ir.Value:
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


def _transposed(op: Emit, dy: ir.Value, w: ir.Value, x: ir.Value, geometry: Window, group: int = 1) -> ir.Value:
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
            extra = [size - geometry.span(i) + pads[i] + pads[i + rank] for i, size in enumerate(_ints(geometry.size))]
            # With ceil_mode the last window may reach beyond the padding: that much is cut off as well.
            pads = pads[:rank] + [pads[i + rank] + max(-extra[i], 0) for i in range(rank)]
            extra = [max(more, 0) for more in extra]
        return op.ConvTranspose(dy, w, pads=pads, output_padding=extra if any(extra) else None, **common)
    # A free size shows its edge only at run time: write it out in full, then cut x's part of it.
    full = op.ConvTranspose(dy, w, output_padding=[stride - 1 for stride in geometry.strides], **common)
    begins = [_begin(op, dy, x, geometry, i) for i in range(rank)]
    ends = [op.Add(begin, op.dim(x, i + 2)) for i, begin in enumerate(begins)]
    return op.Slice(full, starts=_vector(op, begins), ends=_vector(op, ends), axes=list(range(2, rank + 2)))


def _ints(dims: Sequence[int | str | None]) -> list[int]:
    return [dim for dim in dims if isinstance(dim, int)]


def _vector(op: Emit, parts: Sequence[ir.Value]) -> ir.Value:
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=0)


def _begin(op: Emit, y: ir.Value, x: ir.Value, geometry: Window, axis: int) -> ir.Value:
    """The padding before the first element, as an int64 tensor of shape [1]."""
    if geometry.pads is not None:
        return op.int64([geometry.pads[axis]])
    total = _not_negative(op, op.Sub(_span(op, y, geometry, axis), op.dim(x, axis + 2)))
    half = op.Div(total, [2])
    return half if geometry.upper else op.Sub(total, half)


def _not_negative(op: Emit, number: ir.Value) -> ir.Value:
    """Max with 0; Max itself takes no integers before opset 12."""
    return op.Where(op.Less(number, op.int64(0)), op.int64([0]), number)


def _span(op: Emit, y: ir.Value, geometry: Window, axis: int) -> ir.Value:
    """How many padded elements the windows of one dim cover together, at run time."""
    return op.Add(op.Mul(op.Sub(op.dim(y, axis + 2), [1]), [geometry.strides[axis]]), [geometry.reach[axis]])


def max_pool_by_comparison(op: Emit, node: ir.Node) -> ir.Value:
    """The elements of each window one by one: the first that equals the maximum takes the gradient, the rest get none.

    MaxPool's Indices take ONNX Runtime 10 to 40 times as long as MaxPool itself. Here every step but the last works on
    tensors of y's size that stay blocked: x_t - y, which is 0 at a maximum; 1 or 0 from that; the part of dy that
    passes, and what is left of it for the elements behind. The last takes what is left. In the end the parts are laid
    out over x, where those of overlapping windows add.
    """
    dy, x, y = _operands(node)
    geometry: Window = node.meta["window"]
    elements, channels = int(np.prod(geometry.kernel)), (dims_of(x) or (0, 0))[1]
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
        return max_pool_scatter(op, node)
    padded = op.typed(_padded(op, x, y, geometry, op.like(_lowest(x), x)), x)
    if padded is not x:
        padded.shape = ir.Shape([(dims_of(x) or ())[0], channels, None, None])
    below = depthwise(op, y, -1.0)
    one_hot = np.eye(elements).reshape(elements, 1, 1, *geometry.kernel)
    left, parts = dy, list[ir.Value]()
    for element in range(elements - 1):
        pick = op.like(np.broadcast_to(one_hot[element], (channels, 1, *geometry.kernel)), x)
        picked = op.typed(op.Conv(padded, pick, strides=geometry.strides, group=channels), y)
        under = op.typed(op.Add(picked, below), y)  # 0 or negative
        first = op.Relu(depthwise(op, under, _STEEPEST, 1.0))
        parts.append(op.typed(op.Mul(left, first), y))
        left = op.typed(op.Add(depthwise(op, parts[-1], -1.0), left), y)
    flat = [op.Reshape(part, [0, channels, 1, -1]) for part in (*parts, left)]
    high, wide = _ints(geometry.out)
    windows = op.Reshape(op.Concat(*flat, axis=2), [0, channels * elements, high, wide])
    spread = op.like(np.tile(one_hot[:, 0], (channels, 1, 1, 1)), x)
    return _transposed(op, windows, spread, x, geometry, channels)


def max_pool_scatter(op: Emit, node: ir.Node) -> ir.Value:
    """A second MaxPool with Indices, whose gradient is then added where the maxima were."""
    if op.opset < 16:  # ScatterElements cannot add before, and overlapping windows must
        return max_pool_portable(op, node)
    dy, x, _ = _operands(node)
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
    dy, x, y = _operands(node)
    geometry: Window = node.meta["window"]
    rows = _rows(op, _padded(op, x, y, geometry, op.like(_lowest(x), x)), geometry)
    elements = int(np.prod(geometry.kernel))
    one_hot = op.like(np.eye(elements).reshape(elements, 1, *geometry.kernel), x)
    windows = op.Conv(rows, one_hot, strides=geometry.strides, dilations=geometry.dilations)
    order = op.constant(np.arange(elements, dtype=np.int64).reshape(1, -1, *[1] * geometry.rank))
    first = op.Equal(order, op.ArgMax(windows, axis=1, keepdims=1))
    picked = op.Where(first, _rows(op, dy, geometry), op.like(0, dy))
    return op.reshape_like(_transposed(op, picked, one_hot, x, geometry), x)


def sum_pool_grad(op: Emit, node: ir.Node) -> ir.Value:
    """Each element gets the sum over the windows that hold it."""
    share, x = _operands(node)
    geometry: Window = node.meta["window"]
    ones = op.like(np.ones((1, 1, *geometry.kernel)), x)
    return op.reshape_like(_transposed(op, _rows(op, share, geometry), ones, x, geometry), x)


def average_pool_grad(op: Emit, node: ir.Node) -> ir.Value:
    dy, x, y = _operands(node)
    geometry: Window = node.meta["window"]
    share = op.Div(dy, _window_counts(op, x, y, geometry, node.meta["count_include_pad"]))
    if geometry.whole:
        return op.expand_like(op.typed(share, dy), x)
    return op.private("SumPoolGrad", share, x, like=x, window=geometry)


def average_pool_grad_blocked(op: Emit, node: ir.Node) -> ir.Value:
    """Where each window counts alike: a pool again for a stride of 1; channel by channel where windows tile the input.

    The first is blocked. Neither folds the channels into the batch, behind which its name would be lost.
    """
    dy, x, y = _operands(node)
    geometry: Window = node.meta["window"]
    counts = _window_counts(op, x, y, geometry, node.meta["count_include_pad"]) if geometry.static else None
    elements, pads = int(np.prod(geometry.kernel)), geometry.pads or []
    if counts != elements or set(geometry.dilations) != {1} or geometry.whole:
        return average_pool_grad(op, node)
    if set(geometry.strides) == {1}:
        rests = [k - 1 - pad for k, pad in zip(geometry.kernel * 2, pads, strict=True)]
        return op.AveragePool(dy, kernel_shape=geometry.kernel, pads=rests, count_include_pad=1)
    channels = (dims_of(x) or (0, 0))[1]
    if geometry.strides != geometry.kernel or any(pads) or not isinstance(channels, int):
        return average_pool_grad(op, node)
    share = op.like(np.full((channels, 1, *geometry.kernel), 1 / elements), x)
    return _transposed(op, dy, share, x, geometry, channels)


def _window_counts(op: Emit, x: ir.Value, y: ir.Value, geometry: Window, include_pad: bool) -> Operand:
    """By how many elements each window was divided: what lies beyond the padding never counts."""
    rank = geometry.rank
    if geometry.static and geometry.pads is not None:
        counts = np.ones([1, 1, *[1] * rank])
        for i, (size, out) in enumerate(zip(_ints(geometry.size), _ints(geometry.out), strict=True)):
            begin, end = geometry.pads[i], geometry.pads[i + rank]
            steps = np.arange(geometry.kernel[i]) * geometry.dilations[i]
            places = np.arange(out)[:, None] * geometry.strides[i] - begin + steps[None]
            low, high = (-begin, size + end) if include_pad else (0, size)
            inside = ((places >= low) & (places < high)).sum(1)
            counts = counts * inside.reshape([1, 1, *[-1 if j == i else 1 for j in range(rank)]])
        return float(counts.flat[0]) if (counts == counts.flat[0]).all() else op.like(counts, x)
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
    return op.Conv(
        padded, op.like(np.ones((1, 1, *geometry.kernel)), x), strides=geometry.strides, dilations=geometry.dilations
    )


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
        ends = [max(geometry.span(i) - size - begins[i], 0) for i, size in enumerate(_ints(geometry.size))]
        pads: Operand = [0, 0, *begins, 0, 0, *ends]
        if not any(begins) and not any(ends):
            return x
    else:
        first = [_begin(op, y, sized, geometry, i) for i in range(rank)]
        last = [
            _not_negative(op, op.Sub(op.Sub(_span(op, y, geometry, i), op.dim(sized, i + 2)), first[i]))
            for i in range(rank)
        ]
        none = op.int64([0, 0])
        pads = op.Concat(none, *first, none, *last, axis=0)
    return op.Pad(x, pads=pads, constant_value=value)


def untie_weights(op: Emit) -> None:
    """OpenVINO is silently wrong when one square weight is read in both directions: the second reader takes -(-W)."""
    for node in list(op.graph):
        if node.meta.get("forward") or node.op_type not in ("ConvTranspose", "Gemm", "MatMul", "Transpose"):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or not (value.is_initializer() or is_constant(value)) or len(set(value.consumers())) < 2:
                continue
            op.scope = (node.name or "").rpartition("/")[0]
            twice = _untied(op, value)
            op.graph.insert_before(node, op.take())
            node.replace_input_with(index, twice)


def _untied(op: Emit, weight: ir.Value) -> ir.Value:
    """The same numbers, exactly, which no runtime takes for the same tensor; folded when the file is loaded."""
    return op.typed(op.Neg(op.Neg(weight)), weight)


def merge_equal(graph: ir.Graph) -> None:
    """Computes once what several sweeps, or several steps of one, compute alike. The forward pass stays as it is."""
    first: dict[tuple[Any, ...], ir.Node] = {}
    for node in list(graph):
        bodies = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if node.meta.get("forward") or bodies or any(value.is_graph_output() for value in node.outputs):
            continue
        attributes = sorted((name, ir.to_proto(a).SerializeToString()) for name, a in node.attributes.items())
        key = (node.domain, node.op_type, *node.inputs, len(node.outputs), *attributes)
        same = first.setdefault(key, node)
        if same is not node:
            for value, kept in zip(node.outputs, same.outputs, strict=True):
                value.replace_all_uses_with(kept)
            graph.remove(node, safe=True)


def prune(graph: ir.Graph) -> None:
    """Removes every node and constant that no output needs. Inputs stay, since the caller feeds them."""
    for node in reversed(list(graph)):
        if all(not value.uses() and not value.is_graph_output() for value in node.outputs):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    detach(attribute.as_graph())
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


# call -> profile -> how it is spelled there, and why. What was measured stands in docs/performance.md. Last of all
# `keep_blocked` respells gates and factors per channel for ort: it depends on what stands around them.
LOWERINGS: dict[str, dict[str, Lowering]] = {
    # ConvTranspose takes ONNX Runtime 1.4 to 2.4 times as long as the Conv and knows no blocks. Elsewhere it is
    # right in every runtime, as long as it has no groups of several channels.
    "ConvGrad": {"ort": conv_grad_as_conv, "portable": conv_grad_portable},
    # MaxPool's Indices and ScatterElements are wrong or missing in OpenCV, tinygrad, TVM and WebGPU. In ONNX Runtime
    # the Indices alone cost 10 to 40 times the pool.
    "MaxPoolGrad": {"ort": max_pool_by_comparison, "portable": max_pool_portable},
    # A convolution of one channel is never blocked, a pool is.
    "AveragePoolGrad": {"ort": average_pool_grad_blocked, "portable": average_pool_grad},
    "SumPoolGrad": {"ort": sum_pool_grad, "portable": sum_pool_grad},
}
PROFILES = tuple(dict.fromkeys(itertools.chain.from_iterable(LOWERINGS.values())))
