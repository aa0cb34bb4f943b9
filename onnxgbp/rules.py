"""The attribution rules: what an activation's backward step lets through; which node gets which; the audit of it.

With dy the gradient that arrives at an activation's output and dx = dy f'(x) the plain one that leaves:

| rule | lets through | source |
|---|---|---|
| gradient | dx | Simonyan et al. 2013, arXiv:1312.6034 |
| deconvnet | dy where dy > 0 | Zeiler & Fergus 2013, arXiv:1311.2901 |
| guided | dx where dy > 0 | Springenberg et al. 2014, arXiv:1412.6806 |
| as-relu | as guided, but dy where x > 0 and dy > 0 for what is like a ReLU | a habit with LeakyReLU and ELU |
| rectgrad:Q | dx where y dy exceeds its Q-th percentile in the sample (98) | Kim et al. 2019, arXiv:1902.04893 |

The rule acts per edge: on what arrives at the output of that node, never on the sum at a tensor that others read too.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS, NOT_MONOTONE, RELU_KINDS, RELU_LIKE, Activation, backward
from onnxgbp.branches import captured
from onnxgbp.emit import Emit, dims_of, numel
from onnxgbp.errors import OnnxgbpError
from onnxgbp.lower import replace_calls
from onnxgbp.step import label

__all__ = [
    "RULES",
    "Choice",
    "Edge",
    "Measure",
    "Rule",
    "Rules",
    "audit",
    "choose",
    "depths",
    "install",
    "listed",
    "parse_activations",
    "parse_rule",
    "parse_rules",
]

Rules: TypeAlias = "str | Iterable[str | tuple[str, str]]"
"""What `parse_rules` takes."""


@dataclasses.dataclass(frozen=True)
class Edge:
    """One activation y = f(x) as a rule meets it, with dy, the gradient that arrives at y by this edge alone.

    op writes nodes: op.Mul(a, b). f' is taken from x and y alone: step(relu(dy)) is dx where dy > 0 and 0 elsewhere.
    """

    op: Emit
    activation: Activation
    dy: ir.Value

    @property
    def x(self) -> ir.Value:
        return self.activation.x

    @property
    def y(self) -> ir.Value:
        return self.activation.y

    @property
    def kind(self) -> str:
        """The activation's name in ACTIVATIONS."""
        return self.activation.kind

    def step(self, dy: ir.Value) -> ir.Value:
        """Dx = dy f'(x), for this dy or another of its shape."""
        return backward(self.op, self.activation, dy)


# (edge, *numbers) -> what passes on, of x's shape and type. The numbers, which have to have defaults, are what stands
# behind the rule's name: rectgrad:95. Callers may add rules of their own.
Rule: TypeAlias = Callable[..., ir.Value]


def _as_relu(edge: Edge) -> ir.Value:
    op = edge.op
    if edge.kind not in RELU_LIKE:
        return edge.step(op.Relu(edge.dy))
    return op.Where(op.Greater(edge.x, 0), op.Relu(edge.dy), op.like(0, edge.dy))


def _rectgrad(edge: Edge, percentile: float = 98.0) -> ir.Value:
    """The threshold is the percentile of y dy over the sample, numpy's definition: nothing lies between two ranks."""
    op = edge.op
    if not 0 <= percentile < 100:
        raise OnnxgbpError(f"rectgrad:{percentile:g} is no percentile: give 0 or more, and less than 100")
    dims = dims_of(edge.y) or ()
    rows: list[int] = [0, -1] if len(dims) > 1 else [1, -1]
    weights = op.Reshape(op.Mul(edge.y, edge.dy), rows)
    count = numel(dims[1:] if len(dims) > 1 else dims)
    if count is not None:
        kept = op.int64([count - math.floor((count - 1) * percentile / 100)])
    else:
        size = op.Gather(op.Shape(weights), [1], axis=0)
        rank = op.Mul(op.Cast(op.Sub(size, [1]), to=int(ir.DataType.DOUBLE)), percentile / 100)
        kept = op.Sub(size, op.Cast(op.Floor(rank), to=int(ir.DataType.INT64)))
    largest, places = op.several(2, "TopK", weights, K=kept, axis=1)
    places.type = ir.TensorType(ir.DataType.INT64)
    above = op.Greater(weights, op.ReduceMin(largest, axes=[1]))
    passed = op.Where(above, op.Reshape(edge.step(edge.dy), rows), op.like(0, edge.dy))
    return op.reshape_like(passed, edge.x)


