"""Attributions by torch's float64 autograd: an independent and deliberately literal reference.

An interpreter walks the ONNX graph node by node, every floating tensor in float64. Each activation
goes through one `torch.autograd.Function` that states the rule (see `_Activation`); everything else
is torch's own gradient. The file is read top to bottom:

    Node        one ONNX node with its attributes as Python values
    OPS         operator -> forward function, called as f(node, *inputs)
    SLOPES      activation -> its derivative, called as f(node, *inputs)
    SPELLINGS   activations that exporters write out in other operators, found by what they compute
    attribution the one public function

Not covered: QuantizeLinear and DequantizeLinear, recurrent operators, subgraphs, local functions,
opsets below 7. Ties of a non-ReLU Max or Min share the gradient, as torch does.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

Tensor = torch.Tensor
Pads = list[tuple[int, int]]
Forward = Callable[..., Any]

FLOATS = {
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Node:
    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        return self.attrs.get(name, default)


def _nodes(model: onnx.ModelProto) -> list[Node]:
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))

    def value(attribute: onnx.AttributeProto) -> Any:
        got = helper.get_attribute_value(attribute)
        return got.decode() if isinstance(got, bytes) else got

    nodes = [
        Node(
            n.op_type,
            n.name or n.output[0],
            tuple(n.input),
            tuple(n.output),
            {a.name: value(a) for a in n.attribute},
            opset,
        )
        for n in model.graph.node
    ]
    return _sorted(nodes)


def _sorted(nodes: list[Node]) -> list[Node]:
    """Makers before readers, which ONNX demands and converters to float16 forget."""
    waiting, done = nodes, []
    made = {o for n in nodes for o in n.outputs if o}
    while waiting:
        ready = []
        for n in waiting:
            if made.isdisjoint(n.inputs):
                ready.append(n)
                made.difference_update(n.outputs)
        if not ready:
            raise ValueError("the graph has a cycle")
        done += ready
        taken = {id(n) for n in ready}
        waiting = [n for n in waiting if id(n) not in taken]
    return done


def _tensor(array: np.ndarray) -> Tensor:
    """Floats become float64; unsigned integers, which torch barely supports, int64."""
    array = np.asarray(array)
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = array.astype(np.float64)
    elif array.dtype.kind == "u":
        array = array.astype(np.int64)
    return torch.tensor(array)


def _ints(values: Any) -> list[int]:
    return [int(v) for v in (values.flatten() if isinstance(values, Tensor) else values)]


# --- windows: convolution and pooling -------------------------------------------------------------


def _window(n: Node, size: Sequence[int], kernel: Sequence[int]) -> tuple[list, list, Pads]:
    """Strides, dilations and (begin, end) pads of each spatial axis."""
    rank = len(kernel)
    stride = list(n.get("strides") or [1] * rank)
    dilation = list(n.get("dilations") or [1] * rank)
    auto = n.get("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = list(n.get("pads") or [0] * 2 * rank)
        return stride, dilation, list(zip(pads[:rank], pads[rank:]))
    if auto == "VALID":
        return stride, dilation, [(0, 0)] * rank
    both = []
    for i, k, s, d in zip(size, kernel, stride, dilation):
        total = max(0, (math.ceil(i / s) - 1) * s + (k - 1) * d + 1 - i)
        both.append((total // 2, total - total // 2))
    return stride, dilation, both if auto == "SAME_UPPER" else [(e, b) for b, e in both]


def _pad(x: Tensor, pads: Iterable[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad (or, where negative, crop) the last axes of x."""
    return F.pad(x, [v for pair in reversed(list(pads)) for v in pair], value=value)


