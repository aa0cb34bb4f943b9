"""What a call gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Explanation", "joined"]

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What one call gives.

    attribution: raw and signed, shape and dtype of the tensor that is attributed to (the input, or for a model of
        integers their lookup or floats; the map of grad-cam is [N, 1, H, W], see `graph_methods.py`), float32 where the
        seed's scale was divided out of float16; [N, K, ...] for K targets a sample. A dict by tensor name where several
        are attributed to, a dict by method where there are several methods, of such dicts where both. OrtValues in the
        place of arrays where outputs stay on the device.
    scores: the model's own output that the explained tensor belongs to, as the model returns it (probabilities where
        the model ends in a softmax); of an inner tensor, the model's first float output.
    target: int64 [N], or [N, K]: the class (or channel) that was explained for each sample.
    outputs: every output of the model by name; OrtValues as well, where they stay on the device.
    warning: what a reader has to know of the attribution (a sample of nothing but zeros, numbers that are not finite,
        counts of what float16 could not hold), or ''.
    float16: the last of these alone.
    options: those of a method that runs the model at many points, as they were used: n_samples, stdevs and so on.
    completeness_gap: float64 [N], or [N, K]; of integrated gradients: the sum of the attribution less the difference
        of the explained scores at the input and the baseline.
    """

    attribution: Any  # an array nearly always: no caller should have to tell a type checker so
    scores: Array
    target: npt.NDArray[np.int64]
    outputs: dict[str, Any]
    warning: str = ""
    float16: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    completeness_gap: Array | None = None


def joined(parts: Sequence[Explanation], overlap: int) -> Explanation:
    """One explanation of what several say of further classes of the same samples.

    overlap: so many of the classes of the last are in the one before it as well.
    """

    def columns(held: Sequence[Any]) -> Any:
        if isinstance(held[0], Mapping):
            return {name: columns([one[name] for one in held]) for name in held[0]}
        return np.concatenate([*held[:-1], held[-1][:, overlap:]], axis=1)

    def lines(said: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(filter(None, said)))

    gaps = [part.completeness_gap for part in parts]
    return dataclasses.replace(
        parts[0],
        attribution=columns([part.attribution for part in parts]),
        target=columns([part.target for part in parts]),
        warning=lines([part.warning for part in parts]),
        float16=lines([part.float16 for part in parts]),
        completeness_gap=None if gaps[0] is None else columns(gaps),
    )
