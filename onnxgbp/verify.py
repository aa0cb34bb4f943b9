"""The proof of a converted file: what it must still be, what it must not hold, and whether its attribution is right.

Each check is one row: a figure that must not exceed its tolerance, and a sentence. The inputs are drawn from a fixed
seed, so that the same file gives the same report.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxgbp.compare import (
    angle,
    at_opset,
    checker_complaint,
    extract,
    first_line,
    label_of,
    median_error,
    needed_tensors,
    opset_of,
    relative_difference,
    resolution,
    structural_faults,
)
from onnxgbp.convert import convert, result_names
from onnxgbp.emit import numel
from onnxgbp.errors import OnnxgbpError
from onnxgbp.float64 import to_float64
from onnxgbp.inputs import integer_ranges
from onnxgbp.installed import onnxruntime_module
from onnxgbp.model import METADATA, load
from onnxgbp.scale import computes_in_float16, fit, lost, start
from onnxgbp.target import classes_of, parse_unit
from onnxgbp.trial import (
    SIZES,
    Array,
    Arrays,
    Run,
    is_free,
    random_inputs,
    reference,
    session,
    sizes_that_run,
)
from onnxgbp.views import View

__all__ = ["Check", "Report", "verify_model"]

STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_FACTS = (
    "version",
    "method",
    "rules",
    "audit",
    "activations",
    "target",
    "seed",
    "explained",
    "wrt",
    "profile",
    "sha256",
)

# Runtimes fuse differently where more tensors are read: 5e-7 of the range was seen on a residual net.
_FORWARD = 1e-5
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
_RUNTIME = 2e-2  # 1 - cosine: in a small net one MaxPool that decides otherwise in float32 has cost 6e-3
_DIRECTIONS = 2  # random ones, besides the gradient's own
_AFFORDABLE = 1e12  # multiplications: about two minutes on one core
_SCALES = (1.0, 16.0, 256.0)  # of the random input: a small one can leave a network dead
_QUANTISED = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"})


@dataclasses.dataclass(frozen=True)
class Check:
    """One row: the figure (None where there is none to give) must not exceed the tolerance."""

    name: str
    passed: bool
    detail: str
    figure: float | None = None
    tolerance: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was checked of one file."""

    file: str
    source: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite becomes null."""
        rows = [dataclasses.asdict(check) for check in self.checks]
        for row in rows:
            row["figure"] = row["figure"] if row["figure"] is not None and math.isfinite(row["figure"]) else None
        return {"file": self.file, "source": self.source, "passed": self.passed, "checks": rows}

    def to_text(self) -> str:
        lines = []
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            figure = f"{check.figure:.2g} <= {check.tolerance:.2g}" if check.figure is not None else ""
            if check.figure is not None and not check.passed:
                figure = f"{check.figure:.2g}, tolerance {check.tolerance:.2g}"
            said = f"{figure}: {check.detail}" if figure else check.detail
            lines.append(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}  {said}")
        failed = sum(not check.passed for check in self.checks)
        lines.append(f"{self.file}: " + (f"{failed} of {len(self.checks)} checks failed" if failed else "verified"))
        return "\n".join(lines)


def verify_model(out: str | Path, source: str | Path | None = None) -> Report:
    """Checks a converted file.

    Args:
        out: the file that `convert` wrote.
        source: the model that it was made from. Without it, the forward part is cut out of the file itself: then a
            weight that was changed in both directions cannot be noticed.

    Raises:
        OnnxgbpError: `out` cannot be read or is no converted file, `source` cannot be read, or onnxruntime is missing.
            Everything else that is wrong is a failing row.
    """
    out, source = Path(out), Path(source) if source is not None else None
    return Report(str(out), str(source) if source else None, tuple(_Verification(out, source).rows()))


@dataclasses.dataclass(frozen=True)
class _Record:
    """The options of the conversion, as the file's metadata tells them."""

    said: dict[str, str]

    @property
    def missing(self) -> list[str]:
        return [fact for fact in _FACTS if fact not in self.said]

    @property
    def wrt(self) -> list[str]:
        return [str(name) for name in json.loads(self.said["wrt"])]

    @property
    def rules(self) -> list[str]:
        return [str(rule) for rule in json.loads(self.said["rules"])]

    @property
    def plain(self) -> bool:
        """Whether the file's own attribution is the plain gradient."""
        return len(self.methods) == 1 and all(rule.endswith("=gradient") for rule in self.rules)

    @property
    def methods(self) -> list[str]:
        return self.said["method"].split(",")

    @property
    def results(self) -> dict[str, str]:
        """The outputs that a conversion adds, and the tensor that each is the attribution of."""
        return result_names(self.methods, self.wrt)

    @property
    def plain_results(self) -> dict[str, str]:
        """The same of a conversion to the plain gradient."""
        return self.results if self.plain else result_names(["gradient"], self.wrt)

    @property
    def classes(self) -> int | None:
        """K, where K classes of each sample are explained."""
        return classes_of(self.said["target"])

    @property
    def views(self) -> list[str]:
        """The outputs behind all others."""
        made = View(self.said.get("view", "signed"), self.said.get("reduce", "none"))
        ends = ["view"] if made.changes else []
        ends += ["heatmap"] if self.said.get("heatmap") == "uint8" else []
        return [f"{name}_{end}" for name in self.results for end in ends]

    @property
    def seed_scale(self) -> float:
        return float(self.said.get("seed_scale", 1))

    def convert(
        self, model: str | onnx.ModelProto, *, plain: bool = False, seed_scale: float | str | None = None
    ) -> onnx.ModelProto:
        return convert(
            model,
            methods=["gradient"] if plain else self.methods,
            rule=[] if plain else self.rules[:-1],  # the last is the method
            activations=self.said["activations"],
            target=self.said["target"],
            output=self.said["explained"],
            unit=self.said.get("unit"),
            seed=self.said["seed"],
            wrt=self.wrt,
            profile=self.said["profile"],
            view="signed" if plain else self.said.get("view", "signed"),
            reduce="none" if plain else self.said.get("reduce", "none"),
            heatmap=not plain and self.said.get("heatmap") == "uint8",
            seed_scale=self.seed_scale if seed_scale is None else seed_scale,
        )


