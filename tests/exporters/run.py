"""Real exporters, each in an environment of its own, against the gradient of the framework it exports from.

    tools/test --exporters [NAME...]    all of them, or those named

For each row of EXPORTERS: makes `.exporters/NAME/` with the packages pinned there, lets its script build and export
small nets (see common.py for what it leaves), converts each file with onnxgbp, and compares, at a batch that the
exporter has not seen wherever the file leaves it free: the forward pass before and after, the gradient and, where
given, the guided map of each sample. Prints a table and writes `tests/exporters.json`, one row per net.

A row's status is `ok`, `wrong: ...` (the only one that fails the suite), `refused: ...` (by onnxgbp, as REFUSED
expects), `not exported: ...` (the exporter raised, or its file does not compute what the framework does: nothing to
compare with) or `not installed: ...`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from checking import Array, cosine, forward_error, ort_run
from environments import NotInstalledError, python_environment

import onnxgbp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE.parent / "exporters.json"

LOWEST_COSINE = 0.999
# A cosine does not see a factor; float32 on both sides leaves far less than this.
LARGEST_SCALE_ERROR = 1e-2
# Of the converted file against the exported one, and of the exported one against the framework, over the range.
LARGEST_FORWARD_ERROR, LARGEST_EXPORT_ERROR = 1e-5, 1e-5


@dataclass(frozen=True)
class Exporter:
    """script in this folder; requirements that pip finds together, pinned; the Pythons all of them have wheels for."""

    script: str
    requirements: tuple[str, ...]
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.13")

    @property
    def versions(self) -> str:
        return ", ".join(self.requirements).replace("==", " ")


EXPORTERS = {
    "sklearn": Exporter("sklearn_nets.py", ("scikit-learn==1.9.1", "skl2onnx==1.20.0", "onnx==1.23.2", "numpy==2.4.6")),
    "jax": Exporter(
        "flax_nets.py",
        ("jax==0.10.2", "jaxlib==0.10.2", "flax==0.12.8", "jax2onnx==0.17.1", "onnx==1.23.2", "numpy==2.4.6"),
    ),
    "paddle": Exporter(
        "paddle_nets.py",
        (
            "paddlepaddle==3.3.1",
            "paddle2onnx==2.1.0",
            "onnx==1.17.0",
            "numpy==2.4.6",
            "packaging==26.3",  # paddle2onnx imports it and setuptools without saying so
            "setuptools==75.8.0",
        ),
    ),
    "paddle2": Exporter(
        "paddle_nets.py",
        (
            "paddlepaddle==2.6.2",
            "paddle2onnx==1.3.1",
            "onnx==1.16.2",
            "numpy==1.26.4",
            "protobuf==3.20.3",
            "setuptools==75.8.0",
        ),
        ("3.10", "3.11", "3.12"),
    ),
    "keras": Exporter(
        "keras_nets.py",
        ("tensorflow-cpu==2.21.0", "keras==3.15.1", "tf2onnx==1.17.0", "onnx==1.23.2", "numpy==2.4.6"),
    ),
}

# Exporter and net that onnxgbp refuses, and why it may; any other refusal is a wrong result.
REFUSED: dict[tuple[str, str], str] = {}


def environment(name: str, exporter: Exporter) -> Path:
    """The Python of the exporter's own environment."""
    return python_environment(ROOT / ".exporters" / name, exporter.requirements, exporter.pythons)


