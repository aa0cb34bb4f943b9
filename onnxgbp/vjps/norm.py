"""Normalisations and softmax."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgbp.broadcast import unbroadcast
from onnxgbp.constants import constant_value
from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import Entry, inputs

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
    if s.rank() < 3:
        raise s.refuse(f"its input has {s.rank()} axes, not [N, C, ...]; the model is not valid")
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
    ones = op.like(np.ones(op.sized(1, 1, size, 1)), value)
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


def standardised(
    op: Emit, dxhat: ir.Value, x: ir.Value, axes: list[int], epsilon: float, *, centred: bool = True
) -> tuple[ir.Value, ir.Value]:
    """The gradient through xhat = (x - mean) / sqrt(var + epsilon) over some axes, and xhat itself.

    dx = (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) / sqrt(var + epsilon); without centring both means of x are 0.
    """

    def mean(value: ir.Value) -> ir.Value:
        return op.ReduceMean(value, axes=axes, keepdims=1)

    deviation = op.Sub(x, mean(x)) if centred else x
    spread = op.Sqrt(op.Add(mean(op.Mul(deviation, deviation)), epsilon))
    xhat = op.Div(deviation, spread)
    projected = op.Sub(dxhat, op.Mul(xhat, mean(op.Mul(dxhat, xhat))))
    if centred:
        projected = op.Sub(projected, mean(dxhat))
    return op.Div(projected, spread), xhat


def _trailing(s: Step) -> list[int]:
    return list(range(s.axis(), s.rank()))


def layer_norm(*, centred: bool) -> Entry:
    """LayerNormalization, or uncentred RMSNormalization: y = xhat scale + bias over the axes from `axis` on."""

    def dx(op: Emit, s: Step) -> ir.Value:
        _only_first_output(s)
        dxhat = op.Mul(s.dy, s.input(1))
        return standardised(op, dxhat, s.x, _trailing(s), float(s.argument("epsilon")), centred=centred)[0]

    def dscale(op: Emit, s: Step) -> ir.Value:
        xhat = standardised(op, s.dy, s.x, _trailing(s), float(s.argument("epsilon")), centred=centred)[1]
        return unbroadcast(op, op.Mul(s.dy, xhat), dims_of(s.y), s.input(1))

    def dbias(op: Emit, s: Step) -> ir.Value:
        return unbroadcast(op, s.dy, dims_of(s.y), s.input(2))

    return inputs(dx, dscale, dbias) if centred else inputs(dx, dscale)


def _only_first_output(s: Step) -> None:
    if any(dy is not None for dy in s.dys[1:]):
        raise s.refuse("its mean or deviation is read on the way to the explained tensor, for which there is no rule")


def _per_channel(op: Emit, s: Step, value: ir.Value) -> ir.Value:
    return op.Reshape(value, [-1] + [1] * (s.rank() - 2))


def instance_norm_x(op: Emit, s: Step) -> ir.Value:
    dxhat = op.Mul(s.dy, _per_channel(op, s, s.input(1)))
    return standardised(op, dxhat, s.x, list(range(2, s.rank())), float(s.argument("epsilon")))[0]


def group_norm_x(op: Emit, s: Step) -> ir.Value:
    """Channels are folded into their groups; from opset 21 on the scale is one number per channel, before per group."""
    groups = int(s.argument("num_groups"))
    shape = op.int64([0, groups, -1])
    scale = s.input(1)
    if s.since >= 21:
        dxhat = op.Reshape(op.Mul(s.dy, _per_channel(op, s, scale)), shape)
    else:
        dxhat = op.Mul(op.Reshape(s.dy, shape), op.Reshape(scale, [groups, 1]))
    folded = op.Reshape(s.x, shape)
    return op.reshape_like(standardised(op, dxhat, folded, [2], float(s.argument("epsilon")))[0], s.x)


def mean_variance_norm_x(op: Emit, s: Step) -> ir.Value:
    axes = sorted(axis % s.rank() for axis in s.ints("axes") or [0, 2, 3])
    return standardised(op, s.dy, s.x, axes, 1e-18)[0]  # the standard adds 1e-9 to the deviation


def lp_norm_x(op: Emit, s: Step) -> ir.Value:
    """y = x / n with n the p-norm along an axis: dx = (dy - dn/dx sum(dy y)) / n."""
    axis = [s.axis()]
    total = op.ReduceSum(op.Mul(s.dy, s.y), axes=axis, keepdims=1)
    if int(s.argument("p")) == 1:
        return op.Div(op.Sub(s.dy, op.Mul(op.Sign(s.x), total)), op.ReduceL1(s.x, axes=axis, keepdims=1))
    return op.Div(op.Sub(s.dy, op.Mul(s.y, total)), op.ReduceL2(s.x, axes=axis, keepdims=1))


VJPS = {
    "BatchNormalization": inputs(batch_normalization_x),
    "GroupNormalization": inputs(group_norm_x),
    "InstanceNormalization": inputs(instance_norm_x),
    "LRN": inputs(lrn_x),
    "LayerNormalization": layer_norm(centred=True),
    "LogSoftmax": inputs(log_softmax_x),
    "LpNormalization": inputs(lp_norm_x),
    "MeanVarianceNormalization": inputs(mean_variance_norm_x),
    "RMSNormalization": layer_norm(centred=False),
    "Softmax": inputs(softmax_x),
}
