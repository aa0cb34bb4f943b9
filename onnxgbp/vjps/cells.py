"""The cells of recurrent networks: one direction of an LSTM, GRU or RNN, backwards through time.

Notation: g[.] is the linear part of a gate, x W' + h R' + b, with h the state before the step; s is the sigmoid; dg[.]
is the gradient of g[.]. A prime marks what a step leaves. The gates are no activations: no rule applies in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.scan import scan
from onnxgbp.step import Step

__all__ = ["GATES", "Cell", "Result", "gru", "lstm", "matrix", "rnn"]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclasses.dataclass
class Cell:
    """One direction of a node; sequences are [T, N, size] in the order of the file, whichever way the cell runs."""

    op: Emit
    step: Step
    hidden: int
    backwards: bool  # from the last step of the file to the first
    length: int | str | None
    activation: str  # of an RNN
    x: ir.Value
    h: ir.Value
    w: ir.Value  # [gates, inputs]
    r: ir.Value  # [gates, hidden]
    inside: ir.Value | None  # bool [T, N, 1]: the steps within each sequence's own length; None where all are
    bias: ir.Value | None  # [2 gates]: of W, of R
    peepholes: ir.Value | None
    initial_h: ir.Value  # [N, hidden]
    initial_c: ir.Value  # of an LSTM
    dy: ir.Value | None  # what arrives at each step's h
    dh: ir.Value  # what arrives at the last h
    dc: ir.Value

    def before(self, states: ir.Value, initial: ir.Value) -> ir.Value:
        """The state that each step finds, of the states that they leave."""
        op, first = self.op, self.op.Unsqueeze(initial, axes=[0])
        if not self.backwards:
            return op.Concat(first, op.Slice(states, starts=[0], ends=[-1], axes=[0]), axis=0)
        if self.inside is not None:  # a shorter sequence starts at its own last step
            states = op.Where(self.inside, states, first)
        return op.Concat(op.Slice(states, starts=[1], ends=[1 << 30], axes=[0]), first, axis=0)

    def linear(self, value: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
        product = self.op.MatMul(value, self.op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else self.op.Add(product, bias)

    def biases(self) -> tuple[ir.Value | None, ir.Value | None]:
        """Of W and of R."""
        if self.bias is None:
            return None, None
        both = [self.hidden * GATES[self.step.node.op_type]] * 2
        of_w, of_r = self.op.several(2, "Split", self.bias, axis=0, split=both)
        return of_w, of_r

    def split(self, value: ir.Value, count: int, axis: int = 2) -> tuple[ir.Value, ...]:
        """The parts of the gates."""
        return self.op.several(count, "Split", value, axis=axis, split=[self.hidden] * count)

    def sweep(
        self,
        step: Callable[..., tuple[Sequence[ir.Value], Sequence[ir.Value]]],
        states: Sequence[ir.Value],
        sequences: Sequence[ir.Value],
        *,
        forwards: bool = False,
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """Against the cell's time, or along with it. Beyond a sequence's end a state stays, and an output is 0."""
        op, reverse = self.op, self.backwards == forwards
        if self.inside is None:
            return scan(op, step, states, sequences, reverse=reverse, length=self.length)

        def masked(*given: ir.Value) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
            following, outputs = step(*given[:-1])
            kept = [op.Where(given[-1], new, old) for new, old in zip(following, given, strict=False)]
            return kept, [op.typed(op.Where(given[-1], output, op.like(0, output)), output) for output in outputs]

        return scan(op, masked, states, [*sequences, self.inside], reverse=reverse, length=self.length)

    def descend(
        self,
        step: Callable[..., tuple[Sequence[ir.Value], ir.Value]],
        states: Sequence[ir.Value],
        sequences: Sequence[ir.Value],
    ) -> tuple[list[ir.Value], ir.Value]:
        """The sweep against time; `step(dh, ...)` gets the whole gradient of the step's h: of y, and from behind."""
        op, arriving = self.op, [self.dy] if self.dy is not None else []

        def one(dh: ir.Value, *rest: ir.Value) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
            others, slices = rest[: len(states) - 1], rest[len(states) - 1 :]
            if arriving:
                dh = op.Add(dh, slices[-1])
                slices = slices[:-1]
            following, output = step(dh, *others, *slices)
            return following, [matrix(output)]

        last, outputs = self.sweep(one, states, [*sequences, *arriving])
        return last, outputs[0]


