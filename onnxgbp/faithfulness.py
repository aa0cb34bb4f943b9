"""How far maps point at what the model uses, each against a random map and an edge detector, which know of no model.

- deletion: the pixels are taken out in the order of the map, the strongest first; the probability of the explained
  class should fall early: a small area under the curve (Petsiuk et al. 2018, arXiv:1806.07421);
- insertion: they are put back into a picture that lacks them all; it should rise early: a large area;
- pointing game: the strongest pixel lies in a box of the object, or within 15 pixels of it (Zhang et al. 2016,
  arXiv:1608.00507);
- max-sensitivity: the largest of |map(x + d) - map(x)| / |map(x)| over a few small random d (Yeh et al. 2019,
  arXiv:1901.09392); smaller is steadier, and says nothing of being right.

What is taken out is replaced by a blurred picture or by the mean of each channel. Either is a picture that no model was
trained on, so the areas compare maps of one model and mean little by themselves.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.compare import extract, first_line, softmax
from onnxgbp.curves import Panel, require_plots, save_curves
from onnxgbp.data import Batch, batches
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explained import explained_tensor
from onnxgbp.files import result_folder, write
from onnxgbp.images import Preprocessing, read
from onnxgbp.inputs import attributed
from onnxgbp.maps import channel_axis, edges, smoothed, without_channels
from onnxgbp.model import METADATA, Source, load, to_proto
from onnxgbp.report import json_numbers
from onnxgbp.runtime import Explainer, InputSpec, open_session
from onnxgbp.sanity import split_methods

__all__ = ["BASELINES", "RESULTS", "FaithfulnessReport", "MethodFigures", "SampleFigures", "check_faithfulness"]

Array: TypeAlias = npt.NDArray[Any]
Box: TypeAlias = tuple[float, float, float, float]

RESULTS = "faithfulness.json"
BASELINES = ("blur", "mean")
RANDOM, EDGES = "random", "sobel"
_CURVES = "curves.faithfulness.png"
_BLUR = 20  # the standard deviation of the blur is the shorter side divided by this
_TOLERANCE = 15  # pixels around a box
_TOGETHER = 4  # samples whose maps are made in one run
_ROOM = 16  # changed pictures in one run
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
        return "\n".join(lines)


_AREAS = ("deletion_auc", "insertion_auc")
_REPLACED = {"blur": f"a blurred picture (sigma: shorter side / {_BLUR})", "mean": "the mean of each channel"}


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


def check_faithfulness(
    model: str | Path,
    images: str | Path,
    *,
    methods: str | Sequence[str] = ("gradient", "deconvnet", "guided"),
    out: Path | None = None,
    output: str | None = None,
    boxes: Path | None = None,
    baseline: str = "blur",
    steps: int = 32,
    noise_samples: int = 5,
    radius: float = 0.02,
    limit: int | None = None,
    random_seed: int = 0,
    provider: str = "auto",
    progress: Callable[[str], Any] | None = None,
    **preprocessing: Any,
) -> FaithfulnessReport:
    """Measures each method's maps of the strongest class over all samples.

    The changed pictures, 16 at a time, go through the part of the model that makes the scores, in one session.

    Args:
        model: a classifier of one input.
        images: as for `data.batches`: a folder of photos or a .npy.
        methods: any that an `Explainer` takes, whose maps lie on the input's pixels.
        out: a folder for the curves and last `faithfulness.json`, with every sample's figures.
        output: the tensor to explain, as for `Explainer`: scores [N, K].
        boxes: a JSON object of the name of a file (without its folder; of an array: the index of the sample) and
            [x0, y0, x1, y1], or a list of such, in pixels of the upright photo (or of the array). What the crop cuts
            off of a box does not count; a sample whose boxes are all outside, or that has none, is left out.
        baseline: blur or mean.
        steps: in which pixels go; an entry of the curves each, and one before.
        noise_samples: changed inputs for max-sensitivity; 0 leaves it out.
        radius: of their noise, uniform in each entry, as a share of the sample's own range.
        limit: read no more samples than this.
        random_seed: of the random map, the noise and the order of equal pixels.
        provider: as for `Explainer`.
        progress: is told how many samples are done.
        **preprocessing: overrides of what the model's metadata says.

    Raises:
        OnnxgbpError: the model, the data, the boxes or an option cannot be used, or there is `out` and no matplotlib.
    """
    names = split_methods(methods)
    if baseline not in BASELINES:
        raise OnnxgbpError(f"no baseline is called '{baseline}': choose one of {', '.join(BASELINES)}")
    if steps < 1 or noise_samples < 0 or not 0 < radius < math.inf:
        raise OnnxgbpError("steps must be 1 or more, noise samples 0 or more, and the radius above 0")
    if taken := {RANDOM, EDGES} & set(names):
        raise OnnxgbpError(f"'{min(taken)}' is measured beside the methods: leave it out")
    known_boxes = None if boxes is None else _read_boxes(boxes)
    source = load(model)
    if METADATA + "method" in source.model.metadata_props:
        raise OnnxgbpError(f"{source.name} is already a converted file; give the model that it was made from")
    options: dict[str, Any] = {"output": output, "provider": provider, "diagnose": False}
    explainers = {name: Explainer(str(model), method=name, **options) for name in names}
    first = explainers[names[0]]
    if len(first.inputs) != 1:
        raise OnnxgbpError(f"pixels are taken out of one input, and this model takes {len(first.inputs)}")
    spec = first.inputs[0]
    scorer = _Scorer(source, spec, output, provider)
    axis = channel_axis(spec, first.metadata, preprocessing)
    rng = np.random.default_rng(random_seed)
    mappers: dict[str, _Mapper] = {name: _mapper(explainer, spec) for name, explainer in explainers.items()}
    mappers[RANDOM] = lambda x, _: rng.random(x.shape)
    if axis is not None:
        mappers[EDGES] = lambda x, _: _edge_maps(x, axis)
    if out is not None:
        require_plots()
        result_folder(out, RESULTS)

    sides = None if known_boxes is None else _Boxes(known_boxes, first.metadata, spec, preprocessing)
    rows: dict[str, list[SampleFigures]] = {name: [] for name in mappers}
    done: list[str] = []
    for batch in batches(images, [spec], first.metadata, batch=_TOGETHER, limit=limit, **preprocessing):
        run = _Run(batch, spec, axis, scorer, baseline, steps, noise_samples, radius, rng, sides)
        target = first(batch.feeds).target
        for name, mapper in mappers.items():
            rows[name] += run.measured(name, mapper, target)
        done += batch.names
        if progress is not None:
            progress(f"{len(done)} samples done")
    notes = list[str]()
    if known_boxes is not None:
        boxed = sum(row.hit is not None for row in rows[RANDOM])
        if not boxed:
            raise OnnxgbpError(f"{boxes} has a box within the crop for none of the {len(done)} samples")
        notes.append(f"{boxed} of {len(done)} samples have a box")
    report = FaithfulnessReport(
        str(model),
        source.sha256,
        first.metadata[METADATA + "explained"],
        scorer.said,
        baseline,
        steps,
        radius,
        noise_samples,
        random_seed,
        tuple(done),
        tuple(notes),
        tuple(MethodFigures(name, tuple(found)) for name, found in rows.items()),
    )
    if out is not None:
        _save(report, out)
    return report


_Mapper: TypeAlias = "Callable[[Array, Array], Array]"  # inputs [N, ...], classes [N] -> maps [N, ...]


def _mapper(explainer: Explainer, spec: InputSpec) -> _Mapper:
    def mapped(x: Array, target: Array) -> Array:
        return np.asarray(explainer({spec.name: x}, target).attribution)

    return mapped


def _edge_maps(x: Array, axis: int) -> Array:
    """Of the mean over the channels, with one channel."""
    grey = np.asarray(x, np.float64).mean(axis=axis + 1)
    return np.expand_dims(edges(grey), axis + 1)


class _Scorer:
    """The probability of a class, from the part of the model that makes the scores."""

    def __init__(self, source: Source, spec: InputSpec, output: str | None, provider: str) -> None:
        graph = source.model.graph
        explained = explained_tensor(graph, attributed(graph, (), output).tensors, output)
        tensor, producer = explained.tensor, explained.tensor.producer()
        ends = {node.op_type for node in explained.stripped}
        made = producer.op_type if producer is not None else ""
        self._output = tensor.name or ""
        self._squash = "none" if made in ("Softmax", "Sigmoid") else "sigmoid" if "Sigmoid" in ends else "softmax"
        self.said = {
            "none": "the model's own probability of the strongest class",
            "sigmoid": "the sigmoid of the strongest class",
            "softmax": "the softmax of the strongest class",
        }[self._squash]
        proto = extract(to_proto(source.model, source), {self._output: int(tensor.dtype or 1)}, [self._output])
        self._session = open_session(proto, source, provider)
        self._name, self._spec = source.name, spec

    def __call__(self, x: Array, target: int) -> list[float]:
        """Of each picture, [n, ...]."""
        fixed, count = self._spec.shape[0], len(x)
        room = fixed if isinstance(fixed, int) else count
        x = np.concatenate([x, np.repeat(x[-1:], -count % room, axis=0)])
        rows = [self._scores(x[start : start + room]) for start in range(0, len(x), room)]
        return [self._probability(row, target) for row in np.concatenate(rows)[:count]]

    def _scores(self, x: Array) -> Array:
        try:
            (scores,) = self._session.run([self._output], {self._spec.name: x})
        except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
            raise OnnxgbpError(f"ONNX Runtime could not run {self._name}: {first_line(error)}") from None
        scores = np.asarray(scores, np.float64)
        if scores.ndim < 1 or len(scores) != len(x) or scores.size != math.prod(scores.shape[:2]):
            raise OnnxgbpError(
                f"'{self._output}' is {list(scores.shape)}: deletion and insertion take one score for each class"
            )
        return scores.reshape(len(x), -1)

    def _probability(self, row: Array, target: int) -> float:
        if self._squash == "none":
            return float(row[target])
        if self._squash == "sigmoid" or row.size == 1:
            return float(1 / (1 + math.exp(-max(-700.0, min(700.0, row[target])))))
        return float(softmax(row)[target])


@dataclasses.dataclass(frozen=True)
class _Run:
    """One batch, and how it is measured."""

    batch: Batch
    spec: InputSpec
    axis: int | None
    scorer: _Scorer
    baseline: str
    steps: int
    noise_samples: int
    radius: float
    rng: np.random.Generator
    boxes: _Boxes | None

    def measured(self, name: str, mapper: _Mapper, target: Array) -> list[SampleFigures]:
        """Of each sample under one method."""
        x = self.batch.feeds[self.spec.name]
        maps = mapper(x, target)
        wanted = x.shape if self.axis is None else _pixels(x.shape, self.axis)
        if maps.ndim != x.ndim or (maps.shape if self.axis is None else _pixels(maps.shape, self.axis)) != wanted:
            raise OnnxgbpError(
                f"a map of {name} is {list(maps.shape[1:])}, which does not lie on the pixels of {self.spec} "
                f"{list(x.shape[1:])}: leave {name} out"
            )
        changes = self._sensitivity(mapper, x, target, maps)
        rows = []
        for i, sample in enumerate(self.batch.names):
            magnitude = without_channels(maps[i], self.axis)[1]
            magnitude = np.where(np.isfinite(magnitude), magnitude, 0)
            curves = self._curves(x[i], magnitude, int(target[i]))
            hit = None if self.boxes is None else self.boxes.hit(sample, magnitude)
            rows.append(SampleFigures(*curves, hit, changes[i]))
        return rows

    def _curves(self, x: Array, magnitude: Array, target: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Deletion and insertion of one sample."""
        shuffled = self.rng.permutation(magnitude.size)  # equal pixels go in no order, not row by row
        order = shuffled[np.argsort(-magnitude.ravel()[shuffled], kind="stable")]
        ranks = np.empty(magnitude.size, np.int64)
        ranks[order] = np.arange(magnitude.size)
        place: Array = ranks.reshape(magnitude.shape)
        place = place if self.axis is None else np.expand_dims(place, self.axis)
        counts = np.linspace(0, magnitude.size, self.steps + 1).round().astype(int)
        other = self._without(x)
        curves = []
        for before, behind in ((x, other), (other, x)):
            curve: list[float] = []
            for start in range(0, len(counts), _ROOM):
                changed = np.stack([np.where(place < n, behind, before) for n in counts[start : start + _ROOM]])
                curve += self.scorer(changed, target)
            curves.append(tuple(curve))
        return curves[0], curves[1]

    def _without(self, x: Array) -> Array:
        """The sample without anything in it: blurred, or its means."""
        if self.axis is None:  # no picture: nothing to blur along
            other = np.full(x.shape, np.asarray(x, np.float64).mean())
        else:
            space = (1, 2) if self.axis == 0 else (0, 1)
            if self.baseline == "mean":
                other = np.broadcast_to(np.asarray(x, np.float64).mean(axis=space, keepdims=True), x.shape)
            else:
                other = smoothed(x, max(min(x.shape[i] for i in space) / _BLUR, 0.3), space)
        return (np.rint(other) if x.dtype.kind in "iu" else other).astype(x.dtype)

    def _sensitivity(self, mapper: _Mapper, x: Array, target: Array, maps: Array) -> list[float | None]:
        """Of each sample; an input of integers has no small changes."""
        rows = maps.reshape(len(x), -1).astype(np.float64)
        sizes = np.linalg.norm(rows, axis=1)
        if not self.noise_samples or x.dtype.kind != "f":
            return [None] * len(x)
        flat = x.reshape(len(x), -1).astype(np.float64)
        reach = self.radius * (flat.max(axis=1) - flat.min(axis=1))
        largest = np.zeros(len(x))
        for _ in range(self.noise_samples):
            noise = self.rng.uniform(-1, 1, flat.shape) * reach[:, np.newaxis]
            near = (flat + noise).reshape(x.shape).astype(x.dtype)
            changed = mapper(near, target).reshape(len(x), -1).astype(np.float64)
            with np.errstate(invalid="ignore"):
                largest = np.maximum(largest, np.linalg.norm(changed - rows, axis=1))
        known = np.isfinite(largest) & np.isfinite(sizes) & (sizes > 0)
        return [
            float(change / size) if fine else None for change, size, fine in zip(largest, sizes, known, strict=True)
        ]


