"""Large weights past protobuf: read in place, and written in the very bytes that protobuf would write.

A serialised message is its fields one after the other, each with its number and its length. So the large weights can be
taken out of a file's bytes, which stay their one place in memory, and be put between the fields before and behind them,
without a second copy of all of them as one string.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from onnxgbp.files import output_file

__all__ = ["LARGE", "Detached", "attached", "detach", "is_large", "large_last", "stream"]

LARGE = 1 << 20  # bytes; a smaller weight costs nothing
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers in ModelProto, GraphProto and TensorProto
_DIMS, _DATA_TYPE, _NAME, _DOC_STRING = 1, 2, 8, 12  # the others in TensorProto that `attached` knows
_VARINT, _FIXED_64, _DELIMITED, _FIXED_32 = 0, 1, 2, 5  # how a field's length is told

Detached: TypeAlias = dict[int, memoryview]
"""The raw data of large initializers, by their place among the initializers."""

M = TypeVar("M", onnx.ModelProto, onnx.GraphProto, onnx.TensorProto)


def is_large(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= LARGE


def detach(data: bytes) -> tuple[bytes, Detached]:
    """A serialised model without the raw data of its large initializers, and those, as views of `data`.

    Bytes that are no such message come back as they are: to say what is wrong with them is the parser's.
    """
    whole = memoryview(data)
    if sys.byteorder != "little":  # a view is read as it stands
        return data, {}
    found: Detached = {}
    try:
        fields = list(_fields(whole))
        if sum(number == _GRAPH for number, *_ in fields) != 1:
            return data, {}
        parts = list[bytes | memoryview]()
        for number, start, body, end in fields:
            parts += _without_large(whole[body:end], found) if number == _GRAPH else [whole[start:end]]
    except (ValueError, IndexError):
        return data, {}
    return b"".join(parts), found


def attached(tensor: onnx.TensorProto, raw: memoryview) -> ir.Tensor[Any]:
    """The initializer that `raw` was taken from; its numbers stay where they are."""
    dtype = ir.DataType(tensor.data_type)
    numbers = np.frombuffer(raw, dtype.numpy()).reshape(tensor.dims)
    return ir.Tensor(numbers, dtype, name=tensor.name, doc_string=tensor.doc_string or None)


def _without_large(graph: memoryview, found: Detached) -> list[bytes | memoryview]:
    """The field of a graph, in parts."""
    parts, place = list[bytes | memoryview](), 0
    for number, start, body, end in _fields(graph):
        if number == _INITIALIZER:
            inner = list(_fields(graph[body:end])) if end - body >= LARGE else []
            raw = [graph[body + first : body + last] for field, _, first, last in inner if field == _RAW_DATA]
            # One with anything besides, such as a location, goes the usual way.
            known = {field for field, *_ in inner} <= {_DIMS, _DATA_TYPE, _NAME, _DOC_STRING, _RAW_DATA}
            if len(raw) == 1 and known and len(raw[0]) >= LARGE:
                small = [graph[body + first : body + last] for field, first, _, last in inner if field != _RAW_DATA]
                found[place] = raw[0]
                parts += [_header(_INITIALIZER, sum(map(len, small))), *small]
                place += 1
                continue
            place += 1
        parts.append(graph[start:end])
    return [_header(_GRAPH, sum(map(len, parts))), *parts]


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its number, and where it starts, where its content starts, and where both end.

    Raises:
        ValueError, IndexError: the bytes are no message.
    """
    place = 0
    while place < len(message):
        start = place
        key, place = _read_varint(message, place)
        kind = key & 7
        body = place
        if kind == _VARINT:
            _, place = _read_varint(message, place)
        elif kind == _DELIMITED:
            size, body = _read_varint(message, place)
            place = body + size
        elif kind in (_FIXED_64, _FIXED_32):
            place += 8 if kind == _FIXED_64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place > len(message):
            raise ValueError("a field is cut off")
        yield key >> 3, start, body, place


def _read_varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 64 bits")


def stream(skeleton: onnx.ModelProto, large: list[ir.Value], path: Path) -> None:
    """Writes `skeleton` with the large initializers that it lacks, behind those that it has; the whole file or none."""
    graph_before, graph_after = _split(skeleton.graph, _INITIALIZER + 1)  # the small ones stand before
    model_before, model_after = _split(skeleton, _GRAPH)
    sizes = [_size(value) for value in large]
    graph_size = len(graph_before) + sum(len(_header(_INITIALIZER, size)) + size for size in sizes) + len(graph_after)
    with output_file(path) as aside, aside.open("wb") as file:
        file.write(model_before + _header(_GRAPH, graph_size) + graph_before)
        for value, size in zip(large, sizes, strict=True):
            file.write(_header(_INITIALIZER, size))
            file.writelines(_tensor(value))
        file.write(graph_after + model_after)


def _size(value: ir.Value) -> int:
    return sum(len(part) for part in _tensor(value))


def _tensor(value: ir.Value) -> list[bytes | memoryview]:
    """A weight as the parts of its message; raw data goes by without a copy inside one more message."""
    tensor = value.const_value
    assert tensor is not None  # it is an initializer
    skeleton = onnx.TensorProto(name=value.name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value)
    if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray) and _in_order(tensor):
        raw: bytes | memoryview = tensor.raw.reshape(-1).view(np.uint8).data
        note = tensor.doc_string
    elif isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.HasField("raw_data"):
        raw, note = tensor.tobytes(), tensor.raw.doc_string
    else:
        proto = ir.serde.serialize_tensor(tensor)
        proto.name = value.name or ""
        return [proto.SerializeToString(deterministic=True)]
    if note:
        skeleton.doc_string = note
    before, after = _split(skeleton, _RAW_DATA)
    return [before, _header(_RAW_DATA, len(raw)), raw, after]


def _in_order(tensor: ir.Tensor[Any]) -> bool:
    """Whether the array's own bytes are those of a file."""
    packed = tensor.dtype.itemsize < 1
    return sys.byteorder == "little" and not packed and not tensor.metadata_props and tensor.raw.flags.c_contiguous


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
