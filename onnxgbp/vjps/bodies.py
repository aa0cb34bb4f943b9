"""The body of an If, Scan or Loop, copied into the gradient: a graph of its own, typed, swept through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from onnxgbp.branches import captured
from onnxgbp.constants import constant_value
from onnxgbp.emit import Emit, dims_of
from onnxgbp.recognise import recognise
from onnxgbp.shapes import infer_shapes
from onnxgbp.step import Step, label

__all__ = ["copied", "gradients", "or_zeros"]


def or_zeros(op: Emit, gradient: ir.Value | None, like: ir.Value) -> ir.Value:
    return op.typed(gradient, like) if gradient is not None else op.zeros_like(like)


def gradients(
    op: Emit,
    s: Step,
    body: ir.Graph,
    arguments: Sequence[ir.Value],
    seeds: Mapping[int, ir.Value | None],
    wrt: Sequence[ir.Value],
) -> list[tuple[ir.Value | None, ir.Value]]:
    """Writes a copy of a body and the sweep through it; `seeds` arrive at its outputs, by their place."""
    from onnxgbp.differentiate import backpropagate  # which reads the tables, this one among them

    scope, before = op.scope, op.take()
    copy, outputs = _copy(op, s, body, arguments)
    starts: dict[ir.Value, ir.Value] = {}
    for place, seed in seeds.items():
        if seed is not None:
            value = outputs[place]
            starts[value] = op.Add(starts[value], seed) if value in starts else seed
    found = backpropagate(op, copy, starts, wrt, recognise(copy))
    op.nodes = [*before, *_taken(copy), *op.nodes]
    op.scope = scope
    return [(found[value], value) for value in wrt]


def copied(op: Emit, s: Step, body: ir.Graph, arguments: Sequence[ir.Value]) -> list[ir.Value]:
    """Writes a copy of a body, and gives its outputs."""
    copy, outputs = _copy(op, s, body, arguments)
    op.nodes += _taken(copy)
    return outputs


def _taken(graph: ir.Graph) -> list[ir.Node]:
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes


def _copy(op: Emit, s: Step, body: ir.Graph, arguments: Sequence[ir.Value]) -> tuple[ir.Graph, list[ir.Value]]:
    """A body as a graph of its own, with the arguments in place of its inputs, and with types and shapes."""
    try:
        copy = body.clone(allow_outer_scope_values=True)
    except RuntimeError:  # an output that no node of the body makes
        raise s.refuse("an output of its body is handed through from outside") from None
    copy.opset_imports.update(op.graph.opset_imports)
    copy.meta.update(op.graph.meta)
    for node in copy.all_nodes():
        node.meta["inside"] = label(s.node)  # for the audit
        given = node.attributes.get("value") if node.op_type == "Constant" else None
        tensor = given.as_tensor() if given is not None else None
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            # The tensor is the original's, which would take the copy's name.
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy(), dtype=tensor.dtype))
            node.outputs[0].const_value = None
    for scope in (copy, *copy.subgraphs()):
        for value in (*scope.inputs, *(value for node in scope for value in node.outputs)):
            value.name = op.name(f"{op.scope}/{value.name}") if value.name else value.name
    for key, value in list(copy.initializers.items()):
        del copy.initializers[key]
        if value.const_value is not None:
            shared = op.constant(value.const_value.numpy(), value.dtype)
            value.replace_all_uses_with(shared)
    places = dict(zip(copy.inputs, arguments, strict=True))
    outputs = [places.get(value, value) for value in copy.outputs]
    copy.outputs[:] = [value for value in dict.fromkeys(outputs) if value.producer() is not None]
    copy.inputs.clear()
    for value, argument in places.items():
        value.replace_all_uses_with(argument)
    _infer(copy, op.scope)
    for original, value in zip(body.outputs, outputs, strict=True):
        if value.dtype is None:
            raise s.refuse(f"the type of tensor '{original.name}' in its body is not known")
    return copy, outputs


def _infer(copy: ir.Graph, scope: str) -> None:
    """Types and shapes of a sub-graph's tensors, as of a model whose inputs are what it reads from outside."""
    made = {value for node in copy for value in node.outputs}
    read = {value: None for node in copy for value in node.inputs if value is not None and value not in made}
    read |= {value: None for node in copy for value in captured(node) if value not in made}
    inputs, constants, symbols = [], [], set[str]()
    for value in read:
        known = constant_value(value)
        if known is not None:
            constants.append(onnx.numpy_helper.from_array(known, value.name))
            continue
        dims = dims_of(value)
        if dims is not None:
            dims = tuple(f"{value.name}.{i}" if dim is None else dim for i, dim in enumerate(dims))
            symbols |= {dim for dim in dims if isinstance(dim, str)}
        inputs.append(onnx.helper.make_tensor_value_info(value.name or "", int(value.dtype or 0), dims))
    graph = onnx.helper.make_graph([ir.to_proto(node) for node in copy], "body", inputs, [], constants)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in copy.opset_imports.items()]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets))
    model.graph.meta.update(copy.meta)
    infer_shapes(model)
    known_types = {value.name: value for node in model.graph for value in node.outputs}
    for value in made:
        inferred = known_types.get(value.name)
        if inferred is None:
            continue
        value.type, value.shape = inferred.type, inferred.shape
        dims = dims_of(value)
        if dims is not None:  # a symbol that was made up here could mean another size outside
            value.shape = ir.Shape([f"{scope}:{d}" if isinstance(d, str) and d not in symbols else d for d in dims])
