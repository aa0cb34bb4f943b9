"""What a feature map responds to: the images that excite it most, and what in each its strongest unit answers to.

The figure of Zeiler & Fergus 2013 (arXiv:1311.2901) and Springenberg et al. 2014 (arXiv:1412.6806). One pass over the
images, through the layers up to the map and no further, finds the best; only those are projected back to the pixels.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image

from onnxgbp.compare import first_line
from onnxgbp.convert import GradientGraph
from onnxgbp.data import Batch, batches
from onnxgbp.emit import Dims, Emit, dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explain import MANIFEST, make_folder, shown
from onnxgbp.explained import find_tensor
from onnxgbp.field import FieldFinder, Spans
from onnxgbp.files import output_file, write
from onnxgbp.images import Preprocessing, in_type, photos_in, read
from onnxgbp.lower import prune
from onnxgbp.model import METADATA, Source, load, to_proto
from onnxgbp.render import PERCENTILE, Picture, signed_picture
from onnxgbp.report import json_numbers
from onnxgbp.rules import Rules
from onnxgbp.runtime import InputSpec, open_session, provider_of
from onnxgbp.seed import parse_seed
from onnxgbp.target import Channels, parse_channels

__all__ = ["picture_neurons"]

Array: TypeAlias = npt.NDArray[Any]

_BATCH = 16
_CELL = 64  # pixels: a smaller field is enlarged to about this
_GAP, _MIDDLE = 2, 16  # pixels between the cells, and between the two halves of the picture
_MID_GREY = (128, 128, 128)  # of what lies outside the picture, as of an attribution of zero


def picture_neurons(
    model: str | Path,
    out: Path,
    *,
    layer: str,
    channel: Channels | Sequence[int | str],
    images: Path,
    echo: Callable[[str], Any],
    complain: Callable[[str], Any],
    top: int = 9,
    whole: bool = False,
    method: str = "guided",
    seed: str = "one",
    rule: Rules = (),
    activations: str | Sequence[str] = "all",
    provider: str = "auto",
    **preprocessing: Any,
) -> list[str]:
    """Pictures channels of a feature map by the images that excite them most.

    Of each image counts the strongest single activation of the channel. The `top` images with the highest are kept; one
    that does not excite the channel at all (nothing above zero) never is. For each, the unit at that place is projected
    back to the pixels, and its receptive field is cut out of the result and out of the image as the model sees it.

    Writes, for each channel C, `channel-C.neurons.png` (left the reconstructions, each scaled to its own contrast,
    right the crops of the images in the same order, row by row, the strongest first) and `channel-C.K.npy` (the K-th
    reconstruction within the field, raw and signed, axes as the model's input without the batch); last `manifest.json`,
    whose presence means that the folder is complete.

    Args:
        model: an .onnx file.
        out: the folder, made where it is missing.
        layer: an inner tensor [N, C, H, W], by its name or by that of the node that makes it.
        channel: indices, and `strongest:K` for the K channels whose `top` images excite them most on average.
        images: a folder of photos.
        echo: called with each line for the user.
        complain: called with a line on each image that cannot be used.
        top: how many images of each channel.
        whole: project the whole map of the channel back, not the one unit.
        method: as for `convert`, like rule and activations.
        rule: see there.
        activations: see there.
        seed: one, or activation: what is sent back from each unit.
        provider: as for `Explainer`.
        **preprocessing: as for `explain_images`.

    Returns:
        What was complained of: an image that cannot be used is left out.

    Raises:
        OnnxgbpError: the model, the layer, a channel, the folder or an option cannot be used, or no image excites any
            of the channels.
    """
    channels = channel if isinstance(channel, Channels) else parse_channels(channel)
    if top < 1:
        raise OnnxgbpError(f"top is {top}, not a count of 1 or more")
    source = load(model)
    part = _Layer.of(source, layer)
    part.check(channels)
    prepared = Preprocessing.of(source.model.metadata_props, part.image, **preprocessing)
    if not images.is_dir():
        raise OnnxgbpError(f"cannot read {images}: it is no folder of photos")
    photos = photos_in(images)
    rules: dict[str, Any] = {"method": method, "rule": [rule] if isinstance(rule, str) else list(rule)}
    options = rules | {"activations": activations, "seed": parse_seed(seed), "whole": whole, "top": top}
    backward = _Backward(source, part, options, provider)  # first: what cannot be differentiated needs no image
    forward = _Forward(source, part, provider)

    what = "the whole map" if whole else "the strongest unit"
    echo(f"{shown(source.name)}: {method} of {what} of '{part.name}' {part.shape} on {forward.provider}")
    echo(f"input: {prepared}")
    if prepared.assumed:
        echo(f"the model does not say how to prepare an image; assumed {', '.join(prepared.assumed)}")
    failed = list[str]()
    metadata = source.model.metadata_props
    found = batches(images, [part.image], metadata, batch=_BATCH, on_error=failed.append, **preprocessing)
    hidden = not sys.stderr.isatty()
    try:
        with click.progressbar(length=len(photos), label="looking", file=sys.stderr, hidden=hidden) as bar:
            first = next(found)
            part.check_axes(source, first.feeds[part.image.name].shape, prepared.layout)
            make_folder(out, photos)  # whether it can be is found out before the long pass, not after it
            best, names = _looked_through(itertools.chain([first], found), part, forward, top, bar.update)
    finally:
        for said in failed:  # not before: it would break the bar
            complain(f"Error: {said}")
    part.check(channels, len(best.excited))
    chosen = best.choose(channels)
    if not any(best.hits(index) for index in chosen):
        listed = ", ".join(map(str, chosen))
        raise OnnxgbpError(f"none of the {len(names)} images excites channel {listed} of '{part.name}'")

    tiles = _Tiles(source, part, prepared, forward, backward)
    rows, lost = list[dict[str, Any]](), ""
    for index in chosen:
        hits = best.hits(index)
        made = [tiles(Path(names[hit.image]), index, hit) for hit in hits]
        rows.append({"channel": index, "excited_by": int(best.excited[index]), **_written(out, index, made)})
        for entry, hit in zip(rows[-1]["top"], hits, strict=True):
            entry |= {"file": names[hit.image], "activation": hit.activation}
        lost = next((tile.lost for tile in made if tile.lost), lost)
        for line in _lines(rows[-1], len(names)):
            echo(line)
    if lost:
        echo(f"no receptive field is known past node '{lost}': the whole picture is shown")
    manifest = {
        "onnxgbp": importlib.metadata.version("onnxgbp"),
        "model": str(model),
        "sha256": source.sha256,
        "provider": forward.provider,
        "layer": part.name,
        "options": options,
        "preprocessing": prepared.to_dict(),
        "percentile": PERCENTILE,
        "images": len(names),
        "errors": failed,
        "field_lost_at": lost or None,
        "channels": rows,
    }
    text = json.dumps(json_numbers(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    write(out / MANIFEST, (text + "\n").encode())
    return failed


def _looked_through(
    found: Iterable[Batch], part: _Layer, forward: _Forward, top: int, count: Callable[[int], Any]
) -> tuple[_Best, list[str]]:
    """The strongest images of every channel, and the names of all."""
    best, names = _Best(top), list[str]()
    for batch in found:
        values, places = forward.strongest(batch.feeds[part.image.name])
        best.add(values[: len(batch.names)], places[: len(batch.names)])
        names += batch.names
        count(len(batch.names))
    return best, names


def _written(out: Path, channel: int, tiles: Sequence[_Tile]) -> dict[str, Any]:
    """Writes the picture and the arrays of one channel; what the manifest says of them."""
    files, entries = dict[str, str](), list[dict[str, Any]]()
    if tiles:
        files["picture"] = f"channel-{channel}.neurons.png"
        with output_file(out / files["picture"]) as aside:
            _sheet(tiles).save(aside, "PNG")
    for number, tile in enumerate(tiles, start=1):
        files[str(number)] = f"channel-{channel}.{number}.npy"
        with output_file(out / files[str(number)]) as aside, aside.open("wb") as stream:
            np.save(stream, tile.attribution, allow_pickle=False)
        entry = {"position": list(tile.position), "box": list(tile.box), "array": files[str(number)]}
        entries.append(entry | {"clip": tile.picture.clip, "warning": tile.picture.warning or None})
    return {"files": files, "top": entries}


def _lines(row: Mapping[str, Any], images: int) -> Iterator[str]:
    shown = len(row["top"])
    yield f"channel {row['channel']}: {row['excited_by']} of {images} images excite it, {shown} shown"
    for entry in row["top"]:
        at = ", ".join(map(str, entry["position"]))
        yield f"  {entry['activation']:10.4g}  at [{at}]  {entry['file']}"
        if entry["warning"]:
            yield f"              warning: {entry['warning']}"


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The tensor that is pictured, and the input of the model that is an image."""

    name: str
    dims: Dims
    dtype: np.dtype[Any]
    image: InputSpec

    @classmethod
    def of(cls, source: Source, layer: str) -> _Layer:
        graph = source.model.graph
        if METADATA + "method" in source.model.metadata_props:
            raise OnnxgbpError(f"{source.name} is already a converted file; give the model that it was made from")
        inputs = [value for value in graph.inputs if not value.is_initializer()]
        if len(inputs) != 1:
            listed = ", ".join(f"'{value.name}'" for value in inputs)
            raise OnnxgbpError(f"channels are pictured for one image input; this model takes {listed}")
        image, tensor = inputs[0], find_tensor(graph, layer, "--layer")
        dims = dims_of(tensor)
        if dims is None or len(dims) != 4:
            shape = "of unknown shape" if dims is None else _shape_text(dims)
            raise OnnxgbpError(f"--layer: tensor '{tensor.name}' {shape} is no feature map [N, C, H, W]")
        assert tensor.dtype is not None  # find_tensor gives floats alone
        dtype = image.dtype.numpy() if image.dtype is not None else np.dtype(np.float32)
        spec = InputSpec(image.name or "", dtype, dims_of(image) or ())
        return cls(tensor.name or "", dims, tensor.dtype.numpy(), spec)

    @property
    def shape(self) -> str:
        return _shape_text(self.dims)

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
        if len({_places(finder((None, (end, end), None, None)).spans, layout) for end in ends}) > 1:
            raise OnnxgbpError(
                f"--layer: tensor '{self.name}' {self.shape} is no feature map [N, C, H, W], since its axis 1 runs "
                "over the picture; choose one whose channels stand before height and width"
            )


def _shape_text(dims: Dims) -> str:
    return f"[{', '.join(str(dim or '?') for dim in dims)}]"


def _places(spans: Spans, layout: str) -> Spans:
    """Height and width of what has the input's axes."""
    return spans[2:] if layout == "nchw" else spans[1:3]


class _Session:
    """A model in ONNX Runtime; the batch is filled up with copies where the model fixes it."""

    def __init__(self, proto: onnx.ModelProto, source: Source, part: _Layer, provider: str) -> None:
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


class _Forward:
    """The network up to the feature map, with the strongest activation of each channel and its place."""

    def __init__(self, source: Source, part: _Layer, provider: str) -> None:
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
        self._session = _Session(to_proto(model, source), source, part, provider)
        self.provider = self._session.provider

    def strongest(self, x: Array) -> tuple[Array, Array]:
        """The highest activation of each channel and its place in the flattened map, [N, C] each."""
        values, places = self._session.several(self._outputs[1:], {self._image: x})
        return values, places

    def maps(self, x: Array) -> Array:
        """The feature map, [N, C, H, W]."""
        return self._session.run(self._outputs[0], {self._image: x})


class _Backward:
    """From a unit, or from all of a channel's map, back to the image."""

    def __init__(self, source: Source, part: _Layer, options: Mapping[str, Any], provider: str) -> None:
        graph = GradientGraph.build(source, target="seed", output=part.name)
        rules = {name: options[name] for name in ("method", "rule", "activations")}
        self._session = _Session(graph.render(**rules), source, part, provider)
        self._image, self._dtype = part.image.name, part.dtype
        self._seed, self._whole = options["seed"], options["whole"]

    def __call__(self, x: Array, maps: Array, channel: int, row: int, column: int) -> Array:
        """The attribution of one sample, without its batch axis."""
        place = (0, channel) if self._whole else (0, channel, row, column)
        seed = np.zeros(maps.shape, self._dtype)
        seed[place] = np.maximum(maps[place], 0) if self._seed == "activation" else 1
        attribution: Array = self._session.run("attribution", {self._image: x, "seed": seed})[0]
        return attribution


@dataclasses.dataclass(frozen=True)
class _Hit:
    """image: which of the folder; place: in the flattened map."""

    image: int
    place: int
    activation: float


class _Best:
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

    def hits(self, channel: int) -> list[_Hit]:
        """The strongest first; fewer than asked for where fewer images excite the channel."""
        rows = zip(self._images[channel], self._places[channel], self._values[channel], strict=True)
        return [_Hit(int(image), int(place), float(value)) for image, place, value in rows if value > 0]

    def choose(self, channels: Channels) -> list[int]:
        """Those named, then the strongest by the mean of what `hits` gives (nothing counts as zero)."""
        order = np.argsort(-self._values.sum(axis=1), kind="stable")[: channels.strongest]
        return list(dict.fromkeys([*channels.named, *map(int, order)]))


@dataclasses.dataclass(frozen=True)
class _Tile:
    """What one unit sees of one image.

    attribution: within the field; box: left, top, right and bottom in the picture that the model sees, of that `size`;
    position: of the unit in its map; lost: the node past which no field is known.
    """

    attribution: Array
    picture: Picture
    crop: Image.Image
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    position: tuple[int, int]
    lost: str


class _Tiles:
    """Makes the tile of a hit."""

    def __init__(
        self, source: Source, part: _Layer, prepared: Preprocessing, forward: _Forward, backward: _Backward
    ) -> None:
        self._source, self._part, self._prepared = source, part, prepared
        self._forward, self._backward = forward, backward
        self._finders: dict[tuple[int, ...], FieldFinder] = {}

    def __call__(self, path: Path, channel: int, hit: _Hit) -> _Tile:
        layout, image = self._prepared.layout, read(path)
        photo, x = (
            self._prepared.cropped(image),
            in_type(self._prepared.prepare(image), self._part.image.dtype)[np.newaxis],
        )
        maps = self._forward.maps(x)
        row, column = divmod(hit.place, maps.shape[-1])
        if x.shape not in self._finders:
            self._finders[x.shape] = FieldFinder(self._source.model, self._part.image.name, x.shape, self._part.name)
        field = self._finders[x.shape]((None, None, (row, row), (column, column)))
        sides = zip(_places(field.spans, layout), (photo.height, photo.width), strict=True)
        (top, bottom), (left, right) = ((0, size) if span is None else (span[0], span[1] + 1) for span, size in sides)
        rows, columns = slice(top, bottom), slice(left, right)
        whole = self._backward(x, maps, channel, row, column)
        attribution = whole[:, rows, columns] if layout == "nchw" else whole[rows, columns]
        picture = signed_picture(attribution, layout=layout, channels=self._prepared.channels)
        box = (left, top, right, bottom)
        return _Tile(attribution, picture, photo.crop(box), box, photo.size, (row, column), field.lost)


def _sheet(tiles: Sequence[_Tile]) -> Image.Image:
    """The reconstructions in a square on the left, the crops in another on the right, in the same order.

    A field that the border of the picture cuts stands where it would in a whole one.
    """
    width, height = (max(tile.picture.image.size[axis] for tile in tiles) for axis in (0, 1))
    scale = max(1, round(_CELL / max(width, height)))
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    steps = width * scale + _GAP, height * scale + _GAP
    half = columns * steps[0] - _GAP
    sheet = Image.new("RGB", (2 * half + _MIDDLE, rows * steps[1] - _GAP), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        for start, image in ((0, tile.picture.image), (half + _MIDDLE, tile.crop)):
            large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            room = width * scale - large.width, height * scale - large.height
            shift = [_shift(tile.box[axis], tile.box[axis + 2], tile.size[axis], room[axis]) for axis in (0, 1)]
            cell = Image.new("RGB", (width * scale, height * scale), _MID_GREY)
            cell.paste(large, (shift[0], shift[1]))
            sheet.paste(cell, (start + column * steps[0], row * steps[1]))
    return sheet


def _shift(first: int, last: int, size: int, room: int) -> int:
    """Away from the border of the picture that is nearer."""
    before, behind = first, size - last
    return room if before < behind else 0 if behind < before else room // 2
