"""What is made of a gradient: the methods beyond the rules, each over any rule. METHODS, at the end, is the one table.

A method is written METHOD or METHOD:RULE (`smoothgrad:guided`, `smoothgrad:rectgrad:95`); the name of a rule alone is
the map of that rule. Some methods are a few more nodes in the graph and so go into a file. The others run one graph at
many points and belong to `Explainer`: they say which points, and how the maps there are put together; how many points
share a run is not their affair.

Costs are in passes, one being a forward and a backward sweep of a sample; CAM methods stop the sweep at their layer.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS, Activation
from onnxgbp.branches import captured
from onnxgbp.differentiate import find_path
from onnxgbp.emit import Emit, dims_of, is_float
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError
from onnxgbp.rules import RULES, listed, parse_rule
from onnxgbp.target import Explained, find_tensor
from onnxgbp.views import channel_axis
from onnxgbp.vjps import FAMILIES

__all__ = [
    "INTERNAL_BATCH_SIZE",
    "METHODS",
    "At",
    "Method",
    "Sweeps",
    "find_layer",
    "find_method",
    "parse_method",
    "parse_methods",
    "refuse_sampled",
    "rule_of",
    "sampling_options",
    "sampling_text",
]

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = "list[Array]"  # one for each tensor that is attributed to

INTERNAL_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """What a method in the graph may use, for one class of each sample.

    op: writes nodes. inputs: what is attributed to. layer: the feature map of the CAM methods.
    metadata: the model's, which may tell the layout of its images.
    gradient: the gradients at some tensors under the method's rule; plain: the plain ones, for a seed without its
    scale (see `scale.py`): a product of two maps may hold that once only.
    """

    op: Emit
    inputs: tuple[ir.Value, ...]
    layer: ir.Value | None
    metadata: Mapping[str, str]
    gradient: Callable[[Sequence[ir.Value]], list[ir.Value]]
    plain: Callable[[Sequence[ir.Value]], list[ir.Value]]

    @property
    def map(self) -> ir.Value:
        """The layer, of a method that has one."""
        assert self.layer is not None
        return self.layer


@dataclasses.dataclass(frozen=True)
class At:
    """A batch, as a method that runs the graph at many points sees it.

    x: the arrays that are attributed to, [N, ...] each; names: theirs. plain: the maps there, [N, ...] each, or
    [N, K, ...]. maps: the maps at each of some points, in order; it takes the points a few at a time, so that neither
    they nor the maps are ever all in memory. score: what is explained, at a point: float64 [N], or [N, K].
    """

    x: Arrays
    names: tuple[str, ...]
    plain: Arrays
    maps: Callable[[Iterable[Arrays]], Iterator[Arrays]]
    score: Callable[[Arrays], Array]


Write: TypeAlias = "Callable[[Sweeps], list[ir.Value]]"
Sample: TypeAlias = "Callable[..., tuple[Arrays, Array | None]]"


@dataclasses.dataclass(frozen=True)
class Method:
    """How a map is made.

    write: nodes in the graph, which gives the map of each of the inputs; or sample: from the maps at many points, which
    gives the map of each and, where there is one, the completeness gap; its keyword arguments are the method's options.
    rule: where none is named. inputs, layer: whose gradient is taken. scored: whether `sample` asks for scores.
    """

    write: Write
    sample: Sample | None = None
    rule: str = "gradient"
    inputs: bool = True
    layer: bool = False
    scored: bool = False


# --- names ----------------------------------------------------------------------------------------


def _split(text: str) -> tuple[str, str]:
    """The method, '' for the map of a rule itself, and the rule."""
    name, colon, rule = text.partition(":")
    return (name, rule if colon else METHODS[name].rule) if name in METHODS and name else ("", text)


def find_method(text: str) -> Method:
    """The entry of METHODS, of 'guided', 'grad-cam' or 'smoothgrad:rectgrad:95'."""
    return METHODS[_split(text)[0]]


def rule_of(text: str) -> str:
    """The rule that a method is over: smoothgrad:rectgrad:95 is over rectgrad:95, guided-grad-cam over guided."""
    return _split(text)[1]


def parse_method(method: str) -> str:
    """A RULE, METHOD or METHOD:RULE, without what surrounds it.

    Raises:
        OnnxgbpError: no such method, or no such rule.
    """
    text = method.strip() if isinstance(method, str) else method
    if not isinstance(text, str) or not ({text.partition(":")[0]} & {*RULES, *METHODS} - {""}):
        names = ", ".join([*RULES, *filter(None, METHODS)])
        raise OnnxgbpError(f"no method is called '{method}': choose one of {names}")
    parse_rule(rule_of(text))
    return text


def parse_methods(method: str, methods: str | Sequence[str] = ()) -> tuple[str, ...]:
    """What a model gives one attribution each for: `methods`, or else the one `method`.

    Raises:
        OnnxgbpError: no such method, one named twice, or one of several that stands alone.
    """
    given = methods.split(",") if isinstance(methods, str) and methods else listed(methods or [method], "methods")
    names = tuple(parse_method(name) for name in given)
    if len(set(names)) < len(names):
        raise OnnxgbpError(f"a method is named twice: {', '.join(names)}")
    if len(names) > 1:
        refuse_sampled(names)
    return names


def refuse_sampled(methods: Sequence[str]) -> None:
    """Raises for a method that is no single graph."""
    for name in methods:
        if find_method(name).sample is not None:
            raise OnnxgbpError(
                f"{name} runs the model at many points, so it is no single graph: use onnxgbp explain or "
                f"onnxgbp.Explainer with it alone, or convert with --method {rule_of(name)}"
            )


# --- the layer of the CAM methods -------------------------------------------------------------------

# What these make is laid out [N, C, ...]; what keeps it so; what shows no more than the map before it, or less.
_LAID_OUT = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "LRN"})
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})
_SHOWS_NO_MORE = _POOLS | {"Cast", "Dropout", "Identity"}
_KEEPS = frozenset(
    {*FAMILIES["elementwise"], *ACTIVATIONS, "Concat", "DequantizeLinear", "Pad", "QuantizeLinear", "Resize", "Slice"}
    | {"GroupNormalization", "Split"}
)


def find_layer(
    graph: ir.Graph,
    explained: Explained,
    inputs: Sequence[ir.Value],
    found: Mapping[ir.Node, Activation],
    name: str | None,
) -> ir.Value:
    """The tensor called so, or the last feature map [N, C, h, w] before its spatial axes are pooled or flattened.

    That is a tensor which every way from the inputs to the score passes, which convolutions have laid out, and behind
    at least one activation: a transformer's patches are none.

    Raises:
        OnnxgbpError: no such tensor, or one of unknown rank.
    """
    if name is not None:
        layer = find_tensor(graph, name, "--layer")
        if layer.shape is None:
            raise OnnxgbpError(f"the rank of layer '{name}' is not known; export the model with input shapes")
        return layer
    path = find_path(graph, explained.tensor, inputs)
    maps, active = set[ir.Value](), set(inputs)
    for node in path:
        active.update(node.outputs)
        keeps = node.op_type in _KEEPS and any(value in maps for value in node.inputs)
        if node.op_type in _LAID_OUT | _POOLS or keeps:
            maps.update(node.outputs)
    waiting = {explained.tensor}
    for place, node in reversed(list(enumerate(path))):
        if waiting.isdisjoint(node.outputs):
            continue
        value, *others = waiting  # alone, it is what every way passes
        fine = value in maps and is_float(value) and any(dim != 1 for dim in (dims_of(value) or ())[2:])
        if fine and not others and value is not explained.tensor and node.op_type not in _SHOWS_NO_MORE:
            if any(earlier in found and found[earlier].gate is None for earlier in path[: place + 1]):
                return value
            break
        waiting.difference_update(node.outputs)
        waiting.update(value for value in (*node.inputs, *captured(node)) if value is not None and value in active)
    raise OnnxgbpError(
        f"no feature map [N, C, h, w] lies on every way to '{explained.tensor.name}': name a tensor with --layer"
    )


# --- in the graph -----------------------------------------------------------------------------------


def rule_map(s: Sweeps) -> list[ir.Value]:
    """The gradient under the rule: the shape of the input. 1 pass."""
    return s.gradient(s.inputs)


def input_x_gradient(s: Sweeps) -> list[ir.Value]:
    """x * g, with g the gradient under the rule: the shape of the input (Shrikumar et al. 2016, arXiv:1605.01713).

    1 pass.
    """
    return [s.op.typed(s.op.Mul(x, g), x) for x, g in zip(s.inputs, s.gradient(s.inputs), strict=True)]


def layer_activation_x_gradient(s: Sweeps) -> list[ir.Value]:
    """A * dS/dA, element by element, at a layer A: the shape of the layer, the type of the input (Captum's name).

    1 pass, backwards down to the layer only.
    """
    product = s.op.typed(s.op.Mul(s.map, *s.gradient([s.map])), s.map)
    return [s.op.typed(s.op.cast_like(product, s.inputs[0]), product)]


def grad_cam(s: Sweeps) -> list[ir.Value]:
    """ReLU(sum_c w_c A_c) with w_c the mean of dS/dA_c over space (Selvaraju et al. 2017, arXiv:1610.02391).

    A is the layer, [N, C, h, w]. The map is interpolated linearly to the size of the input, as `half_pixel` of Resize
    or torch's align_corners=False do, and lies as the input does: [N, 1, H, W], or [N, H, W, 1]. 1 pass, backwards down
    to the layer only.
    """
    return [_upsampled(s, _class_map(s, *s.gradient([s.map])))]


def guided_grad_cam(s: Sweeps) -> list[ir.Value]:
    """Guided backpropagation (or the map of another rule) times the Grad-CAM map of the plain gradient, interpolated.

    The shape of the input (Selvaraju et al. 2017, arXiv:1610.02391). 1 pass, and a second sweep backwards to the layer.
    """
    (x,) = s.inputs
    coarse = _upsampled(s, _class_map(s, *s.plain([s.map])))
    return [s.op.typed(s.op.Mul(*s.gradient([x]), coarse), x)]


def _class_map(s: Sweeps, gradient: ir.Value) -> ir.Value:
    """Grad-CAM in the layer's own size: [N, 1, h, w]."""
    op, dims = s.op, dims_of(s.map) or ()
    if len(dims) < 3:
        shape = ", ".join(str(dim or "?") for dim in dims)
        raise OnnxgbpError(
            f"layer '{s.map.name}' has shape [{shape}], and Grad-CAM needs a feature map [N, C, h, w]: name another "
            "with --layer"
        )
    weights = op.ReduceMean(gradient, axes=list(range(2, len(dims))), keepdims=1)
    return op.Relu(op.ReduceSum(op.Mul(weights, s.map), axes=[1], keepdims=1))


def _upsampled(s: Sweeps, coarse: ir.Value) -> ir.Value:
    """[N, 1, h, w] in the size, the layout and the type of the input.

    Known sizes are two products with constant matrices, the same in every runtime; free ones take a Resize.
    """
    op, (x,) = s.op, s.inputs
    dims, small = dims_of(x) or (), dims_of(s.map) or ()
    rank = len(dims)
    if rank != len(small):
        shapes = (f"[{', '.join(str(dim or '?') for dim in shape)}]" for shape in (small, dims))
        raise OnnxgbpError(
            f"Grad-CAM cannot lay a map of {next(shapes)} over '{x.name}' of {next(shapes)}: name other tensors with "
            "--layer or --wrt"
        )
    _, channels, *space = order = _layout(x, s.metadata)
    sizes = [(size, dims[axis]) for size, axis in zip(small[2:], space, strict=True)]
    whole = [(size, out) for size, out in sizes if isinstance(size, int) and isinstance(out, int)]
    if len(whole) == len(sizes):
        for axis, (size, out) in enumerate(whole, start=2):
            last = [i for i in range(rank) if i != axis] + [axis]
            finer = op.MatMul(op.Transpose(coarse, perm=last), op.like(_interpolation(size, out).T, coarse))
            coarse = op.Transpose(finer, perm=[last.index(i) for i in range(rank)])
    else:
        if op.opset < 13:  # Resize cannot leave its other inputs out before
            raise OpsetTooLowError(13)
        target = op.vector(op.dim(s.map, 0), 1, *(op.dim(x, axis) for axis in space))
        mode = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        coarse = op.Resize(coarse, None, None, sizes=target, **mode)
    if order != sorted(order):
        coarse = op.Transpose(coarse, perm=[order.index(axis) for axis in range(rank)])
    coarse = op.cast_like(coarse, x)
    coarse.shape = ir.Shape([1 if axis == channels else dim for axis, dim in enumerate(dims)])
    return coarse


def _layout(x: ir.Value, metadata: Mapping[str, str]) -> list[int]:
    """The axes of the input in the order [N, C, ...], as the first convolution takes them.

    Where there is none, the metadata or the sizes tell.
    """
    rank = len(dims_of(x) or ())
    waiting, seen = [(x, list(range(rank)))], {x}
    for value, order in waiting:
        for node, place in value.uses():
            if not node.meta.get("forward") or not node.outputs or node.outputs[0] in seen:
                continue
            if node.op_type in ("Conv", "ConvTranspose") and place == 0:
                return order
            turned = order
            if node.op_type == "Transpose":
                turned = [order[axis] for axis in node.attributes.get_ints("perm", range(rank)[::-1])]
            elif node.op_type not in _KEEPS:
                continue
            seen.add(node.outputs[0])
            waiting.append((node.outputs[0], turned))
    channels = channel_axis(dims_of(x) or (), metadata, 1)
    return [0, channels, *(axis for axis in range(1, rank) if axis != channels)]


def _interpolation(size: int, out: int) -> Array:
    """[out, size]: the weight of each entry of a line in each of a finer one; pixels are areas, the ends repeat."""
    places = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size))))


