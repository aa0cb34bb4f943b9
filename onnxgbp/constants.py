"""Values that are known before the model runs: axes, pads, shapes, thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

__all__ = ["FOLDABLE", "SMALL", "Folding", "constant_value", "evaluate", "is_constant", "uniform_value"]

SMALL = 1 << 16  # elements: what tells a shape, a threshold or one number per channel is never larger
_STEPS = 16  # that spread one number to a shape: exporters take two or three
FOLDABLE = frozenset(
    "Abs Add And BlackmanWindow Cast Ceil Concat ConstantOfShape Div Equal Expand Floor Gather Greater HammingWindow "
    "HannWindow Identity Less Max Min Mod Mul Neg Not Pow Range Reciprocal ReduceProd ReduceSum Reshape Shape Size "
    "Slice Sqrt Squeeze Sub Transpose Unsqueeze Where".split()
)


class Folding:
    """What folding may still take: a line of a file makes a constant of `SMALL` numbers, and it may have many lines."""

    _FREE = 1 << 8  # numbers of a shape, pads, axes: always known
    _MOST = 1 << 22  # numbers of all larger ones together: 32 MB

    def __init__(self) -> None:
        self._taken = 0

    def allows(self, shape: Sequence[int]) -> bool:
        """Whether one more constant of that shape may be computed."""
        size = math.prod(shape)
        if size > self._FREE:
            self._taken += size
        return size <= self._FREE or (size <= SMALL and self._taken <= self._MOST)


def _folding(graph: ir.Graph) -> Folding:
    folding: Folding = graph.meta.setdefault("folding", Folding())
    return folding


def is_constant(value: ir.Value) -> bool:
    """An initializer that a caller cannot override, or the result of a Constant node.

    Up to IR 3 every initializer had to be listed as an input too; only later files mean an override by that.
    """
    if value.is_initializer():
        graph = value.graph
        version = graph.meta.get("ir_version", 0) if graph is not None else 0
        return not value.is_graph_input() or version < 4
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant" and producer.domain == ""


def constant_value(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The value of a small tensor that does not depend on the input, folding the nodes that compute it; or None."""
    if value is None:
        return None
    waiting = [value]  # a chain of thousands of nodes is longer than Python calls are deep
    while waiting:
        behind = [] if "constant" in waiting[-1].meta else _unfolded(waiting[-1])
        if behind:
            waiting += behind
            continue
        last = waiting.pop()
        if "constant" not in last.meta:
            last.meta["constant"] = _fold(last)
    folded: np.ndarray[Any, Any] | None = value.meta["constant"]
    return folded


def _unfolded(value: ir.Value) -> list[ir.Value]:
    """What has to be known before a value is, and has not been asked for yet."""
    node = value.producer()
    if is_constant(value) or node is None or node.domain != "" or node.op_type not in FOLDABLE - {"Shape"}:
        return []
    return [source for source in node.inputs if source is not None and "constant" not in source.meta]


def uniform_value(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The one number, of shape [], that a tensor holds everywhere, even if its shape shows only at run time; or None.

    So frameworks write `max(x, zeros_like(x))`.
    """
    for _ in range(_STEPS):
        known = constant_value(value)
        if known is None and value is not None and is_constant(value):
            tensor = ir.convenience.get_const_tensor(value)
            known = tensor.numpy() if tensor is not None else None
        if known is not None:
            return known.reshape(-1)[0] if known.size and (known == known.reshape(-1)[0]).all() else None
        node = value.producer() if value is not None else None
        if node is None or node.domain != "":
            return None
        if node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            return given.as_tensor().numpy().reshape(()) if given is not None else np.zeros((), np.float32)
        value = node.inputs[0] if node.op_type in ("Expand", "Identity", "Reshape") else None
    return None


def _fold(value: ir.Value) -> np.ndarray[Any, Any] | None:
    if is_constant(value):
        tensor = ir.convenience.get_const_tensor(value)
        return tensor.numpy() if tensor is not None and tensor.size <= SMALL else None
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in FOLDABLE or value.graph is None:
        return None
    if node.op_type == "Shape" and node.inputs[0] is not None:
        return _static_shape(node)
    arrays = [constant_value(source) for source in node.inputs]
    if any(array is None and source is not None for array, source in zip(arrays, node.inputs, strict=True)):
        return None
    size = value.shape.numpy() if value.shape is not None and value.shape.is_static() else None
    if size is None or not _folding(value.graph).allows(size):
        return None
    given = {v.name or "": a for v, a in zip(node.inputs, arrays, strict=True) if v is not None and a is not None}
    results = evaluate(ir.to_proto(node), value.graph.opset_imports[""], given)
    return results[0] if results else None


def _static_shape(node: ir.Node) -> np.ndarray[Any, Any] | None:
    source = node.inputs[0]
    assert source is not None  # Shape has an input
    if source.shape is None or not source.shape.is_static():
        return None
    start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
    return np.array(source.shape.numpy()[start:end], np.int64)


def evaluate(node: onnx.NodeProto, opset: int, arrays: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The outputs of one node of the standard domain; none where the reference evaluator cannot run it."""
    from onnx.reference import ReferenceEvaluator  # 400 modules: only where something is computed

    # As a graph: given a node alone, the evaluator takes the newest version of its operator whatever the opset.
    graph = onnx.GraphProto(name="one_node", node=[node], output=[onnx.ValueInfoProto(name=n) for n in node.output])
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in arrays)
    try:
        outputs: Any = ReferenceEvaluator(graph, opsets={"": opset}).run(None, arrays)
        return [np.asarray(output) for output in outputs]
    except Exception:  # noqa: BLE001 - whatever stops the evaluator, the value is simply not known before the run
        return []
