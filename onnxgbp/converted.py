"""What a converted file says of itself: which of its outputs shows what is explained, and what was asked of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from onnxgbp.errors import OnnxgbpError
from onnxgbp.model import METADATA, Source
from onnxgbp.rules import parse_rules
from onnxgbp.target import parse_unit, unit_text

__all__ = ["explained_by", "refuse_contradictions", "scores_output"]

# What an output may have passed through between the explained tensor and its own name; see `explained.py`.
_BEHIND_SCORES = frozenset(
    {"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Cast", "Reshape", "Squeeze", "Flatten", "ZipMap"}
)


def refuse_contradictions(source: Source, what: Mapping[str, Any]) -> None:
    """An already converted file says what it is; an option that says otherwise cannot be followed any more."""
    said = {k.removeprefix(METADATA): v for k, v in source.model.metadata_props.items() if k.startswith(METADATA)}
    unit, activations = parse_unit(what["unit"]), what["activations"]
    method = ",".join(what["methods"]) or what["method"]
    said.setdefault("seed_scale", "1.0")
    asked: dict[str, str | None] = {
        "method": method,
        "explained": what["output"],
        "unit": None if unit is None else unit_text(unit),
        "seed": what["seed"],
        "wrt": json.dumps(what["wrt"]) if what["wrt"] else None,
        "activations": activations if activations is None or isinstance(activations, str) else ",".join(activations),
        "profile": what["profile"],
        "layer": what["layer"],
        "target": None if what["top"] is None else f"top{what['top']}",
        "seed_scale": None if what["seed_scale"] is None else str(what["seed_scale"]),
    }
    if what["rule"]:
        pairs = [*parse_rules("guided", what["rule"])[:-1], ("*", method or said["method"])]
        asked["rules"] = json.dumps([f"{pattern}={name}" for pattern, name in pairs])
    for name, value in asked.items():
        if value is not None and value != said.get(name):
            option = {"explained": "output", "rules": "rule"}.get(name, name)
            raise OnnxgbpError(
                f"{source.name} is already converted with {option} {said.get(name, '(none)')}, not {value}: "
                "leave the option out, or give the model that it was made from"
            )


def scores_output(proto: onnx.ModelProto, explained: str, outputs: Sequence[str]) -> str | None:
    """The output of the source that shows the explained tensor, as it is or behind a softmax and the like."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    for output in outputs:
        name = output
        while name != explained and name in makers and makers[name].op_type in _BEHIND_SCORES:
            name = makers[name].input[0]
        if name == explained:
            return output
    return None


def explained_by(source: Source) -> ir.Value | None:
    """The tensor that a converted file explains, if it is one that the file names."""
    name = source.model.metadata_props[METADATA + "explained"]
    values = (*source.model.graph.inputs, *(value for node in source.model.graph for value in node.outputs))
    return next((value for value in values if value.name == name), None)
