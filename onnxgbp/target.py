"""What is explained: the score tensor behind the last softmax, the unit of it, and the seed of the reverse sweep."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgbp.differentiate import find_path
from onnxgbp.emit import Emit, dims_of, is_float
from onnxgbp.errors import OnnxgbpError
from onnxgbp.step import label

__all__ = [
    "Explained",
    "Seed",
    "explained_tensor",
    "make_seed",
    "parse_class",
    "parse_target",
    "parse_unit",
    "wrt_tensors",
]

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


@dataclasses.dataclass(frozen=True)
class Seed:
    """seed: the gradient at the explained tensor; target: int64 [N], the class or unit; input: the new one, if any."""

    seed: ir.Value
    target: ir.Value
    input: ir.Value | None = None


def parse_target(target: str | int) -> str | int:
    """`argmax`, `input`, `seed`, or a class index.

    Raises:
        OnnxgbpError: anything else.
    """
    if isinstance(target, str) and target in ("argmax", "input", "seed"):
        return target
    try:
        if isinstance(target, bool):
            raise TypeError
        return int(target) if isinstance(target, str) else operator.index(target)
    except (ValueError, TypeError):
        raise OnnxgbpError(f"target '{target}' is none of argmax, input, seed or a class index") from None


def parse_class(target: str | int) -> int | None:
    """`argmax` (None) or a class index, for a command that runs the model itself.

    Raises:
        OnnxgbpError: anything else.
    """
    parsed = parse_target(target)
    if parsed in ("input", "seed"):
        raise OnnxgbpError(f"target '{parsed}' is for a converted file that others feed; give argmax or a class index")
    return None if isinstance(parsed, str) else parsed


def parse_unit(unit: str | int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Indices into the axes behind the batch: `3` is channel 3, `3,7,7` one position of it.

    Raises:
        OnnxgbpError: something that is not an int.
    """
    if unit is None:
        return None
    parts: Sequence[str | int] = unit.split(",") if isinstance(unit, str) else [unit] if isinstance(unit, int) else unit
    try:
        return tuple(int(part) if isinstance(part, str) else operator.index(part) for part in parts)
    except (ValueError, TypeError):
        raise OnnxgbpError(f"unit '{unit}' is not a list of integers such as 3 or 3,7,7") from None


