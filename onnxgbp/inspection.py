"""What can be said of a model without running it."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from onnxgbp.activations import RELU_KINDS, Activation
from onnxgbp.branches import captured
from onnxgbp.convert import GradientGraph
from onnxgbp.differentiate import Path as Nodes
from onnxgbp.differentiate import find_path, missing_rules
from onnxgbp.emit import dims_of, shape_text
from onnxgbp.errors import OnnxgbpError, printable
from onnxgbp.explained import Explained, explained_tensor, stripped_text
from onnxgbp.findings import Findings, aligned
from onnxgbp.graph_methods import find_layer
from onnxgbp.inputs import Attributed, attributed
from onnxgbp.metadata import describe
from onnxgbp.methods import find_method, rule_of
from onnxgbp.model import METADATA, Source, load
from onnxgbp.recognise import recognise
from onnxgbp.rules import Choice, Rules, audit, choose, depths, parse_activations, parse_rules
from onnxgbp.step import label
from onnxgbp.target import parse_unit, unit_text

__all__ = ["inspect_model"]

_MANY = 5  # names of nodes that a line of text shows; JSON has them all


def inspect_model(
    model: str | Path,
    *,
    method: str = "guided",
    target: str | int = "argmax",
    output: str | None = None,
    unit: Any = None,
    seed: str = "one",
    wrt: str | Sequence[str] = (),
    layer: str | None = None,
    rule: Rules = (),
    activations: str | Sequence[str] = "all",
    profile: str = "ort",
    data: str | Path | None = None,
    limit: int = 100,
) -> Findings:
    """Says what `convert` would do with a model under the same options, or what an already converted file holds.

    A model that cannot be converted is no error: what stands in the way is listed under `obstacles` and `missing`.
    With `data`, a folder of photos, a .npy or a .npz, each activation also gets an `energy`: which share of the
    gradient its gates remove, see `energy.py`, over at most `limit` samples.

    Raises:
        OnnxgbpError: the file cannot be read as a model, or the data not as its inputs.
    """
    source = load(model)
    proto = onnx.load(model, load_external_data=False)
    facts = {"file": str(model), "sha256": source.sha256} | _file_facts(proto)
    if METADATA + "method" in source.model.metadata_props:
        return _reported(facts | {"converted": True} | _converted_facts(proto))
    options: dict[str, Any] = {
        "method": method,
        "rule": [rule] if isinstance(rule, str) else list(rule),
        "activations": activations,
    }
    place: dict[str, Any] = {"target": target, "output": output, "unit": unit, "seed": seed, "wrt": wrt}
    place |= {"layer": layer, "methods": [method]}
    found, graph = _source_facts(source, options, place)
    if graph is not None and not found["obstacles"]:
        try:
            found["notes"] += _raised(proto, graph.render(**options, profile=profile))
        except OnnxgbpError as error:
            found["obstacles"].append(str(error))
        else:
            if data is not None:
                found["samples"] = _measured(graph, found["activations"], data, limit, options)
    found["convertible"] = not found["missing"] and not found["obstacles"]
    parsed = parse_unit(unit)
    asked = {
        "method": method,
        "target": str(target),
        "unit": None if parsed is None else unit_text(parsed),
        "seed": seed,
    }
    return _reported(facts | {"converted": False} | asked | found)


def _measured(
    graph: GradientGraph, rows: list[dict[str, Any]], data: str | Path, limit: int, options: Mapping[str, Any]
) -> int:
    """Puts its `energy` in each row; the number of samples."""
    from onnxgbp.data import Batch, batches, inputs_of  # Pillow and onnxruntime: only where something is run
    from onnxgbp.energy import GATES, gate_energies

    target = graph.options["target"]
    if target == "seed" or target.startswith("input"):
        raise OnnxgbpError(f"target {target} has to be fed, and the data has no such input: choose argmax or a class")
    if graph.seed_classes is not None:
        raise OnnxgbpError(f"target {target} has a sweep for each class: measure one of them, argmax or a class")
    names = list[str]()

    def samples() -> Iterator[Batch]:
        for batch in batches(data, inputs_of(graph.source.model.graph), graph.source.model.metadata_props, limit=limit):
            names.extend(batch.names)
            yield batch

    energies = gate_energies(graph.measured(GATES, **options), samples())
    for row in rows:
        row["energy"] = energies.get(row["node"])
    return len(names)


def _file_facts(proto: onnx.ModelProto) -> dict[str, Any]:
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    constants = {tensor.name for tensor in proto.graph.initializer}
    counts = collections.Counter(_operator(node.domain, node.op_type) for node in proto.graph.node)
    return {
        "opset": opsets.get("ai.onnx", 0),
        "opsets": opsets,
        "ir_version": proto.ir_version,
        "producer": proto.producer_name,
        "inputs": [_value_facts(value) for value in proto.graph.input if value.name not in constants],
        "outputs": [_value_facts(value) for value in proto.graph.output],
        "operators": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    }


def _operator(domain: str, op_type: str) -> str:
    return op_type if domain in ("", "ai.onnx") else f"{domain}::{op_type}"


def _value_facts(value: onnx.ValueInfoProto) -> dict[str, Any]:
    if not value.type.HasField("tensor_type"):
        return {"name": value.name, "dtype": str(value.type.WhichOneof("value")).removesuffix("_type"), "shape": None}
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return {"name": value.name, "dtype": dtype, "shape": dims if tensor.HasField("shape") else None}


def _converted_facts(proto: onnx.ModelProto) -> dict[str, Any]:
    """What the metadata says; a list of labels is as long as the classes are many, so only its length is told."""
    said = {e.key.removeprefix(METADATA): e.value for e in proto.metadata_props if e.key.startswith(METADATA)}
    facts: dict[str, Any] = dict(said)
    for name in ("wrt", "rules", "labels", "preprocessing", "audit"):
        if name in said:
            try:
                facts[name] = json.loads(said[name])
            except (ValueError, RecursionError):
                continue  # written by someone else: as it stands
    if isinstance(facts.get("labels"), list):
        facts["labels"] = len(facts["labels"])
    try:
        line = describe(proto)
    except (KeyError, ValueError):
        line = "its metadata is not complete"
    return {"holds": line, "recorded": facts}


def _source_facts(
    source: Source, options: Mapping[str, Any], place: Mapping[str, Any]
) -> tuple[dict[str, Any], GradientGraph | None]:
    """The facts, and the gradient where there is one: it alone knows the activations in the bodies of control flow."""
    graph, obstacles = source.model.graph, list[str]()
    names = [place["wrt"]] if isinstance(place["wrt"], str) else list(place["wrt"])
    chosen, explained, path, layer = Attributed((), ()), None, Nodes(), None
    found, method = recognise(graph), find_method(options["method"])
    try:
        chosen = attributed(graph, names, place["output"])
        explained = explained_tensor(graph, chosen.tensors, place["output"])
        if method.layer:
            layer = find_layer(graph, explained, chosen.tensors, found, place["layer"])
        ends = [*(chosen.tensors if method.inputs else ()), *([layer] if layer is not None else ())]
        path = find_path(graph, explained.tensor, ends)
    except OnnxgbpError as error:
        obstacles.append(str(error))
    passed = _passed(path, explained.tensor, found) if explained is not None else []
    missing = missing_rules(path, explained.tensor, found) if explained is not None else []
    choices, made = list[Choice](), None
    if not missing and not obstacles:
        try:
            made = GradientGraph.build(source, **place)
        except OnnxgbpError as error:
            obstacles.append(str(error))
    try:
        rules, kinds = parse_rules(rule_of(options["method"]), options["rule"]), options["activations"]
        reached, depth = (made.found, made.depths) if made is not None else (passed, depths(graph, passed))
        choices = list(choose(reached, rules, parse_activations(kinds), depth).values())
    except OnnxgbpError as error:
        obstacles.append(str(error))
    facts = {
        "explained": _explained_facts(explained) if explained is not None else None,
        "wrt": [_tensor_facts(value) for value in chosen.tensors],
        "layer": _tensor_facts(layer) if layer is not None else None,
        "activations": audit(choices),
        "plain": [choice.name for choice in choices if choice.rule == "gradient"],
        "not_reached": [label(node) for node, activation in found.items() if activation not in passed],
        "missing": _missing_facts(missing),
        "obstacles": obstacles,
        "notes": [chosen.note] * bool(chosen.note)
        + (_notes(explained, found, choices) if explained is not None else []),
    }
    return facts, made


def _passed(path: Nodes, tensor: ir.Value, found: Mapping[ir.Node, Activation]) -> list[Activation]:
    """The activations that the gradient passes, in forward order: those inside another's group are not."""
    reached, passed = {tensor}, []
    for node in reversed(path):
        if not any(value in reached for value in node.outputs):
            continue
        if node in found:
            passed.append(found[node])
            reached.add(found[node].x)
        else:
            reached.update(value for value in (*node.inputs, *captured(node)) if value is not None)
    return passed[::-1]


