"""The seed of the reverse sweep: the gradient at the explained tensor, by default 1 at the target of each sample."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxgbp.emit import Dims, Emit, dims_of, shape_text
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explained import Explained
from onnxgbp.target import Unit, classes_of, unit_text

__all__ = ["SEEDS", "Seed", "make_seed", "parse_seed"]

SEEDS = ("one", "activation")


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


def parse_seed(seed: str) -> str:
    """`one` or `activation`.

    Raises:
        OnnxgbpError: anything else.
    """
    if seed not in SEEDS:
        raise OnnxgbpError(f"no seed is called '{seed}': choose one of {', '.join(SEEDS)}")
    return seed


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
        raise OnnxgbpError(
            f"the explained tensor '{tensor.name}' has shape {shape_text(dims)}, not [N, classes]; "
            "choose a unit with --unit, weigh it with --target seed, or explain another tensor with --output"
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
        op.sized(1, classes)
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
