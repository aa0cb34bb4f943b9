"""How much of the gradient each activation's gates remove, measured over data: where a rule changes the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgbp.compare import first_line
from onnxgbp.emit import Emit
from onnxgbp.errors import OnnxgbpError
from onnxgbp.rules import Edge, Measure
from onnxgbp.step import label
from onnxgbp.trial import session

__all__ = ["GATES", "gate_energies", "runnable"]

_MEASURED = "onnxgbp/energy/"  # and the node: how an output is called that measures what a gate lets through


def _energies(edge: Edge, passed: ir.Value) -> dict[str, ir.Value]:
    """Sums of squares, float32 [4]: of dy, of dx, of dx where dy < 0, and of what the rule lets through."""
    op, dy = edge.op, edge.dy
    parts = (dy, edge.step(dy), edge.step(op.Sub(dy, op.Relu(dy))), passed)
    return {_MEASURED + label(edge.activation.node): op.Concat(*(_square_sum(op, part) for part in parts), axis=0)}


def _square_sum(op: Emit, value: ir.Value) -> ir.Value:
    wide = op.Cast(op.Reshape(value, [-1]), to=int(ir.DataType.FLOAT))
    return op.ReduceSumSquare(wide, axes=[0])


GATES = Measure(_energies)
"""What `gate_energies` reads, for `GradientGraph.measured`."""


def gate_energies(measured: onnx.ModelProto, data: Iterable[Mapping[str, npt.NDArray[Any]]]) -> dict[str, Any]:
    """Runs what `GradientGraph.measured` made of GATES over batches of inputs.

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
    run, totals = runnable(session, measured), dict[str, npt.NDArray[np.float64]]()
    for feeds in data:
        for name, values in runnable(run, feeds).items():
            if name.startswith(_MEASURED):
                totals[name] = totals.get(name, np.zeros(4)) + np.asarray(values, np.float64)
    rows: dict[str, Any] = {}
    for name, (arrived, stepped, negative, passed) in totals.items():
        shares = {
            "x_gate": 1 - stepped / arrived if arrived else None,
            "dy_gate": negative / arrived if arrived else None,
            "passed": passed / arrived if arrived else None,
        }
        rows[name.removeprefix(_MEASURED)] = shares
    return rows


def runnable(call: Callable[[Any], Any], argument: Any) -> Any:
    """What the call gives; what the runtime raises becomes an `OnnxgbpError`."""
    try:
        return call(argument)
    except OnnxgbpError:
        raise
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
        raise OnnxgbpError(f"ONNX Runtime cannot run the model on the data: {first_line(error)}") from None
