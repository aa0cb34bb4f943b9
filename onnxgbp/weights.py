"""Weights that can be changed from one run to the next: the same model, with its layers' weights as inputs.

Nothing of the gradient can then have been computed from the old ones before the run, and no model is converted or
loaded again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgbp.branches import captured
from onnxgbp.compare import extract
from onnxgbp.differentiate import find_path
from onnxgbp.emit import is_float
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explained import explained_tensor
from onnxgbp.inputs import attributed
from onnxgbp.metadata import refuse_converted
from onnxgbp.model import Source, to_proto
from onnxgbp.session import open_session
from onnxgbp.step import label

__all__ = ["Layer", "Opened", "open_weights", "random_weights"]

Array: TypeAlias = npt.NDArray[Any]

# What an operator learns, by the places of its inputs; its own bias included.
_LEARNED = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": (0, 1),
    "GRU": (1, 2, 3),
    "Gemm": (0, 1, 2),
    "LSTM": (1, 2, 3),
    "MatMul": (0, 1),
    "RNN": (1, 2, 3),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A node with weights. weights: the trained ones, by the name of the input that takes their place."""

    name: str
    operator: str
    weights: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose weights are inputs, and are to be fed.

    layers: from the scores down to the input. wrt: what is attributed to. kept: what else on the way holds numbers
    that were learned, and keeps them, as operators and how many there are of each.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    wrt: tuple[str, ...]
    kept: dict[str, int]


def open_weights(source: Source, output: str | None = None) -> Opened:
    """The weights and biases of the Conv, Gemm, MatMul and the like that the scores depend on become inputs.

    A weight that is computed from constants (transposed, dequantised) is taken as the layer reads it. What two layers
    share belongs to the one nearer to the scores.

    Args:
        source: a classifier; it is not changed.
        output: the tensor to explain, as for `convert`.

    Raises:
        OnnxgbpError: no such tensor, an already converted file, or a model without such layers.
    """
    refuse_converted(source)
    model = source.model.clone()
    graph = model.graph
    inputs = attributed(graph, (), output).tensors
    path = find_path(graph, explained_tensor(graph, inputs, output).tensor, inputs)
    varying = _varying(graph)
    found = list[tuple[ir.Node, list[ir.Value]]]()
    taken = set[ir.Value]()
    for node in reversed(path):
        learned = [value for value in _learned(node) if value not in varying and value not in taken]
        if learned:
            taken.update(learned)
            found.append((node, learned))
    if not found:
        raise OnnxgbpError(
            f"{source.name} has no layer with weights between its input and its scores: looked for "
            f"{', '.join(sorted(_LEARNED))}"
        )
    kept: dict[str, int] = {}
    for node in path:
        others = [value for value in node.inputs if value is not None and value not in varying | taken]
        if any(is_float(value) and _size(value) > 1 for value in others) or captured(node):
            kept[node.op_type] = kept.get(node.op_type, 0) + 1
    numbers = _numbers(model, source, [value for _, values in found for value in values])
    layers = []
    for node, values in found:
        names = [_as_input(graph, value, numbers[value.name or ""]) for value in values]
        arrays = [numbers[value.name or ""] for value in values]
        layers.append(Layer(label(node), node.op_type, dict(zip(names, arrays, strict=True))))
    ir.external_data.load_to_model(model)
    wrt = tuple(value.name or "" for value in inputs)
    return Opened(to_proto(model, source), tuple(layers), wrt, dict(sorted(kept.items())))


def random_weights(layer: Layer, seed: Sequence[int], *, zero_mean: bool = False) -> dict[str, Array]:
    """Normal numbers with the standard deviation of each of a layer's weights, and with its mean or around zero."""
    rng, drawn = np.random.default_rng(seed), {}
    for name, array in layer.weights.items():
        values = array.astype(np.float64)
        drawn[name] = rng.normal(0 if zero_mean else values.mean(), values.std(), values.shape).astype(array.dtype)
    return drawn


def _learned(node: ir.Node) -> Iterator[ir.Value]:
    for place in _LEARNED.get(node.op_type, ()) if node.domain == "" else ():
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is not None and is_float(value) and _size(value) > 1:
            yield value


def _size(value: ir.Value) -> int:
    if value.const_value is not None:
        return value.const_value.size
    return int(np.prod(value.shape.numpy())) if value.shape is not None and value.shape.is_static() else 0


def _varying(graph: ir.Graph) -> set[ir.Value]:
    """What depends on an input of the model."""
    found = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if any(value in found for value in (*node.inputs, *captured(node)) if value is not None):
            found.update(node.outputs)
    return found


def _numbers(model: ir.Model, source: Source, values: Sequence[ir.Value]) -> dict[str, Array]:
    """The constants by name; those that nodes compute from others in one run."""
    known = {value.name or "": value.const_value.numpy() for value in values if value.const_value is not None}
    computed = {value.name or "": int(value.dtype or 0) for value in values if value.const_value is None}
    if computed:
        session = open_session(extract(to_proto(model, source), computed, list(computed)), source, "cpu")
        known |= dict(zip(computed, session.run(list(computed), {}), strict=True))
    return known


def _as_input(graph: ir.Graph, value: ir.Value, numbers: Array) -> str:
    """Puts an input in the place of a constant."""
    name = f"{value.name}/weight"
    fresh = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.from_numpy(numbers.dtype)), shape=ir.Shape(numbers.shape)
    )
    value.replace_all_uses_with(fresh)
    if value.is_initializer():
        del graph.initializers[value.name or ""]
    if value in graph.inputs:  # up to IR 3 every initializer is one
        graph.inputs.remove(value)
    graph.inputs.append(fresh)
    return name
