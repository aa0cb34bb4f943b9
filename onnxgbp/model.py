"""ONNX files in and out: what is read, what is refused and why, and the shapes of every tensor.

Protobuf lives here and in `runtime.py` only; between them a model is an `onnx_ir.Model`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx.inliner
import onnx.version_converter
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxgbp.errors import OnnxgbpError
from onnxgbp.shapes import infer_shapes

__all__ = ["METADATA", "ModelLike", "Source", "load", "output_file", "raised", "save", "to_proto", "write"]

ModelLike: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto"

METADATA = "onnxgbp."  # the prefix of everything that we write into metadata_props
OLDEST_OPSET = 7  # broadcasting as numpy does it starts here
LOWEST_OPSET = 9  # the first with Where, which every gate needs; older files are raised to it


@dataclasses.dataclass
class Source:
    """A model as read: its in-memory form, its place, and the digest of its bytes."""

    model: ir.Model
    sha256: str
    path: Path | None
    odd_outputs: dict[str, onnx.TypeProto]  # of no tensor type (ZipMap's list of maps), which onnx_ir cannot hold

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "the model"


def load(source: ModelLike) -> Source:
    """Reads a model from a path or a `ModelProto`, and refuses what could not be converted faithfully.

    Raises:
        OnnxgbpError: no such file, no ONNX model, damaged, older than opset 7, a training graph, sparse initializers,
            external data that is missing or outside the model's folder, or a graph that is not well formed.
    """
    if isinstance(source, onnx.ModelProto):
        data, path, proto = source.SerializeToString(deterministic=True), None, onnx.ModelProto()
        proto.CopyFrom(source)
    else:
        path = Path(source)
        data = _read(path)
        proto = _parse(data, path)
    digest = hashlib.sha256(data).hexdigest()
    del data  # as large as the model: gone before anything else is built
    where = str(path) if path else "the model"
    _check_proto(proto, where)
    _check_external_data(proto, path, where)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto, convert_version=True)
    if _opset(proto) < LOWEST_OPSET:
        proto = _raise_opset(proto, LOWEST_OPSET)
    odd = {}
    for output in proto.graph.output:
        if not output.type.HasField("tensor_type"):
            odd[output.name] = onnx.TypeProto.FromString(output.type.SerializeToString())
            output.ClearField("type")
    model = _to_ir(proto, path, where)
    infer_shapes(model)
    return Source(model, digest, path, odd)


def to_proto(model: ir.Model, source: Source) -> onnx.ModelProto:
    """The model as protobuf, with the output types that the in-memory form could not hold."""
    proto = ir.to_proto(model)
    for output in proto.graph.output:
        if output.name in source.odd_outputs:
            output.type.CopyFrom(source.odd_outputs[output.name])
    return proto


def raised(source: Source, opset: int) -> Source:
    """The same source in a newer opset, for a gradient that its own cannot spell."""
    model = _to_ir(_raise_opset(to_proto(source.model, source), opset), source.path, source.name)
    infer_shapes(model)
    return dataclasses.replace(source, model=model)


def _raise_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same model in a newer opset, by onnx's own converter."""
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(proto, opset)
        return converted
    except (RuntimeError, ValueError) as error:
        raise OnnxgbpError(
            f"the model's opset {_opset(proto)} is too old for its gradient, and onnx cannot raise it to {opset}: "
            f"{_first_line(error)}; export the model with opset {opset}"
        ) from None


def save(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Writes a model: the whole file or none.

    Raises:
        OnnxgbpError: the file cannot be written.
    """
    write(Path(path), model.SerializeToString(deterministic=True))


def write(path: Path, data: bytes) -> None:
    """Writes a file aside and moves it into place, so that no half of it is ever seen under its name."""
    with output_file(path) as aside:
        aside.write_bytes(data)


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A file to write aside; on success it is moved to `path`, on failure nothing is left."""
    aside: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        aside = Path(name)
        with os.fdopen(handle):
            umask = os.umask(0)
            os.umask(umask)
            aside.chmod(0o666 & ~umask)  # mkstemp's 0600 would surprise whoever deploys the file
        yield aside
        aside.replace(path)
    except OSError as error:
        raise OnnxgbpError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror or error}") from None


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError:
        # An ONNX file starts with field 1, ir_version, as a varint: a small number in practice.
        if data[:1] == b"\x08" and len(data) > 1 and 0 < data[1] < 64:
            raise OnnxgbpError(f"{path} is cut off or damaged: its protobuf does not parse; copy it again") from None
        raise OnnxgbpError(f"{path} is not an ONNX file: its protobuf does not parse") from None
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        if data[:1] == b"\x08" and proto.ir_version:
            raise OnnxgbpError(f"{path} is cut off or damaged: graph or opset is missing; copy it again")
        raise OnnxgbpError(f"{path} is not an ONNX file: it holds no graph")
    return proto


