"""Which ONNX Runtime is installed, and whether it is whole. It is imported on first use, never by importing onnxgbp."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from typing import Any

from onnxgbp.errors import OnnxgbpError

__all__ = ["onnxruntime_distributions", "onnxruntime_module"]

# Each of these installs the same Python package `onnxruntime`, over the files of any other; pip does not notice.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-training",
    "onnxruntime-training-cpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-cann",
    "ort-nightly",
    "ort-nightly-gpu",
)


def onnxruntime_distributions() -> dict[str, str]:
    """The versions of the distributions that provide the package `onnxruntime`, by name."""
    installed = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.distribution(name).version
    return installed


def onnxruntime_module() -> Any:
    """The module onnxruntime, with its telemetry off unless the environment says ORT_DISABLE_TELEMETRY=0.

    Raises:
        OnnxgbpError: none is installed, or two over each other, or one that cannot be imported.
    """
    installed = list(onnxruntime_distributions())
    if len(installed) > 1:
        raise OnnxgbpError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files; repair it with "
            f"pip uninstall -y {' '.join(installed)}, then install one of them again"
        )
    # From 1.29 on it reports to its makers about the models it runs, unless told otherwise before it is imported; and
    # the thread that does so keeps a process that was forked after from ever ending.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        module = importlib.import_module("onnxruntime")
        if hasattr(module, "InferenceSession"):
            return module
        fault = "files of it are missing"  # what is left of one whose other half was uninstalled
    except ImportError as error:
        fault = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not installed:
        raise OnnxgbpError("no ONNX Runtime is installed: pip install 'onnxgbp[cpu]'")
    raise OnnxgbpError(
        f"{installed[0]} cannot be imported ({fault}); repair it with pip install --force-reinstall {installed[0]}"
    )
