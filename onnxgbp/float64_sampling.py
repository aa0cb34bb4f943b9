"""GridSample and AffineGrid for onnx's reference evaluator, whose own answer in float32, and slowly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = ["AffineGrid", "GridSample"]

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