def _tensor_facts(value: ir.Value) -> dict[str, Any]:
    dims = dims_of(value)
    dtype = value.dtype.name.lower() if value.dtype is not None else None
    return {"name": value.name, "dtype": dtype, "shape": list(dims) if dims is not None else None}


def _explained_facts(explained: Explained) -> dict[str, Any]:
    return _tensor_facts(explained.tensor) | {
        "output": explained.output.name if explained.output is not None else None,
        "stripped": [{"operator": node.op_type, "node": label(node)} for node in explained.stripped],
    }


def _missing_facts(missing: Iterable[ir.Node]) -> list[dict[str, Any]]:
    """One row per operator."""
    nodes: dict[str, list[str]] = {}
    for node in missing:
        nodes.setdefault(_operator(node.domain, node.op_type), []).append(label(node))
    return [{"operator": operator, "count": len(names), "nodes": names} for operator, names in nodes.items()]


def _notes(explained: Explained, found: Mapping[ir.Node, Activation], choices: Sequence[Choice]) -> list[str]:
    notes = [stripped_text(explained)] if explained.stripped else []
    maker = explained.tensor.producer()
    own = found.get(maker) if maker is not None else None
    if explained.behind_relu or (own is not None and own.kind in RELU_KINDS):
        notes.append(
            f"'{explained.tensor.name}' is the output of a ReLU, which is passed too: an inactive unit gives an "
            "all-zero guided map"
        )
    if not choices:
        notes.append("no activation lies on the path: every rule gives the plain gradient")
    return notes


