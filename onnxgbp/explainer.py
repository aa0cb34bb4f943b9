"""A call that takes arrays and a class, and gives arrays: one session, one model, any number of calls."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgbp.convert import GradientGraph
from onnxgbp.converted import explained_by, refuse_contradictions
from onnxgbp.diagnose import first_not_finite, why_blank
from onnxgbp.emit import dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explanation import Explanation, joined
from onnxgbp.given import Target, class_indices, feeds_of, wrong_length, zeros
from onnxgbp.labels import labels_of
from onnxgbp.methods import (
    find_method,
    parse_method,
    parse_methods,
    rule_of,
    sampling_options,
    sampling_text,
)
from onnxgbp.model import METADATA, ModelLike, Source, load
from onnxgbp.points import attributions_at_points, prepare
from onnxgbp.rules import Rules, listed
from onnxgbp.running import Running
from onnxgbp.sampled_methods import Sample
from onnxgbp.scale import computes_in_float16, parse_seed_scale
from onnxgbp.session import PROVIDERS, fault
from onnxgbp.untrusted import require_record
from onnxgbp.values import Value, as_array, is_held, on_host, shape_of

__all__ = ["Explainer"]

Array: TypeAlias = npt.NDArray[Any]

# Classes of a sample that one graph explains. Of a backward pass of 1.4 forward passes the shared forward pass is 8 %
# then; a larger graph only takes longer to load.
_TOGETHER = 8


class Explainer:
    """Explains a classifier: give it arrays, get the attribution, the scores and the class of each sample.

        explainer = Explainer("net.onnx", method="guided")
        result = explainer(x)                    # x: float array [N, ...]; the strongest class of each sample
        result = explainer(x, target=[285, "tabby"])    # one class per sample, by index or name
        result = explainer(x, target=[[285, 282], [3, 4]])  # K classes per sample: attribution is [N, K, ...]

    One session is made here and used by every call; calls may come from several threads. It pickles by the model's
    path (or its bytes, for a `ModelProto`) and the options; unpickling makes a new session, and so does the first call
    in a process that was forked, but on CUDA, which no fork survives: start such workers by spawn.

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
        threads: threads within one operator; None leaves it to ONNX Runtime, which takes every core.
        spinning: whether those threads wait for work by spinning, which is the quickest where they have the cores to
            themselves; on a machine that does other work too, without it they leave each other time.
        tf32: whether CUDA may round products to 10 bits of mantissa, which moves whole pixels of a map.
        cuda_graph: captures the run as a CUDA graph and plays it back, one call at a time. Every size of the model's
            inputs and outputs has to be fixed.
        device_outputs: `attribution` and `outputs` are OrtValues, which stay where the session runs (`from_dlpack` of
            other libraries takes them); `scores` and `target` are arrays as ever. Maps are not looked through for
            zeros and NaN then.
        diagnose: find out why a map is blank or not finite, for the first such sample of a call. It takes one more run
            of the model on that sample, with every inner tensor kept.
        warm_up: explains zeros here, so that the first call does not pay for memory and kernels: True for one sample,
            or the shape of a batch as it will come; a dict of shapes by name for several inputs.

    Raises:
        OnnxgbpError: the model or an option cannot be used, no ONNX Runtime or two of them are installed, CUDA or what
            it alone has was asked for and does not work, or a warm-up of a model with free dims behind the batch.
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
        spinning: bool = True,
        tf32: bool = False,
        cuda_graph: bool = False,
        device_outputs: bool = False,
        diagnose: bool = True,
        warm_up: bool | Sequence[int] | Mapping[str, Sequence[int]] = False,
    ) -> None:
        if provider not in PROVIDERS:
            raise OnnxgbpError(f"no provider is called '{provider}': choose one of {', '.join(PROVIDERS)}")
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
        what["seed_scale"] = None if seed_scale == "auto" else parse_seed_scale(seed_scale)
        self._options: dict[str, Any] = {**what, "provider": provider, "threads": threads, "diagnose": diagnose}
        running = {"spinning": spinning, "tf32": tf32, "cuda_graph": cuda_graph}
        self._options |= {"seed_scale": seed_scale, "warm_up": warm_up, **sampling}
        self._options |= {**running, "device_outputs": device_outputs}
        if device_outputs and self._sample is not None:
            raise OnnxgbpError(f"{method} puts maps together on the CPU: leave device_outputs out")
        if self._sample is not None:
            what["method"] = rule_of(method or "")  # the graph that runs at each point
        self._what = what
        self._diagnose = diagnose and not warm_up  # not of the zeros that it is warmed up with
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
            refuse_contradictions(source, what)
        proto, tensor = self._converted(source)
        dims = dims_of(tensor) if tensor is not None else None
        self.classes = dims[1] if dims and len(dims) > 1 and isinstance(dims[1], int) else None
        """How many classes the explained tensor has; None where the model leaves it open."""
        self._batch_dim = dims[0] if dims else None
        self._running = Running(
            proto,
            source,
            provider,
            {"threads": threads, **running},
            seed_scale=what["seed_scale"],
            float16=self._float16,
            watch=made.scored,
            stay=device_outputs,
        )
        if self._sample is not None:
            prepare(self._running, method or "", self.options)
        self.provider = self._running.provider
        """Where it runs: cpu or cuda."""
        self.metadata = self._running.metadata
        """The metadata of the model that runs: the source's, and what `convert` adds under `onnxgbp.`."""
        self.mode = self._running.mode
        """What chooses the class: `input` (each call), or argmax, seed or an index that a converted file has fixed."""
        self.top = self._running.top
        """How many classes of each sample are explained at once; None for one, without an axis for it."""
        self.labels = labels_of(self.metadata)
        """The names of the classes, [] where the model's metadata has none."""
        self.methods = self._running.methods
        self.inputs = self._running.inputs
        """What a call must be given."""
        self.wrt = self._running.wrt
        self.scores_output = self._running.scores_output
        """The name of the output that `Explanation.scores` holds."""
        _ALIVE.add(self)
        if warm_up:
            self(zeros(self.inputs, warm_up))
            self._diagnose = diagnose

    def _converted(self, source: Source) -> tuple[onnx.ModelProto, ir.Value | None]:
        """The model that runs, and the tensor that it explains."""
        model, what = self._model, self._what
        if METADATA + "method" in source.model.metadata_props:
            proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
            require_record(source.model.metadata_props, source.name)
            return proto, explained_by(source)
        target = "argmax" if what["unit"] is not None else "input" if what["top"] is None else f"input{what['top']}"
        place = {name: what[name] for name in ("output", "unit", "wrt", "layer")} | {"seed": what["seed"] or "one"}
        methods = what["methods"] or (what["method"] or "guided",)
        scale = "input" if self._float16 else what["seed_scale"] or 1.0
        graph = GradientGraph.build(source, target=target, **place, methods=methods, seed_scale=scale)
        proto = graph.render(
            methods=methods,
            rule=what["rule"],
            activations=what["activations"] or "all",
            profile=what["profile"] or "ort",
        )
        return proto, graph.explained.tensor

    def __call__(self, x: Any, target: Target = None, *, baseline: Any = None) -> Explanation:
        """Explains a batch.

        Args:
            x: an array in the model's shape and type, or a dict of arrays by input name where there are several. An
                `onnxruntime.OrtValue`, or an array of another library that lies on the session's device, is read there.
                Floats are cast to the model's float type, lists of numbers to its type; an array of integers is not
                made into floats (it is usually a picture that still has to be scaled), so cast it yourself.
            target: a class for all samples, one per sample, K per sample (shape [N, K]), or None for the strongest of
                each sample; by index or name. Up to 8 of K classes share a forward pass; they take a session of their
                own, which is kept for the next call with as many.
            baseline: of integrated-gradients and expected-gradients, in the place of the explainer's own.

        Raises:
            OnnxgbpError: an input of a wrong name, shape or type, a target that is out of range or of a wrong length,
                or the runtime fails.
        """
        if self._running.session is None:
            self._reopen()
        # numpy's ndim and shape take what Target allows, lists of names included; their types say less
        if self.top is None and self.mode == "input" and np.ndim(target) == 2:  # type: ignore[arg-type]
            return self._classes(x, target, baseline)
        feeds = feeds_of(self.inputs, x)
        if self._sample is not None:  # its points are made here
            feeds = {name: on_host(value) for name, value in feeds.items()}
        count = self._batch(feeds)
        targets = self.check_target(target, count)
        if self._running.target_input is not None:
            feeds[self._running.target_input.name] = targets
        doubtful = target is not None and (self.classes is None or count is None)
        made = self._running.run(feeds, "; is the target in range, and of one class per sample?" * doubtful)
        outputs, attributions, chosen = made.outputs, made.attributions, made.chosen
        scores = as_array(outputs[self.scores_output] if self.scores_output is not None else [])
        if count is None and self._running.target_input is not None:  # what could not be checked before
            samples = len(scores) if scores.ndim else len(chosen)
            # as above: ndim takes more than its type says
            if len(chosen) != samples or (np.ndim(target) and len(targets) != samples):  # type: ignore[arg-type]
                raise OnnxgbpError(wrong_length(targets, samples))
        options, gap = self.options, None
        if self._sample is not None:
            options = options if baseline is None else options | {"baseline": baseline}
            attributions, gap = attributions_at_points(self._running, self._sample, feeds, made, options)
        elif baseline is not None:
            raise OnnxgbpError(f"{', '.join(self.methods)} takes no baseline")
        if (factor := self._running.scale_input) is not None:
            feeds[factor.name] = np.asarray(made.scale, factor.dtype)
        warning = "; ".join(filter(None, (self._warning(attributions, feeds), made.float16)))
        attribution = self._arranged(attributions)
        return Explanation(attribution, scores, chosen, outputs, warning, made.float16, options, gap)

    def _reopen(self) -> None:
        """A session of this process, which was forked after the explainer was made."""
        with self._lock:
            if self._running.session is not None:
                return
            if self.provider == "cuda":
                raise OnnxgbpError(
                    f"{self.name} was opened on CUDA before this process was forked, and CUDA does not survive that: "
                    "start workers by spawn, and the explainer pickles into them"
                )
            made = Explainer(self._model, **self._options | {"provider": self.provider})
            if made.sha256 != self.sha256:
                raise OnnxgbpError(f"{self.name} was changed after it was opened: make a new Explainer of it")
            self._running = made._running

    def _forked(self) -> None:
        """Puts away what belongs to the parent's threads; in the child, where there are none."""
        self._lock = threading.Lock()  # another thread may have held it
        if self._running.session is not None:
            # Never freed, not even at exit: that would wait for threads that are not there, and so would a call.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._running.session))
            self._running.session = None

    def _warning(self, attributions: Sequence[Value], feeds: Mapping[str, Value]) -> str:
        """Which samples have a blank or a broken map, and why the first of each has; '' of maps on a device."""
        if any(map(is_held, attributions)):
            return ""
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
        self, ask: Callable[[onnx.ModelProto, Mapping[str, Array], int], str], feeds: Mapping[str, Value], sample: int
    ) -> str:
        """The reason, of one sample where the batch can be cut; '' where the model does not run in full view."""
        if not self._diagnose:
            return ""
        feeds = {name: on_host(value) for name, value in feeds.items()}
        free = self._batch_dim is not None and not isinstance(self._batch_dim, int)
        if free and len({len(array) for array in feeds.values() if array.ndim}) == 1:
            feeds, sample = (
                {name: array[sample : sample + 1] if array.ndim else array for name, array in feeds.items()},
                0,
            )
        try:
            return f" ({ask(self._converted(load(self._model))[0], feeds, sample)})"
        except Exception as error:  # noqa: BLE001 - a model that is too large or needs its optimiser has no reason to fail
            return f" (why could not be found out: {fault(error)})"

    def _arranged(self, attributions: Sequence[Array]) -> Any:
        """By method and by tensor, as far as there are several."""
        size = len(self.wrt)
        parts = [attributions[i : i + size] for i in range(0, len(attributions), size)]
        each = [part[0] if size == 1 else dict(zip(self.wrt, part, strict=True)) for part in parts]
        return each[0] if len(self.methods) == 1 else dict(zip(self.methods, each, strict=True))

    def _classes(self, x: Any, target: Target, baseline: Any) -> Explanation:
        """K classes of each sample, a bounded number of them over one forward pass."""
        feeds, given = feeds_of(self.inputs, x), class_indices(target, self.labels)
        samples, (rows, classes) = self._batch(feeds), given.shape
        if samples is not None and rows != samples:
            wanted = f"give [{samples}, {classes}], {classes} per sample"
            raise OnnxgbpError(f"target has shape {list(given.shape)}: {wanted}")
        runs = 1 if self._options["device_outputs"] else -(-classes // _TOGETHER)
        width = -(-classes // max(runs, 1))
        several = self._several(width)
        if runs <= 1:
            return several(feeds, given, baseline=baseline)
        starts = [min(run * width, classes - width) for run in range(runs)]  # the last overlaps the one before
        parts = [several(feeds, given[:, start : start + width], baseline=baseline) for start in starts]
        return joined(parts, runs * width - classes)

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
        if self._running.target_input is None and (not self.mode.isdecimal() or (targets != int(self.mode)).any()):
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
        defaults = {"seed_scale": "auto", "diagnose": True, "warm_up": False, "spinning": True}
        defaults |= {"tf32": False, "cuda_graph": False, "device_outputs": False}
        options = self._options | sampling_text({"baseline": self._options["baseline"]})
        said = {
            name: value for name, value in options.items() if value not in (None, ()) and value != defaults.get(name)
        }
        return f"Explainer({self.name!r}, {', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def _batch(self, feeds: Mapping[str, Value]) -> int | None:
        """The number of samples: the size of the dimension that `target` has; None where it has no name."""
        dim = self._running.target_input.shape[0] if self._running.target_input is not None else self._batch_dim
        if isinstance(dim, int):
            return dim
        specs = (spec for spec in self.inputs if dim is not None and dim in spec.shape)
        return next((shape_of(feeds[spec.name])[spec.shape.index(dim)] for spec in specs), None)

    def _targets(self, target: Target, count: int | None) -> npt.NDArray[np.int64]:
        """int64 [N], each in range."""
        given = class_indices(target, self.labels)
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
                raise OnnxgbpError(wrong_length(given, count))
            targets = np.broadcast_to(given, (len(given) if count is None else count,)).astype(np.int64)
        wrong = targets < 0 if self.classes is None else (targets < 0) | (targets >= self.classes)
        if wrong.any():
            last = "" if self.classes is None else f": the model has {self.classes} classes, 0 to {self.classes - 1}"
            raise OnnxgbpError(f"target {targets[wrong][0]} is out of range{last or '; it counts from 0'}")
        return targets


_ALIVE: weakref.WeakSet[Explainer] = weakref.WeakSet()


def _after_fork() -> None:
    for explainer in list(_ALIVE):
        explainer._forked()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


def _unpickle(model: str | bytes, options: dict[str, Any]) -> Explainer:
    return Explainer(model if isinstance(model, str) else onnx.ModelProto.FromString(model), **options)
