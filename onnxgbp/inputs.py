"""What is attributed to: the float inputs, or the first float tensors that are made of the integer ones.

Integers have no gradient. Token ids get it at what their table gives for them, the pixels of a uint8 picture at the
Cast that makes floats of them. Masks, lengths and the like only steer the network and are left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from onnxgbp.constants import constant_value
from onnxgbp.differentiate import find_path
from onnxgbp.emit import dims_of, is_float
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explained import find_tensor

__all__ = ["Attributed", "attributed", "integer_ranges", "made_of"]

# What is made by these does not depend on the values of what they read, or is a place, not a value.
_SHAPES = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "NonZero"})
# The numbers of the first input stay what they are, elsewhere or in another type; later inputs say where.
_LAYOUT = frozenset(
    "Cast Clip DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape Resize ReverseSequence "
    "Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Upsample".split()
)
_ARITHMETIC = frozenset({"Abs", "Add", "Concat", "Div", "Mul", "Neg", "Sub", "Sum"})
_MAKES_FLOATS = frozenset({"Cast", "CastLike", "DequantizeLinear", "ai.onnx.ml::Scaler"})
_SAMPLES = frozenset({ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16})
_FEW = 10
# A sum of lookups may be reached through these: each passes a gradient on as it is, up to a place or a factor.
_TO_A_SUM = frozenset({"Add", "Cast", "Dropout", "Expand", "Identity", "Reshape", "Squeeze", "Sum", "Unsqueeze"})


@dataclasses.dataclass(frozen=True)
class Attributed:
    """tensors: what the attribution belongs to; inputs: those of the model that they stand for; note: why these."""

    tensors: tuple[ir.Value, ...]
    inputs: tuple[ir.Value, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What a table gives for an integer input: `tensor`; rows: of the table, None where that is not known."""

    input: ir.Value
    tensor: ir.Value
    table: ir.Value
    rows: int | None


def attributed(graph: ir.Graph, names: Sequence[str] = (), output: str | None = None) -> Attributed:
    """The tensors to attribute to.

    Those named; else every float input that the scores depend on; else, for a model of integers,

    - the lookup of each input in a table (an embedding). Of several that are added up, as words, positions and token
      types are, the one from the largest table, the vocabulary: through the sum all have the same gradient;
    - the floats that are made of each input of 8 or 16 bits and three axes or more: pictures;
    - where there is neither, the floats that are made of any other integers: of those with two axes or more, else of
      those with fewer, else of Booleans.

    Raises:
        OnnxgbpError: no such tensor, or none can be found.
    """
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    if names:
        return Attributed(tuple(find_tensor(graph, name, "--wrt") for name in dict.fromkeys(names)), ())
    ends = [find_tensor(graph, output, "--output")] if output is not None else list(graph.outputs)
    floats = [value for value in inputs if is_float(value)]
    found = _Integers(graph, [value for value in inputs if not is_float(value)], ends)
    if reached := [value for value in floats if _reaches(graph, value, ends)]:
        return Attributed(tuple(reached), tuple(reached), _beside(found.lookups, found.samples()))
    lookups, same = _one_of_each_sum(found.lookups)
    tensors = {lookup.tensor: lookup.input for lookup in lookups} | found.samples()
    tensors = tensors or found.integers(2) or found.integers(0) or found.floats_of
    if tensors:
        note = _note(tensors, lookups, same, inputs)
        return Attributed(tuple(tensors), tuple(dict.fromkeys(tensors.values())), note)
    if floats:
        return Attributed(tuple(floats), tuple(floats))  # what stands between them and the scores is said later
    raise OnnxgbpError(
        f"no tensor to attribute to was found: the model has no float input, and no embedding or Cast makes floats of "
        f"{_names(inputs) or 'what it reads'} that the scores depend on; name an inner float tensor with --wrt"
    )


