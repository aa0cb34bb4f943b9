"""An `If` whose condition is known before the model runs is no choice: the branch that is taken takes its place.

Exporters wrap single steps in an `If` (a squeeze, where a dim might not be 1), or the whole model.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgbp.constants import constant_value

__all__ = ["detach", "inline_constant_ifs"]


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
    names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    names |= {value.name for value in graph.inputs}
    results, nodes, made = list(branch.outputs), list(branch), set(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        value.name = _free(name, names)
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


def _free(name: str, names: set[str | None]) -> str:
    """The name, or one like it where two branches had the same."""
    free, number = name, 0
    while free in names:
        number += 1
        free = f"{name}_{number}"
    names.add(free)
    return free
