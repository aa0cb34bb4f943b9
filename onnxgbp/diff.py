"""Two models over the same data: how far their predictions agree, and how far the attributions of the same class do.

A is the one that is trusted, B the one under test. Each threshold that is given makes the comparison a gate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgbp.compare import angle, divergence, median_error, rank_correlation, softmax
from onnxgbp.errors import OnnxgbpError, printable
from onnxgbp.explainer import Explainer
from onnxgbp.findings import json_numbers
from onnxgbp.model import METADATA
from onnxgbp.pair import Pair, Result

__all__ = ["Difference", "MapRow", "SampleRow", "Thresholds", "diff_models"]

Array = npt.NDArray[Any]

_TOP = 5
_NAMED = 5  # samples that a missed threshold names
_COUNTED = 1e-3  # of the largest entry: what is smaller has no sign to speak of


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What B must reach, None where nothing is asked.

    cosine: of every map, at least. agreement: the share of samples with the same strongest class, at least.
    score_difference: |score of B - score of A| of any class, at most. relative_error: of every map, the median of
    |b - a| / |a|, at most; it tells rounding of the numbers (1e-3 for bfloat16), which no cosine does.
    """

    cosine: float | None = None
    agreement: float | None = None
    score_difference: float | None = None
    relative_error: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):  # no figure would ever miss a NaN
                raise OnnxgbpError(f"the threshold of {field.name.replace('_', ' ')} is {value}, no finite number")


@dataclasses.dataclass(frozen=True)
class MapRow:
    """Two maps of one sample, a of A and b of B, flattened.

    name: of the method and tensor, '' where there is one map a sample. cosine: of the angle between them, 1 for two
    zero maps, 0 where one of them is zero or not finite. rank_correlation: Spearman's, None where a map is constant.
    sign_agreement: the share of entries of one sign, of those where |a| exceeds a thousandth of its maximum, None
    where there are none. relative_error: the median of |b - a| / |a| over the same entries.
    """

    name: str
    cosine: float
    rank_correlation: float | None
    sign_agreement: float | None
    relative_error: float


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One sample.

    top1: the strongest class of either, None where its scores hold a NaN. top5_overlap: the share of the five strongest
    that both have. score_difference, mean_score_difference: |score of B - score of A|, the largest and the mean over
    the classes. divergence: Jensen-Shannon's of both, None where the scores are no probabilities. target, target_b:
    what either explains, which differs only where both are converted files that choose themselves; maps: then ().
    """

    name: str
    top1: tuple[int | None, int | None]
    top5_overlap: float
    score_difference: float
    mean_score_difference: float
    divergence: float | None
    target: Any
    target_b: Any
    maps: tuple[MapRow, ...]

    @property
    def agrees(self) -> bool:
        return self.top1[0] is not None and self.top1[0] == self.top1[1]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a comparison found; missed: one line for each threshold that B does not reach, with the samples."""

    a: str
    b: str
    notes: tuple[str, ...]
    rows: tuple[SampleRow, ...]
    missed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.missed

    @property
    def agreement(self) -> float:
        return float(np.mean([row.agrees for row in self.rows]))

    def summary(self) -> dict[str, Any]:
        """The figures over all samples; None where there is nothing to take them over."""
        scores = {
            "samples": len(self.rows),
            "top1_agreement": self.agreement,
            "top5_overlap": float(np.mean([row.top5_overlap for row in self.rows])),
            "max_score_difference": max(row.score_difference for row in self.rows),
            "mean_score_difference": float(np.mean([row.mean_score_difference for row in self.rows])),
            "divergence": _spread([row.divergence for row in self.rows]),
            "same_target": sum(bool(row.maps) for row in self.rows),
        }
        maps = [one for row in self.rows for one in row.maps]
        quantities = ("cosine", "rank_correlation", "sign_agreement", "relative_error")
        return scores | {name: _spread([getattr(one, name) for one in maps]) for name in quantities}

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite becomes null."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        said = {"passed": self.passed, "missed": list(self.missed), "summary": self.summary(), "samples": rows}
        found: dict[str, Any] = json_numbers({"a": self.a, "b": self.b, "notes": list(self.notes), **said})
        return found

    def to_text(self) -> str:
        said = self.summary()
        lines = [f"A  {self.a}", f"B  {self.b}", *self.notes]
        lines += [
            f"{said['samples']} samples, the same class explained in {said['same_target']}",
            f"{'top-1 agreement':<18} {said['top1_agreement']:.6g}",
            f"{'top-5 overlap':<18} {said['top5_overlap']:.6g}",
            f"{'score difference':<18} max {said['max_score_difference']:.4g}, "
            f"mean {said['mean_score_difference']:.4g}",
        ]
        for name in ("divergence", "cosine", "rank_correlation", "sign_agreement", "relative_error"):
            if said[name]:
                shown = ", ".join(f"{key} {value:.6g}" for key, value in said[name].items())
                lines.append(f"{name.replace('_', ' '):<18} {shown}")
        return "\n".join(map(printable, lines))


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    with np.errstate(invalid="ignore"):
        median, low = np.percentile(known, [50, 1])
    return {"median": float(median), "1st percentile": float(low), "min": min(known), "max": max(known)}


