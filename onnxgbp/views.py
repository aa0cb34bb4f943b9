"""Views of the attribution as outputs of their own, for servers that want numbers to draw, or the picture itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxgbp.emit import Emit, dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.untrusted import METADATA, json_entry

__all__ = ["REDUCTIONS", "VIEWS", "View", "add_views", "channel_axis"]

VIEWS = ("signed", "positive", "negative", "abs")
REDUCTIONS = ("none", "sum", "max", "l2")
_COLOURS = (1, 3, 4)


@dataclasses.dataclass(frozen=True)
class View:
    """What is baked in behind each attribution a.

    view: signed a, positive max(a, 0), negative max(-a, 0), abs |a|; reduce: over the channels of that: none, their
    sum, the largest, or the root of the sum of squares. Either makes an output `<attribution>_view` of a's type.
    heatmap: an output `<attribution>_heatmap`, uint8, of the view v divided by its own largest |v| in each sample: 0 to
    255, or where v is signed 1 to 255 with 128 for zero. A sample (or each class of it) is one row: nothing depends on
    the rest of the batch.
    """

    view: str = "signed"
    reduce: str = "none"
    heatmap: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (("view", self.view, VIEWS), ("reduce", self.reduce, REDUCTIONS)):
            if value not in known:
                raise OnnxgbpError(f"no {what} is called '{value}': choose one of {', '.join(known)}")

    @property
    def asked(self) -> bool:
        return self.changes or self.heatmap

    @property
    def changes(self) -> bool:
        return self.view != "signed" or self.reduce != "none"

    def metadata(self) -> dict[str, str]:
        if not self.asked:
            return {}
        return {"view": self.view, "reduce": self.reduce, "heatmap": "uint8" if self.heatmap else "none"}


def add_views(op: Emit, names: Sequence[str], view: View, metadata: Mapping[str, str], rows: int) -> None:
    """Adds the outputs of a view to those of the graph, behind all others.

    Args:
        op: writes to the graph.
        names: of the attributions.
        view: what is asked for.
        metadata: the model's, which may tell the layout of its images.
        rows: how many axes count samples: 1, or 2 where there are K classes of each.

    Raises:
        OnnxgbpError: an attribution has no channels to reduce.
    """
    outputs = {output.name: output for output in op.graph.outputs}
    for name in names:
        op.scope = name
        attribution = outputs[name]
        dims = dims_of(attribution)
        if dims is None or (view.reduce != "none" and len(dims) < rows + 2):
            raise OnnxgbpError(f"'{name}' has no channels: a view reduces the channels of [N, C, ...]")
        value = _reduced(op, _viewed(op, attribution, view.view), view.reduce, channel_axis(dims, metadata, rows))
        shape = [dim for i, dim in enumerate(dims) if view.reduce == "none" or i != channel_axis(dims, metadata, rows)]
        if view.changes:
            value = _output(op, f"{name}_view", op.Identity(value), shape)
        if view.heatmap:
            picture = _heatmap(op, value, rows, signed=view.view == "signed" and view.reduce != "l2", rank=len(shape))
            _output(op, f"{name}_heatmap", picture, shape)


def _output(op: Emit, name: str, value: ir.Value, shape: Sequence[int | str | None]) -> ir.Value:
    value.name, value.shape = op.claim(name), ir.Shape(shape)
    op.graph.extend(op.take())
    op.graph.outputs.append(value)
    return value


def channel_axis(dims: Sequence[int | str | None], metadata: Mapping[str, str], rows: int) -> int:
    """The axis of the channels: as the metadata says, else as the sizes tell, else the first behind the rows."""
    said = json_entry(metadata, "preprocessing") if METADATA + "preprocessing" in metadata else {}
    layout = said.get("layout") if isinstance(said, dict) else None
    last = len(dims) - 1
    if layout is not None:
        return last if layout == "nhwc" else rows
    return last if dims[rows % len(dims)] not in _COLOURS and dims[last] in _COLOURS else rows


def _viewed(op: Emit, value: ir.Value, view: str) -> ir.Value:
    if view == "positive":
        return op.Relu(value)
    if view == "negative":
        return op.Relu(op.Neg(value))
    return op.Abs(value) if view == "abs" else value


def _reduced(op: Emit, value: ir.Value, reduce: str, axis: int) -> ir.Value:
    if reduce == "sum":
        return op.ReduceSum(value, axes=[axis], keepdims=0)
    if reduce == "max":
        return op.ReduceMax(value, axes=[axis], keepdims=0)
    return op.ReduceL2(value, axes=[axis], keepdims=0) if reduce == "l2" else value


def _heatmap(op: Emit, value: ir.Value, rows: int, *, signed: bool, rank: int) -> ir.Value:
    """In float32: 16 bits hold too few of the 256 steps."""
    wide = op.Cast(value, to=int(ir.DataType.FLOAT))
    largest = op.ReduceMax(op.Abs(wide), axes=list(range(rows, rank)), keepdims=1) if rank > rows else op.Abs(wide)
    share = op.Div(wide, op.Where(op.Greater(largest, 0), largest, op.like(1, largest)))
    steps = op.Add(op.Mul(share, 127), 128.5) if signed else op.Add(op.Mul(share, 255), 0.5)
    return op.Cast(op.Floor(steps), to=int(ir.DataType.UINT8))
