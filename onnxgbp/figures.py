"""Attributions that are no photos, and several side by side, drawn with matplotlib (the extra `plots`).

Colours are those of `render.diverging`, told apart by every eye: blue is negative, red positive, near-white zero, and
each scale is symmetric about zero, up to a percentile of |value|.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator
from PIL import Image

from onnxgbp.errors import OnnxgbpError
from onnxgbp.render import PERCENTILE, clip_of, diverging, finite, if_blank, scaled
from onnxgbp.tokens import Piece, collapsed, colours_of

__all__ = ["DPI", "Plot", "Row", "grid_figure", "signal_figure", "table_figure", "text_figure"]

Array: TypeAlias = npt.NDArray[Any]
Float: TypeAlias = npt.NDArray[np.float64]

DPI = 150
_POINTS = 72  # of an inch
_WIDTH = 8.0  # inches
_FONT = "DejaVu Sans"  # comes with matplotlib, so that a figure is the same everywhere
_SIZES = {"title": 10.5, "label": 9, "small": 8}  # points
_TRACES = 6  # channels that are drawn as lines; of more, a strip each
_BINS = 900  # what is longer has several samples in a pixel
_NAMED = 24  # strips that are named
_TOP = 20  # bars of a table
_LETTERS = 36  # of a feature's name
_TOKENS = 1500  # of a text in a figure
_GREY, _DARK = "#b8b8b8", "#333333"
_INKS = ((0, 105, 220), (40, 40, 40), (220, 15, 50))  # of a line that is negative, zero, positive, seen on white


@dataclasses.dataclass(frozen=True)
class Plot:
    """figure: matplotlib's; clip: the |value| shown in full colour; warning: what a reader has to know, or ''."""

    figure: Figure
    clip: float
    warning: str = ""


# --- signals --------------------------------------------------------------------------------------


def signal_figure(
    attribution: Array,
    signal: Array,
    *,
    title: str = "",
    names: Sequence[str] = (),
    percentile: float = PERCENTILE,
) -> Plot:
    """A signal on the colours of its attribution: a trace for each channel, a strip for each of more than six.

    Where a pixel has to show several samples, it shows the attribution of the largest magnitude among them, and the
    trace from their least to their largest value.

    Args:
        attribution: float [C, L]; of an inner tensor [C', L'], then its sum over C' is drawn behind every channel.
        signal: [C, L], a number each.
        title: above it.
        names: of the channels.
        percentile: as for `render.signed_picture`.

    Raises:
        OnnxgbpError: arrays of other shapes, or another number of names than of channels.
    """
    if attribution.ndim != 2 or signal.ndim != 2 or not attribution.size or not signal.size:
        raise OnnxgbpError(
            f"an attribution {list(attribution.shape)} of {list(signal.shape)} is no signal [channels, samples]"
        )
    _check_names(names, len(signal), "channel")
    values, warning = finite(attribution)
    if values.shape != signal.shape:  # a coarser map: each of its values covers some samples
        samples = np.arange(signal.shape[1]) * values.shape[1] // signal.shape[1]
        values = np.broadcast_to(values.sum(axis=0)[samples], signal.shape)
    clip = clip_of(values, percentile)
    shares = scaled(values, clip)
    x = signal.astype(np.float64)
    figure = _traces(shares, x, names) if len(x) <= _TRACES else _strips(shares, x, names)
    figure.axes[-1].set_xlabel("sample", fontsize=_SIZES["label"])
    figure.align_ylabels()
    _entitle(figure, title)
    _colour_bar(figure, clip)
    return Plot(figure, clip, warning or if_blank(clip))


