"""Microsoft's attention operators in the standard's words: softmax(scale Q K^T + bias + mask) V for each head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step

__all__ = ["attention", "multi_head_attention"]

_MASKED = -10000.0  # what both operators add where a mask hides, unless the node says otherwise
_FUTURE = -3.0e4  # what hides later positions: no score reaches it, and float16 still holds it


def attention(op: Emit, s: Step) -> Sequence[ir.Value]:
    """Queries, keys and values are one product x W + b, of which each has its part."""
    _without(s, {4: "past", 6: "past_sequence_length"})
    if s.argument("do_rotary"):
        raise s.refuse("it rotates its queries and keys (do_rotary); convert the file from before the fusion")
    heads = int(s.argument("num_heads"))
    product = op.MatMul(s.x, s.input(1))
    if s.has(2):
        product = op.Add(product, s.input(2))
    sizes = s.ints("qkv_hidden_sizes") or _thirds(s)
    ends = np.cumsum(sizes).tolist()
    q, k, v = (
        _split_heads(op, op.Slice(product, starts=[end - size], ends=[end], axes=[2]), heads)
        for size, end in zip(sizes, ends, strict=True)
    )
    mask = _mask(op, s, k, 3)
    return [_attend(op, s, q, k, v, sizes[0] // heads, [s.input(5) if s.has(5) else None, mask])]


def _thirds(s: Step) -> list[int]:
    width = (dims_of(s.input(1)) or (None,))[-1]
    if not isinstance(width, int):
        raise s.refuse("the shape of its weight is not known; convert the file from before the fusion")
    return [width // 3] * 3


def multi_head_attention(op: Emit, s: Step) -> Sequence[ir.Value]:
    """Queries [B, S, D] (or packed with keys and values), keys and values [B, L, D] or split into heads already."""
    _without(s, {6: "past_key", 7: "past_value", 8: "past_sequence_length", 9: "cache_indirection"})
    heads = int(s.argument("num_heads"))
    if s.rank() == 5:  # [B, S, heads, 3, H]
        q, k, v = (_swapped(op, op.Gather(s.x, op.int64(i), axis=3)) for i in range(3))
        if s.has(3):
            raise s.refuse("it adds a bias to packed queries; convert the file from before the fusion")
    elif not s.has(1):
        raise s.refuse("its keys are missing; convert the file from before the fusion")
    elif s.rank(s.input(1)) == 5:  # [B, L, heads, 2, H]
        q = _split_heads(op, _biased(op, s, s.x, 0), heads)
        k, v = (_swapped(op, op.Gather(s.input(1), op.int64(i), axis=3)) for i in range(2))
    else:
        q = _split_heads(op, _biased(op, s, s.x, 0), heads)
        k, v = (
            s.input(i) if s.rank(s.input(i)) == 4 else _split_heads(op, _biased(op, s, s.input(i), i), heads)
            for i in (1, 2)
        )
    width = (dims_of(s.x) or (None,))[-1]
    if s.argument("scale") is None and not isinstance(width, int):
        raise s.refuse("the size of its heads is not known; convert the file from before the fusion")
    size = (int(width) if s.rank() == 5 else int(width) // heads) if isinstance(width, int) else 0
    mask = _mask(op, s, k, 4)
    return [_attend(op, s, q, k, v, size, [s.input(5) if s.has(5) else None, mask])]


def _without(s: Step, unsupported: dict[int, str]) -> None:
    for index, name in unsupported.items():
        if s.has(index):
            raise s.refuse(f"it continues a sequence from '{name}'; export the model without a cache")


def _biased(op: Emit, s: Step, value: ir.Value, part: int) -> ir.Value:
    """With the part of the bias, [D + D + Dv], that belongs to queries (0), keys (1) or values (2)."""
    if not s.has(3):
        return value
    d = (dims_of(s.x) or (None,))[-1]
    if not isinstance(d, int):
        raise s.refuse("the size of its queries is not known; convert the file from before the fusion")
    start, end = ((0, d), (d, 2 * d), (2 * d, 1 << 30))[part]
    return op.Add(value, op.Slice(s.input(3), starts=[start], ends=[end], axes=[0]))


def _split_heads(op: Emit, value: ir.Value, heads: int) -> ir.Value:
    """[B, S, heads H] as [B, heads, S, H]."""
    return _swapped(op, op.Reshape(value, [0, 0, heads, -1]))


def _swapped(op: Emit, value: ir.Value) -> ir.Value:
    return op.Transpose(value, perm=[0, 2, 1, 3])


def _mask(op: Emit, s: Step, keys: ir.Value, index: int) -> ir.Value | None:
    """What is added to the scores, [B, 1, S or 1, L], from a mask in one of its forms, and for later positions."""
    parts = []
    hidden = s.argument("mask_filter_value")
    if s.has(index):
        kept = _kept(op, s, s.input(index), keys)
        parts.append(op.Where(kept, op.like(0, s.x), op.like(_MASKED if hidden is None else float(hidden), s.x)))
    if s.argument("unidirectional"):
        rows, columns = _count(op, s.x, 1), _count(op, keys, 2)
        future = op.Greater(columns, op.Unsqueeze(rows, axes=[1]))  # [S, L]
        parts.append(op.Where(future, op.like(_FUTURE, s.x), op.like(0, s.x)))
    return None if not parts else parts[0] if len(parts) == 1 else op.Add(*parts)


def _kept(op: Emit, s: Step, mask: ir.Value, keys: ir.Value) -> ir.Value:
    rank = s.rank(mask)
    if rank == 1:
        dims, batch = dims_of(mask) or (None,), (dims_of(s.x) or (None,))[0]
        if dims[0] != batch:
            raise s.refuse("its mask of one axis is not one length for each sample; give a mask of two axes instead")
        lengths = op.Cast(op.Unsqueeze(mask, axes=[1]), to=int(ir.DataType.INT64))
        return op.Unsqueeze(op.Less(_count(op, keys, 2), lengths), axes=[1, 2])
    if rank not in (2, 3):
        raise s.refuse(f"its mask has {rank} axes; give one of two axes instead")
    return op.Unsqueeze(op.Cast(mask, to=int(ir.DataType.BOOL)), axes=[1, 2] if rank == 2 else [1])


def _count(op: Emit, value: ir.Value, axis: int) -> ir.Value:
    """0, 1, 2... along an axis, int64."""
    return op.Range(op.int64(0), op.Reshape(op.dim(value, axis), op.int64([])), op.int64(1))


def _attend(
    op: Emit, s: Step, q: ir.Value, k: ir.Value, v: ir.Value, size: int, biases: Sequence[ir.Value | None]
) -> ir.Value:
    if any(value.uses() or value.is_graph_output() for value in s.node.outputs[1:]):
        raise s.refuse("its keys and values are read behind it (present); export the model without a cache")
    scale = s.argument("scale")
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    scores = op.Mul(scores, float(scale) if scale else 1 / math.sqrt(size))
    for bias in biases:
        if bias is not None:
            scores = op.Add(scores, bias)
    mixed = _swapped(op, op.MatMul(op.Softmax(scores, axis=-1), v))
    return op.Reshape(mixed, [0, 0, -1])
