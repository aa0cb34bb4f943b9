"""The type and shape of every tensor, computed afresh: what a file says of its inner tensors is never trusted.

A free dim is tried with two sizes that it would not have by chance. A dim that comes out the same both times is static;
one that follows an input's free dim carries its symbol; any other gets a symbol of its own, the same for the same pair
of sizes. So shapes that are computed from `Shape` nodes, as exporters write them for a free batch, are known as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from onnxgbp.branches import loop_states
from onnxgbp.constants import FOLDABLE, SMALL, Folding, evaluate, is_constant
from onnxgbp.step import Step
from onnxgbp.vjps import svm

__all__ = ["infer_shapes"]

Types: TypeAlias = dict[str, onnx.TypeProto]

_Probes: TypeAlias = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

# Pairs of prime sizes, each for the batch axis and for any other: far apart, so that no clamp hides in between.
# The second pair is for a length that a table of positions bounds.
_PROBES: tuple[_Probes, ...] = (
    (((3, 5, 7, 11), (211, 223, 227, 229)), ((1009, 1013, 1019, 1021), (401, 409, 419, 421))),
    (((3, 5, 7, 11), (5, 7, 11, 13)), ((1009, 1013, 1019, 1021), (17, 19, 23, 29))),
)


def infer_shapes(model: ir.Model) -> None:
    """Sets the type and shape of every tensor of the graph; a rank that cannot be told leaves `value.shape` None."""
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        value.meta.setdefault("declared", (value.type, value.shape))  # what the converted file shall say again
    free = _name_free_dims(graph)
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
    nodes = [_Node(node) for node in graph]
    made = [value for node in graph for value in node.outputs if value.name]
    runs = []
    for probes, cut in itertools.product(_PROBES, (1, 0)) if free else [(_PROBES[0], 0)]:
        runs.append(_Run(graph, nodes, free, probes, cut))
        if not runs[-1].gaps(made):
            break
    best = min(runs, key=lambda run: run.gaps(made))
    # Where neither sizes nor others can be taken, symbols still tell ranks.
    symbolic = _propagate(graph, nodes, {}, 0)[0] if best.gaps(made) and free else {}
    for value in made:
        name = value.name or ""
        a, b = (types.get(name) for types in best.types)
        if a is None or b is None:
            a = b = symbolic.get(name)
        if a is None or b is None or not a.HasField("tensor_type"):  # ZipMap gives a list of maps
            if not value.is_graph_output():  # an output keeps what the file says, the best there is
                value.type = value.shape = None
            continue
        value.type = ir.serde.deserialize_type_proto_for_type(a)
        one, two = (ir.serde.deserialize_type_proto_for_shape(t) for t in (a, b))
        value.shape = _merge(one, two, best.symbols)
        constants = [known[name].raw_data if name in known else b"" for known in best.known]
        if constants[0] and constants[0] == constants[1]:
            value.meta["constant"] = onnx.numpy_helper.to_array(best.known[0][name])  # what `constant_value` will find


class _Run:
    """The types and the known small tensors under two choices of sizes for the free dims.

    cut: by how much the second makes shorter what is sliced off a free dim by fixed numbers: the input may be shorter
    than they say. With 0 it is believed to be longer, as what is behind it may need.
    """

    def __init__(self, graph: ir.Graph, nodes: list[_Node], free: dict[str, int], probes: _Probes, cut: int) -> None:
        sizes = [{name: _prime(n, axis, probe) for n, (name, axis) in enumerate(free.items())} for probe in probes]
        choices = list(zip(sizes, (0, cut), strict=True)) if free else [(sizes[0], 0)]
        results = [_propagate(graph, nodes, chosen, less) for chosen, less in choices]
        self.types = (results[0][0], results[-1][0])
        self.known = (results[0][1], results[-1][1])
        self.symbols = {(sizes[0][name], sizes[1][name]): name for name in free}

    def gaps(self, made: list[ir.Value]) -> int:
        """How many tensors the model cannot make with these sizes."""
        return sum(any(value.name not in types for types in self.types) for value in made)


# Operators for which onnx infers no shape: theirs is that of the first input.
_UNKNOWN_TO_ONNX = frozenset({"GroupNormalization", "MeanVarianceNormalization", "Normalizer", "Scaler"})

# Operators of opset 12 to 15 without inference of their own, and one that has the same.
_TWINS = {"GreaterOrEqual": "Greater", "LessOrEqual": "Less"}

_LONGEST = 1 << 60  # numbers of an array, even one that takes no memory, as numpy counts them

_POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})


@dataclasses.dataclass
class _Node:
    """A node with its schema, serialised once for all probes."""

    node: ir.Node

    def __post_init__(self) -> None:
        graph = self.node.graph
        assert graph is not None  # it came out of one
        self.proto = ir.serde.serialize_node(self.node)
        self.proto.op_type = _TWINS.get(self.node.op_type, self.node.op_type)
        self.opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
        self.whole_scope = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in self.proto.attribute)
        try:
            version = graph.opset_imports.get(self.node.domain, 1)
            self.schema: onnx.defs.OpSchema | None = onnx.defs.get_schema(self.proto.op_type, version, self.node.domain)
        except onnx.defs.SchemaError:
            self.schema = None


def _name_free_dims(graph: ir.Graph) -> dict[str, int]:
    """Exporters write a free dim as a name, 0, -1, '?' or nothing: each gets a symbol. Returns symbol -> first axis."""
    free: dict[str, int] = {}
    for number, value in enumerate(graph.inputs):
        if value.shape is None or value.is_initializer():
            continue
        dims: list[int | str] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int) and dim > 0:
                dims.append(dim)
                continue
            symbol = None if isinstance(dim, int) or dim.value in ("", "?", "-1") else dim.value
            dims.append(symbol or f"free_{number}_{axis}")
            free.setdefault(str(dims[-1]), axis)
        value.shape = ir.Shape(dims)
    return free


def _prime(number: int, axis: int, probe: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    sizes = probe[0 if axis == 0 else 1]
    # Beyond four free dims, odd sizes go on from the last: unlikely enough to meet by chance.
    return sizes[number] if number < len(sizes) else sizes[-1] + 2 * (number - len(sizes) + 1)


def _propagate(
    graph: ir.Graph, nodes: list[_Node], sizes: dict[str, int], cut: int
) -> tuple[Types, dict[str, onnx.TensorProto]]:
    """The types under one choice of sizes, and the small tensors that follow from the shapes alone."""
    types: Types = {}
    known: dict[str, onnx.TensorProto] = {}
    folding = Folding()
    for value in graph.inputs:
        if value.type is None:
            continue
        dims: list[int | str | None] | None = None
        if value.shape is not None:
            dims = [d if isinstance(d, int) else sizes.get(str(d.value), str(d.value)) for d in value.shape]
        types[value.name or ""] = onnx.helper.make_tensor_type_proto(int(value.type.dtype), dims)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        types[name] = onnx.helper.make_tensor_type_proto(int(tensor.dtype), list(tensor.shape.numpy()))
        if tensor.size <= SMALL and is_constant(value):
            known[name] = ir.serde.serialize_tensor(tensor)
    for entry in nodes:
        if entry.schema is None:
            continue
        inputs = [name for name in entry.proto.input if name]
        if any(name not in types for name in inputs):
            continue
        scope = types if entry.whole_scope else {name: types[name] for name in inputs}
        data = {name: known[name] for name in inputs if name in known}
        try:
            outputs = onnx.shape_inference.infer_node_outputs(
                entry.schema, entry.proto, scope, data, opset_imports=entry.opsets, ir_version=8
            )
        except Exception:  # noqa: BLE001, S112 - inference raises many kinds; the tensors behind the node are then not known
            continue
        for made in outputs.values():  # of a kernel larger than its input; onnx ends the process when it slices those
            for dim in made.tensor_type.shape.dim:
                if dim.dim_value < 0:
                    dim.Clear()
        types.update(outputs)
        if entry.proto.op_type == "Loop":
            types.update(loop_states(entry.proto, types, entry.opsets))
        if entry.node.op_type in _UNKNOWN_TO_ONNX:
            types[entry.proto.output[0]] = types[inputs[0]]
        if entry.node.op_type == "MaxUnpool" and len(inputs) == 3:
            _unpooled(entry, types, known)
        if entry.node.op_type in _SCORES:
            _scored(entry, types)
        if entry.node.op_type in _POOLS:
            _drop_outer_windows(entry, types)
        if entry.node.op_type == "Slice" and cut:
            _shorten(entry, types, known, sizes.values(), cut)
        _compute(entry, types, known, folding)
    return types, known


# Operators of ai.onnx.ml whose last output has one row of scores per sample -> how many.
_SCORES: dict[str, Callable[[Step], int]] = {
    "LinearRegressor": lambda step: int(step.argument("targets")),
    "SVMClassifier": svm.columns,
    "SVMRegressor": lambda _: 1,
}


def _scored(entry: _Node, types: Types) -> None:
    x, columns = types[entry.proto.input[0]].tensor_type, _SCORES[entry.node.op_type](Step(entry.node))
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in x.shape.dim]
    if dims:
        made = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [*dims[:-1], columns])
        types[entry.proto.output[-1]] = made


def _unpooled(entry: _Node, types: Types, known: dict[str, onnx.TensorProto]) -> None:
    """A MaxUnpool whose shape is given, for which onnx infers none."""
    x, shape = types[entry.proto.input[0]].tensor_type, known.get(entry.proto.input[2])
    rank = len(x.shape.dim) if x.HasField("shape") else None
    dims = [None] * rank if shape is None and rank else onnx.numpy_helper.to_array(shape).tolist() if shape else None
    types[entry.proto.output[0]] = onnx.helper.make_tensor_type_proto(x.elem_type, dims)


def _shorten(entry: _Node, types: Types, known: dict[str, onnx.TensorProto], free: Collection[int], cut: int) -> None:
    """Of x[:, :100], where the axis is free, no more than 100 is known."""
    step, data = Step(entry.node), types[entry.proto.input[0]].tensor_type.shape.dim
    starts, ends, axes = (_integers(step, name, known) for name in ("starts", "ends", "axes"))
    made = types[entry.proto.output[0]].tensor_type.shape.dim
    if starts is None or ends is None or len(made) != len(data):
        return
    for start, end, axis in zip(starts, ends, axes if axes is not None else range(len(starts)), strict=False):
        size, out = data[axis].dim_value, made[axis]
        if size in free and 1 < out.dim_value < size and (0 <= start < end < size or (start < 0 and end >= size)):
            out.dim_value -= cut


def _integers(step: Step, name: str, known: dict[str, onnx.TensorProto]) -> list[int] | None:
    """An argument by its name, whether it is an attribute or an input; None where it is not known."""
    value = step.tensor(name)
    if value is None:
        return step.ints(name)
    return onnx.numpy_helper.to_array(known[value.name or ""]).ravel().tolist() if value.name in known else None


def _drop_outer_windows(entry: _Node, types: Types) -> None:
    """Before opset 22 onnx counts a last window that starts in the end padding; the standard and runtimes do not."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in entry.proto.attribute}
    if not attributes.get("ceil_mode") or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return
    x, rank = types[entry.proto.input[0]].tensor_type.shape.dim, len(attributes["kernel_shape"])
    strides = attributes.get("strides", [1] * rank)
    begins = attributes.get("pads", [0] * rank * 2)[:rank]
    for name in entry.proto.output:
        for axis, dim in enumerate(types[name].tensor_type.shape.dim[2:] if name else []):
            size = x[axis + 2]
            if size.HasField("dim_value") and dim.HasField("dim_value"):
                outer = (dim.dim_value - 1) * strides[axis] >= size.dim_value + begins[axis]
                dim.dim_value -= outer
                entry.node.meta["outer_windows"] = outer or entry.node.meta.get("outer_windows", False)


