"""The builder that every rule writes with: `op.Mul(a, b)`, `op.Conv(x, w, strides=[2, 2])`.

A rule names operators and arguments as the newest standard does. Where an older opset takes an argument as an
attribute instead of an input (`axes`, `pads`, `min`...), the schema tells, and the rule need not know.
Python numbers become constants of the first tensor's type, lists become int64 constants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from onnxgbp.constants import constant_value
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError

__all__ = ["LARGEST_TABLE", "PRIVATE", "Dims", "Emit", "Operand", "dims_of", "is_float", "numel", "shape_text"]

# Calls in this domain live only between differentiation and lowering; `convert` saves none of them.
PRIVATE = "onnxgbp.private"
_CONSTANT = "onnxgbp/constant"
_LONGEST_RANGE = 1 << 20  # a longer one is counted at run time, not stored
# Numbers of the constants that gradients need, one or all of them: 128 MB, several times while they are made.
LARGEST_TABLE = 1 << 24

Operand: TypeAlias = "ir.Value | np.ndarray[Any, Any] | Sequence[int] | float | int | None"
Dims: TypeAlias = "tuple[int | str | None, ...]"

# Arguments that had another name while they were attributes.
_OLD_NAMES = {("Pad", "constant_value"): "value", ("TopK", "K"): "k"}

_BOOL_RESULT = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "IsNaN", "IsInf"}
_INT64_RESULT = {"ArgMax", "ArgMin", "NonZero", "Shape", "Size"}
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def is_float(value: ir.Value) -> bool:
    return value.dtype in _FLOATS


def dims_of(value: ir.Value) -> Dims | None:
    """The dims of a tensor: an int, a symbol, or None where nothing is known. None for an unknown rank."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def shape_text(dims: Sequence[int | str | None]) -> str:
    """Such as [N, 3, ?], for a message."""
    return f"[{', '.join(str(dim or '?') for dim in dims)}]"


def numel(dims: Sequence[int | str | None]) -> int | None:
    """The product of the dims, or None where one of them is free."""
    product = 1
    for dim in dims:
        if not isinstance(dim, int):
            return None
        product *= dim
    return product


@functools.cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        raise OpsetTooLowError(_next_opset(opset)) from None


def _next_opset(opset: int) -> int:
    """Opset 13 has nearly everything a gradient needs; 18 has the rest (`axes` as an input everywhere)."""
    return 13 if opset < 13 else 18 if opset < 18 else opset + 1


def _formal(schema: onnx.defs.OpSchema) -> list[str]:
    return [formal.name for formal in schema.inputs]


