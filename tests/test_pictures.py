"""Pictures of signals, texts, tables, and of several methods side by side: facts of the pixels, then whole runs."""

from __future__ import annotations

import html.parser
import io
import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT
from onnx import numpy_helper
from PIL import Image
from test_explain import manifest, picture, tiny

import onnxgbp.explain
from onnxgbp.cli import main
from onnxgbp.drawing import Form, Origin
from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.inputs import made_of
from onnxgbp.labels import feature_names
from onnxgbp.tokens import Piece, Vocabulary, collapsed, colours_of, pieces_of, text_page

pytest.importorskip("matplotlib", reason="these pictures are drawn with it: pip install 'onnxgbp[plots]'")

from onnxgbp.figures import Plot, Row, grid_figure, signal_figure, table_figure, text_figure

Array = npt.NDArray[Any]
RNG = np.random.default_rng(11)
NEUTRAL, BLUE, RED = (247, 247, 247), (5, 48, 97), (103, 0, 31)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a letter without a glyph, of a layout that does not fit
        yield


def png(plot: Plot) -> bytes:
    stream = io.BytesIO()
    plot.figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def pixels(plot: Plot) -> Array:
    with Image.open(io.BytesIO(png(plot))) as image:
        return np.asarray(image.convert("RGB"))


def count(drawn: Array, colour: tuple[int, ...]) -> int:
    return int((drawn == colour).all(axis=-1).sum())


def bands(plot: Plot, panel: int = 0) -> Array:
    """The colours behind the signal: [L, 3]."""
    return np.asarray(plot.figure.axes[panel].images[0].get_array())[0]


# --- signals --------------------------------------------------------------------------------------


def test_a_signal_lies_on_the_colours_of_its_attribution() -> None:
    values = np.array([[0.0, 2.0, -2.0, 0.0, 1.0, -1.0]])
    plot = signal_figure(values, np.arange(6.0)[np.newaxis], percentile=100)
    assert (plot.clip, plot.warning) == (2, "")
    behind = [tuple(colour) for colour in bands(plot)]
    assert (behind[0], behind[1], behind[2], behind[3]) == (NEUTRAL, RED, BLUE, NEUTRAL)
    assert behind[4][0] > behind[4][2]
    assert behind[5][2] > behind[5][0]
    drawn = pixels(plot)
    assert min(count(drawn, colour) for colour in (NEUTRAL, RED, BLUE)) > 500
    opposite = bands(signal_figure(-values, np.arange(6.0)[np.newaxis], percentile=100))
    assert [tuple(colour) for colour in opposite[[1, 2]]] == [BLUE, RED]
    low, high = plot.figure.axes[-1].get_ylim()  # of the colour bar
    assert (low, high) == (-2, 2)


def test_the_line_is_drawn_in_the_sign_of_each_sample() -> None:
    plot = signal_figure(np.array([[-1.0, 0.0, 1.0]]), np.zeros((1, 3)), percentile=100)
    line = plot.figure.axes[0].collections[-1]
    negative, zero, positive = (np.asarray(colour[:3]) for colour in line.get_colors())
    assert negative[2] > negative[0]
    assert positive[0] > positive[2]
    assert np.ptp(zero) == 0
    starts = [segment[1][0] for segment in line.get_segments()]
    assert starts == [0, 1, 2]


def test_an_outlier_does_not_hide_the_rest() -> None:
    values = np.ones((1, 400))
    values[0, 7] = 1e6
    plot = signal_figure(values, np.zeros((1, 400)))
    assert plot.clip == 1
    assert tuple(bands(plot)[100]) == RED


def test_ten_thousand_samples_show_the_strongest() -> None:
    values, signal = np.zeros((2, 10_000)), np.zeros((2, 10_000))
    values[0, 5003], values[1, 77] = -3, -3
    signal[0, 5003] = 9
    plot = signal_figure(values, signal, percentile=100)
    assert plot.clip == 3
    assert len(bands(plot)) == 900
    strongest = int(np.argmin(bands(plot)[:, 0]))
    assert tuple(bands(plot)[strongest]) == BLUE
    assert strongest == 5003 * 900 // 10_000
    top = max(segment[:, 1].max() for segment in plot.figure.axes[0].collections[-1].get_segments())
    assert top == 9  # a spike of one sample is in the line
    assert count(pixels(plot), BLUE) > 100  # one column of the second channel, too


