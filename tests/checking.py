"""Checks of a gradient graph against what the forward graph does, in float64 on onnx's reference evaluator.

`check_vjp` compares <gradient, v> with a central difference along random directions v. For a linear operator the
step is 1 and the comparison exact; elsewhere it is small, and `apart` keeps the points away from kinks and ties.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxgbp

Array = npt.NDArray[Any]

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}

LINEAR = frozenset(
    "Add Sub Sum Neg Identity Dropout Cast Conv ConvTranspose Gemm MatMul AveragePool GlobalAveragePool ReduceSum "
    "ReduceMean BatchNormalization Concat Split Flatten Reshape Squeeze Unsqueeze Transpose Pad Slice Expand Tile Mul".split()
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
    """The same model with every float tensor, attribute tensor and Cast in float64."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in FLOATS:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in graph.initializer:
        tensor.CopyFrom(_wide(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.CopyFrom(_wide(attribute.t))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in FLOATS:
                attribute.i = TensorProto.DOUBLE
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                given = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.array(given, np.float64))))
    return wide


def _wide(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_type not in FLOATS:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def apart(shape: Sequence[int], rng: np.random.Generator, salt: int = 0) -> Array:
    """Values in (-2, 2), no two alike, none at a kink (0, a bound with few digits); other salts share no value."""
    count = int(np.prod(shape, dtype=np.int64))
    offset = (0.37 + 0.618034 * salt) % 1  # never 0, 1/4, 1/2 or 3/4, which is where kinks would lie
    return np.asarray(((rng.permutation(count) + offset) / count * 4 - 2).reshape(shape))


def reference_run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every output by name, on the reference evaluator."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # overflow in branches that a Where then drops
        results = ReferenceEvaluator(model).run(None, dict(feeds))
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
    forward = ReferenceEvaluator(model)

    def value(given: Mapping[str, Array]) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(forward.run([output], dict(given))[0])

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