# --- at many points ---------------------------------------------------------------------------------


def smoothgrad(
    at: At, *, n_samples: int = 50, stdevs: str | float = "15%", random_seed: int = 0
) -> tuple[Arrays, None]:
    """The mean of the maps at x + noise (Smilkov et al. 2017, arXiv:1706.03825): the shape of the map. n passes.

    The noise is normal and the same for every sample of a batch. Its width is a share of the range of each sample, as
    in the paper, or absolute, as in Captum: '15%' or 0.3. The last of the n has none, so that n = 1 is the map itself.
    """
    return _mean(_noisy(at, n_samples, stdevs, random_seed)), None


def smoothgrad_squared(
    at: At, *, n_samples: int = 50, stdevs: str | float = "15%", random_seed: int = 0
) -> tuple[Arrays, None]:
    """The mean of the squares of those maps (Hooker et al. 2019, arXiv:1806.10758): the shape of the map. n passes."""
    return _mean([g * g for g in maps] for maps in _noisy(at, n_samples, stdevs, random_seed)), None


def vargrad(at: At, *, n_samples: int = 50, stdevs: str | float = "15%", random_seed: int = 0) -> tuple[Arrays, None]:
    """The variance of those maps, divided by n (Adebayo et al. 2018, arXiv:1810.03307): the shape of the map. n passes.

    Raises:
        OnnxgbpError: fewer than two samples.
    """
    if n_samples < 2:
        raise OnnxgbpError(f"vargrad is a variance: n_samples is {n_samples}, give 2 or more")
    # Around the map at x: squares of what is large and varies little would lose their digits.
    shifted = (
        [g - g0 for g, g0 in zip(maps, at.plain, strict=True)] for maps in _noisy(at, n_samples, stdevs, random_seed)
    )
    means = _mean([*d, *(e * e for e in d)] for d in shifted)
    half = len(at.plain)
    return [np.maximum(square - mean * mean, 0) for mean, square in zip(means[:half], means[half:], strict=True)], None


