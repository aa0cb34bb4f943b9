"""Sampling at places that are computed: GridSample, as in spatial transformers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs

__all__ = ["VJPS"]


class _Corners:
    """The four pixels around each place of a bilinear GridSample (or the one of a nearest), with their weights.

    For x [N, C, H, W] and grid [N, Ho, Wo, 2], every tensor here is [N, 1, Ho Wo], ready to broadcast over channels.
    """

    def __init__(self, op: Emit, s: Step) -> None:
        if s.rank() != 4:
            raise s.refuse("its input is not an image [N, C, H, W], for which alone there is a rule")
        mode, padding = str(s.argument("mode")), str(s.argument("padding_mode"))
        if mode not in ("bilinear", "linear", "nearest") or padding not in ("zeros", "border"):
            raise s.refuse(f"mode '{mode}' with padding_mode '{padding}' has no rule")
        self.op, self.s, self.nearest, self.border = op, s, mode == "nearest", padding == "border"
        self.sizes = [op.cast_like(op.Reshape(op.dim(s.x, axis), op.int64([])), s.x) for axis in (3, 2)]
        self.places = [self._place(i) for i in range(2)]  # x, then y
        self.lows = [op.Round(place) if self.nearest else op.Floor(place) for place in self.places]

    def _place(self, i: int) -> ir.Value:
        """From the grid's -1..1 to pixels."""
        op, size = self.op, self.sizes[i]
        grid = op.Reshape(op.Slice(self.s.input(1), starts=[i], ends=[i + 1], axes=[3]), [0, 1, -1])
        if self.s.argument("align_corners"):
            place = op.Mul(op.Add(grid, 1), op.Div(op.Sub(size, 1), 2))
        else:
            place = op.Div(op.Sub(op.Mul(op.Add(grid, 1), size), 1), 2)
        return self._within(place, i) if self.border else place

    def _within(self, place: ir.Value, i: int) -> ir.Value:
        return self.op.Min(self.op.Max(place, self.op.like(0, place)), self.op.Sub(self.sizes[i], 1))

    def slope(self, i: int) -> ir.Value:
        """Pixels per unit of the grid; 0 where a border clamps the place."""
        op, size = self.op, self.sizes[i]
        step = op.Div(op.Sub(size, 1) if self.s.argument("align_corners") else size, 2)
        if not self.border:
            return step
        inside = op.And(op.Greater(self.places[i], 0), op.Less(self.places[i], op.Sub(size, 1)))
        return op.Where(inside, step, op.like(0, step))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        sides = (0,) if self.nearest else (0, 1)
        return ((x, y) for x in sides for y in sides)

    def weight(self, i: int, side: int) -> ir.Value:
        """How much of one direction goes to the lower (0) or the upper (1) pixel."""
        fraction = self.op.Sub(self.places[i], self.lows[i])
        return fraction if side else self.op.Sub(self.op.like(1, fraction), fraction)

    def at(self, sides: tuple[int, int]) -> tuple[ir.Value, ir.Value]:
        """The index into the flattened image of one corner, kept inside it, and whether it really is inside."""
        op = self.op
        pixels = [op.Add(low, side) if side else low for low, side in zip(self.lows, sides, strict=True)]
        kept = [self._within(pixel, i) for i, pixel in enumerate(pixels)]
        inside = op.And(*(op.is_zero(op.Sub(a, b)) for a, b in zip(pixels, kept, strict=True)))
        index = op.Cast(op.Add(op.Mul(kept[1], self.sizes[0]), kept[0]), to=int(ir.DataType.INT64))
        return op.Expand(index, op.Shape(op.Reshape(self.s.dy, [0, 0, -1]))), inside


def grid_sample_x(op: Emit, s: Step) -> ir.Value:
    """Each output pixel's gradient goes to its corners by their weights, and adds up there."""
    corners = _Corners(op, s)
    flat = op.Reshape(s.dy, [0, 0, -1])
    total = op.Reshape(op.zeros_like(s.x), [0, 0, -1])
    for sides in corners:
        index, inside = corners.at(sides)
        share = (
            flat if corners.nearest else op.Mul(flat, op.Mul(corners.weight(0, sides[0]), corners.weight(1, sides[1])))
        )
        share = op.Where(inside, share, op.like(0, share))
        total = op.ScatterElements(total, index, share, axis=2, reduction="add")
    return op.reshape_like(total, s.x)


def grid_sample_grid(op: Emit, s: Step) -> ir.Value:
    """The slope of the bilinear surface at each place, weighed by dy over the channels."""
    corners = _Corners(op, s)
    if corners.nearest:
        return op.zeros_like(s.input(1))
    flat, image = op.Reshape(s.dy, [0, 0, -1]), op.Reshape(s.x, [0, 0, -1])
    sums: list[ir.Value | None] = [None, None]
    for sides in corners:
        index, inside = corners.at(sides)
        pixel = op.GatherElements(image, index, axis=2)
        pixel = op.Where(inside, pixel, op.like(0, pixel))
        for i in range(2):
            other = corners.weight(1 - i, sides[1 - i])
            part = op.Mul(op.Mul(flat, pixel), other if sides[i] else op.Neg(other))
            so_far = sums[i]
            sums[i] = part if so_far is None else op.Add(so_far, part)
    slopes = [
        op.Mul(op.ReduceSum(total, axes=[1], keepdims=1), corners.slope(i))
        for i, total in enumerate(total for total in sums if total is not None)
    ]
    joined = op.Concat(*(op.Unsqueeze(slope, axes=[3]) for slope in slopes), axis=3)  # [N, 1, Ho Wo, 2]
    return op.reshape_like(joined, s.input(1))


VJPS = {"GridSample": inputs(grid_sample_x, grid_sample_grid)}
