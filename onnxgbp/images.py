"""Photos -> what the model takes: read, resize, crop, scale, normalise, lay out."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from onnxgbp.emit import shape_text
from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import listed_files
from onnxgbp.given import InputSpec
from onnxgbp.untrusted import METADATA, json_entry

__all__ = ["SUFFIXES", "Preprocessing", "in_type", "is_photo", "parse_floats", "photos_in", "read"]

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())

_CHANNELS = {"rgb": 3, "bgr": 3, "grey": 1}
_LAYOUTS = ("nchw", "nhwc")
LONGEST = 1 << 13  # pixels of a side that is asked for: 200 MB of a square; a model's metadata asks, too
_WIDEST = 8  # a longer side of more than this many shorter ones is trimmed before it is resized


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the model's input, in this order.

    size: the shorter side is resized to it (bilinear, smoothed when shrinking); None leaves it as it is.
    crop: (height, width) cut out of the centre; None leaves the photo whole.
    channels: rgb, bgr or grey; scale: what the pixel values 0 to 255 are multiplied by; mean, std: then subtracted and
    divided by, in the order of `channels`; layout: nchw or nhwc.
    """

    size: int | None = None
    crop: tuple[int, int] | None = None
    channels: str = "rgb"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "nchw"
    assumed: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # what neither metadata nor options said

    def __post_init__(self) -> None:
        if self.channels not in _CHANNELS:
            raise OnnxgbpError(f"channels '{self.channels}' are none of {', '.join(_CHANNELS)}")
        if self.layout not in _LAYOUTS:
            raise OnnxgbpError(f"layout '{self.layout}' is none of {', '.join(_LAYOUTS)}")
        if self.size is not None and not 1 <= self.size <= LONGEST:
            raise OnnxgbpError(f"size {self.size} is not a number of pixels from 1 to {LONGEST}")
        if self.crop is not None and not 1 <= min(self.crop) <= max(self.crop) <= LONGEST:
            raise OnnxgbpError(f"crop {self.crop} is not a number of pixels from 1 to {LONGEST}")
        count = _CHANNELS[self.channels]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, count):
                raise OnnxgbpError(f"{name} has {len(values)} values for {count} channel{'s' if count > 1 else ''}")
        if not all(math.isfinite(value) for value in (self.scale, *self.mean, *self.std)) or 0 in (
            self.scale,
            *self.std,
        ):
            raise OnnxgbpError("scale, mean and std must be finite numbers, scale and std not 0")

    @classmethod
    def of(cls, metadata: Mapping[str, str], spec: InputSpec, **overrides: Any) -> Preprocessing:
        """What the model's metadata says (`onnxgbp.preprocessing`, a JSON object with the names of the fields above),
        with the overrides that are not None.

        Without metadata: layout, channels and crop from the input's shape, size the shorter side of that crop (so that
        nothing but the overhang of the longer side is lost), pixels scaled to 0..1 (0..255 where the input takes
        integers), no mean, no std. `assumed` says so.

        Raises:
            OnnxgbpError: malformed metadata or options, an input that is no picture, or a crop that is not its size.
        """
        said = _from_metadata(metadata)
        given = {name: value for name, value in overrides.items() if value is not None}
        shape = _Shape.of(spec, given.get("layout", said.get("layout")))
        values = {**shape.assumptions(), **said, **given}
        fields: dict[str, Any] = {name: _FIELDS[name](name, value) for name, value in values.items()}
        if fields.get("crop") and "size" not in {**said, **given}:
            fields["size"] = min(fields["crop"])
            if fields["crop"][0] != fields["crop"][1]:
                fields["size"] = max(fields["crop"])  # either way round, the crop must fit in
        assumed = tuple(
            name for name in _FIELDS if name not in said and name not in given and fields.get(name) is not None
        )
        result = cls(**fields, assumed=assumed)
        shape.check(result, spec)
        return result

    def cropped(self, image: Image.Image) -> Image.Image:
        """The photo as the model sees it: uint8, RGB.

        Raises:
            OnnxgbpError: the photo is smaller than the crop.
        """
        if self.size is not None:
            image = _resized(image, self.size)
        if self.crop is not None:
            height, width = self.crop
            if image.width < width or image.height < height:
                raise OnnxgbpError(
                    f"the picture is {image.width} x {image.height}, smaller than the crop {width} x {height}: "
                    "choose a larger --size"
                )
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        return image

    def placed(self, box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Where a box of a photo of that (width, height) lies in the picture that the model sees, both in pixels as
        (left, top, right, bottom); it may reach beyond the crop.
        """
        shorter = min(size)
        shown = [min(side, _WIDEST * shorter) for side in size] if self.size is not None else list(size)
        left, top = ((side - kept) // 2 for side, kept in zip(size, shown, strict=True))
        final = (
            [self.size if side == shorter else round(side * self.size / shorter) for side in shown]
            if self.size
            else shown
        )
        scales = [after / before for after, before in zip(final, shown, strict=True)]
        height, width = self.crop or (final[1], final[0])
        moved = round((final[0] - width) / 2), round((final[1] - height) / 2)
        x0, x1 = ((x - left) * scales[0] - moved[0] for x in (box[0], box[2]))
        y0, y1 = ((y - top) * scales[1] - moved[1] for y in (box[1], box[3]))
        return x0, y0, x1, y1

    def prepare(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """The model's input for one photo (RGB, from `read`): float32 [C, H, W] or, for nhwc, [H, W, C].

        Raises:
            OnnxgbpError: the photo is smaller than the crop.
        """
        image = self.cropped(image)
        if self.channels == "grey":
            pixels = np.asarray(image.convert("L"), np.float32)[..., np.newaxis]
        else:
            pixels = np.asarray(image, np.float32)
        if self.channels == "bgr":
            pixels = pixels[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        pixels = (pixels * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(pixels if self.layout == "nhwc" else pixels.transpose(2, 0, 1))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them, for a manifest or for metadata."""
        return {name: getattr(self, name) for name in _FIELDS}

    def __str__(self) -> str:
        parts = [] if self.size is None else [f"shorter side {self.size}"]
        parts += [] if self.crop is None else [f"crop {self.crop[0]} x {self.crop[1]}"]
        parts += [self.channels, f"scale {self.scale:.6g}"]
        parts += [f"{name} {','.join(f'{v:g}' for v in getattr(self, name))}" for name in ("mean", "std")]
        return ", ".join([*parts, self.layout])


_OURS = (
    ".attribution.png",
    ".overlay.png",
    ".neurons.png",
    ".sanity.png",
    ".faithfulness.png",
)  # what our commands write, perhaps into the folder of its photos


def is_photo(name: str) -> bool:
    """Whether a file is called as a photo is, and not as a picture that an earlier run made."""
    return Path(name).suffix.lower() in SUFFIXES and not name.endswith(_OURS)


def photos_in(folder: Path) -> list[Path]:
    """The photos of a folder, sorted by name, without the pictures that an earlier run put there.

    Raises:
        OnnxgbpError: it cannot be read, or holds none.
    """
    made = listed_files(folder)
    try:
        inside = sorted(path for path in folder.iterdir() if is_photo(path.name) and path.is_file())
    except OSError as error:
        raise OnnxgbpError(f"cannot read {folder}: {error.strerror}") from None
    inside = [path for path in inside if path.name not in made]
    if not inside:
        raise OnnxgbpError(f"no image in the folder {folder}: looked for {', '.join(sorted(SUFFIXES))}")
    return inside


def read(path: Path, data: bytes | None = None) -> Image.Image:
    """A photo as uint8 RGB, turned upright as its EXIF data says, transparency laid on white, 16 bits made 8.

    With `data`, the bytes of the photo, nothing is read: the path is only what it is called.

    Raises:
        OnnxgbpError: not there, not an image, cut off, or too large.
    """
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):  # numbers without a known range: converting would clip them to black or white
                raise OnnxgbpError(f"cannot read {path}: its pixels have 32 bits; save it with 8 or 16 bits")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except OnnxgbpError:
        raise
    except UnidentifiedImageError:
        raise OnnxgbpError(f"cannot read {path}: not an image, or of an unknown kind") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise many kinds for a damaged file
        said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        raise OnnxgbpError(f"cannot read {path}: {said}") from None


