"""ONNX Runtime's blocked layout: which tensors its CPU kernels keep in it, and spellings that do not leave it.

On x86 ONNX Runtime runs convolutions on tensors in blocks of 16 channels (8 without AVX-512), and puts a pass over the
whole tensor wherever an operator that knows no blocks stands between two that do. Convolutions, pools, Add and Mul of
equal shapes, Concat and Relu, Sigmoid, Tanh know them; Where, Greater and Split do not. So a gate between two
convolutions is spelled here as 1x1 convolutions with a Relu and a sum, or as one and a product.

What is rewritten gives the same numbers, but where a gradient is not finite: 0 * inf is NaN, which the map then shows;
and, at a closed gate under guided backpropagation, where it is above 2^127, or at a ReLU6 above 2^102 / its top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgbp.constants import constant_value, is_constant
from onnxgbp.emit import Emit, dims_of, numel

__all__ = ["BLOCK", "depthwise", "keep_blocked", "made_by_pad", "pick"]

BLOCK = 16
# min(1, max(0, 2^150 y)) is 1 for every y > 0 and 0 for y <= 0; no float32 holds the factor, two do.
_WEIGHT, _SLOPE = 2.0**100, 2.0**50
_STEEP = 2.0**127  # times the smallest normal number: 2
_LOWEST_TOP, _HIGHEST_TOP = 2.0**-20, 2.0**20  # of a ReLU6, for which the constants of its gate stay in range

_SMALL = 1 << 17  # numbers of a tensor for which a mask, of one node less, is as fast

# Blocked where their input is.
_FOLLOWING = frozenset("BatchNormalization GlobalAveragePool GlobalMaxPool Relu Resize Sigmoid Tanh Upsample".split())
_FUSED = frozenset({"Clip", "HardSigmoid", "LeakyRelu"})  # known where they follow a convolution of their own
_ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Sigmoid", "Sub", "Tanh"})
_POOLS = frozenset({"AveragePool", "MaxPool"})


def keep_blocked(op: Emit) -> None:
    """Respells gates, and what is one factor and one term per channel, where the tensors around them are blocked."""
    blocked: set[ir.Value] = set()
    for node in list(op.graph):
        if not node.meta.get("forward"):
            _shape(node)
            new = _respelled(op, node, blocked)
            if new is not None:
                old = node.outputs[0]
                if new.shape is None:
                    op.typed(new, old)
                nodes = op.take()
                op.graph.insert_before(node, nodes)
                old.replace_all_uses_with(new, replace_graph_outputs=True)
                op.graph.remove(node, safe=True)
                for made in nodes:
                    _note(made, blocked)
                continue
        _note(node, blocked)


def _shape(node: ir.Node) -> None:
    """Notes the shape of an elementwise result that has none yet: blocks are only for known ones."""
    if node.op_type not in _ELEMENTWISE or node.domain or node.outputs[0].shape is not None:
        return
    dims = [dims_of(value) for value in node.inputs if value is not None]
    wide = [i for i, each in enumerate(dims) if each != ()]
    if wide and all(dims[i] is not None and dims[i] == dims[wide[0]] for i in wide):
        value = node.inputs[wide[0]]
        node.outputs[0].shape = value.shape if value is not None else None


def _note(node: ir.Node, blocked: set[ir.Value]) -> None:
    if node.domain == "" and _stays(node, blocked):
        blocked.add(node.outputs[0])


def _stays(node: ir.Node, blocked: set[ir.Value]) -> bool:
    """Whether a node's output is blocked, as ONNX Runtime's transformer decides it."""
    values = [value for value in node.inputs if value is not None]
    if not values or values[0].dtype != ir.DataType.FLOAT:
        return False
    inside = values[0] in blocked
    if node.op_type == "Conv":
        return _blocked_conv(node, values)
    if node.op_type in _POOLS:
        return len(node.outputs) == 1 and _aligned(values[0])
    if node.op_type in ("Add", "Sum", "Mul"):
        dims = dims_of(values[0])
        return all(value in blocked and dims_of(value) == dims for value in values)
    if node.op_type == "Concat":
        return node.attributes["axis"].as_int() == 1 and all(v in blocked and _aligned(v) for v in values)
    if node.op_type in _FUSED:
        maker = values[0].producer()
        return inside and maker is not None and maker.op_type == "Conv" and len(values[0].uses()) == 1
    return inside and node.op_type in _FOLLOWING


def _aligned(value: ir.Value) -> bool:
    """A tensor of images with whole blocks of channels."""
    dims = dims_of(value)
    return dims is not None and len(dims) == 4 and isinstance(dims[1], int) and dims[1] % BLOCK == 0


def _blocked_conv(node: ir.Node, values: list[ir.Value]) -> bool:
    dims = dims_of(values[1])
    if dims is None or len(dims) != 4 or not all(_known(value) for value in values[1:]):
        return False
    outputs, inputs, group = dims[0], dims[1], 1
    if "group" in node.attributes:
        group = node.attributes["group"].as_int()
    if not isinstance(outputs, int) or not isinstance(inputs, int):
        return False
    if group == 1:
        return inputs < BLOCK or inputs % BLOCK == 0
    if outputs % BLOCK:
        return False
    return (inputs == 1 and outputs == group) or (inputs % BLOCK == 0 and outputs // group % BLOCK == 0)


def _known(value: ir.Value) -> bool:
    """Whether ONNX Runtime knows a tensor when it loads the file: a constant, or what it folds of constants."""
    node = value.producer()
    if is_constant(value) or node is None:
        return is_constant(value)
    return node.op_type != "DequantizeLinear" and all(source is None or _known(source) for source in node.inputs)


def _respelled(op: Emit, node: ir.Node, blocked: set[ir.Value]) -> ir.Value | None:
    """The value that takes the place of a gradient node's output, or None where it is best as it is."""
    if node.domain or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    op.scope = (node.name or "").rpartition("/")[0]
    if node.op_type == "Where":
        return _gate(op, node, blocked)
    if node.op_type in ("Add", "Mul") and len(node.inputs) == 2:
        a, b = node.inputs
        assert a is not None  # both are required
        assert b is not None
        if (a in blocked) != (b in blocked) and dims_of(a) == dims_of(b):
            inside, outside = (a, b) if a in blocked else (b, a)
            if _aligned(outside) and not is_constant(outside):
                named = getattr(op, node.op_type)
                made: ir.Value = named(inside, _entered(op, outside, blocked))
                return made
    return _difference(op, node, blocked) or _per_channel(op, node, blocked)


