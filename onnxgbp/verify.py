"""The proof of a converted file: what it must still be, what it must not hold, and whether its attribution is right.

Each check is one row: a figure that must not exceed its tolerance, and a sentence. The inputs are drawn from a fixed
seed, so that the same file gives the same report.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxgbp.convert import convert
from onnxgbp.emit import numel
from onnxgbp.errors import OnnxgbpError
from onnxgbp.float64 import evaluator, to_float64
from onnxgbp.model import METADATA, Source, load, raised, to_proto

__all__ = ["Check", "Report", "verify_model"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Arrays: TypeAlias = dict[str, Array]
Run: TypeAlias = "Callable[[Mapping[str, Array]], dict[str, Any]]"

STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_FACTS = ("version", "method", "rules", "activations", "target", "explained", "wrt", "profile", "sha256")

# Runtimes fuse differently where more tensors are read: 5e-7 of the range was seen on a residual net.
_FORWARD = 1e-5
# Two conversions of one model are the same graph: no flipped ReLU decides here, as it does between precisions.
_COSINE, _MEDIAN = 1e-4, 1e-4  # 1 - cosine; the median of the relative error, where rounding to bfloat16 gives 1e-3
# float64: the step is small enough that hardly a ReLU switches within it, and large enough to leave seven digits.
# float32: differences lose half of the digits, and within the larger step that this asks for, many a ReLU switches.
_DIFFERENCE = {"float64": 1e-4, "float32": 5e-2}
# In units of the input's root mean square, tried until one agrees: which is right depends on how far the gradient is
# below the scores. A wrong gradient agrees with none, least of all along several directions.
_STEPS = {"float64": (1e-7, 1e-8, 1e-6), "float32": (1e-3, 1e-2)}
_RUNTIME = 2e-2  # 1 - cosine: in a small net one MaxPool that decides otherwise in float32 has cost 6e-3
_DIRECTIONS = 2  # random ones, besides the gradient's own
_AFFORDABLE = 1e12  # multiplications: about two minutes on one core
_SIZES = (32, 28, 64, 30, 224, 8, 299)  # tried in this order for free dims other than the batch
_CHANNELS = (3, 1)  # and for axis 1 of a batch of images
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
        return all(rule.endswith("=gradient") for rule in self.rules)

    @property
    def results(self) -> dict[str, str]:
        """The outputs that a conversion adds, and the tensor that each is the attribution of."""
        wrt = self.wrt
        return {f"attribution_{name}" if len(wrt) > 1 else "attribution": name for name in wrt}

    def convert(self, model: str | onnx.ModelProto, *, plain: bool = False) -> onnx.ModelProto:
        return convert(
            model,
            method="gradient" if plain else self.said["method"],
            rule=[] if plain else self.rules[:-1],  # the last is the method
            activations=self.said["activations"],
            target=self.said["target"],
            output=self.said["explained"],
            unit=self.said.get("unit"),
            wrt=self.wrt,
            profile=self.said["profile"],
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
        self.source = load(source) if source is not None else None
        _onnxruntime()

    def rows(self) -> Iterator[Check]:
        yield self._row("recorded facts", self._facts)
        yield self._row("standard operators", self._standard)
        if self.source is not None:
            yield self._row("source file", self._source_file)
            yield self._row("forward structure", self._structure)
        yield self._row("forward unchanged", self._forward_unchanged)
        yield self._row("attribution", self._finite_difference)
        yield self._row("attribution reproduced", self._reproduced)
        yield self._row("runtime", self._runtime)

    def _row(self, name: str, check: Callable[[], Check | str]) -> Check:
        """Runs one check; whatever stops it is a failure of the file, told in one line."""
        try:
            outcome = check()
        except _Failed as failure:
            return Check(name, False, str(failure))
        except Exception as error:  # noqa: BLE001 - runtimes raise many kinds, and a report has to hold each
            return Check(name, False, f"could not be checked: {_first_line(error)}")
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
        added = [*self.record.results, "attribution_target"]
        if names[-len(added) :] != added:
            raise _Failed(f"the outputs should end with {', '.join(added)}, and are {', '.join(names)}")
        for result, name in self.record.results.items():
            if known[result] != known[name]:
                raise _Failed(f"output '{result}' is not of the type of '{name}'")
        return f"opset {_opset(self.proto)}, IR {self.proto.ir_version}{self._raised()}"

    def _raised(self) -> str:
        """What the conversion raised, where it says so; a failure where the source needs no such thing."""
        if self.source_path is None:
            return ""
        source = onnx.load(self.source_path, load_external_data=False)
        opset, version = _opset(source), source.ir_version
        if _opset(self.proto) <= opset and self.proto.ir_version <= version:
            return ", as the source"
        fresh = self.record.convert(str(self.source_path))
        if _opset(self.proto) > _opset(fresh) or self.proto.ir_version > fresh.ir_version:
            raise _Failed(
                f"opset {_opset(self.proto)}, IR {self.proto.ir_version} are above the source's {opset}, {version}"
            )
        return f", raised from opset {opset} and IR {version}, since the gradient needs it"

    def _standard(self) -> Check:
        faults = [f"local function {function.name}" for function in self.proto.functions]
        forward = {output for node in self.forward.graph.node for output in node.output}
        own = {node.domain for node in self.forward.graph.node if not node.domain.startswith("onnxgbp")}
        needed = _needed(self.proto.graph, [output.name for output in self.proto.graph.output])
        for node in self.proto.graph.node:
            if node.domain not in STANDARD and (node.domain not in own or not forward & set(node.output)):
                faults.append(f"node '{_label(node)}' is {node.op_type} of domain '{node.domain}'")
            if not needed & set(node.output):
                faults.append(f"nothing needs node '{_label(node)}'")
        note = ""
        if complaint := _complaint(str(self.out)):
            # A source that the checker does not pass cannot be made to pass: not a node of it is changed.
            if _complaint(self.forward) is None:
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
        for fault in _compare(_at_opset(self.source, self.source_path, _opset(self.proto)), self.proto):
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
                    raise _Failed(f"the source does not run: {_first_line(error)}") from None
                continue
            found = self.out_run(self._with_extra(feeds))
            batches.append(str(batch or "as fixed"))
            for name in names:
                if name not in wanted:
                    raise _Failed(f"output '{name}' is none of the source's")
                difference = _difference(found[name], wanted[name])
                tolerance = max(tolerance, _resolution(wanted[name]))
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
        return Check("", error <= _DIFFERENCE[kind], said, error, _DIFFERENCE[kind])

    def _best_step(self, gradient: onnx.ModelProto, kind: str) -> tuple[float, list[float]]:
        """The first step that agrees, or else the nearest, with the relative errors along the directions."""
        feeds = self._cast(self._with_extra(self.feeds), kind)
        found = self._engine(_extract(gradient, self._types, list(self.record.results)), kind)(feeds)
        tried = []
        for step in _STEPS[kind]:
            tried.append((step, self._directions(found, kind, step)))
            if np.median(tried[-1][1]) <= _DIFFERENCE[kind]:
                break
        return min(tried, key=lambda one: float(np.median(one[1])))

    def _directions(self, found: Arrays, kind: str, relative: float) -> list[float]:
        errors = list[float]()
        for result, name in self.record.results.items():
            cut = _extract(self.forward, self._types, [self.record.said["explained"]], stop={name})
            run = self._engine(cut, kind)
            base = self._cast({**self.feeds, **self.middle}, kind)
            x, slope = base[name], found[result].astype(np.float64)
            seed = self.seed.astype(np.float64)
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
        fresh = _session(self.record.convert(self.forward_model))(self._with_extra(self.feeds))
        found = self.found
        worst, median, tolerance = 0.0, 0.0, _MEDIAN
        for result in self.record.results:
            a, b = found[result].astype(np.float64), fresh[result].astype(np.float64)
            if a.shape != b.shape:
                raise _Failed(f"'{result}' has shape {list(a.shape)}, a fresh conversion gives {list(b.shape)}")
            worst = max(worst, _angle(a, b))
            median = max(median, _median_error(a, b))
            tolerance = max(tolerance, 8 * _resolution(fresh[result]))
        target, wanted = found["attribution_target"], fresh["attribution_target"]
        if not np.array_equal(target, wanted) or not np.array_equal(target, self.expected_target):
            raise _Failed(f"attribution_target is {target.tolist()}, it should be {self.expected_target.tolist()}")
        said = f"1 - cosine with a fresh conversion; median relative error {median:.2g} (at most {tolerance:.2g})"
        if not any(np.any(fresh[result]) for result in self.record.results):
            said += "; the map is zero at every input tried"
        return Check("", worst <= _COSINE and median <= tolerance, said, worst, _COSINE)

    def _runtime(self) -> Check:
        self._require_facts()
        found = {result: self.found[result] for result in self.record.results}
        if any(array.dtype.itemsize < 4 for array in found.values()):
            return Check("", True, "not applicable: with 16 bits every layer rounds, and many ReLUs decide otherwise")
        if self.cost > _AFFORDABLE:
            return Check("", True, "not run: too large for the reference evaluator")
        try:
            wide = self._engine(self.proto, "float64")(self._cast(self._with_extra(self.feeds), "float64"))
        except Exception as error:  # noqa: BLE001 - an operator that the reference evaluator lacks, or has no float64 of
            return Check("", True, f"not run: the reference evaluator stops at {_first_line(error)}")
        worst = max(_angle(found[result], wide[result]) for result in found)
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
        cut = _extract(self.proto, self._types, [*names, *(name for name in keep if name in self._types)])
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
    def original_run(self) -> Run:
        return _session(self.source_path if self.source_path is not None else self.forward)

    @functools.cached_property
    def out_run(self) -> Run:
        return _session(self.out)

    @functools.cached_property
    def inner_run(self) -> Run:
        """The forward part up to the explained tensor and those that are attributed to."""
        inner = [name for name in self.record.wrt if name not in {value.name for value in self._fed}]
        return _session(_extract(self.forward, self._types, [self.record.said["explained"], *inner]))

    @functools.cached_property
    def free_batch(self) -> bool:
        return any(_is_free(value, 0) for value in self._fed)

    @functools.cached_property
    def _fed(self) -> list[onnx.ValueInfoProto]:
        """The inputs of the source, as the file has them."""
        graph = self.proto.graph
        added = {"input": "target", "seed": "seed"}.get(self.record.said.get("target", ""))
        other = {tensor.name for tensor in graph.initializer} | {added}
        return [value for value in graph.input if value.name not in other]

    @functools.cached_property
    def free_sizes(self) -> tuple[int, int]:
        """Channels, and any other free dim that is not the batch, with which the model runs."""
        choices = [(channels, size) for size in _SIZES for channels in _CHANNELS]
        if not any(_is_free(value, axis) for value in self._fed for axis in range(1, _rank(value))):
            return choices[0]
        for sizes in choices:
            try:
                _session(self.forward)(_random_inputs(self._fed, 1, sizes, 1.0))
            except Exception:  # noqa: BLE001, S112 - too small for its strides, say: the next is tried
                continue
            return sizes
        raise _Failed(f"the model runs with none of the sizes {', '.join(map(str, _SIZES))} for its free dims")

    def inputs(self, batch: int | None, scale: float = 1.0) -> Arrays:
        return _random_inputs(self._fed, batch or 2, self.free_sizes, scale)

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
        if self.record.said.get("target") not in ("input", "seed"):
            return feeds
        explained = self.inner_run(feeds)[self.record.said["explained"]]
        if self.record.said["target"] == "seed":
            return feeds | {"seed": np.random.default_rng(2).standard_normal(explained.shape).astype(explained.dtype)}
        return feeds | {"target": np.arange(len(explained), dtype=np.int64) % min(3, explained.shape[1] + 1) - 1}

    @functools.cached_property
    def expected_target(self) -> Array:
        """The class or unit that has to be explained for each sample, int64 [N]."""
        explained, target = self.middle[self.record.said["explained"]], self.record.said["target"]
        if "unit" in self.record.said:
            return np.full(len(explained), int(self.record.said["unit"].split(",")[0]))
        if target == "seed":
            seed = self._with_extra(self.feeds)["seed"]
            return seed.reshape(len(seed), -1).argmax(1) if seed.ndim > 1 else np.full(len(seed), -1)
        strongest: Array = explained.reshape(len(explained), -1).argmax(1)
        if target == "argmax":
            return strongest
        given = self._with_extra(self.feeds)["target"] if target == "input" else np.full(len(explained), int(target))
        return np.where(given == -1, strongest, given)

    @functools.cached_property
    def seed(self) -> Array:
        """The gradient at the explained tensor, made here once more and not by the code under test."""
        explained = self.middle[self.record.said["explained"]]
        if self.record.said["target"] == "seed":
            return self._with_extra(self.feeds)["seed"]
        seed = np.zeros(explained.shape)
        if "unit" in self.record.said:
            at: Any = (slice(None), *(int(index) for index in self.record.said["unit"].split(",")))
            seed[at] = 1
        else:
            seed.reshape(len(seed), -1)[np.arange(len(seed)), self.expected_target] = 1
        return seed

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
        return _reference(to_float64(model)) if kind == "float64" else _session(model)

    @staticmethod
    def _cast(feeds: Arrays, kind: str) -> Arrays:
        if kind == "float32":
            return feeds
        return {name: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x for name, x in feeds.items()}


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # heavy, and converting does not need it
    except ImportError:
        raise OnnxgbpError(
            "verify runs the model, and onnxruntime is not installed: pip install 'onnxgbp[cpu]'"
        ) from None
    return onnxruntime


def _session(model: onnx.ModelProto | Path) -> Run:
    """A model in onnxruntime, as a function from its inputs to its outputs by name."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it logs, it raises as well
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}

    def run(feeds: Mapping[str, Array]) -> dict[str, Any]:
        given = {name: array for name, array in feeds.items() if name in taken}
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def _reference(model: onnx.ModelProto) -> Run:
    engine = evaluator(model)
    taken = {value.name for value in model.graph.input}

    def run(feeds: Mapping[str, Array]) -> dict[str, Any]:
        with np.errstate(all="ignore"):
            given = {name: array for name, array in feeds.items() if name in taken}
            return dict(zip(engine.output_names, engine.run(None, given), strict=True))

    return run


