"""Weights in files beside the model: checked, read where they are small, shared or copied where they are large."""

from __future__ import annotations

import filecmp
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.external_data_helper
import onnx_ir as ir

from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import output_file

__all__ = ["copy_beside", "graphs", "read", "tensors", "whole"]

# Below this the weights become part of the converted file; protobuf ends at 2 GiB, and a file is easier to move.
PART_OF_FILE = 1 << 30


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from graphs(inner)


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every constant, the graph's own initializers first."""
    for inner in graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def whole(tensor: onnx.TensorProto, detached: memoryview | None = None) -> bool:
    """Whether a tensor that is stored in the model holds as many numbers as its shape says.

    detached: its raw data, where `stream.detach` took it out of the message.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return True  # checked with its file
    if tensor.data_type == onnx.TensorProto.UNDEFINED or min(tensor.dims, default=0) < 0:
        return False
    count: int = math.prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return count == len(tensor.string_data)
    dtype = ir.DataType(tensor.data_type)
    if detached is not None or tensor.HasField("raw_data"):
        return math.ceil(dtype.itemsize * count) == len(tensor.raw_data if detached is None else detached)
    entries: int = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return entries == 2 * count
    return entries == math.ceil(count * min(dtype.itemsize, 1))  # types below a byte are packed


def read(proto: onnx.ModelProto, path: Path | None, where: str) -> None:
    """Checks external data and reads it into the model, unless it is large: then it stays where it is.

    A model is untrusted input: its data must lie beside it, and be all there.

    Raises:
        OnnxgbpError: external data that is missing, cut off, or outside the model's folder.
    """
    size = 0
    for tensor in tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if path is None:
            raise OnnxgbpError(
                f"{where} keeps tensor '{tensor.name}' in an external file: give the model as a path instead"
            )
        if min(tensor.dims, default=0) < 0:
            raise OnnxgbpError(f"{where} is damaged: tensor '{tensor.name}' has the shape {list(tensor.dims)}")
        folder = path.resolve().parent
        if not _inside(folder, location):
            raise OnnxgbpError(
                f"{where}: external data '{location}' of tensor '{tensor.name}' is outside the model's folder"
            )
        file = folder / location
        if not file.is_file():  # nor is a pipe or a device one, which might be read for ever
            raise OnnxgbpError(
                f"{where}: external data file '{location}' of tensor '{tensor.name}' is missing from {folder}"
            )
        try:
            offset = int(entries.get("offset", 0))
            needed = math.ceil(ir.DataType(tensor.data_type).itemsize * math.prod(tensor.dims))
            length = int(entries.get("length", needed))
        except (TypeError, ValueError):  # text has no size that a shape tells
            raise OnnxgbpError(
                f"{where}: tensor '{tensor.name}' has a type, or an offset or a length, with which its external data "
                "cannot be read"
            ) from None
        end = offset + max(length, needed)
        if offset < 0 or length < needed or file.stat().st_size < end:
            raise OnnxgbpError(
                f"{where}: external data file '{location}' is cut off: tensor '{tensor.name}' needs it to byte {end}"
            )
        size += length
    if size and path is not None and size < PART_OF_FILE:
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.resolve().parent))


def _inside(folder: Path, location: str) -> bool:
    """Whether a location names something in a folder, wherever links lead to."""
    try:
        file = (folder / location).resolve()
        file.exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle, a NUL
        return False
    return bool(location) and not Path(location).is_absolute() and file.is_relative_to(folder.resolve())


def copy_beside(proto: onnx.ModelProto, path: Path, folder: Path | None) -> None:
    """Makes the external data of a model stand beside the file to write, each file whole or not at all."""
    locations = {
        entry.value
        for tensor in tensors(proto.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in sorted(locations):
        source, copy = (path.parent if folder is None else folder) / location, path.parent / location
        if not _inside(path.parent if folder is None else folder, location) or not _inside(path.parent, location):
            raise OnnxgbpError(f"cannot write {path}: its external data '{location}' is outside the model's folder")
        if not source.is_file():
            raise OnnxgbpError(
                f"cannot write {path}: its external data '{location}' is not in {source.parent}; name data_folder"
            )
        if copy.exists():
            if not copy.samefile(source) and not filecmp.cmp(source, copy, shallow=False):
                raise OnnxgbpError(f"cannot write {path}: {copy} exists and holds other data than the model's")
            continue
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OnnxgbpError(f"cannot write {copy}: {error.strerror or error}") from None
        with output_file(copy) as aside:
            shutil.copyfile(source, aside)
