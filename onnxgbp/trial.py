"""Running a model once on seeded inputs: in onnxruntime, or in float64 on onnx's reference evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxgbp.errors import OnnxgbpError
from onnxgbp.installed import onnxruntime_module
from onnxgbp.scale import fit, start

__all__ = [
    "SIZES",
    "Array",
    "Arrays",
    "Run",
    "fitting_exponent",
    "is_free",
    "random_inputs",
    "rank_of",
    "reference",
    "session",
    "sizes_that_run",
]

Array: TypeAlias = "np.ndarray[Any, Any]"
Arrays: TypeAlias = dict[str, Array]
Run: TypeAlias = "Callable[[Mapping[str, Array]], dict[str, Any]]"


# Channels (axis 1 of a batch of images) and any other free dim but the batch, tried in this order.
SIZES = tuple((channels, size) for size in (32, 28, 64, 30, 224, 8, 299) for channels in (3, 1))
_FLOATS = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")}


def session(model: onnx.ModelProto | Path, *, optimise: bool = True) -> Run:
    """A model in onnxruntime, as a function from its inputs to its outputs by name.

    Without `optimise` each node runs as it stands.
    """
    runtime = onnxruntime_module()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it logs, it raises as well
    if not optimise or _is_quantised(model):
        # Its integer kernels round on their own, and reading a tensor inside such a group takes the group apart.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}

    def run(feeds: Mapping[str, Array]) -> dict[str, Any]:
        given = {name: array for name, array in feeds.items() if name in taken}
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def _is_quantised(model: onnx.ModelProto | Path) -> bool:
    proto = onnx.load(str(model), load_external_data=False) if isinstance(model, Path) else model
    return any(node.op_type == "QuantizeLinear" for node in proto.graph.node)


def reference(model: onnx.ModelProto) -> Run:
    from onnxgbp.float64 import evaluator  # 400 modules: only where something is computed

    engine = evaluator(model)
    taken = {value.name for value in model.graph.input}

    def run(feeds: Mapping[str, Array]) -> dict[str, Any]:
        with np.errstate(all="ignore"):
            given = {name: array for name, array in feeds.items() if name in taken}
            return dict(zip(engine.output_names, engine.run(None, given), strict=True))

    return run


def random_inputs(
    values: Sequence[onnx.ValueInfoProto],
    batch: int,
    sizes: tuple[int, int],
    scale: float,
    ranges: Mapping[str, range],
) -> Arrays:
    """Seeded inputs: normal for floats; of the others numbers from their range, and ones where there is none."""
    batches = {value.type.tensor_type.shape.dim[0].dim_param for value in values if is_free(value, 0)} - {""}
    rng, feeds = np.random.default_rng(0), Arrays()
    for value in values:
        dims = []
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            free = batch if axis == 0 or dim.dim_param in batches else sizes[not (axis == 1 and rank_of(value) == 4)]
            dims.append(dim.dim_value if dim.dim_value > 0 else free)
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if value.type.tensor_type.elem_type in _FLOATS:
            given = rng.standard_normal(dims) * scale
        else:
            given = rng.choice(ranges.get(value.name, range(1, 2)), dims)
        feeds[value.name] = np.asarray(given, kind)
    return feeds


def sizes_that_run(
    run: Run, values: Sequence[onnx.ValueInfoProto], ranges: Mapping[str, range], extra: Mapping[str, Array]
) -> tuple[int, int] | None:
    """The first of SIZES with which a model runs, None if there is none; `extra`: inputs besides the values."""
    if not any(is_free(value, axis) for value in values for axis in range(1, rank_of(value))):
        return SIZES[0]
    for sizes in SIZES:
        try:
            run({**random_inputs(values, 1, sizes, 1.0, ranges), **extra})
        except Exception:  # noqa: BLE001, S112 - too small for its strides, say: the next is tried
            continue
        return sizes
    return None


def fitting_exponent(model: onnx.ModelProto, ranges: Mapping[str, range]) -> int:
    """The exponent of the seed's scale that suits a converted model, whose last input is that scale.

    It is tried on two samples of random inputs; real ones may differ, which is what the room on both sides is for.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    *values, factor = [value for value in model.graph.input if value.name not in weights]
    kind = onnx.helper.tensor_dtype_to_np_dtype(factor.type.tensor_type.elem_type)
    run = session(model)
    sizes = sizes_that_run(run, values, ranges, {factor.name: np.asarray(1, kind)})
    if sizes is None:
        raise OnnxgbpError("seed scale auto: the model runs with none of the usual sizes; give a number")
    feeds = random_inputs(values, 2, sizes, 1.0, ranges)
    names = [output.name for output in model.graph.output if output.name.startswith("attribution")][:-1]

    def maps(exponent: int) -> list[Array]:
        found = run({**feeds, factor.name: np.asarray(2.0**exponent, kind)})
        return [found[name] for name in names]

    return fit(maps, start(None))[0]


def rank_of(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def is_free(value: onnx.ValueInfoProto, axis: int) -> bool:
    return axis < rank_of(value) and value.type.tensor_type.shape.dim[axis].dim_value <= 0
