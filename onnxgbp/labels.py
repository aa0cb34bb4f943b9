"""The names of the classes and of the features, where a model's metadata or a file holds them."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import read_text
from onnxgbp.model import METADATA

__all__ = ["feature_names", "find_label", "labels_of"]

# Ours first; the others are what exporters of detectors and classifiers write, as JSON or as a Python literal.
_KEYS = (METADATA + "labels", "labels", "names", "classes", "class_names")
_SHOWN = 5
_DIGITS = 6  # of a class: a million of them
_LONGEST = 1 << 24  # characters that are read: as much as a million names take


def labels_of(metadata: Mapping[str, str]) -> list[str]:
    """The class names by index, [] where the metadata has none.

    Raises:
        OnnxgbpError: our own entry is no JSON list.
    """
    for key in _KEYS:
        if key not in metadata:
            continue
        names = _read(metadata[key])
        if isinstance(names, dict) and all(_is_class(index) for index in names):
            named = {int(index): str(name) for index, name in names.items()}
            names = [named.get(index, str(index)) for index in range(max(named, default=-1) + 1)]
        if isinstance(names, (list, tuple)):
            return [str(name) for name in names]
        if key == _KEYS[0]:
            raise OnnxgbpError(f"the model's metadata '{key}' is no JSON list of class names")
    return []


def feature_names(path: Path | None, metadata: Mapping[str, str]) -> list[str]:
    """The names of the features (of the channels of a signal): those of a file, a name on each line or a JSON list;
    without a file the JSON list under `onnxgbp.features` in the model's metadata; [] where there is neither.

    Raises:
        OnnxgbpError: the file cannot be read or holds no name, or the metadata's entry is no JSON list.
    """
    if path is None:
        said = _read(metadata.get(METADATA + "features", "[]"))
        if not isinstance(said, list):
            raise OnnxgbpError(f"the model's metadata '{METADATA}features' is no JSON list of names")
        return [str(name) for name in said]
    text = read_text(path)
    listed = _read(text) if path.suffix.lower() == ".json" else text.rstrip().splitlines()
    if not isinstance(listed, list) or not listed:
        raise OnnxgbpError(f"{path} holds no names: write one on each line, or a JSON list")
    return [str(name).strip() for name in listed]


def _is_class(index: object) -> bool:
    return str(index).isdecimal() and len(str(index)) <= _DIGITS


def _read(text: str) -> object:
    if len(text) > _LONGEST:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def find_label(name: str, labels: Sequence[str]) -> int:
    """The index of a class by its name; case does not matter, and of `tabby, tabby cat` either part will do.

    Raises:
        OnnxgbpError: no class is called so, or more than one, or the model names none.
    """
    if not labels:
        raise OnnxgbpError(
            f"target '{name}' is no class index, and the model's metadata names no classes "
            f"(a JSON list under '{METADATA}labels' would)"
        )
    wanted = name.strip().casefold()
    exact = [i for i, label in enumerate(labels) if label.casefold() == wanted]
    found = exact or [
        i for i, label in enumerate(labels) if wanted in (part.strip().casefold() for part in label.split(","))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise OnnxgbpError(f"{len(found)} classes are called '{name}': give one of the indices {found[:_SHOWN]}")
    near = [label for label in labels if wanted in label.casefold()][:_SHOWN]
    near = near or difflib.get_close_matches(name, labels, n=_SHOWN)
    hint = f"; there is {', '.join(repr(label) for label in near)}" if near else ""
    raise OnnxgbpError(f"no class is called '{name}'{hint}")