def matrix(value: ir.Value) -> ir.Value:
    """Says that a tensor has two axes, whatever their sizes: ONNX Runtime wants the rank of what a Scan stacks."""
    value.shape = ir.Shape([None, None])
    return value


# dgates [T, N, gates], dinitial_h, dinitial_c
Result: TypeAlias = "tuple[ir.Value, ir.Value, ir.Value | None]"


def _slope(op: Emit, y: ir.Value) -> ir.Value:
    """s' = s (1 - s)."""
    return op.Mul(y, op.Sub(op.like(1, y), y))


def _tanh_slope(op: Emit, y: ir.Value) -> ir.Value:
    return op.Sub(op.like(1, y), op.Mul(y, y))


def rnn(c: Cell) -> Result:
    """With h' = f(g): dg = dh' f'(g), dh = dg R."""
    op = c.op
    factor = op.cast_like(op.Greater(c.h, 0), c.h) if c.activation == "relu" else _tanh_slope(op, c.h)

    def step(dh: ir.Value, factor: ir.Value) -> tuple[list[ir.Value], ir.Value]:
        dgate = op.Mul(dh, factor)
        return [op.MatMul(dgate, c.r)], dgate

    (dh,), dgates = c.descend(step, [c.dh], [factor])
    return dgates, dh, None


