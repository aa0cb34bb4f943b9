"""Pooling. The gradient of a MaxPool is unpooling with the switches: the first maximum wins, overlaps add."""

from __future__ import annotations

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs
from onnxgbp.vjps.reduce import mean_over, pick_first
from onnxgbp.window import window

__all__ = ["VJPS"]


def max_pool_x(op: Emit, s: Step) -> ir.Value:
    return op.private("MaxPoolGrad", s.dy, s.x, s.y, like=s.x, window=window(s), ceil=bool(s.argument("ceil_mode")))


def average_pool_x(op: Emit, s: Step) -> ir.Value:
    padded = bool(s.argument("count_include_pad"))
    return op.private("AveragePoolGrad", s.dy, s.x, s.y, like=s.x, window=window(s), count_include_pad=padded)


def _spatial(s: Step) -> list[int]:
    return list(range(2, s.rank()))


VJPS = {
    "MaxPool": inputs(max_pool_x),
    "AveragePool": inputs(average_pool_x),
    "GlobalAveragePool": inputs(lambda op, s: mean_over(op, s.dy, s.x, _spatial(s))),
    "GlobalMaxPool": inputs(lambda op, s: pick_first(op, s.dy, s.x, _spatial(s), op.ArgMax)),
}
