"""ONNX files in and out: what is read, what is refused and why, and the shapes of every tensor.

Protobuf lives here and where a runtime is fed; between them a model is an `onnx_ir.Model`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx.checker
import onnx.inliner
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from onnxgbp import external, untrusted
from onnxgbp.branches import inline_constant_ifs, lift_initializers
from onnxgbp.contrib import CONTRIB
from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import write
from onnxgbp.normalise import normalise
from onnxgbp.opset import opset_of, raise_opset
from onnxgbp.shapes import infer_shapes
from onnxgbp.stream import Detached, attached, detach
from onnxgbp.untrusted import METADATA

__all__ = ["METADATA", "ModelLike", "Source", "load", "raised", "save", "to_proto"]

ModelLike: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto"

OLDEST_OPSET = 7  # broadcasting as numpy does it starts here
_POOLS_OPSET = 22  # the first whose convolutions and pools take bfloat16, and whose pools onnx sizes right
LOWEST_OPSET = 9  # the first with Where, which every gate needs; older files are raised to it
# Numbers that fill whole bytes: numpy reads them where they lie.
_DETACHABLE = frozenset(
    int(getattr(ir.DataType, name))
    for name in "FLOAT DOUBLE FLOAT16 BFLOAT16 INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64".split()
)


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
        path, data = None, source.SerializeToString(deterministic=True)
    else:
        if not isinstance(source, (str, os.PathLike)):
            raise OnnxgbpError(f"a model is a path or an onnx.ModelProto, not a {type(source).__name__}")
        path = Path(source)
        data = _read(path)
    where = str(path) if path else "the model"
    proto, detached = _parse(data, where)
    if path is not None:
        _check_file(proto, data, where)
    digest = hashlib.sha256(data).hexdigest()
    del data  # as large as the model; where weights were detached, they hold it
    _check_proto(proto, where)
    external.read(proto, path, where)
    if proto.functions:
        with _meaning(f"{where}: its local functions cannot be inlined"):
            proto = onnx.inliner.inline_local_functions(proto, convert_version=True)
        # The inliner leaves, without a word, what is written for other opsets than the model.
        called = {(node.domain, node.op_type) for graph in external.graphs(proto.graph) for node in graph.node}
        for function in proto.functions:
            if (function.domain, function.name) in called:
                raise OnnxgbpError(
                    f"{where}: its local function '{function.domain}::{function.name}' cannot be inlined: it is "
                    "written for other opsets than the model; inline it before, or export without functions"
                )
        del proto.functions[:]
        _check_proto(proto, where)  # the bodies in a function's nodes were not looked into before
    untrusted.check_inlined(proto, where)
    _check_nodes(proto, where, detached)
    if opset_of(proto) < LOWEST_OPSET:
        if any(node.op_type == "Scan" for graph in external.graphs(proto.graph) for node in graph.node):
            raise OnnxgbpError(
                f"{where} has a Scan of opset 8, which onnx cannot raise without changing the inputs: export it "
                "with opset 9 or newer"
            )
        proto = _raise_opset(proto, LOWEST_OPSET)
    odd = {}
    for output in proto.graph.output:
        if not output.type.HasField("tensor_type"):
            odd[output.name] = onnx.TypeProto.FromString(output.type.SerializeToString())
            output.ClearField("type")
    result = Source(_to_ir(proto, path, where, detached), digest, path, odd)
    graph = result.model.graph
    if opset_of(proto) < _POOLS_OPSET and (_untyped_bfloat16(graph) or _wrongly_sized(graph)):
        return raised(result, _POOLS_OPSET)
    return result


def _untyped_bfloat16(graph: ir.Graph) -> bool:
    """Whether a standard operator reads bfloat16 that its opset does not know: exporters write that all the same."""
    return any(
        node.domain == ""
        and node.outputs[0].dtype is None
        and any(value is not None and value.dtype is ir.DataType.BFLOAT16 for value in node.inputs)
        for node in graph
    )


def _wrongly_sized(graph: ir.Graph) -> bool:
    """Whether onnx gives a pool's output a wrong size: ONNX Runtime believes it, and refuses what a gradient adds."""
    return any(node.meta.get("outer_windows") for node in graph)