def test_many_channels_are_strips() -> None:
    values = np.zeros((12, 30))
    values[3, 4], values[11, 29] = 1, -1
    plot = signal_figure(values, RNG.normal(size=(12, 30)), names=[f"lead {i}" for i in range(12)], percentile=100)
    above, below, _ = plot.figure.axes
    strip = np.asarray(below.images[0].get_array())
    assert strip.shape == (12, 30, 3)
    assert (tuple(strip[3, 4]), tuple(strip[11, 29]), tuple(strip[0, 0])) == (RED, BLUE, NEUTRAL)
    assert [label.get_text() for label in below.get_yticklabels()] == [f"lead {i}" for i in range(12)]
    assert np.asarray(above.images[0].get_array()).shape == (12, 30)
    big = np.zeros((2000, 1500))
    big[1234, 567] = -1
    drawn = np.asarray(signal_figure(big, big, percentile=100).figure.axes[1].images[0].get_array())
    assert drawn.shape == (900, 900, 3)
    assert tuple(drawn[1234 * 900 // 2000, 567 * 900 // 1500]) == BLUE


@pytest.mark.parametrize("channels", [1, 9])
def test_a_signal_of_zeros_and_of_nothing_finite(channels: int) -> None:
    signal = RNG.normal(size=(channels, 20))
    plot = signal_figure(np.zeros((channels, 20)), signal)
    assert plot.clip == 0
    assert "zero everywhere" in plot.warning
    assert count(pixels(plot), NEUTRAL) > 10_000
    values = np.ones((channels, 20))
    values[0, 3], values[0, 4] = np.nan, np.inf
    plot = signal_figure(values, signal)
    assert f"2 of {channels * 20} values are not finite" in plot.warning
    assert plot.clip == 1
    assert pixels(signal_figure(values, np.full((channels, 20), np.nan))).size


def test_a_coarse_map_covers_the_samples() -> None:
    plot = signal_figure(np.array([[1.0, -1.0], [1.0, -1.0]]), np.zeros((1, 6)), percentile=100)
    assert plot.clip == 2
    assert [tuple(colour) for colour in bands(plot)] == [RED] * 3 + [BLUE] * 3


def test_what_is_no_signal() -> None:
    with pytest.raises(OnnxgbpError, match=r"an attribution \[3\] of \[3\] is no signal"):
        signal_figure(np.zeros(3), np.zeros(3))
    with pytest.raises(OnnxgbpError, match="3 names for 2 channels"):
        signal_figure(np.zeros((2, 4)), np.zeros((2, 4)), names=list("abc"))


# --- tables ---------------------------------------------------------------------------------------


def bars(plot: Plot) -> list[tuple[float, tuple[int, ...]]]:
    drawn = plot.figure.axes[0].patches
    return [(bar.get_width(), tuple(round(255 * c) for c in bar.get_facecolor()[:3])) for bar in drawn]


def names_of(plot: Plot) -> list[str]:
    return [label.get_text() for label in plot.figure.axes[0].get_yticklabels()]


def test_bars_are_sorted_by_magnitude_and_go_to_their_side() -> None:
    values = np.array([0.5, -2.0, 0.0, 2.0])
    plot = table_figure(values, np.array([1.5, 3, 0, -7]), names=["a", "b", "c", "d"], percentile=100)
    widths, colours = zip(*bars(plot))
    assert widths == (-2, 2, 0.5, 0)
    assert (colours[0], colours[1], colours[3]) == (BLUE, RED, NEUTRAL)
    assert names_of(plot) == ["b = 3", "d = −7", "a = 1.5", "c = 0"]
    low, high = plot.figure.axes[0].get_xlim()
    assert low == -high
    drawn = pixels(plot)
    assert np.argwhere((drawn == BLUE).all(axis=-1))[:, 1].max() < np.argwhere((drawn == RED).all(axis=-1))[:, 1].min()


def test_the_top_twenty_of_thirty_with_long_names() -> None:
    names = [f"the standard error of the mean of the quantity number {i} of {i}" for i in range(30)]
    values = RNG.normal(size=30)
    plot = table_figure(values, RNG.normal(size=30), names=names, title="a class of a long name, " * 12)
    assert len(bars(plot)) == 20
    assert [width for width, _ in bars(plot)] == sorted(values, key=lambda value: -abs(value))[:20]
    assert "20 of 30 features" in plot.figure.axes[0].get_xlabel()
    first = int(np.argmax(np.abs(values)))
    assert names_of(plot)[0].startswith("the standard err")
    assert f"{first} of {first} = " in names_of(plot)[0]
    plot.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in plot.figure.axes[0].get_yticklabels()]
    assert all(below.y1 <= above.y0 for above, below in itertools.pairwise(boxes))  # none lies on another
    assert min(box.x0 for box in boxes) >= 0
    assert names_of(table_figure(np.array([1.0, 2.0]), np.zeros(3)))[0] == "f1"


@pytest.mark.parametrize("size", [1.0, 1.234e-5, 1.234e7])
def test_figures_of_bars_do_not_lie_on_names(size: float) -> None:
    values = size * RNG.uniform(-1, 1, 30)
    plot = table_figure(values, values, names=["quite a long name, of thirty letters"] * 30)
    plot.figure.draw_without_rendering()
    axes = plot.figure.axes[0]
    names = [label.get_window_extent() for label in axes.get_yticklabels()]
    width, _ = plot.figure.get_size_inches() * plot.figure.dpi
    for text in axes.texts:
        drawn = text.get_window_extent()
        assert axes.get_window_extent().x1 < drawn.x0 <= drawn.x1 <= width
        assert max(name.x1 for name in names) <= drawn.x0


def test_a_table_of_zeros_and_of_nothing_finite() -> None:
    plot = table_figure(np.zeros(3), np.zeros(3))
    assert "zero everywhere" in plot.warning
    assert pixels(plot).size
    assert "1 of 2 values" in table_figure(np.array([1.0, np.nan]), np.zeros(2)).warning
    with pytest.raises(OnnxgbpError, match="1 names for 2 features"):
        table_figure(np.ones(2), np.ones(2), names=["a"])
    with pytest.raises(OnnxgbpError, match=r"shape \[2, 2\] is no row"):
        table_figure(np.ones((2, 2)), np.ones((2, 2)))


# --- texts ----------------------------------------------------------------------------------------


def read_vocabulary(tmp_path: Path, name: str, said: Any) -> Vocabulary:
    path = tmp_path / name
    path.write_text(said if isinstance(said, str) else json.dumps(said), encoding="utf-8")
    return Vocabulary.read(path)


def test_vocabularies_of_every_kind(tmp_path: Path) -> None:
    lines = read_vocabulary(tmp_path, "vocab.txt", "[PAD]\nun\n##able\r\na\u2028b\n")
    assert lines.tokens == {0: "[PAD]", 1: "un", 2: "##able", 3: "a\u2028b"}
    assert lines.mark == "##"
    bpe = {"model": {"type": "BPE", "vocab": {"Ġa": 0, "Ã©": 1}}, "added_tokens": [{"id": 7, "content": "<s>"}]}
    assert read_vocabulary(tmp_path, "tokenizer.json", bpe).tokens == {0: "Ġa", 1: "Ã©", 7: "<s>"}
    unigram = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁the", -3.5]]}}
    assert read_vocabulary(tmp_path, "tokenizer.json", unigram).tokens == {0: "<unk>", 1: "▁the"}
    assert read_vocabulary(tmp_path, "vocab.json", {"a": 3, "b": 1}).tokens == {3: "a", 1: "b"}


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("tokenizer.json", "{", "no JSON"),
        ("tokenizer.json", "[1]", "neither a tokenizer.json nor a vocab.json"),
        ("tokenizer.json", '{"model": {"vocab": [3]}}', "neither a tokenizer.json nor a vocab.json"),
        ("vocab.json", '{"a": "b"}', "neither a tokenizer.json nor a vocab.json"),
        ("vocab.txt", "\n", "holds no token"),
    ],
)
def test_a_file_that_is_no_vocabulary(tmp_path: Path, name: str, said: str, message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message):
        read_vocabulary(tmp_path, name, said)


