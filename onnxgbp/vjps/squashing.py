"""What ai.onnx.ml's classifiers make of their scores: the attribute post_transform."""

from __future__ import annotations

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step

__all__ = ["SQUASHING", "labels_of", "squashed"]

# Those that make probabilities of scores.
SQUASHING = frozenset({"LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"})


def labels_of(s: Step) -> int:
    """How many classes a classifier tells apart."""
    return max(len(s.argument(f"classlabels_{kind}") or ()) for kind in ("ints", "strings"))


def squashed(op: Emit, s: Step, kind: str, p: ir.Value, dp: ir.Value) -> ir.Value:
    """The gradient dp at p = f(z) as it arrives at the scores z, f being the post_transform `kind`."""
    if kind == "LOGISTIC":
        return op.Mul(dp, op.Mul(p, op.Sub(op.like(1, p), p)))
    if kind.startswith("SOFTMAX"):  # SOFTMAX_ZERO gives a score of 0 the probability 0, and so the slope 0
        return op.Mul(p, op.Sub(dp, op.ReduceSum(op.Mul(dp, p), axes=[1], keepdims=1)))
    if kind != "NONE":
        raise s.refuse(f"its post_transform {kind} has no rule")
    return dp
