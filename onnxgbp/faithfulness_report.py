"""What `faithfulness.py` found: the figures of each method, whether it beats a random map, and the curves."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxgbp.curves import Panel, save_curves
from onnxgbp.errors import printable
from onnxgbp.files import write
from onnxgbp.findings import json_numbers

__all__ = ["EDGES", "RANDOM", "RESULTS", "FaithfulnessReport", "MethodFigures", "SampleFigures", "save_report"]

RESULTS = "faithfulness.json"
RANDOM, EDGES = "random", "sobel"  # the maps beside the methods'
BLUR = 20  # the standard deviation of the blur is the shorter side divided by this
_CURVES = "curves.faithfulness.png"
_FEWEST = 5  # samples that a verdict needs
_ERRORS = 2  # standard errors, from which on a difference counts


@dataclasses.dataclass(frozen=True)
class SampleFigures:
    """Of one map. deletion, insertion: the probability of the class at each share of the pixels, from 0 to 1; hit: None
    without a box; sensitivity: None where it was not measured, or the map is zero or not finite.
    """

    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    hit: bool | None
    sensitivity: float | None

    @property
    def areas(self) -> tuple[float, float]:
        """Under deletion and insertion, by trapezoids."""
        return _area(self.deletion), _area(self.insertion)


@dataclasses.dataclass(frozen=True)
class MethodFigures:
    """One method, or `random` or `sobel`, with a row for each sample."""

    method: str
    rows: tuple[SampleFigures, ...]

    def values(self, figure: str) -> list[float | None]:
        """deletion or insertion (areas), hit or sensitivity, of every sample."""
        if figure in ("deletion", "insertion"):
            return [row.areas[figure == "insertion"] for row in self.rows]
        return [None if (value := getattr(row, figure)) is None else float(value) for row in self.rows]

    def summary(self) -> dict[str, Any]:
        """Each figure as mean, standard error (None of fewer than two) and count; None where there is none."""
        return {figure: _mean(self.values(figure)) for figure in _FIGURES}


_FIGURES = ("deletion", "insertion", "hit", "sensitivity")


@dataclasses.dataclass(frozen=True)
class FaithfulnessReport:
    """What `check_faithfulness` found; figures: the methods, then `random`, then `sobel` where inputs are pictures."""

    model: str
    sha256: str
    explained: str
    probability: str
    baseline: str
    steps: int
    radius: float
    noise_samples: int
    random_seed: int
    samples: tuple[str, ...]
    notes: tuple[str, ...]
    figures: tuple[MethodFigures, ...]

    def verdicts(self) -> dict[str, str]:
        """A line for each method: whether it beats a random map, by the paired differences of the samples."""
        by_name = {one.method: one for one in self.figures}
        own = [one for one in self.figures if one.method != RANDOM]
        return {one.method: _verdict(one, by_name[RANDOM], by_name.get(EDGES)) for one in own}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        said = dataclasses.asdict(dataclasses.replace(self, figures=()))
        verdicts = self.verdicts()
        methods = [
            {"method": one.method, **one.summary(), "verdict": verdicts.get(one.method)}
            | {"samples": [dataclasses.asdict(row) | dict(zip(_AREAS, row.areas, strict=True)) for row in one.rows]}
            for one in self.figures
        ]
        del said["figures"]
        found: dict[str, Any] = json_numbers(said | {"methods": methods})
        return {"onnxgbp": importlib.metadata.version("onnxgbp")} | found

    def to_text(self) -> str:
        width = max(len(one.method) for one in self.figures)
        lines = [
            f"{self.model}: maps of '{self.explained}', {len(self.samples)} samples; {self.probability}",
            f"pixels replaced by {_REPLACED[self.baseline]}, in {self.steps} steps",
            *self.notes,
            f"{'':<{width}}  {'deletion AUC':>15}  {'insertion AUC':>15}  {'pointing':>15}  {'max-sensitivity':>15}",
        ]
        lines += [
            f"{one.method:<{width}}" + "".join(f"  {_shown(one.values(f)):>15}" for f in _FIGURES)
            for one in self.figures
        ]
        lines.append("mean +- standard error; deletion and sensitivity: smaller, insertion and pointing: larger")
        lines += [f"{name}: {said}" for name, said in self.verdicts().items()]
        return "\n".join(map(printable, lines))


_AREAS = ("deletion_auc", "insertion_auc")
_REPLACED = {"blur": f"a blurred picture (sigma: shorter side / {BLUR})", "mean": "the mean of each channel"}


def _area(curve: Sequence[float]) -> float:
    return float(np.mean((np.asarray(curve[1:]) + np.asarray(curve[:-1])) / 2))


def _mean(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "standard_error": error, "count": len(known)}


def _shown(values: Sequence[float | None]) -> str:
    found = _mean(values)
    if found is None:
        return "-"
    error = "" if found["standard_error"] is None else f" +- {found['standard_error']:.3f}"
    return f"{found['mean']:.3f}{error}"


def _verdict(one: MethodFigures, random: MethodFigures, edge: MethodFigures | None) -> str:
    said, won = [], []
    for figure, sign in (("deletion", -1), ("insertion", 1)):
        found = _against(one, random, figure, sign)
        if found is None:
            return f"no verdict from fewer than {_FEWEST} samples"
        mean, error = found
        won.append(mean > _ERRORS * error)
        word = "better" if won[-1] else "worse" if mean < -_ERRORS * error else "not told apart"
        said.append(f"{figure} {word} by {mean:.3f} +- {error:.3f}" if word != "not told apart" else f"{figure} {word}")
    beats = {2: "beats a random map", 1: "beats a random map in one of two", 0: "does NOT beat a random map"}[sum(won)]
    text = f"{beats} ({', '.join(said)})"
    if edge is not None and one is not edge:
        better = [f for f, sign in (("deletion", -1), ("insertion", 1)) if _beats(one, edge, f, sign)]
        text += f"; beats an edge detector in {' and '.join(better)}" if better else "; does NOT beat an edge detector"
    return text


def _against(one: MethodFigures, other: MethodFigures, figure: str, sign: int) -> tuple[float, float] | None:
    """The mean of the paired differences, above zero where `one` is better, and its standard error."""
    pairs = zip(one.values(figure), other.values(figure), strict=True)
    found = _mean([sign * (a - b) for a, b in pairs if a is not None and b is not None])
    return None if found is None or found["count"] < _FEWEST else (found["mean"], found["standard_error"])


def _beats(one: MethodFigures, other: MethodFigures, figure: str, sign: int) -> bool:
    found = _against(one, other, figure, sign)
    return found is not None and found[0] > _ERRORS * found[1]


def save_report(report: FaithfulnessReport, out: Path) -> None:
    shares = np.linspace(0, 1, report.steps + 1).tolist()
    panels = []
    for name, label in (("deletion", "share of pixels taken out"), ("insertion", "share of pixels put back")):
        curves = {
            one.method: np.mean([getattr(row, name) for row in one.rows], axis=0).tolist() for one in report.figures
        }
        panels.append(Panel(name, shares, curves, label, "mean probability of the class"))
    save_curves(out / _CURVES, panels, columns=2)
    text = json.dumps(report.to_dict() | {"files": {"curves": _CURVES}}, indent=2, ensure_ascii=False, allow_nan=False)
    write(out / RESULTS, (text + "\n").encode())
