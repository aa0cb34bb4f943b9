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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxgbp.convert import GradientGraph
from onnxgbp.data import batches
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explain import MANIFEST, make_folder, shown
from onnxgbp.field import FieldFinder
from onnxgbp.files import output_file, write
from onnxgbp.findings import json_numbers
from onnxgbp.images import Preprocessing, in_type, photos_in, read
from onnxgbp.model import Source, load
from onnxgbp.render import PERCENTILE, Picture, signed_picture
from onnxgbp.rules import Rules
from onnxgbp.seed import parse_seed
from onnxgbp.strongest import FeatureMap, Forward, Hit, Session, height_and_width, look_through
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
    part = FeatureMap.of(source, layer)
    part.check(channels)
    prepared = Preprocessing.of(source.model.metadata_props, part.image, **preprocessing)
    if not images.is_dir():
        raise OnnxgbpError(f"cannot read {images}: it is no folder of photos")
    photos = photos_in(images)
    rules: dict[str, Any] = {"method": method, "rule": [rule] if isinstance(rule, str) else list(rule)}
    options = rules | {"activations": activations, "seed": parse_seed(seed), "whole": whole, "top": top}
    backward = _Backward(source, part, options, provider)  # first: what cannot be differentiated needs no image
    forward = Forward(source, part, provider)

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
            best, names = look_through(itertools.chain([first], found), part, forward, top, bar.update)
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


class _Backward:
    """From a unit, or from all of a channel's map, back to the image."""

    def __init__(self, source: Source, part: FeatureMap, options: Mapping[str, Any], provider: str) -> None:
        graph = GradientGraph.build(source, target="seed", output=part.name)
        rules = {name: options[name] for name in ("method", "rule", "activations")}
        self._session = Session(graph.render(**rules), source, part, provider)
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
        self, source: Source, part: FeatureMap, prepared: Preprocessing, forward: Forward, backward: _Backward
    ) -> None:
        self._source, self._part, self._prepared = source, part, prepared
        self._forward, self._backward = forward, backward
        self._finders: dict[tuple[int, ...], FieldFinder] = {}

    def __call__(self, path: Path, channel: int, hit: Hit) -> _Tile:
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
        sides = zip(height_and_width(field.spans, layout), (photo.height, photo.width), strict=True)
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
