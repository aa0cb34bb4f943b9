"""Runs whose values stay on the device of the session, and runs between fixed addresses.

They are the same on every device; only its name differs.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import dtype_of
from onnxgbp.installed import onnxruntime_module
from onnxgbp.values import Value, is_held

__all__ = ["Fixed", "run_bound"]


def run_bound(
    session: Any, device: str, feeds: Mapping[str, Value], outputs: Sequence[str], stay: Collection[str]
) -> list[Any]:
    """As `session.run`, of arrays and OrtValues; the outputs in `stay` are OrtValues on the device."""
    binding = session.io_binding()
    for name, value in feeds.items():
        if is_held(value):
            binding.bind_ortvalue_input(name, value)
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
    for name in outputs:
        binding.bind_output(name, device if name in stay else "cpu")
    # Whoever made or takes the values has a stream of its own.
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    found = zip(outputs, binding.get_outputs(), strict=True)
    return [value if name in stay else value.numpy() for name, value in found]


class Fixed:
    """A session between values at fixed addresses, as a captured CUDA graph needs them; one call at a time.

    Args:
        session: every size of its inputs and outputs is fixed.
        device: where it runs.
        outputs: in the order in which they are wanted.

    Raises:
        OnnxgbpError: a size is free.
    """

    def __init__(self, session: Any, device: str, outputs: Sequence[str]) -> None:
        self._session, self._device, self._lock = session, device, threading.Lock()
        self._runtime = onnxruntime_module()
        self._binding = session.io_binding()
        taken, given = {i.name: i for i in session.get_inputs()}, {o.name: o for o in session.get_outputs()}
        self._inputs = {name: self._room(value, "input") for name, value in taken.items()}
        self._outputs = {name: self._room(given[name], "output") for name in outputs}
        for name, room in self._inputs.items():
            self._binding.bind_ortvalue_input(name, room)
        for name, room in self._outputs.items():
            self._binding.bind_ortvalue_output(name, room)

    def _room(self, value: Any, side: str) -> Any:
        free = [dim for dim in value.shape if not isinstance(dim, int)]
        if free:
            raise OnnxgbpError(
                f"cuda_graph needs fixed shapes, and {side} '{value.name}' has a free size '{free[0] or '?'}': export "
                "the model with the sizes that are run"
            )
        return self._empty(value.name, value.shape, value.type)

    def _empty(self, name: str, shape: Sequence[int], kind: str) -> Any:
        dtype = dtype_of(name, kind).type
        return self._runtime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._device, 0)

    def run(self, feeds: Mapping[str, Value], stay: Collection[str]) -> list[Any]:
        """As `run_bound`; what is given back is the caller's own, not the fixed place that the next call overwrites."""
        with self._lock:
            for name, value in feeds.items():
                self._inputs[name].update_inplace(value)
            self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            return [
                self._copy(name, room) if name in stay else np.array(room.numpy())
                for name, room in self._outputs.items()
            ]

    def _copy(self, name: str, room: Any) -> Any:
        copy = self._empty(name, room.shape(), room.data_type())
        copy.update_inplace(room)
        return copy
