"""The health of a trained model over a data set: dead and saturated units, activations, gradients that vanish.

One pass. Of every activation the graph itself counts, sums and bins, batch by batch, so that only a few numbers per
unit leave it, and memory does not grow with the data.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS, Activation
from onnxgbp.convert import GradientGraph, fixed_scale
from onnxgbp.data import Batch, batches, inputs_of
from onnxgbp.emit import Emit, dims_of, is_float
from onnxgbp.energy import runnable
from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import output_file, write
from onnxgbp.model import load, raised
from onnxgbp.recognise import recognise
from onnxgbp.report import Findings, aligned, json_numbers
from onnxgbp.results import result_names
from onnxgbp.rules import Edge, Measure, Rules, audit, parse_rule, parse_rules
from onnxgbp.step import label
from onnxgbp.target import parse_class
from onnxgbp.trial import session
from onnxgbp.verdict import counted, verdict

__all__ = ["model_health", "steepest"]

Array: TypeAlias = npt.NDArray[Any]

_PREFIX = "onnxgbp/health/"  # then what is measured, then the tensor
_REPORT, _PLOTS = "health.json", ("histograms.png", "gradient.png")
_SCATTER_OPSET = 16  # the first whose ScatterElements adds, which a histogram needs
_RAISED_OPSET = 18

# A histogram has bins of a power of two, half of them on either side of zero. So bins nest, whatever a batch's range.
_SIDE = 64
_EXPONENTS = range(-100, 128)  # of the powers of two that a largest |y| is compared with

# The largest |f'| where it is not 1; of what depends on the arguments, a function of them.
_STEEPEST: dict[str, Any] = {
    "LeakyRelu": lambda a: max(1.0, abs(a["alpha"])),
    "Elu": lambda a: max(1.0, a["alpha"]),
    "Selu": lambda a: a["gamma"] * max(1.0, a["alpha"]),
    "Sigmoid": 0.25,
    "HardSigmoid": lambda a: a["alpha"],
    "HardSwish": 1.5,
    "Gelu": 1.128904,
    "GeluTanh": 1.128999,
    "Swish": 1.099840,
    "Mish": 1.088498,
}


def model_health(
    model: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    method: str = "gradient",
    target: str | int | None = None,
    output: str | None = None,
    unit: Any = None,
    seed: str = "one",
    wrt: str | Sequence[str] = (),
    rule: Rules = (),
    activations: str | Sequence[str] = "all",
    limit: int = 1000,
    threshold: float = 0.01,
) -> Findings:
    """Measures every activation y = f(x) of a model over data, and the gradient dy that arrives at it.

    A unit is a channel of a feature map, over all of its positions, a feature of [N, F], or the last axis of what a
    MatMul made. A place is one position of a unit in one sample. A place is active where |f'(x)| is at least
    `threshold` of the largest slope that f has, of a ReLU where x > 0; else it is saturated. A unit that was active at
    no place is dead, one that was at all of them always active.

    The gradient's `rms` is the root mean square of dy over all places and samples, its `norm` the root mean square over
    the samples of its norm. A depth is all activations with as many others before them, gates aside: `to_next` is the
    rms of a depth over that of the depth behind it, `to_last` over that of the last one.

    Samples with numbers that are not finite, and photos that cannot be read, are left out and listed. float16 is
    counted and summed in float32, with the gradient scaled into its range.

    Args:
        model: an .onnx file.
        data: a folder of photos, a photo, a .npy, or a .npz with an array for each input, samples along axis 0.
        out: a folder for `health.json`, written last, and plots (matplotlib, the extra `plots`); made where missing.
        method: the rule of the gradient that is followed, see `rules.py`; the plain one tells what training would pass.
        target: a class by index or name, or argmax (None).
        output: as for `convert`, like unit, seed, wrt, rule and activations.
        unit: see there.
        seed: see there.
        wrt: see there.
        rule: see there.
        activations: see there.
        limit: look at no more samples than this.
        threshold: between 0 and 1.

    Raises:
        OnnxgbpError: the model, the data or an option cannot be used, or matplotlib is missing and `out` is given.
    """
    if not 0 < threshold < 1:
        raise OnnxgbpError(
            f"threshold {threshold:g} is no share of the largest slope: give more than 0 and less than 1"
        )
    folder = _Folder(Path(out)) if out is not None else None
    chosen = parse_class("argmax" if target is None else target)
    place: dict[str, Any] = {"target": "argmax" if chosen is None else chosen, "output": output, "unit": unit}
    place |= {"seed": seed, "wrt": wrt}
    method = parse_rule(method)
    look: dict[str, Any] = {"method": method, "rule": [rule] if isinstance(rule, str) else list(rule)}
    look["activations"] = activations
    source = load(model)
    place["seed_scale"] = fixed_scale(source, "auto", place, look)
    graph = GradientGraph.build(source, **place)
    if graph.model.graph.opset_imports[""] < _SCATTER_OPSET:
        graph = GradientGraph.build(raised(graph.source, _RAISED_OPSET), **place)
    axes = {activation.y.name or "": _unit_axis(activation) for activation in graph.found}
    run = runnable(session, graph.measured(_measure(axes, threshold), **look))
    reader = _Reader(data, graph, limit)
    sums = dict[str, _Sums]()
    for feeds, filled in reader:
        if folder is not None and not sums:
            folder.clear()  # the data can be read, and the long pass is still ahead
        _add(sums, runnable(run, feeds))
        if filled:  # where the batch is fixed it ends in copies of the last sample: what these add is taken off again
            copies = {name: np.repeat(array[-1:], len(array), axis=0) for name, array in feeds.items()}
            _add(sums, runnable(run, copies), -filled / len(next(iter(feeds.values()))))
    found = {activation.y.name: activation for activation in graph.found}
    rows = [
        _row(kept, found[kept["output"]], sums.get(kept["output"]), place["seed_scale"], reader.samples)
        for kept in audit(graph.choices(**look).values())
    ]
    levels = _levels(rows)
    reached = {row["node"] for row in rows}
    findings: dict[str, Any] = {
        "onnxgbp": importlib.metadata.version("onnxgbp"),
        "file": str(model),
        "sha256": source.sha256,
        "data": str(data),
        "samples": reader.samples,
        "left_out": reader.left_out,
        "method": method,
        "rules": [f"{pattern}={name}" for pattern, name in parse_rules(method, look["rule"])],
        "target": str(place["target"]) if unit is None else f"unit {graph.options['unit']}",
        "explained": graph.options["explained"],
        "threshold": threshold,
        "activations": rows,
        "depths": levels,
        "inputs": [
            {"tensor": tensor} | _gradient(sums[name], place["seed_scale"], reader.samples)
            for name, tensor in result_names([method], json.loads(graph.options["wrt"])).items()
        ],
        "not_reached": [label(node) for node in recognise(graph.source.model.graph) if label(node) not in reached],
    }
    findings = json_numbers(findings)
    findings |= {"verdict": list(verdict(findings))}
    if folder is not None:
        folder.write(findings)
    return Findings(findings, _text(findings))


class _Reader:
    """The data as batches that can be run: (feeds, how many copies of the last sample fill them up).

    Left out is what cannot be read, and what holds numbers that are not finite.
    """

    def __init__(self, data: str | Path, graph: GradientGraph, limit: int) -> None:
        self._data, self._limit = Path(data), limit
        if not self._data.exists():
            raise OnnxgbpError(f"cannot read {data}: no such file or folder")
        self._metadata = graph.source.model.metadata_props
        self._inputs = inputs_of(graph.source.model.graph)
        first = self._inputs[0].shape if self._inputs else ()
        self._fixed = bool(first) and isinstance(first[0], int)
        self.samples = 0
        self.left_out: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[tuple[dict[str, Array], int]]:
        unread = list[str]()
        for batch in batches(self._data, self._inputs, self._metadata, limit=self._limit, on_error=unread.append):
            kept = self._whole(batch)
            self.samples += len(kept)
            filled = len(next(iter(batch.feeds.values()))) - len(kept) if self._fixed else 0
            if kept:
                order = kept + kept[-1:] * filled
                yield {name: array[order] for name, array in batch.feeds.items()}, filled
        self.left_out += [{"sample": said.partition(": ")[0], "why": said} for said in unread]
        if not self.samples:
            raise OnnxgbpError(f"every sample of {self._data} holds numbers that are not finite")

    def _whole(self, batch: Batch) -> list[int]:
        """The samples of nothing but finite numbers."""
        kept = list[int]()
        for index, name in enumerate(batch.names):
            broken = [n for n, array in batch.feeds.items() if array.dtype.kind == "f" and not _finite(array[index])]
            if broken:
                self.left_out.append({"sample": name, "why": f"input '{broken[0]}' holds numbers that are not finite"})
            else:
                kept.append(index)
        return kept


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array).all())


# --- what the graph measures ----------------------------------------------------------------------

_FLOAT, _INT32 = int(ir.DataType.FLOAT), int(ir.DataType.INT32)


def steepest(activation: Activation) -> float:
    """The largest |f'(x)| there is; of a PRelu, whose slopes are a tensor, that of its right side."""
    known = _STEEPEST.get(activation.kind, 1.0)
    return float(known(activation.arguments) if callable(known) else known)


