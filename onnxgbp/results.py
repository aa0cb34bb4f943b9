"""The outputs that a conversion adds to a graph: their names, their shapes, and the nodes right before them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import onnx_ir as ir

from onnxgbp.emit import PRIVATE, Emit, dims_of
from onnxgbp.seed import Seed

__all__ = ["add_results", "declare_as_source", "join_outputs", "name_sweeps", "result_names", "stacked"]

# How the outputs are called until a rendering says which method each of several sweeps is for.
_SWEEP = "onnxgbp/sweep_"


def stacked(op: Emit, gradients: Sequence[ir.Value], seed: Seed) -> ir.Value:
    """The gradients of K classes as one tensor [N, K, ...]."""
    if seed.count is None:
        return gradients[0]
    op.scope = "onnxgbp"
    rows = [op.Unsqueeze(gradient, axes=[1]) for gradient in gradients]
    return op.Concat(*rows, axis=1)


def add_results(
    op: Emit,
    inputs: Sequence[ir.Value],
    results: Sequence[Sequence[tuple[ir.Value, ir.Shape | None]]],
    explained: ir.Value,
    seed: Seed,
) -> None:
    """Adds `attribution` and `attribution_target`.

    results: of each method, for each of the inputs, what `stacked` gives and the shape of the map of one class.
    """
    op.graph.extend(op.take())
    for number, result in enumerate(results):
        for value, (attribution, dims) in zip(inputs, result, strict=True):
            name = f"attribution_{value.name}" if len(inputs) > 1 else "attribution"
            name = f"{_SWEEP}{number}_{name}" if len(results) > 1 else name
            _output(op, name, attribution, _with_classes(_declared(value, dims), seed))
    batch = (dims_of(explained) or (1,))[:1]
    shape = ir.Shape([dim if _named(dim) else None for dim in batch])
    _output(op, "attribution_target", seed.target, _with_classes(shape, seed))


def _declared(value: ir.Value, dims: ir.Shape | None) -> ir.Shape | None:
    """The shape of a map: what the source declares of the tensor that it has the shape of, else what is known."""
    if dims is None or dims == value.shape:
        declared: ir.Shape | None = value.meta.get("declared", (None, value.shape))[1]
        return declared
    sizes = [dim if isinstance(dim, int) else dim.value for dim in dims]
    return ir.Shape([size if _named(size) else None for size in sizes])


def _with_classes(shape: ir.Shape | None, seed: Seed) -> ir.Shape | None:
    if seed.count is None or shape is None:
        return shape
    return ir.Shape([*shape.dims[:1], seed.count, *shape.dims[1:]])


def _named(dim: int | str | None) -> bool:
    """Whether a dim is a size or a symbol of the source's, not one that shape inference made up."""
    return isinstance(dim, int) or (dim is not None and dim.isidentifier() and not dim.startswith("free_"))


def _output(op: Emit, name: str, value: ir.Value, shape: ir.Shape | None) -> None:
    """Adds a graph output, through an Identity: which tensor stands behind it shows only after the rules."""
    op.scope = "onnxgbp"
    result = op.Identity(value)
    result.name, result.shape = op.claim(name), shape
    op.graph.extend(op.take())
    op.graph.outputs.append(result)


def name_sweeps(op: Emit, methods: Sequence[str]) -> None:
    """`attribution_<method>`, or `attribution_<method>_<name>`, with `_` for what is no part of an identifier."""
    for value in op.graph.outputs:
        if (value.name or "").startswith(_SWEEP):
            sweep, _, rest = (value.name or "").removeprefix(_SWEEP).partition("_attribution")
            value.name = op.claim(f"attribution_{_slug(methods[int(sweep)])}{rest}")


def _slug(method: str) -> str:
    return re.sub(r"[^0-9A-Za-z-]", "_", method)


def result_names(methods: Sequence[str], wrt: Sequence[str]) -> dict[str, str]:
    """The outputs that a conversion adds before `attribution_target`, and the tensor that each attributes to."""
    firsts = [f"attribution_{_slug(method)}" for method in methods] if len(methods) > 1 else ["attribution"]
    return {f"{first}_{name}" if len(wrt) > 1 else first: name for first in firsts for name in wrt}


def join_outputs(graph: ir.Graph) -> None:
    """Drops the Identity before an output of ours where the node behind it can carry the output's name itself."""
    for node in list(graph):
        made, source = node.outputs[0], node.inputs[0] if node.inputs else None
        if node.meta.get("forward") or node.op_type != "Identity" or source is None or not made.is_graph_output():
            continue
        maker = source.producer()
        if maker is None or maker.meta.get("forward") or source.is_graph_output():
            continue
        name = made.name
        made.name = None
        made.replace_all_uses_with(source, replace_graph_outputs=True)
        source.name, source.type, source.shape = name, made.type, made.shape
        graph.remove(node, safe=True)


def declare_as_source(graph: ir.Graph) -> None:
    """What the source said of its inputs and outputs stands again. Inner tensors go unsaid: any reader infers them."""
    assert not any(node.domain == PRIVATE for node in graph), "a private call survived lowering"
    ends = {*graph.inputs, *graph.outputs}
    for value in (*graph.initializers.values(), *(v for node in graph for v in node.outputs)):
        if value not in ends:
            value.type = value.shape = None
    symbols = set[str]()
    for value in (*graph.inputs, *graph.outputs):
        if "declared" in value.meta:
            inferred, (value.type, value.shape) = value.shape, value.meta["declared"]
            if value.is_graph_input():
                symbols |= {dim for dim in dims_of(value) or () if isinstance(dim, str)}
            else:
                value.shape = _freed(value.shape, inferred, symbols)


def _freed(declared: ir.Shape | None, inferred: ir.Shape | None, symbols: Collection[str]) -> ir.Shape | None:
    """What a file says of an output, but for dims that are free: exporters say the size that they exported with.

    ONNX Runtime believes that, and what reads such an output's shape then breaks at any other batch.
    """
    if declared is None or inferred is None or len(declared) != len(inferred):
        return declared
    dims: list[int | str | ir.SymbolicDim | None] = []
    for said, known in zip(declared, inferred, strict=True):
        if isinstance(said, int) and not isinstance(known, int):
            dims.append(known.value if known.value in symbols else None)
        else:
            dims.append(said)
    return ir.Shape(dims)
