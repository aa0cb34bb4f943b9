"""GridSample, AffineGrid and DeformConv for onnx's reference evaluator, whose own answer in float32, and slowly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = ["AffineGrid", "DeformConv", "GridSample"]

Array: TypeAlias = "np.ndarray[Any, Any]"


def _cubic(distance: Array) -> Array:
    """The weight of a pixel at a distance from the place, for a = -3/4."""
    d, a = np.abs(distance), -0.75
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0)))


# By the distance of a pixel from the place.
_WEIGHTS: dict[str, Callable[[Array], Array]] = {
    "nearest": np.ones_like,
    "linear": lambda distance: np.asarray(1 - np.abs(distance)),
    "cubic": _cubic,
}


class GridSample(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        grid: Array,
        align_corners: int | None = None,
        mode: str | None = None,
        padding_mode: str | None = None,
    ) -> tuple[Array]:
        rank, kind = x.ndim - 2, (mode or "linear").removeprefix("bi")
        shape, spots = grid.shape[:-1], {"nearest": [0], "linear": [0, 1], "cubic": [-1, 0, 1, 2]}[kind]
        picked, shares = list[list[Array]](), list[list[Array]]()  # of each axis of x, each pixel that is read along it
        weigh = _WEIGHTS[kind]
        for i, size in enumerate(x.shape[:1:-1]):  # the grid begins with the last axis
            g = grid[..., i]
            place = (g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2
            low = np.rint(place) if kind == "nearest" else np.floor(place)
            pixels = [(low + spot).astype(np.int64) for spot in spots]
            inside = [self._padded(pixel, size, padding_mode or "zeros", align_corners) for pixel in pixels]
            weights = [weigh(place - pixel) for pixel in pixels]
            if (padding_mode or "zeros") == "zeros":
                weights = [np.where(a == b, w, 0) for w, a, b in zip(weights, pixels, inside, strict=True)]
            picked.insert(0, inside)
            shares.insert(0, weights)
        batch = np.arange(len(x)).reshape(-1, *[1] * rank)
        y = np.zeros((*shape, x.shape[1]), x.dtype)
        for taps in itertools.product(range(len(spots)), repeat=rank):
            weight = np.prod([shares[axis][tap] for axis, tap in enumerate(taps)], axis=0)
            at: Any = (batch, slice(None), *(picked[axis][tap] for axis, tap in enumerate(taps)))
            y += weight[..., None] * x[at]
        return (np.moveaxis(y, -1, 1),)

    @staticmethod
    def _padded(pixel: Array, size: int, padding: str, aligned: int | None) -> Array:
        """The pixel of the image for one that may lie beyond it."""
        if padding == "reflection":
            period, last = (max(2 * size - 2, 1), 2 * size - 2) if aligned else (2 * size, 2 * size - 1)
            pixel = pixel % period
            return np.asarray(np.minimum(pixel, last - pixel))
        return np.clip(pixel, 0, size - 1)


class AffineGrid(OpRun):
    op_domain = ""

    def _run(self, theta: Array, size: Array, align_corners: int | None = None) -> tuple[Array]:
        spatial = [int(n) for n in size[2:]]
        along = [
            2 * np.arange(n) / max(n - 1, 1) - 1 if align_corners else (2 * np.arange(n) + 1) / n - 1 for n in spatial
        ]
        places = np.stack([*np.meshgrid(*along, indexing="ij")[::-1], np.ones(spatial)], axis=-1)
        return (np.einsum("...j,nkj->n...k", places, theta).astype(theta.dtype),)


class DeformConv(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        w: Array,
        offset: Array,
        b: Array | None = None,
        mask: Array | None = None,
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,  # noqa: ARG002 - it is that of the weights
        offset_group: int = 1,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        rank, kernel = x.ndim - 2, w.shape[2:]
        batch, channels, out = len(x), x.shape[1], offset.shape[2:]
        moved = offset.reshape(batch, offset_group, *kernel, rank, *out)
        masks = None if mask is None else mask.reshape(batch, offset_group, *kernel, *out)
        starts = [
            (np.arange(size) * stride - begin).reshape([-1 if axis == i else 1 for axis in range(rank)])
            for i, (size, stride, begin) in enumerate(
                zip(out, strides or [1] * rank, (pads or [0] * rank)[:rank], strict=True)
            )
        ]
        y = np.zeros((batch, w.shape[0], *out), x.dtype)
        filters = w.reshape(group, -1, *w.shape[1:])
        share = channels // offset_group
        for tap in np.ndindex(*kernel):
            sampled = []
            for g in range(offset_group):
                at: Any = (slice(None), g, *tap)
                along = [starts[i] + tap[i] * (dilations or [1] * rank)[i] + moved[(*at, i)] for i in range(rank)]
                values = _linear(x[:, g * share : (g + 1) * share], along)
                sampled.append(values if masks is None else values * masks[at][:, None])
            columns = np.concatenate(sampled, axis=1).reshape(batch, group, -1, *out)
            weights = filters[(slice(None), slice(None), slice(None), *tap)]
            y += np.einsum("goc,ngc...->ngo...", weights, columns).reshape(y.shape)
        return (y if b is None else y + b.reshape(-1, *[1] * rank),)


def _linear(x: Array, places: Sequence[Array]) -> Array:
    """Images [N, C, D...] at places [N, O...] for each axis, counted in pixels, with zeros around: [N, C, O...]."""
    rank = len(places)
    batch = np.arange(len(x)).reshape(-1, *[1] * rank)
    total: Array = np.zeros((*np.broadcast(batch, *places).shape, x.shape[1]), x.dtype)
    for corner in itertools.product((0, 1), repeat=rank):
        pixels = [np.floor(place).astype(np.int64) + one for place, one in zip(places, corner, strict=True)]
        weight = np.prod([1 - np.abs(place - pixel) for place, pixel in zip(places, pixels, strict=True)], axis=0)
        for pixel, size in zip(pixels, x.shape[2:], strict=True):
            weight = np.where((pixel >= 0) & (pixel < size), weight, 0)
        inside = [np.clip(pixel, 0, size - 1) for pixel, size in zip(pixels, x.shape[2:], strict=True)]
        at: Any = (batch, slice(None), *inside)
        total += weight[..., None] * x[at]
    return np.moveaxis(total, -1, 1)
