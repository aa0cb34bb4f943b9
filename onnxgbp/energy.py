"""How much of the gradient each activation's gates remove, measured over data: where a rule changes the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgbp.compare import first_line
from onnxgbp.data import Batch
from onnxgbp.emit import Emit
from onnxgbp.errors import OnnxgbpError
from onnxgbp.rules import Edge, Measure
from onnxgbp.step import label
from onnxgbp.trial import session

__all__ = ["GATES", "counted_runs", "gate_energies", "runnable"]

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


def gate_energies(measured: onnx.ModelProto, data: Iterable[Batch]) -> dict[str, Any]:
    """Runs what `GradientGraph.measured` made of GATES over batches of samples.

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
    for batch in data:
        for outputs, share in counted_runs(run, batch):
            for name, values in outputs.items():
                if name.startswith(_MEASURED):
                    totals[name] = totals.get(name, np.zeros(4)) + share * np.asarray(values, np.float64)
    rows: dict[str, Any] = {}
    for name, (arrived, stepped, negative, passed) in totals.items():
        shares = {
            "x_gate": 1 - stepped / arrived if arrived else None,
            "dy_gate": negative / arrived if arrived else None,
            "passed": passed / arrived if arrived else None,
        }
        rows[name.removeprefix(_MEASURED)] = shares
    return rows


def counted_runs(run: Callable[[Any], Any], batch: Batch) -> Iterator[tuple[Mapping[str, Any], float]]:
    """What `run` gives of a batch, for sums over its samples, and the share of it that counts: 1.

    Where copies of the last sample fill the batch up, a second run is of nothing but these, and its share below zero:
    it takes off what the copies have added.
    """
    yield runnable(run, batch.feeds), 1.0
    if batch.filled:
        copies = {name: np.repeat(array[-1:], len(array), axis=0) for name, array in batch.feeds.items()}
        yield runnable(run, copies), -batch.filled / (len(batch.names) + batch.filled)


def runnable(call: Callable[[Any], Any], argument: Any) -> Any:
    """What the call gives; what the runtime raises becomes an `OnnxgbpError`."""
    try:
        return call(argument)
    except OnnxgbpError:
        raise
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
        raise OnnxgbpError(f"ONNX Runtime cannot run the model on the data: {first_line(error)}") from None
