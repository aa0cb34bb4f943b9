"""The plots of a health report. Colours are those of Okabe & Ito, told apart by every eye; hatches say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

__all__ = ["gradient_chart", "histogram_grid"]

_BLUE, _VERMILLION, _GREY = "#0072B2", "#D55E00", "#777777"
_COLUMNS = 4
_TITLE = 30  # letters of a node's name
_NAMED = 30  # depths that are named below the chart; of more, their number


def histogram_grid(found: Mapping[str, Any]) -> Figure | None:
    """A panel for each activation: how often y had which value, counts on a logarithmic axis; None without any.

    Orange and hatched is one with dead units, grey a gate.
    """
    rows = [row for row in found["activations"] if row["measured"]]
    if not rows:
        return None
    columns = min(_COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.1 * lines + 0.6), layout="constrained", dpi=100)
    panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for axes, row in zip(panels, rows, strict=False):
        _histogram(axes, row)
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    legend = "".join(
        f"; {said}"
        for said, shown in (
            ("orange, hatched: some units dead", any(row["dead"]["count"] and not row["gate"] for row in rows)),
            ("grey: a gate", any(row["gate"] for row in rows)),
        )
        if shown
    )
    figure.suptitle(f"Values of the activations, samples: {found['samples']:,}{legend}", fontsize=11)
    figure.supylabel("places", fontsize=9)
    return figure


def _histogram(axes: Axes, row: Mapping[str, Any]) -> None:
    bins, dead = row["histogram"], row["dead"]["count"]
    edges = bins["start"] + bins["width"] * np.arange(len(bins["counts"]) + 1)
    colour = _GREY if row["gate"] else _VERMILLION if dead else _BLUE
    hatch = "////" if dead and not row["gate"] else None
    if row["min"] == row["max"]:  # one value: a bar of a width that can be seen
        edges = row["min"] + max(abs(row["min"]), 1) * np.array([-0.02, 0.02])
        axes.set_xlim(*(row["min"] + max(abs(row["min"]), 1) * np.array([-1, 1])))
    _logarithmic(axes)
    axes.stairs(bins["counts"], edges, fill=True, baseline=0.5, fc=colour, ec="white", lw=0, hatch=hatch)
    axes.set_ylim(bottom=0.5)
    axes.set_title(_short(row["node"]) + " (gate)" * bool(row["gate"]), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_offset_text().set_fontsize(7)
    kind = f"{row['kind']}, saturated {row['saturated']:.0%}" if row["saturated"] is not None else row["kind"]
    text = f"{kind}\n{dead} of {row['units']} {row['unit']}s dead"
    axes.text(0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top", fontsize=7, bbox=_BOX)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())  # it would name 6e-1 where there is room


_BOX = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}


def _short(name: str) -> str:
    return name if len(name) <= _TITLE else f"...{name[3 - _TITLE :]}"


def gradient_chart(found: Mapping[str, Any]) -> Figure | None:
    """The gradient's root mean square by depth, as a share of that at the last activations; None without any.

    Circles are single activations, the line all those of a depth; a diamond at depth 0 is an input.
    """
    levels = found["depths"]
    last = levels[-1]["rms"] if levels else None
    if not last:
        return None
    figure = Figure(figsize=(max(6.0, 0.3 * len(levels) + 2), 4.6), layout="constrained", dpi=100)
    axes = figure.subplots()
    rows = [row for row in found["activations"] if row["measured"]]
    shown = [(row["depth"], row["gradient"]["rms"], row["gate"] is not None) for row in rows]
    for gates, colour, marker, said in ((False, _BLUE, "o", "an activation"), (True, _GREY, "s", "a gate")):
        _scatter(axes, [(x, y) for x, y, gate in shown if gate == gates], last, colour, marker, said)
    _scatter(axes, [(0, one["rms"]) for one in found["inputs"]], last, _VERMILLION, "D", "an input")
    drawn = [(level["depth"], level["rms"] / last) for level in levels if level["rms"]]
    axes.plot(*zip(*drawn, strict=True), color=_BLUE, linewidth=1.2, zorder=1, label="all of a depth")
    axes.axhline(1, color=_GREY, linewidth=0.6, zorder=0)
    _logarithmic(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1e-2), max(high, 1e2))  # less than two decades either way is no cause for alarm
    blank = [level["depth"] for level in levels if level["rms"] == 0]
    if blank:
        axes.plot(blank, [axes.get_ylim()[0]] * len(blank), "x", color=_VERMILLION, clip_on=False, label="none arrives")
    axes.set_ylabel(f"RMS of dy ({found['method']}), the last activation = 1")
    names = [_depth_name(level["nodes"]) for level in levels]
    if len(levels) <= _NAMED:
        ticks = ([0] if found["inputs"] else []) + [level["depth"] for level in levels]
        labels = (["input"] if found["inputs"] else []) + names
        axes.set_xticks(ticks, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    else:
        axes.set_xlabel("depth: activations on the longest way from the input")
    axes.set_title(f"From '{_short(found['explained'])}' back to the input, samples: {found['samples']:,}", fontsize=10)
    axes.legend(fontsize=7, framealpha=0.8)
    return figure


def _scatter(
    axes: Axes, points: Sequence[tuple[int, float | None]], last: float, colour: str, marker: str, said: str
) -> None:
    drawn = [(x, y / last) for x, y in points if y]
    if drawn:
        xs, ys = zip(*drawn, strict=True)
        axes.scatter(xs, ys, color=colour, marker=marker, s=18, zorder=2, label=said)


def _depth_name(nodes: Sequence[str]) -> str:
    more = f" +{len(nodes) - 1}" if len(nodes) > 1 else ""
    return _short(nodes[0]) + more