def _measure(axes: Mapping[str, int | None], threshold: float) -> Measure:
    """What `_add` reads. axes: of the units, by the name of y."""

    def at_activation(edge: Edge, _passed: ir.Value) -> dict[str, ir.Value]:
        op, axis, rank = edge.op, axes[edge.y.name or ""], len(dims_of(edge.y) or ())
        y, active = _values(op, edge.activation), _active(op, edge.activation, threshold)
        finite = op.Less(op.Abs(y), op.like(np.inf, y))
        active = op.And(active, finite)
        if axis is None:  # one unit
            y, active, finite = (op.Reshape(value, [-1]) for value in (y, active, finite))
        over = {"axes": [i for i in range(rank) if i != axis] if axis is not None else [0]}
        count = op.ReduceSum(op.Cast(finite, to=_INT32), **over)
        clean = op.Where(finite, y, op.like(0, y))
        mean = op.Div(op.ReduceSum(clean, **over), op.Max(op.Cast(count, to=_FLOAT), 1))
        measured = {
            "finite": count,
            "active": op.ReduceSum(op.Cast(active, to=_INT32), **over),
            "mean": mean,
            "spread": op.ReduceSumSquare(op.Where(finite, op.Sub(y, mean), op.like(0, y)), **over),
            "low": op.ReduceMin(op.Where(finite, y, op.like(np.inf, y)), **over),
            "high": op.ReduceMax(op.Where(finite, y, op.like(-np.inf, y)), **over),
        }
        measured["exponent"], measured["bins"] = _histogram(op, clean, finite)
        measured |= _squares(op, edge.dy)
        return {f"{_PREFIX}{what}/{edge.y.name}": value for what, value in measured.items()}

    def at_attribution(op: Emit, gradient: ir.Value) -> dict[str, ir.Value]:
        return {f"{_PREFIX}{what}/{gradient.name}": value for what, value in _squares(op, gradient).items()}

    return Measure(at_activation, at_attribution)


