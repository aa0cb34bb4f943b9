"""What every script of an exporter shares. It runs in that exporter's environment, so it needs numpy alone.

A script is `python SCRIPT FOLDER`. For each of its nets it leaves in FOLDER

    NAME.onnx   the exported net
    NAME.npz    x: what goes in, in the layout of the ONNX input; target: a class for each sample; output: what the
                framework itself computes from x; gradient, guided: its gradient of the target's logit with respect
                to x, plain and with the guided rule written at every activation by hand

or, where the export itself failed, NAME.txt with the reason. Nothing of onnxgbp is used here.
"""

import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

CLASSES = 5
BATCH = 6  # what is compared; no exporter sees it, but for the net whose batch is fixed


def seeded(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def image(name: str, *shape: int) -> np.ndarray:
    return seeded(name).normal(size=(BATCH, *shape)).astype(np.float32)


def targets() -> np.ndarray:
    """Every class in turn: the strongest one alone would leave most columns of the last layer untested."""
    return np.arange(BATCH) % CLASSES


def weights(name: str, shape: tuple[int, ...], kind: str, fan_in: int) -> np.ndarray:
    """Weights that keep the signal's size; statistics and biases away from the 0 and 1 that hide a forgotten one."""
    rng = seeded(name)
    if kind == "kernel":
        return rng.normal(scale=(2 / fan_in) ** 0.5, size=shape).astype(np.float32)
    if kind in ("scale", "variance"):
        return rng.uniform(0.6, 1.4, size=shape).astype(np.float32)
    if kind == "slope":
        return rng.uniform(0.1, 0.4, size=shape).astype(np.float32)
    assert kind == "shift", kind
    return rng.normal(scale=0.2, size=shape).astype(np.float32)


def main(nets: Mapping[str, Callable[[Path], dict[str, np.ndarray]]]) -> None:
    """Exports each net: the function writes the file whose path it is given and returns the arrays.

    Each in a process of its own: an exporter in C++ may abort, and the next net is another matter.
    """
    folder, *names = sys.argv[1:]
    for name in names or nets:
        path = Path(folder) / name
        if not names:
            done = subprocess.run([sys.executable, sys.argv[0], folder, name], capture_output=True)
            if done.returncode:
                path.with_suffix(".txt").write_text(f"the exporter crashed, exit status {done.returncode}")
            continue
        try:
            arrays = nets[name](path.with_suffix(".onnx"))
        except Exception as error:  # noqa: BLE001 an exporter may raise anything
            path.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}".strip().partition("\n")[0][:200])
        else:
            np.savez(path.with_suffix(".npz"), **arrays)