class _Failed(Exception):  # noqa: N818 - it is a finding, not a fault of the program
    """Why a check failed; it ends in a row."""


class _Verification:
    """The file under test, the model that it is compared with, and the inputs that both are run on."""

    def __init__(self, out: Path, source: Path | None) -> None:
        self.out, self.source_path = out, source
        self.converted = load(out)
        self.proto = onnx.load(out)  # with external data
        prefix = len(METADATA)
        self.record = _Record(
            {e.key[prefix:]: e.value for e in self.proto.metadata_props if e.key.startswith(METADATA)}
        )
        if "method" not in self.record.said:
            raise OnnxgbpError(f"{out} is no converted file: it has no {METADATA}method in its metadata")
        if self.record.said.get("seed_scale") == "input":
            raise OnnxgbpError(f"{out} is given the scale of its seed when it runs: verify one with a fixed scale")
        self.source = load(source) if source is not None else None
        onnxruntime_module()

    def rows(self) -> Iterator[Check]:
        yield self._row("recorded facts", self._facts)
        yield self._row("standard operators", self._standard)
        if self.source is not None:
            yield self._row("source file", self._source_file)
            yield self._row("forward structure", self._structure)
        yield self._row("forward unchanged", self._forward_unchanged)
        yield self._row("attribution", self._finite_difference)
        yield self._row("attribution reproduced", self._reproduced)
        if computes_in_float16(self.converted.model.graph):
            yield self._row("float16 range", self._range)
        yield self._row("runtime", self._runtime)

    def _row(self, name: str, check: Callable[[], Check | str]) -> Check:
        """Runs one check; whatever stops it is a failure of the file, told in one line."""
        try:
            outcome = check()
        except _Failed as failure:
            return Check(name, False, str(failure))
        except Exception as error:  # noqa: BLE001 - runtimes raise many kinds, and a report has to hold each
            return Check(name, False, f"could not be checked: {first_line(error)}")
        return dataclasses.replace(outcome, name=name) if isinstance(outcome, Check) else Check(name, True, outcome)

    # The checks, in the order of the report.

    def _facts(self) -> str:
        if self.record.missing:
            raise _Failed(f"the metadata lacks {', '.join(METADATA + fact for fact in self.record.missing)}")
        known = self._types
        for what in [self.record.said["explained"], *self.record.wrt]:
            if what not in known:
                raise _Failed(f"the metadata names tensor '{what}', which the file does not hold")
        names = [output.name for output in self.proto.graph.output]
        added = [*self.record.results, "attribution_target", *self.record.views]
        if names[-len(added) :] != added:
            raise _Failed(f"the outputs should end with {', '.join(added)}, and are {', '.join(names)}")
        for result, name in self.record.results.items():
            if known.get(result) != known[name]:
                raise _Failed(f"output '{result}' is not of the type of '{name}'")
        return f"opset {opset_of(self.proto)}, IR {self.proto.ir_version}{self._raised()}"

    def _raised(self) -> str:
        """What the conversion raised, where it says so; a failure where the source needs no such thing."""
        if self.source_path is None:
            return ""
        source = onnx.load(self.source_path, load_external_data=False)
        opset, version = opset_of(source), source.ir_version
        if opset_of(self.proto) <= opset and self.proto.ir_version <= version:
            return ", as the source"
        fresh = self.record.convert(str(self.source_path))
        if opset_of(self.proto) > opset_of(fresh) or self.proto.ir_version > fresh.ir_version:
            raise _Failed(
                f"opset {opset_of(self.proto)}, IR {self.proto.ir_version} are above the source's {opset}, {version}"
            )
        return f", raised from opset {opset} and IR {version}, since the gradient needs it"

    def _standard(self) -> Check:
        faults = [f"local function {function.name}" for function in self.proto.functions]
        forward = {output for node in self.forward.graph.node for output in node.output}
        own = {node.domain for node in self.forward.graph.node if not node.domain.startswith("onnxgbp")}
        needed = needed_tensors(self.proto.graph, [output.name for output in self.proto.graph.output])
        for node in self.proto.graph.node:
            if node.domain not in STANDARD and (node.domain not in own or not forward & set(node.output)):
                faults.append(f"node '{label_of(node)}' is {node.op_type} of domain '{node.domain}'")
            if not needed & set(node.output):
                faults.append(f"nothing needs node '{label_of(node)}'")
        note = ""
        if complaint := checker_complaint(str(self.out)):
            # A source that the checker does not pass cannot be made to pass: not a node of it is changed.
            if checker_complaint(self.forward) is None:
                faults.append(f"onnx.checker: {complaint}")
            else:
                note = f"; onnx.checker does not pass the source either: {complaint}"
        private = sorted(own - STANDARD)
        kept = f", and the source's own of {', '.join(private)}" if private else ""
        said = f"{len(self.proto.graph.node)} nodes{kept}{note}" if not faults else "; ".join(faults[:3])
        return Check("", not faults, said, len(faults), 0)

    def _source_file(self) -> str:
        assert self.source_path is not None  # else there is no such row
        found, wanted = hashlib.sha256(self.source_path.read_bytes()).hexdigest(), self.record.said.get("sha256")
        if found != wanted:
            raise _Failed(
                f"{self.source_path} is another file: its sha256 is {found[:12]}..., recorded is {str(wanted)[:12]}..."
            )
        return f"sha256 {found[:12]}... as recorded"

    def _structure(self) -> Check:
        assert self.source is not None
        assert self.source_path is not None
        faults, count = [], 0
        for fault in structural_faults(at_opset(self.source, self.source_path, opset_of(self.proto)), self.proto):
            count += fault is None
            faults += [fault] if fault else []
        said = f"{count} nodes and weights, bit for bit" if not faults else "; ".join(faults[:3])
        return Check("", not faults, said, len(faults), 0)

    def _forward_unchanged(self) -> Check:
        names = [output.name for output in self.proto.graph.output if output.name not in self._added]
        original = self.original_run
        worst, where, batches, tolerance = 0.0, "", [], _FORWARD
        for batch in (1, 3) if self.free_batch else (None,):
            feeds = self.inputs(batch)
            try:
                wanted = original(feeds)
            except Exception as error:  # noqa: BLE001 - a source that only takes the exported batch, for instance
                if batch in (None, 1):
                    raise _Failed(f"the source does not run: {first_line(error)}") from None
                continue
            found = self.out_run(self._with_extra(feeds))
            batches.append(str(batch or "as fixed"))
            for name in names:
                if name not in wanted:
                    raise _Failed(f"output '{name}' is none of the source's")
                difference = relative_difference(found[name], wanted[name])
                tolerance = max(tolerance, resolution(wanted[name]))
                if not difference <= worst:
                    worst, where = difference, name
        missing = [name for name in wanted if name not in names]
        if missing:
            raise _Failed(f"the source's output '{missing[0]}' is gone")
        against = "the source" if self.trusted else "the forward part cut out of the file (no --source was given)"
        said = f"{len(names)} outputs against {against}, batch {' and '.join(batches)}, share of the range"
        return Check("", worst <= tolerance, said + (f", worst '{where}'" if where else ""), worst, tolerance)

    def _finite_difference(self) -> Check:
        self._require_facts()
        quantised = sorted({node.op_type for node in self.forward.graph.node} & _QUANTISED)
        if quantised:
            return Check("", True, f"not applicable: {quantised[0]} makes the forward pass piecewise constant")
        gradient = self.proto if self.record.plain else self.record.convert(self.forward_model, plain=True)
        kind, step, errors = "float64", 0.0, list[float]()
        if self.cost > _AFFORDABLE:
            kind = "float32"
        else:
            try:
                step, errors = self._best_step(gradient, kind)
            except Exception:  # noqa: BLE001 - an operator that the reference evaluator lacks, or has no float64 of
                kind = "float32"
        if kind == "float32":
            step, errors = self._best_step(gradient, kind)
        # A ReLU or a MaxPool that switches within the step spoils one direction, seldom most of them.
        error, which = (
            float(np.median(errors)),
            "the file's own" if self.record.plain else "a plain gradient made of it",
        )
        said = (
            f"{which}, against central differences in {kind}: median relative error over {len(errors)} directions, "
            f"step {step:g}, largest {max(errors):.2g}"
        )
        if errors == [0.0] * len(errors):
            said += "; both are zero at this input"
        tolerance = max(_DIFFERENCE[kind], *(_ROUNDING.get(held, 0.0) for held in self._types.values()))
        return Check("", error <= tolerance, said, error, tolerance)

    def _best_step(self, gradient: onnx.ModelProto, kind: str) -> tuple[float, list[float]]:
        """The first step that agrees, or else the nearest, with the relative errors along the directions."""
        feeds = self._cast(self._with_extra(self.feeds), kind)
        found = self._engine(extract(gradient, self._types, list(self.record.plain_results)), kind)(feeds)
        tried = []
        for step in _STEPS[kind]:
            tried.append((step, self._directions(found, kind, step)))
            if np.median(tried[-1][1]) <= _DIFFERENCE[kind]:
                break
        return min(tried, key=lambda one: float(np.median(one[1])))

    def _directions(self, found: Arrays, kind: str, relative: float) -> list[float]:
        errors = list[float]()
        for (result, name), place in itertools.product(self.record.plain_results.items(), range(len(self.seeds))):
            cut = extract(self.forward, self._types, [self.record.said["explained"]], stop={name})
            run = self._engine(cut, kind)
            base = self._cast({**self.feeds, **self.middle}, kind)
            x, slope = base[name], found[result].astype(np.float64)
            slope = slope if self.record.classes is None else slope[:, place]
            seed = self.seeds[place].astype(np.float64)
            score = functools.partial(self._score, run, base, name, seed)
            length = float(np.linalg.norm(slope))
            unit = math.sqrt(x.size)
            step = relative * (float(np.sqrt(np.mean(np.square(x)))) or 1.0)
            rng = np.random.default_rng(1)
            directions: list[Array] = list(rng.standard_normal((_DIRECTIONS, *x.shape)))
            if length:
                directions.append(slope / length * unit)
            for v in directions:
                change = (score(x + step * v) - score(x - step * v)) / (2 * step)
                wanted = float(np.sum(slope * v))
                # A random direction can be orthogonal to the gradient by chance: then its own size is no measure.
                scale = max(abs(wanted), length * float(np.linalg.norm(v)) / unit)
                errors.append(float(abs(change - wanted) / scale if scale else abs(change)))
        return errors

    def _score(self, run: Run, base: Arrays, name: str, seed: Array, x: Array) -> float:
        explained = run({**base, name: x.astype(base[name].dtype)})[self.record.said["explained"]]
        return float(np.sum(explained.astype(np.float64) * seed))

    def _reproduced(self) -> Check:
        self._require_facts()
        fresh = self._run_of(self.record.convert(self.forward_model))(self._with_extra(self.feeds))
        found = self.found
        worst, median, tolerance = 0.0, 0.0, _MEDIAN
        for result in self.record.results:
            a, b = found[result].astype(np.float64), fresh[result].astype(np.float64)
            if a.shape != b.shape:
                raise _Failed(f"'{result}' has shape {list(a.shape)}, a fresh conversion gives {list(b.shape)}")
            worst = max(worst, angle(a, b))
            median = max(median, median_error(a, b))
            tolerance = max(tolerance, 8 * resolution(fresh[result]))
        target, wanted = found["attribution_target"], fresh["attribution_target"]
        if not np.array_equal(target, wanted) or not np.array_equal(target, self.expected_target):
            raise _Failed(f"attribution_target is {target.tolist()}, it should be {self.expected_target.tolist()}")
        for name in self.record.views:
            zero = 128.0 if found[name].dtype == np.uint8 and self.record.said["view"] == "signed" else 0.0
            a, b = found[name].astype(np.float64) - zero, fresh[name].astype(np.float64) - zero
            if a.shape != b.shape or not angle(a, b) <= 2 * _COSINE:  # a step of 256 is coarse
                raise _Failed(f"'{name}' is not the view of the attribution that the metadata tells of")
        said = f"1 - cosine with a fresh conversion; median relative error {median:.2g} (at most {tolerance:.2g})"
        if not any(np.any(fresh[result]) for result in self.record.results):
            said += "; the map is zero at every input tried"
        return Check("", worst <= _COSINE and median <= tolerance, said, worst, _COSINE)

    def _range(self) -> Check:
        """How many entries overflow, have lost digits, or are zero where a fitting scale of the seed gives a number."""
        self._require_facts()
        made = self.record.convert(self.forward_model, seed_scale="input")
        run, factor = session(made), made.graph.input[-1]
        kind = onnx.helper.tensor_dtype_to_np_dtype(factor.type.tensor_type.elem_type)

        def maps(exponent: int) -> list[Array]:
            found = run({**self._with_extra(self.feeds), factor.name: np.asarray(2.0**exponent, kind)})
            return [found[result] for result in self.record.results]

        own = [self.found[result] for result in self.record.results]
        broken = sum(int((~np.isfinite(array)).sum()) for array in own)
        said = lost(own, self.record.seed_scale, fit(maps, start(None)))
        return Check("", not broken, said or "nothing overflows, and what is lost below is negligible", broken, 0)

    def _runtime(self) -> Check:
        self._require_facts()
        found = {result: self.found[result] for result in self.record.results}
        if self.without_kernels:
            said = f"not run, the checks above are of the reference evaluator in float64: {self.without_kernels}"
            return Check("", True, said)
        if any(array.dtype.itemsize < 4 for array in found.values()):
            return Check("", True, "not applicable: with 16 bits every layer rounds, and many ReLUs decide otherwise")
        if self.cost > _AFFORDABLE:
            return Check("", True, "not run: too large for the reference evaluator")
        try:
            wide = self._engine(self.proto, "float64")(self._cast(self._with_extra(self.feeds), "float64"))
        except Exception as error:  # noqa: BLE001 - an operator that the reference evaluator lacks, or has no float64 of
            return Check("", True, f"not run: the reference evaluator stops at {first_line(error)}")
        worst = max(angle(found[result], wide[result]) for result in found)
        said = "1 - cosine of the map in onnxruntime and in float64 on the reference evaluator"
        return Check("", worst <= _RUNTIME, said, worst, _RUNTIME)

    # What the checks share, made at first use.

    def _require_facts(self) -> None:
        if self.record.missing:
            raise _Failed("the metadata does not say how the file was made")

    @functools.cached_property
    def _added(self) -> set[str]:
        return {"attribution_target"} | {o.name for o in self.proto.graph.output if o.name.startswith("attribution")}

    @functools.cached_property
    def trusted(self) -> bool:
        """Whether the source was given and is the recorded one; else the file itself has to tell what it was."""
        return self.source is not None and self.source.sha256 == self.record.said.get("sha256")

    @functools.cached_property
    def _types(self) -> dict[str, int]:
        """The element type of every tensor."""
        graph = self.converted.model.graph
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        return {value.name or "": int(value.dtype) for value in values if value.dtype is not None}

    @functools.cached_property
    def forward(self) -> onnx.ModelProto:
        """The file without what the conversion added, whether or not that is the source."""
        names = [output.name for output in self.proto.graph.output if output.name not in self._added]
        keep = [] if self.record.missing else [self.record.said["explained"], *self.record.wrt]
        cut = extract(self.proto, self._types, [*names, *(name for name in keep if name in self._types)])
        del cut.graph.output[len(names) :]
        read = {value.name for value in cut.graph.input}
        cut.graph.input.extend(
            value for value in self._fed if value.name not in read
        )  # a caller feeds them all the same
        return cut

    @property
    def forward_model(self) -> str | onnx.ModelProto:
        """The model to convert afresh."""
        return str(self.source_path) if self.trusted else self.forward

    @functools.cached_property
    def without_kernels(self) -> str:
        """Why onnxruntime's CPU provider cannot run the model at all: float64 and bfloat16 have few kernels; or ''."""
        try:
            session(self.forward)
        except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
            return first_line(error) if "NOT_IMPLEMENTED" in str(error) else ""
        return ""

    def _run_of(self, model: onnx.ModelProto | Path) -> Run:
        """The model in onnxruntime, or, where that has no kernels for it, in float64 on the reference evaluator."""
        if not self.without_kernels:
            return session(model)
        wide = reference(to_float64(onnx.load(model) if isinstance(model, Path) else model))
        return lambda feeds: wide(self._cast(dict(feeds), "float64"))

    @functools.cached_property
    def original_run(self) -> Run:
        return self._run_of(self.source_path if self.source_path is not None else self.forward)

    @functools.cached_property
    def out_run(self) -> Run:
        return self._run_of(self.out)

    @functools.cached_property
    def inner_run(self) -> Run:
        """The forward part up to the explained tensor and those that are attributed to."""
        inner = [name for name in self.record.wrt if name not in {value.name for value in self._fed}]
        return self._run_of(extract(self.forward, self._types, [self.record.said["explained"], *inner]))

    @functools.cached_property
    def free_batch(self) -> bool:
        return any(is_free(value, 0) for value in self._fed)

    @functools.cached_property
    def _fed(self) -> list[onnx.ValueInfoProto]:
        """The inputs of the source, as the file has them."""
        graph = self.proto.graph
        target = self.record.said.get("target", "")
        added = "target" if target.startswith("input") else target if target == "seed" else None
        other = {tensor.name for tensor in graph.initializer} | {added}
        return [value for value in graph.input if value.name not in other]

    @functools.cached_property
    def _ranges(self) -> dict[str, range]:
        return integer_ranges(self.converted.model.graph)

    @functools.cached_property
    def free_sizes(self) -> tuple[int, int]:
        """Channels, and any other free dim that is not the batch, with which the model runs."""
        sizes = sizes_that_run(self._run_of(self.forward), self._fed, self._ranges, {})
        if sizes is None:
            tried = ", ".join(str(size) for size in dict.fromkeys(size for _, size in SIZES))
            raise _Failed(f"the model runs with none of the sizes {tried} for its free dims")
        return sizes

    def inputs(self, batch: int | None, scale: float = 1.0) -> Arrays:
        return random_inputs(self._fed, batch or 2, self.free_sizes, scale, self._ranges)

    @functools.cached_property
    def feeds(self) -> Arrays:
        """The first input with which the file's map is not zero; if there is none, the last."""
        for batch, scale in [(b, s) for s in _SCALES for b in (2, 1)]:
            feeds = self.inputs(batch, scale)
            try:
                results = self.out_run(self._with_extra(feeds))
            except Exception:
                if batch == 1:
                    raise
                continue  # a free batch that was baked in all the same
            if any(np.any(results[result]) for result in self.record.results):
                break
        return feeds

    @functools.cached_property
    def found(self) -> Arrays:
        return self.out_run(self._with_extra(self.feeds))

    @functools.cached_property
    def middle(self) -> Arrays:
        """The explained tensor, and tensors of `wrt` that are no inputs."""
        return self.inner_run(self.feeds)

    def _with_extra(self, feeds: Arrays) -> Arrays:
        """The input that `--target input` or `seed` adds: per sample -1, 0, 1, -1...; a random weighting."""
        target, count = self.record.said.get("target", ""), self.record.classes
        if target != "seed" and not target.startswith("input"):
            return feeds
        explained = self.inner_run(feeds)[self.record.said["explained"]]
        if target == "seed":
            return feeds | {"seed": np.random.default_rng(2).standard_normal(explained.shape).astype(explained.dtype)}
        size = len(explained) * (count or 1)
        given = np.arange(size, dtype=np.int64) % min(3, explained.shape[1] + 1) - 1
        return feeds | {"target": given if count is None else given.reshape(-1, count)}

    @functools.cached_property
    def expected_target(self) -> Array:
        """The class or unit that has to be explained for each sample, int64 [N], or [N, K] for K classes."""
        explained, target = self.middle[self.record.said["explained"]], self.record.said["target"]
        if "unit" in self.record.said:
            return self._unit[1]
        if target == "seed":
            seed = self._with_extra(self.feeds)["seed"]
            return seed.reshape(len(seed), -1).argmax(1) if seed.ndim > 1 else np.full(len(seed), -1)
        count = self.record.classes
        best: Array = np.argsort(-explained.reshape(len(explained), -1), axis=1, kind="stable")[:, : count or 1]
        best = best if count is not None else best[:, 0]
        if target.startswith("input"):
            given = self._with_extra(self.feeds)["target"]
            return np.where(given == -1, best, given)
        return best if target == "argmax" or count is not None else np.full(len(explained), int(target))

    @functools.cached_property
    def _unit(self) -> tuple[Array, Array]:
        """The unit as a seed of ones, and what `attribution_target` has to say of it."""
        explained = self.middle[self.record.said["explained"]]
        parts = parse_unit(self.record.said["unit"]) or ()
        region = np.zeros(explained.shape, bool)
        region[(slice(None), *(part for part in parts if not isinstance(part, str)))] = True
        if parts[-1] != "max":
            first = parts[0].start or 0 if isinstance(parts[0], slice) else int(parts[0])
            return region.astype(np.float64), np.full(len(explained), first)
        inside = np.where(region, explained, -np.inf).reshape(len(explained), -1)
        strongest = inside.argmax(1)
        seed = np.zeros(inside.shape)
        seed[np.arange(len(seed)), strongest] = 1
        return seed.reshape(explained.shape), strongest

    @functools.cached_property
    def seeds(self) -> list[Array]:
        """The gradients at the explained tensor, made here once more and not by the code under test."""
        explained, scale = self.middle[self.record.said["explained"]], self.record.seed_scale
        if self.record.said["target"] == "seed":
            return [self._with_extra(self.feeds)["seed"].astype(np.float64) * scale]
        if "unit" in self.record.said:
            seeds = [self._unit[0]]
        else:
            columns = self.expected_target.reshape(len(explained), -1).T
            seeds = [np.zeros(explained.shape) for _ in columns]
            for seed, column in zip(seeds, columns, strict=True):
                seed.reshape(len(seed), -1)[np.arange(len(seed)), column] = 1
        size = explained.astype(np.float64) if self.record.said["seed"] == "activation" else 1.0
        return [scale * seed * size for seed in seeds]

    @functools.cached_property
    def cost(self) -> float:
        """Multiplications of all passes that the checks make in float64, from the shapes."""
        batch = next(iter(self.feeds.values())).shape[0] if self.feeds else 1
        total = 0.0
        for node in self.converted.model.graph:
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or weight is None:
                continue
            transposed = node.op_type == "ConvTranspose"
            shapes = [value.shape for value in (weight, node.inputs[0] if transposed else node.outputs[0]) if value]
            sizes = [[dim if isinstance(dim, int) else self.free_sizes[1] for dim in shape or ()] for shape in shapes]
            along = sizes[1][2:] if "Conv" in node.op_type else sizes[1][1:-1]
            total += batch * float(numel(sizes[0]) or 0) * float(numel(along) or 0)
        # The sum holds one forward and one backward pass, and each direction takes two forward passes.
        return total * (2 + (_DIRECTIONS + 1) * len(self.record.results))

    @staticmethod
    def _engine(model: onnx.ModelProto, kind: str) -> Run:
        return reference(to_float64(model)) if kind == "float64" else session(model)

    @staticmethod
    def _cast(feeds: Arrays, kind: str) -> Arrays:
        if kind == "float32":
            return feeds
        return {name: x.astype(np.float64) if x.dtype.kind in "fV" else x for name, x in feeds.items()}
