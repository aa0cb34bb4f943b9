"""The gradient graph of onnxruntime-training, as a second builder beside `differentiate`.

That package differentiates a graph for training. Its makers ended it with 1.19.2, and what it writes loads in no stock
ONNX Runtime: `com.microsoft::ReluGrad`, `ConvGrad`, `MaxPoolGrad` and their like are operators of the training build
alone. Here its graph is read back node by node. The nodes that it writes for one forward node share a prefix:

- in standard operators: taken over as they are;
- with a private operator, or for an activation: written by our own tables instead, so that any rule meets any
  activation, and each profile has its spelling.

It has no gradient for many operators (BatchNormalization at inference, LRN, Sum, HardSwish...); each is an error that
names it. Python below 3.13, Linux: pip install 'onnxgbp[training-cpu]'.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from onnxgbp.activations import Activation
from onnxgbp.compare import extract
from onnxgbp.differentiate import pass_back
from onnxgbp.emit import Emit, dims_of
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError
from onnxgbp.installed import onnxruntime_distributions, onnxruntime_module
from onnxgbp.opset import opset_of
from onnxgbp.step import label

__all__ = ["NAME", "differentiate_by_training", "native_gradient"]

NAME = "ort-training"
_OLDEST, _NEWEST = 13, 21  # opsets: older ones it differentiates into operators of newer ones; 1.19.2 reads no newer
_IR = 10
_MISSING = re.compile(r"has not been registered: (\w+)")
_WHERE = re.compile(r".*(was false\.|INVALID_ARGUMENT :|ONNXRuntimeError\] :)")  # before what it says
# What its gradient of an operator reads besides the operator's first output.
_OUTPUTS = {"Dropout": 2, "LayerNormalization": 3}
_SEED, _WEIGHTED, _SCORE = "onnxgbp_seed", "onnxgbp_weighted", "onnxgbp_score"
_GRADIENT = re.compile(r"(.*)_grad(?:_\d+)?")  # of a tensor, or one of several that are summed


def differentiate_by_training(
    op: Emit,
    tensor: ir.Value,
    seed: ir.Value,
    wrt: Sequence[ir.Value],
    found: Mapping[ir.Node, Activation],
) -> dict[ir.Value, ir.Value]:
    """What `differentiate` does, by the graph of onnxruntime-training; arguments and result are the same.

    Raises:
        OnnxgbpError: the package is not installed, it cannot differentiate an operator, or what it wrote cannot be
            taken over.
    """
    if op.opset < _OLDEST:
        raise OpsetTooLowError(_OLDEST)
    nodes = {f"n{i}": node for i, node in enumerate(op.graph)}
    proto = native_gradient(_forward(op, tensor, wrt, nodes), tensor.name or "", [value.name or "" for value in wrt])
    made = _read(op, ir.from_proto(proto).graph, nodes, found, {f"{tensor.name}_grad": seed}, wrt)
    return {value: op.typed(made[f"{value.name}_grad"], value) for value in wrt}


def _forward(op: Emit, tensor: ir.Value, wrt: Sequence[ir.Value], nodes: Mapping[str, ir.Node]) -> onnx.ModelProto:
    """The part of the model between `wrt` and `tensor`, its nodes named so that their gradients can be told apart."""
    names = {node.outputs[0].name: name for name, node in nodes.items()}
    whole = ir.to_proto(ir.Model(op.graph, ir_version=_IR))
    typed = [*op.graph.inputs, *op.graph.initializers.values(), *(value for node in op.graph for value in node.outputs)]
    types = {value.name or "": int(value.dtype) for value in typed if value.dtype is not None}
    cut = extract(whole, types, [tensor.name or ""], stop={value.name or "" for value in wrt})
    for node in cut.graph.node:
        node.name = names[node.output[0]]
    shapes = {value.name: dims_of(value) for value in (*wrt, tensor)}
    for value in (*cut.graph.input, *cut.graph.output):
        if (dims := shapes.get(value.name)) is not None:
            known = [dim if isinstance(dim, int) else f"free_{i}" for i, dim in enumerate(dims)]
            known[:1] = [dims[0] or "batch"] if dims else []
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, types[value.name], known))
    return cut


def native_gradient(model: onnx.ModelProto, output: str, wrt: Sequence[str]) -> onnx.ModelProto:
    """The graph that onnxruntime-training makes of sum(seed * output), with an output `NAME_grad` for each of `wrt`.

    Args:
        model: opset 13 to 21, IR 10 at most; its nodes have names of their own.
        output: its explained output.
        wrt: inputs of it.

    Returns:
        The model, with one more input `onnxgbp_seed`; it runs in the training build alone.

    Raises:
        OnnxgbpError: the package is not installed, or cannot read or differentiate the model.
    """
    builder, options = _builder()
    if opset_of(model) > _NEWEST:
        raise OnnxgbpError(
            f"{NAME} reads opset {_NEWEST} at most, and the model has {opset_of(model)}: export it with an older one, "
            "or use --builder onnxgbp"
        )
    scored = onnx.ModelProto()
    scored.CopyFrom(model)
    for node in scored.graph.node:
        missing = range(len(node.output), 0 if node.domain else _OUTPUTS.get(node.op_type, 0))
        node.output.extend(f"{node.name}/{i}" for i in missing)
    (value,) = (value for value in scored.graph.output if value.name == output)
    seed = scored.graph.input.add()
    seed.CopyFrom(value)
    seed.name = _SEED
    scored.graph.node.append(onnx.helper.make_node("Mul", [output, _SEED], [_WEIGHTED], name="onnxgbp_mul"))
    scored.graph.node.append(onnx.helper.make_node("ReduceSum", [_WEIGHTED], [_SCORE], name="onnxgbp_sum", keepdims=0))
    kind = value.type.tensor_type.elem_type
    scored.graph.output.append(onnx.helper.make_tensor_value_info(_SCORE, kind, []))
    try:
        made = builder(scored.SerializeToString(), {_SCORE}, set(wrt), _SCORE, options)
        made.build()
        return onnx.load_from_string(made.get_model())
    except Exception as error:  # noqa: BLE001 - it raises RuntimeError and kinds of its own
        said = str(error).strip().splitlines() or [type(error).__name__]
        operator = _MISSING.search(said[0])
        reason = _WHERE.sub("", said[0]).strip() or said[0]
        what = f"has no gradient for {operator[1]}" if operator else f"stops: {reason}"
        raise OnnxgbpError(f"{NAME} {what}; use --builder onnxgbp") from None


def version() -> str:
    """Of the installed package, as `ort-training 1.19.2`.

    Raises:
        OnnxgbpError: there is none.
    """
    for name, number in onnxruntime_distributions().items():
        if name.startswith("onnxruntime-training"):
            return f"{NAME} {number}"
    raise OnnxgbpError(
        f"--builder {NAME} needs a package that is not installed: in an environment of its own, of a Python below 3.13 "
        "on Linux, pip install 'onnxgbp[training-cpu]'"
    )


def _builder() -> tuple[Any, Any]:
    """The class that builds, and options that keep it quiet."""
    version()
    options = onnxruntime_module().SessionOptions()
    options.log_severity_level = 4
    try:
        return importlib.import_module("onnxruntime.capi._pybind_state").GradientGraphBuilder, options
    except AttributeError:
        raise OnnxgbpError(
            f"{version()} has no GradientGraphBuilder: install 1.19.2, by 'onnxgbp[training-cpu]'"
        ) from None


def _read(
    op: Emit,
    graph: ir.Graph,
    nodes: Mapping[str, ir.Node],
    found: Mapping[ir.Node, Activation],
    given: Mapping[str, ir.Value],
    wrt: Sequence[ir.Value],
) -> dict[str, ir.Value]:
    """Writes the gradient part of their graph with our builder.

    Args:
        op: where the nodes go.
        graph: theirs, the forward pass included.
        nodes: our forward nodes, by the names that they have there.
        found: the recognised activations.
        given: gradients that are known, by their name there.
        wrt: what to stop at.

    Returns:
        Every tensor by its name there.
    """
    graph.sort()
    theirs = {node.name or "": node for node in graph}
    ours = [*op.graph.inputs, *op.graph.initializers.values(), *(value for node in op.graph for value in node.outputs)]
    made = {value.name or "": value for value in ours} | dict(given)
    for name, value in graph.initializers.items():
        if name not in made and value.const_value is not None:
            made[name] = op.constant(value.const_value.numpy())
    steps = _needed([node for node in graph if node.name not in nodes], made, {f"{value.name}_grad" for value in wrt})
    own = {name for name, scope in steps.items() if nodes.get(name) in found or not all(map(_is_standard, scope))}
    for node in graph:
        name = _scope(node)
        if node not in steps.get(name, ()) or all(value.name in made for value in node.outputs):
            continue
        if name not in own:
            op.scope = f"gradient/{label(nodes[name])}" if name in nodes else "gradient"
            inputs = [made[value.name or ""] if value is not None else None for value in node.inputs]
            attributes = {attribute.name: attribute.value for attribute in node.attributes.values()}
            results = op.several(len(node.outputs), node.op_type, *inputs, **attributes)
            for value, result in zip(node.outputs, results, strict=True):
                result.type = value.type or result.type
                made[value.name or ""] = result
            continue
        leaving = _leaving(steps[name])
        if any(value.name in leaving for value in node.outputs):
            if name not in nodes or name not in theirs:
                raise OnnxgbpError(f"{NAME} writes {node.op_type} for no node of the model; use --builder onnxgbp")
            made |= _by_our_tables(op, nodes[name], theirs[name], leaving, made, found)
    return made


def _scope(node: ir.Node) -> str:
    """The forward node that a node of theirs belongs to, or its own name."""
    return (node.name or "").partition("_Grad/")[0]


def _is_standard(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type)


def _needed(graph: Sequence[ir.Node], known: Mapping[str, ir.Value], wanted: set[str]) -> dict[str, list[ir.Node]]:
    """Those nodes, by scope, that make what is wanted of what is known."""
    steps: dict[str, list[ir.Node]] = {}
    for node in reversed(graph):
        if any(value.name in wanted and value.name not in known for value in node.outputs):
            wanted |= {value.name or "" for value in node.inputs if value is not None}
            steps.setdefault(_scope(node), []).append(node)
    return steps


def _leaving(scope: Sequence[ir.Node]) -> list[str]:
    """What a scope makes for others."""
    return [
        value.name or ""
        for node in scope
        for value in node.outputs
        if value.is_graph_output() or any(user not in scope for user in value.consumers())
    ]


def _by_our_tables(
    op: Emit,
    node: ir.Node,
    their: ir.Node,
    leaving: Sequence[str],
    made: Mapping[str, ir.Value],
    found: Mapping[ir.Node, Activation],
) -> dict[str, ir.Value]:
    """The gradients that a scope makes, by the names that they have there, written by the rule for its forward node."""
    dys = [made.get(f"{value.name}_grad") for value in their.outputs][: len(node.outputs)]
    names = [value.name if value is not None else None for value in their.inputs]
    places = {}
    for name in leaving:
        tensor = _GRADIENT.fullmatch(name)
        if tensor is None or tensor[1] not in names:
            raise OnnxgbpError(
                f"{NAME} makes '{name}' of node '{label(node)}', which our rule for {node.op_type} does not"
            )
        places[name] = names.index(tensor[1])
        names[places[name]] = None  # an operand that is read twice has a gradient for each
    op.scope = f"gradient/{label(node)}"
    active = {value for place in places.values() if (value := node.inputs[place]) is not None}
    pairs = list(pass_back(op, node, dys, found, active))
    result = {}
    for name, place in places.items():
        value = node.inputs[place]
        at = next((i for i, (tensor, _) in enumerate(pairs) if tensor is value), None)
        if at is None or value is None:
            raise OnnxgbpError(
                f"{NAME} differentiates the parts of {found[node].kind if node in found else node.op_type} (node "
                f"'{label(node)}') one by one, so that no rule can meet it as a whole; use --builder onnxgbp"
            )
        result[name] = op.typed(pairs.pop(at)[1], value)
    return result
