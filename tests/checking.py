"""Checks of a gradient graph against what the forward graph does, in float64 on onnx's reference evaluator.

`check_vjp` compares <gradient, v> with a central difference along random directions v. For a linear operator the
step is 1 and the comparison exact; elsewhere it is small, and `apart` keeps the points away from kinks and ties.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_scatter_elements import ScatterElements

import onnxgbp
from onnxgbp.float64_sampling import AffineGrid, DeformConv, GridSample

Array = npt.NDArray[Any]

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}

LINEAR = frozenset(
    "Add Sub Sum Neg Identity Dropout Cast Conv ConvTranspose Gemm MatMul AveragePool GlobalAveragePool ReduceSum "
    "ReduceMean BatchNormalization Concat Split Flatten Reshape Squeeze Unsqueeze Transpose Pad Slice Expand Tile "
    "Mul".split()
)  # Mul and MatMul are linear in each operand, and one is varied at a time

TOLERANCE = {True: 1e-11, False: 2e-7}  # linear: rounding alone; else what a difference with step 1e-6 can tell


@dataclass(frozen=True)
class Figure:
    """One directional derivative: as the gradient says, as the forward graph does."""

    wrt: str
    direction: int
    gradient: float
    difference: float
    scale: float
    linear: bool

    @property
    def error(self) -> float:
        return abs(self.gradient - self.difference) / self.scale

    @property
    def right(self) -> bool:
        return self.error <= TOLERANCE[self.linear]  # a NaN is not right


def to_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every float tensor, attribute tensor and Cast in float64; scales of Resize are float32."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _widen(wide.graph)
    return wide


def _widen(graph: onnx.GraphProto) -> None:
    graph.ClearField("value_info")
    narrow = {name for node in graph.node if node.op_type in ("Resize", "Upsample") for name in node.input[1:]}
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in FLOATS and value.name not in narrow:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in graph.initializer:
        if tensor.name not in narrow:
            tensor.CopyFrom(_wide(tensor))
    for node in graph.node:
        if node.op_type == "GroupNormalization":  # it computes in float32 unless told otherwise
            node.attribute.append(helper.make_attribute("stash_type", TensorProto.DOUBLE))
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _widen(attribute.g)
            elif attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.CopyFrom(_wide(attribute.t))
            elif attribute.name in ("to", "dtype") and attribute.i in FLOATS:
                attribute.i = TensorProto.DOUBLE
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                given = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.array(given, np.float64))))


def _wide(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_type not in FLOATS:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def apart(shape: Sequence[int], rng: np.random.Generator, salt: int = 0) -> Array:
    """Values in (-2, 2), no two alike, none at a kink (0, a bound with few digits); other salts share no value."""
    count = int(np.prod(shape, dtype=np.int64))
    offset = (0.37 + 0.618034 * salt) % 1  # never 0, 1/4, 1/2 or 3/4, which is where kinks would lie
    return np.asarray(((rng.permutation(count) + offset) / count * 4 - 2).reshape(shape))


class ConvTranspose(OpRun):
    """As the standard's formula; the evaluator's own is wrong or raises for 1-D, 3-D, groups and output_padding."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        rank = x.ndim - 2
        kernel, ones = w.shape[2:], [1] * rank
        stride, dilation, more = strides or ones, dilations or ones, output_padding or [0] * rank
        full = [s * (n - 1) + (k - 1) * d + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
        if output_shape is None and auto_pad.startswith("SAME"):
            output_shape = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
        if output_shape is not None:
            total = [f + m - o for f, m, o in zip(full, more, output_shape[-rank:], strict=True)]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            pads = small + large if auto_pad == "SAME_UPPER" else large + small
        pads = [0] * 2 * rank if pads is None or auto_pad == "VALID" else pads
        groups = np.split(x, group, axis=1)
        parts = []
        for part, weight in zip(groups, np.split(w, group, axis=0), strict=True):
            y = np.zeros((len(x), w.shape[1], *(f + m for f, m in zip(full, more, strict=True))), x.dtype)
            for place in np.ndindex(*kernel):
                spots = [
                    slice(p * d, p * d + s * (n - 1) + 1, s)
                    for p, d, s, n in zip(place, dilation, stride, x.shape[2:], strict=True)
                ]
                y[(slice(None), slice(None), *spots)] += np.moveaxis(
                    np.tensordot(part, weight[(slice(None), slice(None), *place)], ([1], [0])), -1, 1
                )
            parts.append(y)
        y = np.concatenate(parts, axis=1)
        cut = [slice(pads[i], y.shape[i + 2] - pads[i + rank]) for i in range(rank)]
        y = y[(slice(None), slice(None), *cut)]
        return (y if b is None else y + b.reshape(-1, *ones),)


class Windows:
    """Where the windows of a pool lie: (begin, end) of each spatial axis to pad, and the number of windows."""

    def __init__(
        self,
        size: Sequence[int],
        kernel: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        auto_pad: str,
        ceil_mode: int,
    ) -> None:
        rank = len(kernel)
        self.kernel, self.strides, self.dilations = kernel, strides or [1] * rank, dilations or [1] * rank
        self.pads: list[tuple[int, int]] = []  # what counts as padding
        self.margins: list[tuple[int, int]] = [(0, 0), (0, 0)]  # how far the windows reach
        self.out: list[int] = []
        for i, (n, k, s, d) in enumerate(zip(size, kernel, self.strides, self.dilations, strict=True)):
            reach = (k - 1) * d + 1
            begin, end = (pads[i], pads[i + rank]) if pads is not None and auto_pad == "NOTSET" else (0, 0)
            if auto_pad.startswith("SAME"):
                total = max((-(-n // s) - 1) * s + reach - n, 0)
                begin = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
                end = total - begin
            room = n + begin + end - reach
            count = (-(-room // s) if ceil_mode else room // s) + 1
            if ceil_mode and (count - 1) * s >= n + begin:
                count -= 1  # a window may not start in the padding at the end
            self.pads.append((begin, end))
            self.margins.append((begin, max((count - 1) * s + reach - n - begin, 0)))
            self.out.append(count)

    def __iter__(self) -> Iterator[tuple[slice, ...]]:
        """For each position in the kernel, the elements of the padded tensor that it meets."""
        for place in np.ndindex(*self.kernel):
            along = (
                slice(p * d, p * d + s * (o - 1) + 1, s)
                for p, d, s, o in zip(place, self.dilations, self.strides, self.out, strict=True)
            )
            yield (slice(None), slice(None), *along)


class MaxPool(OpRun):
    """As the standard has it, with Indices into the whole tensor; the evaluator's own count within one channel."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self,
        x: Array,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        storage_order: int = 0,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array, ...]:
        windows = Windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
        padded = np.pad(x, windows.margins, constant_values=-np.inf)
        order: Any = "F" if storage_order else "C"
        within = np.reshape(np.arange(np.prod(x.shape[2:])), x.shape[2:], order=order)
        channel = np.arange(np.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        places = np.pad(channel * within.size + within, windows.margins)
        shape = (*x.shape[:2], *windows.out)
        best, indices = np.full(shape, -np.inf, x.dtype), np.zeros(shape, np.int64)
        for met in windows:
            better = padded[met] > best
            best, indices = np.where(better, padded[met], best), np.where(better, places[met], indices)
        return (best, indices)[: len(self.onnx_node.output)]


class AveragePool(OpRun):
    """As the standard has it; the evaluator's own takes half a minute for one case."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self,
        x: Array,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        count_include_pad: int = 0,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        windows = Windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
        counted = np.pad(
            np.ones((1, 1, *x.shape[2:])), [(0, 0), (0, 0), *windows.pads], constant_values=float(count_include_pad)
        )
        beyond = [max(b + n + e - c, 0) for (b, e), n, c in zip(windows.margins, x.shape, counted.shape, strict=True)]
        counted = np.pad(counted, [(0, 0), (0, 0), *((0, more) for more in beyond[2:])])
        padded = np.pad(x, windows.margins)
        total: Any = sum(padded[met] for met in windows)
        count: Any = sum(counted[met] for met in windows)
        return ((total / count).astype(x.dtype),)


class LpPool(OpRun):
    """As the standard has it; the evaluator's own is as slow."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self,
        x: Array,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        p: int = 2,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        windows = Windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
        padded = np.abs(np.pad(x, windows.margins)) ** p
        total: Any = sum(padded[met] for met in windows)
        return ((total ** (1 / p)).astype(x.dtype),)


class Erf(OpRun):
    """In the tensor's own precision; the evaluator's own rounds to float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:  # type: ignore[override]
        return (np.vectorize(math.erf, otypes=[x.dtype])(x) if x.size else x,)


class Gelu(OpRun):
    """The evaluator expands it, with its own Erf inside."""

    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:  # type: ignore[override]
        if approximate == "tanh":
            return (x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,)
        return (x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2))) / 2,)


class GlobalMaxPool(OpRun):
    """For any number of spatial axes; the evaluator's own knows two."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:  # type: ignore[override]
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class BatchNormalization(OpRun):
    """At inference; the evaluator's own of opset 9 normalises by the batch's statistics."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        var: Array,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        spatial: int = 1,
        training_mode: int = 0,
    ) -> tuple[Array]:
        assert not training_mode
        scale, bias, mean, var = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (scale, bias, mean, var))
        return (scale * (x - mean) / np.sqrt(var + epsilon) + bias,)


class LRN(OpRun):
    """As the standard has it; the evaluator's own takes the wrong channels, and four axes alone."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self, x: Array, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int = 1
    ) -> tuple[Array]:
        squares = np.zeros_like(x)
        for c in range(x.shape[1]):
            low, high = max(0, c - (size - 1) // 2), min(x.shape[1], c + size // 2 + 1)
            squares[:, c] = (x[:, low:high] ** 2).sum(axis=1)
        return (x / (bias + alpha / size * squares) ** beta,)


class LpNormalization(OpRun):
    """The evaluator's own forgets the absolute value where p is 1."""

    op_domain = ""

    def _run(self, x: Array, axis: int = -1, p: int = 2) -> tuple[Array]:  # type: ignore[override]
        return (x / (np.abs(x) ** p).sum(axis=axis, keepdims=True) ** (1 / p),)


class Softmax(OpRun):
    """Also of opsets below 13, which ran over all axes from `axis` on; the evaluator knows the newer meaning alone."""

    op_domain = ""

    def _run(self, x: Array, axis: int | None = None) -> tuple[Array]:  # type: ignore[override]
        logarithm = self._logarithm(x, axis)
        return (np.exp(logarithm),)

    def _logarithm(self, x: Array, axis: int | None) -> Array:
        old = self.run_params["opsets"][""] < 13
        if not any(attribute.name == "axis" for attribute in self.onnx_node.attribute):
            axis = 1 if old else -1  # the evaluator gives the newest default
        assert axis is not None
        axes: Any = tuple(range(axis % x.ndim, x.ndim)) if old else axis
        shifted = x - x.max(axis=axes, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axes, keepdims=True)))


