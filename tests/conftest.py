"""What several test files share."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default network, built where it is not there yet (pip fetches its weights)."""
    model = ROOT / "models" / "squeezenet1_1.onnx"
    lock = tmp_path_factory.getbasetemp().parent / "squeezenet.lock"  # one folder for all workers of a parallel run
    for _ in range(600):
        try:
            lock.mkdir()
            break
        except FileExistsError:
            time.sleep(0.2)
    try:
        subprocess.run([sys.executable, ROOT / "tools" / "build_squeezenet.py"], check=True, capture_output=True)
    finally:
        lock.rmdir()
    return model


@pytest.fixture(scope="session")
def photo() -> Path:
    """Chelsea, a cat."""
    return ROOT / "models" / "photos" / "chelsea.png"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=60, help="how many random geometries of Conv and pooling to try")
