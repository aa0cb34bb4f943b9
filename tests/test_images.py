"""Photos to model inputs: what is read, what is assumed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing, read


def spec(*shape: int | str | None) -> InputSpec:
    return InputSpec("x", np.dtype(np.float32), shape)


NCHW = spec("N", 3, 8, 8)


def said(**values: Any) -> dict[str, str]:
    return {"onnxgbp.preprocessing": json.dumps(values)}


def gradient_image(width: int, height: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) * 255 // max(width - 1, 1)
    pixels[..., 1] = (np.arange(height) * 255 // max(height - 1, 1))[:, np.newaxis]
    pixels[..., 2] = 7
    return Image.fromarray(pixels)


def test_metadata_and_overrides() -> None:
    metadata = said(size=10, crop=8, channels="bgr", scale=1.0, mean=[1, 2, 3], std=[1, 1, 2], layout="nchw")
    chosen = Preprocessing.of(metadata, NCHW)
    assert (chosen.size, chosen.crop, chosen.channels, chosen.mean) == (10, (8, 8), "bgr", (1.0, 2.0, 3.0))
    assert chosen.assumed == ()
    other = Preprocessing.of(metadata, NCHW, channels="rgb", mean="4,5,6", size=None)
    assert (other.size, other.channels, other.mean) == (10, "rgb", (4.0, 5.0, 6.0))


def test_prepare_is_the_formula() -> None:
    chosen = Preprocessing(8, (8, 8), "bgr", 0.5, (1.0, 2.0, 3.0), (2.0, 4.0, 8.0))
    image = gradient_image(8, 8)
    pixels = np.asarray(image, np.float32)
    x = chosen.prepare(image)
    assert x.dtype == np.float32
    assert x.shape == (3, 8, 8)
    for channel, (source, mean, std) in enumerate([(2, 1, 2), (1, 2, 4), (0, 3, 8)]):
        np.testing.assert_allclose(x[channel], (pixels[..., source] * 0.5 - mean) / std, rtol=1e-6)
    last = Preprocessing(8, (8, 8), "bgr", 0.5, (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), "nhwc").prepare(image)
    np.testing.assert_array_equal(last.transpose(2, 0, 1), x)


def test_assumed_without_metadata() -> None:
    chosen = Preprocessing.of({}, NCHW)
    assert chosen == Preprocessing(8, (8, 8), "rgb", 1 / 255, (0.0,), (1.0,), "nchw")
    assert {"size", "crop", "scale", "mean"} <= set(chosen.assumed)
    assert Preprocessing.of({}, spec("N", 8, 8, 3)).layout == "nhwc"
    assert Preprocessing.of({}, spec(None, 1, 8, 8)).channels == "grey"
    free = Preprocessing.of({}, spec("N", 3, "H", "W"))
    assert (free.size, free.crop) == (None, None)
    assert free.prepare(gradient_image(5, 4)).shape == (3, 4, 5)
    wide = Preprocessing.of({}, spec("N", 3, 8, 16))
    assert wide.prepare(gradient_image(30, 20)).shape == (3, 8, 16)
    assert wide.prepare(gradient_image(20, 30)).shape == (3, 8, 16)
    assert Preprocessing.of({}, spec("N", 3, "H", "W"), crop=6).size == 6


def test_shorter_side_then_centre() -> None:
    chosen = Preprocessing(16, (8, 8))
    cropped = chosen.cropped(gradient_image(64, 32))
    assert cropped.size == (8, 8)
    pixels = np.asarray(cropped, np.float64)
    assert abs(pixels[..., 0].mean() - 127.5) < 2
    assert abs(pixels[..., 1].mean() - 127.5) < 2
    assert pixels[0, -1, 0] - pixels[0, 0, 0] < 255 * 0.3  # the middle quarter of the width


def test_a_sliver_is_not_blown_up() -> None:
    chosen = Preprocessing(64, (64, 64))
    assert chosen.cropped(gradient_image(20000, 1)).size == (64, 64)


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        ((3,), {}, "takes no pictures"),
        (("N", 5, 8, 8), {}, "has 5 channels as nchw"),
        (("N", 3, 8, 8), {"crop": 7}, "takes 8 x 8 pixels, but the crop is 7 x 7"),
        (("N", 3, 8, 8), {"size": 7}, "size 7 is smaller than the crop 8 x 8"),
        (("N", 1, 8, 8), {"channels": "rgb"}, "has a channel axis of 1, but channels are 'rgb'"),
        (("N", 3, 8, 8), {"mean": "1,2"}, "mean has 2 values for 3 channels"),
        (("N", 3, 8, 8), {"mean": "a,b,c"}, "mean 'a' is no number"),
        (("N", 3, 8, 8), {"std": "1,0,1"}, "scale and std not 0"),
        (("N", 3, 8, 8), {"scale": float("nan")}, "finite"),
        (("N", 3, 8, 8), {"layout": "hwc"}, "layout 'hwc'"),
        (("N", 3, "H", "W"), {"size": 8, "crop": 0}, "crop"),
    ],
)
def test_refused(shape: tuple[Any, ...], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message):
        Preprocessing.of({}, spec(*shape), **overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        ('{"resample": 3}', "unknown entry 'resample'"),
        ('{"size": "big"}', "size 'big' is no integer"),
        ('{"crop": [1, 2, 3]}', "neither an integer nor a height and a width"),
    ],
)
def test_malformed_metadata(text: str, message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message):
        Preprocessing.of({"onnxgbp.preprocessing": text}, NCHW)


def test_a_picture_smaller_than_the_crop() -> None:
    with pytest.raises(OnnxgbpError, match="the picture is 4 x 4, smaller than the crop 8 x 8"):
        Preprocessing(None, (8, 8)).prepare(gradient_image(4, 4))


def test_read_makes_rgb(tmp_path: Path) -> None:
    image = gradient_image(6, 4)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    modes = {"rgb": image, "grey": image.convert("L"), "palette": image.convert("P"), "clear": clear}
    modes["deep"] = Image.fromarray(np.full((4, 6), 0x80FF, np.uint16))
    for name, written in modes.items():
        written.save(tmp_path / f"{name}.png")
        again = read(tmp_path / f"{name}.png")
        assert (again.mode, again.size) == ("RGB", (6, 4))
    np.testing.assert_array_equal(np.asarray(read(tmp_path / "rgb.png")), np.asarray(image))
    assert np.asarray(read(tmp_path / "clear.png")).min() == 255
    assert set(np.asarray(read(tmp_path / "deep.png")).ravel()) == {0x80}


def test_read_turns_upright(tmp_path: Path) -> None:
    image = gradient_image(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    assert read(tmp_path / "turned.png").size == (4, 6)


def test_unreadable_images(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    read(whole).save(tmp_path / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes((tmp_path / name).read_bytes()[: (tmp_path / name).stat().st_size // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("cut-whole.png", "cut-whole.jpg", "text.png", "empty.png", "folder.png", "nowhere.png"):
        with pytest.raises(OnnxgbpError, match=f"cannot read .*{name}: ") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.tiff"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(OnnxgbpError, match="32 bits"):
        read(path)
