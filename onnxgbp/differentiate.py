"""The reverse sweep: from the gradient of one tensor to the gradients of others, node by node.

Every step writes new nodes behind the forward graph and changes none of it. An activation's step is left as one marked
call `Activation(x, y, dy)` that `rules.install` replaces; so one gradient graph serves every attribution rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxgbp.activations import Activation
from onnxgbp.branches import captured
from onnxgbp.broadcast import unbroadcast
from onnxgbp.emit import Emit, dims_of, is_float
from onnxgbp.errors import OnnxgbpError
from onnxgbp.quantisation import carries_integers
from onnxgbp.step import Step, label, trusting
from onnxgbp.vjps import REFUSED, VJPS, ZERO_GRADIENT, Entry

__all__ = ["Path", "backpropagate", "differentiate", "find_path", "missing_rules", "pass_back", "refuse_missing"]

Path = list[ir.Node]


def find_path(graph: ir.Graph, tensor: ir.Value | Iterable[ir.Value], wrt: Iterable[ir.Value]) -> Path:
    """The nodes that carry a gradient from a tensor, or several, back to one of `wrt`, in the forward order."""
    active = set(wrt)
    forward = []
    for node in graph:
        if _key(node) in ZERO_GRADIENT or not any(value in active for value in _read(node)):
            continue
        forward.append(node)
        active.update(v for v in node.outputs if v.dtype is None or is_float(v) or carries_integers(node, v))
    needed, path = {tensor} if isinstance(tensor, ir.Value) else set(tensor), []
    for node in reversed(forward):
        if any(value in needed for value in node.outputs):
            path.append(node)
            needed.update(value for value in _read(node) if value in active)
    return path[::-1]


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node reads, what the bodies of its control flow read from outside included."""
    values = [value for value in node.inputs if value is not None]
    return values + captured(node)


def missing_rules(path: Path, tensor: ir.Value, found: Mapping[ir.Node, Activation]) -> list[ir.Node]:
    """The nodes that a gradient reaches and no rule differentiates; the parts of an activation's group need none."""
    reached, missing = {tensor}, []
    for node in reversed(path):
        if not any(value in reached for value in node.outputs):
            continue
        reached.update([found[node].x] if node in found else _read(node))
        if node not in found and (_key(node) not in VJPS or _reads_integers(node)):
            missing.append(node)
    return missing[::-1]


def refuse_missing(
    graph: ir.Graph, tensor: ir.Value, wrt: Sequence[ir.Value], found: Mapping[ir.Node, Activation]
) -> None:
    """Raises the error for the first operator on the path that has no rule."""
    for node in missing_rules(find_path(graph, tensor, wrt), tensor, found):
        _entry(Step(node))


def differentiate(
    op: Emit,
    tensor: ir.Value,
    seed: ir.Value,
    wrt: Sequence[ir.Value],
    found: Mapping[ir.Node, Activation],
) -> dict[ir.Value, ir.Value]:
    """Writes the gradient of `sum(seed * tensor)` with respect to each tensor of `wrt`.

    Args:
        op: where the nodes go; the caller places them behind the forward graph.
        tensor: the explained tensor, any float tensor of the graph.
        seed: the gradient that arrives at it, of its shape and type.
        wrt: float tensors of the graph.
        found: the recognised activations.

    Returns:
        The gradient of each of `wrt`, of its shape and type.

    Raises:
        OnnxgbpError: an operator on the path has no rule, or a tensor of `wrt` does not reach `tensor`.
    """
    result = backpropagate(op, op.graph, {tensor: seed}, wrt, found)
    for value, gradient in result.items():
        if gradient is None:
            raise OnnxgbpError(
                f"no gradient reaches '{value.name}' from '{tensor.name}': no differentiable path connects them; "
                "choose other tensors with --wrt or --output"
            )
    return {value: gradient for value, gradient in result.items() if gradient is not None}


