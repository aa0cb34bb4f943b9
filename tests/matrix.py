"""The oldest and the newest dependencies that pyproject.toml admits, on every Python that is supported.

    tools/test --matrix [PYTHON...]            3.10 to 3.13, or those named; writes tests/matrix.json
    tools/test --matrix --check [PYTHON...]    the same, and writes nothing

Each environment lies in `.matrix/` and has onnxgbp's own dependencies, the extras of EXTRAS and pytest, nothing else:
no torch. `oldest` are the lower bounds themselves, or, where a bound has no wheel for that Python, the first that has
one; what these depend on in turn is the newest. uv resolves and installs them, from wheels alone.

A Python is looked for on the PATH as pythonX.Y, then among those of pyenv. A row's status is `ok`, `wrong: ...` or
`not installed: ...`; the first test that failed stands in `wrong`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import click
from environments import NotInstalledError, python_environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("matrix.json")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
EXTRAS = ("cpu", "batch", "plots")
UV = "uv==0.13.9"

# What meets the dependencies: files, the runtime, pictures, the command line, Parquet, plots. Gradients of single
# operators are the business of the tests at large: they are computed by onnx's evaluator, whose oldest versions know
# fewer operators than onnxgbp does.
TESTS = (
    *("test_convert.py", "test_runtime.py", "test_explain.py", "test_images.py"),
    *("test_batch.py::test_rows_are_what_the_explainer_gives", "test_health.py::test_the_command"),
)
PACKAGES = ("onnx", "onnx-ir", "numpy", "click", "Pillow", "onnxruntime", "pyarrow", "matplotlib", "protobuf")


def interpreter(version: str) -> str:
    """A Python of this version: the one that runs this, on the PATH, or pyenv's."""
    if platform.python_version().startswith(f"{version}."):
        return sys.executable
    found = [shutil.which(f"python{version}"), *map(str, sorted(_pyenv().glob(f"{version}.*/bin/python")))]
    for python in filter(None, found):
        # Being run is the test, not being found: pyenv's shims start nothing where no version is chosen.
        if not subprocess.run([python, "-c", "import venv"], capture_output=True).returncode:
            return python
    raise NotInstalledError(f"needs Python {version}, on the PATH or in pyenv")


def _pyenv() -> Path:
    return Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"


def environment(version: str, resolution: str) -> Path:
    """The Python of an environment made anew: what was resolved yesterday may not be the newest today."""
    base = interpreter(version)
    uv = python_environment(ROOT / ".matrix" / "uv", (UV,), PYTHONS).with_name("uv")
    folder = ROOT / ".matrix" / f"{version}-{resolution}"
    python = folder / "bin" / "python"

    def run(*arguments: str) -> None:
        variables = {"UV_PYTHON_DOWNLOADS": "never", "VIRTUAL_ENV": str(folder)}
        done = subprocess.run(
            [uv, *arguments], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
        )
        if done.returncode:
            raise NotInstalledError(" ".join(done.stderr.split())[-300:])

    run("venv", "--quiet", "--clear", "--python", base, str(folder))
    extras = [part for name in EXTRAS for part in ("--extra", name)]
    run(
        "pip",
        "install",
        "--resolution",
        RESOLUTIONS[resolution],
        "--only-binary",
        ":all:",
        *extras,
        "-r",
        "pyproject.toml",
    )
    run("pip", "install", "pytest", "pytest-xdist")
    run("pip", "install", "--no-deps", "-e", ".")
    return python


def tested(python: Path, resolution: str) -> dict[str, Any]:
    """The versions in an environment, and what the tests say there."""
    ask = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    versions = json.loads(subprocess.run([python, "-c", ask, *PACKAGES], capture_output=True, check=True).stdout)
    # Old releases meet new ones of what they depend on, and are told what will change there.
    lenient = ["-W", "ignore::DeprecationWarning"] if resolution == "oldest" else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        files = [f"tests/{name}" for name in TESTS]
        options = ["-q", "-n", str(os.cpu_count()), "-p", "no:cacheprovider", f"--junitxml={report}", *lenient]
        done = subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            return {"packages": versions, "status": f"wrong: {(done.stderr or done.stdout).strip().splitlines()[-1]}"}
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if {"failure", "error"} & {e.tag for e in c}]
    skipped = sum(any(e.tag == "skipped" for e in case) for case in cases)
    if failed:
        click.echo(done.stdout, err=True)
    elif done.returncode:
        failed = [f"pytest ended with {done.returncode}"]
    return {
        "packages": versions,
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "status": f"wrong: {failed[0]}" if failed else "ok",
    }


def row(version: str, resolution: str) -> dict[str, Any]:
    start = {"python": version, "dependencies": resolution}
    try:
        python = environment(version, resolution)
    except NotInstalledError as error:
        return start | {"status": f"not installed: {error}"}
    return start | tested(python, resolution)


@click.command()
@click.argument("pythons", nargs=-1, type=click.Choice(PYTHONS), metavar="[PYTHON]...")
@click.option("--check", is_flag=True, help="Write nothing.")
def main(pythons: tuple[str, ...], check: bool) -> None:
    """Tests each Python named (all by default), and writes tests/matrix.json after each."""
    bad = False
    for version in pythons or PYTHONS:
        found = [row(version, resolution) for resolution in RESOLUTIONS]
        for one in found:
            packages = " ".join(f"{name} {which}" for name, which in one.get("packages", {}).items())
            counts = ", ".join(f"{one[name]} {name}" for name in ("passed", "failed", "skipped") if name in one)
            click.echo(f"Python {version}, {one['dependencies']} ({packages}): {counts}  {one['status']}")
        bad |= any(not one["status"].startswith(("ok", "not installed")) for one in found)
        if not check:
            record(version, found)
    sys.exit(bad)


def record(version: str, found: list[dict[str, Any]]) -> None:
    """Puts a Python's rows in the place of its last ones."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [one for one in known if one["python"] != version] + found
    rows.sort(key=lambda one: PYTHONS.index(one["python"]))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(one) for one in rows) + "\n]\n")


if __name__ == "__main__":
    main()
