"""The state of an installation: versions, which ONNX Runtime there is, and which of its providers really work.

A provider that is compiled in may still lack its libraries, its device or its driver, and may even take the process
down. So each is tried in a Python of its own, by a session that may run nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from typing import Any

import numpy as np
import onnx

from onnxgbp.errors import OnnxgbpError
from onnxgbp.installed import onnxruntime_distributions, onnxruntime_module

__all__ = ["Diagnosis", "Provider", "diagnose"]

_PACKAGES = ("onnxgbp", "onnx", "onnx-ir", "numpy", "protobuf", "click", "Pillow")
# The providers that an Explainer uses; that another one does not work is told, and is no fault.
_USED = {
    "CPUExecutionProvider": "install the runtime again: pip install --force-reinstall {0}",
    "CUDAExecutionProvider": "check driver, CUDA and cuDNN (pip install 'onnxgbp[gpu]' brings the last two), "
    "or use the provider cpu",
}
_FELL_BACK = "it leaves even MatMul and Relu to the CPU"
_LIBRARY = re.compile("cannot open shared object file|LoadLibrary failed|image not found")
_PATIENCE = 120  # seconds; a first use of CUDA may compile its kernels


@dataclasses.dataclass(frozen=True)
class Provider:
    """works: whether a session ran on it alone; used: whether an Explainer would use it; detail: why it does not."""

    name: str
    works: bool
    used: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found; each fault is one line with what to do."""

    versions: dict[str, str]
    distributions: dict[str, str]
    runtime: str | None
    providers: tuple[Provider, ...]
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {
            "passed": self.passed,
            "versions": self.versions,
            "onnxruntime": {"version": self.runtime, "distributions": self.distributions},
            "providers": [dataclasses.asdict(provider) for provider in self.providers],
        }
        return {**found, "faults": list(self.faults)}

    def to_text(self) -> str:
        by = ", ".join(f"{name} {version}" for name, version in self.distributions.items())
        rows = [*self.versions.items(), ("onnxruntime", f"{self.runtime or 'none'}{f', from {by}' if by else ''}")]
        for provider in self.providers:
            unused = "" if provider.used else " (onnxgbp does not use it)"
            rows.append((provider.name, "works" if provider.works else f"does not work{unused}: {provider.detail}"))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        lines += [f"FAULT: {fault}" for fault in self.faults]
        return "\n".join([*lines, "nothing is wrong" if self.passed else f"{len(self.faults)} to repair"])


def diagnose() -> Diagnosis:
    """Looks at the installation that this Python runs from; nothing is changed."""
    versions = {"python": f"{platform.python_version()} ({sys.executable})", "platform": platform.platform()}
    versions |= {name: _version(name) for name in _PACKAGES}
    distributions = onnxruntime_distributions()
    try:
        runtime = onnxruntime_module()
    except OnnxgbpError as error:
        return Diagnosis(versions, distributions, None, (), (str(error),))
    faults = []
    for name, version in distributions.items():
        # Local parts (+cu12) are the distribution's alone.
        if version.partition("+")[0] != runtime.__version__.partition("+")[0]:
            faults.append(
                f"{name} is {version}, but the files are those of {runtime.__version__}: another runtime was installed "
                f"over it; repair it with pip install --force-reinstall {name}"
            )
    providers = []
    for name in runtime.get_available_providers():
        fault = _tried(name)
        providers.append(Provider(name, fault is None, name in _USED, fault or ""))
        if fault is not None and name in _USED:
            way_out = _USED[name].format(next(iter(distributions), "onnxruntime"))
            faults.append(f"{name} is compiled in and does not work ({fault}): {way_out}")
    return Diagnosis(versions, distributions, runtime.__version__, tuple(providers), tuple(faults))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "without a record"


def _tried(provider: str) -> str | None:
    """None where the provider works, else what stops it."""
    # -P would need Python 3.11: the folder where the user stands must not hide a package of the same name.
    code = f"import sys; sys.path[:] = {sys.path!r}; from onnxgbp.doctor import _try; _try({provider!r})"
    command = [sys.executable, "-c", code]
    try:
        # S603: the command is this interpreter and a script of ours.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, errors="replace")  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"no answer within {_PATIENCE} seconds"
    logged = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in done.stderr.splitlines()]
    try:
        fault: str | None = json.loads(done.stdout.strip().rpartition("\n")[2])
    except json.JSONDecodeError:
        last = next((line for line in reversed(logged) if line), "it said nothing")
        return f"the process ended with status {done.returncode}: {last}"
    # The log names the library that could not be loaded; the error says no more than that something could not be.
    missing = [line.rpartition(" with error: ")[2] for line in logged if _LIBRARY.search(line)]
    return fault and (missing[-1] if missing else fault)


def _try(provider: str) -> None:
    """Runs max(x W, 0) on one provider and nowhere else; prints null, or what stops it, as JSON."""
    runtime = onnxruntime_module()
    fault: str | None = None
    try:
        if hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()  # finds the CUDA libraries that pip installed
        options = runtime.SessionOptions()
        if provider != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = runtime.InferenceSession(
            _model().SerializeToString(), options, providers=[provider], enable_fallback=False
        )
        if provider not in session.get_providers():
            fault = _FELL_BACK
        elif not np.allclose(session.run(None, {"x": _X})[0], np.maximum(_X @ _W, 0), atol=1e-2):
            fault = "it computes wrong numbers"
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fault = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", said)
        if "fallback to CPU EP has been explicitly disabled" in fault:
            fault = _FELL_BACK
    sys.stdout.write("\n" + json.dumps(fault))


_X = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
_W = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)


def _model() -> onnx.ModelProto:
    nodes = [onnx.helper.make_node("MatMul", ["x", "W"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["y"])]
    ends = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", _X.shape), ("y", (3, 5)))]
    graph = onnx.helper.make_graph(nodes, "probe", ends[:1], ends[1:], [onnx.numpy_helper.from_array(_W, "W")])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=7)
