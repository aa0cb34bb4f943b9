"""Finds the activations of a graph in every spelling: as one operator, or as a group of elementwise ones.

A group is recognised by what it computes, not by how it is written: from each elementwise node the walk goes back to
the one tensor x that all its operands come from, evaluates the function from x to y on a grid in float64, and
compares it with the known activations. So Max(x, 0), Mul(x, Sigmoid(x)), both forms of GELU, Clip-and-Div forms of
HardSwish, or an ELU made of Where and Exp need no pattern each. The forward graph is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS, Activation
from onnxgbp.constants import constant_value, uniform_value
from onnxgbp.emit import dims_of, is_float
from onnxgbp.formulas import GRID, known_function
from onnxgbp.quantisation import hidden_relu
from onnxgbp.step import Step

__all__ = ["recognise"]

Array: TypeAlias = npt.NDArray[np.float64]

# Arguments that the derivative of a one-operator activation needs, by their names in the standard.
_ARGUMENTS = {
    "Celu": ("alpha",),
    "Clip": ("min", "max"),
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "PRelu": (),
    "Selu": ("alpha", "gamma"),
    "Shrink": ("lambd",),
    "Swish": ("alpha",),
    "ThresholdedRelu": ("alpha",),
}
_ELEMENTWISE = frozenset(
    "Abs Add And Cast Clip Div Elu Equal Erf Exp Floor Greater GreaterOrEqual HardSigmoid Identity IsNaN "
    "LeakyRelu Less LessOrEqual Log Max Min Mul Neg Not Or Pow Reciprocal Relu Selu Sigmoid Sign Softplus "
    "Softsign Sqrt Sub Tanh Where".split()
)
_COMPARES = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
# No activation is made of these alone, so that a long chain of them is not tried link by link.
_RATIONAL = frozenset("Add Cast Div Identity Mul Neg Reciprocal Sub".split())
_REPEATING = 2  # nodes that together may do nothing but repeat x, as -(-x)
_GATES = frozenset({"Sigmoid", "HardSigmoid", "Tanh"})
_TRANSPARENT = frozenset(
    "Cast DequantizeLinear Expand Flatten Identity QuantizeLinear Reshape Squeeze Transpose Unsqueeze".split()
)
_LONGEST = 24  # nodes in a group; torch's tanh form of GELU has 8, a guarded Softplus 9
_FLOAT_MAX = 3.0e38  # Clip before opset 11 says "no bound" with the largest float


def recognise(graph: ir.Graph) -> dict[ir.Node, Activation]:
    """The activations of a graph, keyed by the node that makes y."""
    order = {node: index for index, node in enumerate(graph)}
    found: dict[ir.Node, Activation] = {}
    inside: set[ir.Node] = set()
    for node in reversed(graph):  # from the end, so that the whole of a group is met before its parts
        if node in inside:
            continue
        activation, group = _single(node), {node}
        if activation is None:
            activation, group = _keras_prelu(node) or _where_prelu(node) or _group(node, order) or (None, set())
        if activation is not None:
            found[node] = activation
            inside |= _hidden(node, group)
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _single(node: ir.Node) -> Activation | None:
    if (quantiser := hidden_relu(node)) is not None:
        spelled = "QuantizeLinear DequantizeLinear (zero point)"
        top = {"max": quantiser.high + quantiser.scale / 2}  # up to there x rounds into the range
        return _activation("QuantizedRelu", node, Step(node).x, top, spelled)
    if node.domain or node.op_type not in ACTIVATIONS:
        return None
    step, kind = Step(node), node.op_type
    if not is_float(step.y):
        return None  # a Clip of integers
    arguments: dict[str, Any] = {}
    for name in _ARGUMENTS.get(kind, ()):
        given = step.tensor(name)
        known = constant_value(given)
        arguments[name] = given if given is not None and known is None else step.argument(name)
        if isinstance(arguments[name], np.ndarray) and arguments[name].size != 1:
            raise step.refuse(f"its argument '{name}' is no single number")
        if isinstance(arguments[name], np.ndarray):  # a bound of shape [1], which some exporters write
            arguments[name] = arguments[name].item()
    if kind == "PRelu":
        arguments["slope"] = step.input(1)
    if kind == "Gelu" and step.argument("approximate") == "tanh":
        kind = "GeluTanh"
    if kind == "Clip":
        kind, arguments = _name_clip(arguments)
        if not arguments:
            return None  # no bound: the identity
    return _activation(kind, node, step.x, arguments, node.op_type)


def _name_clip(bounds: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which Clip is a ReLU, which a ReLU6, and which bounds are none at all."""
    bounds = {
        name: bound
        for name, bound in bounds.items()
        if bound is not None and (isinstance(bound, ir.Value) or abs(bound) < _FLOAT_MAX)
    }
    # ir.Value compares by identity, so these are true for numbers alone.
    if bounds == {"min": 0.0}:
        return "Relu", bounds
    return ("Relu6" if bounds == {"min": 0.0, "max": 6.0} else "Clip"), bounds


