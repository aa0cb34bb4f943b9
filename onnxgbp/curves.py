"""Curves as a picture, with matplotlib (the extra `plots`); it is imported only where something is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import output_file

__all__ = ["Panel", "require_plots", "save_curves"]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes; curves: by name, one number for each entry of x."""

    title: str
    x: Sequence[float]
    curves: Mapping[str, Sequence[float]]
    x_label: str
    y_label: str
    low: float = 0.0  # where the y axis starts; it ends at 1


def require_plots(drawn: str = "curves", way_out: str = ", or leave -o out") -> Any:
    """matplotlib's Figure, which draws without a display and without global state.

    Args:
        drawn: what it is needed for, in words.
        way_out: besides installing it.

    Raises:
        OnnxgbpError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OnnxgbpError(
            f"{drawn} are drawn with matplotlib, which is not installed: pip install 'onnxgbp[plots]'{way_out}"
        ) from None
    return Figure


def save_curves(path: Path, panels: Sequence[Panel], columns: int) -> None:
    """Draws the panels row by row, `columns` in each; the same name has the same colour in all of them."""
    rows = -(-len(panels) // columns)
    figure = require_plots()(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, panel in zip(axes, panels, strict=False):
        for name, values in panel.curves.items():
            place.plot(panel.x, values, color=f"C{names.index(name) % 10}", label=name, marker=".", markersize=4)
        place.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, ylim=(panel.low - 0.03, 1.03))
        margin = 0.03 * (panel.x[-1] - panel.x[0]) or 0.5  # the whole axis, also where the curves know less
        place.set_xlim(panel.x[0] - margin, panel.x[-1] + margin)
        place.grid(alpha=0.3)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    with output_file(path) as aside:
        figure.savefig(aside, format="png", dpi=100)