def _pixels(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The shape of a batch of pictures without the channels."""
    return tuple(size for i, size in enumerate(shape) if i != axis + 1)


# --- boxes ----------------------------------------------------------------------------------------


def _read_boxes(path: Path) -> dict[str, list[Box]]:
    try:
        given = json.loads(path.read_bytes())
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise OnnxgbpError(f"cannot read {path}: it is no JSON") from None
    if not isinstance(given, dict):
        raise OnnxgbpError(f"{path} is no JSON object of file names and boxes")
    return {name: _boxes_of(value, f"{path}: the box of '{name}'") for name, value in given.items()}


def _boxes_of(value: Any, where: str) -> list[Box]:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    found = []
    for row in rows:
        numbers = isinstance(row, list) and all(isinstance(n, (int, float)) and math.isfinite(n) for n in row)
        if not numbers or len(row) != 4 or row[0] >= row[2] or row[1] >= row[3]:
            raise OnnxgbpError(f"{where} is {json.dumps(row)}, not [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
        found.append((float(row[0]), float(row[1]), float(row[2]), float(row[3])))
    return found


class _Boxes:
    """The boxes in the pixels that the model sees."""

    def __init__(
        self, known: Mapping[str, list[Box]], metadata: Mapping[str, str], spec: InputSpec, options: Mapping[str, Any]
    ) -> None:
        self._known, self._metadata, self._spec, self._options = known, metadata, spec, options

    def hit(self, sample: str, magnitude: Array) -> bool | None:
        """Whether the strongest pixel of [H, W] lies in one or near; None without a box in the picture."""
        boxes = self._known.get(Path(sample).name, [])
        if not boxes or magnitude.ndim != 2:
            return None
        if Path(sample).suffix:  # a photo; the samples of an array are called by their index
            prepared, size = Preprocessing.of(self._metadata, self._spec, **self._options), read(Path(sample)).size
            boxes = [prepared.placed(box, size) for box in boxes]
        height, width = magnitude.shape
        boxes = [(max(a, 0), max(b, 0), min(c, width), min(d, height)) for a, b, c, d in boxes]
        boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
        if not boxes:
            return None
        row, column = divmod(int(magnitude.argmax()), width)
        x, y = column + 0.5, row + 0.5  # the middle of a pixel
        away = (max(a - x, x - c, b - y, y - d) for a, b, c, d in boxes)
        return bool(min(away) <= _TOLERANCE)


def _save(report: FaithfulnessReport, out: Path) -> None:
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