def integrated_gradients(at: At, *, n_steps: int = 50, baseline: Any = 0.0) -> tuple[Arrays, Array]:
    """(x - b) * integral of g(b + t (x - b)) over t from 0 to 1 (Sundararajan et al. 2017, arXiv:1703.01365).

    The shape of the map. The integral is Gauss and Legendre's, as Captum's by default: n_steps passes, and two for the
    completeness gap, the sum of the map less the difference of the scores at x and b; with the plain gradient that is
    the error of the integral. b is a number, or an array of a sample's shape or of x's; a dict of them by tensor name.
    """
    start = [_broadcast(b, x, name) for b, x, name in zip(_each(baseline, at), at.x, at.names, strict=True)]
    ways = [x - b for x, b in zip(at.x, start, strict=True)]
    places, weights = np.polynomial.legendre.leggauss(n_steps)
    points = ([_as(b + (1 + place) / 2 * d, d) for b, d in zip(start, ways, strict=True)] for place in places)
    weighed = ([weight / 2 * g for g in maps] for weight, maps in zip(weights, at.maps(points), strict=True))
    result = [_times(d, g) for d, g in zip(ways, _sum(weighed), strict=True)]
    wanted = at.score(at.x) - at.score(start)
    total = sum(r.reshape(*wanted.shape, -1).sum(axis=-1) for r in result)
    return result, np.asarray(total - wanted)


