"""How each operator passes a gradient on: one table per family. `entry.py` explains the language of the tables."""

from __future__ import annotations

from onnxgbp.vjps import (
    classic,
    control,
    deform,
    elementwise,
    indexing,
    linear,
    norm,
    pool,
    quantised,
    recurrent,
    reduce,
    resize,
    sample,
    shape,
    signal,
    svm,
)
from onnxgbp.vjps.entry import Entry
from onnxgbp.vjps.refused import REFUSED

__all__ = ["FAMILIES", "REFUSED", "VJPS", "ZERO_GRADIENT", "Entry"]

FAMILIES = {
    "classic": classic.VJPS | svm.VJPS,
    "control flow": control.VJPS,
    "elementwise": elementwise.VJPS,
    "indexing": indexing.VJPS,
    "linear": linear.VJPS,
    "pooling": pool.VJPS,
    "normalisation": norm.VJPS,
    "quantisation": quantised.VJPS,
    "recurrent": recurrent.VJPS,
    "reduction": reduce.VJPS,
    "sampling": deform.VJPS | resize.VJPS | sample.VJPS,
    "shape": shape.VJPS,
    "signal": signal.VJPS,
}

VJPS: dict[str, Entry] = {operator: entry for family in FAMILIES.values() for operator, entry in family.items()}

# Piecewise constant, or not a function of the values at all: a gradient of zero is right, which differs from unknown.
ZERO_GRADIENT = frozenset(
    "And ArgMax ArgMin BitShift BlackmanWindow Ceil ConstantOfShape Equal EyeLike Floor Greater GreaterOrEqual "
    "HammingWindow HannWindow Hardmax IsInf IsNaN Less LessOrEqual NonMaxSuppression NonZero Not OneHot Or "
    "RandomNormalLike RandomUniformLike Round Shape Sign Size Xor ai.onnx.ml::Binarizer ai.onnx.ml::LabelEncoder "
    "ai.onnx.ml::OneHotEncoder".split()
)
