"""What is made of a gradient: the methods beyond the rules, each over any rule. METHODS is the one table.

A method is written METHOD or METHOD:RULE (`smoothgrad:guided`, `smoothgrad:rectgrad:95`); the name of a rule alone is
the map of that rule. Some methods are a few more nodes in the graph and so go into a file (`graph_methods.py`). The
others run one graph at many points and belong to `Explainer` (`sampled_methods.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxgbp.errors import OnnxgbpError
from onnxgbp.graph_methods import (
    Write,
    grad_cam,
    guided_grad_cam,
    input_x_gradient,
    layer_activation_x_gradient,
    rule_map,
)
from onnxgbp.rules import RULES, listed, parse_rule
from onnxgbp.sampled_methods import (
    Sample,
    expected_gradients,
    integrated_gradients,
    smoothgrad,
    smoothgrad_squared,
    vargrad,
)

__all__ = [
    "METHODS",
    "Method",
    "find_method",
    "parse_method",
    "parse_methods",
    "refuse_sampled",
    "rule_of",
    "sampling_options",
    "sampling_text",
    "split_methods",
]

_INTERNAL_BATCH_SIZE = 8  # points in a run


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


def split_methods(methods: str | Sequence[str]) -> tuple[str, ...]:
    """Of 'gradient,guided', each once; whether there is such a method shows where it is used.

    Raises:
        OnnxgbpError: none, or one named twice.
    """
    names = tuple(name.strip() for name in (methods.split(",") if isinstance(methods, str) else methods))
    if not all(names) or len(set(names)) < len(names):
        raise OnnxgbpError(
            f"methods '{','.join(names)}' are no list of different methods: gradient,guided for instance"
        )
    return names


def refuse_sampled(methods: Sequence[str]) -> None:
    """Raises for a method that is no single graph."""
    for name in methods:
        if find_method(name).sample is not None:
            raise OnnxgbpError(
                f"{name} runs the model at many points, so it is no single graph: use onnxgbp explain or "
                f"onnxgbp.Explainer with it alone, or convert with --method {rule_of(name)}"
            )


# --- the options of methods that run at many points ---------------------------------------------------


def sampling_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method: those given that are not None, defaults for the others. {} for one in the graph.

    Raises:
        OnnxgbpError: an option that the method does not take, or that cannot be what is given.
    """
    sample = find_method(method).sample
    parameters = inspect.signature(sample).parameters.values() if sample is not None else ()
    taken = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    taken |= {"internal_batch_size": _INTERNAL_BATCH_SIZE} if sample is not None else {}
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
