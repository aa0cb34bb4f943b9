"""Sanity checks of attribution maps (Adebayo et al. 2018, arXiv:1810.03292): do they depend on what the model learned?

A map that stays as it is when layers lose what they learned, or when another class is asked for, shows the picture and
not the model. Every map is held against that of the trained model for the same sample and class:

- cascading: the layers' weights are made random from the scores downwards, one layer more in each step;
- independent: those of one layer alone;
- random logit: the trained model's map of a class drawn at random;
- class swap: that of the runner-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxgbp.curves import require_plots
from onnxgbp.data import Batch, batches
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explainer import Explainer
from onnxgbp.explanation import Explanation
from onnxgbp.files import result_folder
from onnxgbp.images import Preprocessing, read
from onnxgbp.maps import Likeness, channel_axis, likeness, similarity, with_baselines
from onnxgbp.methods import split_methods
from onnxgbp.model import METADATA, load
from onnxgbp.sanity_report import KINDS, RESULTS, Grid, MethodChecks, SanityReport, save_report
from onnxgbp.weights import Opened, open_weights, random_weights

__all__ = ["check_sanity"]

Array: TypeAlias = npt.NDArray[Any]


def check_sanity(
    model: str | Path,
    images: str | Path,
    *,
    methods: str | Sequence[str] = ("gradient", "deconvnet", "guided"),
    out: Path | None = None,
    output: str | None = None,
    limit: int | None = None,
    random_seed: int = 0,
    zero_mean: bool = False,
    provider: str = "auto",
    progress: Callable[[str], Any] | None = None,
    on_error: Callable[[str], Any] | None = None,
    **preprocessing: Any,
) -> SanityReport:
    """Runs the checks for each method over all samples.

    Each method has one session, whose weights are inputs; memory holds one batch of maps and two sets of weights.

    Args:
        model: a classifier.
        images: as for `data.batches`: a folder of photos, a .npy or .npz.
        methods: any that an `Explainer` takes; expected-gradients draws its baselines from the samples.
        out: a folder for the curves, the maps of the first sample where they are pictures, and last `sanity.json`.
        output: the tensor to explain, as for `Explainer`.
        limit: read no more samples than this.
        random_seed: of the weights, and of the random classes.
        zero_mean: draw the weights around 0 as initialisers do, not around each weight's own mean.
        provider: as for `Explainer`.
        progress: is told how many samples are done.
        on_error: as for `data.batches`.
        **preprocessing: overrides of what the model's metadata says.

    Raises:
        OnnxgbpError: the model, the data or an option cannot be used, or there is `out` and no matplotlib.
    """
    names = split_methods(methods)
    source = load(model)
    opened = open_weights(source, output)
    if len(opened.wrt) != 1:
        raise OnnxgbpError(f"maps of one tensor are compared, and this model has {', '.join(map(repr, opened.wrt))}")
    if isinstance(random_seed, bool) or random_seed < 0:
        raise OnnxgbpError(f"the random seed is {random_seed}, not a number of 0 or more")
    random = [random_weights(layer, (random_seed, i), zero_mean=zero_mean) for i, layer in enumerate(opened.layers)]
    draw = np.random.default_rng((random_seed, len(random)))
    besides = with_baselines(names, source, images, limit=limit, on_error=on_error, **preprocessing)
    checker = _Checker(opened, random, draw, besides, output, provider, preprocessing)
    if out is not None:
        require_plots()
        result_folder(out, RESULTS)
    grid: Grid | None = None
    read_so_far: list[str] = []
    for batch in batches(images, checker.inputs, checker.metadata, limit=limit, on_error=on_error, **preprocessing):
        shown = checker.add(batch, show=out is not None and not read_so_far)
        if shown is not None:
            grid = Grid(shown, *_photo(batch.names[0], checker, preprocessing))
        read_so_far += batch.names
        if progress is not None:
            progress(f"{len(read_so_far)} samples done")
    report = SanityReport(
        str(model),
        source.sha256,
        checker.metadata[METADATA + "explained"],
        random_seed,
        zero_mean,
        tuple(read_so_far),
        opened.layers,
        opened.kept,
        checker.found(),
    )
    if out is not None:
        save_report(report, grid, out)
    return report


class _Checker:
    """The methods' sessions, and what was found so far."""

    def __init__(
        self,
        opened: Opened,
        random: Sequence[dict[str, Array]],
        draw: np.random.Generator,
        methods: Mapping[str, dict[str, Any]],
        output: str | None,
        provider: str,
        preprocessing: Mapping[str, Any],
    ) -> None:
        self._layers, self._random, self._draw = opened.layers, random, draw
        options: dict[str, Any] = {"wrt": opened.wrt, "output": output, "provider": provider, "diagnose": False}
        self._explainers = {
            name: Explainer(opened.model, method=name, **options, **besides) for name, besides in methods.items()
        }
        first = next(iter(self._explainers.values()))
        self._trained = {name: array for layer in self._layers for name, array in layer.weights.items()}
        self.inputs = tuple(spec for spec in first.inputs if spec.name not in self._trained)
        self.metadata = first.metadata
        self._classes = first.classes
        self._axis = channel_axis(self.inputs[0], self.metadata, preprocessing) if len(self.inputs) == 1 else None
        steps = [(kind, place) for kind in KINDS for place in range(len(self._layers))]
        self._rows: dict[tuple[str, Any], list[Likeness]] = {
            (name, key): [] for name in methods for key in [*steps, "random_logit", "class_swap"]
        }

    def add(self, batch: Batch, *, show: bool) -> dict[str, list[Array]] | None:
        """Runs all checks on a batch; for `show`, gives the first sample's maps by method: trained, then cascading."""
        count, shown = len(batch.names), dict[str, list[Array]]()
        target: Array | None = None
        others: dict[str, Array] = {}
        for name, explainer in self._explainers.items():
            trained = explainer(batch.feeds | self._trained, target)
            if target is None:
                target = trained.target
                others = self._other_classes(trained)
            maps = self._maps(explainer, trained, count)
            shown[name] = [maps[0].copy()] if show else []
            for key, feeds in self._steps():
                changed = self._maps(explainer, explainer(batch.feeds | feeds, target), count)
                self._compare(name, key, maps, changed)
                if show and key[0] == "cascading":
                    shown[name].append(changed[0].copy())  # a view would keep the whole batch
            for other, classes in others.items():
                swapped = self._maps(explainer, explainer(batch.feeds | self._trained, classes), count)
                self._compare(name, other, maps, swapped)
        return shown if show else None

    def _steps(self) -> Iterator[tuple[tuple[str, int], dict[str, Array]]]:
        cascade = self._trained
        for place, drawn in enumerate(self._random):
            cascade = cascade | drawn
            yield ("cascading", place), cascade
            yield ("independent", place), self._trained | drawn

    def _other_classes(self, trained: Explanation) -> dict[str, Array]:
        count, chosen = self._classes, trained.target
        scores = np.asarray(trained.scores, np.float64).reshape(len(trained.scores), -1)
        if count is None or count < 2 or scores.shape != (len(chosen), count):
            return {}
        drawn = (chosen + self._draw.integers(1, count, len(chosen))) % count
        np.put_along_axis(scores, chosen[:, np.newaxis], -np.inf, axis=1)
        return {"random_logit": drawn, "class_swap": scores.argmax(axis=1)}

    def _maps(self, explainer: Explainer, result: Explanation, count: int) -> Array:
        maps = np.asarray(result.attribution)
        if maps.ndim < 2 or len(maps) < count:
            raise OnnxgbpError(f"{explainer.methods[0]} gives {list(maps.shape)}, not one map for each sample")
        return maps[:count]

    def _compare(self, name: str, key: Any, maps: Array, changed: Array) -> None:
        self._rows[name, key] += [likeness(a, b, self._axis) for a, b in zip(maps, changed, strict=True)]

    def found(self) -> tuple[MethodChecks, ...]:
        def curve(name: str, kind: str) -> tuple[dict[str, Any], ...]:
            return tuple(similarity(self._rows[name, (kind, place)]) for place in range(len(self._layers)))

        def other(name: str, key: str) -> dict[str, Any] | None:
            return similarity(self._rows[name, key]) if self._rows[name, key] else None

        return tuple(
            MethodChecks(
                name,
                cascading=curve(name, "cascading"),
                independent=curve(name, "independent"),
                random_logit=other(name, "random_logit"),
                class_swap=other(name, "class_swap"),
            )
            for name in self._explainers
        )


def _photo(name: str, checker: _Checker, options: Mapping[str, Any]) -> tuple[str, str, Image.Image | None]:
    """How the input is laid out, and the photo where it is one."""
    try:
        prepared = Preprocessing.of(checker.metadata, checker.inputs[0], **options)
    except OnnxgbpError:
        return "nchw", "", None
    # The samples of an array are called by their index.
    return prepared.layout, prepared.channels, prepared.cropped(read(Path(name))) if Path(name).suffix else None
