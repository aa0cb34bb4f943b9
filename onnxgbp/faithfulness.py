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
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.boxes import Boxes, read_boxes
from onnxgbp.compare import extract, first_line, softmax
from onnxgbp.curves import require_plots
from onnxgbp.data import Batch, batches
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explained import explained_tensor
from onnxgbp.explainer import Explainer
from onnxgbp.faithfulness_report import (
    BLUR,
    EDGES,
    RANDOM,
    RESULTS,
    FaithfulnessReport,
    MethodFigures,
    SampleFigures,
    save_report,
)
from onnxgbp.files import result_folder
from onnxgbp.given import InputSpec
from onnxgbp.inputs import attributed
from onnxgbp.maps import channel_axis, edges, smoothed, with_baselines, without_channels
from onnxgbp.metadata import refuse_converted
from onnxgbp.methods import split_methods
from onnxgbp.model import METADATA, Source, load, to_proto
from onnxgbp.session import open_session

__all__ = ["BASELINES", "check_faithfulness"]

Array: TypeAlias = npt.NDArray[Any]

BASELINES = ("blur", "mean")
_TOGETHER = 4  # samples whose maps are made in one run
_ROOM = 16  # changed pictures in one run


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
    on_error: Callable[[str], Any] | None = None,
    **preprocessing: Any,
) -> FaithfulnessReport:
    """Measures each method's maps of the strongest class over all samples.

    The changed pictures, 16 at a time, go through the part of the model that makes the scores, in one session.

    Args:
        model: a classifier of one input.
        images: as for `data.batches`: a folder of photos or a .npy.
        methods: any that an `Explainer` takes, whose maps lie on the input's pixels; expected-gradients draws its
            baselines from the samples.
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
        on_error: as for `data.batches`.
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
    known_boxes = None if boxes is None else read_boxes(boxes)
    source = load(model)
    refuse_converted(source)
    options: dict[str, Any] = {"output": output, "provider": provider, "diagnose": False}
    besides = with_baselines(names, source, images, limit=limit, on_error=on_error, **preprocessing)
    explainers = {name: Explainer(str(model), method=name, **options, **besides[name]) for name in names}
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

    sides = None if known_boxes is None else Boxes(known_boxes, first.metadata, spec, preprocessing)
    rows: dict[str, list[SampleFigures]] = {name: [] for name in mappers}
    done: list[str] = []
    reading: dict[str, Any] = {"batch": _TOGETHER, "limit": limit, "on_error": on_error, **preprocessing}
    for batch in batches(images, [spec], first.metadata, **reading):
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
        save_report(report, out)
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
    boxes: Boxes | None

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
                other = smoothed(x, max(min(x.shape[i] for i in space) / BLUR, 0.3), space)
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
