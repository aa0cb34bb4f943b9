"""The steps of scikit-learn's pipelines that stand before a network: the domain ai.onnx.ml."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs

__all__ = ["VJPS"]


def scaler_x(op: Emit, s: Step) -> ir.Value:
    """y = (x - offset) scale, one number each or one per feature."""
    return op.cast_like(op.Mul(s.dy, op.like(np.asarray(s.argument("scale"), np.float64), s.y)), s.x)


def normalizer_x(op: Emit, s: Step) -> ir.Value:
    """y = x / n with n the 1- or 2-norm of each row: dx = (dy - dn/dx sum(dy y)) / n."""
    total = op.ReduceSum(op.Mul(s.dy, s.y), axes=[1], keepdims=1)
    norm = str(s.argument("norm"))
    if norm == "L1":
        return op.Div(op.Sub(s.dy, op.Mul(op.Sign(s.x), total)), op.ReduceL1(s.x, axes=[1], keepdims=1))
    if norm == "L2":
        return op.Div(op.Sub(s.dy, op.Mul(s.y, total)), op.ReduceL2(s.x, axes=[1], keepdims=1))
    raise s.refuse(f"its norm '{norm}' has no rule")


VJPS = {
    "ai.onnx.ml::Normalizer": inputs(normalizer_x),
    "ai.onnx.ml::Scaler": inputs(scaler_x),
}