def _values(op: Emit, activation: Activation) -> ir.Value:
    """Y in float32: where a quantiser hid the activation, what its integers stand for."""
    y, quantiser = activation.y, activation.y.producer()
    if is_float(y):
        return _wide(op, y)
    assert quantiser is not None  # a QuantizeLinear
    axis = quantiser.attributes["axis"].as_int() if "axis" in quantiser.attributes else None
    real = op.DequantizeLinear(y, *quantiser.inputs[1:], axis=axis)
    real.type = activation.x.type
    return _wide(op, real)


def _wide(op: Emit, value: ir.Value) -> ir.Value:
    return value if value.dtype == ir.DataType.FLOAT else op.Cast(value, to=_FLOAT)


def _active(op: Emit, activation: Activation, threshold: float) -> ir.Value:
    """Where the slope is no smaller than that share of the largest, a bool of y's shape."""
    derivative = ACTIVATIONS[activation.kind](op, activation.x, activation.y, activation.arguments)
    inside: ir.Value | None = None
    if isinstance(derivative, tuple):
        inside, derivative = derivative
    elif derivative.dtype == ir.DataType.BOOL:
        return derivative  # in the model's own type, to which its bounds were rounded
    elif derivative.dtype != ir.DataType.FLOAT:
        arguments = {name: _wide(op, v) if isinstance(v, ir.Value) else v for name, v in activation.arguments.items()}
        derivative = ACTIVATIONS[activation.kind](op, _wide(op, activation.x), _wide(op, activation.y), arguments)
        assert isinstance(derivative, ir.Value)  # what it was of the other type
    cutoff = op.like(threshold * steepest(activation), derivative)
    if activation.kind == "PRelu":
        cutoff = op.Mul(op.Max(op.Abs(_wide(op, activation.arguments["slope"])), 1), threshold)
    steep = op.Not(op.Less(op.Abs(derivative), cutoff))
    return steep if inside is None else op.And(inside, steep)


