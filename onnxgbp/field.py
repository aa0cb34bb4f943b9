"""The receptive field of a unit: the part of the picture that its value can depend on, told from the graph alone.

The box of a unit is followed back, node by node, as the first and the last index along each axis of every tensor. It
is cut to each tensor's size on the way, so that at a border nothing counts that is only padding. What the whole map has
a share in and no place (a gate such as squeeze-and-excitation's, the mean of a normalisation) is left out: it would
make every field the whole picture.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS
from onnxgbp.constants import constant_value
from onnxgbp.differentiate import find_path
from onnxgbp.emit import dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.shapes import infer_shapes
from onnxgbp.step import Step, label
from onnxgbp.vjps import FAMILIES
from onnxgbp.window import Window, window

__all__ = ["Field", "FieldFinder", "Span"]

Span: TypeAlias = "tuple[int, int] | None"
"""The first and the last index along an axis; None for all of it."""
Spans: TypeAlias = tuple[Span, ...]
Indices: TypeAlias = "npt.NDArray[np.int64]"


@dataclasses.dataclass(frozen=True)
class Field:
    """spans: one for each axis of the input; lost: the node past which it cannot be told, so that it is everything."""

    spans: Spans
    lost: str = ""


class FieldFinder:
    """Finds the fields of units of one tensor, for one shape of the input.

    Args:
        model: the source's in-memory form, which stays as it is.
        image: the name of the input.
        shape: the input's shape; the batch may be of any size.
        layer: the name of the tensor.
    """

    def __init__(self, model: ir.Model, image: str, shape: Sequence[int], layer: str) -> None:
        model = model.clone()
        graph = model.graph
        values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
        for value in values:
            value.meta.pop("constant", None)  # a size that was free may be known now
        self._image = next(value for value in graph.inputs if value.name == image)
        self._image.shape = ir.Shape(shape)
        infer_shapes(model)
        self._layer = next(value for value in values if value.name == layer)
        self._path = find_path(graph, self._layer, [self._image])
        self._active = {self._image} | {value for node in self._path for value in node.outputs}

    def __call__(self, place: Spans) -> Field:
        """The field of all units within `place`, one span for each axis of the tensor.

        It is everything where a unit sees nothing at all, such as one of a transposed convolution's padding.
        """
        lost = ""
        fields = {self._layer: _cut(place, dims_of(self._layer) or ())}
        for node in reversed(self._path):
            for y in node.outputs:
                if y not in fields:
                    continue
                for x in dict.fromkeys(x for x in node.inputs if x is not None and x in self._active):
                    dims = dims_of(x) or ()
                    spans = self._traced(node, x, y, fields[y])
                    if spans is None or len(spans) not in (0, len(dims)):
                        lost, spans = label(node), (None,) * len(dims)
                    if spans := _cut(spans, dims):
                        fields[x] = _cut(_hull(fields.get(x, spans), spans), dims)
        everything: Spans = (None,) * len(dims_of(self._image) or ())
        return Field(everything if lost else fields.get(self._image, everything), lost)

    def _traced(self, node: ir.Node, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
        """What of x the part `spans` of y is computed from, not yet cut; () for nothing, None where it is not known."""
        if node.domain:
            return None
        if node.op_type in _TRACES:
            try:
                return _TRACES[node.op_type](Step(node), x, y, spans)
            except OnnxgbpError:  # an argument is computed while the model runs
                return None
        if node.op_type not in _POINTWISE:
            return None
        others = [value for value in node.inputs if value is not None and value is not x and value in self._active]
        if _is_gate(x, spans) and not all(_is_gate(other, spans) for other in others):
            return ()
        return _broadcast(x, spans)


def _cut(spans: Spans, dims: Sequence[int | str | None]) -> Spans:
    """Within the tensor, None where that is all of it; () where nothing of it is left."""
    cut: list[Span] = []
    for span, size in zip(spans, dims if spans else (), strict=True):
        if span is None or not isinstance(size, int):
            cut.append(span)
            continue
        first, last = max(span[0], 0), min(span[1], size - 1)
        if first > last:
            return ()
        cut.append(None if (first, last) == (0, size - 1) else (first, last))
    return tuple(cut)


def _hull(a: Spans, b: Spans) -> Spans:
    """The smallest box around two."""
    return tuple(
        None if one is None or two is None else (min(one[0], two[0]), max(one[1], two[1]))
        for one, two in zip(a, b, strict=True)
    )


# Each element of the result stems from the one at its place, of inputs that broadcast.
_POINTWISE = frozenset().union(
    FAMILIES["elementwise"], FAMILIES["normalisation"], FAMILIES["quantisation"], ACTIVATIONS, ("Expand",)
)


def _behind(x: ir.Value, spans: Spans) -> list[tuple[Span, int | str | None]]:
    """The axes of x, each with the span of the result's axis that it is broadcast to."""
    dims = dims_of(x) or ()
    return list(zip(spans[len(spans) - len(dims) :], dims, strict=True))