def _constant_key(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()


class Emit:
    """Collects new nodes in `nodes`; the caller places them. Constants and names are shared over the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.opset = graph.opset_imports[""]
        self.nodes: list[ir.Node] = []
        self.scope = "onnxgbp"
        self._tables: dict[tuple[str, tuple[int, ...]], int] = {}
        self.sweep = 0  # which of several sweeps through one graph writes, see `differentiate`
        self._ir_version = int(graph.meta["ir_version"])
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._names: set[str | None] = set()
        for scope in (graph, *graph.subgraphs()):
            self._names |= {value.name for node in scope for value in node.outputs}
            self._names |= {value.name for value in scope.inputs} | set(scope.initializers)
            self._names |= {node.name for node in scope}
        self._counts: dict[str, int] = {}
        for name, value in graph.initializers.items():
            if name.startswith(_CONSTANT) and value.const_value is not None:
                self._constants[_constant_key(value.const_value)] = value

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return functools.partial(self._one, op_type)

    def _one(self, op_type: str, *operands: Operand, **arguments: Any) -> ir.Value:
        return self._node("", op_type, operands, arguments, 1).outputs[0]

    def several(self, outputs: int, op_type: str, *operands: Operand, **arguments: Any) -> tuple[ir.Value, ...]:
        """A node with more than one output."""
        return tuple(self._node("", op_type, operands, arguments, outputs).outputs)

    def private(self, op_type: str, *inputs: ir.Value | None, like: ir.Value, **meta: Any) -> ir.Value:
        """A call that a later step of the pipeline replaces; its parameters travel as Python objects in `meta`."""
        node = self._node(PRIVATE, op_type, inputs, {}, 1)
        node.meta.update(meta, sweep=self.sweep)
        return self.typed(node.outputs[0], like)

    def body(self, inputs: Sequence[ir.Value], write: Callable[..., Sequence[ir.Value]]) -> ir.Graph:
        """A sub-graph, for an attribute of If, Loop or Scan: `write` makes its outputs of its inputs.

        What `write` reads from outside is captured, and constants go to the graph itself.
        """
        outer, self.nodes = self.nodes, []
        try:
            # An output is made by a node of the sub-graph, and each by its own.
            outputs = [self.typed(self.Identity(value), value) for value in write(*inputs)]
            name = self.name(f"{self.scope}/body")
            return ir.Graph(inputs, outputs, nodes=self.take(), opset_imports=self.graph.opset_imports, name=name)
        finally:
            self.nodes = outer

    def take(self) -> list[ir.Node]:
        """The nodes emitted since the last call, for the caller to place in the graph."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def name(self, base: str) -> str:
        """A name that neither the source nor an earlier node has."""
        name = base
        while name in self._names:
            self._counts[base] = self._counts.get(base, 0) + 1
            name = f"{base}_{self._counts[base]}"
        self._names.add(name)
        return name

    def constant(self, array: np.ndarray[Any, Any], dtype: ir.DataType | None = None) -> ir.Value:
        """A constant tensor; equal ones are made once."""
        tensor = ir.tensor(array, dtype=dtype)
        key = _constant_key(tensor)
        if key not in self._constants:
            self._constants[key] = self._new_constant(tensor)
        return self._constants[key]

    def int64(self, values: int | Sequence[int]) -> ir.Value:
        """A scalar or a vector of int64."""
        return self.constant(np.array(values, np.int64))

    def like(self, number: float | np.ndarray[Any, Any], tensor: ir.Value) -> ir.Value:
        """A constant of the tensor's type."""
        dtype = tensor.dtype
        assert dtype is not None  # every value has its type before a rule sees it
        return self.constant(np.asarray(number, dtype=dtype.numpy()), dtype)

    def typed(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Notes that a new tensor has the type and the shape of another."""
        value.type, value.shape = like.type, like.shape
        return value

    def cast_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        if value.dtype == like.dtype:
            return value
        assert like.dtype is not None  # every value has its type before a rule sees it
        return self.Cast(value, to=int(like.dtype))

    def shape(self, value: ir.Value) -> ir.Value:
        """The shape as an int64 tensor: a constant where it is static."""
        dims = dims_of(value)
        if dims is not None and numel(dims) is not None:
            return self.constant(np.array(dims, np.int64))
        return self.Shape(value)

    def dim(self, value: ir.Value, axis: int) -> ir.Value:
        """One dim as an int64 tensor of shape [1]."""
        dims = dims_of(value)
        size = dims[axis] if dims is not None else None
        if isinstance(size, int):
            return self.int64([size])
        return self.Gather(self.Shape(value), [axis if axis >= 0 or dims is None else axis + len(dims)], axis=0)

    def reshape_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Reshape to another tensor's shape, with -1 for a free batch where that is enough."""
        dims = dims_of(like)
        if dims is not None and dims_of(value) == dims and None not in dims:
            return value
        return self.typed(self.Reshape(value, self._target(like, dims_of(value))), like)

    def expand_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Broadcast to another tensor's shape. The value has `like`'s rank, 1 or the full size in each dim."""
        dims, own = dims_of(like), dims_of(value)
        target: Operand = self.shape(like)
        if dims is not None and own is not None and len(own) == len(dims):
            free = [i for i, dim in enumerate(dims) if not isinstance(dim, int)]
            # A dim that the value already has in full may stand as 1 in Expand's target.
            if all(dims[i] is not None and own[i] == dims[i] for i in free):
                target = [dim if isinstance(dim, int) else 1 for dim in dims]
        return self.typed(self.Expand(value, target), like)

    def zeros_like(self, like: ir.Value) -> ir.Value:
        return self.typed(self.Expand(self.like(0, like), self.shape(like)), like)

    def sized(self, *shape: int) -> tuple[int, ...]:
        """The shape of a constant that the gradient needs, where it is one that can be made.

        Raises:
            OnnxgbpError: a file asks for a window or a length that no memory holds.
        """
        if math.prod(shape) > LARGEST_TABLE:
            raise OnnxgbpError(
                f"the gradient at '{self.scope.removeprefix('gradient/')}' takes a table of "
                f"{' x '.join(map(str, shape))} numbers, more than {LARGEST_TABLE}: explain a tensor before that node "
                "with --output, or attribute to one behind it with --wrt"
            )
        # Once for each place: of the sweeps of several classes all make the same.
        self._tables[self.scope, shape] = math.prod(shape)
        if sum(self._tables.values()) > LARGEST_TABLE:
            raise OnnxgbpError(
                f"the gradient takes tables of more than {LARGEST_TABLE} numbers in all, the last of them at "
                f"'{self.scope.removeprefix('gradient/')}': explain a tensor before that node with --output, or "
                "attribute to one behind it with --wrt"
            )
        return shape

    def positions(self, like: ir.Value, axis: int) -> ir.Value:
        """0, 1, 2... along one axis of a tensor, int64, ready to broadcast against it."""
        dims = dims_of(like) or ()
        shape, size = [-1 if i == axis else 1 for i in range(len(dims))], dims[axis]
        if isinstance(size, int) and size <= _LONGEST_RANGE:
            return self.constant(np.arange(size, dtype=np.int64).reshape(shape))
        limit = self.Reshape(self.dim(like, axis), self.int64([]))  # a scalar, as Range wants it
        return self.Reshape(self.Range(self.int64(0), limit, self.int64(1)), shape)

    def claim(self, name: str) -> str:
        """Frees a name that the product promises: an inner tensor of the source that has it is renamed."""
        for value in (*self.graph.inputs, *self.graph.outputs):
            if value.name == name:
                raise OnnxgbpError(
                    f"the model has an input or output called '{name}' already, a name that a converted file needs"
                )
        for value in (*self.graph.initializers.values(), *(v for node in self.graph for v in node.outputs)):
            if value.name == name:
                value.name = self.name(f"{name}/source")
        self._names.add(name)
        return name

    def vector(self, *parts: ir.Value | int) -> ir.Value:
        """An int64 vector of numbers and of int64 tensors of shape [1], a constant where all are numbers."""
        if all(isinstance(part, int) for part in parts):
            return self.int64([part for part in parts if isinstance(part, int)])
        return self.Concat(*(self.int64([part]) if isinstance(part, int) else part for part in parts), axis=0)

    def not_negative(self, number: ir.Value) -> ir.Value:
        """Max with 0, of int64; Max itself takes no integers before opset 12."""
        return self.Where(self.Less(number, self.int64(0)), self.int64([0]), number)

    def is_zero(self, value: ir.Value) -> ir.Value:
        """Elementwise x == 0; Equal takes no floats before opset 11."""
        return self.Not(self.Cast(value, to=int(ir.DataType.BOOL)))

    def _target(self, like: ir.Value, own: Dims | None) -> Operand:
        dims = dims_of(like)
        if dims and own and isinstance(dims[0], str) and dims[0] == own[0] and numel(dims[1:]):
            # 0 copies the batch; behind -1 a runtime no longer knows that it is the same.
            return [0, *(dim for dim in dims[1:] if isinstance(dim, int))]
        if dims is None or 0 in dims or sum(not isinstance(dim, int) for dim in dims) > 1:
            return self.Shape(like)
        return [dim if isinstance(dim, int) else -1 for dim in dims]

    def _new_constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        value: ir.Value = ir.val(self.name(_CONSTANT), dtype=tensor.dtype, shape=list(tensor.shape.numpy()))
        value.const_value = tensor
        if self._ir_version >= 4:
            self.graph.register_initializer(value)
            return value
        # Up to IR 3 each initializer must also be a graph input, and the inputs are to stay the source's.
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value], name=value.name)
        self.graph.insert_before(self.graph[0], node)
        return value

    def _node(
        self, domain: str, op_type: str, operands: Sequence[Operand], arguments: dict[str, Any], outputs: int
    ) -> ir.Node:
        first = next((o for o in operands if isinstance(o, ir.Value)), None)
        inputs = [self._operand(operand, first) for operand in operands]
        attributes = {}
        for name, argument in arguments.items():
            if argument is None:
                continue
            schema = _schema(op_type, self.opset)
            name = _OLD_NAMES.get((op_type, name), name) if name not in _formal(schema) else name
            if name in schema.attributes:
                if isinstance(argument, ir.Value):
                    known = constant_value(argument)
                    if known is None:
                        raise OpsetTooLowError(_next_opset(self.opset))
                    argument = (
                        known.item()
                        if schema.attributes[name].type == onnx.defs.OpSchema.AttrType.INT
                        else known.tolist()
                    )
                attributes[name] = argument
                continue
            if name not in _formal(schema):
                raise OpsetTooLowError(_next_opset(self.opset))
            position = _formal(schema).index(name)
            inputs += [None] * (position + 1 - len(inputs))
            inputs[position] = self._operand(argument, first)
        if not domain:
            _schema(op_type, self.opset)
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        node.name = self.name(f"{self.scope}/{op_type}")
        for value in node.outputs:
            value.name = node.name if outputs == 1 else self.name(f"{node.name}/{value.index()}")
            value.type = ir.TensorType(_result_dtype(op_type, node, arguments))
        if op_type == "Relu" or (op_type == "Neg" and first is not None):
            node.outputs[0].shape = node.inputs[0].shape if node.inputs[0] is not None else None
        self.nodes.append(node)
        return node

    def _operand(self, operand: Operand, first: ir.Value | None) -> ir.Value | None:
        if operand is None or isinstance(operand, ir.Value):
            return operand
        if isinstance(operand, np.ndarray):
            return self.constant(operand)
        if isinstance(operand, Sequence):
            return self.int64(operand)
        assert first is not None  # a rule combines a number with a tensor
        return self.like(operand, first)


def _result_dtype(op_type: str, node: ir.Node, arguments: dict[str, Any]) -> ir.DataType:
    if op_type in _BOOL_RESULT:
        return ir.DataType.BOOL
    if op_type in _INT64_RESULT:
        return ir.DataType.INT64
    if op_type == "Cast":
        return ir.DataType(arguments["to"])
    source = node.inputs[1 if op_type == "Where" else 0]
    assert source is not None, f"{op_type} has no first input"
    assert source.dtype is not None, f"{op_type} has an untyped first input"
    return source.dtype
