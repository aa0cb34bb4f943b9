"""Gates moved to the small side of a MaxPool, before anything is spelled.

Only the maximum of a window gets a gradient, and there x is y. So with dx the gradient of y = MaxPool(x), and c a
condition on single elements,

    Where(c(x), dx(dy), 0) = dx(Where(c(y), dy, 0)),

on tensors of y's size instead of x's. And where windows do not overlap, so that no two gradients are added,
Relu(dx(dy)) = dx(Relu(dy)): the convolution that makes dy may take that Relu with it.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgbp.constants import constant_value
from onnxgbp.emit import PRIVATE, Emit
from onnxgbp.window import Window

__all__ = ["gate_before_pools", "only_reader"]


def gate_before_pools(op: Emit) -> None:
    """Moves the rule of an activation right before a MaxPool in front of that pool's gradient."""
    for node in list(op.graph.all_nodes()):
        if node.op_type == "MaxPoolGrad" and node.domain == PRIVATE:
            op.scope = (node.name or "").rpartition("/")[0]
            _gate_before(op, node)


def _gate_before(op: Emit, pool: ir.Node) -> None:
    dy, x, y = (value for value in pool.inputs if value is not None)
    geometry: Window = pool.meta["window"]
    apart = all(stride >= reach for stride, reach in zip(geometry.strides, geometry.reach, strict=True))
    relu = only_reader(pool, "Relu")
    gate = only_reader(relu or pool, "Where")
    condition = None
    if gate is not None and _is_gate(gate):
        condition = _asked_of(op, gate.inputs[0], x, y)
    last = gate if condition is not None else relu
    graph = pool.graph
    if last is None or graph is None or (condition is None and not apart):
        op.take()
        return
    own = op.scope
    op.scope = (last.name or "").rpartition("/")[0]  # the activation's, by which a blank map is explained
    if relu is not None and apart:
        dy = op.Relu(dy)
    if condition is not None:
        dy = op.typed(op.Where(condition, dy, op.like(0, dy)), y)
    op.scope = own
    dx = op.private("MaxPoolGrad", dy, x, y, like=x)
    new = dx.producer()
    assert new is not None  # it was made here
    new.meta.update(pool.meta, positive=relu is not None and apart, above_zero=condition is not None and _above(gate))
    if relu is not None and not apart:
        dx = op.Relu(dx)
    graph.insert_before(last, op.take())
    last.outputs[0].replace_all_uses_with(dx, replace_graph_outputs=True)
    for node in (gate, relu, pool):
        if node is not None and not any(value.uses() for value in node.outputs):
            graph.remove(node, safe=True)


def only_reader(node: ir.Node, op_type: str | None = None) -> ir.Node | None:
    """The one node that reads another's result, where nothing else does; of one operator of the standard, if named."""
    value = node.outputs[0]
    readers = [reader for reader, _ in value.uses()]
    if value.is_graph_output() or len(readers) != 1 or readers[0].graph is not node.graph:
        return None
    (reader,) = readers
    return reader if op_type is None or (reader.op_type == op_type and not reader.domain) else None


def _is_gate(node: ir.Node) -> bool:
    """Where(c, dy, 0)."""
    known = constant_value(node.inputs[2])
    return known is not None and known.size == 1 and not known.any()


def _asked_of(op: Emit, condition: ir.Value | None, x: ir.Value, y: ir.Value) -> ir.Value | None:
    """A condition on x, asked of y; None where it is no comparison of x with numbers."""
    node = condition.producer() if condition is not None else None
    if node is None or node.domain:
        return None
    if node.op_type == "And":
        both = [_asked_of(op, value, x, y) for value in node.inputs]
        return None if None in both else op.And(*both)
    bound = constant_value(node.inputs[1]) if node.op_type in ("Greater", "Less") else None
    if bound is None or bound.size != 1 or node.inputs[0] is not x:
        return None
    compare = getattr(op, node.op_type)
    made: ir.Value = compare(y, node.inputs[1])
    return made


def _above(gate: ir.Node | None) -> bool:
    """Whether a gate is closed for all y <= 0."""
    makers = [gate.inputs[0].producer()] if gate is not None and gate.inputs[0] is not None else []
    for node in makers:
        if node is not None and node.op_type == "And":
            makers += [value.producer() for value in node.inputs if value is not None]
        elif node is not None and node.op_type == "Greater":
            bound = constant_value(node.inputs[1])
            if bound is not None and bound.size == 1 and bound.item() >= 0:
                return True
    return False
