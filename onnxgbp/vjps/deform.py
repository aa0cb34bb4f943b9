"""Convolution at places that are computed: DeformConv (Dai et al. 2017, arXiv 1703.06211; Zhu et al. 2018, 1811.11168).

For each of P outputs it samples x linearly at K places, one per weight of the kernel, each moved by an offset and
weighed by a mask that G groups of channels share; what was sampled is then contracted with the weights.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs
from onnxgbp.vjps.sample import Taps

__all__ = ["VJPS"]


class _Deformed:
    """A group of channels is a sample of its own: [N G, C / G, K P, ...]."""

    def __init__(self, op: Emit, s: Step) -> None:
        self.op, self.s, self.rank = op, s, s.rank() - 2
        x_dims, w_dims = dims_of(s.x), dims_of(s.input(1))
        if x_dims is None or w_dims is None or not all(isinstance(dim, int) for dim in (x_dims[1], *w_dims)):
            raise s.refuse("the shape of its weights, or how many channels it reads, is not known")
        self.kernel = s.ints("kernel_shape") or [int(dim) for dim in w_dims[2:] if isinstance(dim, int)]
        self.places, self.groups = math.prod(self.kernel), int(s.argument("offset_group"))
        self.channels = int(x_dims[1] or 0)  # a number, as was made sure of
        x = op.Reshape(
            s.x, op.vector(-1, self.channels // self.groups, *(op.dim(s.x, 2 + i) for i in range(self.rank)))
        )
        x.shape = ir.Shape([None, self.channels // self.groups, *x_dims[2:]])
        self.taps = Taps(op, x, [self._place(i) for i in reversed(range(self.rank))])

    def _place(self, i: int) -> ir.Value:
        """Where along one axis x is sampled: [N G, 1, K P, 1, ..., 1]."""
        op, s, ones = self.op, self.s, [1] * self.rank
        stride = (s.ints("strides") or ones)[i]
        begin = (s.ints("pads") or [0] * self.rank)[i]
        within = np.indices(self.kernel)[i].reshape(1, -1, 1) * (s.ints("dilations") or ones)[i] - begin
        start = op.Mul(op.positions(s.y, 2 + i), [stride])
        spread = op.Expand(start, op.vector(1, 1, *(op.dim(s.y, 2 + axis) for axis in range(self.rank))))
        regular = op.Add(op.Reshape(spread, [1, 1, -1]), op.constant(within))  # [1, K, P]
        offset = op.Reshape(s.input(2), op.vector(-1, self.places, self.rank, self._outputs()))
        moved = op.Squeeze(op.Slice(offset, starts=[i], ends=[i + 1], axes=[2]), axes=[2])
        place = op.Add(moved, op.cast_like(regular, s.x))
        return op.Reshape(place, op.vector(-1, 1, op.Mul(self._outputs(), [self.places]), *ones))

    def _outputs(self) -> ir.Value:
        """P."""
        sizes = [self.op.dim(self.s.y, 2 + i) for i in range(self.rank)]
        return self.op.ReduceProd(self.op.Concat(*sizes, axis=0), axes=[0], keepdims=1)

    def sampled(self) -> ir.Value:
        """The gradient of what was sampled and masked, [N G, C / G, K P]: dy contracted with the weights."""
        op, groups = self.op, int(self.s.argument("group"))
        weight = op.Reshape(self.s.input(1), [groups, -1, self.channels // groups * self.places])
        dy = op.Reshape(self.s.dy, op.vector(0, groups, -1, self._outputs()))
        columns = op.MatMul(op.Transpose(weight, perm=[0, 2, 1]), dy)  # [N, groups, C / groups K, P]
        share = self.channels // self.groups
        return op.Reshape(columns, op.vector(-1, share, op.Mul(self._outputs(), [self.places])))

    def masked(self, gradient: ir.Value) -> ir.Value:
        if not self.s.has(4):
            return gradient
        return self.op.Mul(gradient, self.op.Reshape(self.s.input(4), self.op.Shape(self._flat())))

    def _flat(self) -> ir.Value:
        """The first place, for its shape: [N G, 1, K P]."""
        return self.op.Reshape(self.taps.fractions[0], [0, 1, -1])


def deform_conv_x(op: Emit, s: Step) -> ir.Value:
    node = _Deformed(op, s)
    return op.reshape_like(node.taps.to_image(node.masked(node.sampled())), s.x)


def deform_conv_offset(op: Emit, s: Step) -> ir.Value:
    """The slope of the surface at each place, weighed by what arrives over the channels."""
    node = _Deformed(op, s)
    taps, arriving = node.taps, node.masked(node.sampled())
    pulls = op.ReduceSum(op.Mul(taps.values(), taps.arriving(arriving)), axes=[1], keepdims=1)
    outputs = [op.dim(s.y, 2 + axis) for axis in range(node.rank)]
    slopes = [
        op.Reshape(taps.to_places(pulls, i), op.vector(-1, node.places, 1, *outputs))
        for i in reversed(range(node.rank))
    ]
    return op.reshape_like(op.Concat(*slopes, axis=2), s.input(2))


def deform_conv_mask(op: Emit, s: Step) -> ir.Value:
    """What was sampled at each place, weighed by what arrives over the channels."""
    node = _Deformed(op, s)
    values = op.Mul(node.taps.values(), node.taps.weigh())
    sampled = op.ReduceSum(values, axes=list(range(3, 3 + node.rank)), keepdims=0)  # [N G, C / G, K P]
    return op.reshape_like(op.ReduceSum(op.Mul(sampled, node.sampled()), axes=[1], keepdims=0), s.input(4))


VJPS = {"DeformConv": inputs(deform_conv_x, None, deform_conv_offset, None, deform_conv_mask)}
