"""A model file may have been made to do harm: what is asked of its protobuf before anything else reads it.

Here stand the bounds of a whole file; those of a single constant are `constants.SMALL` and `emit.LARGEST_TABLE`, of a
picture `images.LARGEST`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import onnx

from onnxgbp import external
from onnxgbp.errors import OnnxgbpError

__all__ = ["METADATA", "MOST_AXES", "MOST_NODES", "check", "check_inlined", "json_entry", "require_record"]

METADATA = "onnxgbp."  # the prefix of everything that we write into metadata_props

MOST_NODES = 100_000  # with the bodies of functions and control flow: a conversion takes about 5 ms for each
_DEEPEST = 100  # functions in functions: the same bound as in onnx's own inliner, which calls itself for each
_DEEPEST_BODY = 8  # control flow in control flow: the gradient of each body computes those in it once more
MOST_AXES = 64  # numpy's own bound
_MOST_NUMBERS = 1 << 48  # of a tensor
_LARGEST_VERSION = (1 << 31) - 1  # what onnx's checker holds

Key: TypeAlias = "tuple[str, str, str]"


def check(proto: onnx.ModelProto, where: str) -> None:
    """Refuses versions that are none, names that are no text, tensors with too many axes, and too many nodes.

    A few lines of functions that call each other twice stand for more nodes than any memory holds, so they are counted
    before they are inlined.

    Raises:
        OnnxgbpError: as said.
    """
    for text in _texts(proto):
        if not isinstance(text, str):
            raise OnnxgbpError(f"{where} is cut off or damaged: it holds a name that is no UTF-8")
    if not 0 < proto.ir_version <= _LARGEST_VERSION:
        raise OnnxgbpError(f"{where} has IR version {proto.ir_version}, which there is not")
    opsets: dict[str, int] = {}
    for entry in proto.opset_import:
        if entry.domain not in ("", "ai.onnx") and not 0 <= entry.version <= _LARGEST_VERSION:
            raise OnnxgbpError(f"{where} has opset {entry.version} of domain '{entry.domain}', which there is not")
        domain = entry.domain or "ai.onnx"
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise OnnxgbpError(f"{where} names two opsets of domain '{domain}': {opsets[domain]} and {entry.version}")
    if (count := _Calls(proto, where).nodes(proto.graph, 0)) > MOST_NODES:
        raise OnnxgbpError(
            f"{where} has {'about ' if proto.functions else ''}{count:.6g} nodes, more than the {MOST_NODES} that can "
            "be converted: fold what is constant, or convert a part of it"
        )
    _check_depth(proto.graph, where)
    for graph in external.graphs(proto.graph):
        for value in (*graph.input, *graph.output):
            if not value.name:
                raise OnnxgbpError(f"{where} is not a valid model: an input or an output has no name")
            kind = value.type.tensor_type
            if kind.elem_type not in onnx.TensorProto.DataType.values():
                raise OnnxgbpError(f"{where} is damaged: '{value.name}' has the unknown type {kind.elem_type}")
            if len(kind.shape.dim) > MOST_AXES:
                raise OnnxgbpError(f"{where}: '{value.name}' has {len(kind.shape.dim)} axes, more than {MOST_AXES}")
    _check_record({said.key: said.value for said in proto.metadata_props}, where)
    for tensor in external.tensors(proto.graph):
        if tensor.data_type not in onnx.TensorProto.DataType.values():
            raise OnnxgbpError(f"{where} is damaged: tensor '{tensor.name}' has the unknown type {tensor.data_type}")
        if len(tensor.dims) > MOST_AXES:
            raise OnnxgbpError(f"{where}: tensor '{tensor.name}' has {len(tensor.dims)} axes, more than {MOST_AXES}")
        if math.prod(max(dim, 1) for dim in tensor.dims) > _MOST_NUMBERS:  # so too beside a dim of 0: numpy multiplies
            raise OnnxgbpError(
                f"{where}: tensor '{tensor.name}' has the dims {list(tensor.dims)}, which no memory holds"
            )


_BODIES = frozenset({"body", "else_branch", "then_branch"})


def check_inlined(proto: onnx.ModelProto, where: str) -> None:
    """What can be told once no function is left: no node refers to one's attributes, every node makes something, a
    constant holds one value, and each branch gives what its If does.
    """
    for graph in external.graphs(proto.graph):
        for node in graph.node:
            label = node.name or node.op_type
            if not any(node.output):
                raise OnnxgbpError(f"{where} is not a valid model: node '{label}' has no outputs")
            ours = node.domain in ("", "ai.onnx")
            if ours and node.op_type == "Constant" and len(node.attribute) != 1:
                held = len(node.attribute)
                raise OnnxgbpError(f"{where} is not a valid model: Constant '{label}' holds {held} values")
            for attribute in node.attribute:
                if ours and attribute.name in _BODIES and attribute.type != onnx.AttributeProto.GRAPH:
                    raise OnnxgbpError(
                        f"{where} is not a valid model: '{attribute.name}' of node '{label}' is no graph"
                    )
                if ours and node.op_type == "If" and len(attribute.g.output) != len(node.output):
                    raise OnnxgbpError(
                        f"{where} is not a valid model: '{attribute.name}' of If '{label}' gives "
                        f"{len(attribute.g.output)} values, and the node {len(node.output)}"
                    )
                if attribute.ref_attr_name:
                    raise OnnxgbpError(
                        f"{where} is not a valid model: '{attribute.name}' of node '{label}' stands for attribute "
                        f"'{attribute.ref_attr_name}' of a function, and it is in none"
                    )


def json_entry(metadata: Mapping[str, str], name: str) -> Any:
    """What an entry of ours in the metadata says.

    Raises:
        OnnxgbpError: it is no JSON, or nested more deeply than Python reads.
    """
    try:
        return json.loads(metadata[METADATA + name])
    except json.JSONDecodeError as error:
        raise OnnxgbpError(f"the model's metadata '{METADATA}{name}' is no JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits
        raise OnnxgbpError(f"the model's metadata '{METADATA}{name}' is no JSON that can be read") from None


_NEEDED = ("explained", "rules", "target", "wrt")  # by which a converted file is run


def require_record(metadata: Mapping[str, str], where: str) -> None:
    """Refuses a converted file whose metadata does not say what is needed to run it.

    Raises:
        OnnxgbpError: as said.
    """
    if lacking := [METADATA + name for name in _NEEDED if METADATA + name not in metadata]:
        raise OnnxgbpError(f"{where} is no whole converted file: its metadata lacks {', '.join(lacking)}")


def _check_record(metadata: Mapping[str, str], where: str) -> None:
    """What a converted file says of itself, where it says it, is of the form in which `convert` writes it."""
    if METADATA + "method" not in metadata:
        return
    for name in ("audit", "rules", "wrt"):
        if METADATA + name not in metadata:
            continue
        rows = json_entry(metadata, name)
        texts = rows if name != "audit" else _audited(rows)
        if not isinstance(rows, list) or not all(isinstance(text, str) for text in texts):
            raise OnnxgbpError(f"{where}: its metadata '{METADATA}{name}' is not what a conversion writes")
    target, scale = metadata.get(METADATA + "target", "argmax"), metadata.get(METADATA + "seed_scale", "1")
    if re.fullmatch(r"(top|input)\d{7,}", target):  # no model has ten million classes
        raise OnnxgbpError(f"{where}: its metadata '{METADATA}target' is not what a conversion writes")
    try:
        fine = scale == "input" or 0 < float(scale) < math.inf
    except ValueError:
        fine = False
    if not fine:
        raise OnnxgbpError(f"{where}: its metadata '{METADATA}seed_scale' is not what a conversion writes")


def _audited(rows: Any) -> list[Any]:
    """The names in an audit, and None for a row that is none."""
    if not isinstance(rows, list):
        return []
    return [row[name] if isinstance(row, dict) and name in row else None for row in rows for name in ("node", "kind")]


def _check_depth(graph: onnx.GraphProto, where: str, depth: int = 0) -> None:
    if depth > _DEEPEST_BODY:
        raise OnnxgbpError(f"{where} has control flow in control flow, more than {_DEEPEST_BODY} deep: simplify it")
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _check_depth(inner, where, depth + 1)


class _Calls:
    """How many nodes a graph comes to, each call of a function counted as the nodes that it calls."""

    def __init__(self, proto: onnx.ModelProto, where: str) -> None:
        self._functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
        self._where = where
        self._known: dict[Key, int] = {}

    def nodes(self, body: onnx.GraphProto | onnx.FunctionProto, depth: int) -> int:
        if depth > _DEEPEST:
            raise OnnxgbpError(
                f"{self._where} has functions that call each other more than {_DEEPEST} deep, or in a circle: inline "
                "them before"
            )
        count = 0
        for graph in _bodies(body):
            for node in graph.node:
                key = (node.domain, node.op_type, node.overload)
                if key in self._functions and key not in self._known:
                    self._known[key] = self.nodes(self._functions[key], depth + 1)
                count += self._known.get(key, 1)
        return count


def _bodies(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    yield body
    for node in body.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from external.graphs(inner)


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    """Every name in the model. Protobuf gives those that are no UTF-8 as bytes."""
    yield proto.producer_name
    for entry in proto.opset_import:
        yield entry.domain
    for said in proto.metadata_props:
        yield from (said.key, said.value)
    for function in proto.functions:
        yield from (function.domain, function.name, function.overload)
        yield from (*function.input, *function.output, *function.attribute)
        for entry in function.opset_import:
            yield entry.domain
        yield from (attribute.name for attribute in function.attribute_proto)
        for body in _bodies(function):
            yield from _node_texts(body.node)
            if isinstance(body, onnx.GraphProto):
                yield from _graph_texts(body)
    for graph in external.graphs(proto.graph):
        yield from _node_texts(graph.node)
        yield from _graph_texts(graph)


def _node_texts(nodes: Iterable[onnx.NodeProto]) -> Iterator[object]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name)
            for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
                yield from _tensor_texts(tensor)


def _graph_texts(graph: onnx.GraphProto) -> Iterator[object]:
    yield graph.name
    for value in (*graph.input, *graph.output):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for tensor in graph.initializer:
        yield from _tensor_texts(tensor)


def _tensor_texts(tensor: onnx.TensorProto) -> Iterator[object]:
    yield tensor.name
    for entry in tensor.external_data:
        yield from (entry.key, entry.value)
