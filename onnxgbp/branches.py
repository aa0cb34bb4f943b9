"""An `If` whose condition is known before the model runs is no choice: the branch that is taken takes its place.

Exporters wrap single steps in an `If` (a squeeze, where a dim might not be 1), or the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from onnxgbp.constants import constant_value

__all__ = ["captured", "detach", "inline_constant_ifs", "lift_initializers", "loop_states"]


def inline_constant_ifs(model: ir.Model) -> bool:
    """Puts the taken branch of every such `If` in its place; names of nodes and outputs stay.

    A condition may hang on shapes, so that this comes behind their inference; and what it puts into the graph has
    shapes to infer in turn.

    Returns:
        Whether there was any: then shapes are to be inferred again, and there may be more.
    """
    graph = model.graph
    known = [(node, taken) for node in graph if (taken := _taken(node)) is not None]
    for node, taken in known:
        _inline(graph, node, taken)
    if known:
        for value in (value for node in graph for value in node.outputs):
            value.meta.pop("constant", None)  # what was unknown before may be known now
    return bool(known)


def lift_initializers(model: ir.Model) -> None:
    """Moves the weights of sub-graphs to the graph itself, where a gradient's copies of a body share them."""
    graph = model.graph
    if int(graph.meta["ir_version"]) < 4:
        return  # there each initializer must also be a graph input, and the inputs are to stay the source's
    scopes = [graph, *graph.subgraphs()]
    names = Counter[str | None](value.name for scope in scopes for node in scope for value in node.outputs)
    names.update(name for scope in scopes for name in {*scope.initializers, *(value.name for value in scope.inputs)})
    for body in scopes[1:]:
        for key, value in list(body.initializers.items()):
            if value.is_graph_input() or value.is_graph_output():
                continue
            del body.initializers[key]
            if names[key] > 1:
                value.name = _free(key, names)
            graph.register_initializer(value)


def captured(node: ir.Node) -> list[ir.Value]:
    """What the bodies of a node's control flow read from outside of it."""
    inside: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        if attribute.type != ir.AttributeType.GRAPH:
            continue
        body = attribute.as_graph()
        for scope in (body, *body.subgraphs()):
            inside.update(scope.inputs, scope.initializers.values(), *(inner.outputs for inner in scope))
            read.update((value, None) for inner in scope for value in inner.inputs if value is not None)
    return [value for value in read if value not in inside]


def detach(graph: ir.Graph) -> None:
    """Ends what the nodes of a sub-graph that is given up read, else what they captured counts as used for ever."""
    for node in graph.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _taken(node: ir.Node) -> ir.Graph | None:
    if node.domain or node.op_type != "If":
        return None
    condition = constant_value(node.inputs[0])
    if condition is None or condition.size != 1:
        return None
    return node.attributes["then_branch" if condition.item() else "else_branch"].as_graph()


def _inline(graph: ir.Graph, choice: ir.Node, branch: ir.Graph) -> None:
    names = Counter[str | None](value.name for node in graph for value in node.outputs)
    names.update([*graph.initializers, *(value.name for value in graph.inputs)])
    results, nodes, made = list(branch.outputs), list(branch), set(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    for key, value in list(branch.initializers.items()):
        del branch.initializers[key]
        value.name = _free(key, names)
        if int(graph.meta["ir_version"]) >= 4:
            graph.register_initializer(value)
            continue
        # Up to IR 3 each initializer must also be a graph input, and the inputs are to stay the source's.
        assert value.const_value is not None  # an initializer has a value
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], name=value.name)
        value.replace_all_uses_with(constant.outputs[0])
        results = [constant.outputs[0] if result is value else result for result in results]
        constant.outputs[0].name = value.name
        graph.insert_before(choice, constant)
    for node in nodes:
        for value in node.outputs:
            if value.name:
                value.name = _free(value.name, names)
    graph.insert_before(choice, nodes)
    for output, result in zip(choice.outputs, results, strict=True):
        source = result
        if result.producer() not in made or results.count(result) > 1:
            # Made outside the branch, or handed out twice: a tensor has one name, so this one gets its own node.
            copy = ir.Node("", "Identity", [result], name=_free(f"{output.name}/Identity", names))
            graph.insert_before(choice, copy)
            source = copy.outputs[0]
        name, output.name = output.name, None
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        source.name = name
    for attribute in choice.attributes.values():
        detach(attribute.as_graph())
    graph.remove(choice, safe=True)


def _free(name: str, names: Counter[str | None]) -> str:
    """The name, or one like it where it is taken; either is then."""
    free, number = name, 0
    while names[free]:
        number += 1
        free = f"{name}_{number}"
    names[free] += 1
    return free


def loop_states(
    node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], opsets: Sequence[onnx.OperatorSetIdProto]
) -> dict[str, onnx.TypeProto]:
    """The types of a Loop's last states, where the body hands each on in the shape in which it got it.

    onnx itself gives them no shape, since a body may change it. Here the body is typed as the branch of an `If`, with
    the first states in place of its inputs.
    """
    body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
    branch = onnx.GraphProto()
    branch.CopyFrom(body)
    branch.ClearField("input")
    for output in branch.output:
        output.ClearField("type")
    number, going = (onnx.helper.make_tensor_type_proto(t, []) for t in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL))
    if len(body.input) < 2 or any(name not in types for name in node.input[2:]):
        return {}
    initial = [types[name] for name in node.input[2:]]
    scope = {**types, **dict(zip((v.name for v in body.input), (number, going, *initial), strict=False))}
    names = [f"{place}" for place in range(len(body.output))]
    choice = onnx.helper.make_node("If", [body.input[1].name], names, then_branch=branch, else_branch=branch)
    version = next((opset.version for opset in opsets if opset.domain == ""), 1)
    try:
        made = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema("If", version, ""), choice, scope, opset_imports=list(opsets), ir_version=8
        )
    except Exception:  # noqa: BLE001 - inference raises many kinds; the states are then not known
        return {}
    pairs = zip(node.output, initial, names[1:], strict=False)
    return {output: first for output, first, name in pairs if output and made.get(name) == first}
