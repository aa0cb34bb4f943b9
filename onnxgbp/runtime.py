"""Running: one ONNX Runtime session behind a call that takes arrays and a class, and gives arrays.

Protobuf lives here and in `model.py` only. ONNX Runtime is imported on first use, never by importing onnxgbp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgbp.convert import GradientGraph
from onnxgbp.diagnose import first_not_finite, why_blank
from onnxgbp.emit import dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.installed import onnxruntime_module
from onnxgbp.labels import find_label, labels_of
from onnxgbp.methods import (
    find_method,
    parse_method,
    parse_methods,
    rule_of,
    sampling_options,
    sampling_text,
)
from onnxgbp.model import METADATA, ModelLike, Source, load
from onnxgbp.results import result_names
from onnxgbp.rules import Rules, listed, parse_rules
from onnxgbp.sampled_methods import At, Sample
from onnxgbp.scale import Census, computes_in_float16, fit, lost, parse_seed_scale, start
from onnxgbp.target import classes_of, parse_unit, unit_text

__all__ = ["Explainer", "Explanation", "InputSpec", "open_session", "provider_of", "scores_output"]

Array: TypeAlias = npt.NDArray[Any]
Target: TypeAlias = "int | str | Sequence[int | str] | Sequence[Sequence[int | str]] | npt.NDArray[Any] | None"

_PROVIDERS = ("auto", "cpu", "cuda")
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}
# What an output may have passed through between the explained tensor and its own name; see `explained.py`.
_BEHIND_SCORES = frozenset(
    {"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Cast", "Reshape", "Squeeze", "Flatten", "ZipMap"}
)
# Every fault reaches the caller as an exception of ours, so the runtime's own lines on stderr would only repeat it.
_FATAL_ONLY = 4


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """An input of the model. shape: a size, or the name (or None) of a free dimension, per axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"input '{self.name}'"


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What one call gives.

    attribution: raw and signed, shape and dtype of the tensor that is attributed to (the input, or for a model of
        integers their lookup or floats; the map of grad-cam is [N, 1, H, W], see `graph_methods.py`), float32 where the
        seed's scale was divided out of float16; [N, K, ...] for K targets a sample. A dict by tensor name where several
        are attributed to, a dict by method where there are several methods, of such dicts where both.
    scores: the model's own output that the explained tensor belongs to, as the model returns it (probabilities where
        the model ends in a softmax); of an inner tensor, the model's first float output.
    target: int64 [N], or [N, K]: the class (or channel) that was explained for each sample.
    outputs: every output of the model by name.
    warning: what a reader has to know of the attribution (a sample of nothing but zeros, numbers that are not finite,
        counts of what float16 could not hold), or ''.
    float16: the last of these alone.
    options: those of a method that runs the model at many points, as they were used: n_samples, stdevs and so on.
    completeness_gap: float64 [N], or [N, K]; of integrated gradients: the sum of the attribution less the difference
        of the explained scores at the input and the baseline.
    """

    attribution: Any  # an array nearly always: no caller should have to tell a type checker so
    scores: Array
    target: npt.NDArray[np.int64]
    outputs: dict[str, Any]
    warning: str = ""
    float16: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    completeness_gap: Array | None = None


@dataclasses.dataclass(frozen=True)
class _Made:
    """What one run of the model gives."""

    outputs: dict[str, Any]  # the model's own
    attributions: list[Array]
    chosen: npt.NDArray[np.int64]
    explained: Any  # the explained tensor, None where no method needs it
    scale: float  # of the seed; it is divided out
    float16: str  # what that could not hold


class Explainer:
    """Explains a classifier: give it arrays, get the attribution, the scores and the class of each sample.

        explainer = Explainer("net.onnx", method="guided")
        result = explainer(x)                    # x: float array [N, ...]; the strongest class of each sample
        result = explainer(x, target=[285, "tabby"])    # one class per sample, by index or name
        result = explainer(x, target=[[285, 282], [3, 4]])  # K classes per sample: attribution is [N, K, ...]

    One session is made here and used by every call; calls may come from several threads. It pickles by the model's
    path (or its bytes, for a `ModelProto`) and the options; unpickling makes a new session.

    Args:
        model: a path or a `ModelProto`: a classifier, or a file that `convert` wrote, which is run as it is.
        method: as for `convert` (None: guided), like methods, output, unit, seed, wrt, layer, rule, activations and
            profile. For a converted file each may only repeat what it was converted with. `unit` fixes the target.
            Besides, METHOD or METHOD:RULE of smoothgrad, smoothgrad-squared, vargrad, integrated-gradients and
            expected-gradients, which run the model at many points; formulas and papers stand in `sampled_methods.py`.
        n_samples, stdevs, random_seed: of the first three and of expected-gradients, by default 50, '15%' and 0: how
            many points; the width of the noise, a share of the range of each sample, or absolute as a number; the seed,
            of which alone the noise depends, not on the batch.
        n_steps, baseline: of integrated-gradients, by default 50 and 0; of expected-gradients an array of samples. A
            call may name another baseline.
        internal_batch_size: how many rows of such points run at once, by default 8, but never less than the batch; of
            a model whose batch is fixed, one point of each sample.
        seed_scale: a power of two, for models that compute in float16: the seed, divided out of the attribution again.
            auto chooses it for each call, and runs the model again (six times at most) where nothing it tried fits;
            a converted file keeps its own.
        top: explain this many strongest classes of each sample at once, when a call names no target.
        provider: auto (CUDA where it really works, else the CPU), cpu, or cuda (CUDA or an error).
        threads: threads within one operator; None leaves it to ONNX Runtime.
        diagnose: find out why a map is blank or not finite, for the first such sample of a call. It takes one more run
            of the model on that sample, with every inner tensor kept.
        warm_up: explains one sample of zeros here, so that the first call does not pay for memory and kernels.

    Raises:
        OnnxgbpError: the model or an option cannot be used, no ONNX Runtime or two of them are installed, CUDA was
            asked for and does not work, or a warm-up of a model with free dims behind the batch.
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        method: str | None = None,
        methods: str | Sequence[str] = (),
        provider: str = "auto",
        output: str | None = None,
        unit: Any = None,
        seed: str | None = None,
        top: int | None = None,
        wrt: str | Sequence[str] = (),
        layer: str | None = None,
        rule: Rules = (),
        activations: str | Sequence[str] | None = None,
        profile: str | None = None,
        seed_scale: float | str = "auto",
        n_samples: int | None = None,
        stdevs: str | float | None = None,
        n_steps: int | None = None,
        baseline: Any = None,
        random_seed: int | None = None,
        internal_batch_size: int | None = None,
        threads: int | None = None,
        diagnose: bool = True,
        warm_up: bool = False,
    ) -> None:
        if provider not in _PROVIDERS:
            raise OnnxgbpError(f"no provider is called '{provider}': choose one of {', '.join(_PROVIDERS)}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise OnnxgbpError(f"threads is {threads!r}, not a count of 1 or more")
        wrt, rule = tuple(listed(wrt, "wrt")), tuple(listed(rule, "rule"))
        methods = parse_methods("guided", methods) if methods else ()
        method = None if method is None else parse_method(method)
        sampling = {"n_samples": n_samples, "stdevs": stdevs, "n_steps": n_steps, "baseline": baseline}
        sampling |= {"random_seed": random_seed, "internal_batch_size": internal_batch_size}
        made = find_method("guided" if methods else method or "guided")
        self._sample: Sample | None = made.sample
        self.options = sampling_options(",".join(methods) or method or "guided", sampling)
        """Those of a method that runs the model at many points, with the defaults; {} of the others."""
        what: dict[str, Any] = {"method": method, "methods": methods, "output": output, "unit": unit, "seed": seed}
        what |= {"wrt": wrt, "layer": layer, "rule": rule, "activations": activations, "profile": profile, "top": top}
        self._fixed_scale = None if seed_scale == "auto" else parse_seed_scale(seed_scale)
        what["seed_scale"] = self._fixed_scale
        self._options: dict[str, Any] = {**what, "provider": provider, "threads": threads, "diagnose": diagnose}
        self._options |= {"seed_scale": seed_scale, "warm_up": warm_up, **sampling}
        if self._sample is not None:
            what["method"] = rule_of(method or "")  # the graph that runs at each point
        self._what = what
        self._diagnose = diagnose and not warm_up  # not of the zeros that it is warmed up with
        self._watched: list[str] = []
        self._of_several: dict[int, Explainer] = {}
        self._lock = threading.Lock()
        # Absolute, so that a worker in another folder finds the same file.
        self._model = model if isinstance(model, onnx.ModelProto) else str(Path(model).absolute())

        source = load(model)
        self._float16 = computes_in_float16(source.model.graph)
        self.name = source.name
        self.sha256 = source.sha256
        """sha256 of the model's bytes, as read."""
        if METADATA + "method" in source.model.metadata_props:
            _refuse_contradictions(source, what)
        proto, tensor = self._converted(source)
        dims = dims_of(tensor) if tensor is not None else None
        self.classes = dims[1] if dims and len(dims) > 1 and isinstance(dims[1], int) else None
        """How many classes the explained tensor has; None where the model leaves it open."""
        self._batch_dim = dims[0] if dims else None
        self.metadata = {entry.key: entry.value for entry in proto.metadata_props}
        """The metadata of the model that runs: the source's, and what `convert` adds under `onnxgbp.`."""
        proto = self._watching(proto) if made.scored else proto
        self._session = open_session(proto, source, provider, threads)
        self.provider = provider_of(self._session)
        """Where it runs: cpu or cuda."""
        self._read_interface(proto)
        if self._sample is not None:
            self._prepare_sampling(method or "")
        if warm_up:
            self({spec.name: _zeros(spec) for spec in self.inputs})
            self._diagnose = diagnose

    def _converted(self, source: Source) -> tuple[onnx.ModelProto, ir.Value | None]:
        """The model that runs, and the tensor that it explains."""
        model, what = self._model, self._what
        if METADATA + "method" in source.model.metadata_props:
            proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
            explained = source.model.metadata_props[METADATA + "explained"]
            return proto, next((v for v in _values(source.model) if v.name == explained), None)
        target = "argmax" if what["unit"] is not None else "input" if what["top"] is None else f"input{what['top']}"
        place = {name: what[name] for name in ("output", "unit", "wrt", "layer")} | {"seed": what["seed"] or "one"}
        methods = what["methods"] or (what["method"] or "guided",)
        scale = "input" if self._float16 else self._fixed_scale or 1.0
        graph = GradientGraph.build(source, target=target, **place, methods=methods, seed_scale=scale)
        proto = graph.render(
            methods=methods,
            rule=what["rule"],
            activations=what["activations"] or "all",
            profile=what["profile"] or "ort",
        )
        return proto, graph.explained.tensor

    def _read_interface(self, proto: onnx.ModelProto) -> None:
        """Which inputs and outputs are the source's, and which are ours: ours stand last, in a fixed order."""
        inputs = [InputSpec(i.name, _dtype(i.name, i.type), tuple(i.shape)) for i in self._session.get_inputs()]
        self._scale_input = inputs.pop() if self.metadata.get(METADATA + "seed_scale") == "input" else None
        if self._scale_input is not None:
            self.metadata[METADATA + "seed_scale"] = str(self._fixed_scale or "auto")
        else:
            self._fixed_scale = float(self.metadata.get(METADATA + "seed_scale", 1))
        self.mode = self.metadata[METADATA + "target"]
        """What chooses the class: `input` (each call), or argmax, seed or an index that a converted file has fixed."""
        self._target_input = inputs.pop() if self.mode.startswith("input") else None
        self.top = classes_of(self.mode)
        """How many classes of each sample are explained at once; None for one, without an axis for it."""
        self.labels = labels_of(self.metadata)
        """The names of the classes, [] where the model's metadata has none."""
        self.methods = tuple(self.metadata[METADATA + "method"].split(","))
        self.inputs: tuple[InputSpec, ...] = tuple(inputs)
        """What a call must be given."""
        self.wrt = tuple(json.loads(self.metadata[METADATA + "wrt"]))
        names = [output.name for output in self._session.get_outputs()]
        self._ours = [*result_names(self.methods, self.wrt), "attribution_target"]
        ours = {*self._ours, *self._watched}
        self._theirs = [name for name in names if name not in ours]  # and the views, which stand last
        types = {output.name: output.type for output in self._session.get_outputs()}
        self.scores_output = scores_output(proto, self.metadata[METADATA + "explained"], self._theirs)
        """The name of the output that `Explanation.scores` holds."""
        if self.scores_output is None:
            floats = (
                name for name in self._theirs if types[name] in ("tensor(float)", "tensor(double)", "tensor(float16)")
            )
            self.scores_output = next(floats, self._theirs[0] if self._theirs else None)

    def _watching(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """The model with the explained tensor among its outputs."""
        explained = self.metadata[METADATA + "explained"]
        if explained in {output.name for output in proto.graph.output}:
            return proto
        self._watched = [explained]
        watching = onnx.ModelProto()  # the other may be the caller's own
        watching.CopyFrom(proto)
        watching.graph.output.append(onnx.ValueInfoProto(name=explained))
        return watching

    def _prepare_sampling(self, method: str) -> None:
        """Says in the metadata what is done, and refuses what would not be the method."""
        rules = json.loads(self.metadata[METADATA + "rules"])
        self.metadata[METADATA + "rules"] = json.dumps([*rules[:-1], f"*={method}"])
        self.metadata[METADATA + "method"], self.methods = method, (method,)
        self.metadata |= {METADATA + name: text for name, text in sampling_text(self.options).items()}
        given = {spec.name for spec in self.inputs}
        if inner := [name for name in self.wrt if name not in given]:
            raise OnnxgbpError(
                f"{method} needs other values of what is attributed to, and '{inner[0]}' is no input of the model: "
                "choose another method, or an input with --wrt"
            )
        unit = self.metadata.get(METADATA + "unit", "")
        if unit.endswith("max"):
            raise OnnxgbpError(f"{method} runs many points, and unit {unit} may be another at each: name the unit")
        if self.mode.startswith("top") or (self.mode == "argmax" and not unit):
            raise OnnxgbpError(
                f"{self.name} was converted with --target {self.mode}, which may be another class at each of the "
                f"points that {method} runs: convert with --target input"
            )

    def __call__(self, x: Any, target: Target = None, *, baseline: Any = None) -> Explanation:
        """Explains a batch.

        Args:
            x: an array in the model's shape and type, or a dict of arrays by input name where there are several.
                Floats are cast to the model's float type, lists of numbers to its type; an array of integers is not
                made into floats (it is usually a picture that still has to be scaled), so cast it yourself.
            target: a class for all samples, one per sample, K per sample (shape [N, K], which takes a session of its
                own for each K), or None for the strongest of each sample; by index or name.
            baseline: of integrated-gradients and expected-gradients, in the place of the explainer's own.

        Raises:
            OnnxgbpError: an input of a wrong name, shape or type, a target that is out of range or of a wrong length,
                or the runtime fails.
        """
        # numpy's ndim and shape take what Target allows, lists of names included; their types say less
        if self.top is None and self.mode == "input" and np.ndim(target) == 2:  # type: ignore[arg-type]
            return self._several(np.shape(target)[1])(x, target, baseline=baseline)  # type: ignore[arg-type]
        feeds = self._feeds(x)
        count = self._batch(feeds)
        targets = self.check_target(target, count)
        if self._target_input is not None:
            feeds[self._target_input.name] = targets
        doubtful = target is not None and (self.classes is None or count is None)
        made = self._run(feeds, "; is the target in range, and of one class per sample?" * doubtful)
        outputs, attributions, chosen = made.outputs, made.attributions, made.chosen
        scores = _as_array(outputs[self.scores_output] if self.scores_output is not None else [])
        if count is None and self._target_input is not None:  # what could not be checked before
            samples = len(scores) if scores.ndim else len(chosen)
            # as above: ndim takes more than its type says
            if len(chosen) != samples or (np.ndim(target) and len(targets) != samples):  # type: ignore[arg-type]
                raise OnnxgbpError(_wrong_length(targets, samples))
        options, gap = self.options, None
        if self._sample is not None:
            options = options if baseline is None else options | {"baseline": baseline}
            attributions, gap = self._sampled(feeds, made, options)
        elif baseline is not None:
            raise OnnxgbpError(f"{', '.join(self.methods)} takes no baseline")
        if self._scale_input is not None:
            feeds[self._scale_input.name] = np.asarray(made.scale, self._scale_input.dtype)
        warning = "; ".join(filter(None, (self._warning(attributions, feeds), made.float16)))
        attribution = self._arranged(attributions)
        return Explanation(attribution, scores, chosen, outputs, warning, made.float16, options, gap)

    def _sampled(self, feeds: dict[str, Array], made: _Made, options: Mapping[str, Any]) -> tuple[list[Array], Any]:
        """The attributions of a method that runs the model at many points, and its completeness gap."""
        assert self._sample is not None
        feeds = dict(feeds)
        if self._target_input is not None:  # the class of the sample itself, whatever the strongest is elsewhere
            feeds[self._target_input.name] = made.chosen
        size, free = options["internal_batch_size"], self._batched()
        together = max(1, size // len(feeds[self.wrt[0]])) if free else 1

        def runs(points: Iterable[list[Array]]) -> Iterator[tuple[_Made, int]]:
            waiting = iter(points)
            while group := list(itertools.islice(waiting, together)):
                count = len(group)
                fed = {
                    name: np.concatenate([array] * count) if name in free else array for name, array in feeds.items()
                }
                fed |= {
                    name: np.concatenate(arrays)
                    for name, arrays in zip(self.wrt, zip(*group, strict=True), strict=True)
                }
                hint = "; is its batch free? internal_batch_size=1 runs one point at a time" if count > 1 else ""
                yield self._run(fed, hint), count

        def maps(points: Iterable[list[Array]]) -> Iterator[list[Array]]:
            for ran, count in runs(points):
                parts = [np.split(attribution, count) for attribution in ran.attributions]
                yield from map(list, zip(*parts, strict=True))

        def score(point: list[Array]) -> Array:
            ((ran, _),) = runs([point])
            return self._explained_score(ran.explained, made.chosen, feeds)

        at = At([feeds[name] for name in self.wrt], self.wrt, made.attributions, maps, score)
        found, gap = self._sample(at, **{k: v for k, v in options.items() if k != "internal_batch_size"})
        return [a.astype(p.dtype, copy=False) for a, p in zip(found, made.attributions, strict=True)], gap

    def _batched(self) -> set[str]:
        """The inputs with an axis for the samples; none where several points cannot share a run."""
        specs = [*self.inputs, *([self._target_input] if self._target_input is not None else [])]
        dim = next(spec.shape[0] for spec in specs if spec.name == self.wrt[0])
        if not isinstance(dim, str) or any(spec.shape[:1] == (None,) for spec in specs):
            return set()
        names = {spec.name for spec in specs if spec.shape[:1] == (dim,)}
        return names if names.issuperset(self.wrt) else set()

    def _explained_score(self, tensor: Array, chosen: Array, feeds: Mapping[str, Array]) -> Array:
        """What the attribution is the gradient of, for each sample: float64 [N], or [N, K] for K classes."""
        values = np.asarray(tensor, np.float64)
        if self.metadata[METADATA + "seed"] == "activation":
            values = values * values / 2
        if unit := parse_unit(self.metadata.get(METADATA + "unit")):
            place: tuple[Any, ...] = (slice(None), *unit)
            return np.asarray(values[place].reshape(len(values), -1).sum(axis=1))
        if self.mode == "seed":
            return np.asarray((values * feeds["seed"]).reshape(len(values), -1).sum(axis=1))
        rows = np.take_along_axis(values.reshape(len(values), -1), chosen.reshape(len(values), -1), axis=1)
        return rows.reshape(chosen.shape)

    def _run(self, feeds: dict[str, Array], hint: str) -> _Made:
        """What the model gives, with the scale of its seed divided out."""
        outputs, factor = [*self._theirs, *self._ours, *self._watched], self._scale_input
        runs = dict[float, list[Any]]()
        ours = slice(len(self._theirs), len(self._theirs) + len(self._ours))

        def maps(scale: float) -> list[Array]:
            more = {factor.name: np.asarray(scale, factor.dtype)} if factor is not None else {}
            try:
                runs[scale] = self._session.run(outputs, {**feeds, **more})
            except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
                raise OnnxgbpError(f"ONNX Runtime could not run {self.name}: {_short(error)}{hint}") from None
            return runs[scale][ours][:-1]

        def fitting() -> tuple[int, Sequence[Array]]:
            return fit(lambda exponent: maps(2.0**exponent), start(None))

        if self._fixed_scale is None:
            found = fitting()
            scale, said = 2.0 ** found[0], lost(found[1], 2.0 ** found[0], found)
        else:
            scale, own = self._fixed_scale, maps(self._fixed_scale)
            better = fitting() if factor is not None and not Census.of(own).fits else None
            said = lost(own, scale, better) if self._float16 else ""
        theirs = dict(zip(self._theirs, runs[scale], strict=False))
        *attributions, chosen = runs[scale][ours]
        if scale != 1 or factor is not None:
            attributions = [np.asarray(a, np.result_type(a, np.float32)) / np.float32(scale) for a in attributions]
        explained = runs[scale][-1] if self._watched else theirs.get(self.metadata[METADATA + "explained"])
        return _Made(theirs, attributions, chosen, explained, scale, said)

    def _warning(self, attributions: Sequence[Array], feeds: Mapping[str, Array]) -> str:
        """Which samples have a blank or a broken map, and why the first of each has."""
        rows = [np.asarray(a).reshape(len(a), -1) for a in attributions if np.ndim(a) and len(a)]
        blank = sorted({int(i) for row in rows for i in np.flatnonzero(~row.any(axis=1))})
        broken = sorted({int(i) for row in rows for i in np.flatnonzero(~np.isfinite(row).all(axis=1))})
        said = []
        if blank:
            why = self._diagnosed(why_blank, feeds, blank[0])
            said.append(f"nothing but zeros for samples {blank}{why}")
        if broken:
            why = self._diagnosed(first_not_finite, feeds, broken[0])
            said.append(f"numbers that are not finite for samples {broken}{why}")
        return "; ".join(said)

    def _diagnosed(
        self, ask: Callable[[onnx.ModelProto, Mapping[str, Array], int], str], feeds: Mapping[str, Array], sample: int
    ) -> str:
        """The reason, of one sample where the batch can be cut; '' where the model does not run in full view."""
        if not self._diagnose:
            return ""
        free = self._batch_dim is not None and not isinstance(self._batch_dim, int)
        if free and len({len(array) for array in feeds.values() if array.ndim}) == 1:
            feeds, sample = (
                {name: array[sample : sample + 1] if array.ndim else array for name, array in feeds.items()},
                0,
            )
        try:
            return f" ({ask(self._converted(load(self._model))[0], feeds, sample)})"
        except Exception as error:  # noqa: BLE001 - a model that is too large or needs its optimiser has no reason to fail
            return f" (why could not be found out: {_short(error)})"

    def _arranged(self, attributions: Sequence[Array]) -> Any:
        """By method and by tensor, as far as there are several."""
        size = len(self.wrt)
        parts = [attributions[i : i + size] for i in range(0, len(attributions), size)]
        each = [part[0] if size == 1 else dict(zip(self.wrt, part, strict=True)) for part in parts]
        return each[0] if len(self.methods) == 1 else dict(zip(self.methods, each, strict=True))

    def _several(self, count: int) -> Explainer:
        """An explainer of `count` classes a sample: K is part of the graph."""
        with self._lock:
            if count not in self._of_several:
                self._of_several[count] = Explainer(self._model, **self._options | {"top": count})
            return self._of_several[count]

    def check_target(self, target: Target, count: int | None = None) -> npt.NDArray[np.int64]:
        """The target of each of `count` samples, int64 [count] or [count, K], -1 for the strongest class.

        Without `count` one class stays one, int64 [1], which the model spreads over the samples.

        Raises:
            OnnxgbpError: out of range, of a wrong length, or not the one that a converted file was made for.
        """
        if target is None:
            return self._strongest(1 if count is None else count)
        if METADATA + "unit" in self.metadata:
            raise OnnxgbpError(f"unit {self.metadata[METADATA + 'unit']} is explained: leave the target out")
        targets = self._targets(target, count)
        if self._target_input is None and (not self.mode.isdecimal() or (targets != int(self.mode)).any()):
            raise OnnxgbpError(
                f"{self.name} was converted with --target {self.mode}: leave the target out, "
                "or convert with --target input"
            )
        return targets

    def _strongest(self, count: int) -> npt.NDArray[np.int64]:
        if self.top is None:
            return np.full(count, -1, np.int64)
        return np.full((count, self.top), -1, np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        model = self._model if isinstance(self._model, str) else self._model.SerializeToString()
        return _unpickle, (model, self._options)

    def __repr__(self) -> str:
        defaults = {"seed_scale": "auto", "diagnose": True, "warm_up": False}
        options = self._options | sampling_text({"baseline": self._options["baseline"]})
        said = {
            name: value for name, value in options.items() if value not in (None, ()) and value != defaults.get(name)
        }
        return f"Explainer({self.name!r}, {', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def _feeds(self, x: Any) -> dict[str, Array]:
        """The arrays by input name, checked and cast."""
        names = ", ".join(f"'{spec.name}'" for spec in self.inputs)
        if not isinstance(x, Mapping):
            if len(self.inputs) != 1:
                raise OnnxgbpError(f"the model has {len(self.inputs)} inputs: give a dict of arrays for {names}")
            x = {self.inputs[0].name: x}
        known = {spec.name for spec in self.inputs}
        if unknown := [str(name) for name in x if name not in known]:
            raise OnnxgbpError(f"the model has no input '{unknown[0]}': it takes {names}")
        if missing := [spec for spec in self.inputs if spec.name not in x]:
            raise OnnxgbpError(f"{missing[0]} is missing: the model takes {names}")
        feeds = {spec.name: _checked(spec, x[spec.name]) for spec in self.inputs}
        sizes: dict[str, tuple[int, InputSpec]] = {}
        for spec in self.inputs:
            for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
                # A free dimension that two inputs share by name has one size; an anonymous one is its own.
                if isinstance(dim, str) and sizes.setdefault(dim, (size, spec))[0] != size:
                    first = sizes[dim]
                    raise OnnxgbpError(f"dimension '{dim}' is {first[0]} in {first[1]} but {size} in {spec}")
        return feeds

    def _batch(self, feeds: Mapping[str, Array]) -> int | None:
        """The number of samples: the size of the dimension that `target` has; None where it has no name."""
        dim = self._target_input.shape[0] if self._target_input is not None else self._batch_dim
        if isinstance(dim, int):
            return dim
        specs = (spec for spec in self.inputs if dim is not None and dim in spec.shape)
        return next((int(feeds[spec.name].shape[spec.shape.index(dim)]) for spec in specs), None)

    def _targets(self, target: Target, count: int | None) -> npt.NDArray[np.int64]:
        """int64 [N], each in range."""
        given = _class_indices(target, self.labels)
        if self.top is not None:
            if given.ndim != 2 or given.shape != (len(given) if count is None else count, self.top):
                raise OnnxgbpError(
                    f"target has shape {list(given.shape)}: give [{count or 'N'}, {self.top}], {self.top} per sample"
                )
            targets = given.astype(np.int64)
        else:
            given = np.atleast_1d(given)
            # as in __call__: ndim takes more than its type says
            if given.ndim != 1 or (count is not None and np.ndim(target) and len(given) != count):  # type: ignore[arg-type]
                raise OnnxgbpError(_wrong_length(given, count))
            targets = np.broadcast_to(given, (len(given) if count is None else count,)).astype(np.int64)
        wrong = targets < 0 if self.classes is None else (targets < 0) | (targets >= self.classes)
        if wrong.any():
            last = "" if self.classes is None else f": the model has {self.classes} classes, 0 to {self.classes - 1}"
            raise OnnxgbpError(f"target {targets[wrong][0]} is out of range{last or '; it counts from 0'}")
        return targets


def _wrong_length(given: Array, count: int | None) -> str:
    has = (
        f"{len(given)} {'class' if len(given) == 1 else 'classes'}" if given.ndim == 1 else f"shape {list(given.shape)}"
    )
    samples = "" if count is None else f", but there {'is 1 sample' if count == 1 else f'are {count} samples'}"
    return f"target has {has}{samples}: give one class, or one per sample"


def _unpickle(model: str | bytes, options: dict[str, Any]) -> Explainer:
    return Explainer(model if isinstance(model, str) else onnx.ModelProto.FromString(model), **options)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _refuse_contradictions(source: Source, what: Mapping[str, Any]) -> None:
    """An already converted file says what it is; an option that says otherwise cannot be followed any more."""
    said = {k.removeprefix(METADATA): v for k, v in source.model.metadata_props.items() if k.startswith(METADATA)}
    unit, activations = parse_unit(what["unit"]), what["activations"]
    method = ",".join(what["methods"]) or what["method"]
    said.setdefault("seed_scale", "1.0")
    asked: dict[str, str | None] = {
        "method": method,
        "explained": what["output"],
        "unit": None if unit is None else unit_text(unit),
        "seed": what["seed"],
        "wrt": json.dumps(what["wrt"]) if what["wrt"] else None,
        "activations": activations if activations is None or isinstance(activations, str) else ",".join(activations),
        "profile": what["profile"],
        "layer": what["layer"],
        "target": None if what["top"] is None else f"top{what['top']}",
        "seed_scale": None if what["seed_scale"] is None else str(what["seed_scale"]),
    }
    if what["rule"]:
        pairs = [*parse_rules("guided", what["rule"])[:-1], ("*", method or said["method"])]
        asked["rules"] = json.dumps([f"{pattern}={name}" for pattern, name in pairs])
    for name, value in asked.items():
        if value is not None and value != said.get(name):
            option = {"explained": "output", "rules": "rule"}.get(name, name)
            raise OnnxgbpError(
                f"{source.name} is already converted with {option} {said.get(name, '(none)')}, not {value}: "
                "leave the option out, or give the model that it was made from"
            )


def scores_output(proto: onnx.ModelProto, explained: str, outputs: Sequence[str]) -> str | None:
    """The output of the source that shows the explained tensor, as it is or behind a softmax and the like."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    for output in outputs:
        name = output
        while name != explained and name in makers and makers[name].op_type in _BEHIND_SCORES:
            name = makers[name].input[0]
        if name == explained:
            return output
    return None


def _zeros(spec: InputSpec) -> Array:
    """One sample."""
    shape = [dim if isinstance(dim, int) else 1 for dim in spec.shape[:1]]
    for dim in spec.shape[1:]:
        if not isinstance(dim, int):
            raise OnnxgbpError(f"warm_up: {spec} has a free size '{dim or '?'}': leave it out, and call once yourself")
        shape.append(dim)
    return np.zeros(shape, spec.dtype)


def _dtype(name: str, kind: str) -> np.dtype[Any]:
    if kind == "tensor(bfloat16)":
        raise OnnxgbpError(
            f"input '{name}' is bfloat16, which ONNX Runtime does not take from Python: convert the model and feed the "
            "file from another language, or put a Cast from float32 before it"
        )
    if kind not in _DTYPES:
        raise OnnxgbpError(f"input '{name}' is a {kind}, which numpy arrays cannot hold")
    return np.dtype(_DTYPES[kind])


def _checked(spec: InputSpec, value: Any) -> Array:
    """The value as an array of the input's type and shape."""
    given_type = getattr(value, "dtype", None)
    try:
        array = np.asarray(value)
    except Exception as error:  # noqa: BLE001 - anything may be handed in, and raise anything
        raise OnnxgbpError(f"{spec} cannot be read as an array: {_short(error)}") from None
    if array.dtype != spec.dtype:
        array = _cast(spec, array, is_array=given_type is not None)
    expected = "[" + ", ".join(str(dim or "?") for dim in spec.shape) + "]"
    fits = len(spec.shape) == array.ndim and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        batch = " (is the batch axis missing?)" if array.ndim == len(spec.shape) - 1 else ""
        raise OnnxgbpError(f"{spec} has shape {expected}, got {list(array.shape)}{batch}")
    if not array.size:
        raise OnnxgbpError(f"{spec} is empty: its shape is {list(array.shape)}")
    return array


def _cast(spec: InputSpec, array: Array, *, is_array: bool) -> Array:
    wanted, got = spec.dtype, array.dtype
    floats = wanted.kind == "f" and got.kind == "f"
    from_list = (
        not is_array and got.kind in "iuf" and (wanted.kind == "f" or (wanted.kind in "iu" and got.kind in "iu"))
    )
    if not (floats or from_list or (wanted.kind in "iu" and np.can_cast(got, wanted)) or wanted.kind == "O"):
        hint = ""
        if wanted.kind == "f" and got.kind in "iub":
            hint = f"; scale it as the model was trained, then .astype(np.{wanted})"
        elif wanted.kind in "iu" and got.kind in "iuf":
            hint = f"; cast it with .astype(np.{wanted}) if that is meant"
        raise OnnxgbpError(f"{spec} is {wanted}, got {'an object' if got.kind == 'O' else got}{hint}")
    with np.errstate(over="ignore"):
        cast = array.astype(wanted)
    lost = (
        np.isfinite(array).all() and not np.isfinite(cast).all()
        if floats
        else (cast != array).any() and wanted.kind in "iu"
    )
    if lost:
        raise OnnxgbpError(f"{spec} is {wanted}, which cannot hold the values of the {got} array")
    return cast


def _class_indices(target: Any, labels: Sequence[str]) -> npt.NDArray[np.integer[Any]]:
    """Indices of any shape, of indices and names."""
    try:
        given = np.asarray(target, dtype=object) if isinstance(target, (str, list, tuple)) else np.asarray(target)
    except (ValueError, TypeError):
        given = np.asarray(None)
    if given.dtype.kind in "OU":
        for place, one in np.ndenumerate(given := given.astype(object)):
            if isinstance(one, str):
                given[place] = find_label(one, labels)
        if all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) for one in given.flat):
            given = given.astype(np.int64)
    if given.dtype.kind not in "iu":
        raise OnnxgbpError(f"target {target!r} is neither a class (index or name) nor a list of them")
    return given


def _as_array(value: Any) -> Array:
    """An output as an array; a list of maps, one per sample, becomes one row of values each."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return np.array([list(row.values()) for row in value])
    return np.asarray(value)


def _short(error: BaseException) -> str:
    """The first line of what the runtime says, without its own prefix."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    said = lines[0].strip() if lines else type(error).__name__
    prefix, separator, rest = said.partition(" : ")
    return rest.partition(" : ")[2] or rest if separator and prefix.startswith("[ONNXRuntimeError]") else said


def open_session(proto: onnx.ModelProto, source: Source, provider: str, threads: int | None = None) -> Any:
    """A session for a model that was made of `source`, next to whose file its external data lie.

    Raises:
        OnnxgbpError: no ONNX Runtime or two of them are installed, CUDA was asked for and does not work, or the runtime
            cannot load the model.
    """
    runtime = onnxruntime_module()
    try:
        data = proto.SerializeToString(deterministic=True)
    except Exception:  # noqa: BLE001 - protobuf's implementations differ in what they raise
        raise OnnxgbpError(f"{source.name} is larger than 2 GB: keep its weights in external data") from None
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if source.path is not None:  # where external data, if any, is looked for
        folder = str(Path(source.path).resolve().parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    compiled_in = _CUDA in runtime.get_available_providers()
    if provider == "cuda" and not compiled_in:
        raise OnnxgbpError("the installed ONNX Runtime has no CUDA: install onnxruntime-gpu in its place")
    if provider == "cuda" or (provider == "auto" and compiled_in):
        session, fault = _cuda_session(runtime, data, options, source)
        if session is not None:
            return session
        if provider == "cuda":
            raise OnnxgbpError(
                f"CUDA does not work here ({fault}): check driver, CUDA and cuDNN, or choose the provider cpu"
            )
    try:
        return runtime.InferenceSession(data, options, providers=[_CPU])
    except Exception as error:  # noqa: BLE001 - as above
        raise OnnxgbpError(f"ONNX Runtime {runtime.__version__} cannot load {source.name}: {_short(error)}") from None


def provider_of(session: Any) -> str:
    """Where it runs: cpu or cuda."""
    return "cuda" if session.get_providers()[0] == _CUDA else "cpu"


def _cuda_session(runtime: Any, data: bytes, options: Any, source: Source) -> tuple[Any, str]:
    """A session that really is on CUDA, or None and the reason. One that is not falls back to the CPU unasked."""
    # The libraries may also be found without it: the session decides, and what this prints of its failures is not ours.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        if hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()
    # TF32 keeps 10 bits of mantissa: enough to flip ReLU decisions and with them whole pixels of the map.
    providers = [(_CUDA, {"use_tf32": "0"}), _CPU]
    try:
        session = runtime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # noqa: BLE001 - as above
        return None, f"{source.name}: {_short(error)}"
    if _CUDA not in session.get_providers():
        return None, "the session fell back to the CPU"
    return session, ""