def expected_gradients(
    at: At, *, n_samples: int = 50, baseline: Any = None, random_seed: int = 0
) -> tuple[Arrays, None]:
    """The mean of (x - b) g(b + t (x - b)) over baselines b and t in [0, 1], drawn n times (Erion et al. 2021,
    arXiv:1906.10670; Captum's GradientShap with stdevs 0).

    The shape of the map. n passes. The baselines are an array [M, ...] of samples; a dict of them by tensor name.

    Raises:
        OnnxgbpError: no baselines.
    """
    if baseline is None:
        raise OnnxgbpError("expected-gradients needs baselines to draw from: give an array [M, ...] of samples")
    pool = [_samples(b, x, name) for b, x, name in zip(_each(baseline, at), at.x, at.names, strict=True)]
    if len({len(b) for b in pool}) > 1:
        raise OnnxgbpError(f"the baselines differ in number: {', '.join(str(len(b)) for b in pool)}")
    rng = np.random.default_rng(random_seed)
    drawn = [(rng.integers(len(pool[0])), rng.random()) for _ in range(n_samples)]
    points = ([_as(b[i] + t * (x - b[i]), x) for b, x in zip(pool, at.x, strict=True)] for i, t in drawn)
    weighed = (
        [_times(x - b[i], g) for b, x, g in zip(pool, at.x, maps, strict=True)]
        for (i, _), maps in zip(drawn, at.maps(points), strict=True)
    )
    return _mean(weighed), None


