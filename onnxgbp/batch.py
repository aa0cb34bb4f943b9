"""A data set explained: what `onnxgbp batch` does. Resume, progress and options; a part is made in `parts.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from onnxgbp.errors import OnnxgbpError
from onnxgbp.explain import baseline_of, options_of
from onnxgbp.explainer import Explainer
from onnxgbp.files import durable_file
from onnxgbp.images import Preprocessing
from onnxgbp.installed import onnxruntime_module
from onnxgbp.methods import sampling_text
from onnxgbp.render import signed_picture
from onnxgbp.samples import Samples, samples_of

try:
    from onnxgbp.engines import in_process, in_processes, on_ray
    from onnxgbp.parts import FLOATS, FORMS, Counts, Job
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "pyarrow":
        raise
    raise OnnxgbpError("a data set is written with pyarrow, which is missing: pip install 'onnxgbp[batch]'") from None

__all__ = ["Counts", "explain_batch"]

# Readers of Parquet data sets pass over names that begin with _ or a dot.
_MANIFEST = "_manifest.json"
_LISTING = "_inputs.jsonl"
_LOCK = "_lock"
_MOST_WORKERS = 8  # that nobody asked for: each has a session of its own in memory
_ASIDE = (".part-*.parquet.*", f".{_MANIFEST}.*", f".{_LISTING}.*")


def explain_batch(
    model: str | Path,
    data: Path,
    out: Path,
    *,
    echo: Callable[[str], Any],
    target: int | str | None = None,
    batch_size: int = 16,
    part_size: int = 1000,
    attribution: str = "float16",
    column: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    threads: int | None = None,
    address: str | None = None,
    num_gpus: float | None = None,
    max_errors: int | None = None,
    options: dict[str, Any] | None = None,
    **preprocessing: Any,
) -> Counts:
    """Explains every sample of a data set, and writes them as a Parquet data set of parts.

    A part is there whole or not at all. The same call goes on where an earlier one ended, however it ended, and gives
    the same files: a part holds the same bytes whoever wrote it and when. A sample that cannot be explained is a row
    with its error. Memory does not grow with the data set.

    Columns: index int64, the place in the data set; id string; target int64; label string; scores list<float32>;
    attribution, a fixed-shape tensor of float16 or float32, or PNG as binary, raw and signed in the one case, as
    `signed_picture` draws it in the other; checksum, the sha256 of the photo's bytes (of the arrays' values); error.
    A row without an error has all the others (but a label where the model names no classes, and both where a unit is
    explained); a row with one has only index, id and, where the sample could be read, checksum.

    Args:
        model: as for `Explainer`; one method, one class of each sample, one tensor attributed to.
        data: see `samples_of`.
        out: the folder.
        echo: called with each line for the user on stderr.
        target: as for `explain_images`.
        batch_size: samples in one run of the model; where the model fixes it, that.
        part_size: samples in a part.
        attribution: float16, float32, png or none.
        column: of images in a Parquet data set; None finds it.
        engine: local or ray.
        workers: processes, or actors of Ray. What was in flight when the run ends is that many parts at most. None: 1,
            but on the CPU with the engine local as many as there are cores, parts, or eight, whichever is least.
        threads: of each worker; None shares the cores of this machine out among them. Ray reserves as many CPUs.
        address: of a Ray cluster; None starts one here, or takes what RAY_ADDRESS names.
        num_gpus: of each actor.
        max_errors: stop when more rows than this have errors.
        options: more arguments of `Explainer`: method, output, unit, seed, wrt, layer, rule, activations, seed_scale,
            provider, and those of the methods that sample.
        **preprocessing: as for `explain_images`.

    Returns:
        The counts of the whole data set.

    Raises:
        OnnxgbpError: an option, the model, or the data set cannot be used, `out` was begun with others or cannot be
            written, or there are too many errors. What was done stays.
    """
    for name, value in (("batch_size", batch_size), ("part_size", part_size), ("workers", workers)):
        if value is not None and value < 1:
            raise OnnxgbpError(f"{name} is {value}, not a count of 1 or more")
    if attribution not in FORMS or engine not in ("local", "ray"):
        raise OnnxgbpError(f"attribution is one of {', '.join(FORMS)}; engine is local or ray")
    if engine == "local" and (address is not None or num_gpus is not None):
        raise OnnxgbpError("address and num_gpus are for the engine ray")
    each = threads or max(1, _cores() // (workers or 1))
    explainer = Explainer(model, **(options or {}), threads=each, diagnose=False)
    if len(explainer.wrt) != 1 or len(explainer.methods) != 1 or explainer.top is not None:
        raise OnnxgbpError("a row holds one map: give one method, one class and one --wrt, or run the command for each")
    explainer.check_target(target)
    start = baseline_of(explainer, **preprocessing)
    size = explainer.inputs[0].shape[0]
    batch_size = size if isinstance(size, int) else batch_size

    created = not out.exists()
    with _held(out):
        try:
            samples = samples_of(data, explainer.inputs, out / _LISTING, part_size, column)
            fingerprint = samples.fingerprint()
            prepared = _preparation(explainer, fingerprint["kind"], attribution, preprocessing)
            shape = _map_shape(explainer, samples, prepared, attribution, start)
            run: dict[str, Any] = {
                "input": fingerprint,
                "model": explainer.sha256,
                **{name: said for name, said in options_of(explainer).items() if name != "audit"},
                **sampling_text(explainer.options),
                "baseline samples": None if start is None else hashlib.sha256(start.tobytes()).hexdigest(),
                "class": target,
                "preprocessing": None if prepared is None else prepared.to_dict(),
                "maps": attribution,
                "batch size": batch_size,
                "part size": part_size,
                "provider": explainer.provider,
                **{name: importlib.metadata.version(name) for name in ("onnxgbp", "numpy", "Pillow", "pyarrow")},
                "onnxruntime": onnxruntime_module().__version__,
            }
            run = json.loads(json.dumps(run))  # as it is read again
            _begin(out, run)
            name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
            job = Job(
                explainer, samples, prepared, out.absolute(), target, start, batch_size, attribution, shape, each, name
            )
            parts = range(math.ceil(samples.count / part_size))
            done = {part: counts for part in parts if (counts := job.done(part)) is not None}
            left = [part for part in parts if part not in done]
            progress = _Progress(samples.count, sum(done.values(), Counts()), echo)
            if workers is None and engine == "local" and explainer.provider == "cpu":
                workers = max(1, min(_cores(), len(left), _MOST_WORKERS))
                each = threads or max(1, _cores() // workers)
                alone = Explainer(model, **(options or {}), threads=each, diagnose=False) if workers > 1 else explainer
                job = dataclasses.replace(job, explainer=alone, threads=each)
            steps: Generator[Counts]
            if left and engine == "ray":
                steps = on_ray(job, left, workers or 1, address, num_gpus)
            elif left and (workers or 1) > 1:
                steps = in_processes(job, left, min(workers or 1, len(left)))
            else:
                steps = in_process(job, left)
            _run(steps, progress, max_errors)
            total = sum((job.done(part) or Counts() for part in parts), Counts())
            if total.rows != samples.count:
                raise OnnxgbpError(
                    f"parts of {out} were removed or changed meanwhile: the same command makes them again"
                )
            _write_manifest(out, run, total)
            return total
        finally:
            with contextlib.suppress(OSError):
                (out / _LISTING).unlink(missing_ok=True)
                _sweep(out)  # what workers left that were stopped in the middle
            if created and not (out / _MANIFEST).exists():
                with contextlib.suppress(OSError):  # whatever else was put there stays
                    (out / _LOCK).unlink(missing_ok=True)
                    out.rmdir()


def _run(steps: Generator[Counts], progress: _Progress, max_errors: int | None) -> None:
    """Works through the steps; whatever ends them, what they had in flight is undone here and not later."""
    try:
        with contextlib.closing(steps):
            for counts in itertools.chain([Counts()], steps):  # there may be too many from the start
                progress.add(counts)
                if max_errors is not None and progress.total.errors > max_errors:
                    raise OnnxgbpError(f"{progress.total.errors} rows have errors, more than --max-errors {max_errors}")
    except OnnxgbpError as error:
        raise OnnxgbpError(f"{error}; the parts that are done stay, and the same command goes on") from None
    finally:
        progress.end()


class _Progress:
    """A line on stderr: rewritten on a terminal, in a log a new one every half minute."""

    def __init__(self, count: int, total: Counts, echo: Callable[[str], Any]) -> None:
        self._count, self.total, self._before, self._echo = count, total, total.rows, echo
        self._start = self._last = time.monotonic()
        self._live = sys.stderr.isatty()
        if total.rows:
            echo(f"{total.rows:,} of {count:,} were done before")

    def add(self, counts: Counts) -> None:
        self.total += counts
        now = time.monotonic()
        if now - self._last >= (0.5 if self._live else 30):
            self._last = now
            self._show()

    def end(self) -> None:
        if self._live:
            self._show()
            click.echo(err=True)
        elif self.total.rows > self._before:
            self._show()

    def _show(self) -> None:
        rate = (self.total.rows - self._before) / max(time.monotonic() - self._start, 1e-9)
        left = f", {_duration((self._count - self.total.rows) / rate)} left" if rate else ""
        share = self.total.rows / self._count
        line = f"{self.total.rows:,} of {self._count:,} ({share:.1%}), {rate:.3g} a second{left}"
        line += f", {self.total.errors:,} errors" if self.total.errors else ""
        if self._live:
            click.echo(f"\r{line}\x1b[K", nl=False, err=True)
        else:
            self._echo(line)


def _duration(seconds: float) -> str:
    minutes, hours = math.ceil(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"


def _preparation(explainer: Explainer, kind: str, form: str, preprocessing: dict[str, Any]) -> Preprocessing | None:
    """How photos are prepared, and how maps are drawn."""
    if kind == "arrays" and form != "png":
        if given := [name for name, value in preprocessing.items() if value is not None]:
            raise OnnxgbpError(f"--{given[0]} is for photos: arrays are what the model takes already")
        return None
    return Preprocessing.of(explainer.metadata, explainer.inputs[0], **preprocessing)


def _map_shape(
    explainer: Explainer, samples: Samples, prepared: Preprocessing | None, form: str, baseline: Any
) -> tuple[int, ...] | None:
    """The shape of a sample's map, by a first run on zeros; None where photos of any size may come.

    Raises:
        OnnxgbpError: the model cannot be run, or its maps not be written in this form.
    """
    held = next(samples.part(0)).held
    if isinstance(held, dict):
        zeros = {spec.name: np.zeros(held[spec.name].shape, spec.dtype) for spec in explainer.inputs}
    elif prepared is not None and prepared.crop is not None:
        channels = 1 if prepared.channels == "grey" else 3
        sides = prepared.crop
        place = (channels, *sides) if prepared.layout == "nchw" else (*sides, channels)
        zeros = {explainer.inputs[0].name: np.zeros(place, explainer.inputs[0].dtype)}
    elif form in FLOATS:
        raise OnnxgbpError(
            "the model takes photos of any size, but the maps in a column have one shape: give --crop, or "
            "--attribution png or none"
        )
    else:
        return None
    fixed = explainer.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else 1
    result = explainer({name: np.stack([array] * size) for name, array in zeros.items()}, baseline=baseline)
    if len(result.scores) != size or len(result.attribution) != size:
        raise OnnxgbpError("the model's outputs have no row for each sample: use onnxgbp.Explainer")
    if form == "png":
        signed_picture(np.zeros_like(result.attribution[0]))
    return tuple(result.attribution.shape[1:])


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder, for this command alone, and without what a killed one left half-written.

    The lock goes with the process. Where the system or the folder knows no locks there is none: two commands would
    write the same files, each whole.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / _LOCK).open("a") as lock:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OnnxgbpError(f"another command is writing {out}: wait for it, or stop it") from None
            _sweep(out)
            yield
    except OSError as error:
        raise OnnxgbpError(f"cannot write {out}: {error.strerror or error}") from None


def _sweep(out: Path) -> None:
    for pattern in _ASIDE:
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _begin(out: Path, run: dict[str, Any]) -> None:
    """Writes the manifest, or finds the same one there.

    Raises:
        OnnxgbpError: the data set in the folder is another.
    """
    path = out / _MANIFEST
    try:
        begun = json.loads(path.read_bytes())["run"]
    except FileNotFoundError:
        if any(out.glob("*.parquet")):
            raise OnnxgbpError(f"{out} holds Parquet files but no {_MANIFEST}: choose another folder") from None
        _write_manifest(out, run, None)
        return
    except (OSError, ValueError, TypeError, KeyError):
        raise OnnxgbpError(f"{path} is no manifest of onnxgbp batch: choose another folder") from None
    changed = [name for name in {**begun, **run} if begun.get(name) != run.get(name)]
    if "input" in changed:
        then, now = begun["input"], run["input"]
        raise OnnxgbpError(
            f"{out} was begun with other input ({then['count']} of {then['kind']}, now {now['count']} of {now['kind']};"
            " names, sizes and times count): give the same, or choose another folder"
        )
    if changed:
        name = changed[0]
        then, now = begun.get(name), run.get(name)
        raise OnnxgbpError(f"{out} was begun with {name} {then}, not {now}: give the same, or choose another folder")


def _write_manifest(out: Path, run: dict[str, Any], total: Counts | None) -> None:
    """`complete` says that every part is there, and the counts; null until then."""
    said = {"run": run, "complete": None if total is None else dataclasses.asdict(total)}
    with durable_file(out / _MANIFEST) as aside:
        aside.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
