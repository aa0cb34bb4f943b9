"""Pictures of arrays: zero is neutral, the scale symmetric, nothing blank or broken passes in silence."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from onnxgbp.errors import OnnxgbpError
from onnxgbp.render import _blurred, diverging, overlay, signed_picture

NEUTRAL = (247, 247, 247)


def pixels(image: Image.Image) -> npt.NDArray[Any]:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_colour_is_kept_and_zero_is_mid_grey() -> None:
    values = np.zeros((3, 2, 2), np.float32)
    values[0, 0, 0], values[2, 0, 1] = 2, -2
    picture = signed_picture(values, percentile=100)
    assert picture.clip == 2
    assert picture.warning == ""
    drawn = pixels(picture.image)
    assert tuple(drawn[0, 0]) == (255, 128, 128)
    assert tuple(drawn[0, 1]) == (128, 128, 1)
    assert tuple(drawn[1, 1]) == (128, 128, 128)
    swapped = pixels(signed_picture(values, channels="bgr", percentile=100).image)
    np.testing.assert_array_equal(swapped, drawn[..., ::-1])
    last = signed_picture(values.transpose(1, 2, 0), layout="nhwc", percentile=100)
    np.testing.assert_array_equal(pixels(last.image), drawn)


def test_the_scale_is_symmetric() -> None:
    values = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
    plus, minus = signed_picture(values), signed_picture(-values)
    assert plus.clip == minus.clip == pytest.approx(np.percentile(np.abs(values), 99.5))
    np.testing.assert_array_equal(pixels(plus.image).astype(int) + pixels(minus.image), 256)


def test_other_channels_are_summed_and_diverge() -> None:
    values = np.zeros((4, 1, 3), np.float64)
    values[:, 0, 0], values[:, 0, 2] = 1, -1
    picture = signed_picture(values, percentile=100)
    assert picture.clip == 4
    red, neutral, blue = pixels(picture.image)[0]
    assert tuple(neutral) == NEUTRAL
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert pixels(signed_picture(values[:1], percentile=100).image).shape == (1, 3, 3)


def test_diverging_ends_and_middle() -> None:
    drawn = pixels(diverging(np.array([[-1.0, 0.0, 1.0]])))
    assert [tuple(c) for c in drawn[0]] == [(5, 48, 97), NEUTRAL, (103, 0, 31)]


def test_outliers_do_not_hide_the_rest() -> None:
    values = np.ones((3, 64, 64), np.float32)
    values[0, 0, 0] = 1e6
    picture = signed_picture(values)
    assert picture.clip == 1
    assert tuple(pixels(picture.image)[5, 5]) == (255, 255, 255)


def test_a_sparse_map_is_not_blank() -> None:
    values = np.zeros((3, 64, 64), np.float32)
    values[0, 3, 3] = 1e-40
    picture = signed_picture(values)
    assert picture.clip > 0
    assert picture.warning == ""
    assert tuple(pixels(picture.image)[3, 3]) == (255, 128, 128)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_zero_is_neutral_and_says_so(channels: int) -> None:
    values = np.zeros((channels, 4, 4), np.float32)
    picture = signed_picture(values)
    assert picture.clip == 0
    assert "zero everywhere" in picture.warning
    assert "ReLU" in picture.warning
    assert len(np.unique(pixels(picture.image))) == 1
    photo = Image.new("RGB", (4, 4), (200, 100, 50))
    laid = overlay(values, photo)
    assert "zero everywhere" in laid.warning
    assert len({tuple(c) for c in pixels(laid.image).reshape(-1, 3)}) == 1


def test_values_that_are_not_finite() -> None:
    values = np.ones((3, 4, 4), np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    picture = signed_picture(values)
    assert picture.clip == 1
    assert "2 of 48 values are not finite" in picture.warning
    assert pixels(picture.image)[0, 0, 0] == 128
    everywhere = signed_picture(np.full((3, 4, 4), np.nan, np.float32))
    assert "not finite" in everywhere.warning
    assert everywhere.clip == 0


def test_overlay_lights_up_what_is_large_and_dims_the_rest() -> None:
    values = np.zeros((3, 32, 32), np.float32)
    values[1, 8, 8] = -1
    photo = Image.new("RGB", (32, 32), (200, 180, 160))
    drawn = pixels(overlay(values, photo, percentile=100).image).astype(int).sum(axis=2)
    assert np.unravel_index(drawn.argmax(), drawn.shape) == (8, 8)
    assert drawn[30, 30] < sum((200, 180, 160))
    np.testing.assert_array_equal(drawn, pixels(overlay(-values, photo, percentile=100).image).astype(int).sum(axis=2))


def test_a_coarse_map_covers_the_photo() -> None:
    values = np.zeros((2, 2, 2), np.float32)
    values[:, 0, 0] = 1
    photo = Image.new("RGB", (31, 20), (90, 90, 90))
    drawn = overlay(values, photo)
    assert drawn.image.size == (31, 20)
    light = pixels(drawn.image).astype(int).sum(axis=2)
    assert light[3, 3] > light[17, 27]


@pytest.mark.parametrize("sigma", [0.1, 2.0, 6.0])
def test_the_blur_is_nearly_gaussian(sigma: float) -> None:
    values = np.zeros((81, 61))
    values[40, 30] = 1
    blurred = _blurred(values, sigma)
    assert blurred.sum() == pytest.approx(1)
    assert blurred.argmax() == 40 * 61 + 30
    rows, columns = np.indices(values.shape)
    for place, centre in ((rows, 40), (columns, 30)):
        spread = np.sqrt((blurred * (place - centre) ** 2).sum())
        assert spread == pytest.approx(sigma, abs=0.5)  # windows are whole pixels
    assert not _blurred(np.zeros((5, 4)), sigma).any()


def test_no_picture() -> None:
    with pytest.raises(OnnxgbpError, match=r"shape \[4\] is no picture"):
        signed_picture(np.zeros(4, np.float32))