def _random_inputs(values: Sequence[onnx.ValueInfoProto], batch: int, sizes: tuple[int, int], scale: float) -> Arrays:
    """Seeded inputs: normal for floats, small numbers for token ids, ones for masks."""
    batches = {value.type.tensor_type.shape.dim[0].dim_param for value in values if _is_free(value, 0)} - {""}
    rng, feeds = np.random.default_rng(0), Arrays()
    for value in values:
        dims = []
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            free = batch if axis == 0 or dim.dim_param in batches else sizes[not (axis == 1 and _rank(value) == 4)]
            dims.append(dim.dim_value if dim.dim_value > 0 else free)
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if value.type.tensor_type.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.UINT8):
            feeds[value.name] = (np.ones(dims) if "mask" in value.name else rng.integers(0, 10, dims)).astype(kind)
        else:
            feeds[value.name] = (rng.standard_normal(dims) * scale).astype(kind)
    return feeds


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _is_free(value: onnx.ValueInfoProto, axis: int) -> bool:
    return axis < _rank(value) and value.type.tensor_type.shape.dim[axis].dim_value <= 0


def _extract(
    model: onnx.ModelProto, types: Mapping[str, int], outputs: Sequence[str], stop: set[str] | None = None
) -> onnx.ModelProto:
    """The part of a model that makes `outputs`; tensors of `stop` become inputs of it."""
    graph, stop = model.graph, stop or set()
    needed = _needed(graph, outputs, stop)
    cut = onnx.ModelProto()
    cut.ir_version = model.ir_version
    cut.opset_import.extend(model.opset_import)
    cut.functions.extend(model.functions)
    cut.graph.name = graph.name or "graph"
    cut.graph.node.extend(node for node in graph.node if needed & set(node.output) and not stop & set(node.output))
    cut.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed - stop)
    inputs = {value.name: value for value in graph.input}
    cut.graph.input.extend(value for value in graph.input if value.name in needed)
    fresh = [name for name in sorted(stop) if name not in inputs]
    cut.graph.input.extend(onnx.helper.make_tensor_value_info(name, types[name], None) for name in fresh)
    declared = {value.name: value for value in graph.output}
    for name in outputs:
        value = declared.get(name) or onnx.helper.make_tensor_value_info(name, types[name], None)
        cut.graph.output.append(value)
    return cut


