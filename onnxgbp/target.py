"""What is explained: the score tensor behind the last softmax, the unit of it, and the seed of the reverse sweep."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgbp.differentiate import find_path
from onnxgbp.emit import Dims, Emit, dims_of, is_float
from onnxgbp.errors import OnnxgbpError
from onnxgbp.labels import find_label
from onnxgbp.step import label
from onnxgbp.vjps.classic import find_scores, hides_scores

__all__ = [
    "SEEDS",
    "Channels",
    "Explained",
    "Seed",
    "Unit",
    "classes_of",
    "explained_tensor",
    "find_tensor",
    "make_seed",
    "parse_channels",
    "parse_class",
    "parse_seed",
    "parse_target",
    "parse_unit",
    "resolve_target",
    "stripped_text",
    "unit_text",
]

Unit: TypeAlias = "tuple[int | slice | str, ...]"
SEEDS = ("one", "activation")
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


@dataclasses.dataclass(frozen=True)
class Seed:
    """What is explained of a tensor.

    seeds: the gradient at the explained tensor, one for each class of a sample; target: int64 [N], or [N, K] for K
    classes: the class; of a unit its first index, or its place in the flattened sample where it is the strongest;
    count: K, None for one class a sample without an axis for it.
    """

    seeds: list[ir.Value]
    target: ir.Value
    count: int | None = None


def parse_target(target: str | int) -> str | int:
    """`argmax`, `input`, `seed`, `topK` and `inputK` for K classes a sample, a class index, or a class by its name.

    Where the class is an input, -1 stands for the strongest, and in column k of inputK for the k-th strongest.

    Raises:
        OnnxgbpError: anything else.
    """
    if isinstance(target, str):
        text = target.strip()
        if not text or classes_of(text) == 0:
            raise OnnxgbpError(f"target '{target}' is none of argmax, topK, input, inputK, seed, an index or a name")
        return int(text) if _INTEGER.fullmatch(text) else text
    try:
        if isinstance(target, bool):
            raise TypeError
        return operator.index(target)
    except TypeError:
        raise OnnxgbpError(
            f"target '{target}' is none of argmax, topK, input, inputK, seed, a class index or a class name"
        ) from None


_INTEGER = re.compile(r"[+-]?\d+")
_SEVERAL = re.compile(r"(top|input)(\d+)")
_WORDS = ("argmax", "input", "seed")


def classes_of(target: str | int) -> int | None:
    """K of the targets `topK` and `inputK`, None for the others."""
    match = _SEVERAL.fullmatch(target) if isinstance(target, str) else None
    return int(match[2]) if match else None


def resolve_target(target: str | int, labels: Sequence[str]) -> str | int:
    """A class by its name becomes its index; all else stays.

    Raises:
        OnnxgbpError: no label, or more than one, is called so.
    """
    if not isinstance(target, str) or target in _WORDS or classes_of(target) is not None:
        return target
    return find_label(target, labels)


def parse_class(target: str | int) -> str | int | None:
    """`argmax` (None), a class index or a class name, for a command that runs the model itself.

    Raises:
        OnnxgbpError: anything else.
    """
    parsed = parse_target(target)
    if parsed in ("input", "seed") or classes_of(parsed) is not None:
        raise OnnxgbpError(f"target '{parsed}' is for a converted file that others feed; give argmax or a class")
    return None if parsed == "argmax" else parsed


@dataclasses.dataclass(frozen=True)
class Channels:
    """Those named, and how many of the strongest besides."""

    named: tuple[int, ...]
    strongest: int = 0


def parse_channels(given: Sequence[int | str]) -> Channels:
    """Indices, and `strongest:16` for the 16 strongest.

    Raises:
        OnnxgbpError: anything else, or nothing at all.
    """
    named, strongest = list[int](), 0
    for one in given:
        match = re.fullmatch(r"(strongest:(?=0*[1-9]))?(\d+)", str(one).strip())
        if match is None:
            raise OnnxgbpError(f"channel '{one}' is neither an index such as 3 nor, say, strongest:16")
        if match[1]:
            strongest = max(strongest, int(match[2]))
        else:
            named.append(int(match[2]))
    if not named and not strongest:
        raise OnnxgbpError("no channel given: name some, or strongest:16 for the 16 strongest")
    return Channels(tuple(dict.fromkeys(named)), strongest)


def parse_unit(unit: Any) -> Unit | None:
    """Which part of an inner tensor is explained, along the axes behind the batch.

    `3` is channel 3, `3,7,7` one position of it, `3:6` or `3,:,7` a slice (its sum), and a last `max` the strongest of
    what is left: `max` of the whole tensor, `3,max` of channel 3.

    Raises:
        OnnxgbpError: anything else.
    """
    if unit is None:
        return None
    if isinstance(unit, str):
        parts: Sequence[Any] = unit.split(",")
    else:
        parts = unit if isinstance(unit, Sequence) else [unit]
    try:
        parsed = tuple(_unit_part(part) for part in parts)
    except (ValueError, TypeError):
        raise OnnxgbpError(f"unit '{unit}' is none such as 3, 3,7,7, 3:6, 3,:,7, max or 3,max") from None
    if "max" in parsed[:-1]:
        raise OnnxgbpError(f"unit '{unit}': max stands last, for all the axes that are left")
    return parsed


def _unit_part(part: Any) -> int | slice | str:
    if isinstance(part, slice):
        return _step_one(part)
    if not isinstance(part, str):
        return operator.index(part)
    text = part.strip()
    if text == "max":
        return text
    if ":" in text:
        return _step_one(slice(*(int(end) if end.strip() else None for end in text.split(":"))))
    return int(text)


def _step_one(part: slice) -> slice:
    if part.step not in (None, 1) or any(end is not None and end < 0 for end in (part.start, part.stop)):
        raise ValueError
    return slice(part.start, part.stop)


def unit_text(unit: Unit) -> str:
    """The unit as the command line takes it."""

    def text(part: int | slice | str) -> str:
        if isinstance(part, slice):
            return ":".join("" if end is None else str(end) for end in (part.start, part.stop))
        return str(part)

    return ",".join(map(text, unit))


def parse_seed(seed: str) -> str:
    """`one` or `activation`.

    Raises:
        OnnxgbpError: anything else.
    """
    if seed not in SEEDS:
        raise OnnxgbpError(f"no seed is called '{seed}': choose one of {', '.join(SEEDS)}")
    return seed


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


def make_seed(op: Emit, explained: Explained, target: str | int, unit: Unit | None = None, seed: str = "one") -> Seed:
    """Writes the seed, zero but at the target unit of each sample, in the shape of the explained tensor.

    With seed `one` it is 1 there, with `activation` the value of the tensor itself (Zeiler & Fergus 2013).

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
        if seed != "one":
            raise OnnxgbpError(f"target seed is fed when the model runs: leave seed {seed} out")
        return _given_seed(op, tensor)
    if unit is not None:
        made = _one_unit(op, tensor, unit)
    elif len(dims) < 2 or any(dim != 1 for dim in dims[2:]):
        shape = ", ".join(str(dim or "?") for dim in dims)
        raise OnnxgbpError(
            f"the explained tensor '{tensor.name}' has shape [{shape}], not [N, classes]; choose a unit with --unit, "
            "weigh it with --target seed, or explain another tensor with --output"
        )
    else:
        made = _classes(op, tensor, target)
    if seed == "activation":
        weighed = [op.typed(op.Where(op.Greater(one, 0), tensor, op.like(0, tensor)), tensor) for one in made.seeds]
        return dataclasses.replace(made, seeds=weighed)
    return made