def _activation(kind: str, node: ir.Node, x: ir.Value, arguments: dict[str, Any], spelled: str) -> Activation:
    between_0_and_1 = kind == "Clip" and arguments == {"min": 0.0, "max": 1.0}  # a HardSigmoid's second half
    gate = _gate(node.outputs[0]) if kind in _GATES or between_0_and_1 else None
    if node.op_type in ("Clip", "Max") and _under_root(node.outputs[0]):
        gate = "it only keeps what stands under a root from being negative"
    return Activation(kind, node, x, node.outputs[0], arguments, spelled, gate)


def _gate(y: ir.Value) -> str | None:
    """Why y is a gate: it multiplies another tensor (squeeze-and-excitation, attention, a recurrent cell)."""
    for user in y.consumers():
        if user.domain == "" and user.op_type == "Mul":
            other = user.inputs[1] if user.inputs[0] is y else user.inputs[0]
            if other is not y and constant_value(other) is None and other is not None and not other.is_initializer():
                return f"it multiplies tensor '{other.name}'"
        elif user.domain == "" and user.op_type in _TRANSPARENT and (reason := _gate(user.outputs[0])):
            return reason
    return None


def _under_root(y: ir.Value) -> bool:
    """Whether y serves a square root alone, as the clamp of a variance does in a normalisation written in parts."""
    users = y.consumers()
    for user in users:
        constants = [value for v in user.inputs if (value := constant_value(v)) is not None]
        root = user.op_type == "Sqrt" or (user.op_type == "Pow" and any(np.all(np.abs(c) == 0.5) for c in constants))
        if not root and not (user.op_type == "Add" and constants and _under_root(user.outputs[0])):
            return False
    return bool(users)


def _hidden(root: ir.Node, group: set[ir.Node]) -> set[ir.Node]:
    """The nodes of a group that serve nothing but it. Others stay activations of their own for their other readers."""
    return {
        node
        for node in group - {root}
        if not any(value.is_graph_output() for value in node.outputs)
        and all(user in group for value in node.outputs for user in value.consumers())
    }


def _keras_prelu(node: ir.Node) -> tuple[Activation, set[ir.Node]] | None:
    """Relu(x) + s * Relu(-x), the PReLU that Keras writes with a slope -s per channel."""
    if node.op_type != "Add" or node.domain or len(node.inputs) != 2:
        return None
    for positive, negative in (node.inputs, reversed(list(node.inputs))):
        relu, product = _made_by(positive, "Relu"), _made_by(negative, "Mul")
        if relu is None or product is None:
            continue
        for slope, rest in (product.inputs, reversed(list(product.inputs))):
            mirrored = _made_by(rest, "Relu")
            negation = _made_by(mirrored.inputs[0], "Neg") if mirrored else None
            x = relu.inputs[0]
            if negation is None or mirrored is None or x is None or slope is None or negation.inputs[0] is not x:
                continue
            activation = _activation("PRelu", node, x, {"slope": slope, "negated": True}, "Relu(x) + s Relu(-x)")
            return activation, {node, relu, product, mirrored, negation}
    return None


def _where_prelu(node: ir.Node) -> tuple[Activation, set[ir.Node]] | None:
    """Where(x > 0, x, s * x), a PReLU with a slope per channel; one with a single slope is found by its values."""
    compare = _made_by(node.inputs[0], "Greater") or _made_by(node.inputs[0], "GreaterOrEqual") if node.inputs else None
    if node.op_type != "Where" or node.domain or compare is None:
        return None
    x, product = node.inputs[1], _made_by(node.inputs[2], "Mul")
    zero = constant_value(compare.inputs[1])
    if product is None or x is None or compare.inputs[0] is not x or zero is None or np.any(zero):
        return None
    for slope, rest in (product.inputs, reversed(list(product.inputs))):
        if rest is not x or slope is None:
            continue
        known = constant_value(slope)
        if (known is not None and known.size > 1) or (known is None and slope.is_initializer()):
            activation = _activation("PRelu", node, x, {"slope": slope}, "Where(x > 0, x, s x)")
            return activation, {node, compare, product}
    return None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and not producer.domain and producer.op_type == op_type else None


def _group(root: ir.Node, order: dict[ir.Node, int]) -> tuple[Activation, set[ir.Node]] | None:
    if root.domain or root.op_type not in _ELEMENTWISE or not is_float(root.outputs[0]):
        return None
    found: tuple[Activation, set[ir.Node]] | None = None
    for x, group in _entries(root, order):
        match = _match(root, x, group, order)
        if match is None or (found is not None and match[0] not in ("Clip", "Relu6")):
            continue
        kind, arguments = match
        if kind == "Identity":
            return None  # no part of the activation before it, but one of those that read it
        if kind == "Clip" and arguments["min"] != 0 and any(_is_relu(node, order) for node in group - {root}):
            continue  # -Relu(-x) is min(x, 0), and yet a ReLU, which meets the gradient with the other sign
        spelled = " ".join(node.op_type for node in sorted(group, key=order.__getitem__))
        found = _activation(kind, root, x, arguments, spelled), group
        if kind not in ("Clip", "Relu", "Relu6"):
            break  # the nearest counts, so that no linear step before it is swallowed
        # A bound may have its other half further back: Min(Max(x, 0), 6) is a ReLU6, not a Clip of a ReLU.
    return found


