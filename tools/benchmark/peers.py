"""The tools that converted files are measured against, each with the environment that it needs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
from environments import python_environment

ROOT = Path(__file__).resolve().parent.parent.parent

_NUMPY = "numpy==2.2.6"  # the newest for all of these Pythons


@dataclasses.dataclass(frozen=True)
class Peer:
    """What is measured of a tool, on the CPU, and on CUDA as well where it needs no environment of its own.

    cases: each kind of task that the worker knows, with the file that it is given: `source`, `portable` (ours, for
    other runtimes than ONNX Runtime) or `built`, what build_gradient.py makes of the source in the tool's environment.
    fixed_batch: it refuses a free one, so that a file is built for each.
    requirements: of an environment of its own in `.peers/`; none where `tools/bench` has the packages anyway.
    """

    cases: Mapping[str, str]
    fixed_batch: bool = False
    requirements: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ("3.11", "3.12", "3.13", "3.10")

    def python(self, name: str) -> str:
        """The interpreter to run it with.

        Raises:
            NotInstalledError: its environment cannot be made on this machine.
        """
        if not self.requirements:
            return sys.executable
        return str(python_environment(ROOT / ".peers" / name, self.requirements, self.pythons))


PEERS: dict[str, Peer] = {
    "captum": Peer({"captum guided": "source", "captum guided channels_last": "source"}),
    "torch": Peer({"torch gradient": "source"}),
    "onnxruntime-training": Peer(
        {"onnxruntime-training gradient": "built"},
        requirements=(
            *("onnxruntime-training-cpu==1.19.2", "onnx==1.23.2", "onnx-ir==1.1.0", "numpy==1.26.4", "click>=8.2"),
        ),
        pythons=("3.11", "3.12", "3.10"),
    ),
    "onnx-ad": Peer(
        {"onnx-ad gradient": "built"},
        fixed_batch=True,
        # With the ONNX Runtime that runs ours.
        requirements=("onnx-ad==0.3.0", "onnx==1.23.2", f"onnxruntime=={onnxruntime.__version__}", _NUMPY),
    ),
    "openvino": Peer(
        {"openvino forward": "source", "openvino guided": "portable"}, requirements=("openvino==2026.4.1", _NUMPY)
    ),
}
