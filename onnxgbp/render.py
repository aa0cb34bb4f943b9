"""Arrays -> pictures. The raw attribution is signed: zero is one neutral colour, and the scale symmetric."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxgbp.errors import OnnxgbpError

__all__ = ["PERCENTILE", "Picture", "clip_of", "diverging", "finite", "if_blank", "overlay", "scaled", "signed_picture"]

PERCENTILE = 99.5  # of |value|: a few outliers would leave the rest of a map invisible

Map = npt.NDArray[np.floating]

# Blue (negative) over near-white (zero) to red (positive), evenly spaced; dark ends of about equal lightness.
_SIGNED = np.array(
    [
        (5, 48, 97),
        (33, 102, 172),
        (67, 147, 195),
        (146, 197, 222),
        (209, 229, 240),
        (247, 247, 247),
        (253, 219, 199),
        (244, 165, 130),
        (214, 96, 77),
        (178, 24, 43),
        (103, 0, 31),
    ],
    np.float64,
)
# From ember to light, evenly spaced.
_HEAT = np.array([(120, 20, 60), (200, 40, 50), (245, 110, 25), (255, 190, 40), (255, 250, 200)], np.float64)
_MID_GREY = 128.0


@dataclasses.dataclass(frozen=True)
class Picture:
    """image: uint8 RGB; clip: the |value| shown in full colour; warning: what a reader has to know, or ''."""

    image: Image.Image
    clip: float
    warning: str = ""


def signed_picture(
    attribution: Map, *, layout: str = "nchw", channels: str = "rgb", percentile: float = PERCENTILE
) -> Picture:
    """The attribution as a picture of its own size.

    With three colour channels each is drawn for itself, as in the papers: mid-grey (128) is zero, brighter in a colour
    is positive. With any other number of channels their sum is drawn: white is zero, red positive, blue negative.

    Args:
        attribution: float [C, H, W], or [H, W, C] for layout nhwc.
        layout: nchw or nhwc.
        channels: rgb or bgr, the order of three channels; anything else for other numbers of them.
        percentile: of |value|, the value that is shown in full colour; what is beyond is cut off.

    Raises:
        OnnxgbpError: the array has not three axes.
    """
    values, warning = _pixels(attribution, layout)
    if values.shape[2] == 3 and channels in ("rgb", "bgr"):
        values = values[..., ::-1] if channels == "bgr" else values
        clip = clip_of(values, percentile)
        image = Image.fromarray(np.rint(_MID_GREY + 127 * scaled(values, clip)).astype(np.uint8))
    else:
        values = values.sum(axis=2)
        clip = clip_of(values, percentile)
        image = diverging(scaled(values, clip))
    return Picture(image, clip, warning or if_blank(clip))


def overlay(attribution: Map, photo: Image.Image, *, layout: str = "nchw", percentile: float = PERCENTILE) -> Picture:
    """Where the attribution is, on the photo: paled and darkened, lit up where the magnitude is large.

    Drawn is the magnitude (the sum of |value| over the channels), without its sign and blurred by about a hundredth of
    the picture's side: single pixels alternate in sign and size, and would hide the photo instead of pointing into it.

    Args:
        attribution: float [C, H, W], or [H, W, C] for layout nhwc.
        photo: RGB; its size is the picture's.
        layout: nchw or nhwc.
        percentile: of the blurred magnitude, as for `signed_picture`; `clip` is that magnitude.

    Raises:
        OnnxgbpError: the array has not three axes.
    """
    values, warning = _pixels(attribution, layout)
    # A map of an inner tensor is coarser than the photo: each of its values covers a block.
    rows, columns = (
        np.arange(side) * size // side for side, size in zip((photo.height, photo.width), values.shape[:2], strict=True)
    )
    magnitude = _blurred(np.abs(values).sum(axis=2)[rows][:, columns], max(photo.size) / 120)
    clip = clip_of(magnitude, percentile)
    heat = scaled(magnitude, clip)
    colours = np.asarray(photo.convert("RGB"), np.float64)
    grey = np.asarray(photo.convert("L"), np.float64)[..., np.newaxis]
    ground = 0.55 * (0.8 * grey + 0.2 * colours)
    alpha = heat[..., np.newaxis] ** 0.7 * 0.9
    image = Image.fromarray(np.rint(ground * (1 - alpha) + _coloured(heat, _HEAT) * alpha).astype(np.uint8))
    return Picture(image, clip, warning or if_blank(clip))


def _blurred(values: npt.NDArray[np.float64], sigma: float) -> npt.NDArray[np.float64]:
    """Nearly a Gaussian blur, [H, W], sigma in pixels: three running means per axis, fast for any sigma."""
    reach = round((np.sqrt(4 * sigma**2 + 1) - 1) / 2)
    for axis in (0, 1) * 3 if reach else ():
        wide = np.pad(values, [(reach + 1, reach) if a == axis else (0, 0) for a in range(2)])
        sums = np.cumsum(wide, axis)
        size, window = values.shape[axis], 2 * reach + 1
        ahead, behind = (np.take(sums, np.arange(start, start + size), axis) for start in (window, 0))
        values = np.maximum(ahead - behind, 0) / window  # rounding may leave a sum just below zero
    return values


def diverging(values: Map) -> Image.Image:
    """Values -1 to 1, [H, W], in blue, white and red; 0 is exactly (247, 247, 247)."""
    return Image.fromarray(np.rint(_coloured((np.asarray(values) + 1) / 2, _SIGNED)).astype(np.uint8))


def _coloured(values: Map, anchors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values 0 to 1, [H, W], as colours between evenly spaced anchors: [H, W, 3], 0 to 255."""
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, places, anchors[:, channel]) for channel in range(3)], axis=2)


def _pixels(attribution: Map, layout: str) -> tuple[npt.NDArray[np.float64], str]:
    """float64 [H, W, C] without a value that is not finite, and the warning about those there were."""
    if attribution.ndim != 3:
        raise OnnxgbpError(f"an attribution of shape {list(attribution.shape)} is no picture: it has not three axes")
    values, warning = finite(attribution)
    return (values.transpose(1, 2, 0) if layout == "nchw" else values), warning


def finite(attribution: Map) -> tuple[npt.NDArray[np.float64], str]:
    """float64 of the same shape, with zero for what is not finite, and the warning about that."""
    values = attribution.astype(np.float64)
    good = np.isfinite(values)
    if good.all():
        return values, ""
    count = values.size - int(good.sum())
    warning = (
        f"{count} of {values.size} values are not finite, drawn as zero: the model overflows or divides by zero here"
    )
    return np.where(good, values, 0), warning


def clip_of(values: npt.NDArray[np.float64], percentile: float) -> float:
    """The percentile of |value|; of the values that are not zero, where most are."""
    magnitudes = np.abs(values)
    clip = float(np.percentile(magnitudes, percentile))
    if clip == 0 and magnitudes.any():
        clip = float(np.percentile(magnitudes[magnitudes > 0], percentile))
    return clip


def scaled(values: npt.NDArray[np.float64], clip: float) -> npt.NDArray[np.float64]:
    """-1 to 1; all zero where there is nothing to scale."""
    if clip == 0:
        return np.zeros_like(values)
    with np.errstate(over="ignore"):  # a clip next to zero
        shares: npt.NDArray[np.float64] = np.clip(values / clip, -1, 1)
    return shares


def if_blank(clip: float) -> str:
    if clip:
        return ""
    return (
        "the attribution is zero everywhere: no path from the input to the target is active; likely the target is an "
        "inactive unit behind a ReLU, or the rules let nothing through"
    )
