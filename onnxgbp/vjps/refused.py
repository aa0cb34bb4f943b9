"""Operators that read and make floats and have no gradient here: why not, and the way out.

One that is missing from this table and from every other has not been thought of; a test walks through the standard.
"""

from __future__ import annotations

from onnxgbp import quantisation

__all__ = ["REFUSED"]

_TREE = "a tree ensemble is piecewise constant: it has no gradient"
_SEQUENCE = "a gradient passes through tensors, not through sequences; export the model with Split and Concat instead"
_OPTIONAL = "a gradient passes through tensors, not through optional ones; export the model without optional inputs"
_TRAINING = "it belongs to training; export the model for inference"

# Of com.microsoft, where nothing below is written out by `contrib.py`.
_GPU = "ONNX Runtime's optimiser wrote it for one kind of processor; convert the file from before the optimisation"
_DECODER = "it attends with the cache of a text generator; export the model as a classifier, without a cache"
_PACKED = "its weights are packed in ONNX Runtime's own form; quantise the model in the QDQ format (QuantFormat.QDQ)"
_LENGTHS = "it leaves out the padding between texts of several lengths; convert the file from before the optimisation"

_CONTRIB = {
    _GPU: "BiasAdd BiasDropout BiasSoftmax BiasSplitGelu FusedMatMulActivation GemmFastGelu GroupNorm NhwcConv "
    "NhwcFusedConv SkipGroupNorm",
    _DECODER: "DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention GroupQueryAttention "
    "PagedAttention SparseAttention",
    _PACKED: "GatherBlockQuantized GemmFloat8 MatMulBnb4 MatMulFpQ4 MatMulNBits QMoE",
    _LENGTHS: "PackedAttention PackedMultiHeadAttention RemovePadding RestorePadding",
}

REFUSED = {
    "Bernoulli": "it draws random numbers; export the model for inference",
    "BitCast": "it reads the bits of a number, which has no gradient",
    "MaxRoiPool": "its regions are rounded to whole pixels; use RoiAlign, which has a gradient, or attribute behind it",
    "MelWeightMatrix": "its inputs are settings; give them as constants",
    "Optional": _OPTIONAL,
    "OptionalGetElement": _OPTIONAL,
    "ConcatFromSequence": _SEQUENCE,
    "SequenceAt": _SEQUENCE,
    "SequenceConstruct": _SEQUENCE,
    "SequenceErase": _SEQUENCE,
    "SequenceInsert": _SEQUENCE,
    "SequenceMap": _SEQUENCE,
    "SplitToSequence": _SEQUENCE,
    "ai.onnx.ml::TreeEnsemble": _TREE,
    "ai.onnx.ml::TreeEnsembleClassifier": _TREE,
    "ai.onnx.ml::TreeEnsembleRegressor": _TREE,
    "ai.onnx.preview::FlexAttention": "it is a preview, which no runtime has yet; export the model with Attention",
    "ai.onnx.preview.training::Adagrad": _TRAINING,
    "ai.onnx.preview.training::Adam": _TRAINING,
    "ai.onnx.preview.training::Gradient": _TRAINING,
    "ai.onnx.preview.training::Momentum": _TRAINING,
}
REFUSED |= {f"com.microsoft::{name}": why for why, names in _CONTRIB.items() for name in names.split()}
REFUSED |= quantisation.REFUSED
