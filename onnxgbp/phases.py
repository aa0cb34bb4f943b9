"""Gradients of strided operators as phases: every s-th element of each spatial dim is a tensor of its own.

A strided convolution or pool makes each phase of dx by itself, with kernels of ONNX Runtime's blocked layout. What puts
the phases together works outside of it, so that comes behind a Relu, and behind the sum of two such gradients; and the
gradient of an image is made of phases as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgbp.blocked import BLOCK
from onnxgbp.constants import is_constant
from onnxgbp.conv_gradients import by_blocks, has_blocks, ints, operands, scaled, turned
from onnxgbp.emit import PRIVATE, Emit, dims_of
from onnxgbp.gates import only_reader
from onnxgbp.window import Window

__all__ = ["Phases", "conv_grad_by_phases", "interleaved", "keep_phases", "lay_out"]

Phases: TypeAlias = Mapping[tuple[int, int], ir.Value]
"""Phase (a, b) holds [..., s i + a - begin, t j + b - begin] of the whole; what has no phase is 0."""


def interleaved(
    op: Emit, phases: Phases, like: ir.Value, strides: Sequence[int], begin: Sequence[int] = (0, 0)
) -> ir.Value:
    """The whole, of `like`'s shape, as a call that `keep_phases` moves and `lay_out` spells; phases of one shape."""
    places = {"places": list(phases), "strides": list(strides), "begin": list(begin)}
    return op.private("Interleave", *phases.values(), like=like, **places)


def conv_grad_by_phases(op: Emit, node: ir.Node) -> ir.Value | None:
    """A strided Conv's gradient as a Conv for each phase of x, all blocked; None where it has no such phases.

    No product with a zero, as there would be if dy were spread out first or the phases were one Conv.
    """
    dy, w, x = operands(node)
    geometry: Window = node.meta["window"]
    dims = dims_of(w)
    if dims is None or not all(isinstance(dim, int) for dim in dims) or not is_constant(w) or node.meta["group"] > 1:
        return None
    if op.opset < 10 or not _has_blocked_phases(geometry, ints(dims), x):  # Slice has steps since
        return None
    return interleaved(op, _by_phases(op, *scaled(op, dy, w), x, geometry), x, geometry.strides)


