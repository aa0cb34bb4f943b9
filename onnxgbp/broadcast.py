"""Undoing numpy's broadcasting: the one place where a gradient is summed back to the shape of its tensor."""

from __future__ import annotations

import onnx_ir as ir

from onnxgbp.emit import Dims, Emit, dims_of
from onnxgbp.errors import OnnxgbpError

__all__ = ["unbroadcast"]


def unbroadcast(op: Emit, gradient: ir.Value, wide: Dims | None, like: ir.Value) -> ir.Value:
    """Sums a gradient with the dims `wide` over those in which `like` was broadcast to them."""
    narrow = dims_of(like)
    if wide is None or narrow is None:
        raise OnnxgbpError(
            f"the rank of tensor '{like.name}', or of what it is combined with, is not known, which a broadcast needs; "
            "export the model with input shapes"
        )
    extra = len(wide) - len(narrow)
    stretched = [i + extra for i, dim in enumerate(narrow) if dim == 1 and wide[i + extra] != 1]
    unsure = [
        i + extra
        for i, dim in enumerate(narrow)
        if not isinstance(dim, int) and wide[i + extra] != 1 and (dim is None or dim != wide[i + extra])
    ]
    if extra:
        gradient = op.ReduceSum(gradient, axes=list(range(extra)), keepdims=0)
    if stretched:
        gradient = op.ReduceSum(gradient, axes=[axis - extra for axis in stretched], keepdims=1)
    for axis in (axis - extra for axis in unsure):
        # Whether this dim was broadcast shows only at run time: sum where it is 1, and keep as many entries as it has.
        dim = op.dim(like, axis)
        either = op.Where(op.Equal(dim, [1]), op.ReduceSum(gradient, axes=[axis], keepdims=1), gradient)
        gradient = op.Slice(either, starts=[0], ends=dim, axes=[axis])
    return gradient
