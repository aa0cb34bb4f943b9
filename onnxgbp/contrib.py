"""Operators of `com.microsoft` in the standard's words, as optimisers and Microsoft's exporters write them.

CONTRIB maps an operator to a function `(op, step) -> outputs` that writes what a node computes in standard operators
and gives the node's outputs in their order; the last ones may be missing where nobody reads them. An activation that
was fused into its layer becomes a node of its own again, which the rules then see. Attention stands in `attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir

from onnxgbp.attention import attention, multi_head_attention
from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step

__all__ = ["CONTRIB", "Decomposition"]

Decomposition: TypeAlias = "Callable[[Emit, Step], Sequence[ir.Value]]"


def fused_conv(op: Emit, s: Step) -> Sequence[ir.Value]:
    """Y = activation(Conv(x, w, b) + z)."""
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    y = op.Conv(*s.node.inputs[:3], **{name: s.argument(name) for name in names})
    if s.has(3):
        y = op.Add(y, s.input(3))
    return [_activated(op, s, y, list(s.argument("activation_params") or []))]


def fused_gemm(op: Emit, s: Step) -> Sequence[ir.Value]:
    y = op.Gemm(*s.node.inputs[:3], **{name: s.argument(name) for name in ("alpha", "beta", "transA", "transB")})
    given = [s.argument(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    return [_activated(op, s, y, [number for number in given if number is not None])]


_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "Clip": ("min", "max"),
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}


def _activated(op: Emit, s: Step, y: ir.Value, parameters: Sequence[float]) -> ir.Value:
    name = str(s.argument("activation") or "")
    if not name:
        return y
    if name == "HardSwish":  # with slopes of its own, which the operator does not have
        alpha, beta = parameters if len(parameters) == 2 else (1 / 6, 0.5)
        return op.Mul(y, op.HardSigmoid(y, alpha=float(alpha), beta=float(beta)))
    if name not in _PARAMETERS:
        raise s.refuse(f"the activation '{name}' that is fused into it is not known; convert the unoptimised file")
    given: dict[str, Any] = {key: float(number) for key, number in zip(_PARAMETERS[name], parameters, strict=False)}
    if name == "Clip" and op.opset >= 11:  # before, its bounds are attributes
        given = {key: op.like(number, y) for key, number in given.items()}
    activated: ir.Value = getattr(op, name)(y, **given)
    return activated


def fused_matmul(op: Emit, s: Step) -> Sequence[ir.Value]:
    """Y = alpha A' B'; `trans` swaps the last two dims, `transBatch` moves the first behind the other batch dims."""
    operands, alpha = [_turned(op, s, index) for index in (0, 1)], s.argument("alpha")
    if alpha not in (None, 1.0):
        # Before the product: the last factor of a spelled-out GELU is fused into the layer behind it.
        data = 1 if s.input(0).is_initializer() else 0
        operands[data] = op.Mul(operands[data], float(alpha))
    return [op.MatMul(*operands)]


def _turned(op: Emit, s: Step, index: int) -> ir.Value:
    value, side = s.input(index), "AB"[index]
    flip, batch = s.argument(f"trans{side}"), s.argument(f"transBatch{side}")
    if not flip and not batch:
        return value
    order = list(range(s.rank(value)))
    if len(order) < 2:
        return value
    if batch:
        order = [*order[1:-1], order[0], order[-1]]
    if flip:
        order[-2:] = order[-1], order[-2]
    return op.Transpose(value, perm=order)


def gelu(op: Emit, x: ir.Value) -> ir.Value:
    """x (1 + erf(x / sqrt 2)) / 2."""
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1))


def gelu_tanh(op: Emit, x: ir.Value) -> ir.Value:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    c = math.sqrt(2 / math.pi)
    inner = op.Mul(x, op.Add(op.Mul(op.Mul(x, x), 0.044715 * c), c))
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1))


def fast_gelu(op: Emit, s: Step) -> Sequence[ir.Value]:
    return [gelu_tanh(op, op.Add(s.x, s.input(1)) if s.has(1) else s.x)]


def quick_gelu(op: Emit, s: Step) -> Sequence[ir.Value]:
    """x sigmoid(alpha x)."""
    alpha = s.argument("alpha")
    return [op.Mul(s.x, op.Sigmoid(op.Mul(s.x, 1.702 if alpha is None else float(alpha))))]


def _normalised(
    op: Emit,
    x: ir.Value,
    scale: ir.Value,
    bias: ir.Value | None,
    epsilon: float,
    axis: int = -1,
    *,
    centred: bool = True,
) -> list[ir.Value]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, the mean and 1 / sqrt; uncentred both means of x are 0."""
    if centred and op.opset >= 17 and axis == -1:
        return list(op.several(3, "LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon))
    axes = list(range(axis, 0))
    narrow = x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # where squares overflow and epsilon is lost
    wide = op.Cast(x, to=int(ir.DataType.FLOAT)) if narrow else x
    mean = op.ReduceMean(wide, axes=axes, keepdims=1)
    deviation = op.Sub(wide, mean) if centred else wide
    variance = op.ReduceMean(op.Mul(deviation, deviation), axes=axes, keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    y = op.Mul(op.cast_like(op.Mul(deviation, inverse), x), scale)
    return [op.Add(y, bias) if bias is not None else y, mean, inverse]


def _epsilon(s: Step, default: float) -> float:
    epsilon = s.argument("epsilon")
    return default if epsilon is None else float(epsilon)


def _optional(s: Step, index: int) -> ir.Value | None:
    return s.input(index) if s.has(index) else None


def layer_normalization(op: Emit, s: Step) -> Sequence[ir.Value]:
    """ONNX Runtime's own, in files of an opset before 17."""
    axis = s.argument("axis")
    axis = -1 if axis is None else int(axis)
    return _normalised(op, s.x, s.input(1), _optional(s, 2), _epsilon(s, 1e-5), axis - s.rank() if axis >= 0 else axis)


def simplified_layer_normalization(op: Emit, s: Step) -> Sequence[ir.Value]:
    axis = s.argument("axis")
    axis = -1 if axis is None else int(axis)
    axis = axis - s.rank() if axis >= 0 else axis
    y, _, inverse = _normalised(op, s.x, s.input(1), None, _epsilon(s, 1e-5), axis, centred=False)
    return [y, inverse]


def skip_layer_normalization(op: Emit, s: Step) -> Sequence[ir.Value]:
    """Of x + skip + bias; the sum is the fourth output."""
    total = op.Add(s.x, s.input(1))
    if s.has(4):
        total = op.Add(total, s.input(4))
    return [*_normalised(op, total, s.input(2), _optional(s, 3), _epsilon(s, 1e-12)), total]


def skip_simplified_layer_normalization(op: Emit, s: Step) -> Sequence[ir.Value]:
    total = op.Add(s.x, s.input(1))
    if s.has(3):
        total = op.Add(total, s.input(3))
    return [*_normalised(op, total, s.input(2), None, _epsilon(s, 1e-12), centred=False), total]


def embed_layer_normalization(op: Emit, s: Step) -> Sequence[ir.Value]:
    """The sum of the embeddings of words, positions and segments, normalised; then the count of each row's mask."""
    ids, words, positions = s.x, s.input(2), s.input(3)
    total = op.Gather(words, ids, axis=0)
    if s.has(8):
        places = op.Gather(positions, s.input(8), axis=0)
    else:
        places = op.Unsqueeze(op.Slice(positions, starts=[0], ends=op.dim(ids, 1), axes=[0]), axes=[0])
    total = op.Add(total, places)
    if s.has(1) and s.has(4):
        total = op.Add(total, op.Gather(s.input(4), s.input(1), axis=0))
    y = _normalised(op, total, s.input(5), s.input(6), _epsilon(s, 1e-12))[0]
    if s.has(7):
        counts = op.Cast(op.ReduceSum(s.input(7), axes=[1], keepdims=0), to=int(ir.DataType.INT32))
    else:
        counts = op.Cast(op.Expand(op.int64([0]), op.dim(ids, 0)), to=int(ir.DataType.INT32))
    return [y, counts, total]


def rotary_embedding(op: Emit, s: Step) -> Sequence[ir.Value]:
    """Pairs of features turned by an angle that grows with the position: (a, b) to (a cos - b sin, a sin + b cos).

    x is [N, S, heads size] or [N, heads, S, size]; position_ids is [N, S], or [1] for the first of S that follow.
    """
    x, places, caches = s.x, s.input(1), (s.input(2), s.input(3))
    half = dims_of(caches[0])
    if s.argument("is_packed_batching") or s.argument("scale") not in (None, 1.0):
        raise s.refuse("packed or scaled positions; convert the file from before the optimisation")
    if half is None or not isinstance(half[1], int):
        raise s.refuse("the shape of its table of cosines is not known")
    flat, heads, turned = s.rank() == 3, int(s.argument("num_heads") or 0), 2 * half[1]
    if flat:
        x = op.Reshape(x, [0, 0, heads, -1] if s.argument("rotary_embedding_dim") else [0, 0, -1, turned])
    if s.rank(places) == 1:
        first = op.Reshape(op.Cast(places, to=int(ir.DataType.INT64)), [1, 1])
        length = op.Reshape(op.Gather(op.Shape(s.x), [1 if flat else 2], axis=0), op.int64([]))
        places = op.Add(op.Reshape(op.Range(op.int64(0), length, op.int64(1)), [1, -1]), first)
    cos, sin = (op.Unsqueeze(op.Gather(cache, places, axis=0), axes=[2 if flat else 1]) for cache in caches)
    moved = op.Slice(x, starts=[0], ends=[turned], axes=[3])
    if s.argument("interleaved"):
        parts = [op.Slice(moved, starts=[i], ends=[turned], axes=[3], steps=[2]) for i in (0, 1)]
    else:
        parts = [op.Slice(moved, starts=[i * half[1]], ends=[(i + 1) * half[1]], axes=[3]) for i in (0, 1)]
    a, b = parts
    results = op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(a, sin), op.Mul(b, cos))
    if s.argument("interleaved"):
        y = op.Reshape(op.Concat(*(op.Unsqueeze(part, axes=[4]) for part in results), axis=4), [0, 0, 0, turned])
    else:
        y = op.Concat(*results, axis=3)
    if s.argument("rotary_embedding_dim"):  # the other features stay as they are
        y = op.Concat(y, op.Slice(x, starts=[turned], ends=[2**31], axes=[3]), axis=3)
    return [op.Reshape(y, [0, 0, -1]) if flat else y]


CONTRIB: dict[str, Decomposition] = {
    "LayerNormalization": layer_normalization,  # below opset 17, where the standard has none
    "SimplifiedLayerNormalization": simplified_layer_normalization,  # in the standard's domain, though not of it
    "com.microsoft::Attention": attention,
    "com.microsoft::BiasGelu": lambda op, s: [gelu(op, op.Add(s.x, s.input(1)))],
    "com.microsoft::EmbedLayerNormalization": embed_layer_normalization,
    "com.microsoft::FastGelu": fast_gelu,
    "com.microsoft::FusedConv": fused_conv,
    "com.microsoft::FusedGemm": fused_gemm,
    "com.microsoft::FusedMatMul": fused_matmul,
    "com.microsoft::Gelu": lambda op, s: [gelu(op, s.x)],
    "com.microsoft::LayerNormalization": layer_normalization,
    "com.microsoft::MultiHeadAttention": multi_head_attention,
    "com.microsoft::QuickGelu": quick_gelu,
    "com.microsoft::RotaryEmbedding": rotary_embedding,
    "com.microsoft::SimplifiedLayerNormalization": simplified_layer_normalization,
    "com.microsoft::SkipLayerNormalization": skip_layer_normalization,
    "com.microsoft::SkipSimplifiedLayerNormalization": skip_simplified_layer_normalization,
    "com.microsoft::TransposeMatMul": fused_matmul,
}
