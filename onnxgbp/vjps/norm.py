"""Normalisations and softmax."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgbp.constants import constant_value
from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs

__all__ = ["VJPS"]


def batch_normalization_x(op: Emit, s: Step) -> ir.Value:
    """Inference: y = scale (x - mean) / sqrt(var + epsilon) + bias, so dx = dy scale / sqrt(var + epsilon)."""
    if s.argument("training_mode") or len(s.node.outputs) > 1:
        raise s.refuse("it is in training mode, where it mixes the samples of a batch: export the model in eval mode")
    scale, variance, epsilon = s.input(1), s.input(4), float(s.argument("epsilon"))
    shape = [-1] + [1] * (s.rank() - 2)
    gamma, var = constant_value(scale), constant_value(variance)
    if gamma is not None and var is not None:
        # Computed once at convert time, in float64: a vector of one number per channel.
        folded = gamma.astype(np.float64) / np.sqrt(var.astype(np.float64) + epsilon)
        return op.Mul(s.dy, op.like(folded.reshape(shape), s.x))
    factor = op.Div(scale, op.cast_like(op.Sqrt(op.Add(variance, epsilon)), scale))
    return op.Mul(s.dy, op.cast_like(op.Reshape(factor, shape), s.x))


def lrn_x(op: Emit, s: Step) -> ir.Value:
    """Y = x b^-beta with b = bias + alpha / size * (sum of x^2 over neighbouring channels).

    dx = dy b^-beta - 2 alpha beta / size * x * (sum of dy y / b over the channels that have this one as neighbour).
    """
    size, alpha, beta, bias = int(s.argument("size")), *(float(s.argument(n)) for n in ("alpha", "beta", "bias"))
    before, after = (size - 1) // 2, size // 2
    b = op.Add(op.Mul(_across_channels(op, op.Mul(s.x, s.x), s, before, after), alpha / size), bias)
    near = _across_channels(op, op.Div(op.Mul(s.dy, s.y), b), s, after, before)
    direct = op.Mul(s.dy, op.Pow(b, op.like(-beta, b)))
    return op.Sub(direct, op.Mul(op.Mul(s.x, near), 2 * alpha * beta / size))


def _across_channels(op: Emit, value: ir.Value, s: Step, before: int, after: int) -> ir.Value:
    """The sum over a window of channels, as a convolution along them."""
    size = before + after + 1
    rows = op.Reshape(value, _rows(op, s))
    ones = op.like(np.ones((1, 1, size, 1)), value)
    summed = op.Conv(rows, ones, kernel_shape=[size, 1], pads=[before, 0, after, 0])
    return op.reshape_like(summed, s.x)


def _rows(op: Emit, s: Step) -> ir.Value:
    """The shape [N, 1, C, everything else]."""
    dims = dims_of(s.x)
    if dims is not None and isinstance(dims[1], int):
        # 0 copies the batch; the channels are static, so that -1 may stand for the pixels.
        return op.int64([0, 1, dims[1], -1])
    shape = op.Shape(s.x)
    return op.Concat(op.Gather(shape, [0], axis=0), [1], op.Gather(shape, [1], axis=0), [-1], axis=0)


def _softmax_axes(s: Step) -> list[int]:
    """Before opset 13 a softmax ran over all axes from `axis` on, as if the tensor were a matrix."""
    axis = s.axis()
    return [axis] if s.since >= 13 else list(range(axis, s.rank()))


def softmax_x(op: Emit, s: Step) -> ir.Value:
    """Dx = y (dy - sum(dy y))."""
    total = op.ReduceSum(op.Mul(s.dy, s.y), axes=_softmax_axes(s), keepdims=1)
    return op.Mul(s.y, op.Sub(s.dy, total))


def log_softmax_x(op: Emit, s: Step) -> ir.Value:
    """Dx = dy - softmax(x) sum(dy), with softmax(x) = exp(y)."""
    total = op.ReduceSum(s.dy, axes=_softmax_axes(s), keepdims=1)
    return op.Sub(s.dy, op.Mul(op.Exp(s.y), total))


VJPS = {
    "BatchNormalization": inputs(batch_normalization_x),
    "LRN": inputs(lrn_x),
    "Softmax": inputs(softmax_x),
    "LogSoftmax": inputs(log_softmax_x),
}
