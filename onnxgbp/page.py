"""Plain values -> one HTML page that holds all it needs: what `report.py` found, through `templates/report.html`.

Nothing of the page is fetched, and its own policy forbids that it could be: styles and script stand in the file and are
allowed by their hashes, pictures are data. What comes from a model or from a file's name is escaped by the template
engine, wherever it stands.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

__all__ = ["render"]

_FOLDER = Path(__file__).parent / "templates"
_WIDTH, _HEIGHT = 320, 210  # of a chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 18, 8, 34
_STRIP = (96, 22)  # of a histogram in a table
_POINTS = 16  # marks on a curve at most
_STYLES = 8  # colours; from there on they repeat, with another mark
_MARKS = (  # around a point; every curve has its own, for eyes that do not tell its colour
    "m-3,0a3,3 0 1 0 6,0a3,3 0 1 0 -6,0z",
    "m-2.6,-2.6h5.2v5.2h-5.2z",
    "m0,-3.6l3.4,6h-6.8z",
    "m0,-3.8l3.4,3.8l-3.4,3.8l-3.4,-3.8z",
    "m0,3.6l3.4,-6h-6.8z",
    "m-3.2,-1h2.2v-2.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2z",
    "m-3.4,-1.2h6.8v2.4h-6.8z",
    "m-1.2,-3.4h2.4v6.8h-2.4z",
    "m-3,2.4l3,-5.6l3,5.6l-3,-1.6z",
)
_MEASURES = {
    "rank_absolute": "rank correlation of |map|",
    "rank_signed": "rank correlation, signed",
    "ssim_absolute": "SSIM of |map|",
    "ssim_signed": "SSIM, signed",
}
_KINDS = {
    "cascading": ("Cascading", "layers made random, from the scores down"),
    "independent": ("Independent", "the one layer made random"),
}
_REFERENCES = ("random", "sobel")
# dx: the gradient that leaves an activation y = f(x), dy: the one that arrives.
_MEANINGS = {
    "gradient": "dx at every activation: how the score would change (Simonyan et al. 2013)",
    "deconvnet": "dy where dy > 0, whatever the activation did (Zeiler & Fergus 2013)",
    "guided": "dx where dy > 0 (Springenberg et al. 2014)",
    "as-relu": "as guided, with LeakyReLU, ELU, GELU and the like counted as ReLU",
    "rectgrad": "dx where y dy is among the largest of the sample (Kim et al. 2019)",
    "input-x-gradient": "the input times its gradient (Shrikumar et al. 2016)",
    "grad-cam": "the channels of the last feature map, weighed by their mean gradient; never negative "
    "(Selvaraju et al. 2017)",
    "guided-grad-cam": "the guided map times Grad-CAM (Selvaraju et al. 2017)",
    "layer-activation-x-gradient": "an inner feature map times its gradient",
    "smoothgrad": "the mean of the maps of noisy copies of the input (Smilkov et al. 2017)",
    "smoothgrad-squared": "the mean of the squares of those maps (Hooker et al. 2019)",
    "vargrad": "the variance of those maps (Adebayo et al. 2018)",
    "integrated-gradients": "the input times the mean gradient on the way to it from zero (Sundararajan et al. 2017)",
}


def render(found: Mapping[str, Any]) -> str:
    """The page. found: what `report.write_report` collects, of values as JSON holds them."""
    style, script = ((_FOLDER / name).read_text("utf-8") for name in ("report.css", "report.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "share": _share, "shape": _shape, "named": _named, "slug": _slug}
    model = next(iter(found["audits"].values()))
    styles = {entry["name"]: i for i, entry in enumerate(found["methods"])}
    return environment.get_template("report.html").render(
        found,
        style=Markup(style),  # noqa: S704 - ours, from the package
        script=Markup(script),  # noqa: S704 - the same
        style_hash=_hash(style),
        script_hash=_hash(script),
        audit=_audit(found["audits"]),
        model=model,
        name=Path(model["file"]).name,
        meanings=_meanings(found["methods"]),
        classes=_classes(found["photos"]),
        styles=styles,
        marks=_MARKS,
        legend=_legend,
        sanity_charts=_sanity_charts(found.get("sanity"), styles),
        faithfulness_charts=_faithfulness_charts(found.get("faithfulness"), styles),
        gradient_chart=_gradient_chart(found["health"]),
        histogram=_histogram,
        measures=_MEASURES,
        references=_REFERENCES,
        strip=_STRIP,
        size=(_WIDTH, _HEIGHT),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- words ----------------------------------------------------------------------------------------


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}".replace("-", "−")


def _share(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _shape(value: Mapping[str, Any]) -> str:
    """Of a tensor: its type and sizes."""
    if value["shape"] is None:
        return f"{value['dtype']}, of unknown shape"
    return f"{value['dtype']} [{', '.join('?' if dim is None else str(dim) for dim in value['shape'])}]"


def _named(index: int, label: str | None) -> str:
    """A class."""
    return f"{index} {label}" if label else f"class {index}"


def _slug(number: int, method: str) -> str:
    """What names a map within the page: made of no text of others."""
    return f"{number}-{hashlib.sha256(method.encode()).hexdigest()[:8]}"


def _meanings(methods: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    found = []
    for entry in methods:
        name, _, rule = entry["name"].partition(":")
        said = _MEANINGS.get(name)
        over = f"; over the rule {rule}" if rule and name not in ("rectgrad",) else ""
        if said is not None:
            found.append((entry["name"], said + over))
    return found


def _classes(photos: Iterable[Mapping[str, Any]]) -> list[tuple[int, str, int]]:
    """The classes explained, by index: with their names, and of how many photos."""
    counts: dict[int, int] = {}
    names: dict[int, str] = {}
    for photo in photos:
        if photo["error"] is None:
            counts[photo["target"]] = counts.get(photo["target"], 0) + 1
            names[photo["target"]] = _named(photo["target"], photo["label"])
    return [(index, names[index], counts[index]) for index in sorted(counts)]


def _audit(audits: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each activation: what it gets under each rule, and all that is said of it."""
    rows: dict[str, dict[str, Any]] = {}
    for rule, found in audits.items():
        for one in found.get("activations", ()):
            row = rows.setdefault(one["node"], dict(one) | {"gets": {}, "said": []})
            row["gets"][rule] = one["rule"]
            reason = "" if one["reason"] == "matches '*'" else one["reason"]
            row["said"] += [text for text in (reason, one["note"]) if text and text not in row["said"]]
    return list(rows.values())


