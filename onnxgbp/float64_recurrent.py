"""LSTM, GRU and RNN for onnx's reference evaluator, whose own ignore `sequence_lens` and know few activations.

A sequence that is shorter than the longest leaves its states at its own last step, and zeros in Y behind it; backwards
it starts at that last step. An attribute that changes the cell otherwise (`clip`, `input_forget`) is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = ["GRU", "LSTM", "RNN"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Function: TypeAlias = Callable[[Array], Array]

_ACTIVATIONS: dict[str, Function] = {
    "sigmoid": lambda x: np.asarray(1 / (1 + np.exp(-x))),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
}


def _lstm(
    x: Array, states: Sequence[Array], weights: Mapping[str, Array], functions: Sequence[Function]
) -> list[Array]:
    (h, c), (f, g, out) = states, functions
    linear = x @ weights["w"] + h @ weights["r"] + weights["wb"] + weights["rb"]
    gate_i, gate_o, gate_f, gate_c = np.split(linear, 4, axis=-1)
    peep_i, peep_o, peep_f = np.split(weights["p"], 3)
    c = f(gate_f + peep_f * c) * c + f(gate_i + peep_i * c) * g(gate_c)
    return [f(gate_o + peep_o * c) * out(c), c]


def _gru(
    x: Array,
    states: Sequence[Array],
    weights: Mapping[str, Array],
    functions: Sequence[Function],
    *,
    linear_before_reset: bool = False,
) -> list[Array]:
    (h,), (f, g) = states, functions
    x_z, x_r, x_h = np.split(x @ weights["w"] + weights["wb"], 3, axis=-1)
    r_z, r_r, r_h = np.split(weights["r"], 3, axis=-1)
    b_z, b_r, b_h = np.split(weights["rb"], 3)
    z, r = f(x_z + h @ r_z + b_z), f(x_r + h @ r_r + b_r)
    inner = r * (h @ r_h + b_h) if linear_before_reset else (r * h) @ r_h + b_h
    return [(1 - z) * g(x_h + inner) + z * h]


def _rnn(x: Array, states: Sequence[Array], weights: Mapping[str, Array], functions: Sequence[Function]) -> list[Array]:
    return [functions[0](x @ weights["w"] + states[0] @ weights["r"] + weights["wb"] + weights["rb"])]


# The cell, which gives the states after one step, the output first; how many they are; its activations by default.
_CELLS: dict[str, tuple[Callable[..., list[Array]], int, tuple[str, ...]]] = {
    "LSTM": (_lstm, 2, ("sigmoid", "tanh", "tanh")),
    "GRU": (_gru, 1, ("sigmoid", "tanh")),
    "RNN": (_rnn, 1, ("tanh",)),
}


def _unrolled(
    self: OpRun,
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    lengths: Array | None = None,
    initial_h: Array | None = None,
    initial_c: Array | None = None,
    p: Array | None = None,
    **attributes: Any,
) -> tuple[Array, ...]:
    operator = self.onnx_node.op_type
    if attributes.get("clip") or attributes.get("input_forget"):
        raise NotImplementedError(f"{operator} with clip or input_forget")
    cell, count, usual = _CELLS[operator]
    if attributes.get("linear_before_reset"):
        cell = functools.partial(cell, linear_before_reset=True)
    layout, direction = attributes.get("layout"), attributes.get("direction") or "forward"
    x = x.swapaxes(0, 1) if layout else x
    steps, batch = x.shape[:2]
    directions, hidden = len(w), r.shape[-1]
    names = [name.lower() for name in attributes.get("activations") or usual * directions]
    functions = [_ACTIVATIONS[name] for name in names]
    lengths = np.full(batch, steps) if lengths is None else lengths
    y = np.zeros((steps, directions, batch, hidden), x.dtype)
    last = [np.zeros((directions, batch, hidden), x.dtype) for _ in range(count)]
    for state, initial in zip(last, (initial_h, initial_c), strict=False):
        if initial is not None:
            state[:] = initial.swapaxes(0, 1) if layout else initial
    for d in range(directions):
        bias = np.zeros(2 * w.shape[1], x.dtype) if b is None else b[d]
        peepholes = np.zeros(3 * hidden, x.dtype) if p is None else p[d]
        weights = {"w": w[d].T, "r": r[d].T, "wb": np.split(bias, 2)[0], "rb": np.split(bias, 2)[1], "p": peepholes}
        own = functions[d * len(usual) : (d + 1) * len(usual)]
        backwards = direction == "reverse" or d == 1
        for t in range(steps)[:: -1 if backwards else 1]:
            live = (t < lengths)[:, None]
            made = cell(x[t], [state[d] for state in last], weights, own)
            y[t, d] = np.where(live, made[0], 0)
            for state, new in zip(last, made, strict=True):
                state[d] = np.where(live, new, state[d])
    if layout:
        y, last = y.transpose(2, 0, 1, 3), [state.swapaxes(0, 1) for state in last]
    return (y, *last)[: len(self.onnx_node.output)]


# The evaluator tells operators by the names of their classes.
class LSTM(OpRun):
    op_domain = ""
    _run = _unrolled


class GRU(OpRun):
    op_domain = ""
    _run = _unrolled


class RNN(OpRun):
    op_domain = ""
    _run = _unrolled
