"""What docs/activations.md shows of docs/activations.json: its tables, the numbers in its prose, its figures.

A number of the prose stands before a comment that names it, `0.94<!--GELU maps/guided/noise_cosine-->`: the mean over
the seeds of a figure of the JSON's runs; `lowest` and `highest` in place of an activation are those of these means. It
is written anew in as many digits as it has; before ` %` it is times 100.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from onnxgbp.curves import require_plots
from onnxgbp.files import output_file
from onnxgbp.render import signed_picture

__all__ = ["ACTIVATIONS", "RESULTS", "RULES", "current", "draw_chart", "draw_maps", "refresh"]

Array: TypeAlias = npt.NDArray[Any]
Seeds: TypeAlias = dict[str, dict[str, list[float]]]  # by activation and figure, one value for each seed

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, RESULTS = DOCS / "activations.md", DOCS / "activations.json"
CHART, MAPS = DOCS / "activations.png", DOCS / "activations.maps.png"

# The order of every table and figure: saturating on both sides, the ReLU and its bent kin, the smooth ones.
ACTIVATIONS = ("Sigmoid", "Tanh", "ReLU", "LeakyReLU", "ELU", "SELU", "GELU", "SiLU")
RULES = ("gradient", "deconvnet", "guided")
REFERENCE = "ReLU"


def read_seeds() -> Seeds:
    """Every figure of every run; what a run lacks (a blank map has no correlation) is left out."""
    found: Seeds = {name: {} for name in ACTIVATIONS}
    for run in json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]:
        for figure, value in _figures(run):
            found[run["activation"]].setdefault(figure, []).append(value)
    return found


def _figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Nested names joined by strokes; entries of a list by their number, from 1."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _figures(one, f"{name}/{key}" if name else key)
    elif isinstance(value, list):
        for place, one in enumerate(value, start=1):
            yield from _figures(one, f"{name}/{place}")
    elif isinstance(value, (int, float)):
        yield name, float(value)


# --- tables ---------------------------------------------------------------------------------------

Column: TypeAlias = tuple[str, str, Callable[[float], str]]  # its heading, its figure, how a number is written


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:.1g}" if value < 0.01 else f"{value:.2f}"


def _by_rule(heading: str, figure: str) -> list[Column]:
    return [(f"{heading}: {rule}" if rule == RULES[0] else rule, f"maps/{rule}/{figure}", _plain) for rule in RULES]


TABLES: dict[str, list[Column]] = {
    "networks": [
        ("accuracy", "accuracy/scaled", _percent),
        ("from torch's first weights", "accuracy/torch", _percent),
        ("dead units", "dead", _percent),
        ("saturated places", "saturated", _percent),
        ("gradient, first / last: torch's first weights", "before/torch/1", _short),
        ("scaled first weights", "before/scaled/1", _short),
        ("trained", "trained/1", _short),
    ],
    "guiding": [
        ("f' takes", "gates/slope", _percent),
        ("guiding takes of the rest", "gates/guiding", _percent),
        ("guided map to gradient's: cosine", "maps/guided/cosine/gradient", _plain),
        ("rank", "maps/guided/rank/gradient", _plain),
        ("to deconvnet's: cosine", "maps/guided/cosine/deconvnet", _plain),
        ("rank", "maps/guided/rank/deconvnet", _plain),
        ("to as-relu's: cosine", "maps/guided/cosine/as-relu", _plain),
        ("rank", "maps/guided/rank/as-relu", _plain),
    ],
    "looks": [
        *_by_rule("noise", "noise_cosine"),
        *_by_rule("area", "area"),
        *_by_rule("digit", "digit"),
        ("as-relu", "maps/as-relu/digit", _plain),
    ],
    "sanity": [
        *_by_rule("runner-up's map", "runner_up"),
        *_by_rule("upper half random", "upper_half"),
        *_by_rule("another digit's map", "other_digit"),
    ],
    "faithfulness": [
        ("deletion: random", "baselines/random/deletion", _plain),
        *((rule, f"maps/{rule}/deletion", _plain) for rule in RULES),
        ("edges", "baselines/sobel/deletion", _plain),
        ("insertion: random", "baselines/random/insertion", _plain),
        *((rule, f"maps/{rule}/insertion", _plain) for rule in RULES),
        ("edges", "baselines/sobel/insertion", _plain),
    ],
}


def _table(seeds: Seeds, columns: Sequence[Column]) -> Iterator[str]:
    yield f"| | {' | '.join(heading for heading, _, _ in columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in ACTIVATIONS:
        yield f"| {' | '.join([name, *(_cell(seeds, name, figure, style) for _, figure, style in columns)])} |"


def _cell(seeds: Seeds, name: str, figure: str, style: Callable[[float], str]) -> str:
    """Mean and standard deviation over the seeds; bold where it is told apart from the ReLU's."""
    values = seeds[name].get(figure, [])
    if not values:
        return "-"
    written = style(float(np.mean(values)))
    if len(values) > 1:
        written = f"{written.removesuffix(' %')} ± {style(_spread(values))}"
    return f"**{written}**" if apart(values, seeds[REFERENCE].get(figure, [])) else written


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))


def apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the means differ by more than twice the standard deviation of a difference of two seeds."""
    if len(a) < 2 or len(b) < 2:
        return False
    return bool(abs(np.mean(a) - np.mean(b)) > 2 * math.hypot(_spread(a), _spread(b)))


# --- the page -------------------------------------------------------------------------------------

_NUMBER = re.compile(r"(-?\d[\d.]*(?:e[-+]\d+)?)( %)?<!--(\w+) ([\w/-]+)-->")
_NAMED = re.compile(r"<!--\w")


def current(text: str) -> str:
    """The page's text with its tables and numbers as they should be.

    Raises:
        ValueError: markers are missing or in the wrong order, or a comment names no figure.
    """
    seeds = read_seeds()
    for name, columns in TABLES.items():
        opening, closing = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, begin, rest = text.partition(opening)
        _, end, after = rest.partition(closing)
        if not begin or not end:
            raise ValueError(f"{PAGE.name} holds no table between {opening} and {closing}")
        table = "\n".join(_table(seeds, columns))
        text = f"{before}{opening}\n\n{table}\n\n{closing}{after}"
    if len(_NUMBER.findall(text)) != len(_NAMED.findall(text)):
        raise ValueError(f"{PAGE.name} has a comment that names a figure without a number before it")
    return _NUMBER.sub(lambda match: _number(seeds, match), text)


def _number(seeds: Seeds, match: re.Match[str]) -> str:
    written, percent, name, figure = match.groups()
    means = {one: float(np.mean(figures[figure])) for one, figures in seeds.items() if figure in figures}
    means |= {"lowest": min(means.values()), "highest": max(means.values())} if means else {}
    if name not in means:
        raise ValueError(f"{RESULTS.name} has no figure {figure} of {name}")
    value = means[name] * (100 if percent else 1)
    shown = f"{value:.0e}" if "e" in written else f"{value:.{len(written.partition('.')[2])}f}"
    return f"{shown}{percent or ''}<!--{name} {figure}-->"


def refresh(*, write: bool) -> int:
    """Brings the page up to date; without `write` says only whether it is. The exit status."""
    text = PAGE.read_text(encoding="utf-8")
    try:
        wanted = current(text)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if text == wanted:
        return 0
    if not write:
        print(f"docs/{PAGE.name} is stale: python tools/activation_study.py --tables", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


# --- figures --------------------------------------------------------------------------------------

# Okabe & Ito's colours, told apart by every eye; the marks say the same.
_MARKS = (("#0072B2", "o"), ("#E69F00", "s"), ("#D55E00", "^"), ("#777777", "x"))


# The title of each panel, its figures by label, whether its axis is logarithmic.
_PANELS: list[tuple[str, dict[str, str], bool]] = [
    (
        "gradient at the first activation, the last = 1",
        {
            "torch's first weights": "before/torch/1",
            "scaled first weights": "before/scaled/1",
            "scaled and trained": "trained/1",
        },
        True,
    ),
    ("share of the energy taken", {"by f'": "gates/slope", "of the rest, by guiding": "gates/guiding"}, False),
    *(
        (title, {rule: f"maps/{rule}/{name}" for rule in RULES} | other, False)
        for title, name, other in (
            ("cosine of the maps with and without noise", "noise_cosine", {}),
            ("rank correlation with the runner-up class's map", "runner_up", {}),
            ("area under deletion: smaller is better", "deletion", {"random": "baselines/random/deletion"}),
            ("area under insertion: larger is better", "insertion", {"random": "baselines/random/insertion"}),
        )
    ),
]


def draw_chart() -> None:
    """docs/activations.png: figures by activation, a mark at the mean, a bar from the lowest to the highest seed."""
    seeds = read_seeds()
    figure = require_plots()(figsize=(10, 8.6), layout="constrained")
    for axes, (title, shown, logarithmic) in zip(figure.subplots(3, 2).ravel(), _PANELS, strict=True):
        _panel(axes, seeds, title, shown, logarithmic=logarithmic)
    with output_file(CHART) as aside:
        figure.savefig(aside, format="png", dpi=90)


def _panel(axes: Any, seeds: Seeds, title: str, shown: Mapping[str, str], *, logarithmic: bool) -> None:
    for place, ((label, name), (colour, mark)) in enumerate(zip(shown.items(), _MARKS, strict=False)):
        x = np.arange(len(ACTIVATIONS)) + 0.16 * (place - (len(shown) - 1) / 2)
        values = [seeds[one].get(name) or [math.nan] for one in ACTIVATIONS]
        means = np.array([np.mean(one) for one in values])
        reach = np.array([means - [min(one) for one in values], [max(one) for one in values] - means])
        axes.errorbar(x, means, reach.clip(0), fmt=mark, color=colour, label=label, markersize=5, elinewidth=1.5)
    if logarithmic:
        axes.set_yscale("log")
    for between in range(1, len(ACTIVATIONS)):
        axes.axvline(between - 0.5, color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.set_xticks(range(len(ACTIVATIONS)), ACTIVATIONS, fontsize=8)
    axes.set_xlim(-0.5, len(ACTIVATIONS) - 0.5)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(shown))


_SCALE = 5  # pixels of the sheet along a side of a map's pixel
_GAP, _CAPTION, _LABEL = 4, 20, 84  # pixels: between maps, above them all, left of them for the rule's name


def draw_maps(digits: Array, maps: Mapping[str, Mapping[str, Array]]) -> None:
    """docs/activations.maps.png: rows of digits and rules, a column for each activation, each map on its own scale.

    Args:
        digits: [N, H, W], from 0 to 1.
        maps: by activation and rule, [N, 1, H, W].
    """
    side = digits.shape[-1] * _SCALE
    step, block = side + _GAP, len(RULES) * (side + _GAP) + 2 * _GAP
    left = side + _LABEL
    size = (left + len(maps) * step - _GAP, _CAPTION + len(digits) * block - 3 * _GAP)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=13)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(maps):
        draw.text((left + column * step + side / 2, 2), name, fill="black", font=font, anchor="ma")
    for place, digit in enumerate(digits):
        top = _CAPTION + place * block
        sheet.paste(_enlarged(Image.fromarray(np.rint(255 * (1 - digit)).astype(np.uint8))), (0, top))
        for row, rule in enumerate(RULES):
            y = top + row * step
            draw.text((left - 6, y + side / 2), rule, fill="black", font=font, anchor="rm")
            for column, found in enumerate(maps.values()):
                picture = signed_picture(found[rule][place]).image
                sheet.paste(_enlarged(picture), (left + column * step, y))
    with output_file(MAPS) as aside:
        sheet.save(aside, format="png", optimize=True)


def _enlarged(image: Image.Image) -> Image.Image:
    size = (image.width * _SCALE, image.height * _SCALE)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
