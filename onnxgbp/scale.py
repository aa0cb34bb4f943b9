"""The scale of the seed, which keeps a gradient within the range of float16: 6.1e-5 to 65504 with all of its digits.

Every rule is positively homogeneous: a seed of s in the place of 1 gives s times the map. Where s is a power of two
that is exact, digit for digit, as long as nothing leaves the range; so s may be chosen such that nothing does, and be
divided out in float32. No other type needs it: bfloat16 has the range of float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.errors import OnnxgbpError

__all__ = ["Census", "computes_in_float16", "fit", "lost", "parse_seed_scale", "scaled", "start"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_NORMAL, _LARGEST = 2.0**-14, 65504.0
_LOWEST, _HIGHEST = -24, 15  # exponents of the scales that float16 holds
_START = 8  # a gradient is seldom larger than 100 and often smaller than 1
_AIM = 10  # the exponent of the largest entry: below it 24 powers of two with all digits, above it room for the way
_ENOUGH, _FULL = 2.0**2, 2.0**12  # an entry without all of its digits is below 2**-16 of a map with this peak
_TRIES = 6


def parse_seed_scale(scale: Any) -> float:
    """A power of two, so that it can be divided out exactly; as a number or as text.

    Raises:
        OnnxgbpError: anything else.
    """
    try:
        number = math.nan if isinstance(scale, bool) else float(scale)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number > 0 and math.frexp(number)[0] == 0.5):
        raise OnnxgbpError(f"seed scale '{scale}' is no power of two, such as 1024 or 0.125: only those scale exactly")
    return number


def scaled(op: Emit, seeds: Sequence[ir.Value], scale: float | str) -> list[ir.Value]:
    """The seeds times the scale: a number, or `input` for a new graph input, a scalar of the seeds' type.

    Raises:
        OnnxgbpError: the seed's type cannot hold the scale.
    """
    if scale == 1.0:
        return list(seeds)
    dtype = seeds[0].dtype
    assert dtype is not None  # the explained tensor's
    if scale == "input":
        factor = ir.val(op.name("onnxgbp/seed_scale"), dtype=dtype, shape=ir.Shape([]))
        op.graph.inputs.append(factor)
    else:
        with np.errstate(over="ignore"):
            held = np.asarray(scale, dtype.numpy())
        if float(held) != scale:
            name = dtype.name.lower()
            raise OnnxgbpError(f"seed scale {scale:g} cannot be held in the {name} of the explained tensor")
        factor = op.constant(held, dtype)
    return [op.typed(op.Mul(seed, factor), seed) for seed in seeds]


def computes_in_float16(graph: ir.Graph) -> bool:
    return any(value.dtype is ir.DataType.FLOAT16 for node in graph for value in node.outputs)


def start(scale: float | None) -> int:
    """The exponent to begin with: that of a given scale, or one that fits most networks."""
    return _START if scale is None else math.frexp(scale)[1] - 1


@dataclasses.dataclass(frozen=True)
class Census:
    """The entries of some maps as float16 sees them.

    broken: infinite or NaN, something overflowed; subnormal: neither 0 nor as large as 6.1e-5, the smallest number with
    all digits. A 0 tells nothing: where a rule blocks, it is exact. weakest, strongest: the peaks |a| of the samples
    that have the smallest and the largest one.
    """

    entries: int
    broken: int
    subnormal: int
    weakest: float
    strongest: float

    @classmethod
    def of(cls, maps: Sequence[Array]) -> Census:
        rows = [np.abs(np.asarray(a, np.float64)).reshape(len(a) if np.ndim(a) else 1, -1) for a in maps]
        finite = [np.isfinite(row) for row in rows]
        peaks = [np.where(good, row, 0).max(axis=1, initial=0) for row, good in zip(rows, finite, strict=True)]
        return cls(
            entries=sum(row.size for row in rows),
            broken=sum(int((~good).sum()) for good in finite),
            subnormal=sum(int(((row > 0) & (row < _NORMAL)).sum()) for row in rows),
            weakest=min((float(peak.min(initial=np.inf)) for peak in peaks), default=0.0),
            strongest=max((float(peak.max(initial=0)) for peak in peaks), default=0.0),
        )

    @property
    def fits(self) -> bool:
        """Nothing overflowed, and what lost digits is negligible beside the peak, or no larger scale is possible."""
        return not self.broken and (self.weakest >= _ENOUGH or self.strongest >= _FULL)

    def wanted(self, exponent: int) -> int:
        """The exponent at which the weakest sample has the peak aimed at, and the strongest does not overflow."""
        if not self.strongest:
            return _HIGHEST
        room = math.log2(_LARGEST / 2 / self.strongest)
        rise = min(_AIM - math.log2(self.weakest), room) if self.weakest else room
        return exponent + math.floor(rise)


def fit(run: Callable[[int], Sequence[Array]], exponent: int) -> tuple[int, Sequence[Array]]:
    """Tries seeds of 2**exponent until nothing overflows and nothing that counts underflows, six at most.

    Args:
        run: the maps that a seed of 2**exponent gives.
        exponent: the first to try.

    Returns:
        The exponent and its maps: the largest one tried that does not overflow, if there is one.
    """
    best: tuple[int, Sequence[Array]] | None = None
    overflows = _HIGHEST + 1
    for _ in range(_TRIES):
        maps = run(exponent)
        census = Census.of(maps)
        if census.broken:
            overflows = exponent
            wanted = exponent - _START if best is None else (best[0] + overflows) // 2
        else:
            best = (exponent, maps)
            wanted = exponent if census.fits else census.wanted(exponent)
            wanted = wanted if wanted < overflows else (exponent + overflows) // 2
        wanted = min(max(wanted, _LOWEST), _HIGHEST)
        if wanted == exponent or (best is not None and wanted <= best[0]):
            break
        exponent = wanted
    return best or (exponent, maps)


def lost(maps: Sequence[Array], scale: float, fitting: tuple[int, Sequence[Array]] | None = None) -> str:
    """One line with the counts where float16 could not hold a map, or ''.

    Args:
        maps: as the model gave them, with the scale in them.
        scale: that of their seed.
        fitting: what `fit` found for the same input; then also the entries are counted that are 0 here and not there.
    """
    census = Census.of(maps)
    flushed = sum(int(((a == 0) & (b != 0)).sum()) for a, b in zip(maps, fitting[1], strict=True)) if fitting else 0
    if census.fits or not (census.broken or census.subnormal or flushed):
        return ""
    parts = [f"{census.broken} of {census.entries} entries overflowed"] if census.broken else []
    if census.subnormal:
        parts.append(f"{census.subnormal} of {census.entries} entries are below 6.1e-05 and have lost digits")
    if fitting is not None:
        parts += [f"{flushed} more became zero"] if flushed else []
        better = fitting[0]
    else:
        parts += [] if census.broken else ["zeros are not counted"]
        better = start(scale) - _START if census.broken else min(census.wanted(start(scale)), _HIGHEST)
    if 2.0**better != scale:
        how = "may fit" if fitting is None else "fits" if Census.of(fitting[1]).fits else "keeps most"
        parts.append(f"a seed scale of {2.0**better:g} {how}")
    return f"float16 with seed scale {scale:g}: {', '.join(parts)}"
