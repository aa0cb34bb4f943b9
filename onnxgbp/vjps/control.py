"""If, Scan, Loop: their gradient is a sub-graph too, a copy of the body with the sweep through it behind it.

    If(c)     the gradients for what its branches capture, as an If of the same condition
    Scan      runs again to keep the states that each step found; then a Scan from the last step to the first, which
              hands on the gradient of the states and adds up those for what the body captures
    Loop      the same: how often it ran shows in how many states were kept, so that no trip count need be known

The values that stop a loop or choose a branch are piecewise constant: they carry no gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxgbp.branches import captured
from onnxgbp.constants import constant_value
from onnxgbp.emit import Emit, dims_of, is_float
from onnxgbp.recognise import recognise
from onnxgbp.scan import flipped, scan
from onnxgbp.shapes import infer_shapes
from onnxgbp.step import Step
from onnxgbp.vjps.entry import whole

__all__ = ["VJPS"]

_Pairs = Iterable["tuple[ir.Value, ir.Value]"]


def if_(op: Emit, s: Step, active: Collection[ir.Value]) -> _Pairs:
    read = [value for value in captured(s.node) if value in active]
    seeds = dict(enumerate(s.dys))

    def branch(name: str) -> ir.Graph:
        body = s.node.attributes[name].as_graph()
        return op.body([], lambda: [_or_zeros(op, g, v) for g, v in _gradients(op, s, body, [], seeds, read)])

    bodies = {name: branch(name) for name in ("then_branch", "else_branch")}
    for value, gradient in zip(read, op.several(len(read), "If", s.x, **bodies), strict=True):
        yield value, op.typed(gradient, value)


def scan_(op: Emit, s: Step, active: Collection[ir.Value]) -> _Pairs:
    body, given = s.node.attributes["body"].as_graph(), [s.input(i) for i in range(len(s.node.inputs))]
    count = len(given) - int(s.argument("num_scan_inputs"))
    initial, sequences = given[:count], given[count:]
    in_axes, in_flips = (_numbers(s, f"scan_input_{what}", len(sequences)) for what in ("axes", "directions"))
    out_axes, out_flips = (_numbers(s, f"scan_output_{what}", len(s.dys) - count) for what in ("axes", "directions"))
    moved = [_in_order(op, s, v, a, f) for v, a, f in zip(sequences, in_axes, in_flips, strict=True)]
    arriving = [
        dy if dy is None else _in_order(op, s, dy, axis, flip, y)
        for dy, y, axis, flip in zip(s.dys[count:], s.node.outputs[count:], out_axes, out_flips, strict=True)
    ]
    length = (dims_of(sequences[0]) or (None,))[in_axes[0] if in_axes[0] >= 0 else 0]

    def remember(*arguments: ir.Value) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        outputs = _copied(op, s, body, arguments)
        return outputs[:count], arguments[:count]

    found = scan(op, remember, initial, moved, length=length)[1] if count else []
    read = [value for value in captured(s.node) if value in active]
    wanted = [place for place, value in enumerate(sequences) if value in active]
    dstates, dslices, dread = _reverse(
        op, s, body, [*found, *moved], initial, arriving, [count + place for place in wanted], read, length
    )
    for value, gradient in (*dstates, *zip(read, dread, strict=True)):
        if value in active:
            yield value, gradient
    for place, gradient in zip(wanted, dslices, strict=True):
        gradient = flipped(op, gradient) if in_flips[place] else gradient
        axis = in_axes[place] % s.rank(sequences[place])
        order = [*range(1, axis + 1), 0, *range(axis + 1, s.rank(sequences[place]))]
        yield sequences[place], op.Transpose(gradient, perm=order) if axis else gradient


def _numbers(s: Step, name: str, count: int) -> list[int]:
    return s.ints(name) or [0] * count


def _in_order(op: Emit, s: Step, value: ir.Value, axis: int, flip: int, like: ir.Value | None = None) -> ir.Value:
    """A sequence with its steps along the first axis, in the order in which they are taken."""
    like = value if like is None else like
    rank, dims = s.rank(like), dims_of(like) or ()
    order = [axis % rank, *(i for i in range(rank) if i != axis % rank)]
    moved = op.Transpose(value, perm=order) if axis % rank else op.Identity(value)
    moved.shape = ir.Shape([dims[i] for i in order])
    return flipped(op, moved) if flip else moved


def loop(op: Emit, s: Step, active: Collection[ir.Value]) -> _Pairs:
    body = s.node.attributes["body"].as_graph()
    initial = [s.input(index) for index in range(2, len(s.node.inputs))]
    count = len(initial)
    trips = s.input(0) if s.has(0) else op.int64(np.iinfo(np.int64).max)
    condition = s.input(1) if s.has(1) else op.constant(np.array(True))

    def remember(number: ir.Value, going: ir.Value, *states: ir.Value) -> list[ir.Value]:
        outputs = _copied(op, s, body, (number, going, *states))
        return [*outputs[: 1 + count], number, *states]

    number = ir.val(op.name(f"{op.scope}/number"), dtype=ir.DataType.INT64, shape=[])
    going = ir.val(op.name(f"{op.scope}/going"), dtype=ir.DataType.BOOL, shape=[])
    states = [_like(op, value) for value in initial]
    outputs = op.several(
        2 * count + 1, "Loop", trips, condition, *initial, body=op.body([number, going, *states], remember)
    )
    # The reference evaluator of onnx joins what it should stack: the shapes are said again.
    numbers = op.Reshape(op.typed(outputs[count], number), [-1])
    numbers.shape = ir.Shape([None])
    found = [_stacked(op, s, value, like) for value, like in zip(outputs[count + 1 :], initial, strict=True)]
    always = op.typed(op.Cast(op.Add(op.Mul(numbers, op.int64(0)), op.int64(1)), to=int(ir.DataType.BOOL)), numbers)
    always.type = ir.TensorType(ir.DataType.BOOL)
    read = [value for value in captured(s.node) if value in active]
    known = constant_value(trips)
    length = int(known) if known is not None and constant_value(condition) is not None and _endless(body) else None
    dstates, _, dread = _reverse(
        op, s, body, [numbers, always, *found], initial, list(s.dys[count:]), [], read, length, skipped=2, extra=1
    )
    for value, gradient in (*dstates, *zip(read, dread, strict=True)):
        if value in active:
            yield value, gradient


def _stacked(op: Emit, s: Step, value: ir.Value, like: ir.Value) -> ir.Value:
    sizes = [op.dim(like, axis) for axis in range(s.rank(like))]
    stacked = op.Reshape(op.typed(value, like), op.vector(-1, *sizes))
    stacked.shape = ir.Shape([None, *(dims_of(like) or ())])
    return stacked


def _endless(body: ir.Graph) -> bool:
    """Whether a loop goes on until its trip count: its condition is handed through, or a constant."""
    going = body.outputs[0]
    while (node := going.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        going = node.inputs[0]
    return going is body.inputs[1] or bool(constant_value(going))


def _reverse(
    op: Emit,
    s: Step,
    body: ir.Graph,
    arguments: Sequence[ir.Value],
    initial: Sequence[ir.Value],
    arriving: Sequence[ir.Value | None],
    wanted: Sequence[int],
    read: Sequence[ir.Value],
    length: int | str | None,
    skipped: int = 0,
    extra: int = 0,
) -> tuple[list[tuple[ir.Value, ir.Value]], list[ir.Value], list[ir.Value]]:
    """The sweep against time: the gradients of the first states, of the slices `wanted`, and of what the body reads.

    arguments: what each step found, stacked: first `skipped` inputs of the body that are no states; arriving: at what
    the steps stack; extra: how many outputs of the body come before the states.
    """
    floats = [place for place, value in enumerate(initial) if is_float(value)]
    for place in floats:
        if not isinstance(initial[place].type, ir.TensorType):
            raise s.refuse(f"its state '{initial[place].name}' is no tensor")
    seeds = [dy for dy in arriving if dy is not None]
    stacked = [place for place, dy in enumerate(arriving) if dy is not None]
    behind = [_or_zeros(op, s.dys[place], initial[place]) for place in floats]
    sums = [op.zeros_like(value) for value in read]

    def step(*given: ir.Value) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        dstates, added = given[: len(floats)], given[len(floats) : len(floats) + len(read)]
        slices, dys = given[len(floats) + len(read) :][: len(arguments)], given[len(given) - len(seeds) :]
        starts = {extra + place: dstate for place, dstate in zip(floats, dstates, strict=True)}
        starts |= {extra + len(initial) + place: dy for place, dy in zip(stacked, dys, strict=True)} if seeds else {}
        inner = [*(slices[skipped + place] for place in floats), *(slices[place] for place in wanted)]
        results = _gradients(op, s, body, slices, starts, [*inner, *read])
        own = [_or_zeros(op, gradient, value) for gradient, value in results[: len(inner)]]
        sums = [
            before if gradient is None else op.typed(op.Add(before, gradient), value)
            for before, (gradient, value) in zip(added, results[len(inner) :], strict=True)
        ]
        return [*own[: len(floats)], *sums], own[len(floats) :]

    last, dslices = scan(op, step, [*behind, *sums], [*arguments, *seeds], reverse=True, length=length)
    dstates = list(zip((initial[place] for place in floats), last, strict=False))
    return dstates, dslices, last[len(floats) :]


def _like(op: Emit, value: ir.Value) -> ir.Value:
    return ir.val(op.name(f"{op.scope}/state"), dtype=value.dtype, shape=value.shape)


def _or_zeros(op: Emit, gradient: ir.Value | None, like: ir.Value) -> ir.Value:
    return op.typed(gradient, like) if gradient is not None else op.zeros_like(like)


def _gradients(
    op: Emit,
    s: Step,
    body: ir.Graph,
    arguments: Sequence[ir.Value],
    seeds: Mapping[int, ir.Value | None],
    wrt: Sequence[ir.Value],
) -> list[tuple[ir.Value | None, ir.Value]]:
    """Writes a copy of a body and the sweep through it; `seeds` arrive at its outputs, by their place."""
    from onnxgbp.differentiate import backpropagate  # which reads the tables, this one among them

    scope, before = op.scope, op.take()
    copy, outputs = _copy(op, s, body, arguments)
    starts: dict[ir.Value, ir.Value] = {}
    for place, seed in seeds.items():
        if seed is not None:
            value = outputs[place]
            starts[value] = op.Add(starts[value], seed) if value in starts else seed
    gradients = backpropagate(op, copy, starts, wrt, recognise(copy))
    op.nodes = [*before, *_taken(copy), *op.nodes]
    op.scope = scope
    return [(gradients[value], value) for value in wrt]


def _copied(op: Emit, s: Step, body: ir.Graph, arguments: Sequence[ir.Value]) -> list[ir.Value]:
    """Writes a copy of a body, and gives its outputs."""
    copy, outputs = _copy(op, s, body, arguments)
    op.nodes += _taken(copy)
    return outputs


def _taken(graph: ir.Graph) -> list[ir.Node]:
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes


def _copy(op: Emit, s: Step, body: ir.Graph, arguments: Sequence[ir.Value]) -> tuple[ir.Graph, list[ir.Value]]:
    """A body as a graph of its own, with the arguments in place of its inputs, and with types and shapes."""
    try:
        copy = body.clone(allow_outer_scope_values=True)
    except RuntimeError:  # an output that no node of the body makes
        raise s.refuse("an output of its body is handed through from outside") from None
    copy.opset_imports.update(op.graph.opset_imports)
    copy.meta.update(op.graph.meta)
    for scope in (copy, *copy.subgraphs()):
        for value in (*scope.inputs, *(value for node in scope for value in node.outputs)):
            value.name = op.name(f"{op.scope}/{value.name}") if value.name else value.name
    for key, value in list(copy.initializers.items()):
        del copy.initializers[key]
        if value.const_value is not None:
            shared = op.constant(value.const_value.numpy(), value.dtype)
            value.replace_all_uses_with(shared)
    places = dict(zip(copy.inputs, arguments, strict=True))
    outputs = [places.get(value, value) for value in copy.outputs]
    copy.outputs[:] = [value for value in dict.fromkeys(outputs) if value.producer() is not None]
    copy.inputs.clear()
    for value, argument in places.items():
        value.replace_all_uses_with(argument)
    _infer(copy, op.scope)
    return copy, outputs


def _infer(copy: ir.Graph, scope: str) -> None:
    """Types and shapes of a sub-graph's tensors, as of a model whose inputs are what it reads from outside."""
    made = {value for node in copy for value in node.outputs}
    read = {value: None for node in copy for value in node.inputs if value is not None and value not in made}
    read |= {value: None for node in copy for value in captured(node) if value not in made}
    inputs, constants, symbols = [], [], set[str]()
    for value in read:
        known = constant_value(value)
        if known is not None:
            constants.append(onnx.numpy_helper.from_array(known, value.name))
            continue
        dims = dims_of(value)
        if dims is not None:
            dims = tuple(f"{value.name}.{i}" if dim is None else dim for i, dim in enumerate(dims))
            symbols |= {dim for dim in dims if isinstance(dim, str)}
        inputs.append(onnx.helper.make_tensor_value_info(value.name or "", int(value.dtype or 0), dims))
    graph = onnx.helper.make_graph([ir.to_proto(node) for node in copy], "body", inputs, [], constants)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in copy.opset_imports.items()]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets))
    model.graph.meta.update(copy.meta)
    infer_shapes(model)
    known_types = {value.name: value for node in model.graph for value in node.outputs}
    for value in made:
        inferred = known_types.get(value.name)
        if inferred is None:
            continue
        value.type, value.shape = inferred.type, inferred.shape
        dims = dims_of(value)
        if dims is not None:  # a symbol that was made up here could mean another size outside
            value.shape = ir.Shape([f"{scope}:{d}" if isinstance(d, str) and d not in symbols else d for d in dims])


VJPS = {
    "If": whole(if_),
    "Loop": whole(loop),
    "Scan": whole(scan_),
}