def _histogram(op: Emit, clean: ir.Value, finite: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How many powers of two the largest |y| reaches, and the counts of bins that are the next power / _SIDE wide."""
    flat, counted = op.Reshape(clean, [-1]), op.Cast(op.Reshape(finite, [-1]), to=_INT32)
    powers = op.constant(np.array([2.0**e for e in _EXPONENTS], np.float32))
    reached = op.Not(op.Less(op.ReduceMax(op.Abs(flat), axes=[0]), powers))
    exponent = op.ReduceSum(op.Cast(reached, to=_INT32), axes=[0])
    scales = np.array([_SIDE * 2.0**-e for e in (*_EXPONENTS, _EXPONENTS.stop)], np.float32)
    places = op.Add(op.Floor(op.Mul(flat, op.Gather(op.constant(scales), exponent, axis=0))), _SIDE)
    none = op.constant(np.zeros(2 * _SIDE, np.int32))
    index = op.Cast(places, to=int(ir.DataType.INT64))
    return exponent, op.ScatterElements(none, index, counted, axis=0, reduction="add")


def _squares(op: Emit, gradient: ir.Value) -> dict[str, ir.Value]:
    """In float64: the square of a gradient that vanishes is below float32."""
    wide = op.Cast(op.Reshape(gradient, [-1]), to=int(ir.DataType.DOUBLE))
    return {"gradient": op.ReduceSumSquare(wide, axes=[0]), "size": op.Size(wide)}


# Operators behind which the channels stand on axis 1, and on the last.
_CHANNELS_FIRST = frozenset(
    "AveragePool BatchNormalization Conv ConvTranspose Gemm GlobalAveragePool GlobalMaxPool GroupNormalization "
    "InstanceNormalization LRN MaxPool".split()
)
_CHANNELS_LAST = frozenset("LayerNormalization MatMul RMSNormalization".split())
_MIXES_AXES = frozenset("Einsum Expand Flatten Gather Reshape".split())
_FARTHEST = 16  # nodes between an activation and what makes its channels: a bias, a normalisation in parts, a Transpose


def _unit_axis(activation: Activation) -> int | None:
    """The axis of y along which its units lie; None where it is one unit as a whole, for want of a size."""
    dims = dims_of(activation.y)
    if dims is None or len(dims) < 2:
        return None
    axis = 1
    if len(dims) > 2:
        found = _channel_axis(activation.x, _FARTHEST)
        axis = found if found is not None else len(dims) - 1 if len(dims) == 3 else 1  # tokens before their features
    return axis if isinstance(dims[axis], int) else None


def _channel_axis(value: ir.Value, steps: int) -> int | None:
    node, rank = value.producer(), len(value.shape) if value.shape is not None else 0
    if node is None or node.op_type in _MIXES_AXES or not steps:
        return None
    if node.op_type in _CHANNELS_FIRST:
        return 1
    if node.op_type in _CHANNELS_LAST:
        return rank - 1
    alike = (v for v in node.inputs if v is not None and v.shape is not None and len(v.shape) == rank)
    found = next((axis for v in alike if (axis := _channel_axis(v, steps - 1)) is not None), None)
    if found is not None and node.op_type == "Transpose":
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(rank)[::-1]
        return list(order).index(found)
    return found


# --- what is kept of it ---------------------------------------------------------------------------


@dataclasses.dataclass
class _Sums:
    """Over the batches so far, in float64, which holds counts up to 2**53; of a map the first two alone.

    size: places; gradient: the sum of squares of dy; and of the finite places of each unit their number, how many are
    active, the sum of y and of its square, the lowest and the highest; bins: counts, 2**exponent / _SIDE wide each.
    """

    size: float
    gradient: float
    finite: Array
    active: Array
    total: Array
    squares: Array
    low: Array
    high: Array
    exponent: int
    bins: Array

    @classmethod
    def of(cls, measured: Mapping[str, Array]) -> _Sums:
        given = {name: np.ravel(value).astype(np.float64) for name, value in measured.items()}
        none = np.zeros(0)
        count, mean = given.get("finite", none), given.get("mean", none)
        return cls(
            size=float(given["size"][0]),
            gradient=float(given["gradient"][0]),
            finite=count,
            active=given.get("active", none),
            total=count * mean,
            squares=given.get("spread", none) + count * mean**2,
            low=given.get("low", none),
            high=given.get("high", none),
            exponent=_EXPONENTS.start + int(given.get("exponent", np.zeros(1))[0]),
            bins=given.get("bins", np.zeros(2 * _SIDE)),
        )

    def plus(self, other: _Sums, share: float) -> _Sums:
        exponent = max(self.exponent, other.exponent)
        return _Sums(
            self.size + share * other.size,
            self.gradient + share * other.gradient,
            self.finite + share * other.finite,
            self.active + share * other.active,
            self.total + share * other.total,
            self.squares + share * other.squares,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            exponent,
            self.binned(exponent) + share * other.binned(exponent),
        )

    def binned(self, exponent: int) -> Array:
        """The counts in bins as wide or wider: each is a whole number of these."""
        places = (np.arange(-_SIDE, _SIDE) >> (exponent - self.exponent)) + _SIDE
        return np.bincount(places, weights=self.bins, minlength=2 * _SIDE)


def _add(sums: dict[str, _Sums], outputs: Mapping[str, Any], share: float = 1.0) -> None:
    """Adds a batch, by the name of the tensor; a share of it below zero takes off again what it had added."""
    measured: dict[str, dict[str, Array]] = {}
    for name, value in outputs.items():
        what, _, tensor = name.removeprefix(_PREFIX).partition("/")
        measured.setdefault(tensor, {})[what] = np.asarray(value)
    for tensor, given in measured.items():
        one = _Sums.of(given)
        sums[tensor] = sums[tensor].plus(one, share) if tensor in sums else one


def _gradient(sums: _Sums, scale: float, samples: int) -> dict[str, float]:
    total = max(sums.gradient, 0.0) / scale**2 if math.isfinite(sums.gradient) else math.nan
    return {"rms": math.sqrt(total / max(round(sums.size), 1)), "norm": math.sqrt(total / samples)}


def _row(
    kept: Mapping[str, Any], activation: Activation, sums: _Sums | None, scale: float, samples: int
) -> dict[str, Any]:
    """One activation. A unit counts as constant where it had one value at all places."""
    row = {name: kept[name] for name in ("node", "inside", "kind", "spelled", "output", "depth", "rule", "gate")}
    row |= {"measured": sums is not None}
    if sums is None:
        return row
    axis, shape = _unit_axis(activation), dims_of(activation.y) or ()
    finite, active = np.rint(sums.finite), np.rint(sums.active)
    count, seen = float(finite.sum()), finite > 0
    dead, always = seen & (active == 0), seen & (active == finite)
    constant = seen & (sums.low == sums.high)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, std = _moments(finite, sums.total, sums.squares)
        whole, spread = _moments(count, sums.total.sum(), sums.squares.sum())
        share = float(active.sum() / count) if count else math.nan
    bins = np.rint(sums.bins)
    used = np.flatnonzero(bins) if bins.any() else np.zeros(1, int)
    width = 2.0**sums.exponent / _SIDE
    counts = {"active": active.astype(np.int64).tolist(), "places": finite.astype(np.int64).tolist()}
    units = {"mean": mean, "std": std, "min": sums.low, "max": sums.high}
    return row | {
        "axis": axis,
        "unit": "tensor" if axis is None else "channel" if len(shape) > 2 else "unit",
        "units": len(finite),
        "values": round(sums.size),
        "not_finite": round(sums.size - count),
        "active": share,
        "saturated": 1 - share,
        "dead": _those(dead) | {"constant": int((dead & constant).sum())},
        "always_active": _those(always),
        "mean": float(whole),
        "std": float(spread),
        "min": float(sums.low.min()),
        "max": float(sums.high.max()),
        "histogram": {
            "start": float((used[0] - _SIDE) * width),
            "width": width,
            "counts": [int(n) for n in bins[used[0] : used[-1] + 1]],
        },
        "gradient": _gradient(sums, scale, samples),
        "per_unit": counts | {name: _short(values) for name, values in units.items()} if axis is not None else None,
    }


def _moments(count: Any, total: Any, squares: Any) -> tuple[Any, Any]:
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _those(which: Array) -> dict[str, Any]:
    indices = np.flatnonzero(which).tolist()
    return {"count": len(indices), "share": len(indices) / max(len(which), 1), "indices": indices}


def _short(values: Array) -> list[float]:
    """In the seven digits that float32 has."""
    return [float(f"{value:.7g}") for value in values]


def _levels(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The gradient by depth, the first before the last."""
    judged = [row for row in rows if row["measured"] and row["gate"] is None]
    levels = list[dict[str, Any]]()
    for depth in sorted({row["depth"] for row in judged}):
        here = [row for row in judged if row["depth"] == depth]
        squares = sum(row["gradient"]["rms"] * row["gradient"]["rms"] * row["values"] for row in here)
        rms = math.sqrt(squares / max(sum(row["values"] for row in here), 1))
        norm = math.sqrt(sum(row["gradient"]["norm"] * row["gradient"]["norm"] for row in here))
        levels.append({"depth": depth, "nodes": [row["node"] for row in here], "rms": rms, "norm": norm})
    for level, behind in itertools.zip_longest(levels, levels[1:]):
        level["to_last"] = _ratio(level["rms"], levels[-1]["rms"])
        level["to_next"] = _ratio(level["rms"], behind["rms"]) if behind is not None else None
    for row in rows:
        if row["measured"] and levels:
            row["gradient"]["to_last"] = _ratio(row["gradient"]["rms"], levels[-1]["rms"])
    return levels


def _ratio(a: float, b: float) -> float | None:
    return a / b if b and math.isfinite(a / b) else None


# --- what is shown --------------------------------------------------------------------------------


def _text(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['file']}: {counted(found['samples'], 'sample')}, {found['method']} of '{found['explained']}' "
        f"(target {found['target']})"
    ]
    if found["activations"]:
        lines += ["", *aligned([_HEADINGS, *map(_cells, found["activations"])])]
    return "\n".join([*lines, "", *(f"- {said['text']}" for said in found["verdict"])])


