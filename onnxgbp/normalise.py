"""Brings a model to operators that have rules: what optimisers fused, and what the standard defines by others.

Operators of `com.microsoft` are written out by `contrib.py`. An operator of the standard that has no rule of its own
but a function body is replaced by that body; activations never are, since the attribution rules must see them.
The walk goes forward and knows the type and rank of every tensor that it has passed.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import onnx
import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS
from onnxgbp.constants import constant_value
from onnxgbp.contrib import CONTRIB
from onnxgbp.emit import Emit
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError
from onnxgbp.step import Step, label
from onnxgbp.vjps import REFUSED, VJPS, ZERO_GRADIENT
from onnxgbp.vjps.classic import find_scores, hides_scores, scores_name, write_scores

__all__ = ["expandable", "normalise"]

# Layouts that ONNX Runtime's optimiser writes for the one processor on which it ran.
_BLOCKED = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc"})


def normalise(model: ir.Model) -> None:
    """Replaces, in place, the nodes that have no rule by ones that have; the graph's inputs and outputs stay.

    Raises:
        OnnxgbpError: a blocked layout, or a fused operator in a form that cannot be written out.
    """
    graph = model.graph
    for node in graph:
        if node.domain in _BLOCKED:
            raise OnnxgbpError(
                f"node '{label(node)}' is in a blocked layout ({node.domain}), which ONNX Runtime's optimiser wrote "
                "for one kind of processor; convert the file from before the optimisation"
            )
    if not any(_is_fused(node) or expandable(node) or _hides_scores(node) for node in graph):
        return
    op = Emit(graph)
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
    queue = collections.deque(graph)
    while queue:
        node = queue.popleft()
        if _is_fused(node):
            results = _written_out(op, node)
        elif expandable(node):
            results = _body(op, node)
        else:
            _infer(node)
            if _hides_scores(node):
                _write_scores(op, node)
            continue
        new = _replace(op, node, results)
        queue.extendleft(reversed(new))
    for value in (v for node in graph for v in node.outputs):
        value.meta.pop("constant", None)  # found, or not, before every shape was known
    if not any(node.domain == "com.microsoft" for node in graph.all_nodes()):
        graph.opset_imports.pop("com.microsoft", None)


def _key(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _is_fused(node: ir.Node) -> bool:
    return _key(node) in CONTRIB and _schema(node) is None


def _hides_scores(node: ir.Node) -> bool:
    """Whether a classifier of scikit-learn's hides the scores of its classes, which are nowhere in the graph yet."""
    return node.graph is not None and hides_scores(node) and find_scores(node.graph, node) is None


def _write_scores(op: Emit, node: ir.Node) -> None:
    """Writes the scores beside the classifier, which stays as it is: what does not need them is cleaned up later."""
    op.scope = label(node)
    scores = write_scores(op, Step(node))
    scores.name = scores_name(node)
    op.graph.insert_after(node, op.take())


def expandable(node: ir.Node) -> bool:
    """Whether the standard defines a node by a function body, and no table of ours knows the node itself."""
    if node.domain or any(node.op_type in table for table in (VJPS, ACTIVATIONS, ZERO_GRADIENT, REFUSED)):
        return False
    schema = _schema(node)
    return schema is not None and bool(schema.has_function or schema.has_context_dependent_function)


def _schema(node: ir.Node) -> Any:
    graph = node.graph
    return (
        _find_schema(node.op_type, graph.opset_imports.get(node.domain, 1), node.domain) if graph is not None else None
    )


@functools.cache
def _find_schema(op_type: str, opset: int, domain: str) -> Any:  # onnx types no member of OpSchema that is used here
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def _written_out(op: Emit, node: ir.Node) -> list[ir.Value | None]:
    op.scope = label(node)
    try:
        return list(CONTRIB[_key(node)](op, Step(node)))
    except OpsetTooLowError as error:
        raise Step(node).refuse(
            f"opset {op.opset} is too old to write it in standard operators; export the model with opset {error.opset}"
        ) from None


def _replace(op: Emit, node: ir.Node, results: list[ir.Value | None]) -> list[ir.Node]:
    """Puts the new nodes in the place of one, under its outputs' names."""
    made = {value for new in op.nodes for value in new.outputs}
    taken: dict[ir.Value, ir.Value] = {}
    for old, result in itertools.zip_longest(node.outputs, results):
        if old is None or not (old.uses() or old.is_graph_output()):
            continue
        if result is None:
            raise Step(node).refuse(f"its output '{old.name}' is read, which cannot be written out")
        # An input that is handed on, and a tensor that two outputs share, keep names of their own.
        taken[old] = op.Identity(result) if result not in made or result in taken.values() else result
    nodes = op.take()
    op.graph.insert_before(node, nodes)
    for old, new in taken.items():
        name, old.name = old.name, None
        if old.is_graph_output():
            new.type, new.shape = old.type, old.shape  # what the file declares
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
    op.graph.remove(node, safe=True)
    return nodes