def test_a_vocabulary_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OnnxgbpError, match=r"cannot read .*No such file"):
        Vocabulary.read(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    with pytest.raises(OnnxgbpError, match="no text in UTF-8"):
        Vocabulary.read(tmp_path / "latin.txt")


def shown(tokens: list[str]) -> list[tuple[str, bool]]:
    """The pieces of a text of just these tokens, which are its vocabulary too."""
    mark = next((mark for mark in ("Ġ", "▁", "##") if any(token.startswith(mark) for token in tokens)), "")
    vocabulary = Vocabulary(dict(enumerate(tokens)), mark, Path("vocab.txt"))
    pieces = pieces_of(range(len(tokens)), np.zeros(len(tokens)), vocabulary)
    return [(piece.text, piece.joined) for piece in pieces]


def test_what_is_one_word() -> None:
    assert shown(["[CLS]", "un", "##able", "to"]) == [("[CLS]", False), ("un", False), ("able", True), ("to", False)]
    assert shown(["<s>", "Hell", "o", "Ġworld", "!", "</s>"]) == [
        ("<s>", False),
        ("Hell", False),
        ("o", True),
        ("world", False),
        ("!", True),
        ("</s>", False),
    ]
    assert shown(["▁the", "re"]) == [("the", False), ("re", True)]
    assert shown(["the", "re"]) == [("the", False), ("re", False)]
    assert shown(["Ġcaf", "Ã©", "Ċ", "Ġ", "ĠĠĠ"]) == [
        ("caf", False),
        ("é", True),
        ("\\n", True),
        ("␣", False),
        ("␣␣", False),
    ]


def test_a_letter_that_is_a_token_is_no_mark(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, "vocab.txt", "Ġ\nun\n##able\n##d")
    assert vocabulary.mark == "##"


def test_ids_that_the_vocabulary_has_not() -> None:
    with pytest.raises(OnnxgbpError, match=r"token id 5 is not among the 1 of vocab.txt"):
        pieces_of([0, 5], np.zeros(2), Vocabulary({0: "a"}, "", Path("vocab.txt")))
    assert [piece.text for piece in pieces_of([0, 5], np.zeros(2), None)] == ["0", "5"]


def test_padding_is_one_piece() -> None:
    pieces = [Piece("a", False, 1.0), *[Piece("[PAD]", False, 0.0)] * 9]
    assert [piece.text for piece in collapsed(pieces)] == ["a", "[PAD] × 9"]
    attributed = [Piece("[PAD]", False, 0.5)] * 9
    assert collapsed(attributed) == attributed
    assert len(collapsed(pieces[:4])) == 4


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.2, written out from its definition."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_letters_stand_out_on_every_colour() -> None:
    pieces = [Piece("a", False, value) for value in np.linspace(-1, 1, 401)]
    colours = colours_of(pieces, 1.0)
    assert min(contrast(back, front) for back, front in colours) >= 4.5
    assert (colours[0][0], colours[200][0], colours[400][0]) == ("#053061", "#f7f7f7", "#67001f")
    assert {colours[0][1], colours[200][1]} == {"#ffffff", "#000000"}
    assert [back for back, _ in colours_of(pieces[:2], 0.0)] == ["#f7f7f7"] * 2


class Page(html.parser.HTMLParser):
    """The tokens of a page, their styles, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.styles, self.tokens, self.inside = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "span":
            self.inside = True
            self.styles.append(dict(attrs)["style"])
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "span"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tokens[-1] += data


def test_the_page_is_escaped() -> None:
    nasty = ["<script>alert(1)</script>", "&lt;", '"', "'>", "</span>"]
    pieces = [Piece(text, False, value) for text, value in zip(nasty, (1.0, -1.0, 0.0, 0.5, -0.5))]
    page = text_page(pieces, 1.0, title="</title><script>x", note="<b>")
    read = Page(page)
    assert read.tokens == nasty
    assert "script" not in read.tags
    assert read.tags.count("b") == 3  # the ends of the scale, and not the note
    assert "background:#67001f" in read.styles[0]
    assert "background:#053061" in read.styles[1]
    assert "background:#f7f7f7" in read.styles[2]
    assert not re.search(r'(src|href)="|url\(', page)  # nothing is fetched
    page.encode()


def test_half_a_surrogate_can_be_written(tmp_path: Path) -> None:
    (piece,) = pieces_of([0], np.zeros(1), read_vocabulary(tmp_path, "vocab.json", '{"\\ud83d": 0}'))
    text_page([piece], 0.0, title="", note="").encode()
    assert pixels(text_figure([piece])).size


def test_a_text_is_drawn_in_its_colours() -> None:
    pieces = [Piece("wonderful", False, 2.0), Piece("awful", False, -2.0), Piece("the", False, 0.0)]
    plot = text_figure(pieces, title="positive", percentile=100)
    assert (plot.clip, plot.warning) == (2, "")
    drawn = pixels(plot)
    assert min(count(drawn, colour) for colour in (RED, BLUE, NEUTRAL)) > 300
    columns = [np.argwhere((drawn[:60] == colour).all(axis=-1))[:, 1].mean() for colour in (RED, BLUE, NEUTRAL)]
    assert columns == sorted(columns)


@pytest.mark.parametrize("joined", [False, True])
def test_sixty_tokens_do_not_overlap(joined: bool) -> None:
    words = ["the", "Rhabarberbarbarabar" * 9, "$x_1$", "a", "I" * 30, "mmmm"] * 10
    plot = text_figure([Piece(word, joined and i % 3 > 0, float(i)) for i, word in enumerate(words)], title="t" * 300)
    boxes = [patch.get_window_extent() for patch in plot.figure.axes[0].patches]
    assert len(boxes) == 60
    width, height = plot.figure.get_size_inches() * plot.figure.dpi
    for i, one in enumerate(boxes):
        assert one.x0 >= 0
        assert one.x1 <= width
        assert one.y0 >= 0
        assert one.y1 <= height
        for other in boxes[i + 1 :]:
            apart = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(apart) <= 1e-6
    texts = plot.figure.axes[0].texts[-61:-1]  # the last is the note
    for text, box in zip(texts, boxes):
        drawn = text.get_window_extent()
        assert box.x0 <= drawn.x0
        assert drawn.x1 <= box.x1
    assert "$x_1$" in [text.get_text() for text in texts]


def test_what_a_picture_of_a_text_cannot_show_is_said() -> None:
    plot = text_figure([Piece("漢字", False, 1.0), Piece("a", False, 0.0)])
    assert "has not 2 of the letters" in plot.warning
    assert "□□" in [text.get_text() for text in plot.figure.axes[0].texts]
    pixels(plot)
    plot = text_figure([Piece("a", False, 1.0)] * 1600)
    assert "the first 1500 of 1600 tokens" in plot.warning
    assert len(plot.figure.axes[0].patches) == 1500
    assert "zero everywhere" in text_figure([Piece("a", False, 0.0)]).warning
    assert "not finite" in text_figure([Piece("a", False, np.nan)]).warning
    with pytest.raises(OnnxgbpError, match="without a token"):
        text_figure([])


# --- several side by side -------------------------------------------------------------------------


def test_a_grid_has_a_scale_for_each_map() -> None:
    photo = Image.new("RGB", (20, 20), (10, 200, 30))
    small, large = np.zeros((20, 20)), np.zeros((20, 20))
    small[:10], small[10:] = 1e-3, -1e-3
    large[:, :10] = -5
    rows = [Row("tabby, tabby cat (281)\n0.62", photo, [small, large]), Row("b", photo, [large, np.zeros((20, 20))])]
    plot = grid_figure(rows, ["gradient", "guided"])
    cells = [axes for axes in plot.figure.axes if axes.images and len(axes.images[0].get_array().shape) == 3]
    assert len(cells) == 6
    first, second = (np.asarray(cells[i].images[0].get_array()) for i in (1, 2))
    assert (tuple(first[0, 0]), tuple(first[19, 0])) == (RED, BLUE)
    assert (tuple(second[0, 0]), tuple(second[0, 19])) == (BLUE, NEUTRAL)
    assert [cells[i].get_xlabel() for i in (1, 2, 5)] == ["±0.001", "±5", "zero everywhere"]
    assert "zero everywhere" in plot.warning
    assert plot.clip == 5
    said = [text.get_text() for text in plot.figure.texts]
    assert said[:3] == ["photo", "gradient", "guided"]
    assert "tabby, tabby cat\n(281)\n0.62" in said
    assert count(pixels(plot), (10, 200, 30)) > 50_000


def test_a_grid_with_long_names_does_not_overlap() -> None:
    rows = [Row("bighorn, bighorn sheep, cimarron, Rocky Mountain bighorn, Ovis canadensis (349)\n0.5", None, [])] * 2
    rows = [Row(row.label, None, [RNG.normal(size=(8, 12))] * 3) for row in rows]
    plot = grid_figure(rows, ["layer-activation-x-gradient", "smoothgrad-squared:rectgrad:95", "guided"])
    plot.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in plot.figure.texts]
    boxes += [axes.get_window_extent() for axes in plot.figure.axes[:6]]
    width, height = plot.figure.get_size_inches() * plot.figure.dpi
    for i, one in enumerate(boxes):
        assert 0 <= one.x0 <= one.x1 <= width
        assert 0 <= one.y0 <= one.y1 <= height
        for other in boxes[i + 1 :]:
            apart = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(apart) <= 0
    assert "photo" not in [text.get_text() for text in plot.figure.texts]


def test_names_in_other_letters() -> None:
    """Boxes, but no warning of matplotlib's on the way."""
    names = ["漢字", "Größe", "цена", "$a_1$", "a\tb"]
    plot = table_figure(np.arange(5.0), np.arange(5.0), names=names, title="猫 $x$ (285)")
    assert pixels(plot).size
    assert [name.partition(" = ")[0] for name in names_of(plot)] == ["a□b", "$a_1$", "цена", "Größe", "□□"]
    assert plot.figure.get_suptitle() == "□ $x$ (285)"
    assert pixels(signal_figure(np.ones((5, 9)), np.ones((5, 9)), names=names)).size
    assert pixels(signal_figure(np.ones((10, 9)), np.ones((10, 9)), names=names * 2)).size
    assert pixels(grid_figure([Row("猫\n0.5", None, [np.ones((2, 2))])], ["gradient"])).size


def test_what_is_no_grid() -> None:
    for rows in ([], [Row("a", None, [np.zeros((2, 2))])], [Row("a", None, [np.zeros(3), np.zeros(3)])]):
        with pytest.raises(OnnxgbpError, match="one map"):
            grid_figure(rows, ["gradient", "guided"])


# --- how an array is drawn ------------------------------------------------------------------------


def form(
    shape: tuple[int, ...], dims: tuple[Any, ...] | None = None, *, looked_up: bool = False, **options: Any
) -> str:
    spec = InputSpec("x", np.dtype(np.float32), ("N", *(shape if dims is None else dims)))
    made = Form.of(Origin(spec, looked_up), shape, options.pop("metadata", {}), **options)
    return made.kind + " last" * made.last


def test_the_shape_says_how_it_is_drawn() -> None:
    assert form((3, 8, 8)) == "picture"
    assert form((100,)) == "table"
    assert form((101,)) == "signal"
    assert form((101,), draw="table") == "table"
    assert form((7,), draw="signal") == "signal"
    assert form((12,), looked_up=True) == "text"
    assert form((4, 50)) == "signal"
    assert form((9, 6)) == "signal last"
    assert form((6, 6)) == "signal"
    assert form((6, 50), ("T", 50)) == "signal last"  # the axis that is left open counts samples
    assert form((50, 6), (50, None)) == "signal"
    assert form((4, 50), layout="nhwc") == "signal last"
    names = {"onnxgbp.features": json.dumps([str(i) for i in range(300)])}
    assert form((300,), metadata=names) == "table"


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3, 4, 5), {}, r"no picture is drawn of input 'x' with samples \[2, 3, 4, 5\]"),
        ((), {}, "no picture is drawn"),
        ((3, 8, 8), {"draw": "table"}, "--draw does not belong to input 'x', which is drawn as a picture"),
        ((4,), {"vocab": Path("vocab.txt")}, "--vocab does not belong to input 'x', which is drawn as a table"),
        ((4, 9), {"reduce": "l2"}, "--reduce does not belong"),
        ((3, 8, 8), {"features": Path("names.txt")}, "--features does not belong"),
        ((4,), {"metadata": {"onnxgbp.features": '["a"]'}}, "the model's metadata names 1 features, and .* has 4"),
        ((4,), {"metadata": {"onnxgbp.features": "a"}}, "no JSON list of names"),
        ((2, 9), {"metadata": {"onnxgbp.features": '["a"]'}}, "names 1 channels, and input 'x' has 2"),
    ],
)
def test_options_that_do_not_belong(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message):
        form(shape, **options)


