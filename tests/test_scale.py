"""Ray, Spark and Dask as docs/scale.md has them. `tools/test --ray` fetches them; elsewhere skipped."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_explain import picture, tiny

import onnxgbp
from onnxgbp.images import Preprocessing, read

NO_PYARROW = "the batch extra brings pyarrow: pip install -e '.[batch]'"
parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PYARROW)
from test_batch import command, group, many, model, parts, started, wait_for, whole  # noqa: E402, F401 - needs pyarrow


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} is not installed: tools/test --ray")


@needs("ray")
def test_ray_writes_the_same(model: Path, many: Path, whole: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    """Also when an actor is killed: nothing is lost, Ray starts it anew and gives it its part again."""
    out = tmp_path / "out"
    with started(model, many, out, "--engine", "ray", "--workers", 2, "--threads", 1) as process:
        wait_for(lambda: parts(out), process)
        (actor, *_) = wait_for(lambda: actors(process), process)
        os.kill(actor, signal.SIGKILL)
        stderr = process.communicate()[1]
        assert process.returncode == 3, stderr
    assert parts(out) == whole
    assert "Traceback" not in stderr


@needs("ray")
def test_ray_is_killed(model: Path, many: Path, whole: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    """Lost are the parts in flight; either engine goes on."""
    out = tmp_path / "out"
    with started(model, many, out, "--engine", "ray", "--workers", 2, "--threads", 1) as process:
        wait_for(lambda: parts(out), process)
        process.kill()
        process.wait()
    before = parts(out)
    assert before.items() <= whole.items()
    again = subprocess.run(command(model, many, out, "--workers", 2), capture_output=True, text=True)
    assert again.returncode == 3, again.stderr
    assert parts(out) == whole


@needs("ray")
def test_ray_says_what_is_wrong(model: Path, many: Path, tmp_path: Path) -> None:  # noqa: F811
    """A folder that cannot be written is one line, of an actor as of the command itself."""
    out = tmp_path / "out"
    with started(model, many, out, "--engine", "ray", "--workers", 1, "--threads", 1) as process:
        wait_for(lambda: parts(out), process)
        out.rename(tmp_path / "elsewhere")
        stderr = process.communicate()[1]
    assert process.returncode == 1, stderr
    assert stderr.splitlines()[-1].startswith("Error: cannot ")
    assert "Traceback" not in stderr


def actors(process: subprocess.Popen[str]) -> list[int]:
    """The actors of a run that are at work."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, *_ in rows}

    def below(pid: int) -> bool:
        return pid == process.pid or (pid in parents and below(parents[pid]))

    return [int(pid) for pid, _, *what in rows if what and what[0].startswith("ray::MapWorker") and below(int(pid))]


def script(which: str) -> str:
    page = (ROOT / "docs" / "scale.md").read_text()
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if which in code)
    assert len([line for line in found.splitlines() if line]) <= 16
    return found


@pytest.mark.parametrize(
    "which", [pytest.param("pyspark", marks=needs("pyspark")), pytest.param("dask", marks=needs("dask"))]
)
def test_the_pages_examples(which: str, tmp_path: Path) -> None:
    onnxgbp.save(onnxgbp.convert(tiny(tmp_path / "net.onnx")), tmp_path / "net.guided.onnx")
    files = [picture(tmp_path / "photos" / f"{i}.png", seed=i) for i in range(6)]
    (tmp_path / "example.py").write_text(script(which))
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (out,) = tmp_path.glob("maps.*")
    rows = sorted(parquet.read_table(out).to_pylist(), key=lambda row: row["path"])
    explainer = onnxgbp.Explainer(tmp_path / "net.guided.onnx")
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
    assert len(rows) == len(files)
    for row, path in zip(rows, files):
        wanted = explainer(prepared.prepare(read(path))[np.newaxis])
        assert row["target"] == wanted.target[0]
        np.testing.assert_allclose(row["attribution"], wanted.attribution.ravel(), rtol=1e-4, atol=1e-6)