def export(python: Path, exporter: Exporter, folder: Path) -> str:
    """Runs the script. Returns the last line it wrote where it failed as a whole, else nothing."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "GLOG_minloglevel": "3"}
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
    command = [str(python), str(HERE / exporter.script), str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=folder)
    return (done.stderr.strip().splitlines() or ["it failed"])[-1] if done.returncode else ""


def scores(model: onnx.ModelProto, outputs: Mapping[str, Any], size: int) -> Array:
    """The first float output with as many values as the framework's own; a ZipMap's list of dicts as an array."""
    for output in model.graph.output:
        value = outputs[output.name]
        if isinstance(value, list):
            value = np.array([[row[key] for key in sorted(row)] for row in value], np.float32)
        if value.dtype.kind == "f" and value.size == size:
            return value
    raise ValueError(f"no output has {size} values")


def compare(path: Path, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The figures of one exported net, and its status."""
    model = onnx.load(path)
    row: dict[str, Any] = {"opset": next(entry.version for entry in model.opset_import if not entry.domain)}
    weights = {tensor.name for tensor in model.graph.initializer}
    (fed,) = (value for value in model.graph.input if value.name not in weights)
    batch = fed.type.tensor_type.shape.dim[0].dim_value
    row["batch"] = f"fixed at {batch}" if batch else "free"
    feeds = {fed.name: arrays["x"]}
    try:
        before = ort_run(model, feeds)
    except Exception as error:  # noqa: BLE001 ONNX Runtime's exceptions have no base class of their own
        return row | {"status": f"not exported: ONNX Runtime refuses the file: {first_line(error)}"}
    expected = arrays["output"]
    got = scores(model, before, expected.size).reshape(expected.shape)
    export_error = forward_error({"": expected.astype(np.float64)}, {"": got})
    row["export_error"] = rounded(export_error)
    if not export_error <= LARGEST_EXPORT_ERROR:
        return row | {"status": "not exported: the file does not compute what the framework does"}

    target = arrays["target"].astype(np.int64)
    faults = []
    for method in ("gradient", "guided"):
        if method not in arrays:
            continue
        converted = onnxgbp.convert(path, method=method, target="input")
        after = ort_run(converted, {**feeds, "target": target})
        want, have = arrays[method], after["attribution"]
        if have.shape != want.shape:
            faults.append(f"the {method} has shape {have.shape}")
            continue
        pairs = list(zip(have, want, strict=True))
        lowest = min(cosine(a, b) for a, b in pairs)
        norms = [(float(np.linalg.norm(a)), float(np.linalg.norm(b))) for a, b in pairs]
        scale_error = max(abs(a - b) / max(b, 1e-30) for a, b in norms)
        error = forward_error({n: a for n, a in before.items() if isinstance(a, np.ndarray)}, after)
        row["forward_error"] = rounded(max(error, float(row.get("forward_error", 0))))
        row[f"{method}_cosine"] = round(lowest, 6)
        if not lowest >= LOWEST_COSINE:
            faults.append(f"the {method} has cosine {lowest:.4f}")
        elif not scale_error <= LARGEST_SCALE_ERROR:
            faults.append(f"the {method} is off by a factor of up to {1 + scale_error:.3g}")
        if not error <= LARGEST_FORWARD_ERROR:
            faults.append(f"the forward pass changed by {error:.1e}")
    return row | {"status": f"wrong: {'; '.join(dict.fromkeys(faults))}" if faults else "ok"}


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def rounded(error: float) -> float:
    """One digit, so that the file is the same wherever it is made; what rounding alone explains is 0."""
    return float(f"{error:.0e}") if error > 1e-6 else 0.0


def rows_of(name: str, exporter: Exporter) -> Iterator[dict[str, Any]]:
    """One row for each net of an exporter, or one that says why there is none."""
    start = {"exporter": name, "versions": exporter.versions}
    try:
        python = environment(name, exporter)
    except NotInstalledError as reason:
        yield start | {"net": None, "status": f"not installed: {reason}"}
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        failure = export(python, exporter, folder)
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".npz", ".txt")):
            row = start | {"net": path.stem}
            if path.suffix == ".txt":
                yield row | {"status": f"not exported: {path.read_text()}"}
                continue
            try:
                yield row | compare(path.with_suffix(".onnx"), np.load(path))
            except Exception as error:  # noqa: BLE001 a refusal and a crash alike are this net's result, not the end
                expected = isinstance(error, onnxgbp.OnnxgbpError) and (name, path.stem) in REFUSED
                kind = "refused" if expected else f"wrong: {type(error).__name__}"
                yield row | {"status": f"{kind}: {first_line(error)}"}
        if failure:
            yield start | {"net": None, "status": f"not exported: {failure}"}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(EXPORTERS)), metavar="[NAME]...")
def main(names: tuple[str, ...]) -> None:
    """Exports with each exporter named (all by default), converts, compares, and writes tests/exporters.json."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows: list[dict[str, Any]] = []
    failed = False
    for name, exporter in EXPORTERS.items():
        if names and name not in names:
            rows += [row for row in known if row["exporter"] == name]
            continue
        click.echo(f"{name}: {exporter.versions}")
        for row in rows_of(name, exporter):
            rows.append(row)
            failed |= row["status"].startswith("wrong")
            figures = [f"{row.get(key, ''):<9}" for key in ("opset", "gradient_cosine", "guided_cosine")]
            errors = [f"{row.get(key, ''):<7}" for key in ("export_error", "forward_error")]
            click.echo("  ".join((f"  {row['net'] or '-':<28}", *figures, *errors, row["status"])))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
