"""What a converted file says of itself, and how that is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from onnxgbp import training
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explained import Explained, stripped_text
from onnxgbp.methods import rule_of
from onnxgbp.model import METADATA, Source
from onnxgbp.rules import Choice, Rules, audit, parse_rules
from onnxgbp.target import unit_text

__all__ = ["already_converted", "audited", "describe", "first_matches", "place_options", "refuse_converted"]


def place_options(
    arguments: Mapping[str, Any],
    explained: Explained,
    inputs: Sequence[ir.Value],
    layer: ir.Value | None,
    note: str,
) -> dict[str, str]:
    """What is explained, with respect to what, from the arguments of `GradientGraph.build` and what they led to."""
    options = {
        "target": str(arguments["target"]),
        "explained": explained.tensor.name or "",
        "seed": arguments["seed"],
        "wrt": json.dumps([value.name for value in inputs]),
    }
    if arguments["unit"] is not None:
        options["unit"] = unit_text(arguments["unit"])
    if explained.stripped:
        options["stripped"] = stripped_text(explained)
    if arguments["builder"] != "onnxgbp":
        options["builder"] = training.version()
    if layer is not None:
        options["layer"] = layer.name or ""
    if arguments["seed_scale"] != 1.0:
        options["seed_scale"] = str(arguments["seed_scale"])
    if note:
        options["attributed"] = note
    return options


def first_matches(methods: Sequence[str], rules: Rules) -> list[tuple[str, str]]:
    """The first-match list, of which the last line is the method, or the methods."""
    return [*parse_rules(rule_of(methods[0]), rules)[:-1], ("*", ",".join(methods))]


def audited(
    methods: Sequence[str], choices: Sequence[dict[str, Choice]], passed: Sequence[frozenset[str]]
) -> list[dict[str, Any]]:
    """The audit as the metadata keeps it: without what is empty; a row names its method if there are several."""
    rows = []
    for method, chosen, own in zip(methods, choices, passed, strict=True):
        named = {"method": method} if len(methods) > 1 else {}
        for row in audit(choice for y, choice in chosen.items() if y in own):
            del row["input"], row["output"]  # they follow from the node
            rows.append(named | {name: value for name, value in row.items() if value})
    return rows


def already_converted(source: Source) -> str:
    """What such a file holds, and the way out."""
    said = {name: source.model.metadata_props.get(METADATA + name, "?") for name in ("explained", "target", "sha256")}
    method = source.model.metadata_props[METADATA + "method"]
    unit = source.model.metadata_props.get(METADATA + "unit")
    aim = f"unit {unit}" if unit is not None else f"target {said['target']}"
    return (
        f"{source.name} is already converted: it holds {method} of '{said['explained']}' ({aim}); convert the model "
        f"that it was made from (its sha256 is {said['sha256'][:12]}...), or run this one as it is"
    )


def refuse_converted(source: Source) -> None:
    """Raises for a file that `convert` wrote, where the model itself is asked for."""
    if METADATA + "method" in source.model.metadata_props:
        raise OnnxgbpError(f"{source.name} is already a converted file; give the model that it was made from")


def describe(converted: onnx.ModelProto) -> str:
    """One line on what a converted file explains, from its own metadata."""
    said = {entry.key.removeprefix(METADATA): entry.value for entry in converted.metadata_props}
    wrt = ", ".join(f"'{name}'" for name in json.loads(said["wrt"]))
    unit = f"unit {said['unit']}" if "unit" in said else f"target {said['target']}"
    behind = f", {said['stripped']}" if "stripped" in said else ""
    behind += f"; {said['attributed']}" if "attributed" in said else ""
    others = [rule for rule in json.loads(said["rules"]) if rule != f"*={said['method']}"]
    mixed = f", with {', '.join(others)}," if others else ""
    mixed += f" at '{said['layer']}'" if "layer" in said else ""
    scale = f", times {said['seed_scale'].removesuffix('.0')}" if "seed_scale" in said else ""
    return f"{said['method']}{mixed} of '{said['explained']}' ({unit}) with respect to {wrt}{scale}{behind}"
