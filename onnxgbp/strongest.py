"""The images that excite the channels of a feature map most: a pass through the network up to it, and the ranking."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from onnxgbp.compare import first_line
from onnxgbp.data import Batch
from onnxgbp.emit import Dims, Emit, dims_of, shape_text
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explained import find_tensor
from onnxgbp.field import FieldFinder, Spans
from onnxgbp.given import InputSpec
from onnxgbp.lower import prune
from onnxgbp.metadata import refuse_converted
from onnxgbp.model import Source, to_proto
from onnxgbp.session import open_session, provider_of
from onnxgbp.target import Channels

__all__ = ["Best", "FeatureMap", "Forward", "Hit", "Session", "height_and_width", "look_through"]

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """The tensor that is pictured, and the input of the model that is an image."""

    name: str
    dims: Dims
    dtype: np.dtype[Any]
    image: InputSpec

    @classmethod
    def of(cls, source: Source, layer: str) -> FeatureMap:
        graph = source.model.graph
        refuse_converted(source)
        inputs = [value for value in graph.inputs if not value.is_initializer()]
        if len(inputs) != 1:
            listed = ", ".join(f"'{value.name}'" for value in inputs)
            raise OnnxgbpError(f"channels are pictured for one image input; this model takes {listed}")
        image, tensor = inputs[0], find_tensor(graph, layer, "--layer")
        dims = dims_of(tensor)
        if dims is None or len(dims) != 4:
            shape = "of unknown shape" if dims is None else shape_text(dims)
            raise OnnxgbpError(f"--layer: tensor '{tensor.name}' {shape} is no feature map [N, C, H, W]")
        assert tensor.dtype is not None  # find_tensor gives floats alone
        dtype = image.dtype.numpy() if image.dtype is not None else np.dtype(np.float32)
        spec = InputSpec(image.name or "", dtype, dims_of(image) or ())
        return cls(tensor.name or "", dims, tensor.dtype.numpy(), spec)

    @property
    def shape(self) -> str:
        return shape_text(self.dims)

    def check(self, channels: Channels, count: int | None = None) -> None:
        """The channels exist; where the model leaves their number open, `count` tells it after the first run."""
        size = self.dims[1] if count is None else count
        wrong = [channel for channel in channels.named if isinstance(size, int) and channel >= size]
        if wrong:
            raise OnnxgbpError(f"channel {wrong[0]} is out of range: '{self.name}' has {size} channels")

    def check_axes(self, source: Source, shape: tuple[int, ...], layout: str) -> None:
        """A tensor [N, H, W, C] would be taken for [N, C, H, W], were it not that its axis 1 moves over the picture."""
        finder, size = FieldFinder(source.model, self.image.name, shape, self.name), self.dims[1]
        ends = {0, size - 1} if isinstance(size, int) else {0}
        if len({height_and_width(finder((None, (end, end), None, None)).spans, layout) for end in ends}) > 1:
            raise OnnxgbpError(
                f"--layer: tensor '{self.name}' {self.shape} is no feature map [N, C, H, W], since its axis 1 runs "
                "over the picture; choose one whose channels stand before height and width"
            )


def height_and_width(spans: Spans, layout: str) -> Spans:
    """Height and width of what has the input's axes."""
    return spans[2:] if layout == "nchw" else spans[1:3]