def _needed(graph: onnx.GraphProto, outputs: Sequence[str], stop: set[str] | None = None) -> set[str]:
    """The names of all tensors that these outputs depend on, themselves included."""
    makers = {output: node for node in graph.node for output in node.output if output}
    needed, waiting = set[str](), list(outputs)
    while waiting:
        name = waiting.pop()
        if not name or name in needed:
            continue
        needed.add(name)
        if name in makers and name not in (stop or ()):
            waiting.extend(_reads(makers[name]))
    return needed


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, the bodies of its control flow included; names of a body's own do no harm."""
    yield from node.input
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs]:
            for inner in body.node:
                yield from _reads(inner)
            yield from (output.name for output in body.output)


def _at_opset(source: Source, path: Path, opset: int) -> onnx.ModelProto:
    """The source as the conversion read it, raised to the file's opset in the same steps."""
    while (now := source.model.graph.opset_imports[""]) < opset:
        source = raised(source, 13 if now < 13 <= opset else 18 if now < 18 <= opset else opset)
    proto = to_proto(source.model, source)
    onnx.external_data_helper.load_external_data_for_model(proto, str(path.resolve().parent))
    return proto


def _compare(source: onnx.ModelProto, out: onnx.ModelProto) -> Iterator[str | None]:
    """Walks both graphs back from the source's outputs: None for each node or weight that is the same."""
    makers = [{o: node for node in model.graph.node for o in node.output if o} for model in (source, out)]
    weights = [{tensor.name: tensor for tensor in model.graph.initializer} for model in (source, out)]
    names = [output.name for output in source.graph.output]
    if [output.name for output in out.graph.output][: len(names)] != names:
        yield f"the outputs do not begin with the source's {', '.join(names)}"
        return
    pairs, seen = [(name, name) for name in names], set[tuple[str, str]]()
    while pairs:
        pair = pairs.pop()
        if pair in seen:
            continue
        seen.add(pair)
        mine, other = (makers[i].get(pair[i]) for i in (0, 1))
        if mine is None or other is None:
            yield _compare_leaf(pair, mine, other, weights)
            continue
        seen.update(zip(mine.output, other.output, strict=False))
        difference = _compare_node(mine, other)
        yield difference
        if difference is None:
            pairs += zip(_reads(mine), _reads(other), strict=False)