class LogSoftmax(Softmax):
    op_domain = ""

    def _run(self, x: Array, axis: int | None = None) -> tuple[Array]:
        return (self._logarithm(x, axis),)


class Pad(OpRun):
    """Also with negative pads, which numpy refuses."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self,
        x: Array,
        given: Array | None = None,
        constant: Array | None = None,
        axes: Array | None = None,
        mode: str = "constant",
        pads: Sequence[int] | None = None,
        value: float = 0.0,
    ) -> tuple[Array]:
        amounts = [int(p) for p in (pads if given is None else given)]  # type: ignore[union-attr]
        where = [int(a) % x.ndim for a in axes] if axes is not None else list(range(x.ndim))
        margins = [(0, 0)] * x.ndim
        for position, axis in enumerate(where):
            margins[axis] = (amounts[position], amounts[position + len(where)])
        cut = tuple(slice(max(-b, 0), n - max(-e, 0)) for n, (b, e) in zip(x.shape, margins, strict=True))
        grown = [(max(b, 0), max(e, 0)) for b, e in margins]
        fill = value if constant is None or not constant.size else constant.item()
        options: Any = {"constant_values": fill} if mode == "constant" else {}
        return (np.pad(x[cut], grown, mode=mode, **options).astype(x.dtype),)  # type: ignore[call-overload]


class GatherElements(OpRun):
    """Also with indices that do not cover the other axes, which the evaluator refuses."""

    op_domain = ""

    def _run(self, x: Array, indices: Array, axis: int = 0) -> tuple[Array]:  # type: ignore[override]
        taken = np.empty(indices.shape, x.dtype)
        for place in np.ndindex(*indices.shape):
            source = list(place)
            source[axis] = indices[place]
            taken[place] = x[tuple(source)]
        return (taken,)


class Scatter(ScatterElements):
    """What ScatterElements was called before opset 11; the evaluator lacks it, since the standard deprecated it."""

    op_domain = ""


# AffineGrid, DeformConv and GridSample are the product's own: tests/test_sampling.py and tests/test_deform.py compare
# them with ONNX Runtime in float64.
LITERAL: list[type[OpRun]] = [
    AffineGrid,
    DeformConv,
    AveragePool,
    BatchNormalization,
    ConvTranspose,
    Erf,
    GatherElements,
    Gelu,
    GlobalMaxPool,
    GridSample,
    LRN,
    LogSoftmax,
    LpNormalization,
    LpPool,
    MaxPool,
    Pad,
    Scatter,
    Softmax,
]


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """onnx's reference evaluator, with those operators replaced in which it is at fault."""
    return ReferenceEvaluator(model, new_ops=LITERAL)