def test_names_of_features(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffage\nsex \n\nfare\n\n", encoding="utf-8")
    assert feature_names(tmp_path / "names.txt", {}) == ["age", "sex", "", "fare"]
    (tmp_path / "names.json").write_text('["age", 3]')
    assert feature_names(tmp_path / "names.json", {"onnxgbp.features": '["other"]'}) == ["age", "3"]
    assert feature_names(None, {"onnxgbp.features": '["other"]'}) == ["other"]
    assert feature_names(None, {}) == []
    for name, said, message in (
        ("empty.txt", b"\n", "holds no names"),
        ("map.json", b"{}", "holds no names"),
        ("bytes.txt", b"\xff\xfe\x00", "no text in UTF-8"),
    ):
        (tmp_path / name).write_bytes(said)
        with pytest.raises(OnnxgbpError, match=message):
            feature_names(tmp_path / name, {})
    with pytest.raises(OnnxgbpError, match="No such file"):
        feature_names(tmp_path / "none.txt", {})


# --- whole runs -----------------------------------------------------------------------------------


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def refused(out: Path, *arguments: Any) -> str:
    """What is said, in one line, and that nothing is written."""
    result = run(*arguments, "-o", out)
    assert result.exit_code == 1, result.output
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()
    return result.stderr


def model_of(path: Path, body: str, metadata: dict[str, Any] | None = None, **weights: Array) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> net {body}')
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    onnx.helper.set_model_props(model, {f"onnxgbp.{name}": json.dumps(one) for name, one in (metadata or {}).items()})
    onnx.save(model, path)
    return path


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def form_model(path: Path, width: int = 4, **metadata: Any) -> Path:
    body = f"(float[N,{width}] x) => (float[N,3] p) {{ h = MatMul(x, W) r = Relu(h) s = MatMul(r, V) p = Softmax(s) }}"
    return model_of(path, body, metadata, W=floats(width, 8), V=floats(8, 3))


def reader(path: Path, ids: str = "ids") -> Path:
    """A mean of looked-up words, and a mask."""
    body = f"""(int64[N,L] {ids}, int64[N,L] mask) => (float[N,2] y) {{
        e = Gather(table, {ids}) one = Constant <value_ints = [2]> ()
        f = Cast <to = 1> (mask) m = Unsqueeze(f, one) k = Mul(e, m) a = ReduceMean <axes = [1], keepdims = 0> (k)
        h = MatMul(a, W) r = Relu(h) y = MatMul(r, V)
    }}"""
    return model_of(path, body, {"labels": ["bad", "good"]}, table=floats(9, 5), W=floats(5, 6), V=floats(6, 2))


def test_a_table_from_a_file(tmp_path: Path) -> None:
    model = form_model(tmp_path / "net.onnx", labels=["ant", "bee", "cat"], features=["age", "sex", "fare", "sibs"])
    x = floats(3, 4)
    np.save(tmp_path / "rows.npy", x)
    out = tmp_path / "out"
    result = run(model, tmp_path / "rows.npy", "-o", out, "--method", "gradient")
    assert result.exit_code == 0, result.output
    assert "samples: 3, each drawn as a table" in result.output
    names = [f"rows-{i}.attribution.{kind}" for i in range(3) for kind in ("npy", "png")]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", *names]
    expected = onnxgbp.Explainer(model, method="gradient")(x)
    for i, entry in enumerate(manifest(out)["images"]):
        np.testing.assert_allclose(np.load(out / entry["files"]["array"]), expected.attribution[i], rtol=1e-5)
        assert entry["target"] == expected.target[i]
        assert entry["file"] == f"{tmp_path / 'rows.npy'}[{i}]"
        assert entry["overlay_clip"] is None
    again = tmp_path / "again"
    assert run(model, tmp_path / "rows.npy", "-o", again, "--method", "gradient").exit_code == 0
    for name in names:
        assert (out / name).read_bytes() == (again / name).read_bytes()
    data = (out / "rows-0.attribution.png").read_bytes()
    assert not re.search(rb"tEXt|iTXt|zTXt|tIME", data)  # neither a date nor who made it


def test_names_from_a_file(tmp_path: Path) -> None:
    model = form_model(tmp_path / "net.onnx")
    np.save(tmp_path / "rows.npy", floats(1, 4))
    (tmp_path / "names.txt").write_text("age\nsex\nfare\nsibs\n")
    (tmp_path / "few.txt").write_text("age\n")
    named, plain = tmp_path / "named", tmp_path / "plain"
    assert run(model, tmp_path / "rows.npy", "-o", named, "--features", tmp_path / "names.txt").exit_code == 0
    assert run(model, tmp_path / "rows.npy", "-o", plain).exit_code == 0
    name = "rows-0.attribution.png"
    assert (named / name).read_bytes() != (plain / name).read_bytes()
    said = refused(tmp_path / "out", model, tmp_path / "rows.npy", "--features", tmp_path / "few.txt")
    assert "few.txt names 1 features, and input 'x' has 4" in said


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 5), np.float32), "input 'x' is float32 [N, 4], but"),
        (np.zeros((2, 4), np.int64), "holds int64 [2, 4]"),
        (np.zeros((0, 4), np.float32), "holds no sample"),
        (np.float32(3), "holds float32 []"),
        (b"no array", "no array of numbers in numpy's format"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, array: Any, message: str) -> None:
    path = tmp_path / "x.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)
    assert message in refused(tmp_path / "out", form_model(tmp_path / "net.onnx"), path)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model, words = form_model(tmp_path / "net.onnx"), reader(tmp_path / "words.onnx")
    assert "cannot read" in refused(tmp_path / "out", model, tmp_path / "none.npy")
    assert "takes no pictures: give arrays" in refused(tmp_path / "out", model, picture(tmp_path / "a.png"))
    assert "as arrays in a .npz" in refused(tmp_path / "out", words, picture(tmp_path / "a.png"))
    np.save(tmp_path / "ids.npy", np.zeros((1, 3), np.int64))
    assert "give them as arrays in a .npz" in refused(tmp_path / "out", words, tmp_path / "ids.npy")
    np.savez(tmp_path / "ids.npz", ids=np.zeros((1, 3), np.int64))
    assert "input 'mask' is missing" in refused(tmp_path / "out", words, tmp_path / "ids.npz")
    image = tiny(tmp_path / "image.onnx")
    assert "--vocab is for samples" in refused(tmp_path / "out", image, tmp_path / "a.png", "--vocab", "vocab.txt")