def _compare_leaf(
    pair: tuple[str, str], mine: Any, other: Any, weights: Sequence[Mapping[str, onnx.TensorProto]]
) -> str | None:
    a, b = (weights[i].get(pair[i]) for i in (0, 1))
    if (mine is None) != (other is None) or (a is None) != (b is None):
        return f"tensor '{pair[0]}' is made otherwise"
    if a is not None and b is not None:
        return None if _tensor_key(a) == _tensor_key(b) else f"weight '{pair[0]}' differs"
    return None if pair[0] == pair[1] else f"input '{pair[0]}' is read as '{pair[1]}'"


def _compare_node(mine: onnx.NodeProto, other: onnx.NodeProto) -> str | None:
    label = _label(mine)
    if (mine.op_type, mine.domain) != (other.op_type, other.domain):
        return f"node '{label}' was {mine.op_type}, is {other.op_type}"
    if len(mine.input) != len(other.input) or list(map(bool, mine.input)) != list(map(bool, other.input)):
        return f"node '{label}' has other inputs"
    a, b = ({attribute.name: _attribute_key(attribute) for attribute in node.attribute} for node in (mine, other))
    changed = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    return f"attribute '{min(changed)}' of node '{label}' differs" if changed else None


def _attribute_key(attribute: onnx.AttributeProto) -> Any:
    """The value by its meaning: a tensor may be stored in two forms."""
    if attribute.HasField("t"):
        return _tensor_key(attribute.t)
    plain = onnx.AttributeProto()
    plain.CopyFrom(attribute)
    plain.ClearField("doc_string")
    return plain.SerializeToString(deterministic=True)