RULES: dict[str, Rule] = {
    "gradient": lambda edge: edge.step(edge.dy),
    "deconvnet": lambda edge: edge.op.Relu(edge.dy),
    "guided": lambda edge: edge.step(edge.op.Relu(edge.dy)),
    "as-relu": _as_relu,
    "rectgrad": _rectgrad,
}
_OURS = frozenset(RULES)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The rule that one activation got, and why: a row of the audit.

    depth: how many activations lie on the longest way from the inputs to it, itself counted.
    """

    activation: Activation
    rule: str
    reason: str
    depth: int

    @property
    def name(self) -> str:
        return label(self.activation.node)

    @property
    def note(self) -> str:
        """Where the semantics go beyond what the papers define."""
        kind, rule = self.activation.kind, self.rule.partition(":")[0]
        if rule == "gradient":
            return ""
        if rule not in _OURS:
            return "a rule of the caller's"
        if rule == "as-relu" and kind in RELU_LIKE:
            return "treated as a ReLU in the backward step: its own slope is hidden"
        if rule != "deconvnet" and kind in NOT_MONOTONE:
            return "f' < 0 for some x: a positive gradient can leave negative"
        if kind not in RELU_KINDS:
            return "the papers define the rule for ReLU only; here it is applied to f' as it is"
        return ""


def audit(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """The audit as plain values: one row per activation node, in forward order."""
    return [
        {
            "node": choice.name,
            "inside": choice.activation.node.meta.get("inside"),  # the If, Loop or Scan in whose body it stands
            "kind": choice.activation.kind,
            "spelled": choice.activation.spelled,
            "input": choice.activation.x.name,
            "output": choice.activation.y.name,
            "depth": choice.depth,
            "rule": choice.rule,
            "reason": choice.reason,
            "gate": choice.activation.gate,
            "note": choice.note,
        }
        for choice in {choice.name: choice for choice in choices}.values()  # a body that is run twice is one node
    ]


def listed(value: Any, option: str) -> list[Any]:
    """What an option holds that takes one or several: text is one, anything that can be walked over several.

    Raises:
        OnnxgbpError: something else.
    """
    try:
        return [value] if isinstance(value, str) else list(value)
    except TypeError:
        raise OnnxgbpError(f"{option} {value!r} is neither a text nor a list of them") from None


def parse_rule(rule: str) -> str:
    """The name of a rule, with its numbers if it has any: guided, rectgrad:95.

    Raises:
        OnnxgbpError: no such rule.
    """
    name = rule.strip() if isinstance(rule, str) else rule
    _find(name)
    return name


def parse_rules(last: str, rules: Rules) -> list[tuple[str, str]]:
    """First-match list of (pattern, rule), of which ('*', last) is the last.

    A pattern is a glob over the names of nodes, or `type:GLOB` over operators and kinds of activations, or `depth:<5`
    (also <=, >, >=, =; negative numbers count from the deepest, which is -1).

    Raises:
        OnnxgbpError: no PATTERN=RULE, or no such rule.
    """
    parsed = []
    for rule in listed(rules, "rule"):
        pair = isinstance(rule, (tuple, list)) and len(rule) == 2 and all(isinstance(part, str) for part in rule)
        pattern, separator, name = (rule[0], "=", rule[1]) if pair else str(rule).rpartition("=")
        if not separator or not pattern:
            raise OnnxgbpError(f"'{rule}' is no rule: write PATTERN=RULE, for instance 'layer4*=guided'")
        if pattern.startswith("depth:") and not _DEPTH.fullmatch(pattern):
            raise OnnxgbpError(f"'{pattern}' is no depth: write depth:<5 or, for the last three, depth:>=-3")
        parsed.append((pattern, name))
    parsed.append(("*", last))
    for _, name in parsed:
        _find(name)
    return parsed


def _find(text: str) -> tuple[Rule, list[float]]:
    """The rule and its numbers, of 'guided' or 'rectgrad:95'."""
    name, *numbers = str(text).split(":") if text else [""]
    if name not in RULES:
        raise OnnxgbpError(f"no rule is called '{text}': choose one of {', '.join(RULES)}")
    try:
        values = [float(number) for number in numbers]
        inspect.signature(RULES[name]).bind(None, *values)
    except (ValueError, TypeError):
        raise OnnxgbpError(f"'{text}': the rule {name} does not take {':'.join(numbers) or 'no number'}") from None
    return RULES[name], values


def parse_activations(activations: str | Sequence[str]) -> frozenset[str]:
    """`all`, `relu` (ReLU and ReLU6 in any spelling), or names from the activation table.

    Raises:
        OnnxgbpError: no such activation.
    """
    names = activations.split(",") if isinstance(activations, str) else listed(activations, "activations")
    known = {name.lower(): frozenset({name}) for name in ACTIVATIONS}
    known |= {"all": frozenset(ACTIVATIONS), "relu": RELU_KINDS}
    for name in names:
        if str(name).strip().lower() not in known:
            raise OnnxgbpError(
                f"no activation is called '{name}': choose all, relu, or some of {', '.join(ACTIVATIONS)}"
            )
    return frozenset().union(*(known[name.strip().lower()] for name in names))


def depths(graph: ir.Graph, found: Iterable[Activation]) -> dict[str, int]:
    """How many activations lie on the longest way to each, itself counted, by the name of its tensor y; no gates."""
    made = {activation.y: activation for activation in found}
    level: dict[ir.Value, int] = {}
    result: dict[str, int] = {}

    def visit(scope: ir.Graph, base: int) -> None:
        for node in scope:
            read = [value for value in (*node.inputs, *captured(node)) if value is not None]
            reached = max((level.get(value, base) for value in read), default=base)
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    visit(attribute.as_graph(), reached)
            for value in node.outputs:
                level[value] = reached
                if value in made:
                    activation = made[value]
                    result[value.name or ""] = level.get(activation.x, base) + 1
                    level[value] = level.get(activation.x, base) + (activation.gate is None)

    visit(graph, 0)
    return result


_DEPTH = re.compile(r"depth:(<=|>=|<|>|=|)(-?\d+)")
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "<": int.__lt__,
    "<=": int.__le__,
    ">": int.__gt__,
    ">=": int.__ge__,
    "=": int.__eq__,
    "": int.__eq__,
}


def _matches(pattern: str, activation: Activation, depth: int, deepest: int) -> bool:
    if depth_pattern := _DEPTH.fullmatch(pattern):
        number = int(depth_pattern[2])
        return _COMPARED[depth_pattern[1]](depth, number if number >= 0 else deepest + 1 + number)
    if pattern.startswith("type:"):
        types = {activation.kind, activation.node.op_type}
        return any(fnmatch.fnmatchcase(name, pattern.removeprefix("type:")) for name in types)
    return fnmatch.fnmatchcase(label(activation.node), pattern)


def choose(
    found: Sequence[Activation],
    rules: Sequence[tuple[str, str]],
    activations: frozenset[str],
    depth: Mapping[str, int],
) -> dict[str, Choice]:
    """The rule of each activation, keyed by the name of its tensor y.

    Gates, and kinds that were not asked for, stay plain; for the others the first match wins.

    Raises:
        OnnxgbpError: a pattern that matches none of them.
    """
    choices, deepest, used = {}, max(depth.values(), default=0), set[str]()
    for activation in found:
        y = activation.y.name or ""
        matching = [(p, r) for p, r in rules if _matches(p, activation, depth[y], deepest)]
        used.update(p for p, _ in matching)
        pattern, rule = matching[0]
        reason = f"matches '{pattern}'"
        if activation.gate is not None:
            rule, reason = "gradient", f"a gate: {activation.gate}"
        elif activation.kind not in activations:
            rule, reason = "gradient", "left out by --activations"
        choices[y] = Choice(activation, rule, reason, depth[y])
    for pattern, _ in rules[:-1]:
        if choices and pattern not in used:
            names = ", ".join(choice.name for choice in list(choices.values())[:5])
            kinds = ", ".join(sorted({activation.kind for activation in found}))
            raise OnnxgbpError(
                f"--rule pattern '{pattern}' matches no activation; the model's are called {names}..., "
                f"of type {kinds}, at depth 1 to {deepest}"
            )
    return choices


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a model gives in the place of its own outputs and its maps: small tensors, by the name of their output.

    activation: writes them for each activation of the main graph and what its rule lets through; attribution: for each
    map, the gradient of a tensor that is attributed to.
    """

    activation: Callable[[Edge, ir.Value], Mapping[str, ir.Value]]
    attribution: Callable[[Emit, ir.Value], Mapping[str, ir.Value]] | None = None


