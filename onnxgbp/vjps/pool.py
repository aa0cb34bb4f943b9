"""Pooling. The gradient of a MaxPool is unpooling with the switches: the first maximum wins, overlaps add."""

from __future__ import annotations

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs
from onnxgbp.vjps.quantised import unrounded
from onnxgbp.vjps.reduce import mean_over, pick_first
from onnxgbp.window import window

__all__ = ["VJPS"]

_FAR = 1 << 62  # beyond any number of elements


def max_pool_x(op: Emit, s: Step) -> ir.Value:
    x = unrounded(op, s.x)
    return op.private("MaxPoolGrad", s.dy, x, s.y, like=s.x, window=window(s), ceil=bool(s.argument("ceil_mode")))


def average_pool_x(op: Emit, s: Step) -> ir.Value:
    padded = bool(s.argument("count_include_pad"))
    return op.private("AveragePoolGrad", s.dy, s.x, s.y, like=s.x, window=window(s), count_include_pad=padded)


def lp_pool_x(op: Emit, s: Step) -> ir.Value:
    """y = (sum |x|^p)^(1/p), so dx = sign(x) |x|^(p-1) times the sum of dy y^(1-p) over the windows that hold x."""
    p = int(s.argument("p"))
    lost = op.is_zero(s.y)  # a window of zeros: no gradient
    share = op.Div(s.dy, op.Pow(op.Where(lost, op.like(1, s.y), s.y), op.like(p - 1, s.y)))
    share = op.typed(op.Where(lost, op.like(0, s.y), share), s.y)
    spread = op.private("SumPoolGrad", share, s.x, like=s.x, window=window(s))
    return op.Mul(spread, _lp_slope(op, s.x, p))


def global_lp_pool_x(op: Emit, s: Step) -> ir.Value:
    p = int(s.argument("p"))
    lost = op.is_zero(s.y)
    share = op.Div(s.dy, op.Pow(op.Where(lost, op.like(1, s.y), s.y), op.like(p - 1, s.y)))
    return op.Mul(op.Where(lost, op.like(0, s.y), share), _lp_slope(op, s.x, p))


def _lp_slope(op: Emit, x: ir.Value, p: int) -> ir.Value:
    """sign(x) |x|^(p-1)."""
    return x if p == 2 else op.Mul(op.Sign(x), op.Pow(op.Abs(x), op.like(p - 1, x)))


def max_unpool_x(op: Emit, s: Step) -> ir.Value:
    if not s.has(2):
        return op.reshape_like(op.Gather(op.Reshape(s.dy, [-1]), op.Reshape(s.input(1), [-1]), axis=0), s.x)
    # The standard counts the indices in the shape without output_shape, ONNX Runtime in output_shape itself: where the
    # elements land is asked of the node, which puts there their numbers, from 1 on.
    count = op.Reshape(op.Size(s.x), [])
    numbers = op.reshape_like(op.Range(op.int64(1), op.Add(count, op.int64(1)), op.int64(1)), s.x)
    geometry = {name: s.ints(name) for name in ("kernel_shape", "pads", "strides")}
    landed = op.MaxUnpool(op.Cast(numbers, to=int(ir.DataType.FLOAT)), s.input(1), s.input(2), **geometry)
    places = op.Reshape(op.Cast(landed, to=int(ir.DataType.INT64)), [-1])
    nothing = op.Expand(op.like(0, s.x), op.Add(op.Reshape(count, [1]), [1]))
    gathered = op.ScatterElements(nothing, places, op.Reshape(s.dy, [-1]), axis=0)
    return op.reshape_like(op.Slice(gathered, starts=[1], ends=[_FAR], axes=[0]), s.x)


def _spatial(s: Step) -> list[int]:
    return list(range(2, s.rank()))


VJPS = {
    "AveragePool": inputs(average_pool_x),
    "GlobalAveragePool": inputs(lambda op, s: mean_over(op, s.dy, s.x, _spatial(s))),
    "GlobalLpPool": inputs(global_lp_pool_x),
    "GlobalMaxPool": inputs(lambda op, s: pick_first(op, s.dy, s.x, _spatial(s), op.ArgMax)),
    "LpPool": inputs(lp_pool_x),
    "MaxPool": inputs(max_pool_x),
    "MaxUnpool": inputs(max_unpool_x),
}
