"""What `sanity.py` found: the figures of each method and what they say, the curves, and a grid of the maps."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from onnxgbp.curves import Panel, save_curves
from onnxgbp.errors import printable
from onnxgbp.files import output_file, write
from onnxgbp.findings import json_numbers
from onnxgbp.maps import MEASURES
from onnxgbp.render import signed_picture
from onnxgbp.weights import Layer

__all__ = ["KINDS", "RESULTS", "Grid", "MethodChecks", "SanityReport", "save_report"]

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
        return "\n".join(printable(line.rstrip()) for line in lines)


# --- pictures -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grid:
    """The maps of one sample by method, the trained model's first; photo: what the model sees, None for arrays."""

    maps: dict[str, list[Array]]
    layout: str
    channels: str
    photo: Image.Image | None


def save_report(report: SanityReport, grid: Grid | None, out: Path) -> None:
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


def _drawn(grid: Grid, layers: Sequence[Layer]) -> Image.Image:
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