def evaluated(
    session: ReferenceEvaluator, feeds: Mapping[str, Array], names: Sequence[str] | None = None
) -> list[Array]:
    """The outputs named, or all in order."""
    results: Any = session.run(None if names is None else list(names), dict(feeds))
    return [np.asarray(result) for result in results]


def reference_run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every output by name, on the reference evaluator."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # overflow in branches that a Where then drops
        results = evaluated(evaluator(model), feeds)
    return dict(zip((output.name for output in model.graph.output), results, strict=True))


def ort_run(model: onnx.ModelProto, feeds: Mapping[str, Array], *, disable: bool = False) -> dict[str, Array]:
    """Every output by name, in stock ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if disable:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def torch_reference() -> Any:
    """The module `reference`; the test is skipped where torch is missing."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # test workers share the cores, where torch's own threads wait for each other
    import reference

    return reference


def check_vjp(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    *,
    output: str,
    wrt: Sequence[str],
    linear: bool,
    profile: str = "ort",
    directions: int = 2,
    seed: int = 0,
) -> list[Figure]:
    """The directional derivatives of a float64 model with respect to each of its inputs `wrt`.

    Args:
        model: float64 throughout, as `to_float64` makes it.
        feeds: values for all of its inputs.
        output: the output to differentiate, weighted at random.
        wrt: the inputs to differentiate for, each varied alone.
        linear: whether the output is linear (affine) in each of them.
        profile: how the gradient is spelled.
        directions: how many random directions for each input.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    converted = onnxgbp.convert(model, method="gradient", target="seed", output=output, wrt=wrt, profile=profile)
    onnx.checker.check_model(converted, full_check=True)
    forward = evaluator(model)

    def value(given: Mapping[str, Array]) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(evaluated(forward, given, [output])[0])

    weights = np.asarray(rng.standard_normal(value(feeds).shape))
    results = reference_run(converted, {**feeds, "seed": weights})
    assert np.array_equal(results[output], value(feeds)), "the forward pass changed"
    figures = []
    for name in wrt:
        gradient = results["attribution" if len(wrt) == 1 else f"attribution_{name}"]
        assert gradient.shape == feeds[name].shape, f"{name}: {gradient.shape} for {feeds[name].shape}"
        assert gradient.dtype == np.float64
        step = 1.0 if linear else 1e-6
        for direction in range(directions):
            v = rng.standard_normal(feeds[name].shape)
            above, below = (value({**feeds, name: feeds[name] + sign * step * v}) for sign in (1, -1))
            difference = float((weights * (above - below)).sum() / (2 * step))
            product = gradient * v
            scale = max(float(np.linalg.norm(product)), abs(difference), 1e-30)
            figures.append(Figure(name, direction, float(product.sum()), difference, scale, linear))
    return figures


def cosine(a: Array, b: Array) -> float:
    """Of two arrays as vectors; 1 where both are all zero."""
    left, right = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    if norms == 0:
        return 1.0 if not left.any() and not right.any() else 0.0
    return float(left @ right) / norms


def forward_error(before: Mapping[str, Array], after: Mapping[str, Array]) -> float:
    """The largest change of a float output, relative to its range."""
    errors = [0.0]
    for name, old in before.items():
        if isinstance(old, np.ndarray) and old.dtype.kind == "f" and old.size:
            errors.append(float(np.abs(after[name] - old).max()) / max(float(np.ptp(old)), 1e-30))
    return max(errors)


class WheelCase(NamedTuple):
    """One of onnx's own node cases: a model of one node and what it is fed."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, Array]

    @property
    def operator(self) -> str:
        return self.model.graph.node[0].op_type