def find_tensor(graph: ir.Graph, name: str, option: str) -> ir.Value:
    """A float tensor of the graph by name."""
    values = {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    if name in graph.initializers and name not in values:
        raise OnnxgbpError(f"{option}: '{name}' is a weight of the model; name an input or an inner tensor")
    if name not in values:
        ends, which = (graph.outputs, "outputs") if option == "--output" else (graph.inputs, "inputs")
        raise OnnxgbpError(f"{option}: the model has no tensor '{name}'; its {which} are {_names(ends)}")
    if not is_float(values[name]):
        raise OnnxgbpError(f"{option}: tensor '{name}' is not of a float type, so it has no gradient")
    return values[name]


def _names(values: Sequence[ir.Value]) -> str:
    return ", ".join(f"'{value.name}'" for value in values)


def wrt_tensors(graph: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
    """The tensors to attribute to: those named, or else every float input.

    Raises:
        OnnxgbpError: no such tensor, or no float input.
    """
    if names:
        return [find_tensor(graph, name, "--wrt") for name in dict.fromkeys(names)]
    inputs = [value for value in graph.inputs if not value.is_initializer() and is_float(value)]
    if not inputs:
        first = next(
            (node.outputs[0] for node in graph if is_float(node.outputs[0]) and node.op_type in ("Gather", "Cast")),
            None,
        )
        hint = f", for instance --wrt {first.name}" if first is not None else ""
        raise OnnxgbpError(f"the model has no float input to attribute to; name an inner float tensor{hint}")
    return inputs


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


def _behind_squashing(output: ir.Value) -> Explained:
    value, stripped = output, list[ir.Node]()
    while (node := value.producer()) is not None and node.op_type in _CARRIES_SCORES and node.inputs:
        if node.inputs[0] is None:
            break
        stripped.append(node)
        value = node.inputs[0]
    if node is not None and node.domain == "" and node.op_type in _SQUASHING and node.inputs[0] is not None:
        return Explained(node.inputs[0], output, (*stripped, node), _made_by_relu(node.inputs[0]))
    if stripped and stripped[-1].op_type == "ZipMap":  # a list of maps: the tensor before it is what it shows
        return Explained(value, output, tuple(stripped), _made_by_relu(value))
    return Explained(output, output, behind_relu=_made_by_relu(output))


def _made_by_relu(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.domain == "" and node.op_type == "Relu"


def make_seed(op: Emit, explained: Explained, target: str | int, unit: tuple[int, ...] | None) -> Seed:
    """Writes the seed, 1 at the target unit of each sample and 0 elsewhere, in the shape of the explained tensor.

    Raises:
        OnnxgbpError: the tensor has no class axis, or the class or unit is out of range.
    """
    tensor = explained.tensor
    op.scope = "target"
    dims = dims_of(tensor)
    if dims is None:
        raise OnnxgbpError(
            f"the rank of the explained tensor '{tensor.name}' is not known; export the model with shapes"
        )
    if unit is not None and target != "argmax":
        raise OnnxgbpError("unit and target exclude each other: a unit is the target of an inner tensor")
    if target == "seed":
        return _given_seed(op, tensor)
    if unit is not None:
        return _one_unit(op, tensor, unit)
    if len(dims) < 2 or any(dim != 1 for dim in dims[2:]):
        shape = ", ".join(str(dim or "?") for dim in dims)
        raise OnnxgbpError(
            f"the explained tensor '{tensor.name}' has shape [{shape}], not [N, classes]; choose a unit with --unit, "
            "weigh it with --target seed, or explain another tensor with --output"
        )
    return _one_class(op, tensor, target)


def _given_seed(op: Emit, tensor: ir.Value) -> Seed:
    seed = _new_input(op, "seed", tensor)
    dims = dims_of(tensor) or ()
    if len(dims) < 2:  # no class axis
        count = op.dim(tensor, 0) if dims else op.int64([1])
        return Seed(seed, op.Expand(op.int64([-1]), count), seed)
    # The class is the one with the largest weight, the nearest thing to "what was explained" that one number can tell.
    weights = op.Reshape(seed, [0, -1])
    return Seed(seed, op.ArgMax(weights, axis=1, keepdims=0), seed)


def _one_unit(op: Emit, tensor: ir.Value, unit: tuple[int, ...]) -> Seed:
    """A unit: a channel (all of its positions), or a channel and a position."""
    dims = dims_of(tensor) or ()
    if not unit or len(unit) > len(dims) - 1:
        raise OnnxgbpError(
            f"unit {','.join(map(str, unit))} has {len(unit)} indices, but tensor '{tensor.name}' has {len(dims) - 1} "
            "axes behind the batch"
        )
    mask: ir.Value | None = None
    for axis, index in enumerate(unit, start=1):
        size = dims[axis]
        if index < 0 or (isinstance(size, int) and index >= size):
            raise OnnxgbpError(
                f"unit index {index} is out of range: axis {axis} of tensor '{tensor.name}' has {size or '?'} entries"
            )
        here = op.Equal(op.positions(tensor, axis), op.int64(index))
        mask = here if mask is None else op.And(mask, here)
    assert mask is not None  # unit is not empty
    one_hot = op.cast_like(mask, tensor)
    seed = op.typed(op.Expand(one_hot, op.shape(tensor)), tensor)
    return Seed(seed, op.Expand(op.int64([unit[0]]), op.dim(tensor, 0)))


def _one_class(op: Emit, tensor: ir.Value, target: str | int) -> Seed:
    dims = dims_of(tensor) or ()
    classes, trivial = dims[1], [1] * (len(dims) - 2)
    column = [-1, 1, *trivial]  # the shape [N, 1, ...] of one class per sample
    given = None
    if isinstance(target, int) and isinstance(classes, int) and 0 <= target < classes:
        row = op.like(np.eye(1, classes, target).reshape(1, classes, *trivial), tensor)
        seed = op.typed(op.Expand(row, op.shape(tensor)), tensor)
        return Seed(seed, _strongest(op, seed))
    strongest = _strongest(op, tensor)
    if target == "argmax":
        chosen = strongest
    elif target == "input":
        given = _new_input(op, "target", strongest, dims[0])
        chosen = op.Where(op.Equal(given, op.int64(-1)), strongest, given)
    else:
        if int(target) < 0 or (isinstance(classes, int) and int(target) >= classes):
            raise OnnxgbpError(
                f"target {target} is out of range: tensor '{tensor.name}' has {classes} classes, 0 to {_last(classes)}"
            )
        chosen = op.Expand(op.int64([int(target)]), op.dim(tensor, 0))
    one_hot = op.Equal(op.positions(tensor, 1), op.Reshape(chosen, column))
    seed = op.typed(op.cast_like(one_hot, tensor), tensor)
    if given is not None:
        # A class out of range must not end in a blank map: this look-up fails on it where a runtime checks indices.
        # Below -1 an index would count from the end, so it is sent out of range too.
        count = op.dim(tensor, 1)
        safe = op.Where(op.Less(chosen, op.int64(0)), count, chosen)
        static = op.int64(list(range(classes))) if isinstance(classes, int) else None
        chosen = op.Gather(op.Reshape(op.positions(tensor, 1), [-1]) if static is None else static, safe, axis=0)
    return Seed(seed, chosen, given)


def _strongest(op: Emit, scores: ir.Value) -> ir.Value:
    """The class with the highest score of each sample, int64 [N]."""
    if len(dims_of(scores) or ()) == 2:
        return op.ArgMax(scores, axis=1, keepdims=0)
    return op.Reshape(op.ArgMax(scores, axis=1), [-1])


def _last(classes: int | str | None) -> str:
    return str(classes - 1) if isinstance(classes, int) else "?"


def _new_input(op: Emit, name: str, like: ir.Value, batch: int | str | None = None) -> ir.Value:
    value = ir.val(op.claim(name), dtype=like.dtype, shape=like.shape if name == "seed" else ir.Shape([batch]))
    op.graph.inputs.append(value)
    return value


def stripped_text(explained: Explained) -> str:
    """One line on what was walked back over, or ''."""
    if not explained.stripped or explained.output is None:
        return ""
    nodes = ", ".join(f"{node.op_type} '{label(node)}'" for node in explained.stripped)
    return f"explaining '{explained.tensor.name}', the scores before {nodes} of output '{explained.output.name}'"
