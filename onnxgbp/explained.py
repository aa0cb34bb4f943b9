"""The tensor that is explained: the one named, or the scores behind the last softmax."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Sequence

import onnx_ir as ir

from onnxgbp.differentiate import find_path
from onnxgbp.emit import is_float
from onnxgbp.errors import OnnxgbpError
from onnxgbp.step import label
from onnxgbp.vjps.classic import find_scores, hides_scores

__all__ = ["Explained", "explained_tensor", "find_tensor", "stripped_text"]

_SHOWN = 5

_SQUASHING = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})
_CARRIES_SCORES = frozenset(
    {"Identity", "Cast", "Reshape", "Squeeze", "Flatten", "ZipMap", "QuantizeLinear", "DequantizeLinear"}
)


@dataclasses.dataclass(frozen=True)
class Explained:
    """tensor: what is explained; output: the model's output that it belongs to; stripped: the nodes between them."""

    tensor: ir.Value
    output: ir.Value | None
    stripped: tuple[ir.Node, ...] = ()
    behind_relu: bool = False


def find_tensor(graph: ir.Graph, name: str, option: str) -> ir.Value:
    """A float tensor of the graph by its name, or by that of the node that makes it."""
    values = {label(node): node.outputs[0] for node in graph if node.outputs}
    values |= {value.name or "": value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    if name in graph.initializers and name not in values:
        raise OnnxgbpError(f"{option}: '{name}' is a weight of the model; name an input or an inner tensor")
    if name not in values:
        ends, which = (graph.inputs, "inputs") if option == "--wrt" else (graph.outputs, "outputs")
        near = difflib.get_close_matches(name, values, n=_SHOWN)
        near += [other for other in values if name.casefold() in other.casefold() and other not in near]
        there = f"there is {', '.join(map(repr, near[:_SHOWN]))}" if near else f"its {which} are {_names(ends)}"
        raise OnnxgbpError(f"{option}: the model has no tensor '{name}'; {there}")
    if not is_float(values[name]):
        raise OnnxgbpError(f"{option}: tensor '{name}' is not of a float type, so it has no gradient")
    return values[name]


def _names(values: Sequence[ir.Value]) -> str:
    return ", ".join(f"'{value.name}'" for value in values)


def explained_tensor(graph: ir.Graph, wrt: Sequence[ir.Value], name: str | None) -> Explained:
    """The tensor to explain: the one named, or the logits behind the one output that depends on the input.

    A last Softmax, LogSoftmax or Sigmoid is walked back over, as is what only carries its result (Identity, Cast,
    Reshape, Squeeze): the rules are not linear in the seed, so it would change the picture.

    Raises:
        OnnxgbpError: no such tensor, no such output, or more than one.
    """
    if name is not None:
        tensor = find_tensor(graph, name, "--output")
        output = tensor if tensor.is_graph_output() else None
        return Explained(tensor, output, behind_relu=_made_by_relu(tensor))
    candidates: dict[ir.Value, Explained] = {}
    for output in graph.outputs:
        scores = _behind_squashing(output)
        if (scores.tensor.dtype is None or is_float(scores.tensor)) and find_path(graph, scores.tensor, wrt):
            candidates.setdefault(scores.tensor, scores)
    if not candidates:
        raise OnnxgbpError(
            f"no output depends on {_names(wrt)} through float tensors; name the tensor to explain with --output"
        )
    if len(candidates) > 1:
        outputs = [scores.output for scores in candidates.values() if scores.output is not None]
        raise OnnxgbpError(f"ambiguous output: {_names(outputs)} could all be explained; choose one with --output")
    return next(iter(candidates.values()))


def _walk_back(value: ir.Value, over: Collection[str]) -> tuple[ir.Value, list[ir.Node]]:
    """The tensor behind those nodes, and the nodes."""
    passed = list[ir.Node]()
    while (node := value.producer()) is not None and node.op_type in over and node.inputs:
        if node.inputs[0] is None:
            break
        passed.append(node)
        value = node.inputs[0]
    return value, passed


def _behind_squashing(output: ir.Value) -> Explained:
    # scikit-learn's classifier squashes by itself, and a Normalizer may make its probabilities add up to 1.
    value, stripped = _walk_back(output, {*_CARRIES_SCORES, "Normalizer"})
    node = value.producer()
    if node is not None and hides_scores(node) and value in node.outputs[1:] and node.graph is not None:
        scores = find_scores(node.graph, node)
        if scores is not None:
            return Explained(scores, output, (*stripped, node))
    value, stripped = _walk_back(output, _CARRIES_SCORES)
    node = value.producer()
    if node is not None and node.domain == "" and node.op_type in _SQUASHING and node.inputs[0] is not None:
        return Explained(node.inputs[0], output, (*stripped, node), _made_by_relu(node.inputs[0]))
    if stripped and stripped[-1].op_type == "ZipMap":  # a list of maps: the tensor before it is what it shows
        return Explained(value, output, tuple(stripped), _made_by_relu(value))
    return Explained(output, output, behind_relu=_made_by_relu(output))


def _made_by_relu(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.domain == "" and node.op_type == "Relu"


def stripped_text(explained: Explained) -> str:
    """One line on what was walked back over, or ''."""
    if not explained.stripped or explained.output is None:
        return ""
    nodes = ", ".join(f"{node.op_type} '{label(node)}'" for node in explained.stripped)
    return f"explaining '{explained.tensor.name}', the scores before {nodes} of output '{explained.output.name}'"
