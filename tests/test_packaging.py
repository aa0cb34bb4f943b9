"""The built wheel, installed where nothing but its declared dependencies is: without a runtime, with one, with two."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import onnxgbp

pytest.importorskip("build", reason="the dev extra brings it: pip install -e '.[dev]'")

RESNET = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_resnet50.onnx"
NO_RUNTIME = "no ONNX Runtime is installed: pip install 'onnxgbp[cpu]'"


class Built(NamedTuple):
    wheel: Path
    sdist: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source distribution, and the wheel that is built from it; once for all workers of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dist"
    with _locked(folder.with_suffix(".lock")):
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "build", "-o", folder, ROOT], check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Environment:
    """An environment with the wheel, its declared dependencies, and some of the runtimes.

    The dependencies are the installed ones of this Python, linked file by file from what their records list: what is
    not declared is not there.
    """

    def __init__(self, folder: Path, wheel: Path, more: Sequence[str] = ()) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        install = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-qq", "--no-index"]
        subprocess.run([*install, "--no-deps", wheel], check=True, env=_environment())
        (self.site,) = folder.glob("lib/python*/site-packages")
        for name in _closure(["onnxgbp", *more], {"onnxgbp": wheel}) - {"onnxgbp"}:
            self.link(name)

    def link(self, name: str) -> None:
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            target = self.site / entry
            if not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(entry))))

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [self.bin / program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.site.parent, env=_environment())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _closure(names: Sequence[str], wheels: dict[str, Path]) -> set[str]:
    """These distributions and all that they require without an extra, transitively."""
    found, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in wheels:
            with zipfile.ZipFile(wheels[name]) as wheel:
                (metadata,) = (entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
                text = wheel.read(metadata).decode()
            lines = [line.removeprefix("Requires-Dist: ") for line in text.splitlines() if line.startswith("Requires-")]
            required = [Requirement(line) for line in lines if not line.startswith("Requires-Python")]
        else:
            required = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Without a runtime."""
    made = Environment(tmp_path_factory.mktemp("bare") / "env", built.wheel)
    assert "No module named 'onnxruntime'" in made.run("python", "-c", "import onnxruntime").stderr
    return made


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("Error: ").rstrip("\n")


def test_the_wheel_holds_the_package_alone(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "onnxgbp"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")} | {"onnxgbp/py.typed"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (package / "templates").iterdir()}
    assert held == wanted


def test_the_source_distribution_holds_what_the_tests_need(built: Built) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository here that says which files are its own")
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    missing = {name for name in listed if name and not name.startswith(".") and (ROOT / name).exists()} - held
    assert not missing, "MANIFEST.in leaves them out"
    assert not {name for name in held if name.startswith("models/") and name.endswith(".onnx")}


def test_converting_needs_no_runtime(bare: Environment, tmp_path: Path) -> None:
    done = bare.run("onnxgbp", "convert", RESNET, "-o", tmp_path / "out.onnx")
    assert done.returncode == 0, done.stderr
    onnxgbp.save(onnxgbp.convert(RESNET), tmp_path / "here.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "here.onnx").read_bytes()
    assert bare.run("onnxgbp", "inspect", RESNET).returncode == 0


def test_running_without_a_runtime_says_what_to_install(bare: Environment, tmp_path: Path, photo: Path) -> None:
    for command in (
        ("explain", RESNET, photo, "-o", tmp_path / "pictures"),
        ("diff", RESNET, RESNET, "--data", photo),
        ("inspect", RESNET, "--data", photo),
    ):
        assert one_line(bare.run("onnxgbp", *command)) == NO_RUNTIME
    assert not (tmp_path / "pictures").exists()
    doctor = bare.run("onnxgbp", "doctor")
    assert doctor.returncode == 1
    assert f"FAULT: {NO_RUNTIME}" in doctor.stdout


def test_the_default_network_is_not_in_the_wheel(bare: Environment, tmp_path: Path, photo: Path) -> None:
    said = one_line(bare.run("onnxgbp", "explain", photo, "-o", tmp_path / "pictures"))
    assert "only a clone of the repository builds it; name a model: onnxgbp explain MODEL.onnx" in said


FACTS = """
import json, sys
import onnxgbp
said = {"file": onnxgbp.__file__, "version": onnxgbp.__version__}
said["heavy"] = [name for name in ("onnxruntime", "PIL", "matplotlib") if name in sys.modules]
try:
    onnxgbp.Explainer(sys.argv[1])
except onnxgbp.OnnxgbpError as error:
    said["error"] = str(error)
print(json.dumps(said))
"""


def test_the_package_as_it_is_installed(bare: Environment, built: Built) -> None:
    said = json.loads(bare.run("python", "-c", FACTS, RESNET).stdout)
    assert said["file"] == str(bare.site / "onnxgbp" / "__init__.py")
    assert said["heavy"] == []
    assert said["error"] == NO_RUNTIME
    assert f"-{said['version']}-" in built.wheel.name
    assert bare.run("onnxgbp", "--version").stdout.strip().endswith(said["version"])
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        _ = onnxgbp.version  # type: ignore[attr-defined]  # that it is not there is the point


def test_one_runtime_and_two(built: Built, tmp_path: Path, photo: Path) -> None:
    made = Environment(tmp_path / "env", built.wheel, ["onnxruntime"])
    healthy = made.run("onnxgbp", "doctor", "--json")
    assert healthy.returncode == 0, healthy.stdout
    assert json.loads(healthy.stdout)["onnxruntime"]["distributions"] == {"onnxruntime": onnxruntime_version()}

    record = made.site / "onnxruntime_gpu-1.31.0.dist-info"  # what a second one leaves behind besides its files
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.0\n")
    said = one_line(made.run("onnxgbp", "explain", RESNET, photo, "-o", tmp_path / "pictures"))
    assert said.startswith("onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in said
    doctor = made.run("onnxgbp", "doctor")
    assert doctor.returncode == 1
    assert f"FAULT: {said}" in doctor.stdout


def onnxruntime_version() -> str:
    return importlib.metadata.version("onnxruntime")


def test_the_pinned_requirements_are_within_the_bounds() -> None:
    """tools/requirements.txt: every dependency of ours is there, each pin is admitted, and each has its hashes."""
    lines = (ROOT / "tools" / "requirements.txt").read_text().replace("\\\n", "").splitlines()
    pins: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        requirement, *hashes = line.split("--hash=sha256:")
        assert hashes, line
        pin = Requirement(requirement)
        pins.setdefault(pin.name, []).append(str(pin.specifier).removeprefix("=="))
    for text in importlib.metadata.requires("onnxgbp") or []:
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in ("cpu", "batch", "plots", "dev")):
            assert pins[wanted.name.lower()], wanted.name
            assert all(wanted.specifier.contains(version) for version in pins[wanted.name.lower()]), wanted