def _noisy(at: At, n_samples: int, stdevs: str | float, random_seed: int) -> Iterator[Arrays]:
    """The maps at the noisy points, last the one without noise."""
    rng = np.random.default_rng(random_seed)
    widths = [_width(x, stdevs) for x in at.x]

    def points() -> Iterator[Arrays]:
        for _ in range(n_samples - 1):
            yield [_as(x + s * rng.standard_normal(x.shape[1:]), x) for x, s in zip(at.x, widths, strict=True)]

    yield from at.maps(points())
    yield at.plain


def _width(x: Array, stdevs: str | float) -> Array:
    if not isinstance(stdevs, str):
        return np.asarray(stdevs)
    axes = tuple(range(1, x.ndim))
    return np.asarray(float(stdevs[:-1]) / 100 * (x.max(axis=axes, keepdims=True) - x.min(axis=axes, keepdims=True)))


def _sum(parts: Iterable[Arrays]) -> Arrays:
    """In float64, one part at a time."""
    total: Arrays = []
    for part in parts:
        wide = [np.asarray(a, np.float64) for a in part]
        total = [t + a for t, a in zip(total, wide, strict=True)] if total else wide
    return total


def _mean(parts: Iterable[Arrays]) -> Arrays:
    count = 0

    def counted() -> Iterator[Arrays]:
        nonlocal count
        for part in parts:
            count += 1
            yield part

    return [total / count for total in _sum(counted())]


def _as(point: Array, like: Array) -> Array:
    return point.astype(like.dtype, copy=False)


def _times(way: Array, g: Array) -> Array:
    """Way * g, where g may have an axis of K classes behind that of the samples."""
    return np.asarray((way[:, np.newaxis] if g.ndim > way.ndim else way) * np.asarray(g, np.float64))


