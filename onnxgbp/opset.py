"""A model in a newer opset: by onnx's own converter, and what that gets wrong."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.version_converter

from onnxgbp.errors import OnnxgbpError
from onnxgbp.external import graphs

__all__ = ["opset_of", "raise_opset"]

# Operator -> the opset that gave it another meaning, which onnx does not write out.
_CHANGED = {"GroupNormalization": 21, "Hardmax": 13}
_RESIZE = 11  # the opset that lets Resize say how it reads its input


def opset_of(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def raise_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same model in a newer opset. Raises OnnxgbpError, and what onnx raises, where that cannot be."""
    before = opset_of(proto)
    for node in _nodes(proto):
        if before < _CHANGED.get(node.op_type, 0) <= opset:
            raise _would_change(node, before, _CHANGED[node.op_type])
    converted: onnx.ModelProto = onnx.version_converter.convert_version(proto, opset)
    if before < _RESIZE <= opset:
        known = {tensor.name: tensor for graph in graphs(converted.graph) for tensor in graph.initializer}
        known |= {
            node.output[0]: attribute.t
            for node in _nodes(converted)
            for attribute in node.attribute
            if node.op_type == "Constant" and attribute.name == "value"
        }
        for node in _nodes(converted):
            if node.op_type == "Resize":
                _read_as_before(node, known.get(node.input[2]), before)
    return converted


def _read_as_before(node: onnx.NodeProto, scales: onnx.TensorProto | None, before: int) -> None:
    """Has a Resize read as those before opset 11 did, which had one way, and not as is the default since.

    It is asymmetric. The nearest entry is the one below, or, where ONNX Runtime makes an axis smaller, the one above.
    """
    node.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"nearest")
    if mode != b"nearest":
        return
    factors = onnx.numpy_helper.to_array(scales) if scales is not None else None
    if factors is None or (factors.min() < 1 < factors.max()):
        raise _would_change(node, before, _RESIZE)
    node.attribute.append(onnx.helper.make_attribute("nearest_mode", "ceil" if factors.min() < 1 else "floor"))


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs(proto.graph):
        for node in graph.node:
            if node.domain in ("", "ai.onnx"):
                yield node


def _would_change(node: onnx.NodeProto, before: int, changed: int) -> OnnxgbpError:
    return OnnxgbpError(
        f"opset {before} is too old for the gradient, and {node.op_type} (node '{node.name}') means something else "
        f"since opset {changed}: export the model with opset {changed} or newer"
    )