def _given_seed(op: Emit, tensor: ir.Value) -> Seed:
    seed = _new_input(op, "seed", tensor)
    dims = dims_of(tensor) or ()
    if len(dims) < 2:  # no class axis
        count = op.dim(tensor, 0) if dims else op.int64([1])
        return Seed([seed], op.Expand(op.int64([-1]), count))
    # The class is the one with the largest weight, the nearest thing to "what was explained" that one number can tell.
    weights = op.Reshape(seed, [0, -1])
    return Seed([seed], op.ArgMax(weights, axis=1, keepdims=0))


def _one_unit(op: Emit, tensor: ir.Value, unit: Unit) -> Seed:
    """A unit, a slice, or the strongest unit of either."""
    dims = dims_of(tensor) or ()
    places = [part for part in unit if part != "max"]
    if not unit or len(unit) > len(dims) - 1:
        raise OnnxgbpError(
            f"unit {unit_text(unit)} has {len(unit)} indices, but tensor '{tensor.name}' has {len(dims) - 1} "
            "axes behind the batch"
        )
    mask: ir.Value | None = None
    for axis, part in enumerate(places, start=1):
        here = _along(op, tensor, axis, part)
        mask = here if mask is None else mask if here is None else op.And(mask, here)
    whole = op.Expand(op.like(1, tensor), op.shape(tensor))
    region = op.typed(whole if mask is None else op.Expand(op.cast_like(mask, tensor), op.shape(tensor)), tensor)
    if unit[-1] != "max":
        first = places[0]
        shown = (first.start or 0) if isinstance(first, slice) else int(first)
        return Seed([region], op.Expand(op.int64([shown]), op.dim(tensor, 0)))
    rows = op.Reshape(tensor, [0, -1])
    if mask is not None:
        assert tensor.dtype is not None  # every value has its type before a rule sees it
        inside = op.Greater(op.Reshape(region, [0, -1]), 0)
        rows = op.Where(inside, rows, op.like(float(tensor.dtype.min), tensor))
    strongest = op.ArgMax(rows, axis=1, keepdims=0)
    one_hot = op.Equal(_counted(op, rows), op.Reshape(strongest, [-1, 1]))
    return Seed([op.reshape_like(op.cast_like(one_hot, tensor), tensor)], strongest)