def _each(baseline: Any, at: At) -> list[Any]:
    """The baseline of each tensor."""
    if not isinstance(baseline, Mapping):
        return [baseline] * len(at.x)
    if set(baseline) != set(at.names):
        raise OnnxgbpError(f"the baselines are for {', '.join(map(str, baseline))}, not for {', '.join(at.names)}")
    return [baseline[name] for name in at.names]


def _numbers(baseline: Any, x: Array, name: str) -> Array:
    try:
        return np.asarray(baseline).astype(x.dtype, casting="same_kind" if np.ndim(baseline) else "unsafe")
    except (TypeError, ValueError):
        raise OnnxgbpError(f"the baseline of '{name}' is neither a number nor an array of {x.dtype}") from None


def _broadcast(baseline: Any, x: Array, name: str) -> Array:
    array = _numbers(baseline, x, name)
    try:
        return np.broadcast_to(array, x.shape)
    except ValueError:
        raise OnnxgbpError(
            f"the baseline of '{name}' has shape {list(array.shape)}, the input {list(x.shape)}"
        ) from None


def _samples(baseline: Any, x: Array, name: str) -> Array:
    array = _numbers(baseline, x, name)
    if array.shape[1:] != x.shape[1:] or not array.size or array.ndim != x.ndim:
        shape = ", ".join(map(str, x.shape[1:]))
        raise OnnxgbpError(f"the baselines of '{name}' have shape {list(array.shape)}: give samples, [M, {shape}]")
    return array


# --- the options of methods that run at many points ---------------------------------------------------


def sampling_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method: those given that are not None, defaults for the others. {} for one in the graph.

    Raises:
        OnnxgbpError: an option that the method does not take, or that cannot be what is given.
    """
    sample = find_method(method).sample
    parameters = inspect.signature(sample).parameters.values() if sample is not None else ()
    taken = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    taken |= {"internal_batch_size": INTERNAL_BATCH_SIZE} if sample is not None else {}
    asked = {name: value for name, value in given.items() if value is not None}
    for name in asked:
        if name not in taken:
            takes = f"it takes {', '.join(taken)}" if taken else "it is one run of one graph"
            raise OnnxgbpError(f"{method} takes no {name}: {takes}")
    return taken | {name: _PARSED[name](value, name) for name, value in asked.items()}


def sampling_text(options: Mapping[str, Any]) -> dict[str, str]:
    """The options in words; an array by its shape."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name}: {text(inner)}" for name, inner in value.items())
        return f"an array {list(np.shape(value))}" if np.ndim(value) else str(value)

    return {name: text(value) for name, value in options.items() if value is not None}


def _whole(lowest: int) -> Callable[[Any, str], int]:
    def parse(value: Any, name: str) -> int:
        try:
            number = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = -1
        if number < lowest:
            raise OnnxgbpError(f"{name} is {value!r}, not a whole number of {lowest} or more")
        return number

    return parse


def _stdevs(value: Any, name: str) -> str | float:
    text = str(value).strip()
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[-+]?\d+)?(%?)", text)
    if number is None:
        raise OnnxgbpError(f"{name} is {value!r}: give a share of the input's range, such as 15%, or a number")
    return text if number[3] else float(text)


def _baseline(value: Any, _name: str) -> Any:
    """A number where it is one; only the call knows the shape that an array has to have."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_PARSED: dict[str, Callable[[Any, str], Any]] = {
    "n_samples": _whole(1),
    "n_steps": _whole(1),
    "random_seed": _whole(0),
    "internal_batch_size": _whole(1),
    "stdevs": _stdevs,
    "baseline": _baseline,
}


METHODS: dict[str, Method] = {
    "": Method(rule_map),
    "input-x-gradient": Method(input_x_gradient),
    "grad-cam": Method(grad_cam, inputs=False, layer=True),
    "guided-grad-cam": Method(guided_grad_cam, rule="guided", layer=True),
    "layer-activation-x-gradient": Method(layer_activation_x_gradient, inputs=False, layer=True),
    "smoothgrad": Method(rule_map, smoothgrad),
    "smoothgrad-squared": Method(rule_map, smoothgrad_squared),
    "vargrad": Method(rule_map, vargrad),
    "integrated-gradients": Method(rule_map, integrated_gradients, scored=True),
    "expected-gradients": Method(rule_map, expected_gradients),
}