def _traces(shares: Float, x: Float, names: Sequence[str]) -> Figure:
    count, length = x.shape
    figure = Figure(figsize=(_WIDTH, 1.1 + 1.25 * count), layout="constrained", dpi=DPI)
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for row, (axes, one) in enumerate(zip(panels, x, strict=True)):
        known = one[np.isfinite(one)]
        low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
        margin = 0.08 * (high - low) or max(abs(high), 1.0) * 0.5
        low, high = low - margin, high + margin
        band = np.asarray(diverging(_strongest(shares[row][np.newaxis], 1)))
        edges = (-0.5, length - 0.5)
        axes.imshow(band, extent=(*edges, low, high), aspect="auto", interpolation="nearest", zorder=0)
        points, colours = _line(one, shares[row])
        wide = 1.6 if len(points) <= _BINS else 0.9
        axes.add_collection(
            LineCollection(list(points), colors="white", linewidths=3 * wide, capstyle="round", zorder=2)
        )
        axes.add_collection(LineCollection(list(points), colors=colours, linewidths=wide, capstyle="round", zorder=3))
        axes.set(xlim=edges, ylim=(low, high))
        _plain(axes)
        axes.set_ylabel(_cut(names[row] if names else f"channel {row}", 18), fontsize=_SIZES["label"], parse_math=False)
    return figure


def _line(x: Float, shares: Float) -> tuple[Float, Float]:
    """Pieces of a line [S, 3, 2], each half-way to its neighbours and in its sample's colour [S, 3]."""
    at = np.arange(len(x), dtype=np.float64)
    if len(x) > 2 * _BINS:
        edges = np.linspace(0, len(x), _BINS + 1).astype(int)[:-1]
        at = np.repeat(edges + len(x) / _BINS / 2 - 0.5, 2)
        x = np.stack([np.fmin.reduceat(x, edges), np.fmax.reduceat(x, edges)], axis=1).ravel()
        shares = np.repeat(_strongest(shares[np.newaxis], 1)[0], 2)
    middles = np.stack([at, x], axis=1)
    halves = (middles[1:] + middles[:-1]) / 2
    starts, ends = np.concatenate([middles[:1], halves]), np.concatenate([halves, middles[-1:]])
    colours = np.stack([np.interp(shares, (-1, 0, 1), channel) for channel in zip(*_INKS, strict=True)], axis=1) / 255
    return np.stack([starts, middles, ends], axis=1), colours


def _strips(shares: Float, x: Float, names: Sequence[str]) -> Figure:
    count, length = x.shape
    height = float(np.clip(0.16 * count, 1.3, 4.0))
    figure = Figure(figsize=(_WIDTH, 1.5 + 2 * height), layout="constrained", dpi=DPI)
    above, below = figure.subplots(2, 1, sharex=True, sharey=True)
    known = x[np.isfinite(x)]
    low, high = np.percentile(known, (1, 99)) if known.size else (0.0, 1.0)
    place = {"extent": (-0.5, length - 0.5, count - 0.5, -0.5), "aspect": "auto", "interpolation": "nearest"}
    above.imshow(_means(x), cmap="gray_r", vmin=low, vmax=high if high > low else low + 1, **place)
    below.imshow(np.asarray(diverging(_strongest(_strongest(shares, 1), 0))), **place)
    for axes, said in ((above, f"input, from white {_text(low)} to black {_text(high)}"), (below, "attribution")):
        axes.set_title(said, fontsize=_SIZES["label"], loc="left")
        _plain(axes)
        if names and count <= _NAMED:
            axes.set_yticks(range(count), [_cut(name, 18) for name in names], parse_math=False)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylabel("channel", fontsize=_SIZES["label"])
    return figure


def _strongest(values: Float, axis: int) -> Float:
    """At most _BINS values along the axis, each the one of the largest magnitude in its bin."""
    size = values.shape[axis]
    if size <= _BINS:
        return values
    edges = np.linspace(0, size, _BINS + 1).astype(int)[:-1]
    high, low = (f.reduceat(values, edges, axis=axis) for f in (np.maximum, np.minimum))
    return np.where(high >= -low, high, low)


def _means(values: Float) -> Float:
    """At most _BINS x _BINS values, each the mean of its bin."""
    for axis, size in enumerate(values.shape):
        if size > _BINS:
            edges = np.linspace(0, size, _BINS + 1).astype(int)
            counts = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(2)])
            values = np.add.reduceat(values, edges[:-1], axis=axis) / counts
    return values


# --- tables ---------------------------------------------------------------------------------------