def _is_relu(node: ir.Node, order: dict[ir.Node, int]) -> bool:
    found = _single(node) or (_group(node, order) or (None, set()))[0]
    return found is not None and found.kind == "Relu"


def _entries(root: ir.Node, order: dict[ir.Node, int]) -> Iterator[tuple[ir.Value, set[ir.Node]]]:
    """The tensors that all operands of root come from, nearest first, each with the elementwise nodes between."""
    group: set[ir.Node] = set()
    frontier, whole = [root.outputs[0]], True  # whole: no operand but x and single numbers
    while len(group) < _LONGEST:
        latest = max(frontier, key=lambda value: _index(value, order))
        node = latest.producer()
        if node is None or node not in order:
            return  # an input, or what a body captures from outside
        if node.domain or node.op_type not in _ELEMENTWISE or len(node.outputs) != 1:
            return
        group.add(node)
        frontier.remove(latest)
        for source in node.inputs:
            if source is None or source in frontier:
                continue
            constant = constant_value(source)
            if constant is not None and constant.size == 1:
                continue
            if uniform_value(source) is not None:
                whole = False  # a tensor of one number, which could spread x to a larger shape
            elif constant is not None or source.is_initializer():
                return  # no scalar function of x
            else:
                frontier.append(source)
        if not frontier:
            return
        x, y = frontier[0], root.outputs[0]
        alike = is_float(x) and x.dtype == y.dtype  # a derivative combines x and y
        # Short ones are asked whether they do anything at all.
        worth = len(group) <= _REPEATING or not _RATIONAL.issuperset(node.op_type for node in group)
        if worth and len(frontier) == 1 and alike and (whole or (dims_of(x) is not None and dims_of(x) == dims_of(y))):
            yield x, set(group)


def _index(value: ir.Value, order: dict[ir.Node, int]) -> int:
    producer = value.producer()
    return order.get(producer, -1) if producer is not None else -1


def _match(
    root: ir.Node, x: ir.Value, group: set[ir.Node], order: dict[ir.Node, int]
) -> tuple[str, dict[str, Any]] | None:
    evaluate = _function(root, x, sorted(group, key=order.__getitem__))
    points = np.concatenate([GRID, _jumps(group)])
    y = evaluate(points)
    return known_function(points, y, _tolerance(x)) if y is not None and y.shape == points.shape else None


def _jumps(group: set[ir.Node]) -> Array:
    """Where the function may jump, and right beside: at what x is compared with, or at its negative."""
    compared = [source for node in group if node.op_type in _COMPARES for source in node.inputs]
    bounds = {abs(float(value)) for source in compared if (value := uniform_value(source)) is not None}
    ends = np.array(sorted(bound for bound in bounds if 0 < bound < 9))
    beside = np.concatenate([np.nextafter(ends, 0), ends, np.nextafter(ends, np.inf)])
    return np.concatenate([-beside, beside])


def _tolerance(x: ir.Value) -> float:
    """What rounding the constants to the model's type costs; the two forms of GELU differ by 4.7e-4."""
    return {ir.DataType.FLOAT16: 2e-4, ir.DataType.BFLOAT16: 2e-3}.get(x.dtype or ir.DataType.FLOAT, 1e-6)


def _function(root: ir.Node, x: ir.Value, group: list[ir.Node]) -> Callable[[Array], Array | None]:
    """The group as a numpy function in float64."""
    graph = root.graph
    assert graph is not None  # a forward node stands in a graph
    nodes, constants = [], {}
    for node in group:
        proto = ir.to_proto(node)
        for attribute in proto.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and is_float(node.outputs[0]):
                attribute.i = onnx.TensorProto.DOUBLE
        nodes.append(proto)
        for source in node.inputs:
            value = uniform_value(source)
            if source is not None and value is not None and source is not x:
                wide = value.astype(np.float64) if is_float(source) else value
                constants[source.name or ""] = onnx.numpy_helper.from_array(wide.reshape(()), source.name)
    inner = onnx.helper.make_graph(
        nodes,
        "group",
        [onnx.helper.make_tensor_value_info(x.name or "", onnx.TensorProto.DOUBLE, ["n"])],
        [onnx.helper.make_tensor_value_info(root.outputs[0].name or "", onnx.TensorProto.DOUBLE, ["n"])],
        list(constants.values()),
    )
    opsets = [onnx.helper.make_opsetid("", graph.opset_imports[""])]
    model = onnx.helper.make_model(inner, opset_imports=opsets)

    def evaluate(points: Array) -> Array | None:
        from onnx.reference import ReferenceEvaluator  # 400 modules: only where something is computed

        try:
            with np.errstate(all="ignore"):
                outputs: Any = ReferenceEvaluator(model).run(None, {x.name or "": points})
                return np.asarray(outputs[0], np.float64)
        except Exception:  # noqa: BLE001 - whatever the evaluator cannot run is not one of the known activations
            return None

    return evaluate