def _is_gate(x: ir.Value, spans: Spans) -> bool:
    """Whether x holds one value for all the places that the result has."""
    sizes = [size for span, size in _behind(x, spans) if span is not None]
    return bool(sizes) and all(size == 1 for size in sizes)


def _broadcast(x: ir.Value, spans: Spans) -> Spans:
    return tuple(None if size == 1 else span for span, size in _behind(x, spans))


def _windows(step: Step, x: ir.Value, y: ir.Value, spans: Spans, mixed: bool) -> Spans | None:
    """Convolutions and pools; a dilated window at a border may begin far inside."""
    if x is not step.x or y is not step.y:
        return None
    frame = window(step, dims_of(step.input(1)) if step.node.op_type == "Conv" else None)

    def reached(axis: int, places: Indices, begin: int) -> Indices:
        return places * frame.strides[axis] - begin + np.arange(frame.kernel[axis]) * frame.dilations[axis]

    return _reached(frame, (spans[0], None if mixed else spans[1]), spans[2:], reached)


def _transposed_windows(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    """An element spreads over the window that starts at its place times the stride."""
    if x is not step.x:
        return None
    frame = window(step, dims_of(step.input(1)), transposed=True)

    def begun(axis: int, places: Indices, begin: int) -> Indices:
        starts = places + begin - np.arange(frame.kernel[axis]) * frame.dilations[axis]
        reached: Indices = starts[starts % frame.strides[axis] == 0] // frame.strides[axis]
        return reached

    return _reached(frame, (spans[0], None), spans[2:], begun)


def _reached(
    frame: Window, front: Spans, places: Spans, reached: Callable[[int, Indices, int], Indices]
) -> Spans | None:
    """From the first to the last element of x that windows reach, along each spatial axis."""
    spans = list(front)
    for axis, (span, size, out) in enumerate(zip(places, frame.size, frame.out, strict=True)):
        if frame.pads is None or not isinstance(size, int) or not isinstance(out, int):
            return None
        first, last = span or (0, out - 1)
        seen = reached(axis, np.arange(first, last + 1)[:, np.newaxis], frame.pads[axis])
        seen = seen[(seen >= 0) & (seen < size)]
        if not seen.size:
            return ()
        spans.append((int(seen.min()), int(seen.max())))
    return tuple(spans)


def _over_all_places(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans:
    return (*spans[:2], *(None for _ in spans[2:]))


def _transpose(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans:
    order = step.ints("perm") or list(reversed(range(len(spans))))
    return tuple(spans[order.index(axis)] for axis in range(len(spans)))


def _reshape(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    """Axes stay what they are before and behind those that are folded or unfolded; those of size 1 do not count."""
    if x is not step.x:
        return None
    a, b = ([(i, dim) for i, dim in enumerate(dims_of(value) or ()) if dim != 1] for value in (x, y))
    same = [one[1] == two[1] is not None for one, two in zip(a, b, strict=False)]
    front = same.index(False) if False in same else len(same)
    same = [one[1] == two[1] is not None for one, two in zip(a[front:][::-1], b[front:][::-1], strict=False)]
    back = same.index(False) if False in same else len(same)
    if any(spans[i] is not None for i, _ in b[front : len(b) - back]):
        return None
    traced: list[Span] = [None] * len(dims_of(x) or ())
    for (i, _), (j, _) in (*zip(a[:front], b[:front], strict=True), *zip(a[::-1][:back], b[::-1][:back], strict=True)):
        traced[i] = spans[j]
    return tuple(traced)


def _concat(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    axis = int(step.argument("axis")) % len(spans)
    if spans[axis] is None:
        return spans
    return _shifted(spans, axis, x, [value for value in step.node.inputs if value is not None])


def _split(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    axis = int(step.argument("axis") or 0) % len(spans)
    sizes = [(dims_of(value) or ())[axis] for value in step.node.outputs]
    before = sizes[: step.node.outputs.index(y)]
    size = sizes[len(before)]
    span = (0, size - 1) if spans[axis] is None and isinstance(size, int) else spans[axis]
    if span is None or not all(isinstance(size, int) for size in before):
        return None
    offset = sum(size for size in before if isinstance(size, int))
    return _with(spans, axis, (span[0] + offset, span[1] + offset))


def _shifted(spans: Spans, axis: int, x: ir.Value, joined: Sequence[ir.Value]) -> Spans | None:
    """The part of what was joined that lies in x; () for none of it."""
    sizes, span = [(dims_of(value) or ())[axis] for value in joined], spans[axis]
    if span is None or joined.count(x) != 1 or not all(isinstance(size, int) for size in sizes):
        return None
    own = joined.index(x)
    offset = sum(size for size in sizes[:own] if isinstance(size, int))
    return _with(spans, axis, (span[0] - offset, span[1] - offset))


def _with(spans: Spans, axis: int, span: Span) -> Spans:
    return (*spans[:axis], span, *spans[axis + 1 :])


def _picked(spans: Spans, axis: int, size: int | str | None, pick: Callable[[Indices], Indices]) -> Spans | None:
    """What an operator that only picks along an axis reads there: it is let pick from the indices themselves.

    What is no index of the input (padding) is -1.
    """
    if not isinstance(size, int):
        return spans if spans[axis] is None else None
    picked = pick(np.arange(size))
    span = spans[axis] or (0, len(picked) - 1)
    seen = picked[span[0] : span[1] + 1]
    seen = seen[seen >= 0]
    return _with(spans, axis, (int(seen.min()), int(seen.max()))) if seen.size else ()


def _slice(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    starts, ends = step.ints("starts") or [], step.ints("ends") or []
    axes, steps = step.ints("axes") or list(range(len(starts))), step.ints("steps") or [1] * len(starts)
    traced: Spans | None = spans
    for axis, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        axis %= len(spans)
        size = (dims_of(x) or ())[axis]
        if traced:
            # A negative stride ends before the first element, which a Python slice says by None.
            cut = slice(start, None if stride < 0 and isinstance(size, int) and end < -size else end, stride)
            traced = _picked(traced, axis, size, operator.itemgetter(cut))
    return traced


def _gather(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    axis, chosen = int(step.argument("axis") or 0), constant_value(step.node.inputs[1])
    if chosen is None or chosen.ndim > 1:
        return None
    axis %= len(dims_of(x) or ())
    if not chosen.ndim:  # the axis goes
        spans = (*spans[:axis], None, *spans[axis:])
    return _picked(spans, axis, (dims_of(x) or ())[axis], operator.itemgetter(np.atleast_1d(chosen)))


def _pad(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    pads, mode = step.ints("pads") or [], step.argument("mode") or "constant"
    axes = [axis % len(spans) for axis in step.ints("axes") or range(len(spans))] if step.has(3) else range(len(spans))
    traced: Spans | None = spans
    for number, axis in enumerate(axes):
        ends = pads[number], pads[number + len(pads) // 2]
        if any(ends) and traced:
            traced = _picked(traced, axis, (dims_of(x) or ())[axis], functools.partial(_padded, ends=ends, mode=mode))
    return traced


def _padded(indices: Indices, ends: tuple[int, int], mode: str) -> Indices:
    """Negative pads cut off."""
    kept = indices[max(-ends[0], 0) : len(indices) - max(-ends[1], 0)]
    width = (max(ends[0], 0), max(ends[1], 0))
    if mode == "constant":
        return np.pad(kept, width, constant_values=-1)
    # numpy types each mode as a literal of its own
    return np.pad(kept, width, mode=mode)  # type: ignore[call-overload, no-any-return]


def _blocks(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans:
    """SpaceToDepth: a place of the result is a block of the input."""
    size = int(step.argument("blocksize"))
    return (spans[0], None, *(span and (span[0] * size, span[1] * size + size - 1) for span in spans[2:]))


def _unblocked(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans:
    size = int(step.argument("blocksize"))
    return (spans[0], None, *(span and (span[0] // size, span[1] // size) for span in spans[2:]))


def _matmul(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    """A product with constant weights mixes the last axis."""
    return (*spans[:-1], None) if x is step.x and len(spans) == len(dims_of(x) or ()) else None


def _reduced(step: Step, x: ir.Value, y: ir.Value, spans: Spans) -> Spans | None:
    rank = len(dims_of(x) or ())
    axes = {axis % rank for axis in step.ints("axes") or range(rank)}
    kept = iter(spans)
    if len(spans) == rank:
        return tuple(None if axis in axes else span for axis, span in enumerate(spans))
    return tuple(None if axis in axes else next(kept) for axis in range(rank))


_Trace: TypeAlias = Callable[[Step, ir.Value, ir.Value, Spans], Spans | None]

# operator -> what of its input x the part `spans` of its output y is computed from.
_TRACES: dict[str, _Trace] = {
    "AveragePool": functools.partial(_windows, mixed=False),
    "Concat": _concat,
    "Conv": functools.partial(_windows, mixed=True),
    "ConvTranspose": _transposed_windows,
    "DepthToSpace": _unblocked,
    "Flatten": _reshape,
    "Gather": _gather,
    "GlobalAveragePool": _over_all_places,
    "GlobalLpPool": _over_all_places,
    "GlobalMaxPool": _over_all_places,
    "LpPool": functools.partial(_windows, mixed=False),
    "MatMul": _matmul,
    "MaxPool": functools.partial(_windows, mixed=False),
    "Pad": _pad,
    "ReduceL1": _reduced,
    "ReduceL2": _reduced,
    "ReduceMax": _reduced,
    "ReduceMean": _reduced,
    "ReduceMin": _reduced,
    "ReduceSum": _reduced,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
