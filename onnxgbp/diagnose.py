"""Why a map is blank, and where a number that is not finite arises: one run with every inner tensor in view."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxgbp.activations import RELU_KINDS
from onnxgbp.model import METADATA
from onnxgbp.trial import session

__all__ = ["first_not_finite", "why_blank"]

_SCOPE = "gradient/"  # how the nodes of the backward pass are called: gradient/<forward node>/<operator>
_SHOWN = 3

_NONE = np.zeros(0)

Arrays = Mapping[str, npt.NDArray[Any]]


def why_blank(converted: onnx.ModelProto, feeds: Arrays, sample: int = 0) -> str:
    """Where the gradient of one sample ends, in words.

    Args:
        converted: a file that `convert` made.
        feeds: its inputs, a batch.
        sample: the one with the blank map.

    Raises:
        Exception: the model cannot be run with every inner tensor as an output; it may be too large.
    """
    values = _inner(converted, feeds)
    said = {entry.key.removeprefix(METADATA): entry.value for entry in converted.metadata_props}
    if any(_broken(array, sample) for array in (*feeds.values(), values.get(said["explained"], _NONE))):
        return f"numbers that are not finite: {_first_not_finite(converted, feeds, values, sample)}"
    # What is no float is a class that is looked up, or its like: never blank.
    alive = {name: array.dtype.kind != "f" or _row(array, sample).any() for name, array in {**feeds, **values}.items()}
    made = {name: node for node in converted.graph.node for name in node.output}
    kinds = {row["node"]: row["kind"] for row in json.loads(said["audit"])}
    backward = [node for node in converted.graph.node if node.name.startswith(_SCOPE)]
    starts = {name for node in converted.graph.node if node.name.startswith("target/") for name in node.output}
    seeds = {name for node in backward for name in node.input if name in starts | {"seed"} and name in alive}
    if not any(alive[name] for name in seeds):
        given = "the seed that was given is zero"
        return given if "seed" in feeds else "the seed itself is zero: the explained unit's own activation is 0"
    carriers = set(seeds)  # the tensors that depend on the seed: masks and weights do not
    ends: dict[str, str] = {}  # forward node -> the operator of its backward step whose result is the first of zeros
    for node in backward:
        arriving = [name for name in node.input if name in carriers and name in alive]
        if not arriving:
            continue
        carriers.update(node.output)
        if any(alive[name] for name in arriving) and any(not alive.get(name, True) for name in node.output):
            stopped = node.op_type
            if stopped == "Relu" and _closed(made.get(node.input[0]), carriers, values, sample):
                stopped = "Where"
            ends.setdefault(_forward_name(node), stopped)
    explained = label(made[said["explained"]]) if said["explained"] in made else None
    reasons = [_reason(name, operator, kinds.get(name), name == explained) for name, operator in ends.items()]
    more = f" and at {len(reasons) - _SHOWN} other nodes" if len(reasons) > _SHOWN else ""
    if not reasons:
        return f"a gradient arrives, and what {said['method']} makes of it is zero"
    return "; ".join(reasons[:_SHOWN]) + more


def _closed(node: onnx.NodeProto | None, carriers: set[str], values: Arrays, sample: int) -> bool:
    """Whether it was the gate that left nothing for a Relu: the gradient with the gate's large negative term added, as
    `blocked.py` spells it, where that gradient is positive somewhere.
    """
    if node is None or node.op_type != "Add" or not node.name.startswith(_SCOPE):
        return False
    given = [name for name in node.input if name in carriers]
    return len(given) == 1 and given[0] in values and bool((_row(values[given[0]], sample) > 0).any())


def _reason(name: str, operator: str, kind: str | None, explained: bool) -> str:
    if kind is None:
        return f"nothing passes '{name}'"
    if operator == "Relu":
        return f"dead path: all that arrives at '{name}' ({kind}) is negative"
    if kind not in RELU_KINDS:
        return f"'{name}' ({kind}) is saturated wherever a gradient arrives"
    if explained:
        return f"the explained unit is inactive: its own ReLU '{name}' gives 0"
    return f"dead path: '{name}' ({kind}) is inactive wherever a gradient arrives"


def first_not_finite(converted: onnx.ModelProto, feeds: Arrays, sample: int = 0) -> str:
    """The first node, in the order of the file, that makes a NaN or an infinity of a sample, in words.

    Raises:
        Exception: as `why_blank`.
    """
    return _first_not_finite(converted, feeds, _inner(converted, feeds), sample)


def _first_not_finite(converted: onnx.ModelProto, feeds: Arrays, values: Arrays, sample: int) -> str:
    for name, array in feeds.items():
        if _broken(array, sample):
            return f"the input '{name}' has some already"
    for node in converted.graph.node:
        if any(_broken(values[name], sample) for name in node.output if name):
            if node.name.startswith(_SCOPE):
                return f"they arise in the backward step of '{_forward_name(node)}' ({node.op_type})"
            return f"they arise in the forward pass at '{label(node)}' ({node.op_type})"
    return "they arise in the last step"


def label(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}({node.output[0]})"


def _forward_name(node: onnx.NodeProto) -> str:
    return node.name.removeprefix(_SCOPE).rpartition("/")[0] or node.name


def _broken(array: npt.NDArray[Any], sample: int) -> bool:
    return array.dtype.kind == "f" and not np.isfinite(_row(array, sample)).all()


def _row(array: npt.NDArray[Any], sample: int) -> npt.NDArray[Any]:
    """The part of one sample; a tensor without the batch as its first axis is taken as a whole."""
    return array[sample] if array.ndim and len(array) > sample else array


def _inner(converted: onnx.ModelProto, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Every tensor that a node of the main graph makes."""
    model = onnx.ModelProto()
    model.CopyFrom(converted)
    known = {output.name for output in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    found = session(model, optimise=False)(feeds)
    return {name: np.asarray(found[name]) for name in names}
