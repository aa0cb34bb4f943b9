"""Methods that run the model at many points: which of them may be one, and the points a bounded number at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.errors import OnnxgbpError
from onnxgbp.methods import sampling_text
from onnxgbp.model import METADATA
from onnxgbp.running import Made, Running
from onnxgbp.sampled_methods import At, Sample
from onnxgbp.target import parse_unit

__all__ = ["attributions_at_points", "prepare"]

Array: TypeAlias = npt.NDArray[Any]


def prepare(running: Running, method: str, options: Mapping[str, Any]) -> None:
    """Says in the metadata what is done, and refuses what would not be the method.

    Raises:
        OnnxgbpError: other values of what is attributed to cannot be fed, or the class may differ between the points.
    """
    metadata = running.metadata
    rules = json.loads(metadata[METADATA + "rules"])
    metadata[METADATA + "rules"] = json.dumps([*rules[:-1], f"*={method}"])
    metadata[METADATA + "method"], running.methods = method, (method,)
    metadata |= {METADATA + name: text for name, text in sampling_text(options).items()}
    given = {spec.name for spec in running.inputs}
    if inner := [name for name in running.wrt if name not in given]:
        raise OnnxgbpError(
            f"{method} needs other values of what is attributed to, and '{inner[0]}' is no input of the model: "
            "choose another method, or an input with --wrt"
        )
    unit = metadata.get(METADATA + "unit", "")
    if unit.endswith("max"):
        raise OnnxgbpError(f"{method} runs many points, and unit {unit} may be another at each: name the unit")
    if running.mode.startswith("top") or (running.mode == "argmax" and not unit):
        raise OnnxgbpError(
            f"{running.name} was converted with --target {running.mode}, which may be another class at each of the "
            f"points that {method} runs: convert with --target input"
        )


def attributions_at_points(
    running: Running, sample: Sample, feeds: dict[str, Array], made: Made, options: Mapping[str, Any]
) -> tuple[list[Array], Any]:
    """The attributions of a method that runs the model at many points, and its completeness gap.

    Args:
        running: the model.
        sample: the method.
        feeds, made: the arrays of the call, and what the model gives there.
        options: the method's, and `internal_batch_size`, the rows of a run.
    """
    feeds = dict(feeds)
    if running.target_input is not None:  # the class of the sample itself, whatever the strongest is elsewhere
        feeds[running.target_input.name] = made.chosen
    size, free = options["internal_batch_size"], _batched(running)
    together = max(1, size // len(feeds[running.wrt[0]])) if free else 1

    def runs(points: Iterable[list[Array]]) -> Iterator[tuple[Made, int]]:
        waiting = iter(points)
        while group := list(itertools.islice(waiting, together)):
            count = len(group)
            fed = {name: np.concatenate([array] * count) if name in free else array for name, array in feeds.items()}
            fed |= {
                name: np.concatenate(arrays) for name, arrays in zip(running.wrt, zip(*group, strict=True), strict=True)
            }
            hint = "; is its batch free? internal_batch_size=1 runs one point at a time" if count > 1 else ""
            yield running.run(fed, hint), count

    def maps(points: Iterable[list[Array]]) -> Iterator[list[Array]]:
        for ran, count in runs(points):
            parts = [np.split(attribution, count) for attribution in ran.attributions]
            yield from map(list, zip(*parts, strict=True))

    def score(point: list[Array]) -> Array:
        ((ran, _),) = runs([point])
        return _explained_score(running, ran.explained, made.chosen, feeds)

    at = At([feeds[name] for name in running.wrt], running.wrt, made.attributions, maps, score)
    found, gap = sample(at, **{k: v for k, v in options.items() if k != "internal_batch_size"})
    return [a.astype(p.dtype, copy=False) for a, p in zip(found, made.attributions, strict=True)], gap


def _batched(running: Running) -> set[str]:
    """The inputs with an axis for the samples; none where several points cannot share a run."""
    specs = [*running.inputs, *([running.target_input] if running.target_input is not None else [])]
    dim = next(spec.shape[0] for spec in specs if spec.name == running.wrt[0])
    if not isinstance(dim, str) or any(spec.shape[:1] == (None,) for spec in specs):
        return set()
    names = {spec.name for spec in specs if spec.shape[:1] == (dim,)}
    return names if names.issuperset(running.wrt) else set()


def _explained_score(running: Running, tensor: Array, chosen: Array, feeds: Mapping[str, Array]) -> Array:
    """What the attribution is the gradient of, for each sample: float64 [N], or [N, K] for K classes."""
    values = np.asarray(tensor, np.float64)
    if running.metadata[METADATA + "seed"] == "activation":
        values = values * values / 2
    if unit := parse_unit(running.metadata.get(METADATA + "unit")):
        place: tuple[Any, ...] = (slice(None), *unit)
        return np.asarray(values[place].reshape(len(values), -1).sum(axis=1))
    if running.mode == "seed":
        return np.asarray((values * feeds["seed"]).reshape(len(values), -1).sum(axis=1))
    rows = np.take_along_axis(values.reshape(len(values), -1), chosen.reshape(len(values), -1), axis=1)
    return rows.reshape(chosen.shape)
