"""Boxes around objects, and whether a map's strongest pixel lies in one: the pointing game."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt

from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing, read

__all__ = ["Box", "Boxes", "read_boxes"]

Array: TypeAlias = npt.NDArray[Any]
Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1 and y1, in pixels."""

_TOLERANCE = 15  # pixels around a box


def read_boxes(path: Path) -> dict[str, list[Box]]:
    try:
        given = json.loads(path.read_bytes())
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise OnnxgbpError(f"cannot read {path}: it is no JSON") from None
    if not isinstance(given, dict):
        raise OnnxgbpError(f"{path} is no JSON object of file names and boxes")
    return {name: _boxes_of(value, f"{path}: the box of '{name}'") for name, value in given.items()}


def _boxes_of(value: Any, where: str) -> list[Box]:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    found = []
    for row in rows:
        numbers = isinstance(row, list) and all(isinstance(n, (int, float)) and math.isfinite(n) for n in row)
        if not numbers or len(row) != 4 or row[0] >= row[2] or row[1] >= row[3]:
            raise OnnxgbpError(f"{where} is {json.dumps(row)}, not [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
        found.append((float(row[0]), float(row[1]), float(row[2]), float(row[3])))
    return found


class Boxes:
    """The boxes in the pixels that the model sees."""

    def __init__(
        self, known: Mapping[str, list[Box]], metadata: Mapping[str, str], spec: InputSpec, options: Mapping[str, Any]
    ) -> None:
        self._known, self._metadata, self._spec, self._options = known, metadata, spec, options

    def hit(self, sample: str, magnitude: Array) -> bool | None:
        """Whether the strongest pixel of [H, W] lies in one or near; None without a box in the picture."""
        boxes = self._known.get(Path(sample).name, [])
        if not boxes or magnitude.ndim != 2:
            return None
        if Path(sample).suffix:  # a photo; the samples of an array are called by their index
            prepared, size = Preprocessing.of(self._metadata, self._spec, **self._options), read(Path(sample)).size
            boxes = [prepared.placed(box, size) for box in boxes]
        height, width = magnitude.shape
        boxes = [(max(a, 0), max(b, 0), min(c, width), min(d, height)) for a, b, c, d in boxes]
        boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
        if not boxes:
            return None
        row, column = divmod(int(magnitude.argmax()), width)
        x, y = column + 0.5, row + 0.5  # the middle of a pixel
        away = (max(a - x, x - c, b - y, y - d) for a, b, c, d in boxes)
        return bool(min(away) <= _TOLERANCE)