def gru(c: Cell) -> Result:
    """With z = s(g[z]), r = s(g[r]), n = tanh(g[n]) and h' = (1 - z) n + z h.

    dg[n] = dh' (1 - z) (1 - n^2) and dg[z] = dh' (h - n) z (1 - z). Where r multiplies the linear part q = h R' + b of
    h in g[n] (`linear_before_reset`), dg[r] = dg[n] q r (1 - r) and dq = dg[n] r; else r multiplies h itself, and with
    u = dg[n] R, dg[r] = u h r (1 - r). dh is dh' z and what comes through the gates.
    """
    op = c.op
    of_w, of_r = c.biases()
    before = c.before(c.h, c.initial_h)
    x_z, x_r, x_n = c.split(c.linear(c.x, c.w, of_w), 3)
    r_zr = op.Slice(c.r, starts=[0], ends=[2 * c.hidden], axes=[0])
    r_n = op.Slice(c.r, starts=[2 * c.hidden], ends=[3 * c.hidden], axes=[0])
    if c.step.argument("linear_before_reset"):
        h_z, h_r, q = c.split(c.linear(before, c.r, of_r), 3)
        z, r = op.Sigmoid(op.Add(x_z, h_z)), op.Sigmoid(op.Add(x_r, h_r))
        n = op.Tanh(op.Add(x_n, op.Mul(r, q)))
        to_n = op.Mul(op.Sub(op.like(1, z), z), _tanh_slope(op, n))
        to_z = op.Mul(op.Sub(before, n), _slope(op, z))
        to_r = op.Mul(op.Mul(to_n, q), _slope(op, r))
        inner = op.Concat(to_z, to_r, op.Mul(to_n, r), axis=2)

        def after(dh: ir.Value, inner: ir.Value, z: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            through = op.MatMul(op.Mul(op.Concat(dh, dh, dh, axis=1), inner), c.r)
            return [op.Add(op.Mul(dh, z), through)], dh

        (dh,), total = c.descend(after, [c.dh], [inner, z])
        return op.Mul(op.Concat(total, total, total, axis=2), op.Concat(to_z, to_r, to_n, axis=2)), dh, None
    b_zr = op.Slice(of_r, starts=[0], ends=[2 * c.hidden], axes=[0]) if of_r is not None else None
    b_n = op.Slice(of_r, starts=[2 * c.hidden], ends=[3 * c.hidden], axes=[0]) if of_r is not None else None
    h_z, h_r = c.split(c.linear(before, r_zr, b_zr), 2)
    z, r = op.Sigmoid(op.Add(x_z, h_z)), op.Sigmoid(op.Add(x_r, h_r))
    n = op.Tanh(op.Add(x_n, c.linear(op.Mul(r, before), r_n, b_n)))
    to_n = op.Mul(op.Sub(op.like(1, z), z), _tanh_slope(op, n))
    to_z = op.Mul(op.Sub(before, n), _slope(op, z))
    to_r = op.Mul(before, _slope(op, r))

    def before_reset(
        dh: ir.Value, to_z: ir.Value, to_r: ir.Value, to_n: ir.Value, z: ir.Value, r: ir.Value
    ) -> tuple[list[ir.Value], ir.Value]:
        dn = op.Mul(dh, to_n)
        u = op.MatMul(dn, r_n)
        dzr = op.Concat(op.Mul(dh, to_z), op.Mul(u, to_r), axis=1)
        direct = op.Add(op.Mul(dh, z), op.Mul(u, r))
        return [op.Add(direct, op.MatMul(dzr, r_zr))], op.Concat(dzr, dn, axis=1)

    (dh,), dgates = c.descend(before_reset, [c.dh], [to_z, to_r, to_n, z, r])
    return dgates, dh, None


def lstm(c: Cell) -> Result:
    """With i = s(g[i]), f = s(g[f]), n = tanh(g[n]), o = s(g[o]): c' = f c + i n and h' = o tanh(c').

    The cells c are not told by the node (but for the last), so a Scan along time computes them again.
    dg[o] = dh' tanh(c') o (1 - o); dc' also gets dh' o (1 - tanh(c')^2); dg[i] = dc' n i (1 - i),
    dg[f] = dc' c f (1 - f), dg[n] = dc' i (1 - n^2); dc = dc' f. Peepholes add p[i] c, p[f] c and p[o] c' to the gates.
    """
    op = c.op
    of_w, of_r = c.biases()
    before = c.before(c.h, c.initial_h)
    gates = op.Add(c.linear(c.x, c.w, of_w), c.linear(before, c.r, of_r))
    g_i, g_o, g_f, g_n = c.split(gates, 4)
    n = op.Tanh(g_n)
    p_i, p_o, p_f = c.split(c.peepholes, 3, axis=0) if c.peepholes is not None else (None,) * 3

    def gate(linear: ir.Value, peephole: ir.Value | None, cell: ir.Value) -> ir.Value:
        return op.Sigmoid(linear if peephole is None else op.Add(linear, op.Mul(cell, peephole)))

    def remember(cell: ir.Value, forget: ir.Value, new: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        following = op.Add(op.Mul(forget, cell), new)
        return [following], [matrix(following)]

    def peep(cell: ir.Value, g_f: ir.Value, g_i: ir.Value, n: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        return remember(cell, gate(g_f, p_f, cell), op.Mul(gate(g_i, p_i, cell), n))

    if c.peepholes is None:
        sequences = [op.Sigmoid(g_f), op.Mul(op.Sigmoid(g_i), n)]
        _, (cells,) = c.sweep(remember, [c.initial_c], sequences, forwards=True)
    else:
        _, (cells,) = c.sweep(peep, [c.initial_c], [g_f, g_i, n], forwards=True)
    cell, tanh = c.before(cells, c.initial_c), op.Tanh(cells)
    i, f, o = gate(g_i, p_i, cell), gate(g_f, p_f, cell), gate(g_o, p_o, cells)
    to_o, to_c = op.Mul(tanh, _slope(op, o)), op.Mul(o, _tanh_slope(op, tanh))
    to_i, to_f, to_n = op.Mul(n, _slope(op, i)), op.Mul(cell, _slope(op, f)), op.Mul(i, _tanh_slope(op, n))
    local, kept = op.Concat(to_i, to_o, to_f, to_n, axis=2), f
    if p_i is not None and p_o is not None and p_f is not None:
        to_c = op.Add(to_c, op.Mul(to_o, p_o))
        kept = op.Add(kept, op.Add(op.Mul(to_i, p_i), op.Mul(to_f, p_f)))

    def step(
        dh: ir.Value, dc: ir.Value, local: ir.Value, to_c: ir.Value, kept: ir.Value
    ) -> tuple[list[ir.Value], ir.Value]:
        dc = op.Add(op.Mul(dh, to_c), dc)
        dgates = op.Mul(op.Concat(dc, dh, dc, dc, axis=1), local)
        return [op.MatMul(dgates, c.r), op.Mul(dc, kept)], dgates

    (dh, dc), dgates = c.descend(step, [c.dh, c.dc], [local, to_c, kept])
    return dgates, dh, dc
