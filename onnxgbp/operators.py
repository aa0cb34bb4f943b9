"""The table of operators: what is differentiated, which are activations, whose gradient is zero, what is refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import onnx

from onnxgbp.activations import ACTIVATIONS, NOT_MONOTONE, RELU_KINDS
from onnxgbp.findings import aligned
from onnxgbp.model import OLDEST_OPSET
from onnxgbp.vjps import FAMILIES, REFUSED, ZERO_GRADIENT, Entry

__all__ = ["operator_markdown", "operator_page", "operator_table", "operator_text"]


def operator_table() -> list[dict[str, Any]]:
    """What is known of each operator: one row each, sorted by family as the tables are.

    A row holds operator, domain, family, opsets (from the first to the last version of its definition, none before
    7; empty for what is no operator), differentiated (the names of its inputs that have a gradient), note.
    """
    rows = [
        _operator_row(operator, family, _differentiated(operator, entry), "")
        for family, entries in FAMILIES.items()
        for operator, entry in sorted(entries.items())
    ]
    for kind in ACTIVATIONS:
        known = _versions(kind, "")
        inputs = [known[-1].inputs[0].name] if known else ["x"]
        rows.append(_operator_row(kind, "activation", inputs, _activation_note(kind, bool(known))))
    zero = "piecewise constant, or no function of the values: its gradient is zero"
    rows += [_operator_row(operator, "zero gradient", [], zero) for operator in sorted(ZERO_GRADIENT)]
    return rows + [_operator_row(operator, "refused", [], why) for operator, why in sorted(REFUSED.items())]


def _operator_row(operator: str, family: str, differentiated: list[str], note: str) -> dict[str, Any]:
    domain, _, name = operator.rpartition("::")
    versions = sorted({max(schema.since_version, 1 if domain else OLDEST_OPSET) for schema in _versions(name, domain)})
    opsets = "-".join(map(str, dict.fromkeys((versions[0], versions[-1])))) if versions else ""
    return {
        "operator": name,
        "domain": domain or "ai.onnx",
        "family": family,
        "opsets": opsets,
        "differentiated": differentiated,
        "note": note,
    }


def _differentiated(operator: str, entry: Entry) -> list[str]:
    domain, _, name = operator.rpartition("::")
    schemas = _versions(name, domain)
    names = [formal.name for formal in schemas[-1].inputs] if schemas else []
    if not entry.rules:  # one rule for any number of inputs
        if any(attribute.type == _GRAPH for attribute in schemas[-1].attributes.values()):
            return ["what its graphs read"]
        return [f"{names[0]}..." if names else "every input"]
    return [names[i] if i < len(names) else str(i) for i, rule in enumerate(entry.rules) if rule is not None]


_GRAPH = onnx.defs.OpSchema.AttrType.GRAPH


def _activation_note(kind: str, operator: bool) -> str:
    notes = []
    if not operator:
        notes.append("a form of another operator, found by what it computes")
    if kind in NOT_MONOTONE:
        notes.append("its slope is negative for some x")
    elif kind not in RELU_KINDS:
        notes.append("the papers define the rules for ReLU only")
    return "; ".join(notes)


@functools.cache
def _versions(name: str, domain: str) -> list[onnx.defs.OpSchema]:
    """Every definition of an operator, oldest first."""
    return sorted(_schemas().get((domain, name), []), key=lambda schema: schema.since_version)


@functools.cache
def _schemas() -> dict[tuple[str, str], list[onnx.defs.OpSchema]]:
    schemas: dict[tuple[str, str], list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        schemas.setdefault((schema.domain, schema.name), []).append(schema)
    return schemas


_HEADINGS = ("operator", "family", "opsets", "differentiated", "note")


def _cells(row: Mapping[str, Any]) -> list[str]:
    name = row["operator"] if row["domain"] == "ai.onnx" else f"{row['domain']}::{row['operator']}"
    return [name, row["family"], row["opsets"], ", ".join(row["differentiated"]), row["note"]]


def operator_text() -> str:
    """The table for a terminal."""
    return "\n".join(aligned([_HEADINGS, *(_cells(row) for row in operator_table())]))


def operator_page() -> str:
    """The whole table for the documentation, a line for each operator."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---" * len(_HEADINGS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |".replace("  ", " ") for row in operator_table())])


def operator_markdown() -> str:
    """The table for the README: one line per family, since a line per operator would be most of that page."""
    families: dict[str, list[str]] = {}
    for row in operator_table():
        families.setdefault(row["family"], []).append(_cells(row)[0])
    lines = ["| family | operators |", "|---|---|"]
    return "\n".join([*lines, *(f"| {family} | {', '.join(names)} |" for family, names in families.items())])
