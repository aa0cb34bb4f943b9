"""Sanity checks of attribution maps (Adebayo et al. 2018, arXiv:1810.03292): do they depend on what the model learned?

A map that stays as it is when layers lose what they learned, or when another class is asked for, shows the picture and
not the model. Every map is held against that of the trained model for the same sample and class:

- cascading: the layers' weights are made random from the scores downwards, one layer more in each step;
- independent: those of one layer alone;
- random logit: the trained model's map of a class drawn at random;
- class swap: that of the runner-up.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from onnxgbp.curves import Panel, require_plots, save_curves
from onnxgbp.data import Batch, batches
from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import output_file, result_folder, write
from onnxgbp.images import Preprocessing, read
from onnxgbp.maps import MEASURES, Likeness, channel_axis, likeness, similarity
from onnxgbp.model import METADATA, load
from onnxgbp.render import signed_picture
from onnxgbp.report import json_numbers
from onnxgbp.runtime import Explainer, Explanation
from onnxgbp.weights import Layer, Opened, open_weights, random_weights

__all__ = ["RESULTS", "MethodChecks", "SanityReport", "check_sanity", "split_methods"]

Array: TypeAlias = npt.NDArray[Any]

RESULTS = "sanity.json"
KINDS = ("cascading", "independent")
_CURVES, _GRID = "curves.sanity.png", "maps.sanity.png"
_SAME = 0.9  # a median rank correlation of the magnitudes above which the report calls maps the same
_LITTLE = 0.25  # a share of the change below which the report says that the upper layers hardly count
_COLUMNS = 12  # steps that the grid of maps shows at most
_CELL, _GAP, _HEAD, _SIDE = 112, 4, 34, 110  # pixels
_TITLES = {
    "rank_absolute": "rank correlation, |map|",
    "rank_signed": "rank correlation, signed",
    "ssim_absolute": "SSIM, |map|",
    "ssim_signed": "SSIM, signed",
}


@dataclasses.dataclass(frozen=True)
class MethodChecks:
    """What the checks found for one method: medians over the samples, as `maps.similarity` gives them.

    cascading, independent: one entry for each layer, from the scores down. random_logit, class_swap: None where the
    model has one class.
    """

    method: str
    cascading: tuple[dict[str, Any], ...]
    independent: tuple[dict[str, Any], ...]
    random_logit: dict[str, Any] | None
    class_swap: dict[str, Any] | None

    @property
    def change(self) -> tuple[float, float] | None:
        """Which share of the change that |map| goes through in the whole cascade comes with the layer of the scores,
        and with the upper half of the layers, at most 1; None where it is not known, or there is no change.
        """
        ranks = [row["rank_absolute"] for row in self.cascading]
        first, half, last = ranks[0], ranks[_half(ranks) - 1], ranks[-1]
        if first is None or half is None or last is None or last > _SAME:
            return None
        return min((1 - first) / (1 - last), 1.0), min((1 - half) / (1 - last), 1.0)

    def verdict(self, *, zero_mean: bool) -> str:
        """What the figures say, in words; zero_mean: as the weights were drawn."""
        steps = [(1, "the layer of the scores random"), (len(self.cascading), "all layers")]
        steps.insert(1, (_half(self.cascading), f"the upper {_half(self.cascading)} of {len(self.cascading)}"))
        said = "; ".join(f"{name}: {_figures(self.cascading[step - 1])}" for step, name in dict(steps).items())
        blank = next((step for step, row in enumerate(self.cascading, start=1) if row["rank_absolute"] is None), None)
        if blank is not None:
            way_out = "" if zero_mean else "; --zero-mean may keep them"
            judged = f"most maps are blank from {blank} random layers on, which tells nothing of the rest{way_out}"
        elif self.change is None:
            judged = "FAILS: the map hardly depends on the weights at all"
        else:
            first, half = self.change
            word = "FAILS: hardly depends on" if half < _LITTLE else "depends partly on" if half < 0.5 else "depends on"
            judged = f"{half:.0%} of the change comes with the upper half, {first:.0%} with the scores' layer: "
            judged += f"{word} the upper layers"
        some = max(row["blank"] for row in self.cascading)
        judged += f" (up to {some} blank maps in a step are left out)" if some and blank is None else ""
        return said + ". " + judged + self._of_classes()

    def _of_classes(self) -> str:
        swap, logit = ((row or {}).get("rank_absolute") for row in (self.class_swap, self.random_logit))
        if swap is None or logit is None:
            return ""
        word = "hardly" if min(swap, logit) > _SAME else "partly" if max(swap, logit) >= 0.5 else "clearly"
        return f". The runner-up's map: {swap:.2f}, a random class's: {logit:.2f}: tells classes {word} apart"


def _half(steps: Sequence[Any]) -> int:
    return (len(steps) + 1) // 2


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['rank_absolute']:7.3f}" if row["rank_absolute"] is not None else f"{'blank':>7}"


def _figures(row: Mapping[str, Any]) -> str:
    if row["rank_absolute"] is None:
        return "blank"
    return f"{row['rank_absolute']:.2f} (signed {row['rank_signed']:.2f})"


@dataclasses.dataclass(frozen=True)
class SanityReport:
    """What `check_sanity` found."""

    model: str
    sha256: str
    explained: str
    random_seed: int
    zero_mean: bool
    samples: tuple[str, ...]
    layers: tuple[Layer, ...]
    kept: Mapping[str, int]
    methods: tuple[MethodChecks, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = [
            {"name": layer.name, "operator": layer.operator, "shapes": [list(w.shape) for w in layer.weights.values()]}
            for layer in self.layers
        ]
        rows = [dataclasses.asdict(one) | {"verdict": one.verdict(zero_mean=self.zero_mean)} for one in self.methods]
        said = dataclasses.asdict(dataclasses.replace(self, layers=(), methods=()))
        found: dict[str, Any] = json_numbers(said | {"layers": layers, "methods": rows})
        return {"onnxgbp": importlib.metadata.version("onnxgbp")} | found

    def to_text(self) -> str:
        lines = [
            f"{self.model}: maps of '{self.explained}', {len(self.samples)} samples, {len(self.layers)} layers",
            f"random weights: normal, with {'mean 0 and' if self.zero_mean else 'mean and'} standard deviation of each "
            f"weight and bias (seed {self.random_seed})",
        ]
        if self.kept:
            kept = ", ".join(f"{count} {operator}" for operator, count in self.kept.items())
            lines.append(f"trained numbers of these stay as they are: {kept}")
        lines.append("median rank correlation of |map| with the trained model's; c: cascading, i: this layer alone")
        width = max(len(layer.name) for layer in self.layers)
        lines.append(" " * width + "".join(f"  {one.method:>15}" for one in self.methods))
        lines.append(" " * width + f"  {'c':>7} {'i':>7}" * len(self.methods))
        for step, layer in enumerate(self.layers):
            figures = [f"  {_cell(one.cascading[step])} {_cell(one.independent[step])}" for one in self.methods]
            lines.append(f"{layer.name:<{width}}{''.join(figures)}")
        for title, name in (("a random class", "random_logit"), ("the runner-up", "class_swap")):
            rows = [getattr(one, name) for one in self.methods]
            if all(rows):
                lines.append(f"{title:<{width}}" + "".join(f"  {_cell(row)} {'':7}" for row in rows))
        lines += [f"{one.method}: {one.verdict(zero_mean=self.zero_mean)}" for one in self.methods]
        return "\n".join(line.rstrip() for line in lines)


def split_methods(methods: str | Sequence[str]) -> tuple[str, ...]:
    """Of 'gradient,guided', each once; whether there is such a method shows where it is used.

    Raises:
        OnnxgbpError: none, or one named twice.
    """
    names = tuple(name.strip() for name in (methods.split(",") if isinstance(methods, str) else methods))
    if not all(names) or len(set(names)) < len(names):
        raise OnnxgbpError(
            f"methods '{','.join(names)}' are no list of different methods: gradient,guided for instance"
        )
    return names


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
    **preprocessing: Any,
) -> SanityReport:
    """Runs the checks for each method over all samples.

    Each method has one session, whose weights are inputs; memory holds one batch of maps and two sets of weights.

    Args:
        model: a classifier.
        images: as for `data.batches`: a folder of photos, a .npy or .npz.
        methods: any that an `Explainer` takes.
        out: a folder for the curves, the maps of the first sample where they are pictures, and last `sanity.json`.
        output: the tensor to explain, as for `Explainer`.
        limit: read no more samples than this.
        random_seed: of the weights, and of the random classes.
        zero_mean: draw the weights around 0 as initialisers do, not around each weight's own mean.
        provider: as for `Explainer`.
        progress: is told how many samples are done.
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
    checker = _Checker(opened, random, draw, names, output, provider, preprocessing)
    if out is not None:
        require_plots()
        result_folder(out, RESULTS)
    grid: _Grid | None = None
    read_so_far: list[str] = []
    for batch in batches(images, checker.inputs, checker.metadata, limit=limit, **preprocessing):
        shown = checker.add(batch, show=out is not None and not read_so_far)
        if shown is not None:
            grid = _Grid(shown, *_photo(batch.names[0], checker, preprocessing))
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
        _save(report, grid, out)
    return report