def table_figure(
    attribution: Array,
    row: Array,
    *,
    title: str = "",
    names: Sequence[str] = (),
    percentile: float = PERCENTILE,
) -> Plot:
    """Bars to the left and right of zero, the 20 of the largest magnitude, each named with its value in the input.

    Args:
        attribution: float [F].
        row: [F], the numbers that it belongs to; of another shape they are not shown.
        title: above it.
        names: of the features; f0, f1 and so on by default.
        percentile: of |value|, what is shown in full colour; bars are as long as they are.

    Raises:
        OnnxgbpError: arrays of other shapes, or another number of names than of features.
    """
    if attribution.ndim != 1 or not attribution.size:
        raise OnnxgbpError(f"an attribution of shape {list(attribution.shape)} is no row of a table")
    _check_names(names, len(attribution), "feature")
    values, warning = finite(attribution)
    clip = clip_of(values, percentile)
    order = np.argsort(-np.abs(values), kind="stable")[:_TOP]
    labels = [_cut(names[i] if names else f"f{i}", _LETTERS) for i in order]
    if row.shape == attribution.shape:
        labels = [f"{label} = {_number(row[i])}" for label, i in zip(labels, order, strict=True)]
    figure = Figure(figsize=(_WIDTH * 0.9, 1.1 + 0.27 * len(order)), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    colours = np.asarray(diverging(scaled(values[order][np.newaxis], clip)))[0] / 255
    axes.barh(range(len(order)), values[order], color=colours, edgecolor=_DARK, linewidth=0.6, height=0.72)
    reach = float(np.abs(values).max()) or 1.0
    axes.set(xlim=(-1.06 * reach, 1.06 * reach), ylim=(len(order) - 0.4, -0.6))
    for place, i in enumerate(order):  # in a column of their own: at the ends of the bars they would meet the names
        said = ("+" if values[i] > 0 else "") + _text(values[i], 3)
        where = axes.get_yaxis_transform()
        axes.text(1.02, place, said, transform=where, va="center_baseline", fontsize=_SIZES["small"], color=_DARK)
    axes.set_yticks(range(len(order)), labels, parse_math=False)
    axes.axvline(0, color=_DARK, linewidth=0.8)
    axes.grid(axis="x", color=_GREY, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    shown = f", {len(order)} of {len(values)} features" if len(order) < len(values) else ""
    axes.set_xlabel(f"attribution{shown}", fontsize=_SIZES["label"])
    _entitle(figure, title)
    return Plot(figure, clip, warning or if_blank(clip))


def _number(value: Any) -> str:
    return _text(value, 4) if np.asarray(value).dtype.kind in "iuf" else str(value)


# --- texts ----------------------------------------------------------------------------------------


def text_figure(pieces: Sequence[Piece], *, title: str = "", note: str = "", percentile: float = PERCENTILE) -> Plot:
    """A text, each token on the colour of its attribution; words are set apart, the tokens of one word are not.

    A long text is cut off, and letters that the font has not are boxes: both is said in the warning, and neither is
    true of `tokens.text_page`.

    Args:
        pieces: as `tokens.pieces_of` gives them.
        title: above it.
        note: beside the scale.
        percentile: as for `render.signed_picture`.

    Raises:
        OnnxgbpError: no token.
    """
    if not pieces:
        raise OnnxgbpError("a text without a token has no picture")
    values, warning = finite(np.array([piece.value for piece in pieces]))
    clip = clip_of(values, percentile)
    warnings = [warning or if_blank(clip)]
    pieces = [dataclasses.replace(piece, value=float(v)) for piece, v in zip(pieces, values, strict=True)]
    pieces = collapsed(pieces)
    if len(pieces) > _TOKENS:
        warnings.append(f"the picture shows the first {_TOKENS} of {len(pieces)} tokens, the page all of them")
        pieces = pieces[:_TOKENS]
    if missing := _without_glyph("".join(piece.text for piece in pieces)):
        warnings.append(f"the picture's font has not {len(missing)} of the letters, drawn as boxes; the page has them")
    texts = [_cut(piece.text, 60) for piece in pieces]
    lines, height = _laid_out(texts, [piece.joined for piece in pieces])
    heads = _wrapped(title)
    top, bottom = 10 + 15 * len(heads), 46
    size = _WIDTH * _POINTS, top + height + bottom
    figure = Figure(figsize=(size[0] / _POINTS, size[1] / _POINTS), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    for number, line in enumerate(heads):
        axes.text(_MARGIN, 16 + 15 * number, line, fontsize=_SIZES["title"], family=_FONT, parse_math=False)
    for text, (left, offset, width), (back, front) in zip(texts, lines, colours_of(pieces, clip), strict=True):
        base = top + offset
        box = FancyBboxPatch(
            (left, base), width, _BOX, boxstyle="round,pad=0,rounding_size=2.5", fc=back, ec="#c8c8c8", lw=0.4
        )
        axes.add_patch(box)
        place = left + width / 2, base + _BOX * 0.71
        axes.text(*place, text, color=front, fontsize=_LETTER, family=_FONT, ha="center", parse_math=False)
    scale = figure.add_axes((2 * _MARGIN / size[0], 24 / size[1], 0.4, 8 / size[1]))
    _scale(figure, clip, scale)
    axes.text(0.4 * size[0] + 4.5 * _MARGIN, size[1] - 24, note, fontsize=_SIZES["small"], family=_FONT)
    return Plot(figure, clip, "; ".join(filter(None, warnings)))


_MARGIN, _LETTER, _BOX, _LINE, _BLANK = 14.0, 11.0, 17.0, 23.0, 4.0  # points


def _laid_out(texts: Sequence[str], joined: Sequence[bool]) -> tuple[list[tuple[float, float, float]], float]:
    """Where the box of each token begins, on which line, and how wide it is, in points; and how high all of them are.

    Lines are broken between words, within a word only where it is longer than a line.
    """
    measure, font = TextToPath(), FontProperties(family=_FONT, size=_LETTER)
    widths = [measure.get_text_width_height_descent(text, font, False)[0] + 5 for text in texts]
    room = _WIDTH * _POINTS - 2 * _MARGIN
    words: list[list[float]] = []
    for width, follows in zip(widths, joined, strict=True):
        if follows and words:
            words[-1].append(width)
        else:
            words.append([width])
    places: list[tuple[float, float, float]] = []
    left, line = 0.0, 0.0
    for word in words:
        if left and left + sum(word) > room:
            left, line = 0.0, line + _LINE
        for width in word:
            if left and left + width > room:
                left, line = 0.0, line + _LINE
            places.append((_MARGIN + left, line, width))
            left += width
        left += _BLANK
    return places, line + _LINE


# --- several side by side -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """label: of the image; photo: as the model sees it, None where there is none; maps: float [H, W], one a column."""

    label: str
    photo: Image.Image | None
    maps: Sequence[Array]


def grid_figure(rows: Sequence[Row], methods: Sequence[str], *, percentile: float = PERCENTILE) -> Plot:
    """Images row by row, with the map of each method beside them on a scale of its own, written below it.

    Args:
        rows: one or more.
        methods: the names of the columns.
        percentile: of |value|, the end of each scale; `clip` is the largest of them.

    Raises:
        OnnxgbpError: no row, or maps that are no [H, W] or not one for each method.
    """
    if not rows or any(len(row.maps) != len(methods) or any(one.ndim != 2 for one in row.maps) for row in rows):
        raise OnnxgbpError("a grid takes one map [H, W] of each method in each row")
    photos = any(row.photo is not None for row in rows)
    heads = [_few_lines(head, 20, 2) for head in [*(["photo"] if photos else []), *methods]]
    side, gap, below, label = 1.55, 0.07, 0.17, 1.5  # inches
    top = 0.12 + 0.16 * max(map(len, heads))
    size = label + len(heads) * (side + gap) + 0.1, top + len(rows) * (side + below) + 0.55
    figure = Figure(figsize=size, dpi=DPI)
    clips, warnings = [0.0], []

    def cell(row: int, column: int, picture: Image.Image) -> Axes:
        left, base = label + column * (side + gap), size[1] - top - row * (side + below) - side
        axes = figure.add_axes((left / size[0], base / size[1], side / size[0], side / size[1]))
        axes.imshow(np.asarray(picture), interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=_GREY, linewidth=0.5)
        return axes

    for column, head in enumerate(heads):
        left = label + column * (side + gap) + side / 2
        place = left / size[0], 1 - (top - 0.05) / size[1]
        _words(figure, *place, "\n".join(head), ha="center", va="bottom", fontsize=_SIZES["label"])
    for number, row in enumerate(rows):
        middle = 1 - (top + number * (side + below) + side / 2) / size[1]
        lines = [line for part in row.label.split("\n") for line in _few_lines(part, 19, 5)]
        text = "\n".join(lines)
        _words(figure, (label - 0.1) / size[0], middle, text, ha="right", va="center", fontsize=_SIZES["small"])
        if row.photo is not None:
            cell(number, 0, row.photo)
        for column, one in enumerate(row.maps):
            values, warning = finite(one)
            clip = clip_of(values, percentile)
            axes = cell(number, column + photos, diverging(scaled(values, clip)))
            axes.set_xlabel(f"±{clip:.2g}" if clip else "zero everywhere", fontsize=7, labelpad=2, color=_DARK)
            clips.append(clip)
            warnings.append(warning or if_blank(clip))
    width = min(3.2, size[0] - label - 0.2)
    scale = figure.add_axes((label / size[0], 0.3 / size[1], width / size[0], 0.1 / size[1]))
    _scale(figure, 1.0, scale)
    scale.set_xticks([-1, 0, 1], ["negative", "0", "positive"], fontsize=_SIZES["small"])
    return Plot(figure, max(clips), "; ".join(dict.fromkeys(filter(None, warnings))))


# --- what they share ------------------------------------------------------------------------------


def _check_names(names: Sequence[str], count: int, what: str) -> None:
    if names and len(names) != count:
        raise OnnxgbpError(f"{len(names)} names for {count} {what}s")


def _scale_map(clip: float) -> ScalarMappable:
    ends = clip or 1.0
    colours = np.asarray(diverging(np.linspace(-1, 1, 511)[np.newaxis]))[0] / 255
    return ScalarMappable(Normalize(-ends, ends), ListedColormap(colours))


def _colour_bar(figure: Figure, clip: float) -> None:
    aspect = (figure.get_figheight() - 0.9) / 0.13  # inches: as high as the panels, and as wide in every figure
    bar = figure.colorbar(_scale_map(clip), ax=list(figure.axes), fraction=0.03, pad=0.015, aspect=aspect)
    bar.set_label("attribution", fontsize=_SIZES["label"])
    bar.set_ticks([-clip, 0, clip] if clip else [0])
    bar.set_ticklabels([_text(-clip), "0", _text(clip)] if clip else ["0"])
    bar.ax.tick_params(labelsize=_SIZES["small"])
    bar.outline.set_linewidth(0.5)


def _scale(figure: Figure, clip: float, axes: Axes) -> None:
    """A colour bar that lies."""
    bar = figure.colorbar(_scale_map(clip), cax=axes, orientation="horizontal")
    bar.set_ticks([-clip, 0, clip] if clip else [0])
    bar.set_ticklabels([_text(-clip), "0", _text(clip)] if clip else ["0"])
    axes.tick_params(labelsize=_SIZES["small"], length=2)
    bar.outline.set_linewidth(0.5)


def _text(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=_SIZES["small"], width=0.6)
    for side, spine in axes.spines.items():
        spine.set(linewidth=0.6, visible=side in ("left", "bottom"))


def _entitle(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle("\n".join(_wrapped(title)), fontsize=_SIZES["title"], parse_math=False)


def _wrapped(title: str) -> list[str]:
    return _few_lines(title, 84, 3)


def _few_lines(text: str, letters: int, most: int) -> list[str]:
    return textwrap.wrap(_drawable(text), letters, max_lines=most, placeholder=" …") or [""]


def _words(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x, y, text, parse_math=False, **style)


def _cut(name: str, letters: int) -> str:
    """Without its middle where it is longer: the end of a name tells as much as its start."""
    name = _drawable(name)
    if len(name) <= letters:
        return name
    head = (letters - 1) // 2
    return f"{name[:head]}…{name[head + 1 - letters :]}"


def _drawable(text: str) -> str:
    """With a box for each letter that the font has not: matplotlib would warn of it, and draw the same."""
    return text.translate(dict.fromkeys(map(ord, _without_glyph(text)), "\N{WHITE SQUARE}"))


def _without_glyph(text: str) -> set[str]:
    font = get_font(findfont(FontProperties(family=_FONT)))
    return {letter for letter in set(text) - {"\n"} if not font.get_char_index(ord(letter))}