def backpropagate(
    op: Emit,
    graph: ir.Graph,
    seeds: Mapping[ir.Value, ir.Value],
    wrt: Collection[ir.Value],
    found: Mapping[ir.Node, Activation],
) -> dict[ir.Value, ir.Value | None]:
    """The sweep itself, over a graph or a sub-graph: the gradient of each of `wrt`, None where none arrives."""
    path = find_path(graph, seeds, wrt)
    active = set(wrt) | {value for node in path for value in node.outputs}
    gradients: dict[ir.Value, list[ir.Value]] = {value: [seed] for value, seed in seeds.items()}
    for node in reversed(path):
        dys = [_total(op, gradients, value) for value in node.outputs]
        if all(dy is None for dy in dys):
            continue  # inside an activation's group, or read by nothing that carries a gradient
        op.scope = f"gradient/{label(node)}"
        with trusting(label(node)):
            for value, dx in pass_back(op, node, dys, found, active):
                gradients.setdefault(value, []).append(_typed(op, dx, value))
    op.scope = "gradient"
    return {value: _total(op, gradients, value) for value in wrt}


def pass_back(
    op: Emit,
    node: ir.Node,
    dys: Sequence[ir.Value | None],
    found: Mapping[ir.Node, Activation],
    active: set[ir.Value],
) -> Iterable[tuple[ir.Value, ir.Value]]:
    """The gradients that one node passes to those of its inputs that lead to `wrt`."""
    step = Step(node, dys)
    _refuse_untyped(step)
    if node in found:
        activation = found[node]
        tensors = [argument for argument in activation.arguments.values() if isinstance(argument, ir.Value)]
        call = op.private(
            "Activation", activation.x, activation.y, step.dy, *tensors, like=activation.x, activation=activation
        )
        yield activation.x, call
        if active.isdisjoint(tensors):
            return
        # A bound that is computed from the explained input is no activation's x: its own gradient is the plain one.
        if node.op_type != "Clip":
            raise step.refuse("its slope depends on the explained input, for which there is no rule")
    entry = _entry(step)
    if entry.together is not None:
        yield from entry.together(op, step, active)
        return
    for index, value in enumerate(node.inputs):
        if value is None or value not in active or (node in found and value is found[node].x):
            continue
        dx = entry.vjp(op, step, index)
        if dx is not None:
            yield value, unbroadcast(op, dx, dims_of(step.y), value) if entry.broadcasts else dx


def _entry(step: Step) -> Entry:
    entry = VJPS.get(_key(step.node))
    if _key(step.node) in REFUSED:
        raise step.refuse(REFUSED[_key(step.node)])
    if _reads_integers(step.node):
        raise step.refuse("it reads quantised integers; quantise the model in the QDQ format (QuantFormat.QDQ) instead")
    if entry is None:
        _refuse_untyped(step)  # an activation without types is none that could be recognised
        domain = f" of domain '{step.node.domain}'" if step.node.domain else ""
        raise OnnxgbpError(
            f"operator {step.node.op_type}{domain} (node '{label(step.node)}') has no gradient rule; explain a tensor "
            f"before it with --output, or attribute to a tensor behind it with --wrt {step.y.name}"
        )
    return entry


def _refuse_untyped(step: Step) -> None:
    for value in step.node.inputs:
        if value is not None and value.dtype is None:
            raise step.refuse(f"the type of tensor '{value.name}' is not known; is the model valid up to there?")


def _key(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _reads_integers(node: ir.Node) -> bool:
    """Whether a node computes with the integers of a quantised tensor; to clip them is part of the quantiser."""
    makers = ((value.producer(), value) for value in node.inputs if value is not None)
    return _key(node) not in ("DequantizeLinear", "Clip") and any(
        maker and carries_integers(maker, v) for maker, v in makers
    )


def _typed(op: Emit, gradient: ir.Value, like: ir.Value) -> ir.Value:
    """The gradient of integers is that of the real numbers for which they stand, and of their type."""
    return op.typed(gradient, like) if like.dtype is None or is_float(like) else gradient


def _total(op: Emit, gradients: Mapping[ir.Value, list[ir.Value]], value: ir.Value) -> ir.Value | None:
    """The sum of what arrives; it is kept, since a tensor of `wrt` may lie in the middle of the path."""
    parts = gradients.get(value)
    if not parts:
        return None
    while len(parts) > 1:
        first, second = parts.pop(0), parts.pop(0)
        parts.insert(0, _typed(op, op.Add(first, second), value))
    return parts[0]