def _body(op: Emit, node: ir.Node) -> list[ir.Value | None]:
    """The function body of a node, its names made unique, its nodes among those to place."""
    schema, graph = _schema(node), op.graph
    assert schema is not None  # it is expandable
    version, proto = graph.opset_imports[node.domain], ir.to_proto(node)
    try:
        if schema.has_context_dependent_function:
            given = max(v for v in schema.context_dependent_function_opset_versions if v <= version)
            types = [_type_proto(value).SerializeToString() if value is not None else b"" for value in node.inputs]
            text = schema.get_context_dependent_function_with_opset_version(given, proto.SerializeToString(), types)
        else:
            given = max(v for v in schema.function_opset_versions if v <= version)
            text = schema.get_function_with_opset_version(given)
        function = onnx.FunctionProto.FromString(text)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Step(node).refuse(f"the standard's definition of it does not fit this node: {reason}") from None
    defaults = {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
    own = {attribute.name: attribute for attribute in [*function.attribute_proto, *proto.attribute]}
    _bind(function.node, defaults | own)
    names = {formal: op.name(f"{label(node)}/{formal}") for formal in function.input}
    _rename(function.node, names, lambda name: op.name(f"{label(node)}/{name}"))
    body = onnx.GraphProto(name="body", node=function.node)
    body.input.extend(onnx.ValueInfoProto(name=names[formal]) for formal in function.input)
    made = [names.get(formal) for formal in function.output]  # an optional output may not be computed at all
    body.output.extend(onnx.ValueInfoProto(name=name) for name in made if name)
    inside = ir.serde.deserialize_graph(body)
    results = {value.name: value for value in inside.outputs}
    inside.outputs.clear()
    for i, formal in enumerate(list(inside.inputs)):
        actual = node.inputs[i] if i < len(node.inputs) else None
        for user, index in list(formal.uses()):
            user.replace_input_with(index, actual)
    nodes = list(inside)
    inside.remove(nodes)
    for value in (value for inner in nodes for value in inner.inputs if value is not None):
        if value.producer() is None and value not in node.inputs:
            raise Step(node).refuse(f"the standard's definition of it does not fit this node: it reads '{value.name}'")
    op.nodes.extend(nodes)
    return [results.get(name) for name in made]


def _bind(nodes: Iterable[onnx.NodeProto], attributes: dict[str, onnx.AttributeProto]) -> None:
    """Gives the attributes that refer to the outer node's its values; one that it lacks is left out."""
    for node in nodes:
        for attribute in list(node.attribute):
            _bind(attribute.g.node, attributes)
            if not attribute.ref_attr_name:
                continue
            name, outer = attribute.name, attributes.get(attribute.ref_attr_name)
            node.attribute.remove(attribute)
            if outer is not None:
                bound = node.attribute.add()
                bound.CopyFrom(outer)
                bound.name = name


def _rename(nodes: Iterable[onnx.NodeProto], names: dict[str, str], fresh: Callable[[str], str]) -> None:
    """Gives every node and tensor of a body, and of the bodies in it, a name of its own; `names` learns them."""
    for node in nodes:
        node.name = fresh(node.op_type)
        for attribute in node.attribute:
            inner = dict(names)
            for value in attribute.g.input:
                inner[value.name] = value.name = fresh(value.name)
            _rename(attribute.g.node, inner, fresh)
            for value in attribute.g.output:
                value.name = inner[value.name]
        node.input[:] = [names.get(name, name) for name in node.input]
        names |= {name: fresh(name) for name in node.output if name}
        node.output[:] = [names[name] if name else "" for name in node.output]


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    if value.type is not None:
        ir.serde.serialize_type_into(proto, value.type)
        if value.shape is not None:
            ir.serde.serialize_shape_into(proto, value.shape)
        for dim in proto.tensor_type.shape.dim:  # exporters say -1 of a free dim; onnx ends the process on slicing that
            if dim.dim_value < 0:
                dim.Clear()
    return proto


def _infer(node: ir.Node) -> None:
    """Sets the types and, where they can be told, the shapes of a node's outputs."""
    schema, graph = _schema(node), node.graph
    if schema is None or graph is None or any(v is not None and v.type is None for v in node.inputs):
        return
    values = {value.name or "": value for value in node.inputs if value is not None}
    constants = {name: constant_value(value) for name, value in values.items()}
    data = {name: onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if array is not None}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    with contextlib.suppress(Exception):  # inference raises many kinds; the tensors behind the node are then not known
        types = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.to_proto(node),
            {name: _type_proto(value) for name, value in values.items()},
            data,
            opset_imports=opsets,
            ir_version=8,
        )
        for value in node.outputs:
            if (value.name or "") in types and not value.is_graph_output():
                value.type = ir.serde.deserialize_type_proto_for_type(types[value.name or ""])
                value.shape = ir.serde.deserialize_type_proto_for_shape(types[value.name or ""])