def integer_ranges(graph: ir.Graph) -> dict[str, range]:
    """The integer inputs that any small numbers may be tried for, and which.

    Ids stay within their tables; quantities begin with 1, since many a kink lies at 0. What is not named steers the
    network (a mask, a length): there 1 is safe.
    """
    found = _Integers(graph, [value for value in graph.inputs if not value.is_initializer() and not is_float(value)])
    ranges: dict[str, range] = {}
    for lookup in found.lookups:
        name = lookup.input.name or ""
        ranges[name] = range(min(len(ranges.get(name, range(_FEW))), lookup.rows or _FEW))
    numbers = found.samples() or ({} if found.lookups else found.integers(2))
    return ranges | {v.name or "": range(1, 128 if v.dtype in _SAMPLES else _FEW) for v in numbers.values()}


def made_of(graph: ir.Graph, name: str) -> tuple[str, ...]:
    """The inputs whose numbers a tensor is computed from, in their order; () where there is no such tensor."""
    inputs = {value.name: value for value in graph.inputs if not value.is_initializer()}
    tensors = inputs | {value.name: value for node in graph for value in node.outputs}
    found, waiting = set[ir.Value](), [tensors[name]] if name in tensors else []
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in found or (node is not None and node.op_type in _SHAPES):
            continue
        found.add(value)
        waiting += [read for read in (node.inputs if node is not None else ()) if read is not None]
    return tuple(value.name or "" for value in inputs.values() if value in found)


class _Integers:
    """What becomes of the integer inputs: followed forward until floats are made of them.

    ends: what the floats have to reach with a gradient; nothing is asked of them where there are none.
    """

    def __init__(self, graph: ir.Graph, inputs: Sequence[ir.Value], ends: Sequence[ir.Value] = ()) -> None:
        self.lookups: list[Lookup] = []
        self.floats_of: dict[ir.Value, ir.Value] = {}  # the floats, and the input of whose numbers they are made
        computed = _computed(graph)
        for value in inputs:
            # Derived: depends on the input's values; numbers: those that still stand for quantities.
            derived, numbers = {value}, {value}
            for node in graph:
                self._follow(node, value, derived, numbers, computed)
        if ends:
            self.lookups = [lookup for lookup in self.lookups if _reaches(graph, lookup.tensor, ends)]
            self.floats_of = {t: value for t, value in self.floats_of.items() if _reaches(graph, t, ends)}

    def _follow(
        self, node: ir.Node, value: ir.Value, derived: set[ir.Value], numbers: set[ir.Value], computed: set[ir.Value]
    ) -> None:
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        read = list(node.inputs[:1] if kind in _LAYOUT and not kind.startswith("Gather") else node.inputs)
        if kind in _SHAPES or not any(x in derived for x in read) or not node.outputs:
            return
        y = node.outputs[0]
        if not is_float(y):
            derived.update(node.outputs)
            first = kind in _LAYOUT and node.inputs[0] in numbers
            if first or (kind in _ARITHMETIC and any(x in numbers for x in read)):
                numbers.update(node.outputs)
            return
        table = node.inputs[0]
        if kind in ("Gather", "GatherND") and table is not None and table not in computed:
            self.lookups.append(Lookup(value, y, table, _rows(table, int(_axis(node)))))
        elif (product := _one_hot(node, value, kind, computed)) is not None:
            self.lookups.append(product)
        elif kind in _MAKES_FLOATS and node.inputs[0] in numbers:
            self.floats_of.setdefault(y, value)

    def samples(self) -> dict[ir.Value, ir.Value]:
        """The floats that are made of pictures."""
        return {t: value for t, value in self.floats_of.items() if value.dtype in _SAMPLES and _rank(value) >= 3}

    def integers(self, rank: int) -> dict[ir.Value, ir.Value]:
        """The floats that are made of integers with at least so many axes."""
        return {t: v for t, v in self.floats_of.items() if v.dtype is not ir.DataType.BOOL and _rank(v) >= rank}


