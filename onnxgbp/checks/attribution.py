"""Whether the attribution is right: against finite differences, a fresh conversion, and another engine."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import onnx

from onnxgbp.checks.row import Check, Failed
from onnxgbp.checks.subject import DIRECTIONS, Subject
from onnxgbp.compare import angle, extract, first_line, median_error, resolution
from onnxgbp.scale import fit, lost, start
from onnxgbp.session import open_session, provider_of
from onnxgbp.trial import Array, Arrays, Run, session

__all__ = ["TOLERANCE", "finite_difference", "float16_range", "reproduced", "runtime"]

# Two conversions of one model are the same graph: no flipped ReLU decides here, as it does between precisions.
_COSINE, _MEDIAN = 1e-4, 1e-4  # 1 - cosine; the median of the relative error, where rounding to bfloat16 gives 1e-3
# float64: the step is small enough that hardly a ReLU switches within it, and large enough to leave seven digits.
# float32: differences lose half of the digits, and within the larger step that this asks for, many a ReLU switches.
_DIFFERENCE = {"float64": 1e-4, "float32": 5e-2}
# A constant of the gradient, say 1/n, is rounded to the model's own type even where that is widened afterwards.
_ROUNDING: dict[int, float] = {onnx.TensorProto.FLOAT16: 2.0**-11, onnx.TensorProto.BFLOAT16: 2.0**-8}
# In units of the input's root mean square, tried until one agrees: which is right depends on how far the gradient is
# below the scores. A wrong gradient agrees with none, least of all along several directions.
_STEPS = {"float64": (1e-7, 1e-8, 1e-6), "float32": (1e-3, 1e-2)}
TOLERANCE = 2e-2  # 1 - cosine: in a small net one MaxPool that decides otherwise in float32 has cost 6e-3
_AFFORDABLE = 1e12  # multiplications: about two minutes on one core
_QUANTISED = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"})


def finite_difference(s: Subject) -> Check:
    s.require_facts()
    quantised = sorted({node.op_type for node in s.forward.graph.node} & _QUANTISED)
    if quantised:
        return Check("", True, f"not applicable: {quantised[0]} makes the forward pass piecewise constant")
    gradient = s.proto if s.record.plain else s.record.convert(s.forward_model, plain=True)
    kind, step, errors = "float64", 0.0, list[float]()
    if s.cost > _AFFORDABLE:
        kind = "float32"
    else:
        try:
            step, errors = _best_step(s, gradient, kind)
        except Exception:  # noqa: BLE001 - an operator that the reference evaluator lacks, or has no float64 of
            kind = "float32"
    if kind == "float32":
        step, errors = _best_step(s, gradient, kind)
    # A ReLU or a MaxPool that switches within the step spoils one direction, seldom most of them.
    error, which = (
        float(np.median(errors)),
        "the file's own" if s.record.plain else "a plain gradient made of it",
    )
    said = (
        f"{which}, against central differences in {kind}: median relative error over {len(errors)} directions, "
        f"step {step:g}, largest {max(errors):.2g}"
    )
    if errors == [0.0] * len(errors):
        said += "; both are zero at this input"
    tolerance = max(_DIFFERENCE[kind], *(_ROUNDING.get(held, 0.0) for held in s.types.values()))
    return Check("", error <= tolerance, said, error, tolerance)


def _best_step(s: Subject, gradient: onnx.ModelProto, kind: str) -> tuple[float, list[float]]:
    """The first step that agrees, or else the nearest, with the relative errors along the directions."""
    feeds = s.cast(s.with_extra(s.feeds), kind)
    found = s.engine(extract(gradient, s.types, list(s.record.plain_results)), kind)(feeds)
    tried = []
    for step in _STEPS[kind]:
        tried.append((step, _directions(s, found, kind, step)))
        if np.median(tried[-1][1]) <= _DIFFERENCE[kind]:
            break
    return min(tried, key=lambda one: float(np.median(one[1])))


def _directions(s: Subject, found: Arrays, kind: str, relative: float) -> list[float]:
    errors = list[float]()
    for (result, name), place in itertools.product(s.record.plain_results.items(), range(len(s.seeds))):
        cut = extract(s.forward, s.types, [s.record.said["explained"]], stop={name})
        run = s.engine(cut, kind)
        base = s.cast({**s.feeds, **s.middle}, kind)
        x, slope = base[name], found[result].astype(np.float64)
        slope = slope if s.record.classes is None else slope[:, place]
        seed = s.seeds[place].astype(np.float64)
        score = functools.partial(_score, s, run, base, name, seed)
        length = float(np.linalg.norm(slope))
        unit = math.sqrt(x.size)
        step = relative * (float(np.sqrt(np.mean(np.square(x)))) or 1.0)
        rng = np.random.default_rng(1)
        directions: list[Array] = list(rng.standard_normal((DIRECTIONS, *x.shape)))
        if length:
            directions.append(slope / length * unit)
        for v in directions:
            change = (score(x + step * v) - score(x - step * v)) / (2 * step)
            wanted = float(np.sum(slope * v))
            # A random direction can be orthogonal to the gradient by chance: then its own size is no measure.
            scale = max(abs(wanted), length * float(np.linalg.norm(v)) / unit)
            errors.append(float(abs(change - wanted) / scale if scale else abs(change)))
    return errors


def _score(s: Subject, run: Run, base: Arrays, name: str, seed: Array, x: Array) -> float:
    explained = run({**base, name: x.astype(base[name].dtype)})[s.record.said["explained"]]
    return float(np.sum(explained.astype(np.float64) * seed))


def reproduced(s: Subject) -> Check:
    s.require_facts()
    fresh = s.run_of(s.record.convert(s.forward_model))(s.with_extra(s.feeds))
    found = s.found
    worst, median, tolerance = 0.0, 0.0, _MEDIAN
    for result in s.record.results:
        a, b = found[result].astype(np.float64), fresh[result].astype(np.float64)
        if a.shape != b.shape:
            raise Failed(f"'{result}' has shape {list(a.shape)}, a fresh conversion gives {list(b.shape)}")
        worst = max(worst, angle(a, b))
        median = max(median, median_error(a, b))
        tolerance = max(tolerance, 8 * resolution(fresh[result]))
    target, wanted = found["attribution_target"], fresh["attribution_target"]
    if not np.array_equal(target, wanted) or not np.array_equal(target, s.expected_target):
        raise Failed(f"attribution_target is {target.tolist()}, it should be {s.expected_target.tolist()}")
    for name in s.record.views:
        zero = 128.0 if found[name].dtype == np.uint8 and s.record.said["view"] == "signed" else 0.0
        a, b = found[name].astype(np.float64) - zero, fresh[name].astype(np.float64) - zero
        if a.shape != b.shape or not angle(a, b) <= 2 * _COSINE:  # a step of 256 is coarse
            raise Failed(f"'{name}' is not the view of the attribution that the metadata tells of")
    said = f"1 - cosine with a fresh conversion; median relative error {median:.2g} (at most {tolerance:.2g})"
    if not any(np.any(fresh[result]) for result in s.record.results):
        said += "; the map is zero at every input tried"
    return Check("", worst <= _COSINE and median <= tolerance, said, worst, _COSINE)


def float16_range(s: Subject) -> Check:
    """How many entries overflow, have lost digits, or are zero where a fitting scale of the seed gives a number."""
    s.require_facts()
    made = s.record.convert(s.forward_model, seed_scale="input")
    run, factor = session(made), made.graph.input[-1]
    kind = onnx.helper.tensor_dtype_to_np_dtype(factor.type.tensor_type.elem_type)

    def maps(exponent: int) -> list[Array]:
        found = run({**s.with_extra(s.feeds), factor.name: np.asarray(2.0**exponent, kind)})
        return [found[result] for result in s.record.results]

    own = [s.found[result] for result in s.record.results]
    broken = sum(int((~np.isfinite(array)).sum()) for array in own)
    said = lost(own, s.record.seed_scale, fit(maps, start(None)))
    return Check("", not broken, said or "nothing overflows, and what is lost below is negligible", broken, 0)


def runtime(s: Subject, provider: str = "cpu", tolerance: float = TOLERANCE) -> Check:
    """The map where it will run, against float64 on the reference evaluator, or else against ONNX Runtime's CPU."""
    s.require_facts()
    if s.without_kernels:
        said = f"not run, the checks above are of the reference evaluator in float64: {s.without_kernels}"
        return Check("", True, said)
    place, found = _on(s, provider)
    if any(found[result].dtype.itemsize < 4 for result in s.record.results):
        said = f"on {place}: not applicable: with 16 bits every layer rounds, and many ReLUs decide otherwise"
        return Check("", True, said)
    stops = "too large for the reference evaluator"
    if s.cost <= _AFFORDABLE:
        try:
            wide = s.engine(s.proto, "float64")(s.cast(s.with_extra(s.feeds), "float64"))
            return _compared(s, found, wide, place, "in float64 on the reference evaluator", tolerance)
        except Exception as error:  # noqa: BLE001 - an operator that the evaluator lacks, or has no float64 of
            stops = f"the reference evaluator stops at {first_line(error)}"
    if place == "cpu":
        return Check("", True, f"on cpu: not run: {stops}")
    return _compared(s, found, s.found, place, f"on the CPU ({stops})", tolerance)


def _on(s: Subject, provider: str) -> tuple[str, Arrays]:
    """Where the file ran, cpu or cuda, and its outputs.

    Raises:
        OnnxgbpError: CUDA was asked for, and does not work.
    """
    if provider == "cpu":
        return "cpu", s.found
    made = open_session(s.proto, s.converted, provider)
    if provider_of(made) == "cpu":
        return "cpu", s.found
    taken, names = {value.name for value in made.get_inputs()}, [output.name for output in made.get_outputs()]
    feeds = {name: array for name, array in s.with_extra(s.feeds).items() if name in taken}
    return "cuda", dict(zip(names, made.run(names, feeds), strict=True))


def _compared(s: Subject, found: Arrays, wanted: Arrays, place: str, against: str, tolerance: float) -> Check:
    worst = max(angle(found[result], wanted[result]) for result in s.record.results)
    said = f"1 - cosine of the map in onnxruntime on {place} and {against}"
    return Check("", worst <= tolerance, said, worst, tolerance)