def test_a_text_from_a_file(tmp_path: Path) -> None:
    model, out = reader(tmp_path / "net.onnx"), tmp_path / "out"
    ids = np.array([[1, 2, 3, 8], [4, 4, 5, 6]])
    np.savez(tmp_path / "texts.npz", ids=ids, mask=np.ones((2, 4), np.int64))
    (tmp_path / "vocab.txt").write_text("[PAD]\n<b>\nun\n##able\nvery\na & b\ngood\nbad\nnot\n")
    arguments = [model, tmp_path / "texts.npz", "--vocab", tmp_path / "vocab.txt", "--method", "gradient"]
    result = run(*arguments, "-o", out)
    assert result.exit_code == 0, result.output
    assert "a text, the signed sum over the embedding" in result.output
    entry = manifest(out)["images"][0]
    assert set(entry["files"]) == {"attribution", "array", "page"}
    page = Page((out / entry["files"]["page"]).read_text("utf-8"))
    assert page.tokens == ["<b>", "un", "able", "not"]
    found = onnxgbp.Explainer(model, method="gradient")({"ids": ids, "mask": np.ones((2, 4), np.int64)})
    attribution = np.load(out / entry["files"]["array"])
    np.testing.assert_allclose(attribution, found.attribution[0], rtol=1e-5)
    sums = attribution.astype(np.float64).sum(axis=1)
    assert entry["clip"] == pytest.approx(np.percentile(np.abs(sums), 99.5))
    assert f"{entry['label']} ({entry['target']}), score" in (out / entry["files"]["page"]).read_text("utf-8")
    assert run(*arguments, "-o", tmp_path / "l2", "--reduce", "l2").exit_code == 0
    lengths = np.linalg.norm(attribution.astype(np.float64), axis=1)
    assert manifest(tmp_path / "l2")["images"][0]["clip"] == pytest.approx(np.percentile(lengths, 99.5))
    plain = run(model, tmp_path / "texts.npz", "-o", tmp_path / "ids")
    assert "without --vocab the ids" in plain.output
    assert Page((tmp_path / "ids" / "texts-0.attribution.html").read_text("utf-8")).tokens == ["1", "2", "3", "8"]


