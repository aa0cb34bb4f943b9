"""The methods that run one graph at many points: which points, and how the maps there are put together.

How many points share a run is not their affair. Costs are in passes, one being a forward and a backward sweep of a
sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.errors import OnnxgbpError

__all__ = [
    "At",
    "Sample",
    "expected_gradients",
    "integrated_gradients",
    "smoothgrad",
    "smoothgrad_squared",
    "vargrad",
]

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = "list[Array]"  # one for each tensor that is attributed to


@dataclasses.dataclass(frozen=True)
class At:
    """A batch, as a method that runs the graph at many points sees it.

    x: the arrays that are attributed to, [N, ...] each; names: theirs. plain: the maps there, [N, ...] each, or
    [N, K, ...]. maps: the maps at each of some points, in order; it takes the points a few at a time, so that neither
    they nor the maps are ever all in memory. score: what is explained, at a point: float64 [N], or [N, K].
    """

    x: Arrays
    names: tuple[str, ...]
    plain: Arrays
    maps: Callable[[Iterable[Arrays]], Iterator[Arrays]]
    score: Callable[[Arrays], Array]


Sample: TypeAlias = "Callable[..., tuple[Arrays, Array | None]]"
"""Of an `At` and options by name: the map of each array, and the completeness gap where there is one."""


def smoothgrad(
    at: At, *, n_samples: int = 50, stdevs: str | float = "15%", random_seed: int = 0
) -> tuple[Arrays, None]:
    """The mean of the maps at x + noise (Smilkov et al. 2017, arXiv:1706.03825): the shape of the map. n passes.

    The noise is normal and the same for every sample of a batch. Its width is a share of the range of each sample, as
    in the paper, or absolute, as in Captum: '15%' or 0.3. The last of the n has none, so that n = 1 is the map itself.
    """
    return _mean(_noisy(at, n_samples, stdevs, random_seed)), None


def smoothgrad_squared(
    at: At, *, n_samples: int = 50, stdevs: str | float = "15%", random_seed: int = 0
) -> tuple[Arrays, None]:
    """The mean of the squares of those maps (Hooker et al. 2019, arXiv:1806.10758): the shape of the map. n passes."""
    return _mean([g * g for g in maps] for maps in _noisy(at, n_samples, stdevs, random_seed)), None


def vargrad(at: At, *, n_samples: int = 50, stdevs: str | float = "15%", random_seed: int = 0) -> tuple[Arrays, None]:
    """The variance of those maps, divided by n (Adebayo et al. 2018, arXiv:1810.03307): the shape of the map. n passes.

    Raises:
        OnnxgbpError: fewer than two samples.
    """
    if n_samples < 2:
        raise OnnxgbpError(f"vargrad is a variance: n_samples is {n_samples}, give 2 or more")
    # Around the map at x: squares of what is large and varies little would lose their digits.
    shifted = (
        [g - g0 for g, g0 in zip(maps, at.plain, strict=True)] for maps in _noisy(at, n_samples, stdevs, random_seed)
    )
    means = _mean([*d, *(e * e for e in d)] for d in shifted)
    half = len(at.plain)
    return [np.maximum(square - mean * mean, 0) for mean, square in zip(means[:half], means[half:], strict=True)], None


def integrated_gradients(at: At, *, n_steps: int = 50, baseline: Any = 0.0) -> tuple[Arrays, Array]:
    """(x - b) * integral of g(b + t (x - b)) over t from 0 to 1 (Sundararajan et al. 2017, arXiv:1703.01365).

    The shape of the map. The integral is Gauss and Legendre's, as Captum's by default: n_steps passes, and two for the
    completeness gap, the sum of the map less the difference of the scores at x and b; with the plain gradient that is
    the error of the integral. b is a number, or an array of a sample's shape or of x's; a dict of them by tensor name.
    """
    start = [_broadcast(b, x, name) for b, x, name in zip(_each(baseline, at), at.x, at.names, strict=True)]
    ways = [x - b for x, b in zip(at.x, start, strict=True)]
    places, weights = np.polynomial.legendre.leggauss(n_steps)
    points = ([_as(b + (1 + place) / 2 * d, d) for b, d in zip(start, ways, strict=True)] for place in places)
    weighed = ([weight / 2 * g for g in maps] for weight, maps in zip(weights, at.maps(points), strict=True))
    result = [_times(d, g) for d, g in zip(ways, _sum(weighed), strict=True)]
    wanted = at.score(at.x) - at.score(start)
    total = sum(r.reshape(*wanted.shape, -1).sum(axis=-1) for r in result)
    return result, np.asarray(total - wanted)


def expected_gradients(
    at: At, *, n_samples: int = 50, baseline: Any = None, random_seed: int = 0
) -> tuple[Arrays, None]:
    """The mean of (x - b) g(b + t (x - b)) over baselines b and t in [0, 1], drawn n times (Erion et al. 2021,
    arXiv:1906.10670; Captum's GradientShap with stdevs 0).

    The shape of the map. n passes. The baselines are an array [M, ...] of samples; a dict of them by tensor name.

    Raises:
        OnnxgbpError: no baselines.
    """
    if baseline is None:
        raise OnnxgbpError("expected-gradients needs baselines to draw from: give an array [M, ...] of samples")
    pool = [_samples(b, x, name) for b, x, name in zip(_each(baseline, at), at.x, at.names, strict=True)]
    if len({len(b) for b in pool}) > 1:
        raise OnnxgbpError(f"the baselines differ in number: {', '.join(str(len(b)) for b in pool)}")
    rng = np.random.default_rng(random_seed)
    drawn = [(rng.integers(len(pool[0])), rng.random()) for _ in range(n_samples)]
    points = ([_as(b[i] + t * (x - b[i]), x) for b, x in zip(pool, at.x, strict=True)] for i, t in drawn)
    weighed = (
        [_times(x - b[i], g) for b, x, g in zip(pool, at.x, maps, strict=True)]
        for (i, _), maps in zip(drawn, at.maps(points), strict=True)
    )
    return _mean(weighed), None


def _noisy(at: At, n_samples: int, stdevs: str | float, random_seed: int) -> Iterator[Arrays]:
    """The maps at the noisy points, last the one without noise."""
    rng = np.random.default_rng(random_seed)
    widths = [_width(x, stdevs) for x in at.x]

    def points() -> Iterator[Arrays]:
        for _ in range(n_samples - 1):
            yield [_as(x + s * rng.standard_normal(x.shape[1:]), x) for x, s in zip(at.x, widths, strict=True)]

    yield from at.maps(points())
    yield at.plain


def _width(x: Array, stdevs: str | float) -> Array:
    if not isinstance(stdevs, str):
        return np.asarray(stdevs)
    axes = tuple(range(1, x.ndim))
    return np.asarray(float(stdevs[:-1]) / 100 * (x.max(axis=axes, keepdims=True) - x.min(axis=axes, keepdims=True)))


def _sum(parts: Iterable[Arrays]) -> Arrays:
    """In float64, one part at a time."""
    total: Arrays = []
    for part in parts:
        wide = [np.asarray(a, np.float64) for a in part]
        total = [t + a for t, a in zip(total, wide, strict=True)] if total else wide
    return total


def _mean(parts: Iterable[Arrays]) -> Arrays:
    count = 0

    def counted() -> Iterator[Arrays]:
        nonlocal count
        for part in parts:
            count += 1
            yield part

    return [total / count for total in _sum(counted())]


def _as(point: Array, like: Array) -> Array:
    return point.astype(like.dtype, copy=False)


def _times(way: Array, g: Array) -> Array:
    """Way * g, where g may have an axis of K classes behind that of the samples."""
    return np.asarray((way[:, np.newaxis] if g.ndim > way.ndim else way) * np.asarray(g, np.float64))


def _each(baseline: Any, at: At) -> list[Any]:
    """The baseline of each tensor."""
    if not isinstance(baseline, Mapping):
        return [baseline] * len(at.x)
    if set(baseline) != set(at.names):
        raise OnnxgbpError(f"the baselines are for {', '.join(map(str, baseline))}, not for {', '.join(at.names)}")
    return [baseline[name] for name in at.names]


def _numbers(baseline: Any, x: Array, name: str) -> Array:
    try:
        return np.asarray(baseline).astype(x.dtype, casting="same_kind" if np.ndim(baseline) else "unsafe")
    except (TypeError, ValueError):
        raise OnnxgbpError(f"the baseline of '{name}' is neither a number nor an array of {x.dtype}") from None


def _broadcast(baseline: Any, x: Array, name: str) -> Array:
    array = _numbers(baseline, x, name)
    try:
        return np.broadcast_to(array, x.shape)
    except ValueError:
        raise OnnxgbpError(
            f"the baseline of '{name}' has shape {list(array.shape)}, the input {list(x.shape)}"
        ) from None


def _samples(baseline: Any, x: Array, name: str) -> Array:
    array = _numbers(baseline, x, name)
    if array.shape[1:] != x.shape[1:] or not array.size or array.ndim != x.ndim:
        shape = ", ".join(map(str, x.shape[1:]))
        raise OnnxgbpError(f"the baselines of '{name}' have shape {list(array.shape)}: give samples, [M, {shape}]")
    return array