def to_proto(model: ir.Model, source: Source) -> onnx.ModelProto:
    """The model as protobuf, with the output types that the in-memory form could not hold."""
    proto = ir.to_proto(model)
    for output in proto.graph.output:
        if output.name in source.odd_outputs:
            output.type.CopyFrom(source.odd_outputs[output.name])
    return proto


def raised(source: Source, opset: int) -> Source:
    """The same source in a newer opset, for a gradient that its own cannot spell."""
    proto = _raise_opset(to_proto(source.model, source), opset)
    for output in proto.graph.output:
        if output.name in source.odd_outputs:
            output.ClearField("type")
    return dataclasses.replace(source, model=_to_ir(proto, source.path, source.name, {}))


def _raise_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    failed = f"opset {opset_of(proto)} is too old for the gradient, export the model with {opset}: onnx cannot raise it"
    with _meaning(failed):
        return raise_opset(proto, opset)


@contextlib.contextmanager
def _meaning(what: str) -> Iterator[None]:
    """A malformed model makes onnx and onnx_ir raise errors of many kinds; each means the same to a user."""
    try:
        yield
    except OnnxgbpError:
        raise
    except Exception as error:  # noqa: BLE001 - as said above
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OnnxgbpError(f"{what}: {lines[0]}") from None


def save(
    model: onnx.ModelProto, path: str | os.PathLike[str], *, data_folder: str | os.PathLike[str] | None = None
) -> None:
    """Writes a model: the whole file or none.

    Args:
        model: as `convert` gives it.
        path: the file to write.
        data_folder: where the source lies, for a model so large that its weights stay in files of their own: in the
            same folder the new file shares them, in another they are copied next to it.
    Raises:
        OnnxgbpError: the file cannot be written, or external data is not where it should be.
    """
    external.copy_beside(model, Path(path), None if data_folder is None else Path(data_folder))
    try:
        data = model.SerializeToString(deterministic=True)
    except (ValueError, EncodeError):
        raise OnnxgbpError(f"cannot write {path}: a protobuf file ends at 2 GiB; use GradientGraph.save") from None
    write(Path(path), data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror or error}") from None


def _parse(data: bytes, where: str) -> tuple[onnx.ModelProto, Detached]:
    """The model, and its large weights, which stay in `data` unless onnx itself has to rewrite the model."""
    part, detached = detach(data)
    try:
        proto = onnx.ModelProto.FromString(part)
        names = [tensor.name for tensor in proto.graph.initializer]
        plain = {proto.graph.initializer[place].data_type for place in detached} <= _DETACHABLE
        apart = all(names) and len({*names}) == len(names)
        if detached and (proto.functions or opset_of(proto) < LOWEST_OPSET or not (plain and apart)):
            return onnx.ModelProto.FromString(data), {}
    except DecodeError:
        # An ONNX file starts with field 1, ir_version, as a varint: a small number in practice.
        if data[:1] == b"\x08" and len(data) > 1 and 0 < data[1] < 64:
            raise OnnxgbpError(f"{where} is cut off or damaged: its protobuf does not parse; copy it again") from None
        raise OnnxgbpError(f"{where} is not an ONNX file: its protobuf does not parse") from None
    return proto, detached


def _check_file(proto: onnx.ModelProto, data: bytes, where: str) -> None:
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        if data[:1] == b"\x08" and proto.ir_version:
            raise OnnxgbpError(f"{where} is cut off or damaged: graph or opset is missing; copy it again")
        raise OnnxgbpError(f"{where} is not an ONNX file: it holds no graph")


def _check_proto(proto: onnx.ModelProto, where: str) -> None:
    untrusted.check(proto, where)
    opset, newest = opset_of(proto), onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise OnnxgbpError(f"{where} has opset {opset}, older than {OLDEST_OPSET}: export it again with a newer opset")
    if opset > newest:
        raise OnnxgbpError(
            f"{where} has opset {opset}, newer than {newest}, the newest of onnx {onnx.__version__}: update onnx"
        )
    if not proto.graph.output:
        raise OnnxgbpError(f"{where} has no outputs: there is nothing to explain")
    if proto.training_info:
        raise OnnxgbpError(f"{where} is a training graph (it has training_info): export it for inference")
    for graph in external.graphs(proto.graph):
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise OnnxgbpError(f"{where} has a sparse initializer '{name}', which is not supported: store it dense")
        for node in graph.node:
            if any(attribute.HasField("sparse_tensor") for attribute in node.attribute):
                raise OnnxgbpError(
                    f"{where}: node '{_label(node)}' holds a sparse tensor, which is not supported: store it dense"
                )
    _check_names(proto.graph, where)