def test_a_token_that_is_not_in_the_vocabulary_fails_its_text_alone(tmp_path: Path) -> None:
    model, out = reader(tmp_path / "net.onnx"), tmp_path / "out"
    np.savez(tmp_path / "texts.npz", ids=np.array([[1, 8], [1, 2]]), mask=np.ones((2, 2), np.int64))
    (tmp_path / "vocab.txt").write_text("a\nb\nc\n")
    result = run(model, tmp_path / "texts.npz", "-o", out, "--vocab", tmp_path / "vocab.txt")
    assert result.exit_code == 1
    assert "texts.npz[0]: token id 8 is not among the 3 of" in result.stderr
    assert "1 of the inputs could not be explained" in result.stderr
    assert [entry["error"] is None for entry in manifest(out)["images"]] == [False, True]


def test_which_input_an_inner_tensor_is_made_of(tmp_path: Path) -> None:
    graph = onnxgbp.load(reader(tmp_path / "net.onnx")).model.graph
    assert made_of(graph, "e") == ("ids",)
    assert made_of(graph, "k") == ("ids", "mask")
    assert made_of(graph, "mask") == ("mask",)
    assert made_of(graph, "none") == ()
    np.savez(tmp_path / "texts.npz", ids=np.array([[1, 2]]), mask=np.ones((1, 2), np.int64))
    said = refused(tmp_path / "out", tmp_path / "net.onnx", tmp_path / "texts.npz", "--wrt", "k")
    assert "is made of several inputs or of none ('ids', 'mask')" in said
    out = tmp_path / "mask"  # made floats of, but not looked up: a row of two numbers
    result = run(tmp_path / "net.onnx", tmp_path / "texts.npz", "-o", out, "--wrt", "f")
    assert "each drawn as a table" in result.output
    assert np.load(out / "texts-0.attribution.npy").shape == (2,)
    said = refused(tmp_path / "out", tmp_path / "net.onnx", tmp_path / "texts.npz", "--wrt", "f", "--wrt", "e")
    assert "choose one by --wrt" in said


