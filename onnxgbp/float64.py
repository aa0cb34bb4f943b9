"""A model in float64, and onnx's reference evaluator made fast enough to run a real network in it.

The proof of an attribution needs more digits than float32 has, and no runtime's CPU provider computes a convolution in
float64. The reference evaluator does, but loops over single elements in Python. The kernels below take its place for
the operators where that hurts: each walks over the few positions of its kernel and leaves the rest to numpy. Others
stand here because onnx's own are no reference: Erf, and Gelu with it, answer in float32 only; BatchNormalization
before opset 14 normalises by the batch itself wherever the file has a `momentum`, as most have; LRN mistakes the batch
for the channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_scatter_elements import ScatterElements as _ScatterElements

from onnxgbp.float64_recurrent import GRU, LSTM, RNN
from onnxgbp.float64_sampling import AffineGrid, DeformConv, GridSample

__all__ = ["evaluator", "to_float64"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Ints: TypeAlias = "Sequence[int] | None"

_NARROW = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def to_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in which every float tensor is float64: weights, constants, inputs, outputs, Casts.

    Only ReferenceEvaluator runs it: many operators of the standard do not declare float64 in older opsets. Weights must
    be in the model, not in external files.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _widen_graph(wide.graph)
    for function in wide.functions:
        for node in function.node:
            _widen_node(node)
    return wide


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """The reference evaluator of onnx with vectorised kernels for the operators that it runs element by element."""
    return ReferenceEvaluator(model, new_ops=_KERNELS)


def _widen_graph(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        _widen_node(node)


def _widen_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            _widen_graph(attribute.g)
        for inner in attribute.graphs:
            _widen_graph(inner)
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)
        if attribute.name in ("to", "dtype") and attribute.i in _NARROW:
            attribute.i = onnx.TensorProto.DOUBLE
    if node.op_type == "Constant" and not node.domain:
        _widen_numbers(node.attribute[0])
    if node.op_type == "ConstantOfShape" and not node.attribute:  # by default it makes float32
        zero = onnx.numpy_helper.from_array(np.zeros(1, np.float64))
        node.attribute.append(onnx.helper.make_attribute("value", zero))


def _widen_numbers(attribute: onnx.AttributeProto) -> None:
    """A Constant may hold its number as an attribute, which makes a float32 tensor."""
    if attribute.name not in ("value_float", "value_floats"):
        return
    number = np.float64(attribute.f) if attribute.name == "value_float" else np.array(attribute.floats, np.float64)
    attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.asarray(number))))


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _NARROW:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


class _Window:
    """Where the windows of a convolution or pool lie, one entry per spatial dim."""

    def __init__(
        self,
        size: Sequence[int],
        kernel: Sequence[int],
        strides: Ints,
        dilations: Ints,
        pads: Ints,
        auto_pad: str | None,
        ceil_mode: int | None = 0,
    ) -> None:
        rank = len(kernel)
        self.size, self.kernel = list(size), list(kernel)
        self.strides, self.dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
        self.reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        pads, auto = list(pads or [0] * 2 * rank), auto_pad or "NOTSET"
        self.begins, self.ends, self.out = [], [], []
        for i, (x, s, reach) in enumerate(zip(self.size, self.strides, self.reach, strict=True)):
            begin, end = (pads[i], pads[i + rank]) if auto == "NOTSET" else (0, 0)
            if auto.startswith("SAME"):
                out = -(-x // s)
                total = max((out - 1) * s + reach - x, 0)
                begin = total // 2 if auto == "SAME_UPPER" else total - total // 2
                end = total - begin
            else:
                room = x + begin + end - reach
                out = (-(-room // s) if ceil_mode else room // s) + 1
                if ceil_mode and (out - 1) * s >= x + begin:
                    out -= 1  # a last window that would lie in the padding alone
            self.begins.append(begin)
            self.ends.append(end)
            self.out.append(out)

    def padded(self, x: Array, value: float) -> Array:
        """The tensor with padding as far as the windows reach: `ceil_mode` goes beyond the pads."""
        need = [
            max((o - 1) * s + r - n - b, 0)
            for o, s, r, n, b in zip(self.out, self.strides, self.reach, self.size, self.begins, strict=True)
        ]
        return np.pad(x, [(0, 0), (0, 0), *zip(self.begins, need, strict=True)], constant_values=value)

    def taps(self) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """For each position in the kernel, which elements of the padded tensor it meets, one per window."""
        for position in itertools.product(*map(range, self.kernel)):
            cut = [
                slice(p * d, p * d + (o - 1) * s + 1, s)
                for p, d, o, s in zip(position, self.dilations, self.out, self.strides, strict=True)
            ]
            yield position, (slice(None), slice(None), *cut)


# The names of the arguments are the standard's: the evaluator passes attributes by name.


class Conv(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Ints = None,
        group: int | None = None,
        kernel_shape: Ints = None,  # noqa: ARG002 - the weight tells it
        pads: Ints = None,
        strides: Ints = None,
    ) -> tuple[Array]:
        window, groups = _Window(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad), group or 1
        padded = window.padded(x, 0)
        kernels = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        y = np.zeros((x.shape[0], groups, kernels.shape[1], math.prod(window.out)), x.dtype)
        for position, cut in window.taps():
            met = padded[cut].reshape(x.shape[0], groups, x.shape[1] // groups, -1)
            at: Any = (..., *position)
            kernel = np.ascontiguousarray(kernels[at])  # a strided matrix would miss BLAS
            live = kernel.any(axis=(0, 2))  # one-hot kernels, as a portable MaxPool's gradient has, are mostly zero
            if live.all():
                y += kernel @ met
            else:
                y[:, :, live] += kernel[:, live] @ met
        y = y.reshape(x.shape[0], w.shape[0], *window.out)
        return (y if b is None else y + b.reshape(1, -1, *[1] * len(window.out)),)


class ConvTranspose(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Ints = None,
        group: int | None = None,
        kernel_shape: Ints = None,  # noqa: ARG002 - the weight tells it
        output_padding: Ints = None,
        output_shape: Ints = None,
        pads: Ints = None,
        strides: Ints = None,
    ) -> tuple[Array]:
        sizes, rank, groups = w.shape[2:], x.ndim - 2, group or 1
        steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
        extra, edges = list(output_padding or [0] * rank), list(pads or [0] * 2 * rank)
        full = [s * (n - 1) + (k - 1) * d + 1 for s, n, k, d in zip(steps, x.shape[2:], sizes, spread, strict=True)]
        auto = auto_pad or "NOTSET"
        if output_shape or auto.startswith("SAME"):
            out = list(output_shape or [n * s for n, s in zip(x.shape[2:], steps, strict=True)])[-rank:]
            total = [max(f + e - o, 0) for f, e, o in zip(full, extra, out, strict=True)]
            begins = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
        else:
            begins = edges[:rank] if auto == "NOTSET" else [0] * rank
            ends = edges[rank:] if auto == "NOTSET" else [0] * rank
            out = [f + e - b - n for f, e, b, n in zip(full, extra, begins, ends, strict=True)]
        size = [max(f, begin + o) for f, begin, o in zip(full, begins, out, strict=True)]
        channels = w.shape[1]
        y = np.zeros((x.shape[0], groups, channels, *size), x.dtype)
        kernels = np.swapaxes(w.reshape(groups, w.shape[0] // groups, *w.shape[1:]), 1, 2)
        rows = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
        for position in itertools.product(*map(range, sizes)):
            at: Any = (..., *position)
            kernel = np.ascontiguousarray(kernels[at])
            live = kernel.any(axis=(0, 1))
            part = kernel @ rows if live.all() else np.ascontiguousarray(kernel[:, :, live]) @ rows[:, :, live]
            cut = [
                slice(p * d, p * d + (n - 1) * s + 1, s)
                for p, d, n, s in zip(position, spread, x.shape[2:], steps, strict=True)
            ]
            target: Any = (..., *cut)
            y[target] += part.reshape(*part.shape[:3], *x.shape[2:])
        y = y.reshape(x.shape[0], groups * channels, *size)
        y = y[(slice(None), slice(None), *[slice(begin, begin + o) for begin, o in zip(begins, out, strict=True)])]
        return (y if b is None else y + b.reshape(1, -1, *[1] * rank),)


class MaxPool(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Ints = None,
        kernel_shape: Ints = None,
        pads: Ints = None,
        storage_order: int | None = None,  # noqa: ARG002 - column-major indices, which no exporter writes
        strides: Ints = None,
    ) -> tuple[Array, ...]:
        window = _Window(x.shape[2:], kernel_shape or [], strides, dilations, pads, auto_pad, ceil_mode)
        lowest = -np.inf if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
        padded = window.padded(x, lowest)
        y = np.full((*x.shape[:2], *window.out), lowest, x.dtype)
        where = np.zeros(y.shape, np.int64)
        for position, cut in window.taps():
            met = padded[cut]
            better = met > y  # strict: the first maximum of a window wins
            y = np.where(better, met, y)
            where = np.where(better, self._place(window, position), where)
        planes = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(window.out))
        return (y, where + planes * math.prod(x.shape[2:])) if len(self.onnx_node.output) > 1 else (y,)

    @staticmethod
    def _place(window: _Window, position: tuple[int, ...]) -> Array:
        """The index, within one plane of x, that this position of the kernel has in each window."""
        place = np.zeros([1] * len(position), np.int64)
        for i, p in enumerate(position):
            along = np.arange(window.out[i]) * window.strides[i] + p * window.dilations[i] - window.begins[i]
            place = place * window.size[i] + along.reshape([-1 if j == i else 1 for j in range(len(position))])
        return place


class AveragePool(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: Ints = None,
        kernel_shape: Ints = None,
        pads: Ints = None,
        strides: Ints = None,
    ) -> tuple[Array]:
        window = _Window(x.shape[2:], kernel_shape or [], strides, dilations, pads, auto_pad, ceil_mode)
        counted = np.ones((1, 1, *x.shape[2:]), x.dtype)
        if count_include_pad:  # the pads count, what `ceil_mode` adds behind them does not
            counted = np.pad(
                counted, [(0, 0), (0, 0), *zip(window.begins, window.ends, strict=True)], constant_values=1
            )
            room = [max(p - c, 0) for p, c in zip(window.padded(x[:1, :1], 0).shape, counted.shape, strict=True)]
            counted = np.pad(counted, [(0, r) for r in room])
        else:
            counted = window.padded(counted, 0)
        padded = window.padded(x, 0)
        total: Any = sum(padded[cut] for _, cut in window.taps())
        count: Any = sum(counted[cut] for _, cut in window.taps())
        return (total / count,)


class ScatterElements(_ScatterElements):
    op_domain = ""

    def _run(
        self, data: Array, indices: Array, updates: Array, axis: int | None = None, reduction: str | None = None
    ) -> tuple[Array]:
        if data.ndim == 1 and reduction == "add":
            added = data.copy()
            np.add.at(added, indices, updates)
            return (added,)
        # onnx ships no types for its evaluator
        scattered: tuple[Array] = super()._run(data, indices, updates, axis=axis, reduction=reduction)  # type: ignore[no-untyped-call]
        return scattered


class GatherElements(OpRun):
    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        along = (axis or 0) % data.ndim
        met = tuple(slice(None) if i == along else slice(n) for i, n in enumerate(indices.shape))
        return (np.take_along_axis(data[met], indices, along),)  # onnx's own wants all of the other axes


class Erf(OpRun):
    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Gelu(OpRun):
    op_domain = ""

    def _run(self, x: Array, approximate: str | None = None) -> tuple[Array]:
        if approximate == "tanh":
            return (x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,)
        return (x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x * math.sqrt(0.5))) / 2,)


class BatchNormalization(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        var: Array,
        epsilon: float | None = None,
        momentum: float | None = None,  # noqa: ARG002 - of training
        training_mode: int | None = None,
        spatial: int | None = None,  # noqa: ARG002 - 0 was never written by an exporter
    ) -> tuple[Array]:
        if training_mode:
            raise NotImplementedError("BatchNormalization in training mode")
        scale, bias, mean, var = (a.reshape(1, -1, *[1] * (x.ndim - 2)) for a in (scale, bias, mean, var))
        return (scale * (x - mean) / np.sqrt(var + (1e-5 if epsilon is None else epsilon)) + bias,)


class LRN(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        alpha: float | None = None,
        beta: float | None = None,
        bias: float | None = None,
        size: int | None = None,
    ) -> tuple[Array]:
        near, width = np.square(x), int(size or 1)
        sides = [(0, 0), ((width - 1) // 2, width // 2), *[(0, 0)] * (x.ndim - 2)]
        squares, channels = np.pad(near, sides), x.shape[1]
        total: Any = sum(squares[:, i : i + channels] for i in range(width))
        scale = (1.0 if bias is None else bias) + (1e-4 if alpha is None else alpha) / width * total
        return (x / scale ** (0.75 if beta is None else beta),)


_KERNELS = [
    AffineGrid,
    AveragePool,
    BatchNormalization,
    Conv,
    ConvTranspose,
    DeformConv,
    Erf,
    GRU,
    GatherElements,
    Gelu,
    GridSample,
    LRN,
    LSTM,
    MaxPool,
    RNN,
    ScatterElements,
]