def _opset(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _check_proto(proto: onnx.ModelProto, where: str) -> None:
    opset, newest = _opset(proto), onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise OnnxgbpError(f"{where} has opset {opset}, older than {OLDEST_OPSET}: export it again with a newer opset")
    if opset > newest:
        raise OnnxgbpError(
            f"{where} has opset {opset}, newer than {newest}, the newest of onnx {onnx.__version__}: update onnx"
        )
    if proto.training_info:
        raise OnnxgbpError(f"{where} is a training graph (it has training_info): export it for inference")
    for graph in _graphs(proto.graph):
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise OnnxgbpError(f"{where} has a sparse initializer '{name}', which is not supported: store it dense")
        for node in graph.node:
            if any(attribute.HasField("sparse_tensor") for attribute in node.attribute):
                raise OnnxgbpError(
                    f"{where}: node '{_label(node)}' holds a sparse tensor, which is not supported: store it dense"
                )
    _check_names(proto.graph, where)


def _check_names(graph: onnx.GraphProto, where: str) -> None:
    """Every tensor is made once, and before it is read (its order in the file does not matter)."""
    made = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for name in node.output:
            if name and name in made:
                raise OnnxgbpError(
                    f"{where} is not a valid graph: tensor '{name}' is made twice, again by node '{_label(node)}'"
                )
            made.add(name)
    for node in graph.node:
        for name in node.input:
            if name and name not in made:
                raise OnnxgbpError(
                    f"{where} is cut off or damaged: node '{_label(node)}' reads tensor '{name}', which nothing makes"
                )
    for value in graph.output:
        if value.name not in made:
            raise OnnxgbpError(f"{where} is cut off or damaged: nothing makes its output '{value.name}'")


def _label(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}({', '.join(node.output)})"


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in _graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _check_external_data(proto: onnx.ModelProto, path: Path | None, where: str) -> None:
    """A model is untrusted input: its data must lie beside it, and be all there."""
    for tensor in _tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if path is None:
            raise OnnxgbpError(
                f"{where} keeps tensor '{tensor.name}' in an external file: give the model as a path instead"
            )
        folder = path.resolve().parent
        file = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise OnnxgbpError(
                f"{where}: external data '{location}' of tensor '{tensor.name}' is outside the model's folder"
            )
        if not file.is_file():
            raise OnnxgbpError(
                f"{where}: external data file '{location}' of tensor '{tensor.name}' is missing from {folder}"
            )
        try:
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        except ValueError:
            raise OnnxgbpError(
                f"{where}: tensor '{tensor.name}' has a malformed offset or length of its external data"
            ) from None
        if file.stat().st_size < end:
            raise OnnxgbpError(
                f"{where}: external data file '{location}' is cut off: tensor '{tensor.name}' ends at byte {end}"
            )


def _to_ir(proto: onnx.ModelProto, path: Path | None, where: str) -> ir.Model:
    try:
        model = ir.from_proto(proto)
        model.graph.sort()
    except Exception as error:  # noqa: BLE001 - onnx_ir raises many kinds for a malformed file, each means the same here
        raise OnnxgbpError(f"{where} is not a valid model: {_first_line(error)}") from None
    if "ai.onnx" in model.graph.opset_imports:  # the standard's other name for its own domain
        model.graph.opset_imports[""] = model.graph.opset_imports.pop("ai.onnx")
    model.graph.meta["ir_version"] = model.ir_version
    if path is not None:
        ir.external_data.set_base_dir(model.graph, path.resolve().parent)
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
