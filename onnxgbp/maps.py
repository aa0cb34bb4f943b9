"""What evaluations need of maps: their channels put together, how alike two of them are, edges, smoothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.compare import rank_correlation
from onnxgbp.data import inputs_of, whole
from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing
from onnxgbp.methods import sampling_options
from onnxgbp.model import Source
from onnxgbp.render import PERCENTILE

__all__ = [
    "MEASURES",
    "Likeness",
    "channel_axis",
    "edges",
    "likeness",
    "similarity",
    "smoothed",
    "ssim",
    "with_baselines",
    "without_channels",
]

Array: TypeAlias = npt.NDArray[Any]
Float: TypeAlias = npt.NDArray[np.float64]

_TRUNCATE = 3.5  # standard deviations, where a Gaussian is cut off
_SIGMA = 1.5  # pixels, the window of the structural similarity: 11 x 11


def channel_axis(spec: InputSpec, metadata: Mapping[str, str], options: Mapping[str, Any]) -> int | None:
    """Of one sample of the input: 0 or 2 of a picture; None for an input of other than four axes."""
    if len(spec.shape) != 4:
        return None
    try:
        layout = Preprocessing.of(metadata, spec, **options).layout
    except OnnxgbpError:  # arrays with other numbers of channels than pictures have
        layout = "nchw"
    return 2 if layout == "nhwc" else 0


def without_channels(attribution: Array, axis: int | None) -> tuple[Float, Float]:
    """The sum of a sample's values over its channels, and that of their magnitudes; without an axis all of them."""
    values = np.asarray(attribution, np.float64)
    if axis is None or values.ndim != 3:
        return values, np.abs(values)
    return values.sum(axis=axis), np.abs(values).sum(axis=axis)


# --- how alike two maps are -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Likeness:
    """Two maps: 1 for equal ones.

    rank_absolute, rank_signed: Spearman's rank correlation of the magnitudes, and of the signed values. ssim_absolute,
    ssim_signed: the structural similarity of the two as pictures, each divided by its own 99.5th percentile of the
    magnitude and cut off there; None for maps that are no pictures of 11 x 11 or more. blank: one of the maps is
    constant or not finite, and no figure is defined.
    """

    rank_absolute: float | None
    rank_signed: float | None
    ssim_absolute: float | None
    ssim_signed: float | None
    blank: bool = False


MEASURES = tuple(field.name for field in dataclasses.fields(Likeness) if field.name != "blank")


def likeness(a: Array, b: Array, axis: int | None) -> Likeness:
    """Of two attributions of one sample, whose channels lie along `axis`."""
    signed, absolute = zip(without_channels(a, axis), without_channels(b, axis), strict=True)
    ranks = [rank_correlation(one.ravel(), two.ravel()) for one, two in (absolute, signed)]
    pictured = signed[0].ndim == 2 and min(signed[0].shape) > 2 * round(_TRUNCATE * _SIGMA)
    if None in ranks:
        return Likeness(None, None, None, None, blank=True)
    alike = [
        ssim(_scaled(one), _scaled(two), data_range) if pictured else None
        for (one, two), data_range in ((absolute, 1.0), (signed, 2.0))
    ]
    return Likeness(ranks[0], ranks[1], alike[0], alike[1])


def similarity(rows: list[Likeness]) -> dict[str, Any]:
    """The median of each figure over the samples that are not blank, and how many are.

    None where half of them are blank, or more: the rest would not speak for all.
    """
    found: dict[str, Any] = {}
    for name in MEASURES:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        found[name] = float(np.median(values)) if 2 * len(values) > len(rows) else None
    return found | {"blank": sum(row.blank for row in rows)}


def _scaled(values: Float) -> Float:
    clip = np.percentile(np.abs(values), PERCENTILE)
    clip = clip if clip else np.abs(values).max()
    return np.asarray(np.clip(values / clip, -1, 1))


def ssim(a: Float, b: Float, data_range: float) -> float:
    """The mean structural similarity of two pictures [H, W] (Wang et al. 2004), over all windows that lie within them.

    Mean of (2 m_a m_b + c1) (2 s_ab + c2) / ((m_a^2 + m_b^2 + c1) (s_a^2 + s_b^2 + c2)) with means m, variances s^2 and
    covariance s_ab under a Gaussian window of 11 x 11 with standard deviation 1.5, c1 = (0.01 L)^2, c2 = (0.03 L)^2 for
    a data range L. As scikit-image has it with gaussian_weights and without use_sample_covariance.
    """
    edge = round(_TRUNCATE * _SIGMA)
    inside = (slice(edge, -edge),) * 2
    m_a, m_b, aa, bb, ab = (smoothed(one, _SIGMA)[inside] for one in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top = (2 * m_a * m_b + c1) * (2 * (ab - m_a * m_b) + c2)
    bottom = (m_a**2 + m_b**2 + c1) * (aa - m_a**2 + bb - m_b**2 + c2)
    return float(np.mean(top / bottom))


# --- pictures -------------------------------------------------------------------------------------


def smoothed(values: Array, sigma: float, axes: tuple[int, int] = (0, 1)) -> Float:
    """A Gaussian blur along two axes, cut off at 3.5 standard deviations; beyond an edge lies its reflection."""
    result = np.asarray(values, np.float64)
    reach = round(_TRUNCATE * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in axes:
        result = _correlated(result, weights / weights.sum(), axis)
    return result


def with_baselines(
    methods: Sequence[str], source: Source, images: str | Path, **options: Any
) -> dict[str, dict[str, Any]]:
    """What the `Explainer` of each method is given besides: to one that draws from baselines, the samples themselves.

    Args:
        methods: their names.
        source: the model.
        images: the samples, as for `data.batches`.
        **options: for `data.batches`.

    Raises:
        OnnxgbpError: the samples cannot be baselines.
    """
    drawing = [name for name in methods if sampling_options(name, {}).get("baseline", 0) is None]
    if not drawing:
        return {name: {} for name in methods}
    inputs = inputs_of(source.model.graph)
    if len(inputs) != 1 or inputs[0].dtype.kind != "f":
        raise OnnxgbpError(
            f"{drawing[0]} draws its baselines from the samples, and these are no single float input: leave it out"
        )
    if options.get("on_error") is not None:
        options["on_error"] = lambda _line: None  # told when the samples are evaluated
    samples = whole(images, inputs, source.model.metadata_props, inputs[0].name, **options)
    return {name: {"baseline": samples} if name in drawing else {} for name in methods}


def edges(values: Array) -> Float:
    """The magnitude of the Sobel gradient of pictures [..., H, W]: an edge detector, which knows of no model."""
    smooth, slope = np.array([1.0, 2.0, 1.0]) / 4, np.array([-1.0, 0.0, 1.0]) / 2
    across = _correlated(_correlated(values, smooth, -2), slope, -1)
    down = _correlated(_correlated(values, slope, -2), smooth, -1)
    return np.asarray(np.hypot(across, down))


def _correlated(values: Array, weights: Float, axis: int) -> Float:
    """With an odd number of weights along one axis, reflected beyond its ends."""
    reach, axis = len(weights) // 2, axis % values.ndim
    wide = np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in range(values.ndim)], mode="symmetric")
    result = np.zeros(values.shape)
    for place, weight in enumerate(weights):
        part = (slice(None),) * axis + (slice(place, place + values.shape[axis]),)
        result += weight * wide[part]
    return result