def _computed(graph: ir.Graph) -> set[ir.Value]:
    """What depends on the values of any input: no table."""
    computed = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if node.op_type not in _SHAPES and any(value in computed for value in node.inputs):
            computed.update(node.outputs)
    return computed


def _one_hot(node: ir.Node, value: ir.Value, kind: str, computed: set[ir.Value]) -> Lookup | None:
    """A lookup spelled as the product of a one-hot tensor, which has one axis more than the ids, with the table."""
    y = node.outputs[0]
    if kind not in ("OneHot", "Cast", "CastLike") or (kind != "OneHot" and _rank(y) != _rank(value) + 1):
        return None
    reader = _only_reader(y)
    if reader is None or reader.op_type not in ("MatMul", "Gemm") or reader.inputs[0] is not y:
        return None
    table = reader.inputs[1]
    return None if table is None or table in computed else Lookup(value, reader.outputs[0], table, _rows(table, -2))


def _one_of_each_sum(found: Sequence[Lookup]) -> tuple[list[Lookup], list[Lookup]]:
    """Of lookups that meet in a sum the one from the largest table; and those that it stands for."""
    groups: list[tuple[set[ir.Value], list[Lookup]]] = []
    for lookup in found:
        sums, members = _sums(lookup.tensor), [lookup]
        for group in [group for group in groups if group[0] & sums]:
            groups.remove(group)
            sums, members = sums | group[0], group[1] + members
        groups.append((sums, members))
    chosen = [max(members, key=lambda lookup: lookup.rows or 0) for _, members in groups]
    return chosen, [lookup for lookup in found if lookup not in chosen]


def _sums(value: ir.Value) -> set[ir.Value]:
    """The sums that a tensor flows into whole: read by nothing else on the way, at most scaled by a constant."""
    sums = {value}
    while (node := _only_reader(value)) is not None:
        scaled = node.op_type in ("Mul", "Div") and constant_value(node.inputs[1]) is not None
        if not (node.op_type in _TO_A_SUM or scaled):
            break
        value = node.outputs[0]
        if node.op_type in ("Add", "Sum"):
            sums.add(value)
    return sums


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and not value.is_graph_output() else None


def _reaches(graph: ir.Graph, value: ir.Value, ends: Iterable[ir.Value]) -> bool:
    return value in ends or bool(find_path(graph, ends, [value]))


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _rows(table: ir.Value, axis: int) -> int | None:
    dims = dims_of(table) or ()
    size = dims[axis] if -len(dims) <= axis < len(dims) else None
    return size if isinstance(size, int) else None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _beside(found: Sequence[Lookup], samples: dict[ir.Value, ir.Value]) -> str:
    """What a model of floats reads besides, and what to name for it."""
    more = {lookup.input: lookup.tensor for lookup in found} | {value: t for t, value in samples.items()}
    said = ", ".join(f"'{value.name}' (--wrt '{tensor.name}')" for value, tensor in more.items())
    return f"not attributed to: {said}" if said else ""


def _note(
    tensors: dict[ir.Value, ir.Value],
    found: Sequence[Lookup],
    same: Sequence[Lookup],
    inputs: Sequence[ir.Value],
) -> str:
    """What was chosen, and what not."""
    by_tensor = {lookup.tensor: lookup for lookup in found}
    parts = []
    for tensor, value in tensors.items():
        lookup = by_tensor.get(tensor)
        what = f"the lookup of '{value.name}' in '{lookup.table.name}'" if lookup else f"'{value.name}' as floats"
        parts.append(f"'{tensor.name}' is {what}")
    through = [value for value in dict.fromkeys(lookup.input for lookup in same) if value not in tensors.values()]
    if through:
        parts.append(f"{_names(through)} added to a lookup, with the same gradient")
    if rest := [value for value in inputs if value not in tensors.values() and value not in through]:
        parts.append(f"left alone: {_names(rest)}")
    return "; ".join(parts)


def _names(values: Iterable[ir.Value]) -> str:
    return ", ".join(f"'{value.name}'" for value in values)