def _conv(n: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    stride, dilation, pads = _window(n, x.shape[2:], w.shape[2:])
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return conv(_pad(x, pads), w, b, stride, 0, dilation, n.get("group", 1))


def _conv_transpose(n: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    size, kernel = x.shape[2:], w.shape[2:]
    stride, dilation, pads = _window(n, size, kernel)
    more = list(n.get("output_padding") or [0] * rank)
    shape, auto = n.get("output_shape"), n.get("auto_pad", "NOTSET")
    if shape is None and auto.startswith("SAME"):
        shape = [i * s for i, s in zip(size, stride)]
    if shape is not None:
        full = [s * (i - 1) + m + (k - 1) * d + 1 for i, s, m, k, d in zip(size, stride, more, kernel, dilation)]
        total = [f - o for f, o in zip(full, shape[-rank:])]
        pads = [(t // 2, t - t // 2) for t in total]
        if auto != "SAME_UPPER":
            pads = [(e, b) for b, e in pads]
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    y = conv(x, w, None, stride, 0, 0, n.get("group", 1), dilation)
    y = _pad(y, [(-begin, m - end) for (begin, end), m in zip(pads, more)])
    return y if b is None else y + b.reshape(-1, *[1] * rank)


def _pool_window(n: Node, x: Tensor) -> tuple[list, list, list, Pads, Pads]:
    """Kernel, strides, dilations, pads, and what ceil_mode adds at the end of each axis."""
    kernel = list(n.get("kernel_shape"))
    stride, dilation, pads = _window(n, x.shape[2:], kernel)
    extra = []
    for i, k, s, d, (begin, end) in zip(x.shape[2:], kernel, stride, dilation, pads):
        reach = (k - 1) * d + 1
        more = 0
        if n.get("ceil_mode", 0):
            out = -(-(i + begin + end - reach) // s) + 1
            if (out - 1) * s >= i + begin:  # a window may not start in the padding at the end
                out -= 1
            more = max(0, (out - 1) * s + reach - (i + begin + end))
        extra.append((0, more))
    return kernel, stride, dilation, pads, extra


def _max_pool(n: Node, x: Tensor) -> Tensor:
    kernel, stride, dilation, pads, extra = _pool_window(n, x)
    x = _pad(_pad(x, pads, -math.inf), extra, -math.inf)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
    return pool(x, kernel, stride, 0, dilation)


def _average_pool(n: Node, x: Tensor) -> Tensor:
    kernel, stride, dilation, pads, extra = _pool_window(n, x)

    def total(t: Tensor) -> Tensor:
        for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation), 2):
            t = t.unfold(axis, (k - 1) * d + 1, s)[..., ::d].sum(-1)
        return t

    inside = _pad(torch.ones_like(x[:1, :1]), pads, float(n.get("count_include_pad", 0)))
    return total(_pad(_pad(x, pads), extra)) / total(_pad(inside, extra))


# --- reductions and normalisation -----------------------------------------------------------------


def _axes(n: Node, x: Tensor, given: Tensor | None) -> list[int]:
    axes = n.get("axes") if given is None else _ints(given)
    if not axes:
        return [] if n.get("noop_with_empty_axes", 0) else list(range(x.ndim))
    return sorted(a % x.ndim for a in axes)


def _reduce(f: Callable[[Tensor], Tensor]) -> Forward:
    """f reduces the last axis, into which the reduced axes have been flattened."""

    def run(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        gone = _axes(n, x, axes)
        if not gone:
            return x
        kept = [a for a in range(x.ndim) if a not in gone]
        y = f(x.permute(kept + gone).flatten(len(kept)))
        return y.reshape([1 if a in gone else x.shape[a] for a in range(x.ndim) if n.get("keepdims", 1) or a in kept])

    return run


def _first_max(x: Tensor) -> Tensor:
    return x.max(-1).values  # of equal maxima torch takes the first; amax would share the gradient


def _batch_norm(n: Node, x: Tensor, scale: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if n.get("training_mode", 0):
        raise NotImplementedError(f"BatchNormalization {n.name} in training mode")
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale, b, mean, var = (t.reshape(shape) for t in (scale, b, mean, var))
    return (x - mean) / (var + n.get("epsilon", 1e-5)).sqrt() * scale + b


def _instance_norm(n: Node, x: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    axes = list(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    unit = centred / ((centred**2).mean(axes, keepdim=True) + n.get("epsilon", 1e-5)).sqrt()
    return unit * scale.reshape(-1, *[1] * len(axes)) + b.reshape(-1, *[1] * len(axes))


def _layer_norm(n: Node, x: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    axes = list(range(n.get("axis", -1) % x.ndim, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    y = centred / ((centred**2).mean(axes, keepdim=True) + n.get("epsilon", 1e-5)).sqrt() * scale
    return y if b is None else y + b


def _lrn(n: Node, x: Tensor) -> Tensor:
    size = n.get("size")
    around = [((size - 1) // 2, size // 2)] + [(0, 0)] * (x.ndim - 2)
    squares = _pad(x**2, around).unfold(1, size, 1).sum(-1)
    alpha, beta, bias = n.get("alpha", 1e-4), n.get("beta", 0.75), n.get("bias", 1.0)
    return x / (bias + alpha / size * squares) ** beta


def _softmax(f: Callable[[Tensor, int], Tensor]) -> Forward:
    def run(n: Node, x: Tensor) -> Tensor:
        if n.opset >= 13:
            return f(x, n.get("axis", -1))
        axis = n.get("axis", 1) % x.ndim  # older opsets flatten everything from the axis on
        rows = x.reshape(math.prod(x.shape[:axis]), -1)
        return f(rows, -1).reshape(x.shape)

    return run


# --- shapes ---------------------------------------------------------------------------------------


def _cast(n: Node, x: Tensor) -> Tensor:
    to = n.get("to")
    if to in FLOATS:
        return x.to(torch.float64)
    return x.to({TensorProto.BOOL: torch.bool, TensorProto.INT32: torch.int32}.get(to, torch.int64))


def _constant(n: Node) -> Tensor:
    ((name, value),) = n.attrs.items()
    if name == "value":
        return _tensor(numpy_helper.to_array(value))
    return torch.tensor(value, dtype=torch.float64 if "float" in name else torch.int64)


def _constant_of_shape(n: Node, shape: Tensor) -> Tensor:
    value = n.get("value")
    fill = torch.zeros(1).double() if value is None else _tensor(numpy_helper.to_array(value))
    return fill.reshape(()).expand(_ints(shape))


def _flatten(n: Node, x: Tensor) -> Tensor:
    axis = n.get("axis", 1)
    rows = math.prod(x.shape[: axis if axis >= 0 else axis + x.ndim])
    return x.reshape(rows, x.numel() // rows)


def _reshape(n: Node, x: Tensor, shape: Tensor) -> Tensor:
    keep = not n.get("allowzero", 0)
    return x.reshape([x.shape[i] if s == 0 and keep else s for i, s in enumerate(_ints(shape))])


def _squeeze(n: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = n.get("axes") if given is None else _ints(given)
    gone = [i for i, s in enumerate(x.shape) if s == 1] if axes is None else [a % x.ndim for a in axes]
    return x.reshape([s for i, s in enumerate(x.shape) if i not in gone])


def _unsqueeze(n: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = n.get("axes") if given is None else _ints(given)
    rank = x.ndim + len(axes)
    new, old = {a % rank for a in axes}, iter(x.shape)
    return x.reshape([1 if i in new else next(old) for i in range(rank)])


def _split(n: Node, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, parts = n.get("axis", 0), len(n.outputs)
    sizes = n.get("split") if given is None else _ints(given)
    # Without sizes the parts are equal, and only the last may be smaller.
    return x.split(-(-x.shape[axis] // parts) if sizes is None else sizes, axis)


def _take(x: Tensor, axis: int, index: Iterable[int]) -> Tensor:
    return x.index_select(axis, torch.tensor(list(index), dtype=torch.int64))


def _slice(
    n: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = _ints(n.get("starts") if starts is None else starts)
    last = _ints(n.get("ends") if ends is None else ends)
    where = n.get("axes", range(len(first))) if axes is None else _ints(axes)
    by = [1] * len(first) if steps is None else _ints(steps)
    for axis, *bounds in zip(where, first, last, by):
        x = _take(x, axis, range(*slice(*bounds).indices(x.shape[axis])))
    return x


def _pad_node(
    n: Node,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    amounts = n.get("pads") if pads is None else _ints(pads)
    where = range(x.ndim) if axes is None else [a % x.ndim for a in _ints(axes)]
    each = dict(zip(where, zip(amounts[: len(where)], amounts[len(where) :])))
    mode = n.get("mode", "constant")
    if mode == "constant":
        fill = n.get("value", 0.0) if value is None else value.item()
        return _pad(x, [each.get(a, (0, 0)) for a in range(x.ndim)], fill)
    for axis, (begin, end) in each.items():
        index = np.arange(x.shape[axis])[max(0, -begin) : x.shape[axis] + min(0, end)]
        how: Any = mode
        x = _take(x, axis, np.pad(index, (max(0, begin), max(0, end)), how))
    return x


def _gather(n: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = n.get("axis", 0) % x.ndim
    y = x.index_select(axis, index.flatten().long() % x.shape[axis])
    return y.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _arg_max(n: Node, x: Tensor) -> Tensor:
    axis = n.get("axis", 0) % x.ndim
    if n.get("select_last_index", 0):
        index = x.shape[axis] - 1 - x.flip(axis).max(axis, keepdim=True).indices
    else:
        index = x.max(axis, keepdim=True).indices
    return index if n.get("keepdims", 1) else index.squeeze(axis)


def _dropout(n: Node, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    if training is not None and training.item():
        raise NotImplementedError(f"Dropout {n.name} in training mode")
    return x, torch.ones_like(x, dtype=torch.bool)


# --- activations and arithmetic -------------------------------------------------------------------


def _gemm(n: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = a.T if n.get("transA", 0) else a, b.T if n.get("transB", 0) else b
    y = n.get("alpha", 1.0) * (a @ b)
    return y if c is None else y + n.get("beta", 1.0) * c


def _div(n: Node, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _bounds(n: Node, low: Tensor | None, high: Tensor | None) -> tuple[Any, Any]:
    return (
        n.get("min", -math.inf) if low is None else low,
        n.get("max", math.inf) if high is None else high,
    )


def _clip(n: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least, most = (torch.as_tensor(v).to(x) for v in _bounds(n, low, high))
    return torch.minimum(torch.maximum(x, least), most)


def _alpha(default: float) -> Callable[[Node], float]:
    return lambda n: n.get("alpha", default)


_leak, _one, _fifth = _alpha(0.01), _alpha(1.0), _alpha(0.2)
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875  # the operator's own


def _selu(n: Node) -> tuple[float, float]:
    return n.get("alpha", SELU_ALPHA), n.get("gamma", SELU_GAMMA)


def _fold(f: Callable[[Tensor, Tensor], Tensor], x: Sequence[Tensor]) -> Tensor:
    y = x[0]
    for t in x[1:]:
        y = f(y, t)
    return y


OPS: dict[str, Forward] = {
    # elementwise
    "Add": lambda n, a, b: a + b,
    "Sub": lambda n, a, b: a - b,
    "Mul": lambda n, a, b: a * b,
    "Div": _div,
    "Sum": lambda n, *x: sum(x[1:], x[0]),
    "Mean": lambda n, *x: sum(x[1:], x[0]) / len(x),
    "Max": lambda n, *x: _fold(torch.maximum, x),
    "Min": lambda n, *x: _fold(torch.minimum, x),
    "Pow": lambda n, a, b: a**b,
    "Sqrt": lambda n, x: x.sqrt(),
    "Exp": lambda n, x: x.exp(),
    "Log": lambda n, x: x.log(),
    "Erf": lambda n, x: x.erf(),
    "Abs": lambda n, x: x.abs(),
    "Neg": lambda n, x: -x,
    "Reciprocal": lambda n, x: 1 / x,
    "Equal": lambda n, a, b: a == b,
    "Greater": lambda n, a, b: a > b,
    "GreaterOrEqual": lambda n, a, b: a >= b,
    "Less": lambda n, a, b: a < b,
    "LessOrEqual": lambda n, a, b: a <= b,
    "Not": lambda n, x: ~x,
    "And": lambda n, a, b: a & b,
    "Or": lambda n, a, b: a | b,
    "Where": lambda n, c, a, b: torch.where(c, a, b),
    "Identity": lambda n, x: x,
    "Cast": _cast,
    "Dropout": _dropout,
    # activations
    "Relu": lambda n, x: x.clamp(min=0),
    "Clip": _clip,
    "LeakyRelu": lambda n, x: torch.where(x > 0, x, _leak(n) * x),
    "PRelu": lambda n, x, slope: torch.where(x > 0, x, slope * x),
    "ThresholdedRelu": lambda n, x: torch.where(x > _one(n), x, 0.0),
    "Elu": lambda n, x: torch.where(x > 0, x, _one(n) * torch.expm1(x)),
    "Celu": lambda n, x: torch.where(x > 0, x, _one(n) * torch.expm1(x / _one(n))),
    "Selu": lambda n, x: _selu(n)[1] * torch.where(x > 0, x, _selu(n)[0] * torch.expm1(x)),
    "Sigmoid": lambda n, x: x.sigmoid(),
    "Tanh": lambda n, x: x.tanh(),
    "Softplus": lambda n, x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": lambda n, x: x / (1 + x.abs()),
    "HardSigmoid": lambda n, x: (_fifth(n) * x + n.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda n, x: x * (x / 6 + 0.5).clamp(0, 1),
    "Swish": lambda n, x: x * (_one(n) * x).sigmoid(),
    "Mish": lambda n, x: x * torch.logaddexp(x, torch.zeros_like(x)).tanh(),
    "Gelu": lambda n, x: F.gelu(x, approximate=n.get("approximate", "none")),
    # linear
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": lambda n, a, b: a @ b,
    "Einsum": lambda n, *x: torch.einsum(n.get("equation"), *x),
    # pooling
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalMaxPool": lambda n, x: _first_max(x.flatten(2)).reshape(*x.shape[:2], *[1] * (x.ndim - 2)),
    "GlobalAveragePool": lambda n, x: x.mean(list(range(2, x.ndim)), keepdim=True),
    # reductions
    "ReduceSum": _reduce(lambda x: x.sum(-1)),
    "ReduceMean": _reduce(lambda x: x.mean(-1)),
    "ReduceMax": _reduce(_first_max),
    "ReduceMin": _reduce(lambda x: -_first_max(-x)),
    "ReduceL1": _reduce(lambda x: x.abs().sum(-1)),
    "ReduceL2": _reduce(lambda x: (x**2).sum(-1).sqrt()),
    "ReduceProd": _reduce(lambda x: x.prod(-1)),
    "ReduceSumSquare": _reduce(lambda x: (x**2).sum(-1)),
    "ReduceLogSumExp": _reduce(lambda x: x.logsumexp(-1)),
    "ArgMax": _arg_max,
    # normalisation
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LRN": _lrn,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    # shapes
    "ArrayFeatureExtractor": lambda n, x, i: torch.atleast_2d(x)[..., i.flatten()],
    "Concat": lambda n, *x: torch.cat(x, n.get("axis")),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": lambda n, x, s: x.expand(torch.broadcast_shapes(x.shape, _ints(s))),
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad_node,
    "Range": lambda n, a, b, step: torch.arange(a.item(), b.item(), step.item(), dtype=a.dtype),
    "Reshape": _reshape,
    "Shape": lambda n, x: torch.tensor(x.shape[n.get("start", 0) : n.get("end")], dtype=torch.int64),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda n, x, r: x.repeat(_ints(r)),
    "Transpose": lambda n, x: x.permute(n.get("perm") or list(range(x.ndim))[::-1]),
    "Unsqueeze": _unsqueeze,
}


def _inside_clip(n: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least, most = _bounds(n, low, high)
    return (x > least) & (x < most)


def _hard_sigmoid_slope(n: Node, x: Tensor) -> Tensor:
    y = _fifth(n) * x + n.get("beta", 0.5)
    return _fifth(n) * ((y > 0) & (y < 1)).to(x)


def _swish_slope(n: Node, x: Tensor) -> Tensor:
    s = (_one(n) * x).sigmoid()
    return s + _one(n) * x * s * (1 - s)


def _mish_slope(n: Node, x: Tensor) -> Tensor:
    t = torch.logaddexp(x, torch.zeros_like(x)).tanh()
    return t + x * (1 - t**2) * x.sigmoid()


def _gelu_slope(n: Node, x: Tensor) -> Tensor:
    if n.get("approximate", "none") == "none":
        density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * density
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)


SLOPES: dict[str, Forward] = {
    "Relu": lambda n, x: x > 0,
    "Clip": _inside_clip,
    "LeakyRelu": lambda n, x: torch.where(x > 0, torch.ones_like(x), _leak(n)),
    "PRelu": lambda n, x, slope: torch.where(x > 0, 1.0, slope),
    "ThresholdedRelu": lambda n, x: x > _one(n),
    "Elu": lambda n, x: torch.where(x > 0, 1.0, _one(n) * x.exp()),
    "Celu": lambda n, x: torch.where(x > 0, 1.0, (x / _one(n)).exp()),
    "Selu": lambda n, x: _selu(n)[1] * torch.where(x > 0, 1.0, _selu(n)[0] * x.exp()),
    "Sigmoid": lambda n, x: x.sigmoid() * (-x).sigmoid(),
    "Tanh": lambda n, x: 1 - x.tanh() ** 2,
    "Softplus": lambda n, x: x.sigmoid(),
    "Softsign": lambda n, x: (1 + x.abs()) ** -2,
    "HardSigmoid": _hard_sigmoid_slope,
    "HardSwish": lambda n, x: torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 3 + 0.5)),
    "Swish": _swish_slope,
    "Mish": _mish_slope,
    "Gelu": _gelu_slope,
}

# --- the rule -------------------------------------------------------------------------------------


class _Activation(torch.autograd.Function):
    """y = f(x) whose backward follows the rule, for the edge of this one node's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor, rule: str) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.rule, ctx.shape = rule, x.shape
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        (slope,) = ctx.saved_tensors
        dx = torch.where(slope != 0, dy * slope, 0.0)  # a closed gate stays closed for an inf
        match ctx.rule:
            case "gradient":
                out = dx
            case "deconvnet":
                out = torch.where(dy > 0, dy, 0.0)
            case "guided":
                out = torch.where(dy > 0, dx, 0.0)
            case other:
                raise ValueError(f"no rule named {other}")
        return out.reshape(ctx.shape), None, None, None


# --- activations in other spellings ---------------------------------------------------------------

# Told apart by their values, whatever operators they are written in. The first that fits is taken.
SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    ("Relu", {}),
    ("Clip", {"min": 0.0, "max": 6.0}),
    ("Swish", {"alpha": 1.0}),
    ("Swish", {"alpha": 1.702}),
    ("Gelu", {}),
    ("Gelu", {"approximate": "tanh"}),
    ("HardSwish", {}),
    ("HardSigmoid", {"alpha": 1 / 6}),
    ("Mish", {}),
    ("Softplus", {}),
]
# float16 constants shift a spelled-out GELU by 1e-4; its two forms are 4.7e-4 apart.
SPELLING_TOLERANCE = 2e-4
GRID = torch.tensor([-700.0, *(i / 10 for i in range(-90, 91)), 700.0]).double()
LARGEST_CONSTANT = 4096  # one value per channel; a larger constant is no part of an activation

LOGICAL = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"}
TRANSPARENT = {"Identity", "Cast"}
ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Sum", "Mean", "Max", "Min", "Pow", "Sqrt", "Exp", "Log"),
    *("Erf", "Abs", "Neg", "Reciprocal", "Where"),
}
ELEMENTWISE = ARITHMETIC | LOGICAL | TRANSPARENT | set(SLOPES)
MOVERS = TRANSPARENT | {
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Expand",
    "Flatten",
    "Dropout",
}
GATES = {"Sigmoid", "HardSigmoid", "Tanh"}


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= SPELLING_TOLERANCE * b.abs().clamp(min=1)).all())


def _on_grid(nodes: Sequence[Node], x: str, y: str, constants: Mapping[str, Tensor]) -> Tensor | None:
    """The values of y along GRID as the tensor x; the grid runs along the first axis."""
    used = {i for n in nodes for i in n.inputs if i in constants}
    if any(constants[i].numel() > LARGEST_CONSTANT for i in used):
        return None
    rank = max((constants[i].ndim for i in used), default=0)
    known = {**constants, x: GRID.reshape(-1, *[1] * rank)}
    for n in nodes:
        known[n.outputs[0]] = OPS[n.op](n, *[known[i] if i else None for i in n.inputs])
    return known[y]


def _like_relu(n: Node, constants: Mapping[str, Tensor]) -> bool:
    """Whether an activation is exactly ReLU or ReLU6."""
    if not all(i in constants for i in n.inputs[1:] if i):
        return False
    y = _on_grid([n], n.inputs[0], n.outputs[0], constants)
    x = GRID.reshape(-1, *[1] * (y.ndim - 1)) if y is not None else GRID
    return y is not None and any(_close(y, x.clamp(0, top)) for top in (math.inf, 6.0))


def _respell(nodes: Sequence[Node], constants: dict[str, Tensor]) -> dict[str, Node]:
    """Output name -> the activation that a chain of elementwise nodes ending there spells out.

    From each node one walks back to every tensor that all of its value passes through, and takes
    the farthest from which the chain computes a known activation. A slope per channel, as in
    Keras' relu(x) - a * relu(-x), becomes a PRelu whose slope is added to the constants.
    """
    maker = {o: i for i, n in enumerate(nodes) for o in n.outputs}
    found: dict[str, Node] = {}
    for n in nodes:
        if n.op not in ARITHMETIC:
            continue
        y, cone, cut = (
            n.outputs[0],
            {maker[n.outputs[0]]},
            {i for i in n.inputs if i not in constants},
        )
        while cut:
            if len(cut) == 1:
                (x,) = cut
                values = _on_grid([nodes[i] for i in sorted(cone)], x, y, constants)
                if values is not None and values.is_floating_point():
                    spelled = _name(values, x, n, constants)
                    found.update({y: spelled} if spelled else {})
            last = max(maker.get(t, -1) for t in cut)
            if last < 0 or nodes[last].op not in ELEMENTWISE:
                break
            cone.add(last)
            cut -= set(nodes[last].outputs)
            cut |= {i for i in nodes[last].inputs if i and i not in constants}
    return found


def _name(values: Tensor, x: str, n: Node, constants: dict[str, Tensor]) -> Node | None:
    grid = GRID.reshape(-1, *[1] * (values.ndim - 1))
    for op, attrs in SPELLINGS:
        candidate = Node(op, n.name, (x,), n.outputs, attrs, n.opset)
        if _close(values, OPS[op](candidate, grid).expand_as(values)):
            return candidate
    slope = -values[int((GRID == -1).nonzero())]
    if (slope.abs() < 1 - 1e-3).any() and _close(values, torch.where(grid > 0, grid, slope * grid)):
        constants[f"{n.outputs[0]}/slope"] = slope
        return Node("PRelu", n.name, (x, f"{n.outputs[0]}/slope"), n.outputs, {}, n.opset)
    return None


def _is_gate(n: Node, nodes: Sequence[Node], found: Mapping[str, Node], constants: Mapping) -> bool:
    """Whether an activation's output, moved about or not, multiplies another computed tensor."""
    if n.op not in GATES:
        return False
    moved = set(n.outputs)
    for other in nodes:
        if not moved & set(other.inputs):
            continue
        if other.op in MOVERS:
            moved |= set(other.outputs)
        multiplies = other.op == "Mul" and other.outputs[0] not in found
        if multiplies and set(other.inputs) - moved - set(constants):
            return True
    return False


# --- the reference --------------------------------------------------------------------------------


def _run(n: Node, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    y = OPS[n.op](n, *[values[i] if i else None for i in n.inputs])
    return {name: t for name, t in zip(n.outputs, y if isinstance(y, tuple) else (y,)) if name}


def attribution(
    model: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    tensor: str,
    seed: np.ndarray | None,
    wrt: list[str],
    rule: str | Callable[[str], str] = "gradient",
    relu_only: bool = False,
    spellings: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Attribute `tensor`, weighted by `seed`, to each tensor named in `wrt`.

    seed has the shape of the tensor; None is 1 at the maximum over axis 1 of each sample, 0
    elsewhere. rule is "gradient", "deconvnet" or "guided", or a function from the name of the
    forward node (of its first output where it has none) to one of these. With relu_only every
    activation but ReLU and ReLU6 stays plain; with spellings=False chains such as x * sigmoid(x)
    or Max(x, 0) are what their single operators are. Gates (`_is_gate`) always stay plain.

    Returns the float64 attributions by name, and the values of `tensor` and of the graph's outputs,
    floats in float64. An output that needs an operator not known here (ZipMap) is left out; for
    `tensor` that is a NotImplementedError.
    """
    nodes = _nodes(model)
    rule_of = rule if callable(rule) else lambda name: str(rule)
    values = {
        i.name: _tensor(numpy_helper.to_array(i))
        for i in model.graph.initializer
        if i.name not in feeds and i.data_type != TensorProto.STRING
    }
    for n in nodes:
        if n.op in OPS and all(i in values for i in n.inputs if i):
            values |= _run(n, values)
    constants = dict(values)
    found = _respell(nodes, constants) if spellings else {}
    values = {**constants, **{name: _tensor(array) for name, array in feeds.items()}}
    for name in set(wrt) & set(values):
        values[name].requires_grad_()

    for n in nodes:
        if all(o in constants for o in n.outputs if o):
            continue
        if n.op not in OPS or any(i and i not in values for i in n.inputs):
            continue  # felt below only if `tensor` needs it
        made = _run(n, values)
        act = found.get(n.outputs[0], n)
        if act.op in SLOPES and values[act.inputs[0]].is_floating_point():
            plain = _is_gate(act, nodes, found, constants)
            plain = plain or (relu_only and not _like_relu(act, constants))
            given = [values[i].detach() if i else None for i in act.inputs]
            y = made[n.outputs[0]].detach()
            slope = SLOPES[act.op](act, *given).to(y)
            how = "gradient" if plain else rule_of(n.name)
            made[n.outputs[0]] = _Activation.apply(values[act.inputs[0]], y, slope, how)
        for name, t in made.items():
            # An alias, so that a tensor and its Identity have gradients of their own.
            values[name] = t.view_as(t)
            if name in wrt and not t.requires_grad:
                values[name] = t.detach().requires_grad_()

    if tensor not in values:
        unknown = sorted({n.op for n in nodes} - set(OPS))
        raise NotImplementedError(f"{tensor} cannot be computed; operators unknown here: {unknown}")
    score = values[tensor]
    if seed is None:
        best = score.detach().max(1, keepdim=True).indices
        weight = torch.zeros_like(score).scatter_(1, best, 1.0)
    else:
        weight = _tensor(seed).to(score)
    sources = [values[name] for name in wrt]
    grads = torch.autograd.grad(score, sources, weight, allow_unused=True, materialize_grads=True)
    seen = [*(o.name for o in model.graph.output if o.name in values), tensor]
    return (
        {name: g.numpy() for name, g in zip(wrt, grads)},
        {name: values[name].detach().numpy() for name in seen},
    )