def _compute(entry: _Node, types: Types, known: dict[str, onnx.TensorProto], folding: Folding) -> None:
    """Keeps the value of a node that tells a shape: from known values, or `Shape` of a known shape."""
    node = entry.proto
    if node.op_type == "Constant" and not node.domain:
        tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        if tensor is None:
            known.update(_values(entry, {}))
        elif math.prod(tensor.dims) <= SMALL:
            known[node.output[0]] = tensor
        return
    if node.domain or node.op_type not in FOLDABLE or not node.output:
        return
    result = types.get(node.output[0])
    dims = result.tensor_type.shape.dim if result is not None else []
    if (
        result is None
        or any(not dim.HasField("dim_value") for dim in dims)
        or (node.op_type not in ("Shape", "Size") and any(name not in known for name in node.input if name))
        or not folding.allows([dim.dim_value for dim in dims])
    ):
        return
    if node.op_type in ("Shape", "Size"):
        shape = [
            dim.dim_value if dim.HasField("dim_value") else None for dim in types[node.input[0]].tensor_type.shape.dim
        ]
        sizes = [int(d) for d in shape if d is not None]
        if len(sizes) == len(shape) and math.prod(sizes) < _LONGEST:
            known.update(_values(entry, {node.input[0]: np.broadcast_to(np.float32(0), sizes)}))
        return
    known.update(_values(entry, {name: onnx.numpy_helper.to_array(known[name]) for name in node.input if name}))


def _values(entry: _Node, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, onnx.TensorProto]:
    opset = next(opset.version for opset in entry.opsets if opset.domain == "")
    outputs = evaluate(entry.proto, opset, arrays)
    return {
        name: onnx.numpy_helper.from_array(out, name) for name, out in zip(entry.proto.output, outputs, strict=False)
    }


def _merge(a: ir.Shape | None, b: ir.Shape | None, symbols: dict[tuple[int, int], str]) -> ir.Shape | None:
    if a is None or b is None or len(a) != len(b):
        return None
    names = set(symbols.values())
    dims: list[int | str | None] = []
    for one, other in zip(a, b, strict=True):
        if isinstance(one, int) and isinstance(other, int):
            dims.append(one if one == other else symbols.get((one, other), f"{one}|{other}"))
        else:  # from the symbolic run: a symbol of the inputs', or one that onnx made up
            symbol = None if isinstance(one, int) else one.value
            dims.append(symbol if symbol in names else None)
    return ir.Shape(dims)
