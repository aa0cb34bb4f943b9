"""The attribution rules: what an activation's backward step lets through; which node gets which; the audit of it.

With dy the gradient that arrives at an activation's output and dx = dy f'(x) the plain one that leaves:

| rule | lets through | source |
|---|---|---|
| gradient | dx | Simonyan et al. 2013, arXiv:1312.6034 |
| deconvnet | dy where dy > 0 | Zeiler & Fergus 2013, arXiv:1311.2901 |
| guided | dx where dy > 0 | Springenberg et al. 2014, arXiv:1412.6806 |

The rule acts per edge: on what arrives at the output of that node, never on the sum at a tensor that others read too.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import onnx_ir as ir

from onnxgbp.activations import ACTIVATIONS, NOT_MONOTONE, RELU_KINDS, Activation, backward
from onnxgbp.emit import Emit
from onnxgbp.errors import OnnxgbpError
from onnxgbp.lower import replace_calls
from onnxgbp.step import label

__all__ = ["RULES", "Choice", "Rule", "choose", "install", "parse_activations", "parse_rules"]

# (op, dy, step) -> what passes on, where step(dy) is dx = dy f'(x). f' is taken from x and y alone, so that
# step(relu(dy)) is dx where dy > 0 and 0 elsewhere; and a Relu fuses into the Conv before it.
Rule: TypeAlias = "Callable[[Emit, ir.Value, Callable[[ir.Value], ir.Value]], ir.Value]"

RULES: dict[str, Rule] = {
    "gradient": lambda _op, dy, step: step(dy),
    "deconvnet": lambda op, dy, _step: op.Relu(dy),
    "guided": lambda op, dy, step: step(op.Relu(dy)),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The rule that one activation got, and why: a row of the audit."""

    activation: Activation
    rule: str
    reason: str

    @property
    def name(self) -> str:
        return label(self.activation.node)

    @property
    def note(self) -> str:
        """Where the semantics go beyond what the papers define."""
        if self.rule == "guided" and self.activation.kind in NOT_MONOTONE:
            return "f' < 0 for some x: a positive gradient can leave negative"
        if self.rule != "gradient" and self.activation.kind not in RELU_KINDS:
            return "the papers define the rule for ReLU only; here it is applied to f' as it is"
        return ""


def parse_rules(method: str, rules: str | Iterable[str | tuple[str, str]]) -> list[tuple[str, str]]:
    """First-match list of (pattern, rule); `method` stands last, as '*=METHOD'.

    Raises:
        OnnxgbpError: no PATTERN=RULE, or no such rule.
    """
    parsed = []
    for rule in [rules] if isinstance(rules, str) else rules:
        pattern, separator, name = rule.rpartition("=") if isinstance(rule, str) else (rule[0], "=", rule[1])
        if not separator or not pattern:
            raise OnnxgbpError(f"'{rule}' is no rule: write PATTERN=RULE, for instance 'layer4*=guided'")
        parsed.append((pattern, name))
    parsed.append(("*", method))
    for _, name in parsed:
        if name not in RULES:
            raise OnnxgbpError(f"no rule is called '{name}': choose one of {', '.join(RULES)}")
    return parsed


def parse_activations(activations: str | Sequence[str]) -> frozenset[str]:
    """`all`, `relu` (ReLU and ReLU6 in any spelling), or names from the activation table.

    Raises:
        OnnxgbpError: no such activation.
    """
    names = activations.split(",") if isinstance(activations, str) else list(activations)
    known = {name.lower(): frozenset({name}) for name in ACTIVATIONS}
    known |= {"all": frozenset(ACTIVATIONS), "relu": RELU_KINDS}
    for name in names:
        if name.strip().lower() not in known:
            raise OnnxgbpError(
                f"no activation is called '{name}': choose all, relu, or some of {', '.join(ACTIVATIONS)}"
            )
    return frozenset().union(*(known[name.strip().lower()] for name in names))


def choose(
    found: Iterable[Activation], rules: Sequence[tuple[str, str]], activations: frozenset[str]
) -> dict[str, Choice]:
    """The rule of each activation, keyed by the name of its tensor y.

    Gates, and kinds that were not asked for, stay plain; for the others the first match wins.
    """
    choices = {}
    for activation in found:
        name = label(activation.node)
        pattern, rule = next((p, r) for p, r in rules if fnmatch.fnmatchcase(name, p))
        reason = f"matches '{pattern}'"
        if activation.gate is not None:
            rule, reason = "gradient", f"a gate: {activation.gate}"
        elif activation.kind not in activations:
            rule, reason = "gradient", "left out by --activations"
        choices[activation.y.name or ""] = Choice(activation, rule, reason)
    for pattern, _ in rules[:-1]:
        if choices and not any(fnmatch.fnmatchcase(choice.name, pattern) for choice in choices.values()):
            names = ", ".join(choice.name for choice in list(choices.values())[:5])
            raise OnnxgbpError(
                f"--rule pattern '{pattern}' matches no activation; the model's are called {names or '(none)'}..."
            )
    return choices


def install(op: Emit, choices: dict[str, Choice]) -> None:
    """Replaces each marked activation step by its rule; `choices` is keyed by the name of the tensor y."""

    def rewrite(op: Emit, node: ir.Node) -> ir.Value:
        x, y, dy, *tensors = (value for value in node.inputs if value is not None)
        marked: Activation = node.meta["activation"]
        given = iter(tensors)  # the call's own inputs: the graph may be a copy of the one that was differentiated
        arguments = {name: next(given) if isinstance(v, ir.Value) else v for name, v in marked.arguments.items()}
        activation = dataclasses.replace(marked, x=x, y=y, arguments=arguments)
        rule = RULES[choices[y.name or ""].rule]
        return rule(op, dy, lambda gradient: backward(op, activation, gradient))

    replace_calls(op, {"Activation": rewrite})
