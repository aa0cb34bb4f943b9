"""What is kept of what the graph measures: sums over the batches, and the figures of a report that come of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.activations import Activation
from onnxgbp.emit import dims_of
from onnxgbp.health_measure import EXPONENTS, PREFIX, SIDE, unit_axis

__all__ = ["Sums", "activation_row", "add", "gradient_by_depth", "gradient_figures"]

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass
class Sums:
    """Over the batches so far, in float64, which holds counts up to 2**53; of a map the first two alone.

    size: places; gradient: the sum of squares of dy; and of the finite places of each unit their number, how many are
    active, the sum of y and of its square, the lowest and the highest; bins: counts, 2**exponent / SIDE wide each.
    """

    size: float
    gradient: float
    finite: Array
    active: Array
    total: Array
    squares: Array
    low: Array
    high: Array
    exponent: int
    bins: Array

    @classmethod
    def of(cls, measured: Mapping[str, Array]) -> Sums:
        given = {name: np.ravel(value).astype(np.float64) for name, value in measured.items()}
        none = np.zeros(0)
        count, mean = given.get("finite", none), given.get("mean", none)
        return cls(
            size=float(given["size"][0]),
            gradient=float(given["gradient"][0]),
            finite=count,
            active=given.get("active", none),
            total=count * mean,
            squares=given.get("spread", none) + count * mean**2,
            low=given.get("low", none),
            high=given.get("high", none),
            exponent=EXPONENTS.start + int(given.get("exponent", np.zeros(1))[0]),
            bins=given.get("bins", np.zeros(2 * SIDE)),
        )

    def plus(self, other: Sums, share: float) -> Sums:
        exponent = max(self.exponent, other.exponent)
        return Sums(
            self.size + share * other.size,
            self.gradient + share * other.gradient,
            self.finite + share * other.finite,
            self.active + share * other.active,
            self.total + share * other.total,
            self.squares + share * other.squares,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            exponent,
            self.binned(exponent) + share * other.binned(exponent),
        )

    def binned(self, exponent: int) -> Array:
        """The counts in bins as wide or wider: each is a whole number of these."""
        places = (np.arange(-SIDE, SIDE) >> (exponent - self.exponent)) + SIDE
        return np.bincount(places, weights=self.bins, minlength=2 * SIDE)


def add(sums: dict[str, Sums], outputs: Mapping[str, Any], share: float = 1.0) -> None:
    """Adds a batch, by the name of the tensor; a share of it below zero takes off again what it had added."""
    measured: dict[str, dict[str, Array]] = {}
    for name, value in outputs.items():
        what, _, tensor = name.removeprefix(PREFIX).partition("/")
        measured.setdefault(tensor, {})[what] = np.asarray(value)
    for tensor, given in measured.items():
        one = Sums.of(given)
        sums[tensor] = sums[tensor].plus(one, share) if tensor in sums else one


def gradient_figures(sums: Sums, scale: float, samples: int) -> dict[str, float]:
    total = max(sums.gradient, 0.0) / scale**2 if math.isfinite(sums.gradient) else math.nan
    return {"rms": math.sqrt(total / max(round(sums.size), 1)), "norm": math.sqrt(total / samples)}


def activation_row(
    kept: Mapping[str, Any], activation: Activation, sums: Sums | None, scale: float, samples: int
) -> dict[str, Any]:
    """One activation. A unit counts as constant where it had one value at all places."""
    row = {name: kept[name] for name in ("node", "inside", "kind", "spelled", "output", "depth", "rule", "gate")}
    row |= {"measured": sums is not None}
    if sums is None:
        return row
    axis, shape = unit_axis(activation), dims_of(activation.y) or ()
    finite, active = np.rint(sums.finite), np.rint(sums.active)
    count, seen = float(finite.sum()), finite > 0
    dead, always = seen & (active == 0), seen & (active == finite)
    constant = seen & (sums.low == sums.high)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, std = _moments(finite, sums.total, sums.squares)
        whole, spread = _moments(count, sums.total.sum(), sums.squares.sum())
        share = float(active.sum() / count) if count else math.nan
    bins = np.rint(sums.bins)
    used = np.flatnonzero(bins) if bins.any() else np.zeros(1, int)
    width = 2.0**sums.exponent / SIDE
    counts = {"active": active.astype(np.int64).tolist(), "places": finite.astype(np.int64).tolist()}
    units = {"mean": mean, "std": std, "min": sums.low, "max": sums.high}
    return row | {
        "axis": axis,
        "unit": "tensor" if axis is None else "channel" if len(shape) > 2 else "unit",
        "units": len(finite),
        "values": round(sums.size),
        "not_finite": round(sums.size - count),
        "active": share,
        "saturated": 1 - share,
        "dead": _those(dead) | {"constant": int((dead & constant).sum())},
        "always_active": _those(always),
        "mean": float(whole),
        "std": float(spread),
        "min": float(sums.low.min()),
        "max": float(sums.high.max()),
        "histogram": {
            "start": float((used[0] - SIDE) * width),
            "width": width,
            "counts": [int(n) for n in bins[used[0] : used[-1] + 1]],
        },
        "gradient": gradient_figures(sums, scale, samples),
        "per_unit": counts | {name: _short(values) for name, values in units.items()} if axis is not None else None,
    }


def _moments(count: Any, total: Any, squares: Any) -> tuple[Any, Any]:
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _those(which: Array) -> dict[str, Any]:
    indices = np.flatnonzero(which).tolist()
    return {"count": len(indices), "share": len(indices) / max(len(which), 1), "indices": indices}


def _short(values: Array) -> list[float]:
    """In the seven digits that float32 has."""
    return [float(f"{value:.7g}") for value in values]


def gradient_by_depth(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The gradient by depth, the first before the last."""
    judged = [row for row in rows if row["measured"] and row["gate"] is None]
    levels = list[dict[str, Any]]()
    for depth in sorted({row["depth"] for row in judged}):
        here = [row for row in judged if row["depth"] == depth]
        squares = sum(row["gradient"]["rms"] * row["gradient"]["rms"] * row["values"] for row in here)
        rms = math.sqrt(squares / max(sum(row["values"] for row in here), 1))
        norm = math.sqrt(sum(row["gradient"]["norm"] * row["gradient"]["norm"] for row in here))
        levels.append({"depth": depth, "nodes": [row["node"] for row in here], "rms": rms, "norm": norm})
    for level, behind in itertools.zip_longest(levels, levels[1:]):
        level["to_last"] = _ratio(level["rms"], levels[-1]["rms"])
        level["to_next"] = _ratio(level["rms"], behind["rms"]) if behind is not None else None
    for row in rows:
        if row["measured"] and levels:
            row["gradient"]["to_last"] = _ratio(row["gradient"]["rms"], levels[-1]["rms"])
    return levels


def _ratio(a: float, b: float) -> float | None:
    return a / b if b and math.isfinite(a / b) else None
