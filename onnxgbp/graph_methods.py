"""The methods that are a few more nodes in the graph, and the feature map of those that need one.

Costs are in passes, one being a forward and a backward sweep of a sample; CAM methods stop the sweep at their layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS, Activation
from onnxgbp.branches import captured
from onnxgbp.differentiate import find_path
from onnxgbp.emit import Emit, dims_of, is_float, shape_text
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError
from onnxgbp.explained import Explained, find_tensor
from onnxgbp.views import channel_axis
from onnxgbp.vjps import FAMILIES

__all__ = [
    "Sweeps",
    "Write",
    "find_layer",
    "grad_cam",
    "guided_grad_cam",
    "input_x_gradient",
    "layer_activation_x_gradient",
    "rule_map",
]

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """What a method in the graph may use, for one class of each sample.

    op: writes nodes. inputs: what is attributed to. layer: the feature map of the CAM methods.
    metadata: the model's, which may tell the layout of its images.
    gradient: the gradients at some tensors under the method's rule; plain: the plain ones, for a seed without its
    scale (see `scale.py`): a product of two maps may hold that once only.
    """

    op: Emit
    inputs: tuple[ir.Value, ...]
    layer: ir.Value | None
    metadata: Mapping[str, str]
    gradient: Callable[[Sequence[ir.Value]], list[ir.Value]]
    plain: Callable[[Sequence[ir.Value]], list[ir.Value]]

    @property
    def map(self) -> ir.Value:
        """The layer, of a method that has one."""
        assert self.layer is not None
        return self.layer


Write: TypeAlias = Callable[[Sweeps], list[ir.Value]]
"""Of each of the inputs the map."""


# --- the layer of the CAM methods -------------------------------------------------------------------

# What these make is laid out [N, C, ...]; what keeps it so; what shows no more than the map before it, or less.
_LAID_OUT = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "LRN"})
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})
_SHOWS_NO_MORE = _POOLS | {"Cast", "Dropout", "Identity"}
_KEEPS = frozenset(
    {*FAMILIES["elementwise"], *ACTIVATIONS, "Concat", "DequantizeLinear", "Pad", "QuantizeLinear", "Resize", "Slice"}
    | {"GroupNormalization", "Split"}
)


def find_layer(
    graph: ir.Graph,
    explained: Explained,
    inputs: Sequence[ir.Value],
    found: Mapping[ir.Node, Activation],
    name: str | None,
) -> ir.Value:
    """The tensor called so, or the last feature map [N, C, h, w] before its spatial axes are pooled or flattened.

    That is a tensor which every way from the inputs to the score passes, which convolutions have laid out, and behind
    at least one activation: a transformer's patches are none.

    Raises:
        OnnxgbpError: no such tensor, or one of unknown rank.
    """
    if name is not None:
        layer = find_tensor(graph, name, "--layer")
        if layer.shape is None:
            raise OnnxgbpError(f"the rank of layer '{name}' is not known; export the model with input shapes")
        return layer
    path = find_path(graph, explained.tensor, inputs)
    maps, active = set[ir.Value](), set(inputs)
    for node in path:
        active.update(node.outputs)
        keeps = node.op_type in _KEEPS and any(value in maps for value in node.inputs)
        if node.op_type in _LAID_OUT | _POOLS or keeps:
            maps.update(node.outputs)
    waiting = {explained.tensor}
    for place, node in reversed(list(enumerate(path))):
        if waiting.isdisjoint(node.outputs):
            continue
        value, *others = waiting  # alone, it is what every way passes
        fine = value in maps and is_float(value) and any(dim != 1 for dim in (dims_of(value) or ())[2:])
        if fine and not others and value is not explained.tensor and node.op_type not in _SHOWS_NO_MORE:
            if any(earlier in found and found[earlier].gate is None for earlier in path[: place + 1]):
                return value
            break
        waiting.difference_update(node.outputs)
        waiting.update(value for value in (*node.inputs, *captured(node)) if value is not None and value in active)
    raise OnnxgbpError(
        f"no feature map [N, C, h, w] lies on every way to '{explained.tensor.name}': name a tensor with --layer"
    )


# --- in the graph -----------------------------------------------------------------------------------


def rule_map(s: Sweeps) -> list[ir.Value]:
    """The gradient under the rule: the shape of the input. 1 pass."""
    return s.gradient(s.inputs)


def input_x_gradient(s: Sweeps) -> list[ir.Value]:
    """x * g, with g the gradient under the rule: the shape of the input (Shrikumar et al. 2016, arXiv:1605.01713).

    1 pass.
    """
    return [s.op.typed(s.op.Mul(x, g), x) for x, g in zip(s.inputs, s.gradient(s.inputs), strict=True)]


def layer_activation_x_gradient(s: Sweeps) -> list[ir.Value]:
    """A * dS/dA, element by element, at a layer A: the shape of the layer, the type of the input (Captum's name).

    1 pass, backwards down to the layer only.
    """
    product = s.op.typed(s.op.Mul(s.map, *s.gradient([s.map])), s.map)
    return [s.op.typed(s.op.cast_like(product, s.inputs[0]), product)]


def grad_cam(s: Sweeps) -> list[ir.Value]:
    """ReLU(sum_c w_c A_c) with w_c the mean of dS/dA_c over space (Selvaraju et al. 2017, arXiv:1610.02391).

    A is the layer, [N, C, h, w]. The map is interpolated linearly to the size of the input, as `half_pixel` of Resize
    or torch's align_corners=False do, and lies as the input does: [N, 1, H, W], or [N, H, W, 1]. 1 pass, backwards down
    to the layer only.
    """
    return [_upsampled(s, _class_map(s, *s.gradient([s.map])))]


def guided_grad_cam(s: Sweeps) -> list[ir.Value]:
    """Guided backpropagation (or the map of another rule) times the Grad-CAM map of the plain gradient, interpolated.

    The shape of the input (Selvaraju et al. 2017, arXiv:1610.02391). 1 pass, and a second sweep backwards to the layer.
    """
    (x,) = s.inputs
    coarse = _upsampled(s, _class_map(s, *s.plain([s.map])))
    return [s.op.typed(s.op.Mul(*s.gradient([x]), coarse), x)]


def _class_map(s: Sweeps, gradient: ir.Value) -> ir.Value:
    """Grad-CAM in the layer's own size: [N, 1, h, w]."""
    op, dims = s.op, dims_of(s.map) or ()
    if len(dims) < 3:
        raise OnnxgbpError(
            f"layer '{s.map.name}' has shape {shape_text(dims)}, and Grad-CAM needs a feature map [N, C, h, w]: "
            "name another with --layer"
        )
    weights = op.ReduceMean(gradient, axes=list(range(2, len(dims))), keepdims=1)
    return op.Relu(op.ReduceSum(op.Mul(weights, s.map), axes=[1], keepdims=1))


def _upsampled(s: Sweeps, coarse: ir.Value) -> ir.Value:
    """[N, 1, h, w] in the size, the layout and the type of the input.

    Known sizes are two products with constant matrices, the same in every runtime; free ones take a Resize.
    """
    op, (x,) = s.op, s.inputs
    dims, small = dims_of(x) or (), dims_of(s.map) or ()
    rank = len(dims)
    if rank != len(small):
        raise OnnxgbpError(
            f"Grad-CAM cannot lay a map of {shape_text(small)} over '{x.name}' of {shape_text(dims)}: "
            "name other tensors with --layer or --wrt"
        )
    _, channels, *space = order = _layout(x, s.metadata)
    sizes = [(size, dims[axis]) for size, axis in zip(small[2:], space, strict=True)]
    whole = [(size, out) for size, out in sizes if isinstance(size, int) and isinstance(out, int)]
    if len(whole) == len(sizes):
        for axis, (size, out) in enumerate(whole, start=2):
            last = [i for i in range(rank) if i != axis] + [axis]
            finer = op.MatMul(op.Transpose(coarse, perm=last), op.like(_interpolation(size, out).T, coarse))
            coarse = op.Transpose(finer, perm=[last.index(i) for i in range(rank)])
    else:
        if op.opset < 13:  # Resize cannot leave its other inputs out before
            raise OpsetTooLowError(13)
        target = op.vector(op.dim(s.map, 0), 1, *(op.dim(x, axis) for axis in space))
        mode = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        coarse = op.Resize(coarse, None, None, sizes=target, **mode)
    if order != sorted(order):
        coarse = op.Transpose(coarse, perm=[order.index(axis) for axis in range(rank)])
    coarse = op.cast_like(coarse, x)
    coarse.shape = ir.Shape([1 if axis == channels else dim for axis, dim in enumerate(dims)])
    return coarse


def _layout(x: ir.Value, metadata: Mapping[str, str]) -> list[int]:
    """The axes of the input in the order [N, C, ...], as the first convolution takes them.

    Where there is none, the metadata or the sizes tell.
    """
    rank = len(dims_of(x) or ())
    waiting, seen = [(x, list(range(rank)))], {x}
    for value, order in waiting:
        for node, place in value.uses():
            if not node.meta.get("forward") or not node.outputs or node.outputs[0] in seen:
                continue
            if node.op_type in ("Conv", "ConvTranspose") and place == 0:
                return order
            turned = order
            if node.op_type == "Transpose":
                turned = [order[axis] for axis in node.attributes.get_ints("perm", range(rank)[::-1])]
            elif node.op_type not in _KEEPS:
                continue
            seen.add(node.outputs[0])
            waiting.append((node.outputs[0], turned))
    channels = channel_axis(dims_of(x) or (), metadata, 1)
    return [0, channels, *(axis for axis in range(1, rank) if axis != channels)]


def _interpolation(size: int, out: int) -> Array:
    """[out, size]: the weight of each entry of a line in each of a finer one; pixels are areas, the ends repeat."""
    places = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size))))
