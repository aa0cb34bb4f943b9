"""Sampling at places that are computed: GridSample, as in spatial transformers, and RoiAlign, as in detectors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.polynomial import Polynomial

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs

__all__ = ["VJPS", "Taps"]

_INT64 = int(ir.DataType.INT64)


def _keys(a: float = -0.75) -> list[Polynomial]:
    """The weights of cubic convolution (Keys 1981) for the pixels -1, 0, 1, 2 around a place t in [0, 1)."""
    near, far = Polynomial([1, 0, -(a + 3), a + 2]), Polynomial([-4 * a, 8 * a, -5 * a, a])
    return [far(Polynomial([1, 1])), near(Polynomial([0, 1])), near(Polynomial([1, -1])), far(Polynomial([2, -1]))]


# mode -> the first pixel that is read, counted from the one below the place; the weights, polynomials in t
_TAPS = {
    "nearest": (0, [Polynomial([1])]),
    "linear": (0, [Polynomial([1, -1]), Polynomial([0, 1])]),
    "cubic": (-1, _keys()),
}
_MODES = {"bilinear": "linear", "bicubic": "cubic"}  # as opset 16 called them


class Taps:
    """The K^r pixels that are read for each place, K along each of r spatial axes, with their weights.

    For x [N, C, D...] and P places: every tensor is [N, 1, P, K, ..., K], with 1 for the axes that it does not vary
    along. What lies beyond the image is padded pixel by pixel, as torch and ONNX Runtime do; for linear sampling that
    is the same as to pad the places.
    """

    def __init__(
        self,
        op: Emit,
        x: ir.Value,
        places: Sequence[ir.Value],
        mode: str = "linear",
        padding: str = "zeros",
        *,
        aligned: bool = False,
    ) -> None:
        """places: of each spatial axis, the last axis first, counted in pixels, [N, 1, P, 1, ..., 1]."""
        self.op, self.x, self.count, self.padding, self.aligned = op, x, len(places), padding, aligned
        first, self.weights = _TAPS[mode]
        self.sizes = [op.dim(x, self.count + 1 - i) for i in range(self.count)]
        lows = [op.Round(place) if mode == "nearest" else op.Floor(place) for place in places]
        self.fractions = [op.Sub(place, low) for place, low in zip(places, lows, strict=True)]
        reach = first + np.arange(len(self.weights))
        self.pixels = [op.Add(op.Cast(low, to=_INT64), self._along(i, reach)) for i, low in enumerate(lows)]
        self.kept = [self._inside(i) for i in range(self.count)]

    def _along(self, i: int, numbers: np.ndarray) -> ir.Value:
        """One number for each of the K pixels along one axis."""
        return self.op.constant(numbers.reshape([-1 if axis == i else 1 for axis in range(self.count)]))

    def _inside(self, i: int) -> ir.Value:
        """The pixel of the image that stands for one that may lie beyond it."""
        op, last = self.op, self.op.Sub(self.sizes[i], [1])
        if self.padding != "reflection":
            return op.Min(op.Max(self.pixels[i], [0]), last)
        # The mirrors stand in the middle of the outermost pixels, or at their outer edge.
        whole = op.Mul(last if self.aligned else self.sizes[i], [2])
        place = op.Mod(self.pixels[i], op.Max(whole, [1]))
        far = whole if self.aligned else op.Sub(whole, [1])
        return op.Min(place, op.Sub(far, place))

    def weight(self, i: int, *, slope: bool = False) -> ir.Value:
        """The weights along one axis, or how fast they change per pixel."""
        polynomials = [weight.deriv() if slope else weight for weight in self.weights]
        degree = max(len(polynomial.coef) for polynomial in polynomials)
        table = np.array([np.pad(polynomial.coef, (0, degree - len(polynomial.coef))) for polynomial in polynomials])
        terms = [self.op.cast_like(self._along(i, column), self.x) for column in table.T[::-1]]
        return functools.reduce(lambda sum_, term: self.op.Add(self.op.Mul(sum_, self.fractions[i]), term), terms)

    def weigh(self, slope: int | None = None) -> ir.Value:
        """The weight of each pixel, or how fast it changes along one axis; 0 for what is padded with zeros."""
        op, product = self.op, self.op.Mul
        weight = functools.reduce(product, [self.weight(i, slope=i == slope) for i in range(self.count)])
        if self.padding != "zeros":
            return weight
        real = functools.reduce(op.And, [op.Equal(a, b) for a, b in zip(self.pixels, self.kept, strict=True)])
        return op.Where(real, weight, op.like(0, weight))

    def index(self) -> ir.Value:
        """Which entry of the flattened image each pixel is, for every channel: [N, C, P K^r]."""
        op, flat = self.op, self.kept[-1]
        for i in range(self.count - 2, -1, -1):
            flat = op.Add(op.Mul(flat, self.sizes[i]), self.kept[i])
        channels = op.vector(1, op.dim(self.x, 1), 1)
        return op.Expand(op.Reshape(flat, [0, 1, -1]), channels)

    def arriving(self, gradient: ir.Value) -> ir.Value:
        """A gradient [N, C, P...] as [N, C, P, 1, ..., 1]."""
        return self.op.Reshape(gradient, [0, 0, -1, *[1] * self.count])

    def to_image(self, gradient: ir.Value) -> ir.Value:
        """What arrives at the places goes to the pixels they were made of by their weights, and adds up there."""
        op = self.op
        shares = op.Reshape(op.Mul(self.arriving(gradient), self.weigh()), [0, 0, -1])
        image = op.Reshape(op.zeros_like(self.x), [0, 0, -1])
        return op.ScatterElements(image, self.index(), shares, axis=2, reduction="add")

    def values(self) -> ir.Value:
        """The pixels themselves, [N, C, P, K, ..., K]."""
        op, image = self.op, self.op.Reshape(self.x, [0, 0, -1])
        kernel = [len(self.weights)] * self.count
        return op.Reshape(op.GatherElements(image, self.index(), axis=2), [0, 0, -1, *kernel])

    def to_places(self, pulls: ir.Value, i: int) -> ir.Value:
        """The slope along one axis at each place, [N, P], of pixels weighed by what arrives, [N, 1, P, K, ..., K]."""
        slope = self.op.Mul(pulls, self.weigh(slope=i))
        return self.op.ReduceSum(slope, axes=[1, *range(3, 3 + self.count)], keepdims=0)


def _grid_taps(op: Emit, s: Step) -> tuple[Taps, list[ir.Value]]:
    """The pixels that a GridSample reads for x [N, C, D...] and grid [N, O..., r]; how many pixels half a grid is."""
    count, aligned, scales, places = s.rank() - 2, bool(s.argument("align_corners")), [], []
    for i in range(count):  # the grid names the last axis first
        number = op.cast_like(op.dim(s.x, s.rank() - 1 - i), s.x)
        grid = op.Reshape(op.Slice(s.input(1), starts=[i], ends=[i + 1], axes=[s.rank() - 1]), [0, 1, -1, *[1] * count])
        scales.append(op.Div(op.Sub(number, 1) if aligned else number, 2))
        ahead = op.Add(grid, 1)
        places.append(op.Mul(ahead, scales[i]) if aligned else op.Div(op.Sub(op.Mul(ahead, number), 1), 2))
    mode = str(s.argument("mode"))
    return Taps(op, s.x, places, _MODES.get(mode, mode), str(s.argument("padding_mode")), aligned=aligned), scales


def grid_sample_x(op: Emit, s: Step) -> ir.Value:
    taps, _ = _grid_taps(op, s)
    return op.reshape_like(taps.to_image(s.dy), s.x)


def grid_sample_grid(op: Emit, s: Step) -> ir.Value:
    """The slope of the surface at each place, weighed by dy over the channels."""
    taps, scales = _grid_taps(op, s)
    if len(taps.weights) == 1:
        return op.zeros_like(s.input(1))  # nearest: a step function
    pulls = op.ReduceSum(op.Mul(taps.values(), taps.arriving(s.dy)), axes=[1], keepdims=1)
    slopes = [op.Unsqueeze(op.Mul(taps.to_places(pulls, i), scale), axes=[2]) for i, scale in enumerate(scales)]
    return op.reshape_like(op.Concat(*slopes, axis=2), s.input(1))


class _Grid:
    """Where a RoiAlign samples along one axis of x [N, C, H, W]: G places in each bin of each of R regions.

    place [R, bins, G], within the image; exists: a region has that many samples, [R or 1, 1, G]; real: and this one
    is not so far outside that it counts as 0, [R, bins, G]; count: how many there are in a bin, at least 1.
    """

    def __init__(self, op: Emit, s: Step, axis: int) -> None:
        self.op, self.x, self.axis = op, s.x, axis
        half = s.since > 10 and str(s.argument("coordinate_transformation_mode")) == "half_pixel"
        column, bins = 3 - axis, int(s.argument("output_height" if axis == 2 else "output_width"))
        self.bins = bins
        start, end = (
            op.Sub(op.Mul(op.Unsqueeze(part, axes=[2]), float(s.argument("spatial_scale"))), 0.5 if half else 0.0)
            for part in (op.Slice(s.input(1), starts=[i], ends=[i + 1], axes=[1]) for i in (column, column + 2))
        )
        extent = op.Sub(end, start)
        step = op.Div(extent if half else op.Max(extent, op.like(1, extent)), bins)
        ratio = int(s.argument("sampling_ratio"))
        if ratio > 0:
            samples = op.like(ratio, step)
            numbers = op.like(np.arange(op.sized(ratio)[0]).reshape(1, 1, ratio), step)
        else:  # as many as the region has pixels in a bin, at run time; each axis of x has its own number
            samples = op.Ceil(step)
            most = op.ReduceMax(op.Concat(op.Reshape(samples, [-1]), op.like(np.ones(1), step), axis=0), keepdims=0)
            counted = op.Range(op.int64(0), op.Cast(most, to=_INT64), op.int64(1))
            numbers = op.Reshape(op.cast_like(counted, step), [1, 1, -1])
        self.count = op.Max(samples, op.like(1, step))
        self.exists = op.Less(numbers, samples)
        within = op.Div(op.Add(numbers, 0.5), self.count)
        place = op.Add(
            start, op.Mul(step, op.Add(within, op.like(np.arange(op.sized(bins)[0]).reshape(1, bins, 1), step)))
        )
        size = op.cast_like(op.dim(s.x, axis), step)
        outside = op.Or(op.Less(place, -1.0), op.Greater(place, size))
        self.real = op.And(self.exists, op.Not(outside))
        self.place = op.Min(op.Max(place, op.like(0, place)), op.Sub(size, 1))

    def matrix(self) -> ir.Value:
        """[R, bins, size]: of which pixels along the axis each bin's average is made."""
        op = self.op
        pixels = op.cast_like(op.Reshape(op.positions(self.x, self.axis), [1, 1, 1, -1]), self.place)
        near = op.Sub(op.like(1, self.place), op.Abs(op.Sub(op.Unsqueeze(self.place, axes=[3]), pixels)))
        weights = op.Where(op.Unsqueeze(self.real, axes=[3]), op.Relu(near), op.like(0, self.place))
        return op.Div(op.ReduceSum(weights, axes=[2], keepdims=0), self.count)

    def corners(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The two pixels around each place, their weights, and whether the place exists: [R, bins, 2 G]."""
        op, place = self.op, self.place
        low = op.Floor(place)
        upper = op.Sub(place, low)
        first = op.Cast(low, to=_INT64)
        second = op.Min(op.Add(first, [1]), op.Sub(op.dim(self.x, self.axis), [1]))
        weights = op.Concat(op.Sub(op.like(1, upper), upper), upper, axis=2)
        real, exists = (op.Concat(mask, mask, axis=2) for mask in (self.real, op.Or(self.exists, self.real)))
        return op.Concat(first, second, axis=2), op.Where(real, weights, op.like(0, place)), exists


def roi_align_x(op: Emit, s: Step) -> ir.Value:
    rows, columns = _Grid(op, s, 2), _Grid(op, s, 3)
    if str(s.argument("mode")) == "max":
        return _roi_max(op, s, rows, columns)
    # dX = the sum over an image's regions of rows' dY columns: one product, in which no region has a map of its own.
    # An empty region is added, since there may be none, and ONNX Runtime leaves a product over nothing unset.
    height, batch = op.dim(s.x, 2), op.Reshape(op.positions(s.x, 0), [-1, 1, 1, 1])
    mine = op.Equal(op.Reshape(s.input(2), [1, -1, 1, 1]), batch)  # [N, R, 1, 1]
    left = op.Where(mine, op.Unsqueeze(rows.matrix(), axes=[0]), op.like(0, s.x))  # [N, R, bins, H]
    left = op.Reshape(op.Pad(left, pads=[0, 0, 0, 0, 0, 1, 0, 0]), op.vector(0, -1, height))
    dy, across = (
        op.Pad(part, pads=[0, 0, 0, 0, 1, 0, 0, 0]) for part in (s.dy, op.Unsqueeze(columns.matrix(), axes=[1]))
    )
    spread = op.Transpose(op.MatMul(dy, across), perm=[0, 2, 1, 3])  # [R, bins, C, W]
    right = op.Reshape(spread, op.vector(-1, op.Mul(op.dim(s.x, 1), op.dim(s.x, 3))))
    total = op.MatMul(op.Transpose(left, perm=[0, 2, 1]), right)  # [N, H, C W]
    return op.Transpose(op.Reshape(total, op.vector(0, height, op.dim(s.x, 1), -1)), perm=[0, 2, 1, 3])


def _roi_max(op: Emit, s: Step, rows: _Grid, columns: _Grid) -> ir.Value:
    """The first of the weighted pixels that gave the maximum: not samples, but the four parts of each are compared."""
    (y, y_weight, y_exists), (x, x_weight, x_exists) = rows.corners(), columns.corners()
    ahead, behind = [2, 4], [1, 3]  # [R, bins, K] of one axis and of the other: [R, rows, columns, K, K]
    candidates = op.Mul(op.Gather(op.Shape(y), [2], axis=0), op.Gather(op.Shape(x), [2], axis=0))
    joined = op.vector(op.dim(s.input(2), 0), rows.bins, columns.bins, candidates)

    def pairs(combine: str, first: ir.Value, second: ir.Value) -> ir.Value:
        both = getattr(op, combine)(op.Unsqueeze(first, axes=ahead), op.Unsqueeze(second, axes=behind))
        return op.Reshape(both, joined)

    height, width, channels = (op.dim(s.x, axis) for axis in (2, 3, 1))
    base = op.Mul(op.Reshape(s.input(2), [-1, 1, 1]), op.Mul(height, width))
    pixel = pairs("Add", op.Add(base, op.Mul(y, width)), x)
    weight, exists = pairs("Mul", y_weight, x_weight), pairs("And", y_exists, x_exists)
    image = op.Reshape(op.Transpose(s.x, perm=[0, 2, 3, 1]), op.vector(-1, channels))
    values = op.Mul(op.Gather(image, pixel, axis=0), op.Unsqueeze(weight, axes=[4]))  # [R, rows, columns, K, C]
    values = op.Where(op.Unsqueeze(exists, axes=[4]), values, op.like(-np.inf, s.x))
    best = op.ArgMax(values, axis=3, keepdims=0)
    winner = op.Add(op.Mul(op.GatherElements(pixel, best, axis=3), channels), op.Reshape(op.positions(s.x, 1), [-1]))
    share = op.Mul(op.Transpose(s.dy, perm=[0, 2, 3, 1]), op.GatherElements(weight, best, axis=3))
    nothing = op.Reshape(op.zeros_like(s.x), [-1])
    total = op.ScatterElements(nothing, op.Reshape(winner, [-1]), op.Reshape(share, [-1]), axis=0, reduction="add")
    return op.Transpose(op.Reshape(total, op.vector(-1, height, width, channels)), perm=[0, 3, 1, 2])


def affine_grid_theta(op: Emit, s: Step) -> ir.Value:
    """Each place is theta (x, y, ..., 1): for a column of theta, dy is summed with that coordinate of the places."""
    rank, aligned = s.rank(s.y) - 2, bool(s.argument("align_corners"))
    axes = list(range(1, rank + 1))
    columns = []
    for axis in reversed(axes):  # x runs along the last axis
        size = op.cast_like(op.dim(s.y, axis), s.dy)
        number = op.cast_like(op.positions(s.y, axis), s.dy)
        if aligned:
            place = op.Div(op.Mul(number, 2), op.Max(op.Sub(size, 1), op.like(1, size)))
        else:
            place = op.Div(op.Add(op.Mul(number, 2), 1), size)
        columns.append(op.ReduceSum(op.Mul(s.dy, op.Sub(place, 1)), axes=axes, keepdims=0))
    columns.append(op.ReduceSum(s.dy, axes=axes, keepdims=0))
    return op.Concat(*(op.Unsqueeze(column, axes=[2]) for column in columns), axis=2)


VJPS = {
    "AffineGrid": inputs(affine_grid_theta),
    "GridSample": inputs(grid_sample_x, grid_sample_grid),
    "RoiAlign": inputs(roi_align_x),
}
