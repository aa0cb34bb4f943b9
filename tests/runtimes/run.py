"""One converted file, the same bytes, in every runtime: how far each is from the right answer.

    tools/test --runtimes [NAME...]    all of them, or those named; writes tests/runtimes.json

Each runtime gets an environment of its own in `.runtimes/`, with the packages pinned in RUNTIMES, and an adapter that
runs the cases of cases.py in it: a function of adapters.py, or node.mjs or chromium.mjs. To add one is a line in
RUNTIMES and a function there. `tests/test_runtimes.py` runs the quick ones in every run of the tests.

A row's status is `ok`, `wrong: ...` (the only one that fails), `known: ...` (a fault of the runtime that the table
tells, not held against it), `failed: ...` (the runtime raised; fails too) or `not installed: ...`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from checking import Array, cosine
from environments import NotInstalledError, npm_environment, program, python_environment
from runtimes.cases import Case, cases, write_all

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE.parent / "runtimes.json"

LARGEST_ERROR = 1e-4  # of a sample's range; two runtimes add in different orders, which leaves 1e-6 and less
TIMEOUT = 1200  # seconds; onnx's evaluator loops over single elements in Python


@dataclass(frozen=True)
class Runtime:
    """label: for readers. adapter: a function of adapters.py, or a script for Node with its arguments.

    environment: the folder in `.runtimes/`. quick: whether every run of the tests takes it along. needs: programs
    besides. known: a fault of the runtime, for the table's readers.
    """

    label: str
    adapter: str
    environment: str
    requirements: tuple[str, ...]
    quick: bool = True
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.13", "3.10")
    needs: tuple[str, ...] = ()
    known: str = ""

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What to run, before the folders of the cases and of the results; and the environment variables to add.

        Raises:
            NotInstalledError: a program or a package is not there.
        """
        for name in self.needs:
            program(name)
        folder = ROOT / ".runtimes" / self.environment
        script, *arguments = self.adapter.split()
        if not script.endswith(".mjs"):
            python = python_environment(folder, self.requirements, self.pythons)
            return [str(python), str(HERE / "adapters.py"), *self.adapter.split()], {}
        node = program("node")
        browser = {"CHROMIUM": chromium()} if script == "chromium.mjs" else {}
        return [node, str(HERE / script), *arguments], browser | {
            "NODE_PATH": str(npm_environment(folder, self.requirements))
        }


def chromium() -> str:
    """A Chromium, or the one that CHROMIUM names."""
    return program("chromium", "chromium-browser", "google-chrome", variable="CHROMIUM")


NUMPY = "numpy==2.2.6"  # the newest for all of these Pythons
WEB = ("web", ("onnxruntime-web@1.30.0", "playwright-core@1.65.1"))
OPENVINO = ("openvino", ("openvino==2026.4.1", NUMPY))
RUNTIMES = {
    "onnx": Runtime("onnx ReferenceEvaluator", "onnx", "onnx", ("onnx==1.23.2", NUMPY), quick=False),
    "onnxruntime": Runtime("ONNX Runtime", "onnxruntime", "onnxruntime", ("onnxruntime==1.31.1", NUMPY)),
    # The oldest that PyPI has for Python 3.11.
    "onnxruntime-oldest": Runtime(
        "ONNX Runtime, oldest tried",
        "onnxruntime",
        "onnxruntime-oldest",
        ("onnxruntime==1.15.0", "numpy==1.26.4"),
        pythons=("3.11", "3.10"),
    ),
    "onnxruntime-node": Runtime("onnxruntime-node", "node.mjs onnxruntime-node", "node", ("onnxruntime-node@1.30.0",)),
    "onnxruntime-web": Runtime("onnxruntime-web (wasm), Node", "node.mjs onnxruntime-web", *WEB),
    "chromium": Runtime("onnxruntime-web (wasm), Chromium", "chromium.mjs wasm", *WEB),
    "chromium-webgpu": Runtime("onnxruntime-web (WebGPU), Chromium", "chromium.mjs webgpu", *WEB, quick=False),
    "openvino": Runtime("OpenVINO, asked for float32", "openvino", *OPENVINO),
    "openvino-default": Runtime(
        "OpenVINO, not asked",
        "openvino_default",
        *OPENVINO,
        known="computes in bfloat16 where the CPU has it; ask for INFERENCE_PRECISION_HINT f32",
    ),
    "opencv": Runtime("OpenCV dnn", "opencv", "opencv", ("opencv-python-headless==5.0.0.93", NUMPY)),
    "tract": Runtime("tract", "tract", "tract", ("tract==0.23.9", NUMPY)),
    "tinygrad": Runtime("tinygrad", "tinygrad", "tinygrad", ("tinygrad==0.14.0", NUMPY), quick=False, needs=("clang",)),
    "tvm": Runtime("TVM", "tvm", "tvm", ("apache-tvm==0.27.0.post1", "onnx==1.23.2", NUMPY), quick=False),
}