class _Checker:
    """The methods' sessions, and what was found so far."""

    def __init__(
        self,
        opened: Opened,
        random: Sequence[dict[str, Array]],
        draw: np.random.Generator,
        methods: Sequence[str],
        output: str | None,
        provider: str,
        preprocessing: Mapping[str, Any],
    ) -> None:
        self._layers, self._random, self._draw = opened.layers, random, draw
        options: dict[str, Any] = {"wrt": opened.wrt, "output": output, "provider": provider, "diagnose": False}
        self._explainers = {name: Explainer(opened.model, method=name, **options) for name in methods}
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


# --- pictures -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The maps of one sample by method, the trained model's first; photo: what the model sees, None for arrays."""

    maps: dict[str, list[Array]]
    layout: str
    channels: str
    photo: Image.Image | None


def _photo(name: str, checker: _Checker, options: Mapping[str, Any]) -> tuple[str, str, Image.Image | None]:
    """How the input is laid out, and the photo where it is one."""
    try:
        prepared = Preprocessing.of(checker.metadata, checker.inputs[0], **options)
    except OnnxgbpError:
        return "nchw", "", None
    # The samples of an array are called by their index.
    return prepared.layout, prepared.channels, prepared.cropped(read(Path(name))) if Path(name).suffix else None


def _save(report: SanityReport, grid: _Grid | None, out: Path) -> None:
    panels, steps = [], range(1, len(report.layers) + 1)
    for kind in KINDS:
        for measure in MEASURES:
            curves = {one.method: [row[measure] for row in getattr(one, kind)] for one in report.methods}
            known = [value for curve in curves.values() for value in curve if value is not None]
            if known:
                curves = {name: [math.nan if v is None else v for v in curve] for name, curve in curves.items()}
                low = min(0.0, *known)
                label = "layers made random, from the scores" if kind == "cascading" else "the layer made random"
                panels.append(Panel(f"{kind}: {_TITLES[measure]}", steps, curves, label, "median similarity", low))
    files = {}
    if panels:  # all may be blank
        save_curves(out / _CURVES, panels, columns=-(-len(panels) // len(KINDS)))
        files["curves"] = _CURVES
    if grid is not None and all(one.ndim == 3 for maps in grid.maps.values() for one in maps):
        with output_file(out / _GRID) as aside:
            _drawn(grid, report.layers).save(aside, "PNG")
        files["maps"] = _GRID
    text = json.dumps(report.to_dict() | {"files": files}, indent=2, ensure_ascii=False, allow_nan=False)
    write(out / RESULTS, (text + "\n").encode())


def _drawn(grid: _Grid, layers: Sequence[Layer]) -> Image.Image:
    """Rows: the methods. Columns: the trained model, then the layers made random down to the one that is named.

    Each map is scaled for itself.
    """
    steps = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _COLUMNS)).round().astype(int))
    heads = ["trained", *(f"{step + 1}: {layers[step].name}" for step in steps)]
    places = [0, *(step + 1 for step in steps)]
    heads, first = (["photo", *heads], 1) if grid.photo is not None else (heads, 0)
    pitch = _CELL + _GAP
    sheet = Image.new("RGB", (_SIDE + len(heads) * pitch, _HEAD + len(grid.maps) * pitch), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, head in enumerate(heads):
        draw.multiline_text((_SIDE + column * pitch, 2), _folded(head, font), fill="black", font=font, spacing=2)
    for row, (method, maps) in enumerate(grid.maps.items()):
        top = _HEAD + row * pitch
        draw.multiline_text((2, top + _CELL // 2 - 8), _folded(method, font), fill="black", font=font)
        if grid.photo is not None:
            sheet.paste(grid.photo.resize((_CELL, _CELL)), (_SIDE, top))
        for column, place in enumerate(places, start=first):
            picture = signed_picture(maps[place], layout=grid.layout, channels=grid.channels).image
            sheet.paste(picture.resize((_CELL, _CELL), Image.Resampling.BILINEAR), (_SIDE + column * pitch, top))
    return sheet


def _folded(text: str, font: Any) -> str:
    """On two lines at most, each as wide as a cell; the end of a name tells more than its start."""
    first = text
    while font.getlength(first) > _CELL - 6:
        first = first[:-1]
    rest = text[len(first) :]
    while font.getlength(rest) > _CELL - 6:
        rest = "…" + rest.removeprefix("…")[1:]
    return f"{first}\n{rest}" if rest else first