@functools.cache
def wheel_cases() -> dict[str, WheelCase]:
    """The single-node cases of the onnx wheel's default domain with a float input and a float output."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators overflow and deprecate on their own account
        collected = collect_testcases(None)
    cases = {}
    for case in collected:
        model = case.model
        assert model is not None
        if len(model.graph.node) != 1 or model.graph.node[0].domain or not case.data_sets:
            continue
        inputs, given = model.graph.input, case.data_sets[0][0]
        ends = [value.type.tensor_type.elem_type in FLOATS for value in (*inputs[:1], *model.graph.output[:1])]
        if len(ends) == 2 and all(ends):
            feeds = {v.name: a for v, a in zip(inputs, given, strict=True) if isinstance(a, np.ndarray | np.generic)}
            if len(feeds) < len(given):  # optional or sequence types
                continue
            cases[case.name] = WheelCase(case.name, model, feeds)
    return cases


def with_constants(model: onnx.ModelProto, constants: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with some of its inputs made initializers."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    inputs = [value for value in fixed.graph.input if value.name not in constants]
    fixed.graph.ClearField("input")
    fixed.graph.input.extend(inputs)
    fixed.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return fixed


def small_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None] | None],
    outputs: Sequence[str] = ("y",),
    constants: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model of a few nodes; its outputs are of the same type, with the shapes that onnx infers."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    model.graph.ClearField("output")
    model.graph.output.extend(inferred.graph.output)
    return model


def written_model(
    text: str,
    inputs: Mapping[str, Sequence[int | str | None] | None],
    constants: Mapping[str, Array],
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A `small_model` whose nodes are written in the textual syntax of ONNX, with those constants that it reads."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> written (float[1] {next(iter(inputs))}) => (float y)'
    nodes = onnx.parser.parse_model(f"{head} {{ {text} }}").graph.node
    words = set(re.findall(r"\w+", text))
    return small_model(
        nodes, inputs, constants={n: a for n, a in constants.items() if n in words}, opset=opset, dtype=dtype
    )


def optimised(
    model: onnx.ModelProto | Path,
    folder: Path,
    level: Any = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
) -> onnx.ModelProto:
    """The file that ONNX Runtime's optimiser writes of a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")
