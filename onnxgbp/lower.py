"""How each gradient is spelled in standard operators, per profile; and the clean-up of the graph.

`ort` (default) is the spelling that ONNX Runtime runs fastest, `portable` the one that is right in every runtime.
The table at the end is the one place where a profile decides anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgbp.blocked import keep_blocked
from onnxgbp.branches import detach
from onnxgbp.constants import constant_value, is_constant
from onnxgbp.conv_gradients import conv_grad_as_conv, conv_grad_portable, untied
from onnxgbp.emit import PRIVATE, Emit, dims_of
from onnxgbp.gates import gate_before_pools
from onnxgbp.phases import conv_grad_by_phases, keep_phases, lay_out
from onnxgbp.pool_gradients import (
    average_pool_grad,
    average_pool_grad_blocked,
    max_pool_by_comparison,
    max_pool_portable,
    max_pool_scatter,
    sum_pool_grad,
)
from onnxgbp.scan import unroll_scans
from onnxgbp.step import trusting

__all__ = ["PROFILES", "lower", "merge_equal", "prune", "replace_calls"]

Lowering: TypeAlias = "Callable[[Emit, ir.Node], ir.Value | None]"


def replace_calls(op: Emit, table: Mapping[str, Lowering]) -> None:
    """Replaces each private call that the table knows by the nodes that its function writes, in sub-graphs as well.

    A function that gives None leaves the call for a later one.
    """
    nodes = list(op.graph.all_nodes())
    for node in nodes:
        if node.domain != PRIVATE or node.op_type not in table or node.graph is None:
            continue
        op.scope = (node.name or "").rpartition("/")[0]
        with trusting(op.scope.removeprefix("gradient/")):
            value, call = table[node.op_type](op, node), node.outputs[0]
        new = op.take()
        if value is None:
            continue
        node.graph.insert_before(node, new)
        nodes.extend(new)  # a spelling may call another
        if value.shape is None:
            op.typed(value, call)
        call.replace_all_uses_with(value, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)


def lower(op: Emit, profile: str) -> None:
    """Spells every gradient for the profile. No private call is left."""
    gate_before_pools(op)
    if profile == "ort":
        replace_calls(op, BY_PHASES)
        keep_phases(op)
    replace_calls(op, {call: choices[profile] for call, choices in LOWERINGS.items()})
    if profile == "ort":
        look_up_rows(op)
        keep_blocked(op)
    if profile == "portable":
        unroll_scans(op)
        untie_weights(op)


def look_up_rows(op: Emit) -> None:
    """Where one class of each sample is explained: its row of the last weight, not a product of all with 0 and 1."""
    for node in list(op.graph):
        if node.op_type != "MatMul" or node.meta.get("forward") or node.inputs[0] is None or node.inputs[1] is None:
            continue
        classes = _one_hot(node.inputs[0])
        if classes is None or len(dims_of(node.inputs[1]) or dims_of(node.outputs[0]) or ()) != 2:
            continue
        op.scope = (node.name or "").rpartition("/")[0]
        rows = op.typed(op.Gather(node.inputs[1], op.Squeeze(classes, axes=[1]), axis=0), node.outputs[0])
        op.graph.insert_before(node, op.take())
        node.outputs[0].replace_all_uses_with(rows, replace_graph_outputs=True)
        op.graph.remove(node, safe=True)


def _one_hot(seed: ir.Value) -> ir.Value | None:
    """The classes [N, 1] whose columns are 1 in a seed [N, C], None where it was not made of classes."""
    cast = seed.producer()
    equal = cast.inputs[0].producer() if cast is not None and cast.op_type == "Cast" and cast.inputs[0] else None
    if equal is None or equal.op_type != "Equal":
        return None
    counted, classes = constant_value(equal.inputs[0]), equal.inputs[1]
    if counted is None or counted.ndim != 2 or not np.array_equal(counted, np.arange(counted.size)[np.newaxis]):
        return None
    return classes


def untie_weights(op: Emit) -> None:
    """OpenVINO is silently wrong when one square weight is read in both directions: the second reader takes -(-W)."""
    for node in list(op.graph):
        if node.meta.get("forward") or node.op_type not in ("ConvTranspose", "Gemm", "MatMul", "Transpose"):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or not (value.is_initializer() or is_constant(value)) or len(set(value.consumers())) < 2:
                continue
            op.scope = (node.name or "").rpartition("/")[0]
            twice = untied(op, value)
            op.graph.insert_before(node, op.take())
            node.replace_input_with(index, twice)


def merge_equal(graph: ir.Graph) -> None:
    """Computes once what several sweeps, or several steps of one, compute alike. The forward pass stays as it is."""
    first: dict[tuple[Any, ...], ir.Node] = {}
    for node in list(graph):
        bodies = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if node.meta.get("forward") or bodies or any(value.is_graph_output() for value in node.outputs):
            continue
        attributes = sorted(
            (name, ir.serde.serialize_attribute(a).SerializeToString()) for name, a in node.attributes.items()
        )
        key = (node.domain, node.op_type, *node.inputs, len(node.outputs), *attributes)
        same = first.setdefault(key, node)
        if same is not node:
            for value, kept in zip(node.outputs, same.outputs, strict=True):
                value.replace_all_uses_with(kept)
            graph.remove(node, safe=True)


def prune(graph: ir.Graph) -> None:
    """Removes every node and constant that no output needs. Inputs stay, since the caller feeds them."""
    for node in reversed(list(graph)):
        if all(not value.uses() and not value.is_graph_output() for value in node.outputs):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    detach(attribute.as_graph())
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


# The ort profile alone: strided gradients as tensors that stay blocked, which come together as late as can be.
BY_PHASES: dict[str, Lowering] = {"ConvGrad": conv_grad_by_phases, "MaxPoolGrad": max_pool_by_comparison}

# call -> profile -> how it is spelled there, and why. What was measured stands in docs/performance.md. Last of all
# `keep_blocked` respells gates and factors per channel for ort: it depends on what stands around them.
LOWERINGS: dict[str, dict[str, Lowering]] = {
    # ConvTranspose takes ONNX Runtime 1.4 to 2.4 times as long as the Conv and knows no blocks. Elsewhere it is
    # right in every runtime, as long as it has no groups of several channels.
    "ConvGrad": {"ort": conv_grad_as_conv, "portable": conv_grad_portable},
    # MaxPool's Indices and ScatterElements are wrong or missing in OpenCV, tinygrad, TVM and WebGPU. In ONNX Runtime
    # the Indices alone cost 10 to 40 times the pool: they are for what has no phases.
    "MaxPoolGrad": {"ort": max_pool_scatter, "portable": max_pool_portable},
    # A convolution of one channel is never blocked, a pool is.
    "AveragePoolGrad": {"ort": average_pool_grad_blocked, "portable": average_pool_grad},
    "SumPoolGrad": {"ort": sum_pool_grad, "portable": sum_pool_grad},
    "Interleave": {"ort": lay_out, "portable": lay_out},
}
PROFILES = tuple(dict.fromkeys(itertools.chain.from_iterable(LOWERINGS.values())))
