"""Two models over the same data: what each is fed, which class both explain, and maps that lie as one another."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgbp.data import Batch, batches
from onnxgbp.emit import shape_text
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explainer import Explainer
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing
from onnxgbp.model import METADATA

__all__ = ["Pair", "Result"]

Array = npt.NDArray[Any]

# From the axes of one layout to those of the other.
_TURNS = {("nchw", "nhwc"): (0, 2, 3, 1), ("nhwc", "nchw"): (0, 3, 1, 2)}


@dataclasses.dataclass(frozen=True)
class Result:
    """One sample of one model: its scores, flat, the class explained, and the maps by method and tensor."""

    scores: npt.NDArray[np.float64]
    target: Any
    maps: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two explainers, what each is fed, and how the maps of each become comparable; made by `of`."""

    a: Explainer
    b: Explainer
    data: Path
    inputs: tuple[Sequence[InputSpec], Sequence[InputSpec]]  # as the data is read for each
    prepared: tuple[Preprocessing, ...] | None  # photos only
    turn: tuple[int, ...] | None  # from the axes of A's arrays to those of B's, arrays only
    notes: tuple[str, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # that override a model's preprocessing

    @classmethod
    def of(cls, a: Explainer, b: Explainer, data: Path, layout_b: str | None, options: Mapping[str, Any]) -> Pair:
        if data.suffix.lower() in (".npy", ".npz"):
            return cls._of_arrays(a, b, data, layout_b)
        for explainer in (a, b):
            if len(explainer.inputs) != 1:
                raise OnnxgbpError(f"{explainer.name} takes {len(explainer.inputs)} inputs: give arrays in a .npz file")
        if layout_b is not None:
            raise OnnxgbpError("a layout for B is of arrays: a photo is laid out as each model's metadata says")
        prepared = tuple(Preprocessing.of(one.metadata, one.inputs[0], **options) for one in (a, b))
        sizes = [(one.size, one.crop, one.channels == "grey") for one in prepared]
        if sizes[0] != sizes[1]:
            raise OnnxgbpError(
                f"the models see different parts of a photo: A {prepared[0]}; B {prepared[1]}; "
                "give --size and --crop for both, or compare on arrays"
            )
        notes = []
        for name, one in zip("AB", prepared, strict=True):
            assumed = f" (assumed, since the model does not say: {', '.join(one.assumed)})" if one.assumed else ""
            notes.append(f"input of {name}: {one}{assumed}")
        if not all(map(_of_input, (a, b))):
            notes.append("the maps are of tensors behind the input, and are compared as they are")
        return cls(a, b, data, (a.inputs, b.inputs), prepared, None, tuple(notes), options)

    @classmethod
    def _of_arrays(cls, a: Explainer, b: Explainer, data: Path, layout_b: str | None) -> Pair:
        if len(a.inputs) != len(b.inputs):
            raise OnnxgbpError(f"A takes {len(a.inputs)} inputs and B {len(b.inputs)}")
        if len(a.inputs) > 1:
            if {spec.name for spec in a.inputs} != {spec.name for spec in b.inputs}:
                named = [", ".join(spec.name for spec in one.inputs) for one in (a, b)]
                raise OnnxgbpError(f"with several inputs the names must match: A takes {named[0]}; B {named[1]}")
            if layout_b is not None:
                raise OnnxgbpError(f"a layout for B is of one input, and the models take {len(b.inputs)}")
            return cls(a, b, data, (a.inputs, b.inputs), None, None, ())
        mine, other = a.inputs[0], b.inputs[0]
        turn: tuple[int, ...] | None = None
        if layout_b is not None:
            if len(mine.shape) != 4 or len(other.shape) != 4:
                raise OnnxgbpError("a layout for B is of images: an input of four axes")
            turn = _TURNS[("nhwc" if layout_b == "nchw" else "nchw", layout_b)]
        turned = [mine.shape[axis] for axis in turn] if turn else list(mine.shape)
        clash = any(
            isinstance(x, int) and isinstance(y, int) and x != y
            for x, y in zip(turned[1:], other.shape[1:], strict=False)
        )
        if len(turned) != len(other.shape) or clash:
            hint = "" if turn or len(mine.shape) != 4 else "; say how B lays out its axes (--layout-b) if that is why"
            raise OnnxgbpError(f"no array fits both: A takes {_shape(mine)}, B {_shape(other)}{hint}")
        # The arrays are A's: read under its name and in its layout, in the type and the batch that B wants.
        back = [other.shape[turn.index(axis)] for axis in range(4)] if turn else list(other.shape)
        as_a = InputSpec(mine.name, other.dtype, (other.shape[0], *back[1:]))
        return cls(a, b, data, (a.inputs, [as_a]), None, turn, ())

    def results(self, target: int | None, limit: int | None) -> Iterator[tuple[str, Result, Result]]:
        """Both results of each sample, in the order of the data, one batch of each model in memory."""
        leads = 0 if _follows(self.b) else 1  # who is run first; the other explains the same classes
        leader, follower = (self.a, self.b) if leads == 0 else (self.b, self.a)
        fixed = np.asarray(target) if target is not None else None

        def read(side: int) -> Iterator[Batch]:
            metadata = (self.a, self.b)[side].metadata
            return batches(self.data, self.inputs[side], metadata, limit=limit, **self.options)

        first = (
            (name, result)
            for batch in read(leads)
            for name, result in self._explained(leads, leader, batch, fixed if _follows(leader) else None)
        )
        for batch in read(1 - leads):
            ahead = list(itertools.islice(first, len(batch.names)))
            assert [name for name, _ in ahead] == list(batch.names)
            wanted = np.stack([result.target for _, result in ahead]) if _follows(follower) else None
            behind = self._explained(1 - leads, follower, batch, wanted)
            for (name, one), (_, two) in zip(ahead, behind, strict=True):
                yield (name, one, two) if leads == 0 else (name, two, one)

    def _explained(
        self, side: int, explainer: Explainer, batch: Batch, target: Array | None
    ) -> Iterator[tuple[str, Result]]:
        """One batch of A (side 0) or B (side 1)."""
        feeds = batch.feeds
        if side == 1 and len(explainer.inputs) == 1:
            (x,) = feeds.values()
            feeds = {explainer.inputs[0].name: x.transpose(self.turn) if self.turn else x}
        size = len(next(iter(feeds.values())))
        if target is not None:
            rows = np.broadcast_to(target, (len(batch.names), *target.shape[1:]))
            target = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        result = explainer(feeds, target)
        if len(result.target) != size or result.scores.shape[:1] != (size,):
            raise OnnxgbpError(f"{explainer.name} does not return one row a sample: it cannot be compared by sample")
        maps = {name: self._aligned(side, one) for name, one in _named(explainer, result.attribution)}
        scores = np.asarray(result.scores, np.float64).reshape(size, -1)
        for i, name in enumerate(batch.names):
            yield name, Result(scores[i], result.target[i], {key: one[i] for key, one in maps.items()})

    def _aligned(self, side: int, attribution: Array) -> Array:
        """A map of either model as one of A's: the axes of A's arrays, or the pixels of the photo."""
        if not (_of_input(self.a) and _of_input(self.b)):
            return attribution
        if self.prepared is not None:
            return _of_pixels(attribution, self.prepared[side])
        if side == 1 and self.turn is not None:
            more = attribution.ndim - 4  # an axis of several targets behind the batch
            back = [self.turn.index(axis) + more for axis in (1, 2, 3)]
            return attribution.transpose(*range(1 + more), *back)
        return attribution


def _of_input(explainer: Explainer) -> bool:
    """Whether the map has the axes and the numbers of the one input."""
    return len(explainer.inputs) == 1 and explainer.wrt == (explainer.inputs[0].name,)


def _follows(explainer: Explainer) -> bool:
    """Whether a call may say which class is explained."""
    return explainer.mode == "input" and METADATA + "unit" not in explainer.metadata


def _named(explainer: Explainer, attribution: Any) -> Iterator[tuple[str, Array]]:
    """Every map by its method and tensor, as far as there are several."""
    each = attribution if len(explainer.methods) > 1 else {"": attribution}
    for method, held in each.items():
        for tensor, one in (held if len(explainer.wrt) > 1 else {"": held}).items():
            yield " ".join(filter(None, (method, tensor))), one


def _of_pixels(attribution: Array, prepared: Preprocessing) -> Array:
    """d score / d pixel, [..., C, H, W] in the order red, green, blue: with x = (scale pixel - mean) / std per channel,
    the map of x times scale / std.
    """
    laid = np.moveaxis(attribution, -1, -3) if prepared.layout == "nhwc" else attribution
    slope = np.broadcast_to(prepared.scale / np.asarray(prepared.std, np.float64), laid.shape[-3])
    pixels = np.asarray(laid, np.float64) * slope[:, np.newaxis, np.newaxis]
    return pixels[..., ::-1, :, :] if prepared.channels == "bgr" else pixels


def _shape(spec: InputSpec) -> str:
    return f"'{spec.name}' {shape_text(spec.shape)}"
