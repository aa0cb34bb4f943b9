"""The names of the classes, where a model's metadata holds them."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence

from onnxgbp.errors import OnnxgbpError
from onnxgbp.model import METADATA

__all__ = ["find_label", "labels_of"]

# Ours first; the others are what exporters of detectors and classifiers write, as JSON or as a Python literal.
_KEYS = (METADATA + "labels", "labels", "names", "classes", "class_names")
_SHOWN = 5


def labels_of(metadata: Mapping[str, str]) -> list[str]:
    """The class names by index, [] where the metadata has none.

    Raises:
        OnnxgbpError: our own entry is no JSON list.
    """
    for key in _KEYS:
        if key not in metadata:
            continue
        names = _read(metadata[key])
        if isinstance(names, dict) and all(str(index).isdecimal() for index in names):
            named = {int(index): str(name) for index, name in names.items()}
            names = [named.get(index, str(index)) for index in range(max(named, default=-1) + 1)]
        if isinstance(names, (list, tuple)):
            return [str(name) for name in names]
        if key == _KEYS[0]:
            raise OnnxgbpError(f"the model's metadata '{key}' is no JSON list of class names")
    return []


def _read(text: str) -> object:
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
