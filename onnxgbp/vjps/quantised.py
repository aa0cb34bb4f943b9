"""Quantised tensors, by the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).

The gradient of an integer tensor is that of the real numbers for which its integers stand, and of their type. So
DequantizeLinear hands it on as it is, and QuantizeLinear blocks it where it clipped.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.quantisation import quantiser, quantiser_behind, readable, scale_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs

__all__ = ["VJPS", "unrounded"]


def quantize_x(op: Emit, s: Step) -> ir.Value:
    """dx = dy where x rounds to a number within the range.

    That is half a step beyond either end: calibration puts the largest value seen (the white of a photo) right at the
    end, from where a float's rounding error must not push it out.
    """
    found = quantiser(s.node)
    if found.holds(s.x):
        return s.dy
    low, high = found.low - found.scale / 2, found.high + found.scale / 2
    inside = op.And(op.Greater(s.x, op.like(low, s.x)), op.Less(s.x, op.like(high, s.x)))
    return op.Where(inside, op.cast_like(s.dy, s.x), op.like(0, s.x))


def dequantize_x(op: Emit, s: Step) -> ir.Value:
    """The integers came from a QuantizeLinear, by the same scale unless somebody edited the file."""
    maker = quantiser_behind(s.y)
    if maker is None:
        return s.dy  # and whatever made the integers says why there is no way on
    given, own = quantiser(maker).scale, scale_of(s)
    return s.dy if np.array_equal(given, own) else op.Mul(s.dy, op.like(own / given, s.dy))


def unrounded(op: Emit, value: ir.Value) -> ir.Value:
    """A dequantised tensor as it was before the rounding, clipped to the range; any other as it is.

    Rounding to 256 steps makes most of the ties in a window. The largest number before it is one of the tied maxima
    too, and the one that the float network would have taken.
    """
    maker = quantiser_behind(value)
    found = readable(maker) if maker is not None else None
    if maker is None or found is None:
        return value
    x = maker.inputs[0]
    assert x is not None  # a QuantizeLinear has an input
    if found.holds(x):
        return op.cast_like(x, value)
    clipped = op.Min(op.Max(x, op.like(found.low, x)), op.like(found.high, x))
    return op.typed(op.cast_like(clipped, value), value)


VJPS = {
    "DequantizeLinear": inputs(dequantize_x),
    "QuantizeLinear": inputs(quantize_x),
}
