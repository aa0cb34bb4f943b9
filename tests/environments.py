"""Environments of their own for what the tests run beside onnxgbp: a Python with pinned packages, a folder of npm's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click


class NotInstalledError(Exception):
    """An environment cannot be made on this machine; the message says why."""


def interpreter(pythons: Sequence[str]) -> str:
    """A Python of one of these versions, this one if it will do."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in pythons:
        return sys.executable
    for version in pythons:
        found = shutil.which(f"python{version}")
        # Being run is the test, not being found: a name on the PATH may be a stub that starts nothing.
        if found and not subprocess.run([found, "-c", "import venv, ensurepip"], capture_output=True).returncode:
            return found
    raise NotInstalledError(f"needs one of Python {', '.join(pythons)}")


def program(*names: str, variable: str = "") -> str:
    """The path of the first of these programs that is there, or the one that an environment variable names."""
    named = os.environ.get(variable, "") if variable else ""
    found = next(filter(None, map(shutil.which, [named] if named else names)), None)
    if found is None:
        raise NotInstalledError(f"needs {named or ' or '.join(names)} on the PATH")
    return found


def python_environment(folder: Path, requirements: Sequence[str], pythons: Sequence[str]) -> Path:
    """The Python of an environment with these packages, made where it is missing or its pins have changed."""
    python = folder / "bin" / "python"
    with _to_make(folder, requirements) as make:
        if make:
            base = interpreter(pythons)
            _run([base, "-m", "venv", str(folder)], "venv")
            _run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *requirements], "pip")
    return python


def npm_environment(folder: Path, packages: Sequence[str]) -> Path:
    """The `node_modules` with these packages (NAME@VERSION), made where it is missing or its pins have changed."""
    with _to_make(folder, packages) as make:
        if make:
            folder.mkdir(parents=True)
            # No scripts: onnxruntime-node's would fetch CUDA's libraries.
            options = ["--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--loglevel=error"]
            _run([program("npm"), "install", "--prefix", str(folder), *options, *packages], "npm")
    return folder / "node_modules"


@contextlib.contextmanager
def _to_make(folder: Path, requirements: Sequence[str]) -> Iterator[bool]:
    """Whether the environment has to be made; then it is cleared before and marked as made after.

    Held by one process at a time: the workers of a parallel run share the environments.
    """
    folder.parent.mkdir(exist_ok=True)
    stamp, wanted = folder / "installed", f"{folder}\n" + "\n".join(requirements)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            yield False
            return
        click.echo(f"installing {', '.join(requirements)} ...", err=True)
        shutil.rmtree(folder, ignore_errors=True)
        yield True
        stamp.write_text(wanted)


def _run(command: Sequence[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.lower().startswith(("error", "npm error"))]
        raise NotInstalledError((errors or [f"{name} failed"])[-1].removeprefix("ERROR: "))
