"""Two models, or two results, held against each other: structure bit by bit, numbers as figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxgbp.model import Source, raised, to_proto

__all__ = [
    "angle",
    "at_opset",
    "checker_complaint",
    "divergence",
    "extract",
    "first_line",
    "label_of",
    "median_error",
    "needed_tensors",
    "rank_correlation",
    "relative_difference",
    "resolution",
    "softmax",
    "structural_faults",
]

Array: TypeAlias = "np.ndarray[Any, Any]"


def extract(
    model: onnx.ModelProto, types: Mapping[str, int], outputs: Sequence[str], stop: set[str] | None = None
) -> onnx.ModelProto:
    """The part of a model that makes `outputs`; tensors of `stop` become inputs of it."""
    graph, stop = model.graph, stop or set()
    needed = needed_tensors(graph, outputs, stop)
    cut = onnx.ModelProto()
    cut.ir_version = model.ir_version
    cut.opset_import.extend(model.opset_import)
    cut.functions.extend(model.functions)
    cut.graph.name = graph.name or "graph"
    cut.graph.node.extend(node for node in graph.node if needed & set(node.output) and not stop & set(node.output))
    cut.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed - stop)
    inputs = {value.name: value for value in graph.input}
    cut.graph.input.extend(value for value in graph.input if value.name in needed)
    fresh = [name for name in sorted(stop) if name not in inputs]
    cut.graph.input.extend(onnx.helper.make_tensor_value_info(name, types[name], None) for name in fresh)
    declared = {value.name: value for value in graph.output}
    for name in outputs:
        value = declared.get(name) or onnx.helper.make_tensor_value_info(name, types[name], None)
        cut.graph.output.append(value)
    return cut


def needed_tensors(graph: onnx.GraphProto, outputs: Sequence[str], stop: set[str] | None = None) -> set[str]:
    """The names of all tensors that these outputs depend on, themselves included."""
    makers = {output: node for node in graph.node for output in node.output if output}
    needed, waiting = set[str](), list(outputs)
    while waiting:
        name = waiting.pop()
        if not name or name in needed:
            continue
        needed.add(name)
        if name in makers and name not in (stop or ()):
            waiting.extend(_reads(makers[name]))
    return needed


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, the bodies of its control flow included; names of a body's own do no harm."""
    yield from node.input
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs]:
            for inner in body.node:
                yield from _reads(inner)
            yield from (output.name for output in body.output)


def at_opset(source: Source, path: Path, opset: int) -> onnx.ModelProto:
    """The source as the conversion read it, raised to the file's opset in the same steps."""
    while (now := source.model.graph.opset_imports[""]) < opset:
        source = raised(source, 13 if now < 13 <= opset else 18 if now < 18 <= opset else opset)
    proto = to_proto(source.model, source)
    onnx.external_data_helper.load_external_data_for_model(proto, str(path.resolve().parent))
    return proto


def structural_faults(source: onnx.ModelProto, out: onnx.ModelProto) -> Iterator[str | None]:
    """Walks both graphs back from the source's outputs: None for each node or weight that is the same."""
    makers = [{o: node for node in model.graph.node for o in node.output if o} for model in (source, out)]
    weights = [{tensor.name: tensor for tensor in model.graph.initializer} for model in (source, out)]
    names = [output.name for output in source.graph.output]
    if [output.name for output in out.graph.output][: len(names)] != names:
        yield f"the outputs do not begin with the source's {', '.join(names)}"
        return
    pairs, seen = [(name, name) for name in names], set[tuple[str, str]]()
    while pairs:
        pair = pairs.pop()
        if pair in seen:
            continue
        seen.add(pair)
        mine, other = (makers[i].get(pair[i]) for i in (0, 1))
        if mine is None or other is None:
            yield _compare_leaf(pair, mine, other, weights)
            continue
        seen.update(zip(mine.output, other.output, strict=False))
        difference = _compare_node(mine, other)
        yield difference
        if difference is None:
            pairs += zip(_reads(mine), _reads(other), strict=False)


def _compare_leaf(
    pair: tuple[str, str], mine: Any, other: Any, weights: Sequence[Mapping[str, onnx.TensorProto]]
) -> str | None:
    a, b = (weights[i].get(pair[i]) for i in (0, 1))
    if (mine is None) != (other is None) or (a is None) != (b is None):
        return f"tensor '{pair[0]}' is made otherwise"
    if a is not None and b is not None:
        return None if _tensor_key(a) == _tensor_key(b) else f"weight '{pair[0]}' differs"
    return None if pair[0] == pair[1] else f"input '{pair[0]}' is read as '{pair[1]}'"


