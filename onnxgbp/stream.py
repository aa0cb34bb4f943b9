"""Writes a model with one weight in memory at a time, in the very bytes that protobuf would write.

A serialised message is its fields one after the other, each with its number and its length. So the large weights can be
put between the fields before and behind them, without a second copy of all of them as one string.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import onnx
import onnx_ir as ir

from onnxgbp.files import output_file

__all__ = ["LARGE", "is_large", "large_last", "stream"]

LARGE = 1 << 20  # bytes; a smaller weight costs nothing
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers in ModelProto, GraphProto and TensorProto

M = TypeVar("M", onnx.ModelProto, onnx.GraphProto, onnx.TensorProto)


def is_large(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= LARGE


def stream(skeleton: onnx.ModelProto, large: list[ir.Value], path: Path) -> None:
    """Writes `skeleton` with the large initializers that it lacks, behind those that it has; the whole file or none."""
    graph_before, graph_after = _split(skeleton.graph, _INITIALIZER + 1)  # the small ones stand before
    model_before, model_after = _split(skeleton, _GRAPH)
    sizes = [sum(len(part) for part in _tensor(value)) for value in large]
    graph_size = len(graph_before) + sum(len(_header(_INITIALIZER, size)) + size for size in sizes) + len(graph_after)
    with output_file(path) as aside, aside.open("wb") as file:
        file.write(model_before + _header(_GRAPH, graph_size) + graph_before)
        for value, size in zip(large, sizes, strict=True):
            file.write(_header(_INITIALIZER, size))
            file.writelines(_tensor(value))
        file.write(graph_after + model_after)


def _tensor(value: ir.Value) -> list[bytes]:
    """A weight as the parts of its message; raw data goes by without a copy inside one more message."""
    tensor = value.const_value
    assert tensor is not None  # it is an initializer
    if not isinstance(tensor, ir.TensorProtoTensor) or not tensor.raw.HasField("raw_data"):
        proto = ir.serde.serialize_tensor(tensor)
        proto.name = value.name or ""
        return [proto.SerializeToString(deterministic=True)]
    raw = tensor.tobytes()
    skeleton = onnx.TensorProto(name=value.name, dims=tensor.raw.dims, data_type=tensor.raw.data_type)
    if tensor.raw.HasField("doc_string"):
        skeleton.doc_string = tensor.raw.doc_string
    before, after = _split(skeleton, _RAW_DATA)
    return [before, _header(_RAW_DATA, len(raw)), raw, after]


def _split(message: M, number: int) -> tuple[bytes, bytes]:
    """The bytes of a message before and behind the place of a field, which itself is left out."""
    before, after = type(message)(), type(message)()
    before.CopyFrom(message)
    after.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.number >= number:
            before.ClearField(field.name)
        if field.number <= number:
            after.ClearField(field.name)
    return bytes(before.SerializeToString(deterministic=True)), bytes(after.SerializeToString(deterministic=True))


def _header(number: int, size: int) -> bytes:
    """A length-delimited field's number and length."""
    return _varint(number << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the low ones first; the top bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def large_last(graph: ir.Graph) -> None:
    """Orders the weights as `stream` leaves them, so that both ways of writing give the same bytes."""
    for name, value in [item for item in graph.initializers.items() if is_large(item[1].const_value)]:
        del graph.initializers[name]
        graph.initializers[name] = value