def _tensor_key(tensor: onnx.TensorProto) -> tuple[Any, ...]:
    data: Any = (
        tuple(tensor.string_data)
        if tensor.data_type == onnx.TensorProto.STRING
        else onnx.numpy_helper.to_array(tensor).tobytes()
    )
    return tensor.data_type, tuple(tensor.dims), data


def _complaint(model: str | onnx.ModelProto) -> str | None:
    """What onnx.checker has to say against a model."""
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - besides its own kind it raises what protobuf raises
        return _first_line(error)
    return None


def _difference(found: Any, wanted: Any) -> float:
    """The largest difference as a share of the range; infinite for another shape or type, or other labels."""
    if isinstance(wanted, list):  # ZipMap gives a list of maps
        if not isinstance(found, list) or len(found) != len(wanted):
            return math.inf
        return max((_difference(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
    if isinstance(wanted, dict):
        same = isinstance(found, dict) and list(found) == list(wanted)
        return _difference(np.array([*found.values()]), np.array([*wanted.values()])) if same else math.inf
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if not np.issubdtype(wanted.dtype, np.floating):
        return 0.0 if np.array_equal(found, wanted) else math.inf
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return math.inf
    different = (a != b) & ~np.isnan(b)
    if not different.any():
        return 0.0
    finite = b[np.isfinite(b)]
    scale = float(np.ptp(finite)) or float(np.abs(finite).max()) if finite.size else 0.0
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(a - b)[different].max())
    return largest / scale if scale else math.inf


def _resolution(array: Any) -> float:
    """What a type narrower than float32 adds to a tolerance: a few of its smallest steps."""
    kind = getattr(array, "dtype", None)
    if kind is None or not np.issubdtype(kind, np.floating) or kind.itemsize >= 4:
        return 0.0
    return 4 * float(np.finfo(kind).eps)


def _angle(a: Array, b: Array) -> float:
    """1 - cosine, 0 for two zero maps, 1 where one of them is zero or not finite."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not math.isfinite(size):
        return 1.0
    if not size:
        return float(np.any(a) or np.any(b))
    return max(1.0 - float(a @ b) / size, 0.0)


def _median_error(a: Array, b: Array) -> float:
    """The median of |a - b| / |b| over what is not nearly zero."""
    counted = np.abs(b) > 1e-3 * np.abs(b).max(initial=0.0)
    return float(np.median(np.abs(a - b)[counted] / np.abs(b)[counted])) if counted.any() else float(np.any(a))


def _opset(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _label(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}({', '.join(node.output)})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
