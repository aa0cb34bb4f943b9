"""The health of a trained model over a data set: dead and saturated units, activations, gradients that vanish.

One pass. Of every activation the graph itself counts, sums and bins, batch by batch, so that only a few numbers per
unit leave it, and memory does not grow with the data.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.convert import GradientGraph, fixed_scale
from onnxgbp.data import Batch, batches, inputs_of
from onnxgbp.energy import counted_runs, runnable
from onnxgbp.errors import OnnxgbpError, printable
from onnxgbp.files import output_file, write
from onnxgbp.findings import Findings, aligned, json_numbers
from onnxgbp.health_measure import health_measure, unit_axis
from onnxgbp.health_statistics import Sums, activation_row, add, gradient_by_depth, gradient_figures
from onnxgbp.model import load, raised
from onnxgbp.recognise import recognise
from onnxgbp.results import result_names
from onnxgbp.rules import Rules, audit, parse_rule, parse_rules
from onnxgbp.step import label
from onnxgbp.target import parse_class
from onnxgbp.trial import session
from onnxgbp.verdict import counted, verdict

__all__ = ["model_health"]

Array: TypeAlias = npt.NDArray[Any]

_REPORT, _PLOTS = "health.json", ("histograms.png", "gradient.png")
_SCATTER_OPSET = 16  # the first whose ScatterElements adds, which a histogram needs
_RAISED_OPSET = 18


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
    **preprocessing: Any,
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
        **preprocessing: overrides of what the model's metadata says of photos, as for `data.batches`.

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
    axes = {activation.y.name or "": unit_axis(activation) for activation in graph.found}
    run = runnable(session, graph.measured(health_measure(axes, threshold), **look))
    reader = _Reader(data, graph, limit, preprocessing)
    sums = dict[str, Sums]()
    for batch in reader:
        if folder is not None and not sums:
            folder.clear()  # the data can be read, and the long pass is still ahead
        for outputs, share in counted_runs(run, batch):
            add(sums, outputs, share)
    found = {activation.y.name: activation for activation in graph.found}
    rows = [
        activation_row(kept, found[kept["output"]], sums.get(kept["output"]), place["seed_scale"], reader.samples)
        for kept in audit(graph.choices(**look).values())
    ]
    levels = gradient_by_depth(rows)
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
            {"tensor": tensor} | gradient_figures(sums[name], place["seed_scale"], reader.samples)
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
    """The data in batches, without what cannot be read, and what holds numbers that are not finite."""

    def __init__(self, data: str | Path, graph: GradientGraph, limit: int, preprocessing: Mapping[str, Any]) -> None:
        self._data, self._limit, self._preprocessing = Path(data), limit, preprocessing
        if not self._data.exists():
            raise OnnxgbpError(f"cannot read {data}: no such file or folder")
        self._metadata = graph.source.model.metadata_props
        self._inputs = inputs_of(graph.source.model.graph)
        first = self._inputs[0].shape if self._inputs else ()
        self._fixed = bool(first) and isinstance(first[0], int)
        self.samples = 0
        self.left_out: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[Batch]:
        unread = list[str]()
        reading: dict[str, Any] = {"limit": self._limit, "on_error": unread.append, **self._preprocessing}
        for batch in batches(self._data, self._inputs, self._metadata, **reading):
            kept = self._whole(batch)
            self.samples += len(kept)
            if kept:
                filled = len(batch.names) + batch.filled - len(kept) if self._fixed else 0
                order = kept + kept[-1:] * filled
                names = tuple(batch.names[index] for index in kept)
                yield Batch(names, {name: array[order] for name, array in batch.feeds.items()})
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


# --- what is shown --------------------------------------------------------------------------------


def _text(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['file']}: {counted(found['samples'], 'sample')}, {found['method']} of '{found['explained']}' "
        f"(target {found['target']})"
    ]
    if found["activations"]:
        lines += ["", *aligned([_HEADINGS, *map(_cells, found["activations"])])]
    return "\n".join(map(printable, [*lines, "", *(f"- {said['text']}" for said in found["verdict"])]))


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
