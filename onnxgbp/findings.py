"""What reports share: plain values for JSON, and rows of text in columns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

__all__ = ["Findings", "aligned", "json_numbers"]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a command found. values: plain, ready for JSON; text: the same for a terminal."""

    values: dict[str, Any]
    text: str

    def to_dict(self) -> dict[str, Any]:
        return self.values

    def to_text(self) -> str:
        return self.text


def json_numbers(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as a line, with its cells under those of the first."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
