"""How much of the gradient each activation's gates remove, measured over data: where a rule changes the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxgbp.compare import first_line
from onnxgbp.errors import OnnxgbpError
from onnxgbp.rules import MEASURED
from onnxgbp.trial import session

__all__ = ["gate_energies"]


def gate_energies(measured: onnx.ModelProto, data: Iterable[Mapping[str, npt.NDArray[Any]]]) -> dict[str, Any]:
    """Runs what `GradientGraph.measured` made over batches of inputs.

    With dy the gradient that arrives at an activation under the rules chosen, dx = dy f'(x) its plain step and R what
    its own rule lets through, each energy the sum of squares over all units and samples:

        x_gate = 1 - |dx|^2 / |dy|^2          what f' takes away (below zero where it adds)
        dy_gate = |dx where dy < 0|^2 / |dy|^2    what guiding would take away besides
        passed = |R|^2 / |dy|^2

    Returns:
        By the activation's node: these three, None where no gradient arrived at all.

    Raises:
        OnnxgbpError: ONNX Runtime cannot run the model, or not on such inputs.
    """
    run, totals = _runnable(session, measured), dict[str, npt.NDArray[np.float64]]()
    for feeds in data:
        for name, values in _runnable(run, feeds).items():
            if name.startswith(MEASURED):
                totals[name] = totals.get(name, np.zeros(4)) + np.asarray(values, np.float64)
    rows: dict[str, Any] = {}
    for name, (arrived, stepped, negative, passed) in totals.items():
        shares = {
            "x_gate": 1 - stepped / arrived if arrived else None,
            "dy_gate": negative / arrived if arrived else None,
            "passed": passed / arrived if arrived else None,
        }
        rows[name.removeprefix(MEASURED)] = shares
    return rows


def _runnable(call: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return call(argument)
    except OnnxgbpError:
        raise
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
        raise OnnxgbpError(f"ONNX Runtime cannot run the model on the data: {first_line(error)}") from None