def _difference(op: Emit, node: ir.Node, blocked: set[ir.Value]) -> ir.Value | None:
    """a - b, or c + a - b with c constant, as one convolution of b to which a is added: no other Sub is blocked."""
    term, rest = 0.0, node
    if node.op_type == "Add":
        known = constant_value(node.inputs[1])
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        if known is None or known.size != 1 or maker is None:
            return None
        term, rest = float(known.item()), maker
    if rest.op_type != "Sub":
        return None
    a, b = rest.inputs
    if a is None or b is None or not {a, b} <= blocked or dims_of(a) != dims_of(b):
        return None
    if rest is node and all(user.op_type == "Add" for user in node.outputs[0].consumers()):
        return None  # what is added comes with it
    return op.Add(depthwise(op, b, -1.0, term or None), a)


def _entered(op: Emit, value: ir.Value, blocked: set[ir.Value]) -> ir.Value:
    """The same numbers in the blocked layout: a pool over one element moves them there."""
    if value in blocked:
        return value
    if made_by_pad(value):
        return depthwise(op, value, 1.0)
    return op.typed(op.MaxPool(value, kernel_shape=[1, 1]), value)


def made_by_pad(value: ir.Value) -> bool:
    """Whether a Pad makes it: ONNX Runtime takes that into the pool behind it, which refuses pads as large as it is."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:  # which it looks through
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Pad"


def _gate(op: Emit, node: ir.Node, blocked: set[ir.Value]) -> ir.Value | None:
    """Where(y > 0, d, 0), or Where(0 < y < top, d, 0) of a ReLU6: d times a mask of 0 and 1.

    Where d = Relu(e): Relu(e + 0) of an open gate; of a closed one Relu(e - 2^127), of a ReLU6 Relu(e - 2^102 / top).
    """
    condition, d, zero = node.inputs
    maker = condition.producer() if condition is not None else None
    if d is None or maker is None or not _is_zero(zero):
        return None
    y, top = _bounds(maker)
    if y is None or not _aligned(y) or dims_of(d) != dims_of(y):
        return None
    if y not in blocked and not (d in blocked and any(user.op_type == "Conv" for user in y.consumers())):
        return None  # else a convolution behind y, or the gate's own, takes it there
    if top is not None and not _LOWEST_TOP <= top <= _HIGHEST_TOP:
        return None
    e = _before_relu(d)
    if e is not None and (top is not None or (numel((dims_of(y) or ())[1:]) or _SMALL) >= _SMALL):
        term = depthwise(op, _closed(op, y, top), -_STEEP)
        return op.Relu(op.typed(op.Add(term, _entered(op, e, blocked)), y))
    if top is not None:
        mask = op.Relu(depthwise(op, _closed(op, y, top), -_STEEP, 1.0))
    else:
        mask = op.typed(op.HardSigmoid(depthwise(op, y, _WEIGHT), alpha=_SLOPE, beta=0.0), y)
    return op.Mul(_entered(op, d, blocked), mask)


def _before_relu(d: ir.Value) -> ir.Value | None:
    """What d is the Relu of; d itself where it is known not to be negative; else None."""
    node = d.producer()
    if node is None or node.meta.get("forward"):
        return None
    if node.op_type == "Relu":
        return node.inputs[0]
    return d if node.meta.get("not_negative") else None


def _closed(op: Emit, y: ir.Value, top: float | None) -> ir.Value:
    """0 where a gate is open, for 0 < y < top down to the smallest normal number, and more than 0 where it is closed.

    Of a Relu max(0, 1 - 2^127 y). Of a ReLU6 two such lines are added, of which the steep one leaves 0 behind the last
    number below the top: there it has 2^103, or thereabouts, while the other has fallen by 2^101. Relu is the one
    activation that ONNX Runtime's kernel has within; another is a second pass.
    """
    if top is None:
        return op.Relu(depthwise(op, y, -_STEEP, 1.0))
    below = float(np.nextafter(np.float32(top), np.float32(0)))
    steep = 2.0 ** (127 - math.ceil(math.log2(top)))
    at_top = op.Relu(depthwise(op, y, steep, -steep * below))
    fall = steep * 2.0**-26
    return op.Relu(op.typed(op.Add(depthwise(op, y, -fall, fall * 2.0**-126), at_top), y))


def _is_zero(value: ir.Value | None) -> bool:
    known = constant_value(value)
    return known is not None and known.size == 1 and not known.any()


def _bounds(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    """Y and the upper bound, None for none, of a condition y > 0 or 0 < y < top; (None, None) for any other."""
    if node.op_type == "And":
        makers = [value.producer() for value in node.inputs if value is not None]
        if len(makers) == 2 and makers[0] is not None and makers[1] is not None:
            y, _ = _bounds(makers[0])
            top = constant_value(makers[1].inputs[1]) if makers[1].op_type == "Less" else None
            if y is not None and y is makers[1].inputs[0] and top is not None and top.size == 1:
                return y, float(top.item())
        return None, None
    if node.op_type != "Greater" or not _is_zero(node.inputs[1]):
        return None, None
    return node.inputs[0], None


def _per_channel(op: Emit, node: ir.Node, blocked: set[ir.Value]) -> ir.Value | None:
    """x c, x + c, c - x, x / c with c constant, one number or one per channel: a depthwise 1x1 convolution."""
    if node.op_type not in ("Add", "Div", "Mul", "Sub") or len(node.inputs) != 2:
        return None
    a, b = node.inputs
    x, constant = (a, b) if a in blocked else (b, a)
    known = constant_value(constant)
    if x is None or x not in blocked or not _aligned(x) or known is None:
        return None
    if known.size > 1 and (known.shape[-3:] != (known.size, 1, 1) or known.ndim > 4):
        return None
    match node.op_type:
        case "Add":
            return depthwise(op, x, 1.0, known)
        case "Mul":
            return depthwise(op, x, known)
        case "Div" if x is a:
            return depthwise(op, x, 1 / known.astype(np.float64))
        case "Sub":
            return depthwise(op, x, 1.0, -known) if x is a else depthwise(op, x, -1.0, known)
    return None


def depthwise(op: Emit, x: ir.Value, factor: float | np.ndarray, term: float | np.ndarray | None = None) -> ir.Value:
    """Factor x + term, each one number or one per channel."""
    channels = (dims_of(x) or ())[1]
    assert isinstance(channels, int)  # it is aligned
    weight = op.like(np.broadcast_to(np.ravel(factor), channels).reshape(channels, 1, 1, 1), x)
    # An empty third input would keep ONNX Runtime from blocking it.
    bias = [] if term is None else [op.like(np.broadcast_to(np.ravel(term), channels), x)]
    return op.typed(op.Conv(x, weight, *bias, group=channels), x)


def pick(
    op: Emit, x: ir.Value, strides: Sequence[int], offsets: Sequence[int], counts: Sequence[int], sizes: Sequence[int]
) -> ir.Value:
    """x[..., offset + stride i, ...] for i < count, by a depthwise convolution; 0 where that lies outside of x.

    strides, offsets (which may be negative), counts, and x's sizes: one for each spatial dim.
    """
    kernel, places, begins, ends = list[int](), list[int](), list[int](), list[int]()
    for stride, offset, count, size in zip(strides, offsets, counts, sizes, strict=True):
        begin = max(-offset, 0)
        # Long enough that there are no more windows than were asked for.
        kernel.append(max(offset + 1, size + begin - count * stride + 1, 1))
        places.append(max(offset, 0))
        begins.append(begin)
        ends.append(max((count - 1) * stride + kernel[-1] - size - begin, 0))
    channels = (dims_of(x) or ())[1]
    assert isinstance(channels, int)  # it is aligned
    one_hot = np.zeros([1, 1, *kernel])
    one_hot[0, 0, places[0], places[1]] = 1
    picked = op.Conv(
        x, op.like(np.tile(one_hot, (channels, 1, 1, 1)), x), strides=strides, pads=[*begins, *ends], group=channels
    )
    picked.shape = ir.Shape([(dims_of(x) or ())[0], channels, *counts])
    return picked