# --- curves ---------------------------------------------------------------------------------------


def _legend(names: Iterable[str], styles: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"name": name, **_look(name, styles)} for name in names]


def _look(name: str, styles: Mapping[str, int]) -> dict[str, Any]:
    if name in styles:
        return {"style": styles[name] % _STYLES, "mark": _MARKS[styles[name] % len(_MARKS)], "reference": False}
    return {"style": f"r{_REFERENCES.index(name)}", "mark": "", "reference": True}


def _chart(
    title: str,
    label: str,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    styles: Mapping[str, int],
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> dict[str, Any]:
    """The geometry of a chart; a gap in a curve where a value is None."""
    low, high = y_ticks[0][0], y_ticks[-1][0]
    first, last = min(x), max(x)
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(value: float) -> float:
        return round(_LEFT + wide * ((value - first) / (last - first) if last > first else 0.5), 1)

    def down(value: float) -> float:
        return round(_TOP + tall * (1 - (min(max(value, low), high) - low) / (high - low)), 1)

    drawn = []
    for name, values in curves.items():
        points = [(across(a), down(b)) if b is not None else None for a, b in zip(x, values, strict=True)]
        line = "".join(
            f"{'L' if i and points[i - 1] is not None else 'M'}{point[0]:g},{point[1]:g}"
            for i, point in enumerate(points)
            if point is not None
        )
        step = -(-len(points) // _POINTS)
        look = _look(name, styles)
        marks = "".join(f"M{p[0]:g},{p[1]:g}{look['mark']}" for p in points[::step] if p is not None and look["mark"])
        drawn.append({"name": name, "line": line, "marks": marks, **look})
    return {
        "title": title,
        "label": label,
        "x": [(across(value), text) for value, text in x_ticks],
        "y": [(down(value), text) for value, text in y_ticks],
        "zero": down(0.0) if low < 0 < high else None,
        "curves": drawn,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "top": _TOP,
        "middle": (_LEFT + _WIDTH - _RIGHT) / 2,
    }


def _scale(low: float, high: float, step: float) -> list[tuple[float, str]]:
    """Ticks at multiples of a step, around all there is."""
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(i * step, f"{i * step:g}".replace("-", "−")) for i in range(first, max(last, first + 1) + 1)]


def _whole(count: int) -> list[tuple[float, str]]:
    """Ticks of a numbering from 1."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if count / step <= 8 or step == 1000)
    return [(float(i), str(i)) for i in range(step, count + 1, step)]


def _sanity_charts(found: Mapping[str, Any] | None, styles: Mapping[str, int]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = []
    if found is None or "error" in found:
        return charts
    count = len(found["layers"])
    x = [float(i) for i in range(1, count + 1)]
    for kind, (title, label) in _KINDS.items():
        for measure, text in _MEASURES.items():
            curves = {one["method"]: [row[measure] for row in one[kind]] for one in found["methods"]}
            known = [value for curve in curves.values() for value in curve if value is not None]
            if known:
                ticks = _scale(min(0.0, *known), 1.0, 0.25)
                ticks = ticks if len(ticks) <= 6 else _scale(min(0.0, *known), 1.0, 0.5)
                charts.append(
                    _chart(f"{title}: {text}", label, x, curves, styles, x_ticks=_whole(count), y_ticks=ticks)
                )
    return charts


def _faithfulness_charts(found: Mapping[str, Any] | None, styles: Mapping[str, int]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = []
    if found is None or "error" in found:
        return charts
    x = np.linspace(0, 100, found["steps"] + 1).tolist()
    ticks = [(float(share), f"{share} %") for share in (0, 25, 50, 75, 100)]
    for figure, label in (("deletion", "pixels taken out"), ("insertion", "pixels put back")):
        curves = {
            one["method"]: np.mean([row[figure] for row in one["samples"]], axis=0).tolist() for one in found["methods"]
        }
        highest = max(value for curve in curves.values() for value in curve)
        step = next(step for step in (0.25, 0.1, 0.05, 0.02, 0.01, 0.001, 1e-9) if step <= highest or step < 1e-8)
        charts.append(
            _chart(
                f"{figure.capitalize()}: mean probability of the class",
                label,
                x,
                curves,
                styles,
                x_ticks=ticks,
                y_ticks=_scale(0.0, highest, step if highest / step <= 5 else step * 2),
            )
        )
    return charts


def _gradient_chart(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The gradient's root mean square by depth, as a share of that at the last activations, in powers of ten."""
    levels = found.get("depths") or []
    if not levels or not levels[-1]["rms"]:
        return None
    last = levels[-1]["rms"]
    values = {0: found["inputs"][0]["rms"]} if len(found["inputs"]) == 1 else {}
    values |= {level["depth"]: level["rms"] for level in levels}
    logs = [math.log10(value / last) if value else None for value in values.values()]
    known = [value for value in logs if value is not None]
    low, high = min(-2.0, *known), max(2.0, *known)  # less than two decades either way is no cause for alarm
    step = max(1, math.ceil((high - low) / 6))
    ticks = [(value, _power(round(value))) for value, _ in _scale(low, high, step)]
    x = [float(depth) for depth in values]
    places = [(0.0, "input")] * (0 in values) + [tick for tick in _whole(levels[-1]["depth"]) if tick[0] in x]
    title = "RMS of the gradient, the last activations = 1"
    label = "depth: activations from the input"
    return _chart(title, label, x, {"all": logs}, {"all": 0}, x_ticks=places, y_ticks=ticks)


def _power(exponent: int) -> str:
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if exponent == 0 else f"10{digits}"


def _histogram(row: Mapping[str, Any]) -> dict[str, Any]:
    """The outline of a histogram, counts on a logarithmic scale, and where zero is; its bins run from x to x."""
    bins = row["histogram"]
    counts, start, width = bins["counts"], bins["start"], bins["width"]
    wide, tall = _STRIP
    top = math.log(max(counts) + 1) or 1
    step = wide / len(counts)
    path = f"M0,{tall}"
    for i, count in enumerate(counts):
        path += f"V{tall - tall * math.log(count + 1) / top:.1f}H{(i + 1) * step:.1f}"
    end = start + width * len(counts)
    zero = round(-start / (end - start) * wide, 1) if start < 0 < end else None
    return {"path": f"{path}V{tall}z", "zero": zero, "start": start, "end": end}