def test_a_batch_that_the_model_fixes(tmp_path: Path) -> None:
    body = "(float[4,6] x) => (float[4,3] y) { h = MatMul(x, W) r = Relu(h) y = MatMul(r, V) }"
    model = model_of(tmp_path / "net.onnx", body, W=floats(6, 8), V=floats(8, 3))
    x = floats(6, 6)
    np.save(tmp_path / "x.npy", x)
    result = run(model, tmp_path / "x.npy", "-o", tmp_path / "out", "--method", "gradient")
    assert result.exit_code == 0, result.output
    explainer = onnxgbp.Explainer(model, method="gradient")
    expected = np.concatenate([explainer(x[:4]).attribution, explainer(np.repeat(x[4:], 2, axis=0)).attribution[::2]])
    for i in range(6):
        np.testing.assert_allclose(np.load(tmp_path / "out" / f"x-{i}.attribution.npy"), expected[i], rtol=1e-5)


def test_the_baseline_of_one_of_several_inputs(tmp_path: Path) -> None:
    body = """(int64[N,1] count, float[N,4] x) => (float[N,3] y) {
        f = Cast <to = 1> (count) m = Mul(x, f) h = MatMul(m, W) r = Relu(h) y = MatMul(r, V)
    }"""
    model = model_of(tmp_path / "net.onnx", body, W=floats(4, 8), V=floats(8, 3))
    feeds, start = {"count": np.array([[2]]), "x": floats(1, 4)}, {"count": np.array([[7]]), "x": floats(1, 4)}
    np.savez(tmp_path / "x.npz", count=feeds["count"], x=feeds["x"])
    np.savez(tmp_path / "start.npz", count=start["count"], x=start["x"])
    options = ["--method", "integrated-gradients", "--baseline", tmp_path / "start.npz"]
    result = run(model, tmp_path / "x.npz", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    expected = onnxgbp.Explainer(model, method="integrated-gradients", baseline=start["x"])(feeds)
    found = np.load(tmp_path / "out" / "x-0.attribution.npy")
    np.testing.assert_allclose(found, expected.attribution[0], rtol=1e-5)


def test_a_picture_from_an_array(tmp_path: Path) -> None:
    model, out = tiny(tmp_path / "net.onnx"), tmp_path / "out"
    x = floats(2, 3, 8, 8)
    np.save(tmp_path / "x.npy", x)
    result = run(model, tmp_path / "x.npy", picture(tmp_path / "photo.png"), "-o", out)
    assert result.exit_code == 0, result.output
    files = [entry["files"] for entry in manifest(out)["images"]]
    assert [set(one) for one in files] == [{"attribution", "array"}] * 2 + [{"attribution", "array", "overlay"}]
    with Image.open(out / "x-0.attribution.png") as opened:
        drawn = onnxgbp.render.signed_picture(onnxgbp.Explainer(model)(x[:1]).attribution[0]).image
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(drawn))


def test_methods_side_by_side(tmp_path: Path) -> None:
    model, out = tiny(tmp_path / "net.onnx", labels=["ant", "bee", "cat", "dog"]), tmp_path / "out"
    images = [picture(tmp_path / f"{name}.png", seed=n) for n, name in enumerate("ab")]
    methods = ["guided", "smoothgrad:guided", "gradient"]
    arguments = [model, *images, "--methods", ",".join(methods), "--n-samples", 3]
    result = run(*arguments, "-o", out)
    assert result.exit_code == 0, result.output
    said = manifest(out)
    assert said["files"] == {"grid": "grid.png"}
    assert said["options"]["method"] == ",".join(methods)
    assert said["options"]["n_samples"] == "3"
    for image, entry in zip(images, said["images"]):
        assert list(entry["methods"]) == methods
        for method in methods:
            file = entry["files"][f"{method.replace(':', '-')}.array"]
            assert file == f"{image.stem}.{method.replace(':', '-')}.attribution.npy"
            alone = tmp_path / f"alone-{image.stem}-{methods.index(method)}"
            extra = ["--n-samples", 3] if "smooth" in method else []
            assert run(model, image, "-o", alone, "--method", method, *extra).exit_code == 0
            np.testing.assert_allclose(
                np.load(out / file), np.load(alone / f"{image.stem}.attribution.npy"), rtol=1e-4, atol=1e-7
            )
            assert entry["methods"][method]["clip"] == pytest.approx(manifest(alone)["images"][0]["clip"], rel=1e-4)
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 4 * 1.55 * 150  # the photo and three maps
        assert grid.height > 2 * 1.55 * 150
    made = {name for entry in said["images"] for name in entry["files"].values()}
    assert {path.name for path in out.iterdir()} == made | {"manifest.json", "grid.png"}
    assert run(model, images[0], "-o", out).exit_code == 0
    assert not (out / "grid.png").exists()  # of the run before
    again = tmp_path / "again"
    assert run(*arguments, "-o", again).exit_code == 0
    assert run(*arguments, "-o", out).exit_code == 0
    assert (again / "grid.png").read_bytes() == (out / "grid.png").read_bytes()