def diff_models(
    a: str | Path,
    b: str | Path,
    data: str | Path,
    *,
    method: str | None = None,
    target: int | str | None = None,
    limit: int | None = None,
    layout_b: str | None = None,
    provider: str = "auto",
    thresholds: Thresholds | None = None,
    **preprocessing: Any,
) -> Difference:
    """Compares two models, classifiers or converted files, sample by sample.

    Both explain the same class: `target`, or the strongest of A. Where one is a converted file that chooses its class
    itself, the other follows; where both are, the maps of a sample are compared if they chose the same.

    Photos are prepared for each model as its own metadata says, and the maps are carried back through that preparation
    to the photo's pixels (height, width, red, green, blue), where they are comparable. Arrays must fit both models.

    Args:
        a: the model to compare with, whose inputs name and lay out the arrays.
        b: the model under test.
        data: as for `data.batches`: photos for models of one image input, or arrays.
        method: as for `Explainer` (None: guided, or what a converted file has).
        target: the class to explain in all samples, by index or by A's name for it.
        limit: read no more samples than this.
        layout_b: nchw or nhwc, the axes of B's one input where they differ from A's: the arrays are transposed for it.
        provider: as for `Explainer`.
        thresholds: what B must reach.
        **preprocessing: size, crop, channels, scale, mean, std, each overriding what the metadata of both says.

    Raises:
        OnnxgbpError: a model or the data cannot be used, or the two cannot be compared: different methods or options of
            conversion, classes, inputs, or sizes of a picture.
    """
    first, second = (Explainer(path, method=method, provider=provider, diagnose=False) for path in (a, b))
    for setting in ("method", "activations", "seed", "unit"):
        mine, other = (one.metadata.get(METADATA + setting, "none") for one in (first, second))
        if mine != other:
            raise OnnxgbpError(
                f"maps of different kinds cannot be compared: {a} has {setting} {mine}, {b} has {other}; "
                "convert both with the same options"
            )
    if first.classes is not None and second.classes is not None and first.classes != second.classes:
        raise OnnxgbpError(f"A explains one of {first.classes} classes, B one of {second.classes}: they do not compare")
    pair = Pair.of(first, second, Path(data), layout_b, preprocessing)
    index = None
    if target is not None:
        index = int(first.check_target(target, 1)[0])
        second.check_target(index, 1)
    rows: list[SampleRow] = []
    kinds = (False, False)
    for name, x, y in pair.results(index, limit):
        if not rows:
            kinds = _kinds(x, y, pair)
        rows.append(_row(name, x, y, kinds))
    notes = pair.notes
    rules = [one.metadata[METADATA + "rules"] for one in (first, second)]
    if rules[0] != rules[1]:
        notes += (f"rules: A has {rules[0]}, B has {rules[1]}",)
    if kinds[0] != kinds[1]:
        other = "B" if kinds[0] else "A"
        notes += (f"scores: of {other}, which returns no probabilities as the other does, the softmax is compared",)
    missed = tuple(_missed(rows, thresholds or Thresholds()))
    return Difference(_headline(first), _headline(second), notes, tuple(rows), missed)


def _headline(explainer: Explainer) -> str:
    said = explainer.metadata
    unit = f", unit {said[METADATA + 'unit']}" if METADATA + "unit" in said else ""
    method = ",".join(explainer.methods)
    return f"{explainer.name}: {method} of '{said[METADATA + 'explained']}'{unit} on {explainer.provider}"