def in_type(x: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A prepared photo in the type that the model takes: whole numbers for one of integers.

    Raises:
        OnnxgbpError: it cannot hold them.
    """
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype) if dtype.kind in "iu" else None
    if limits is None or not limits.min <= x.min() <= x.max() <= limits.max:
        raise OnnxgbpError(
            f"the model takes pixels as {dtype}, which cannot hold {x.min():g} to {x.max():g}: see --scale, --mean"
        )
    return (x if dtype.kind == "f" else np.rint(x)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What an input's shape tells of the pictures it takes."""

    layout: str
    channels: int | None
    height: int | None
    width: int | None
    scale: float

    @classmethod
    def of(cls, spec: InputSpec, layout: Any) -> _Shape:
        dims = [dim if isinstance(dim, int) and dim > 0 else None for dim in spec.shape]
        given = f"{spec} of shape {shape_text(spec.shape)}"
        if len(dims) != 4:
            raise OnnxgbpError(f"{given} takes no pictures: give arrays, a .npy or .npz")
        if layout not in _LAYOUTS:
            # Three or one at the end, and not at the front, can only be channels there.
            layout = "nhwc" if dims[3] in (1, 3) and dims[1] not in (1, 3) else "nchw"
        channels, height, width = dims[1:] if layout == "nchw" else (dims[3], dims[1], dims[2])
        if channels not in (None, 1, 3):
            raise OnnxgbpError(
                f"{given} has {channels} channels as {layout}, where a picture "
                "has 1 or 3: give arrays, a .npy or .npz, or --layout"
            )
        return cls(layout, channels, height, width, 1 / 255 if spec.dtype.kind == "f" else 1.0)

    def assumptions(self) -> dict[str, Any]:
        values: dict[str, Any] = {"channels": "grey" if self.channels == 1 else "rgb", "scale": self.scale}
        values |= {"mean": (0.0,), "std": (1.0,), "layout": self.layout}
        return values | ({"crop": (self.height, self.width)} if self.height and self.width else {})

    def check(self, chosen: Preprocessing, spec: InputSpec) -> None:
        if self.channels is not None and self.channels != _CHANNELS[chosen.channels]:
            raise OnnxgbpError(f"{spec} has a channel axis of {self.channels}, but channels are '{chosen.channels}'")
        if chosen.crop is None:
            return
        height, width = chosen.crop
        if (self.height or height, self.width or width) != (height, width):
            raise OnnxgbpError(f"{spec} takes {self.height} x {self.width} pixels, but the crop is {height} x {width}")
        if chosen.size is not None and chosen.size < min(height, width):
            raise OnnxgbpError(
                f"size {chosen.size} is smaller than the crop {height} x {width}: choose a larger --size"
            )


def _from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA + "preprocessing" not in metadata:
        return {}
    said = json_entry(metadata, "preprocessing")
    if not isinstance(said, dict):
        raise OnnxgbpError(f"the model's metadata '{METADATA}preprocessing' is no JSON object")
    if unknown := [name for name in said if name not in _FIELDS]:
        raise OnnxgbpError(f"the model's metadata '{METADATA}preprocessing' has an unknown entry '{unknown[0]}'")
    return {name: value for name, value in said.items() if value is not None}


def _int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OnnxgbpError(f"{name} '{value}' is no integer")
    return value


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise OnnxgbpError(f"{name} '{value}' is neither an integer nor a height and a width")
    return _int(name, pair[0]), _int(name, pair[1])


def _float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise OnnxgbpError(f"{name} '{value}' is no number") from None


def parse_floats(name: str, value: Any) -> tuple[float, ...]:
    """Numbers from a list, from one number, or from text such as 0.485,0.456,0.406."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    return tuple(_float(name, part) for part in parts)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise OnnxgbpError(f"{name} '{value}' is no text")
    return value


_FIELDS = {
    "size": _int,
    "crop": _pair,
    "channels": _text,
    "scale": _float,
    "mean": parse_floats,
    "std": parse_floats,
    "layout": _text,
}


def _resized(image: Image.Image, size: int) -> Image.Image:
    """The shorter side becomes `size`."""
    shorter = min(image.size)
    if max(image.size) > _WIDEST * shorter:  # a sliver would be blown up to a picture of gigabytes
        width, height = (min(side, _WIDEST * shorter) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    width, height = (size if side == shorter else round(side * size / shorter) for side in image.size)
    if width * height > LONGEST**2:
        raise OnnxgbpError(f"the picture would be resized to {width} x {height} pixels: choose a smaller --size")
    # Rows, then columns: left to choose, newer releases of Pillow take them in either order, by the sizes, which moves
    # pixels by a level. So a photo is the same input with any release, and in tools/web.
    across = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return across.resize((width, height), Image.Resampling.BILINEAR)
