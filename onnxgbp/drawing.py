"""What shows an attribution: a picture, a signal, a text or a table, as the shape of the input has it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxgbp.errors import OnnxgbpError
from onnxgbp.explainer import Explainer
from onnxgbp.given import InputSpec
from onnxgbp.inputs import made_of
from onnxgbp.labels import feature_names
from onnxgbp.model import load
from onnxgbp.render import finite, overlay, signed_picture
from onnxgbp.tokens import Vocabulary, collapsed, pieces_of, text_page

if TYPE_CHECKING:
    from onnxgbp.figures import Plot

__all__ = ["DRAWN", "REDUCED", "Drawn", "Form", "Origin", "draw_numbers", "draw_picture", "png"]

Array: TypeAlias = npt.NDArray[Any]

DRAWN = ("signal", "table")  # what a row of numbers may be drawn as
REDUCED = ("sum", "l2")  # what a token's attribution is made of, over the embedding
_WIDEST_TABLE = 100  # numbers without names that still make a table


@dataclasses.dataclass(frozen=True)
class Drawn:
    """files: by kind, what its name ends in and its bytes; clip, overlay_clip: ends of the scales; warning: or '';
    map: float [H, W], of a picture alone.
    """

    files: dict[str, tuple[str, bytes]]
    clip: float
    warning: str
    overlay_clip: float | None = None
    map: Array | None = None


@dataclasses.dataclass(frozen=True)
class Origin:
    """input: of the model, whose samples are drawn; looked_up: whether its numbers are those of tokens."""

    input: InputSpec
    looked_up: bool

    @classmethod
    def of(cls, explainer: Explainer, model: Path) -> Origin:
        """Of what is attributed to.

        Raises:
            OnnxgbpError: several tensors are attributed to, or no input is seen to belong to this one.
        """
        tensors = ", ".join(f"'{name}'" for name in explainer.wrt)
        if len(explainer.wrt) != 1:
            raise OnnxgbpError(f"one attribution is drawn, and this model has them of {tensors}: choose one by --wrt")
        by_name = {spec.name: spec for spec in explainer.inputs}
        if explainer.wrt[0] in by_name:
            return cls(by_name[explainer.wrt[0]], False)
        graph = load(model).model.graph
        behind = [by_name[name] for name in made_of(graph, explainer.wrt[0]) if name in by_name]
        if len(behind) != 1:
            inputs = ", ".join(f"'{spec.name}'" for spec in behind) or "none"
            raise OnnxgbpError(
                f"{tensors} is made of several inputs or of none ({inputs}), so it cannot be drawn on one: choose a "
                "tensor by --wrt, the lookup of the tokens for instance"
            )
        tensor = next(value for node in graph for value in node.outputs if value.name == explainer.wrt[0])
        rank = len(tensor.shape) if tensor.shape is not None else None
        return cls(behind[0], behind[0].dtype.kind in "iu" and len(behind[0].shape) == 2 and rank in (None, 3))


@dataclasses.dataclass(frozen=True)
class Form:
    """kind: picture, signal, text or table; last: whether a signal's channels are its last axis; names: of the features
    or channels; vocabulary: of a text, None for its ids; reduce: one of REDUCED.
    """

    kind: str
    last: bool = False
    names: Sequence[str] = ()
    vocabulary: Vocabulary | None = None
    reduce: str = "sum"

    @classmethod
    def of(
        cls,
        origin: Origin,
        shape: Sequence[int],
        metadata: Mapping[str, str],
        *,
        draw: str | None = None,
        features: Path | None = None,
        vocab: Path | None = None,
        reduce: str | None = None,
        layout: str | None = None,
    ) -> Form:
        """How samples of that shape are drawn.

        [H, W, C] and the like are pictures, [C, L] and [L, C] signals, a row of numbers is a table, or without names
        and longer than 100 a signal; looked-up integers [L] are a text. Of a signal's axes the one that the model
        leaves open counts samples, else the longer one.

        Raises:
            OnnxgbpError: there is no picture of that, or an option does not belong to it.
        """
        rank = len(shape)
        names = [] if rank == 3 or origin.looked_up else feature_names(features, metadata)
        kind = {1: "table", 2: "signal", 3: "picture"}.get(rank)
        if kind is None:
            raise OnnxgbpError(
                f"no picture is drawn of {origin.input} with samples {list(shape)}: use onnxgbp.Explainer"
            )
        if rank == 1 and not names and shape[0] > _WIDEST_TABLE:
            kind = "signal"
        kind = "text" if origin.looked_up else draw if draw is not None and rank == 1 else kind
        for option, value, fits in (
            ("draw", draw, rank == 1 and kind != "text"),
            ("features", features, kind in ("signal", "table")),
            ("vocab", vocab, kind == "text"),
            ("reduce", reduce, kind == "text"),
        ):
            if value is not None and not fits:
                raise OnnxgbpError(f"--{option} does not belong to {origin.input}, which is drawn as a {kind}")
        last = kind == "signal" and rank == 2 and _channels_last(origin.input.shape[1:], shape, layout)
        count = shape[0] if kind == "table" else 1 if rank == 1 else shape[1 if last else 0]
        if names and len(names) != count:
            where = features if features is not None else "the model's metadata"
            what = "channels" if kind == "signal" else "features"
            raise OnnxgbpError(f"{where} names {len(names)} {what}, and {origin.input} has {count}")
        return cls(kind, last, names, Vocabulary.read(vocab) if vocab is not None else None, reduce or "sum")

    def __str__(self) -> str:
        said = f"a {self.kind}" + (", channels last" if self.last else "")
        if self.kind == "text":
            said += f", {_REDUCED_TEXT[self.reduce]}" + ("" if self.vocabulary else "; without --vocab the ids")
        return said


_REDUCED_TEXT = {
    "sum": "the signed sum over the embedding",
    "l2": "the length over the embedding (l2), without a sign",
}


def _channels_last(dims: Sequence[int | str | None], shape: Sequence[int], layout: str | None) -> bool:
    if layout is not None:
        return layout == "nhwc"
    fixed = [isinstance(dim, int) for dim in dims]
    return fixed[1] if fixed[0] != fixed[1] else shape[0] > shape[1]


def draw_picture(attribution: Array, photo: Image.Image | None, layout: str, channels: str) -> Drawn:
    """A picture of the input's size, and where there is a photo the overlay on it.

    Raises:
        OnnxgbpError: the attribution has not three axes.
    """
    signed = signed_picture(attribution, layout=layout, channels=channels)
    files = {"attribution": (".attribution.png", png(signed.image))}
    laid = overlay(attribution, photo, layout=layout) if photo is not None else None
    if laid is not None:
        files["overlay"] = (".overlay.png", png(laid.image))
    summed = finite(attribution)[0].sum(axis=0 if layout == "nchw" else 2)
    return Drawn(files, signed.clip, signed.warning, laid.clip if laid is not None else None, summed)


def draw_numbers(attribution: Array, x: Array, form: Form, title: str) -> Drawn:
    """A signal, a text or a table.

    Args:
        attribution: of one sample.
        x: the sample of the input that is drawn.
        form: how.
        title: above it.

    Raises:
        OnnxgbpError: the two do not go together, or a token is not in the vocabulary.
    """
    from onnxgbp.figures import signal_figure, table_figure, text_figure  # matplotlib: only here

    if attribution.ndim != (2 if form.kind == "text" else x.ndim):
        raise OnnxgbpError(
            f"no {form.kind} is drawn of an attribution {list(attribution.shape)} to an input {list(x.shape)}: "
            "choose another tensor by --wrt"
        )
    if form.kind == "table":
        names = form.names if attribution.shape == x.shape else ()  # an inner tensor has features of its own
        return _plotted(table_figure(attribution, x, title=title, names=names))
    if form.kind == "signal":
        turned = [np.atleast_2d(one.T if form.last else one) for one in (attribution, x)]
        return _plotted(signal_figure(*turned, title=title, names=form.names))
    if len(attribution) != len(x):
        raise OnnxgbpError(f"an attribution {list(attribution.shape)} is not one of {len(x)} tokens")
    values, warning = finite(attribution)
    values = values.sum(axis=1) if form.reduce == "sum" else np.sqrt((values**2).sum(axis=1))
    pieces, note = pieces_of(x.tolist(), values, form.vocabulary), _REDUCED_TEXT[form.reduce]
    plot = text_figure(pieces, title=title, note=note)
    drawn = _plotted(plot, warning)
    page = text_page(collapsed(pieces), plot.clip, title=title, note=note)
    return dataclasses.replace(drawn, files=drawn.files | {"page": (".attribution.html", page.encode())})


def _plotted(plot: Plot, warning: str = "") -> Drawn:
    stream = io.BytesIO()
    plot.figure.savefig(stream, format="png", metadata={"Software": None})  # the same bytes whatever the release
    files = {"attribution": (".attribution.png", stream.getvalue())}
    return Drawn(files, plot.clip, "; ".join(filter(None, (warning, plot.warning))))


def png(image: Image.Image) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