_HEADINGS = ("activation", "kind", "units", "dead", "always", "saturated", "mean y", "std y", "rms dy", "to last")


def _cells(row: Mapping[str, Any]) -> list[str]:
    if not row["measured"]:
        return [f"  {row['node']}", row["kind"], "not measured", *[""] * 7]
    gradient = row["gradient"]
    return [
        f"  {row['node']}",
        row["kind"] + " (gate)" * (row["gate"] is not None),
        f"{row['units']:,}",
        _share(row["dead"]["share"]),
        _share(row["always_active"]["share"]),
        _share(row["saturated"]),
        *(_number(value) for value in (row["mean"], row["std"], gradient["rms"], gradient.get("to_last"))),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


class _Folder:
    """Where the report and the plots go: the report last, so that where it is, all is there."""

    def __init__(self, path: Path) -> None:
        try:
            import matplotlib  # noqa: F401 - found out before the long pass, not after it
        except ImportError:
            raise OnnxgbpError("plots need matplotlib: pip install 'onnxgbp[plots]', or leave --out out") from None
        self._path = path

    def clear(self) -> None:
        """Makes the folder, and takes away what an earlier run left, which would pass for this one's."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            for name in (_REPORT, *_PLOTS):
                (self._path / name).unlink(missing_ok=True)
        except OSError as error:
            raise OnnxgbpError(f"cannot write {self._path}: {error.strerror or error}") from None
        with output_file(self._path / f"{_REPORT}.tmp"):
            pass
        (self._path / f"{_REPORT}.tmp").unlink(missing_ok=True)

    def write(self, findings: Mapping[str, Any]) -> None:
        from onnxgbp.plots import gradient_chart, histogram_grid  # matplotlib: only here

        for name, figure in zip(_PLOTS, (histogram_grid(findings), gradient_chart(findings)), strict=True):
            if figure is not None:
                with output_file(self._path / name) as aside:
                    figure.savefig(aside, format="png")
        text = json.dumps(findings, indent=2, ensure_ascii=False, allow_nan=False)
        write(self._path / _REPORT, (text + "\n").encode())