def _check_names(graph: onnx.GraphProto, where: str, outer: frozenset[str] = frozenset()) -> None:
    """Every tensor is made once, and before it is read (its order in the file does not matter); so in sub-graphs."""
    for kind in ("input", "initializer"):
        counts = Counter(value.name for value in getattr(graph, kind))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise OnnxgbpError(f"{where} is not a valid graph: {kind} '{twice[0]}' stands there twice")
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
            if name and name not in made and name not in outer:
                raise OnnxgbpError(
                    f"{where} is cut off or damaged: node '{_label(node)}' reads tensor '{name}', which nothing makes"
                )
    for value in graph.output:
        if value.name not in made:
            raise OnnxgbpError(f"{where} is cut off or damaged: nothing makes its output '{value.name}'")
    for node in graph.node:
        for attribute in node.attribute:
            for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _check_names(body, where, outer | made)


def _label(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}({', '.join(node.output)})"


def _check_nodes(proto: onnx.ModelProto, where: str, detached: Detached) -> None:
    """Standard operators have the inputs and attributes of the standard, and constants the bytes of their shape."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = proto.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in proto.opset_import}
    for node in (node for graph in external.graphs(proto.graph) for node in graph.node):
        bodies = [attribute.name for attribute in node.attribute if attribute.HasField("g")]
        schema = onnx.defs.has(node.op_type, node.domain) and not node.domain
        # ONNX Runtime's optimiser writes a LayerNormalization into files of an opset that has none.
        early = node.op_type in CONTRIB and not onnx.defs.has(node.op_type, opset_of(proto), node.domain)
        if not schema or early:
            continue
        if bodies:  # which the checker cannot look into, not knowing the names from outside
            known = onnx.defs.get_schema(node.op_type).attributes
            if odd := [name for name in bodies if name not in known]:
                raise OnnxgbpError(
                    f"{where} is not a valid model: node '{_label(node)}': {node.op_type} has no sub-graph '{odd[0]}'"
                )
            continue
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            if "deprecated" not in str(error):  # runtimes still take those
                raise OnnxgbpError(f"{where} is not a valid model: node '{_label(node)}': {_reason(error)}") from None
    for place, tensor in enumerate(external.tensors(proto.graph)):  # initializers first, as `detached` counts them
        if not external.whole(tensor, detached.get(place)):
            raise OnnxgbpError(
                f"{where} is cut off or damaged: tensor '{tensor.name}' does not hold the numbers of its shape "
                f"{list(tensor.dims)}"
            )


def _reason(error: BaseException) -> str:
    """The sentence of a checker's message that says what is wrong."""
    return str(error).strip().splitlines()[0].partition("==>")[0].strip()


def _to_ir(proto: onnx.ModelProto, path: Path | None, where: str, detached: Detached) -> ir.Model:
    """The in-memory form: sorted, decomposed where an operator is not the standard's, with every shape."""
    with _meaning(f"{where} is not a valid model"):
        model = ir.from_proto(proto)
        for place, raw in detached.items():
            tensor = proto.graph.initializer[place]
            model.graph.initializers[tensor.name].const_value = attached(tensor, raw)
        model.graph.sort()
        if "ai.onnx" in model.graph.opset_imports:  # the standard's other name for its own domain
            model.graph.opset_imports[""] = model.graph.opset_imports.pop("ai.onnx")
        model.graph.meta["ir_version"] = model.ir_version
        if path is not None:
            ir.external_data.set_base_dir(model.graph, path.resolve().parent)
        lift_initializers(model)
        normalise(model)
        infer_shapes(model)
        while inline_constant_ifs(model):
            normalise(model)
            infer_shapes(model)
    return model