def _kinds(x: Result, y: Result, pair: Pair) -> tuple[bool, bool]:
    """Whether either model's scores are probabilities; refuses two results that cannot be held against each other."""
    if x.scores.shape != y.scores.shape:
        raise OnnxgbpError(
            f"A gives {x.scores.size} scores a sample ('{pair.a.scores_output}'), B {y.scores.size} "
            f"('{pair.b.scores_output}'): they cannot be compared"
        )
    if x.maps.keys() != y.maps.keys():
        raise OnnxgbpError(f"A explains {', '.join(x.maps)}; B {', '.join(y.maps)}: the maps cannot be paired")
    for name, one in x.maps.items():
        if one.shape != y.maps[name].shape:
            raise OnnxgbpError(
                f"a map of A has shape {list(one.shape)}, of B {list(y.maps[name].shape)}: they cannot be compared"
            )
    return _are_probabilities(x.scores), _are_probabilities(y.scores)


def _are_probabilities(scores: npt.NDArray[np.float64]) -> bool:
    return scores.size > 1 and bool((scores >= 0).all()) and abs(float(scores.sum()) - 1) < 1e-2


def _row(name: str, x: Result, y: Result, kinds: tuple[bool, bool]) -> SampleRow:
    mine, other = x.scores, y.scores
    if any(kinds):
        mine, other = (one if known else softmax(one) for one, known in zip((mine, other), kinds, strict=True))
    top = min(_TOP, mine.size)
    strongest = [set(np.argsort(-one, kind="stable")[:top].tolist()) for one in (mine, other)]
    with np.errstate(invalid="ignore"):
        apart = np.abs(other - mine)
    apart[mine == other] = 0  # two infinities
    apart[np.isnan(apart)] = math.inf
    same = np.array_equal(x.target, y.target)
    return SampleRow(
        name,
        (_strongest(mine), _strongest(other)),
        len(strongest[0] & strongest[1]) / top,
        float(apart.max()),
        float(apart.mean()),
        divergence(mine, other) if any(kinds) else None,
        np.asarray(x.target).tolist(),
        np.asarray(y.target).tolist(),
        tuple(_map_row(key, one, y.maps[key]) for key, one in x.maps.items()) if same else (),
    )


def _strongest(scores: npt.NDArray[np.float64]) -> int | None:
    return None if np.isnan(scores).any() else int(scores.argmax())


def _map_row(name: str, a: Array, b: Array) -> MapRow:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    counted = np.abs(a) > _COUNTED * np.abs(a).max(initial=0.0)
    agreement = float(np.mean(np.sign(a[counted]) == np.sign(b[counted]))) if counted.any() else None
    return MapRow(name, 1 - angle(a, b), rank_correlation(a, b), agreement, median_error(b, a))


def _missed(rows: Sequence[SampleRow], asked: Thresholds) -> Iterator[str]:
    """A line for each threshold that is not reached. A comparison is written so that a NaN does not reach it."""
    if asked.agreement is not None:
        apart = [row for row in rows if not row.agrees]
        share = 1 - len(apart) / len(rows)
        if share < asked.agreement:
            said = [f"{row.name} (A {row.top1[0]}, B {row.top1[1]})" for row in apart]
            yield _line(f"agreement {share:.6g} is below {asked.agreement:g}", said, len(rows))
    if asked.score_difference is not None:
        far = [row for row in rows if not row.score_difference <= asked.score_difference]
        if far:
            said = [
                f"{row.name} ({row.score_difference:.4g})" for row in sorted(far, key=lambda r: -r.score_difference)
            ]
            yield _line(f"score difference is above {asked.score_difference:g}", said, len(rows))
    if asked.cosine is not None:
        turned = {row.name: min((one.cosine for one in row.maps), default=-math.inf) for row in rows}
        yield from _by_map(rows, "cosine is below", asked.cosine, {k: v for k, v in turned.items() if v < asked.cosine})
    if asked.relative_error is not None:
        worst = {
            row.name: max((_or_infinite(one.relative_error) for one in row.maps), default=math.inf) for row in rows
        }
        missed = {name: -value for name, value in worst.items() if value > asked.relative_error}
        yield from _by_map(rows, "relative error is above", asked.relative_error, missed)


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _by_map(rows: Sequence[SampleRow], what: str, asked: float, missed: Mapping[str, float]) -> Iterator[str]:
    """missed: the value by sample, the worst the smallest."""
    if missed:
        classes = {row.name: f"A explains {row.target}, B {row.target_b}" for row in rows if not row.maps}
        ordered = sorted(missed, key=lambda name: missed[name])
        said = [f"{name} ({classes.get(name) or f'{abs(missed[name]):.4g}'})" for name in ordered]
        yield _line(f"{what} {asked:g}", said, len(rows))


def _line(what: str, samples: Sequence[str], count: int) -> str:
    more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
    return f"{what} in {len(samples)} of {count} samples: {', '.join(samples[:_NAMED])}{more}"