def _compare_node(mine: onnx.NodeProto, other: onnx.NodeProto) -> str | None:
    label = label_of(mine)
    if (mine.op_type, mine.domain) != (other.op_type, other.domain):
        return f"node '{label}' was {mine.op_type}, is {other.op_type}"
    if len(mine.input) != len(other.input) or list(map(bool, mine.input)) != list(map(bool, other.input)):
        return f"node '{label}' has other inputs"
    a, b = ({attribute.name: _attribute_key(attribute) for attribute in node.attribute} for node in (mine, other))
    changed = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    return f"attribute '{min(changed)}' of node '{label}' differs" if changed else None


def _attribute_key(attribute: onnx.AttributeProto) -> Any:
    """The value by its meaning: a tensor may be stored in two forms."""
    if attribute.HasField("t"):
        return _tensor_key(attribute.t)
    plain = onnx.AttributeProto()
    plain.CopyFrom(attribute)
    plain.ClearField("doc_string")
    return plain.SerializeToString(deterministic=True)


def _tensor_key(tensor: onnx.TensorProto) -> tuple[Any, ...]:
    data: Any = (
        tuple(tensor.string_data)
        if tensor.data_type == onnx.TensorProto.STRING
        else onnx.numpy_helper.to_array(tensor).tobytes()
    )
    return tensor.data_type, tuple(tensor.dims), data


def checker_complaint(model: str | onnx.ModelProto) -> str | None:
    """What onnx.checker has to say against a model."""
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - besides its own kind it raises what protobuf raises
        return first_line(error)
    return None


def relative_difference(found: Any, wanted: Any) -> float:
    """The largest difference as a share of the range; infinite for another shape or type, or other labels."""
    if isinstance(wanted, list):  # ZipMap gives a list of maps
        if not isinstance(found, list) or len(found) != len(wanted):
            return math.inf
        return max((relative_difference(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
    if isinstance(wanted, dict):
        same = isinstance(found, dict) and list(found) == list(wanted)
        return relative_difference(np.array([*found.values()]), np.array([*wanted.values()])) if same else math.inf
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if not np.issubdtype(wanted.dtype, np.floating):
        return 0.0 if np.array_equal(found, wanted) else math.inf
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return math.inf
    different = (a != b) & ~np.isnan(b)
    if not different.any():
        return 0.0
    finite = b[np.isfinite(b)]
    scale = float(np.ptp(finite)) or float(np.abs(finite).max()) if finite.size else 0.0
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(a - b)[different].max())
    return largest / scale if scale else math.inf


def resolution(array: Any) -> float:
    """What a type narrower than float32 adds to a tolerance: a few of its smallest steps."""
    kind = getattr(array, "dtype", None)
    if kind is None or not np.issubdtype(kind, np.floating) or kind.itemsize >= 4:
        return 0.0
    return 4 * float(np.finfo(kind).eps)


def angle(a: Array, b: Array) -> float:
    """1 - cosine, 0 for two zero maps, 1 where one of them is zero or not finite."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not math.isfinite(size):
        return 1.0
    if not size:
        return float(np.any(a) or np.any(b))
    return max(1.0 - float(a @ b) / size, 0.0)


def median_error(a: Array, b: Array) -> float:
    """The median of |a - b| / |b| over what is not nearly zero."""
    counted = np.abs(b) > 1e-3 * np.abs(b).max(initial=0.0)
    return float(np.median(np.abs(a - b)[counted] / np.abs(b)[counted])) if counted.any() else float(np.any(a))


def label_of(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}({', '.join(node.output)})"


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def softmax(scores: Array) -> Array:
    """Of one row."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max())
        return np.asarray(powers / powers.sum())


def divergence(p: Array, q: Array) -> float:
    """Jensen-Shannon, in nats, of two rows of probabilities: the mean Kullback-Leibler divergence from the middle m of
    both, sum p log(p / m), which stays finite (at most log 2) where a narrow type has rounded a probability to 0.
    Lin 1991, doi:10.1109/18.61115.
    """
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(one == 0, 0, one * np.log(one / middle)).sum() for one in (p, q)]
    return float(max(sum(parts) / 2, 0))


def rank_correlation(a: Array, b: Array) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, equal entries sharing the middle of theirs; None where one array
    is constant or not finite.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    ranks = [_ranks(one) for one in (a, b)]
    centred = [one - one.mean() for one in ranks]
    size = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / size if size else None


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place.ravel()], np.float64)