def _has_blocked_phases(geometry: Window, dims: Sequence[int], x: ir.Value) -> bool:
    return (
        geometry.static
        and not dims[0] % BLOCK
        and not dims[1] % BLOCK
        and x.dtype == ir.DataType.FLOAT
        and geometry.strides == [2, 2]
        and geometry.dilations == [1, 1]
        and all(min(phase.pads) >= 0 for i in range(2) for phase in _along(geometry, i))
    )


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Every second element of one dim of dx, from `first` on: a Conv of dy with every second tap of the turned weight.

    tap, taps: the first and how many; pads: of that Conv, at both ends.
    """

    first: int
    tap: int
    taps: int
    pads: tuple[int, int]


def _along(geometry: Window, axis: int) -> list[_Phase]:
    """dx[s i + e] = sum over j of w[r + s j] dy[q + i - j], with e + pad = s q + r; none for a phase without a tap."""
    stride, kernel, pads = geometry.strides[axis], geometry.kernel[axis], geometry.pads or []
    size, out = ints(geometry.size)[axis], ints(geometry.out)[axis]
    count, phases = -(-size // stride), list[_Phase]()
    for first in range(stride):
        start, rest = divmod(first + pads[axis], stride)
        taps = len(range(rest, kernel, stride))
        if taps:
            ends = (taps - 1 - start, count - out + start)
            phases.append(_Phase(first, (kernel - 1 - rest) % stride, taps, ends))
    return phases


def _by_phases(op: Emit, dy: ir.Value, w: ir.Value, x: ir.Value, geometry: Window) -> Phases:
    dims, kernel = ints(dims_of(w) or ()), geometry.kernel
    whole, counts = turned(op, w, dims, 1), [-(-size // 2) for size in ints(geometry.size)]
    made = dict[tuple[int, int], ir.Value]()
    for a, b in itertools.product(_along(geometry, 0), _along(geometry, 1)):
        taps = whole
        if [a.taps, b.taps] != kernel:
            taps = op.Slice(whole, starts=[a.tap, b.tap], ends=kernel, axes=[2, 3], steps=[2, 2])
            taps.shape = ir.Shape([dims[1], dims[0], a.taps, b.taps])
        phase = op.Conv(dy, taps, pads=[a.pads[0], b.pads[0], a.pads[1], b.pads[1]])
        phase.shape = ir.Shape([(dims_of(x) or ())[0], dims[1], *counts])
        made[a.first, b.first] = phase
    return made


def keep_phases(op: Emit) -> None:
    """Lets a Relu, the sum of two wholes, and the gradient of an image act on the phases."""
    for node in [node for node in op.graph.all_nodes() if node.op_type == "Interleave" and node.domain == PRIVATE]:
        whole: ir.Node | None = node
        while whole is not None:  # in the order of the graph: the second of two that are added finds the first
            whole = _behind_its_reader(op, whole)


def _behind_its_reader(op: Emit, node: ir.Node) -> ir.Node | None:
    """The phases put together behind the one node that reads the whole, None where that needs the whole."""
    reader = only_reader(node)
    if reader is None or reader.graph is None:
        return None
    op.scope = (reader.name or "").rpartition("/")[0]
    phases, old, sources = _phases(node), reader.outputs[0], [node]
    if reader.domain == PRIVATE:
        image = _image_by_blocks(op, reader, node, phases)
        new = op.take()
        if image is not None:
            reader.graph.insert_before(reader, new)
            old.replace_all_uses_with(op.typed(image, old), replace_graph_outputs=True)
            reader.graph.remove([reader, node], safe=True)
        return None
    if reader.op_type == "Relu":
        phases = {place: op.Relu(value) for place, value in phases.items()}
    elif reader.op_type == "Add":
        other = next((v.producer() for v in reader.inputs if v is not None and v is not node.outputs[0]), None)
        if other is None or not _alike(node, other):
            return None
        for place, value in _phases(other).items():
            phases[place] = op.typed(op.Add(phases[place], value), value) if place in phases else value
        sources.append(other)
    else:
        return None
    moved = interleaved(op, phases, old, node.meta["strides"], node.meta["begin"])
    reader.graph.insert_before(reader, op.take())
    old.replace_all_uses_with(moved, replace_graph_outputs=True)
    reader.graph.remove([reader, *sources], safe=True)
    return moved.producer()


def _image_by_blocks(op: Emit, reader: ir.Node, node: ir.Node, phases: Phases) -> ir.Value | None:
    """The gradient for an image behind the whole; None where it is another operator's, or is made otherwise."""
    if reader.op_type != "ConvGrad" or reader.inputs[0] is not node.outputs[0]:
        return None
    _, w, x = operands(reader)
    geometry, dims, strides = reader.meta["window"], dims_of(w), node.meta["strides"]
    if dims is None or not all(isinstance(dim, int) for dim in dims) or not is_constant(w) or set(strides) - {1, 2}:
        return None
    if not has_blocks(geometry, ints(dims), x, reader.meta["group"]):
        return None
    return by_blocks(op, phases, strides, node.meta["begin"], w, x, geometry)


def _phases(node: ir.Node) -> dict[tuple[int, int], ir.Value]:
    return {place: value for place, value in zip(node.meta["places"], node.inputs, strict=True) if value is not None}


def _alike(node: ir.Node, other: ir.Node) -> bool:
    """Whether the other is a whole of the same phases that nothing else reads."""
    if other.op_type != "Interleave" or only_reader(other) is None:
        return False
    sizes = [{dims_of(value) for value in each.inputs if value is not None} for each in (node, other)]
    return sizes[0] == sizes[1] and all(node.meta[name] == other.meta[name] for name in ("strides", "begin"))


def lay_out(op: Emit, node: ir.Node) -> ir.Value:
    """The phases beside each other for each channel, and a grouped ConvTranspose that sets each to its place."""
    phases, whole, strides, begin = _phases(node), node.outputs[0], node.meta["strides"], node.meta["begin"]
    first = next(iter(phases.values()))
    (_, channels, *counts), sizes = ints([0, *(dims_of(first) or ())[1:]]), ints(dims_of(whole) or ())[-2:]
    together = first
    if len(phases) > 1:
        flat = [op.Reshape(value, [0, channels, 1, -1]) for value in phases.values()]
        together = op.Reshape(op.Concat(*flat, axis=2), [0, channels * len(phases), *counts])
    order = list(itertools.product(*map(range, strides)))
    places = np.eye(len(order))[[order.index(place) for place in phases]].reshape(len(phases), 1, *strides)
    ends = [count * stride - at - size for count, stride, at, size in zip(counts, strides, begin, sizes, strict=True)]
    made: ir.Value = op.ConvTranspose(
        together,
        op.like(np.tile(places, (channels, 1, 1, 1)), first),
        strides=strides,
        pads=[*begin, *(max(end, 0) for end in ends)],
        output_padding=[max(-end, 0) for end in ends] if min(ends) < 0 else None,
        group=channels,
    )
    maker, makers = made.producer(), [value.producer() for value in phases.values()]
    assert maker is not None  # it was made here
    maker.meta["not_negative"] = all(each is not None and each.op_type == "Relu" for each in makers)
    return made