def _raised(proto: onnx.ModelProto, made: onnx.ModelProto) -> list[str]:
    before, after = (
        next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        for model in (proto, made)
    )
    return [f"the converted file has opset {after}, which its gradient needs"] if after > before else []


def _reported(found: dict[str, Any]) -> Findings:
    lines = [
        f"{found['file']}: opset {found['opset']}, IR {found['ir_version']}, sha256 {found['sha256'][:12]}...",
        *(f"input      {_value_text(value)}" for value in found["inputs"]),
        *(f"output     {_value_text(value)}" for value in found["outputs"]),
    ]
    counts = ", ".join(f"{count} {name}" for name, count in found["operators"].items())
    lines.append(f"operators  {counts}")
    lines += _converted_text(found) if found["converted"] else _source_text(found)
    return Findings(found, "\n".join(map(printable, lines)))


def _value_text(value: Mapping[str, Any]) -> str:
    shape = "of unknown shape" if value["shape"] is None else shape_text(value["shape"])
    return f"{value['name']}: {value['dtype']} {shape}"


def _converted_text(found: Mapping[str, Any]) -> list[str]:
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in found["recorded"].items()]
    return [f"converted  {found['holds']}", *aligned([(f"  {name}", value) for name, value in sorted(rows)])]


def _source_text(found: Mapping[str, Any]) -> list[str]:
    lines = [f"explained  {_value_text(found['explained'])}"] if found["explained"] else []
    lines += [f"wrt        {_value_text(value)}" for value in found["wrt"]]
    lines += [f"layer      {_value_text(found['layer'])}"] if found["layer"] else []
    lines += [f"note       {note}" for note in found["notes"]]
    rows = found["activations"]
    if rows:
        plain = len(found["plain"])
        lines.append(f"activations on the path: {len(rows)}, {plain} of them plain")
        if "samples" in found:
            lines.append(f"share of the gradient's energy that gates remove, over {found['samples']} samples")
        lines += aligned(
            [
                (
                    f"  {row['node']}",
                    row["kind"] if row["spelled"] == row["kind"] else f"{row['kind']} as {row['spelled']}",
                    row["rule"],
                    _energy_text(row.get("energy")),
                    "; ".join(
                        filter(None, (row["reason"], row["inside"] and f"inside '{row['inside']}'", row["note"]))
                    ),
                )
                for row in rows
            ]
        )
    for row in found["missing"]:
        names = ", ".join(f"'{name}'" for name in row["nodes"][:_MANY]) + (", ..." if row["count"] > _MANY else "")
        lines.append(f"missing    no gradient rule for {row['operator']}, {row['count']} nodes: {names}")
    lines += [f"obstacle   {obstacle}" for obstacle in found["obstacles"]]
    lines.append(f"convertible: {'yes' if found['convertible'] else 'no'}")
    return lines


def _energy_text(energy: Mapping[str, float | None] | None) -> str:
    if energy is None:
        return ""
    if energy["x_gate"] is None:
        return "no gradient arrives"
    return f"x-gate {energy['x_gate']:.0%}, dy-gate {energy['dy_gate']:.0%}"
