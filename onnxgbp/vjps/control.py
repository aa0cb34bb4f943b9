"""If, Scan, Loop: their gradient is a sub-graph too, a copy of the body with the sweep through it behind it.

    If(c)     the gradients for what its branches capture, as an If of the same condition
    Scan      runs again to keep the states that each step found; then a Scan from the last step to the first, which
              hands on the gradient of the states and adds up those for what the body captures
    Loop      the same, with a Loop back: how often it ran shows in how many states were kept, no trip count is needed

The values that stop a loop or choose a branch are piecewise constant: they carry no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxgbp.branches import captured
from onnxgbp.emit import Emit, dims_of, is_float
from onnxgbp.scan import Body, flipped, scan
from onnxgbp.step import Step
from onnxgbp.vjps.bodies import copied, gradients, or_zeros
from onnxgbp.vjps.entry import whole

__all__ = ["VJPS"]

_Pairs = Iterable["tuple[ir.Value, ir.Value]"]


def if_(op: Emit, s: Step, active: Collection[ir.Value]) -> _Pairs:
    read = [value for value in captured(s.node) if value in active]
    seeds = dict(enumerate(s.dys))

    def branch(name: str) -> ir.Graph:
        body = _body(s, name)
        return op.body([], lambda: [or_zeros(op, g, v) for g, v in gradients(op, s, body, [], seeds, read)])

    bodies = {name: branch(name) for name in ("then_branch", "else_branch")}
    for value, gradient in zip(read, op.several(len(read), "If", s.x, **bodies), strict=True):
        yield value, op.typed(gradient, value)


def scan_(op: Emit, s: Step, active: Collection[ir.Value]) -> _Pairs:
    body, given = _body(s, "body"), [s.input(i) for i in range(len(s.node.inputs))]
    count = len(given) - int(s.argument("num_scan_inputs") or 1)
    if len(body.inputs) != len(given) or len(body.outputs) != len(s.dys) or not 0 <= count < len(given):
        raise s.refuse("its body does not take and give what the node does")
    initial, sequences = given[:count], given[count:]
    in_axes, in_flips = (_numbers(s, f"scan_input_{what}", len(sequences)) for what in ("axes", "directions"))
    out_axes, out_flips = (_numbers(s, f"scan_output_{what}", len(s.dys) - count) for what in ("axes", "directions"))
    moved = [_in_order(op, s, v, a, f) for v, a, f in zip(sequences, in_axes, in_flips, strict=True)]
    arriving = [
        dy if dy is None else _in_order(op, s, dy, axis, flip, y)
        for dy, y, axis, flip in zip(s.dys[count:], s.node.outputs[count:], out_axes, out_flips, strict=True)
    ]
    length = (dims_of(moved[0]) or (None,))[0]

    def remember(*arguments: ir.Value) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        outputs = copied(op, s, body, arguments)
        return outputs[:count], arguments[:count]

    found = scan(op, remember, initial, moved, length=length)[1] if count else []
    read = [value for value in captured(s.node) if value in active]
    wanted = [place for place, value in enumerate(sequences) if value in active]
    run = functools.partial(scan, op, reverse=True, length=length)
    dstates, dslices, dread = _reverse(
        op, s, body, run, [*found, *moved], initial, arriving, [count + place for place in wanted], read
    )
    for value, gradient in (*dstates, *zip(read, dread, strict=True)):
        if value in active:
            yield value, gradient
    for place, gradient in zip(wanted, dslices, strict=True):
        gradient = flipped(op, gradient) if in_flips[place] else gradient
        if in_axes[place]:
            rank = s.rank(sequences[place])
            axis = in_axes[place] % rank
            gradient = op.Transpose(gradient, perm=[*range(1, axis + 1), 0, *range(axis + 1, rank)])
        yield sequences[place], gradient


def _body(s: Step, name: str) -> ir.Graph:
    if name not in s.node.attributes:
        raise s.refuse(f"its attribute '{name}' is missing")
    return s.node.attributes[name].as_graph()


def _numbers(s: Step, name: str, count: int) -> list[int]:
    numbers = s.ints(name) or [0] * count
    if len(numbers) != count:
        raise s.refuse(f"its attribute '{name}' has {len(numbers)} entries where {count} are due")
    return numbers


def _in_order(op: Emit, s: Step, value: ir.Value, axis: int, flip: int, like: ir.Value | None = None) -> ir.Value:
    """A sequence with its steps along the first axis, in the order in which they are taken."""
    like = value if like is None else like
    if axis == 0:
        moved = op.typed(op.Identity(value), like)
        return flipped(op, moved) if flip else moved
    rank, dims = s.rank(like), dims_of(like) or ()
    order = [axis % rank, *(i for i in range(rank) if i != axis % rank)]
    moved = op.Transpose(value, perm=order)
    moved.shape = ir.Shape([dims[i] for i in order])
    return flipped(op, moved) if flip else moved


def loop(op: Emit, s: Step, active: Collection[ir.Value]) -> _Pairs:
    body = _body(s, "body")
    initial = [s.input(index) for index in range(2, len(s.node.inputs))]
    count = len(initial)
    if len(body.inputs) != 2 + count or len(body.outputs) != 1 + len(s.dys) or count > len(s.dys):
        raise s.refuse("its body does not take and give what the node does")
    trips = s.input(0) if s.has(0) else op.int64(np.iinfo(np.int64).max)
    condition = s.input(1) if s.has(1) else op.constant(np.array(True))

    def remember(number: ir.Value, going: ir.Value, *states: ir.Value) -> list[ir.Value]:
        outputs = copied(op, s, body, (number, going, *states))
        return [*outputs[: 1 + count], number, *states]

    number = ir.val(op.name(f"{op.scope}/number"), dtype=ir.DataType.INT64, shape=[])
    going = ir.val(op.name(f"{op.scope}/going"), dtype=ir.DataType.BOOL, shape=[])
    states = [_fresh(op, value) for value in initial]
    kept = op.body([number, going, *states], remember)
    outputs = op.several(2 * count + 1, "Loop", trips, condition, *initial, body=kept)
    # The reference evaluator of onnx joins what it should stack: the shapes are said again.
    numbers = op.Reshape(op.typed(outputs[count], number), [-1])
    numbers.shape = ir.Shape([None])
    found = [_stacked(op, s, value, like) for value, like in zip(outputs[count + 1 :], initial, strict=True)]
    read = [value for value in captured(s.node) if value in active]

    def run(
        step: Body, states: Sequence[ir.Value], sequences: Sequence[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """From the last step to the first, of which there may be none: a Scan wants one."""
        ran = op.Reshape(op.Shape(numbers), op.int64([]))

        def again(number: ir.Value, going: ir.Value, *given: ir.Value) -> list[ir.Value]:
            place = op.Sub(op.Sub(ran, op.int64(1)), number)
            place.shape = ir.Shape([])
            slices = [_slice(op, sequence, place) for sequence in sequences]
            return [going, *step(*given, place, going, *slices)[0]]

        heads = [_fresh(op, value) for value in (number, going, *states)]
        results = op.several(len(states), "Loop", ran, op.constant(np.array(True)), *states, body=op.body(heads, again))
        return list(results), []

    dstates, _, dread = _reverse(op, s, body, run, found, initial, list(s.dys[count:]), [], read, extra=1, skipped=2)
    for value, gradient in (*dstates, *zip(read, dread, strict=True)):
        if value in active:
            yield value, op.typed(gradient, value)


def _slice(op: Emit, sequence: ir.Value, place: ir.Value) -> ir.Value:
    part, dims = op.Gather(sequence, place, axis=0), dims_of(sequence)
    part.shape = None if dims is None else ir.Shape(dims[1:])
    return part


def _stacked(op: Emit, s: Step, value: ir.Value, like: ir.Value) -> ir.Value:
    sizes = [op.dim(like, axis) for axis in range(s.rank(like))]
    stacked = op.Reshape(op.typed(value, like), op.vector(-1, *sizes))
    stacked.shape = ir.Shape([None, *(dims_of(like) or ())])
    return stacked


def _reverse(
    op: Emit,
    s: Step,
    body: ir.Graph,
    run: Callable[[Body, Sequence[ir.Value], Sequence[ir.Value]], tuple[list[ir.Value], list[ir.Value]]],
    sequences: Sequence[ir.Value],
    initial: Sequence[ir.Value],
    arriving: Sequence[ir.Value | None],
    wanted: Sequence[int],
    read: Sequence[ir.Value],
    skipped: int = 0,
    extra: int = 0,
) -> tuple[list[tuple[ir.Value, ir.Value]], list[ir.Value], list[ir.Value]]:
    """The sweep against time: the gradients of the first states, of the slices `wanted`, and of what the body reads.

    run: takes the steps, last to first; sequences: what each found, stacked; arriving: the gradients of what the steps
    stack; skipped, extra: how many inputs and outputs of the body come before the states.
    """
    floats = [place for place, value in enumerate(initial) if is_float(value)]
    for place in floats:
        if not isinstance(initial[place].type, ir.TensorType):
            raise s.refuse(f"its state '{initial[place].name}' is no tensor")
    seeds = [dy for dy in arriving if dy is not None]
    stacked = [place for place, dy in enumerate(arriving) if dy is not None]
    behind = [or_zeros(op, s.dys[place], initial[place]) for place in floats]
    sums = [op.zeros_like(value) for value in read]

    def step(*given: ir.Value) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        dstates, added = given[: len(floats)], given[len(floats) : len(floats) + len(read)]
        slices, dys = given[len(floats) + len(read) :][: len(body.inputs)], given[len(given) - len(seeds) :]
        starts = {extra + place: dstate for place, dstate in zip(floats, dstates, strict=True)}
        starts |= {extra + len(initial) + place: dy for place, dy in zip(stacked, dys, strict=True)}
        inner = [*(slices[skipped + place] for place in floats), *(slices[place] for place in wanted)]
        results = gradients(op, s, body, slices, starts, [*inner, *read])
        own = [or_zeros(op, gradient, value) for gradient, value in results[: len(inner)]]
        sums = [
            before if gradient is None else op.typed(op.Add(before, gradient), value)
            for before, (gradient, value) in zip(added, results[len(inner) :], strict=True)
        ]
        return [*own[: len(floats)], *sums], own[len(floats) :]

    last, dslices = run(step, [*behind, *sums], [*sequences, *seeds])
    dstates = list(zip((initial[place] for place in floats), last, strict=False))
    return dstates, dslices, last[len(floats) :]


def _fresh(op: Emit, value: ir.Value) -> ir.Value:
    """An input of a body, of another tensor's type."""
    return ir.val(op.name(f"{op.scope}/state"), dtype=value.dtype, shape=value.shape)


VJPS = {
    "If": whole(if_),
    "Loop": whole(loop),
    "Scan": whole(scan_),
}
