"""Arrays and OrtValues: what a call may be given and may give back, on whatever device it lies."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from onnxgbp.errors import OnnxgbpError
from onnxgbp.installed import onnxruntime_module

__all__ = ["Value", "as_array", "from_device", "is_held", "on_host", "shape_of"]

Value: TypeAlias = Any  # an array, or an onnxruntime.OrtValue, whose package ships no types

# DLPack's numbers for memory that numpy reads: the CPU's own, and what CUDA and ROCm pinned there.
_HOST = (1, 3, 11)


def is_held(value: Any) -> bool:
    """Whether it is an OrtValue; of one whose runtime was never imported there is none."""
    runtime = sys.modules.get("onnxruntime")
    return runtime is not None and isinstance(value, runtime.OrtValue)


def from_device(value: Any) -> Any:
    """An array of another library that lies on a device, as an OrtValue on the same memory; all else as it is.

    Raises:
        OnnxgbpError: this ONNX Runtime takes no such arrays. What the library itself raises goes through.
    """
    if is_held(value) or not hasattr(value, "__dlpack_device__"):
        return value
    try:
        device = value.__dlpack_device__()[0]
    except Exception:  # noqa: BLE001 - it lies on no single device, say: numpy may still read it
        return value
    if device in _HOST:
        return value
    runtime = onnxruntime_module()
    if not hasattr(runtime.OrtValue, "from_dlpack"):
        raise OnnxgbpError(
            f"ONNX Runtime {runtime.__version__} takes no arrays of other libraries on a device: give an "
            "onnxruntime.OrtValue, or update it"
        )
    return runtime.OrtValue.from_dlpack(value)


def shape_of(value: Value) -> tuple[int, ...]:
    """Of an array or an OrtValue."""
    return tuple(value.shape()) if is_held(value) else tuple(np.shape(value))


def on_host(value: Value) -> Any:
    """The value as an array, or what else an output may be; copied only if it lies elsewhere."""
    return value.numpy() if is_held(value) else value


def as_array(value: Value) -> Any:
    """An output as an array; a list of maps, one per sample, becomes one row of values each."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return np.array([list(row.values()) for row in value])
    return np.asarray(on_host(value))