class Session:
    """A model in ONNX Runtime; the batch is filled up with copies where the model fixes it."""

    def __init__(self, proto: onnx.ModelProto, source: Source, part: FeatureMap, provider: str) -> None:
        self._session = open_session(proto, source, provider)
        self._name, self._batch = source.name, part.image.shape[0] if part.image.shape else None
        self.provider = provider_of(self._session)

    def run(self, output: str, feeds: Mapping[str, Array]) -> Array:
        return self.several([output], feeds)[0]

    def several(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        count = len(next(iter(feeds.values())))
        if isinstance(self._batch, int) and count < self._batch:
            feeds = {name: np.repeat(array, self._batch, axis=0) for name, array in feeds.items()}
        try:
            return [np.asarray(values)[:count] for values in self._session.run(list(outputs), dict(feeds))]
        except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
            raise OnnxgbpError(f"ONNX Runtime could not run {self._name}: {first_line(error)}") from None


class Forward:
    """The network up to the feature map, with the strongest activation of each channel and its place."""

    def __init__(self, source: Source, part: FeatureMap, provider: str) -> None:
        model = source.model.clone()
        graph, op = model.graph, Emit(model.graph)
        tensors = [*graph.inputs, *(value for node in graph for value in node.outputs)]
        tensor = next(value for value in tensors if value.name == part.name)
        rows = op.Reshape(tensor, [0, 0, -1])
        outputs = [op.Identity(tensor), op.ReduceMax(rows, axes=[2], keepdims=0), op.ArgMax(rows, axis=2, keepdims=0)]
        graph.extend(op.take())
        graph.outputs[:] = outputs
        prune(graph)
        self._image = part.image.name
        self._outputs = [value.name or "" for value in outputs]
        self._session = Session(to_proto(model, source), source, part, provider)
        self.provider = self._session.provider

    def strongest(self, x: Array) -> tuple[Array, Array]:
        """The highest activation of each channel and its place in the flattened map, [N, C] each."""
        values, places = self._session.several(self._outputs[1:], {self._image: x})
        return values, places

    def maps(self, x: Array) -> Array:
        """The feature map, [N, C, H, W]."""
        return self._session.run(self._outputs[0], {self._image: x})


@dataclasses.dataclass(frozen=True)
class Hit:
    """image: which of the folder; place: in the flattened map."""

    image: int
    place: int
    activation: float


class Best:
    """The images with the strongest activations of every channel, as they are seen one batch after the other."""

    def __init__(self, top: int) -> None:
        self._top, self._count = top, 0
        self._values = np.zeros((0, 0))
        self._images = self._places = np.zeros((0, 0), np.int64)
        self.excited = np.zeros(0, np.int64)
        """How many images excite each channel."""

    def add(self, values: Array, places: Array) -> None:
        """The strongest activation of each image and channel, [N, C], and where it is."""
        if not self._count:
            channels = values.shape[1]
            self._values = np.zeros((channels, 0))
            self._images = self._places = np.zeros((channels, 0), np.int64)
            self.excited = np.zeros(channels, np.int64)
        # What is not above zero excites nothing; nor does what is no number.
        found = np.where(np.isfinite(values) & (values > 0), values, 0).astype(np.float64).T
        self.excited += (found > 0).sum(axis=1)
        images = np.broadcast_to(np.arange(self._count, self._count + len(values)), found.shape)
        self._count += len(values)
        joined = np.concatenate([self._values, found], axis=1)
        order = np.argsort(-joined, axis=1, kind="stable")[:, : self._top]  # of equals the first seen
        self._values = np.take_along_axis(joined, order, 1)
        self._images = np.take_along_axis(np.concatenate([self._images, images], axis=1), order, 1)
        self._places = np.take_along_axis(np.concatenate([self._places, places.T], axis=1), order, 1)

    def hits(self, channel: int) -> list[Hit]:
        """The strongest first; fewer than asked for where fewer images excite the channel."""
        rows = zip(self._images[channel], self._places[channel], self._values[channel], strict=True)
        return [Hit(int(image), int(place), float(value)) for image, place, value in rows if value > 0]

    def choose(self, channels: Channels) -> list[int]:
        """Those named, then the strongest by the mean of what `hits` gives (nothing counts as zero)."""
        order = np.argsort(-self._values.sum(axis=1), kind="stable")[: channels.strongest]
        return list(dict.fromkeys([*channels.named, *map(int, order)]))


def look_through(
    found: Iterable[Batch], part: FeatureMap, forward: Forward, top: int, count: Callable[[int], Any]
) -> tuple[Best, list[str]]:
    """The strongest images of every channel, and the names of all."""
    best, names = Best(top), list[str]()
    for batch in found:
        values, places = forward.strongest(batch.feeds[part.image.name])
        best.add(values[: len(batch.names)], places[: len(batch.names)])
        names += batch.names
        count(len(batch.names))
    return best, names