def test_a_grid_that_ends_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxgbp.explain, "_GRID_ROWS", 2)
    model, images = tiny(tmp_path / "net.onnx"), [picture(tmp_path / f"{n}.png", seed=n) for n in range(3)]
    arguments = [model, *images, "-o", tmp_path / "out", "--methods", "gradient,guided"]
    assert "grid.png, the first 2 of 3\n" in run(*arguments).output
    assert "grid.png\n" in run(*arguments[:3], *arguments[4:]).output


def test_a_grid_among_the_photos_is_no_photo(tmp_path: Path) -> None:
    model, folder = tiny(tmp_path / "net.onnx"), tmp_path / "photos"
    picture(folder / "a.png")
    for _ in range(2):
        assert run(model, folder, "-o", folder, "--methods", "gradient,guided").exit_code == 0
    assert [entry["file"] for entry in manifest(folder)["images"]] == [str(folder / "a.png")]
    (folder / "manifest.json").unlink()
    assert run(model, folder, "-o", tmp_path / "out").exit_code == 0  # now nothing says that it is ours
    assert [Path(entry["file"]).name for entry in manifest(tmp_path / "out")["images"]] == ["a.png", "grid.png"]


def test_a_file_of_several_methods_is_a_grid(tmp_path: Path) -> None:
    onnxgbp.save(onnxgbp.convert(tiny(tmp_path / "m.onnx"), methods=["gradient", "guided"]), tmp_path / "both.onnx")
    result = run(tmp_path / "both.onnx", picture(tmp_path / "a.png"), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert list(manifest(tmp_path / "out")["images"][0]["methods"]) == ["gradient", "guided"]
    assert (tmp_path / "out" / "grid.png").exists()


def test_methods_of_numbers_have_a_picture_each(tmp_path: Path) -> None:
    model, out = form_model(tmp_path / "net.onnx"), tmp_path / "out"
    np.save(tmp_path / "x.npy", floats(1, 4))
    assert run(model, tmp_path / "x.npy", "-o", out, "--methods", "gradient,guided").exit_code == 0
    assert sorted(path.name for path in out.glob("*.png")) == [
        "x-0.gradient.attribution.png",
        "x-0.guided.attribution.png",
    ]
    assert "files" not in manifest(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gradient,gradient"], "a method is named twice"),
        (["--methods", "gradient", "--method", "guided"], "are both given: leave one out"),
        (["--methods", "gradient,guided", "--n-samples", "3"], "gradient takes no n_samples"),
        (["--methods", "gradient,smoothgrad", "--n-steps", "3"], "takes no n_steps"),
        (["--methods", "gradient,smoothgrad", "--layer", "r"], "gradient has no layer"),
        (["--methods", "smoothgrad,expected-gradients"], "needs baselines"),
    ],
)
def test_methods_that_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    model, image = tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png")
    assert message in refused(tmp_path / "out", model, image, *arguments)


def test_an_unknown_method_is_a_usage_error(tmp_path: Path) -> None:
    result = run(tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png"), "-o", tmp_path, "--methods", "magic")
    assert (result.exit_code, "no method is called 'magic'" in result.stderr) == (2, True)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png")
    np.save(tmp_path / "x.npy", floats(1, 3, 8, 8))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib" or name == "onnxgbp.figures"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for arguments in ([image, "--methods", "gradient,guided"], [tmp_path / "x.npy"]):
        assert "pip install 'onnxgbp[plots]'\n" in refused(tmp_path / "out", model, *arguments)
    assert run(model, image, "-o", tmp_path / "out").exit_code == 0  # photos need none


def test_the_pictures_of_the_documentation() -> None:
    docs = ROOT / "docs"
    named = re.findall(r"!\[[^\]]+\]\(pictures/(\w+\.png)\)", (docs / "pictures.md").read_text())
    assert sorted(named) == sorted(path.name for path in (docs / "pictures").iterdir())
    assert max((docs / "pictures" / name).stat().st_size for name in named) < 500_000


# --- networks of torch ----------------------------------------------------------------------------


def export(name: str, path: Path) -> dict[str, Array]:
    """Writes one of the networks of `nets.py`; gives inputs for it."""
    torch = pytest.importorskip("torch", reason="it exports the networks")
    from nets import NETS, build

    feeds = NETS[name].feeds(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            build(name),
            tuple(feeds.values()),
            path,
            dynamo=False,
            input_names=list(feeds),
            output_names=["scores"],
            opset_version=17,
            dynamic_axes={key: {0: "N"} for key in feeds},
        )
    return {key: value.numpy() for key, value in feeds.items()}


@pytest.mark.parametrize(
    ("name", "drawn"),
    [("CNN-1D", "a signal"), ("LSTM", "a signal, channels last"), ("BERT", "a text, the signed sum")],
)
def test_networks_of_torch(name: str, drawn: str, tmp_path: Path) -> None:
    feeds = export(name, tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", **feeds)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
    result = run(tmp_path / "net.onnx", tmp_path / "x.npz", "-o", tmp_path / "out", "--method", "gradient")
    assert result.exit_code == 0, result.output
    assert f"samples: 2, each drawn as {drawn}" in result.output
    expected = onnxgbp.Explainer(tmp_path / "net.onnx", method="gradient")(feeds)
    for i, entry in enumerate(manifest(tmp_path / "out")["images"]):
        assert entry["warning"] is None
        found = np.load(tmp_path / "out" / entry["files"]["array"])
        np.testing.assert_allclose(found, expected.attribution[i], rtol=1e-3, atol=1e-6)
        with Image.open(tmp_path / "out" / entry["files"]["attribution"]) as image:
            colours = np.asarray(image.convert("RGB"))
        assert count(colours, NEUTRAL) < colours.size
        assert len(np.unique(colours.astype(np.uint32) @ (1, 256, 65536))) > 100
