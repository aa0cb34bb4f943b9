"""Recurrences: `scan` writes one as the standard's Scan, `unroll_scans` writes it out step by step.

Scan takes a sequence of any length. Few runtimes beside ONNX Runtime know it, so the portable profile unrolls, for
which the length must be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import onnx_ir as ir

from onnxgbp.branches import detach
from onnxgbp.emit import Emit, dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.untrusted import MOST_NODES

__all__ = ["Body", "flipped", "scan", "unroll_scans"]

# (states..., slices...) -> the next states, and what is stacked over the steps.
Body: TypeAlias = "Callable[..., tuple[Sequence[ir.Value], Sequence[ir.Value]]]"

_FAR = 1 << 30  # beyond any dim


def scan(
    op: Emit,
    step: Body,
    states: Sequence[ir.Value],
    sequences: Sequence[ir.Value],
    *,
    reverse: bool = False,
    length: int | str | None = None,
) -> tuple[list[ir.Value], list[ir.Value]]:
    """Runs `step` over the first axis of the sequences, from the last slice to the first if `reverse`.

    Args:
        op: where the nodes go.
        step: writes one step; what it reads beside its arguments is captured.
        states: what a step hands on to the next, of one shape throughout.
        sequences: [length, ...] each.
        reverse: outputs are stacked in the order of the sequences all the same.
        length: how many steps, where that is known.

    Returns:
        The states behind the last step, and the stacked outputs.
    """
    if reverse:  # not by Scan's attribute for it, which onnx's reference evaluator does not know
        sequences = [flipped(op, sequence) for sequence in sequences]
    slices = [_fresh(op, "state", state, 0) for state in states] + [_fresh(op, "slice", s, 1) for s in sequences]
    stacked: list[ir.Value] = []

    def write(*arguments: ir.Value) -> list[ir.Value]:
        following, outputs = step(*arguments)
        stacked.extend(outputs)
        return [*following, *outputs]

    body = op.body(slices, write)
    for output, state in zip(body.outputs, states, strict=False):
        output.shape = output.shape or state.shape  # ONNX Runtime wants the rank of every output
    results = op.several(len(body.outputs), "Scan", *states, *sequences, body=body, num_scan_inputs=len(sequences))
    node = results[0].producer()
    assert node is not None  # it has just been written
    node.meta["length"] = length
    for result, like in zip(results, states, strict=False):
        op.typed(result, like)
    for result, inner in zip(results[len(states) :], stacked, strict=True):
        dims = dims_of(inner)
        result.type, result.shape = inner.type, None if dims is None else ir.Shape([length, *dims])
    last, outputs = list(results[: len(states)]), list(results[len(states) :])
    return last, [flipped(op, output) for output in outputs] if reverse else outputs


def flipped(op: Emit, sequence: ir.Value) -> ir.Value:
    return op.typed(op.Slice(sequence, starts=[-1], ends=[-_FAR], axes=[0], steps=[-1]), sequence)


def _fresh(op: Emit, kind: str, like: ir.Value, drop: int) -> ir.Value:
    """An input of a body: a tensor, or a slice of it along its first axis."""
    dims = dims_of(like)
    shape = None if dims is None else ir.Shape(dims[drop:])
    return ir.val(op.name(f"{op.scope}/{kind}"), dtype=like.dtype, shape=shape)


def unroll_scans(op: Emit) -> None:
    """Writes out every recurrence of the gradient, one copy of its body for each step.

    Raises:
        OnnxgbpError: the length of a sequence is free, or the gradient has other control flow.
    """
    for node in list(op.graph):
        if not node.domain and node.op_type in ("If", "Loop") and not node.meta.get("forward"):
            raise OnnxgbpError(f"the portable profile has no control flow, which '{node.name}' needs: use profile ort")
        if node.op_type != "Scan" or "length" not in node.meta:
            continue
        inner = node.attributes["body"].as_graph().all_nodes()
        if any(a.type == ir.AttributeType.GRAPH for within in inner for a in within.attributes.values()):
            raise OnnxgbpError(f"the portable profile has no control flow, which '{node.name}' holds: use profile ort")
        if not isinstance(node.meta["length"], int):
            raise OnnxgbpError(
                f"the portable profile has no loops, and the length of the sequence in '{node.name}' is free: export "
                "the model with a fixed length, or use profile ort"
            )
        op.scope = (node.name or "").rpartition("/")[0]
        if node.meta["length"] * len(node.attributes["body"].as_graph()) > MOST_NODES:
            raise OnnxgbpError(
                f"the portable profile has no loops, and written out the {node.meta['length']} steps of '{node.name}' "
                f"are more than {MOST_NODES} nodes: use profile ort"
            )
        results = _unrolled(op, node, node.meta["length"])
        op.graph.insert_before(node, op.take())
        for output, result in zip(node.outputs, results, strict=True):
            op.typed(result, output)
            output.replace_all_uses_with(result)
        detach(node.attributes["body"].as_graph())
        op.graph.remove(node, safe=True)


def _unrolled(op: Emit, node: ir.Node, length: int) -> list[ir.Value]:
    body, given = node.attributes["body"].as_graph(), [value for value in node.inputs if value is not None]
    count = len(given) - node.attributes["num_scan_inputs"].as_int()
    states, sequences = given[:count], given[count:]
    stacked: list[list[ir.Value]] = []
    for place in range(length):
        slices = [op.Gather(sequence, op.int64(place), axis=0) for sequence in sequences]
        made = dict(zip(body.inputs, [*states, *slices], strict=True))
        for inner in body:
            if inner.op_type == "Identity" and inner.inputs[0] is not None:
                made[inner.outputs[0]] = made.get(inner.inputs[0], inner.inputs[0])
                continue
            copy = ir.Node(
                inner.domain,
                inner.op_type,
                [made.get(value, value) if value is not None else None for value in inner.inputs],
                inner.attributes.values(),
                num_outputs=len(inner.outputs),
                name=op.name(f"{op.scope}/{inner.op_type}"),
            )
            for old, new in zip(inner.outputs, copy.outputs, strict=True):
                new.name, new.type, new.shape = op.name(copy.name or ""), old.type, old.shape
                made[old] = new
            op.nodes.append(copy)
        outputs = [made[value] for value in body.outputs]
        states = outputs[:count]
        stacked.append([op.Unsqueeze(value, axes=[0]) for value in outputs[count:]])
    return [*states, *(op.Concat(*parts, axis=0) for parts in zip(*stacked, strict=True))]