def _along(op: Emit, tensor: ir.Value, axis: int, part: int | slice | str) -> ir.Value | None:
    """Where one axis lies in the unit, as a mask that broadcasts; None where all of it does."""
    size = (dims_of(tensor) or ())[axis]
    if not isinstance(part, slice):
        part = int(part)
    first, last = (part.start or 0, part.stop) if isinstance(part, slice) else (part, part + 1)
    for index in (first, first if last is None else last - 1):
        if index < 0 or (isinstance(size, int) and index >= size):
            raise OnnxgbpError(
                f"unit index {index} is out of range: axis {axis} of tensor '{tensor.name}' has {size or '?'} entries"
            )
    if not isinstance(part, slice):
        return op.Equal(op.positions(tensor, axis), op.int64(part))
    if last is not None and last <= first:
        raise OnnxgbpError(f"unit {unit_text((part,))} is empty")
    above = op.Greater(op.positions(tensor, axis), op.int64(first - 1)) if first else None
    below = op.Less(op.positions(tensor, axis), op.int64(last)) if last is not None else None
    return op.And(above, below) if above is not None and below is not None else above if below is None else below


def _counted(op: Emit, rows: ir.Value) -> ir.Value:
    """0, 1, 2... along the second axis of a matrix, int64 [1, M]."""
    limit = op.Reshape(op.Gather(op.Shape(rows), [1], axis=0), op.int64([]))
    return op.Reshape(op.Range(op.int64(0), limit, op.int64(1)), [1, -1])


def _classes(op: Emit, tensor: ir.Value, target: str | int) -> Seed:
    """One class of each sample, or K of them."""
    dims = dims_of(tensor) or ()
    classes, trivial, count = dims[1], [1] * (len(dims) - 2), classes_of(target)
    if isinstance(target, int) and isinstance(classes, int) and 0 <= target < classes:
        row = op.like(np.eye(1, classes, target).reshape(1, classes, *trivial), tensor)
        seed = op.typed(op.Expand(row, op.shape(tensor)), tensor)
        return Seed([seed], _strongest(op, seed))
    if isinstance(target, str):
        if isinstance(classes, int) and count is not None and count > classes:
            raise OnnxgbpError(f"target {target} is out of range: tensor '{tensor.name}' has {classes} classes")
        best = _strongest(op, tensor) if count is None else _top(op, tensor, count)
        chosen = best
        if target.startswith("input"):
            given = _new_input(op, "target", best, (dims[0],) if count is None else (dims[0], count))
            chosen = op.Where(op.Equal(given, op.int64(-1)), best, given)
    else:
        if target < 0 or (isinstance(classes, int) and target >= classes):
            raise OnnxgbpError(
                f"target {target} is out of range: tensor '{tensor.name}' has {classes} classes, 0 to {_last(classes)}"
            )
        chosen = op.Expand(op.int64([target]), op.dim(tensor, 0))
    seeds = []
    for k in range(count or 1):
        one = chosen if count is None else op.Gather(chosen, [k], axis=1)
        behind = list(range(1 if count is None else 2, len(dims)))  # [N, 1, ...], one class per sample
        one_hot = op.Equal(op.positions(tensor, 1), op.Unsqueeze(one, axes=behind) if behind else one)
        seeds.append(op.typed(op.cast_like(one_hot, tensor), tensor))
    if isinstance(target, str) and target.startswith("input"):
        # A class out of range must not end in a blank map: this look-up fails on it where a runtime checks indices.
        # Below -1 an index would count from the end, so it is sent out of range too.
        size = op.dim(tensor, 1)
        safe = op.Where(op.Less(chosen, op.int64(0)), size, chosen)
        static = op.int64(list(range(classes))) if isinstance(classes, int) else None
        chosen = op.Gather(op.Reshape(op.positions(tensor, 1), [-1]) if static is None else static, safe, axis=0)
    return Seed(seeds, chosen, count)


def _strongest(op: Emit, scores: ir.Value) -> ir.Value:
    """The class with the highest score of each sample, int64 [N]."""
    if len(dims_of(scores) or ()) == 2:
        return op.ArgMax(scores, axis=1, keepdims=0)
    return op.Reshape(op.ArgMax(scores, axis=1), [0])  # 0 copies the batch: a free one keeps its name


def _top(op: Emit, scores: ir.Value, count: int) -> ir.Value:
    """The classes with the highest scores of each sample, the best first, int64 [N, K]."""
    places = op.several(2, "TopK", op.Reshape(scores, [0, -1]), K=op.int64([count]), axis=1)[1]
    places.type = ir.TensorType(ir.DataType.INT64)
    return places


def _last(classes: int | str | None) -> str:
    return str(classes - 1) if isinstance(classes, int) else "?"


def _new_input(op: Emit, name: str, like: ir.Value, dims: Dims | None = None) -> ir.Value:
    """A graph input of another tensor's type, and of its shape unless dims are given."""
    value = ir.val(op.claim(name), dtype=like.dtype, shape=like.shape if dims is None else ir.Shape(dims))
    op.graph.inputs.append(value)
    return value


def stripped_text(explained: Explained) -> str:
    """One line on what was walked back over, or ''."""
    if not explained.stripped or explained.output is None:
        return ""
    nodes = ", ".join(f"{node.op_type} '{label(node)}'" for node in explained.stripped)
    return f"explaining '{explained.tensor.name}', the scores before {nodes} of output '{explained.output.name}'"