def run(runtime: Runtime, given: Sequence[Case], folder: Path) -> dict[str, Any]:
    """What the adapter makes of the cases (whose files are in the folder): `version`, and by case's name `cases`, each
    with its `outputs` as arrays or its `error`.

    Raises:
        NotInstalledError: the runtime cannot be had on this machine.
        RuntimeError: the adapter ended without results.
    """
    command, variables = runtime.command()
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    write_all(given, folder)
    with tempfile.TemporaryDirectory() as out:
        try:
            done = subprocess.run(
                [*command, str(folder), out], env=environ, capture_output=True, text=True, timeout=TIMEOUT
            )
            said = done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            said = [f"no end after {TIMEOUT} s"]
        told = Path(out, "results.json")
        if not told.exists():
            raise RuntimeError((said or ["it ended without results"])[-1])
        results: dict[str, Any] = json.loads(told.read_text())
        for case in results["cases"].values():
            for name, output in case.get("outputs", {}).items():
                kind = np.dtype(output["dtype"]).newbyteorder("<")
                numbers = np.frombuffer(Path(out, output["file"]).read_bytes(), kind)
                case["outputs"][name] = numbers.reshape(output["shape"])
    return results


def largest_error(found: Array, wanted: Array) -> float:
    """The largest difference of a sample, as a share of its range."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return max(float(np.abs(a - b).max()) / max(float(np.ptp(b)), 1e-30) for a, b in zip(found, wanted, strict=True))


def judged(case: Case, result: dict[str, Any], known: str = "") -> dict[str, Any]:
    """The figures of one case, and its status."""
    if "error" in result:
        return {"status": f"failed: {' '.join(result['error'].split())[:200]}"}
    found, wanted = result["outputs"], case.wanted
    scores = next(iter(wanted))  # the source's own output comes first
    error = largest_error(found["attribution"], wanted["attribution"])
    score_error = largest_error(found[scores], wanted[scores])
    faults = []
    if not error <= LARGEST_ERROR:
        faults.append(f"the attribution is off by {error:.1e} of its range")
    if not score_error <= LARGEST_ERROR:
        faults.append(f"the scores are off by {score_error:.1e} of their range")
    if not np.array_equal(found["attribution_target"], wanted["attribution_target"]):
        faults.append("another class is explained")
    same_shape = found["attribution"].shape == wanted["attribution"].shape
    return {
        "max_error": rounded(error),
        "cosine": round(cosine(found["attribution"], wanted["attribution"]), 6) if same_shape else 0.0,
        "score_error": rounded(score_error),
        "status": "ok" if not faults else f"known: {known}" if known else f"wrong: {'; '.join(faults)}",
    }


def rounded(error: float) -> float:
    """One digit, so that the file is nearly the same wherever it is made."""
    return float(f"{error:.0e}") if np.isfinite(error) else 1e30


def rows_of(name: str, given: Sequence[Case], folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each case, or one that says why there is none."""
    runtime = RUNTIMES[name]
    start = {"runtime": name, "label": runtime.label}
    try:
        results = run(runtime, given, folder)
    except NotInstalledError as error:
        yield start | {"version": None, "status": f"not installed: {error}"}
        return
    except RuntimeError as error:
        yield start | {"version": None, "status": f"failed: {error}"}
        return
    for case in given:
        row = start | {"version": results["version"], "net": case.net, "batch": case.batch, "method": case.method}
        digest = hashlib.sha256(case.model.read_bytes()).hexdigest()[:12]
        yield row | {"sha256": digest} | judged(case, results["cases"][case.name], runtime.known)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(RUNTIMES)), metavar="[NAME]...")
def main(names: tuple[str, ...]) -> None:
    """Runs each runtime named (all by default), and writes tests/runtimes.json after each."""
    failed = False
    with tempfile.TemporaryDirectory() as text:
        given = list(cases(Path(text)))
        for name in names or RUNTIMES:
            found = []
            for row in rows_of(name, given, Path(text)):
                found.append(row)
                figures = [str(row.get(key, "")) for key in ("version", "net", "batch", "method", "max_error")]
                click.echo("  ".join(f"{part:<14}" for part in [name, *figures]) + f"  {row['status']}")
            failed |= any(row["status"].startswith(("wrong", "failed")) for row in found)
            record(name, found)
    sys.exit(failed)


def record(name: str, found: Sequence[dict[str, Any]]) -> None:
    """Puts a runtime's rows in the place of its last ones; a runtime that is no longer in the table goes."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [row for row in known if row["runtime"] in RUNTIMES and row["runtime"] != name] + list(found)
    rows.sort(key=lambda row: list(RUNTIMES).index(row["runtime"]))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
