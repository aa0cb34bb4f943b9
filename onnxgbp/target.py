"""What a user asks to have explained, parsed: a class, a unit of an inner tensor, channels."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from onnxgbp.errors import OnnxgbpError
from onnxgbp.labels import find_label

__all__ = [
    "Channels",
    "Unit",
    "classes_of",
    "parse_channels",
    "parse_class",
    "parse_target",
    "parse_unit",
    "resolve_target",
    "unit_text",
]

Unit: TypeAlias = "tuple[int | slice | str, ...]"


def parse_target(target: str | int) -> str | int:
    """`argmax`, `input`, `seed`, `topK` and `inputK` for K classes a sample, a class index, or a class by its name.

    Where the class is an input, -1 stands for the strongest, and in column k of inputK for the k-th strongest.

    Raises:
        OnnxgbpError: anything else.
    """
    if isinstance(target, str):
        text = target.strip()
        if not text or classes_of(text) == 0:
            raise OnnxgbpError(f"target '{target}' is none of argmax, topK, input, inputK, seed, an index or a name")
        return int(text) if _INTEGER.fullmatch(text) else text
    try:
        if isinstance(target, bool):
            raise TypeError
        return operator.index(target)
    except TypeError:
        raise OnnxgbpError(
            f"target '{target}' is none of argmax, topK, input, inputK, seed, a class index or a class name"
        ) from None


_INTEGER = re.compile(r"[+-]?\d+")
_SEVERAL = re.compile(r"(top|input)(\d+)")
_WORDS = ("argmax", "input", "seed")


def classes_of(target: str | int) -> int | None:
    """K of the targets `topK` and `inputK`, None for the others."""
    match = _SEVERAL.fullmatch(target) if isinstance(target, str) else None
    return int(match[2]) if match else None


def resolve_target(target: str | int, labels: Sequence[str]) -> str | int:
    """A class by its name becomes its index; all else stays.

    Raises:
        OnnxgbpError: no label, or more than one, is called so.
    """
    if not isinstance(target, str) or target in _WORDS or classes_of(target) is not None:
        return target
    return find_label(target, labels)


def parse_class(target: str | int) -> str | int | None:
    """`argmax` (None), a class index or a class name, for a command that runs the model itself.

    Raises:
        OnnxgbpError: anything else.
    """
    parsed = parse_target(target)
    if parsed in ("input", "seed") or classes_of(parsed) is not None:
        raise OnnxgbpError(f"target '{parsed}' is for a converted file that others feed; give argmax or a class")
    return None if parsed == "argmax" else parsed


@dataclasses.dataclass(frozen=True)
class Channels:
    """Those named, and how many of the strongest besides."""

    named: tuple[int, ...]
    strongest: int = 0


def parse_channels(given: Sequence[int | str]) -> Channels:
    """Indices, and `strongest:16` for the 16 strongest.

    Raises:
        OnnxgbpError: anything else, or nothing at all.
    """
    named, strongest = list[int](), 0
    for one in given:
        match = re.fullmatch(r"(strongest:(?=0*[1-9]))?(\d+)", str(one).strip())
        if match is None:
            raise OnnxgbpError(f"channel '{one}' is neither an index such as 3 nor, say, strongest:16")
        if match[1]:
            strongest = max(strongest, int(match[2]))
        else:
            named.append(int(match[2]))
    if not named and not strongest:
        raise OnnxgbpError("no channel given: name some, or strongest:16 for the 16 strongest")
    return Channels(tuple(dict.fromkeys(named)), strongest)


def parse_unit(unit: Any) -> Unit | None:
    """Which part of an inner tensor is explained, along the axes behind the batch.

    `3` is channel 3, `3,7,7` one position of it, `3:6` or `3,:,7` a slice (its sum), and a last `max` the strongest of
    what is left: `max` of the whole tensor, `3,max` of channel 3.

    Raises:
        OnnxgbpError: anything else.
    """
    if unit is None:
        return None
    if isinstance(unit, str):
        parts: Sequence[Any] = unit.split(",")
    else:
        parts = unit if isinstance(unit, Sequence) else [unit]
    try:
        parsed = tuple(_unit_part(part) for part in parts)
    except (ValueError, TypeError):
        raise OnnxgbpError(f"unit '{unit}' is none such as 3, 3,7,7, 3:6, 3,:,7, max or 3,max") from None
    if "max" in parsed[:-1]:
        raise OnnxgbpError(f"unit '{unit}': max stands last, for all the axes that are left")
    return parsed


def _unit_part(part: Any) -> int | slice | str:
    if isinstance(part, slice):
        return _step_one(part)
    if not isinstance(part, str):
        return operator.index(part)
    text = part.strip()
    if text == "max":
        return text
    if ":" in text:
        return _step_one(slice(*(int(end) if end.strip() else None for end in text.split(":"))))
    return int(text)


def _step_one(part: slice) -> slice:
    if part.step not in (None, 1) or any(end is not None and end < 0 for end in (part.start, part.stop)):
        raise ValueError
    return slice(part.start, part.stop)


def unit_text(unit: Unit) -> str:
    """The unit as the command line takes it."""

    def text(part: int | slice | str) -> str:
        if isinstance(part, slice):
            return ":".join("" if end is None else str(end) for end in (part.start, part.stop))
        return str(part)

    return ",".join(map(text, unit))