def install(
    op: Emit, choices: Sequence[Mapping[str, Choice]], *, measure: Measure | None = None
) -> dict[str, ir.Value]:
    """Replaces each marked activation step by its rule.

    Args:
        op: writes to the graph that holds the marked calls.
        choices: for each sweep through the graph, by the name of the tensor y.
        measure: what is written besides, of the first sweep.

    Returns:
        What is measured at the activations, by the name that it shall have as an output.
    """
    measured: dict[str, ir.Value] = {}

    def rewrite(op: Emit, node: ir.Node) -> ir.Value:
        x, y, dy, *tensors = (value for value in node.inputs if value is not None)
        marked: Activation = node.meta["activation"]
        given = iter(tensors)  # the call's own inputs: the graph may be a copy of the one that was differentiated
        arguments = {name: next(given) if isinstance(v, ir.Value) else v for name, v in marked.arguments.items()}
        activation = dataclasses.replace(marked, x=x, y=y, arguments=arguments)
        rule, numbers = _find(choices[node.meta["sweep"]][y.name or ""].rule)
        edge = Edge(op, activation, dy)
        passed = rule(edge, *numbers)
        if measure is not None and node.graph is op.graph and not node.meta["sweep"]:
            measured.update(measure.activation(edge, passed))
        return passed

    replace_calls(op, {"Activation": rewrite})
    return measured
