"""The pipeline: load -> recognise -> differentiate -> install rules -> lower -> one plain ONNX model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from onnxgbp.activations import Activation
from onnxgbp.differentiate import differentiate, refuse_missing
from onnxgbp.emit import PRIVATE, Emit, dims_of
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError
from onnxgbp.external import copy_beside
from onnxgbp.lower import PROFILES, lower, prune
from onnxgbp.model import METADATA, ModelLike, Source, load, raised, to_proto
from onnxgbp.recognise import recognise
from onnxgbp.rules import Choice, choose, install, parse_activations, parse_rules
from onnxgbp.stream import is_large, stream
from onnxgbp.target import Explained, explained_tensor, make_seed, parse_target, parse_unit, stripped_text, wrt_tensors

__all__ = ["GradientGraph", "Rules", "convert", "describe"]

Rules = str | Iterable[str | tuple[str, str]]


def convert(
    model: ModelLike,
    *,
    method: str = "guided",
    target: str | int = "argmax",
    output: str | None = None,
    unit: str | int | Sequence[int] | None = None,
    wrt: str | Sequence[str] = (),
    rule: Rules = (),
    activations: str | Sequence[str] = "all",
    profile: str = "ort",
) -> onnx.ModelProto:
    """Turns a classifier into one plain ONNX model that gives the original outputs and the attribution.

    The result has the source's inputs (and `target`, int64 [N], -1 for argmax, or `seed`, the shape of the explained
    tensor, where those are asked for), the source's outputs first, then `attribution` (raw and signed, shape and type
    of the explained input; `attribution_<name>` each for several), then `attribution_target` (int64 [N]).

    Args:
        model: a path, or a `ModelProto`.
        method: the rule at every activation: gradient, deconvnet or guided; formulas and papers stand in `rules.py`.
        target: what is explained for each sample: argmax, a class index, or input / seed to feed it at run time.
        output: the tensor to explain; by default the scores before a last softmax or sigmoid.
        unit: for an inner tensor, the index behind the batch axis: a channel, or a channel and a position.
        wrt: the tensors to attribute to; by default every float input.
        rule: (pattern, rule) pairs or 'PATTERN=RULE' strings; the first whose pattern matches a node's name wins
            over `method`.
        activations: all, relu, or names: which activations get the rule, the others stay plain.
        profile: ort spells the gradient for ONNX Runtime's speed, portable for every runtime.

    Raises:
        OnnxgbpError: the model or an option cannot be used; the message names what, where, and the way out.
    """
    graph = GradientGraph.build(load(model), target=target, output=output, unit=unit, wrt=wrt)
    return graph.render(method=method, rule=rule, activations=activations, profile=profile)


@dataclasses.dataclass(frozen=True)
class GradientGraph:
    """A model with its gradient, differentiated once, its activation steps still open for any rule."""

    source: Source
    model: ir.Model
    found: tuple[Activation, ...]  # the activations that the gradient passes, in forward order
    explained: Explained
    options: dict[str, str]  # what the metadata will say of them
    arguments: dict[str, Any]  # as they were given

    @classmethod
    def build(
        cls,
        source: Source,
        *,
        target: str | int = "argmax",
        output: str | None = None,
        unit: str | int | Sequence[int] | None = None,
        wrt: str | Sequence[str] = (),
    ) -> GradientGraph:
        """Differentiates a model. The arguments are those of `convert`."""
        if METADATA + "method" in source.model.metadata_props:
            raise OnnxgbpError(f"{source.name} is already a converted file; convert the model that it was made from")
        names = [wrt] if isinstance(wrt, str) else list(wrt)
        arguments: dict[str, Any] = {
            "target": parse_target(target),
            "output": output,
            "unit": parse_unit(unit),
            "wrt": names,
        }
        try:
            return cls._build(source, arguments)
        except OpsetTooLowError as error:
            return cls.build(raised(source, error.opset), **arguments)

    @classmethod
    def _build(cls, source: Source, arguments: dict[str, Any]) -> GradientGraph:
        target, unit = arguments["target"], arguments["unit"]
        model = source.model.clone()
        graph = model.graph
        for node in graph:
            node.meta["forward"] = True
        inputs = wrt_tensors(graph, arguments["wrt"])
        explained = explained_tensor(graph, inputs, arguments["output"])
        found = recognise(graph)
        refuse_missing(graph, explained.tensor, inputs, found)  # first: behind an unknown operator no shape is known
        op = Emit(graph)
        seed = make_seed(op, explained, target, unit)
        gradients = differentiate(op, explained.tensor, seed.seed, inputs, found)
        nodes = op.take()
        graph.extend(nodes)
        results = {f"attribution_{value.name}" if len(inputs) > 1 else "attribution": value for value in inputs}
        for name, value in results.items():
            _output(op, name, gradients[value], value.meta.get("declared", (None, value.shape))[1])
        batch = (dims_of(explained.tensor) or (1,))[:1]
        _output(op, "attribution_target", seed.target, ir.Shape([dim if _named(dim) else None for dim in batch]))
        marked = [
            node.meta["activation"]
            for node in graph.all_nodes()
            if node.op_type == "Activation" and node.domain == PRIVATE
        ]
        options = {
            "target": str(target),
            "explained": explained.tensor.name or "",
            "wrt": json.dumps([value.name for value in inputs]),
        }
        if unit is not None:
            options["unit"] = ",".join(map(str, unit))
        if explained.stripped:
            options["stripped"] = stripped_text(explained)
        order = [activation for activation in found.values() if activation in marked]
        order += [activation for activation in marked if activation.node not in found]  # in the bodies of control flow
        return cls(source, model, tuple(order), explained, options, arguments)

    def choices(
        self, *, method: str = "guided", rule: Rules = (), activations: str | Sequence[str] = "all"
    ) -> dict[str, Choice]:
        """The rule of every activation, keyed by the name of its output: the audit."""
        return choose(self.found, parse_rules(method, rule), parse_activations(activations))

    def render(
        self,
        *,
        method: str = "guided",
        rule: Rules = (),
        activations: str | Sequence[str] = "all",
        profile: str = "ort",
    ) -> onnx.ModelProto:
        """The finished model under one choice of rules. The arguments are those of `convert`."""
        return to_proto(
            self._finished(method, [rule] if isinstance(rule, str) else list(rule), activations, profile), self.source
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        method: str = "guided",
        rule: Rules = (),
        activations: str | Sequence[str] = "all",
        profile: str = "ort",
    ) -> str:
        """Writes what `render` gives, the same bytes, without a second copy of the weights in memory.

        Returns:
            One line on what the file explains.
        """
        model = self._finished(method, [rule] if isinstance(rule, str) else list(rule), activations, profile)
        initializers = model.graph.initializers
        if self.source.path is not None and Path(path).exists() and Path(path).samefile(self.source.path):
            raise OnnxgbpError(f"cannot write {path}: it is the model itself; choose another name")
        large = [value for value in initializers.values() if is_large(value.const_value)]
        for value in large:
            del initializers[value.name or ""]
        skeleton = to_proto(model, self.source)
        copy_beside(skeleton, Path(path), self.source.path.parent if self.source.path else None)
        stream(skeleton, large, Path(path))
        choices = self.choices(method=method, rule=rule, activations=activations).values()
        plain = sum(choice.rule == "gradient" for choice in choices)
        return f"{describe(skeleton)}; {len(choices)} activations, {plain} of them plain"

    def _finished(
        self, method: str, rules: list[str | tuple[str, str]], activations: str | Sequence[str], profile: str
    ) -> ir.Model:
        if profile not in PROFILES:
            raise OnnxgbpError(f"no profile is called '{profile}': choose one of {', '.join(PROFILES)}")
        choices = self.choices(method=method, rule=rules, activations=activations)
        model = self.model.clone()
        op = Emit(model.graph)
        try:
            install(op, choices)
            lower(op, profile)
        except OpsetTooLowError as error:
            again = GradientGraph.build(raised(self.source, error.opset), **self.arguments)
            return again._finished(method, rules, activations, profile)
        prune(model.graph)
        _join_outputs(model.graph)
        _plain(model.graph)
        _large_last(model.graph)
        options = self.options | {
            "activations": activations if isinstance(activations, str) else ",".join(activations),
            "method": method,
            "profile": profile,
            "rules": json.dumps([f"{pattern}={name}" for pattern, name in parse_rules(method, rules)]),
            "sha256": self.source.sha256,
            "version": importlib.metadata.version("onnxgbp"),
        }
        model.metadata_props.update({METADATA + name: value for name, value in sorted(options.items())})
        return model


def describe(converted: onnx.ModelProto) -> str:
    """One line on what a converted file explains, from its own metadata."""
    said = {entry.key.removeprefix(METADATA): entry.value for entry in converted.metadata_props}
    wrt = ", ".join(f"'{name}'" for name in json.loads(said["wrt"]))
    unit = f"unit {said['unit']}" if "unit" in said else f"target {said['target']}"
    behind = f", {said['stripped']}" if "stripped" in said else ""
    others = [rule for rule in json.loads(said["rules"]) if rule != f"*={said['method']}"]
    mixed = f", with {', '.join(others)}," if others else ""
    return f"{said['method']}{mixed} of '{said['explained']}' ({unit}) with respect to {wrt}{behind}"


def _large_last(graph: ir.Graph) -> None:
    """Orders the weights as `save` streams them, so that both ways of writing give the same bytes."""
    for name, value in [item for item in graph.initializers.items() if is_large(item[1].const_value)]:
        del graph.initializers[name]
        graph.initializers[name] = value


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


def _join_outputs(graph: ir.Graph) -> None:
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


def _plain(graph: ir.Graph) -> None:
    """What the source said of its inputs and outputs stands again. Inner tensors go unsaid: any reader infers them."""
    assert not any(node.domain == PRIVATE for node in graph), "a private call survived lowering"
    ends = {*graph.inputs, *graph.outputs}
    for value in (*graph.initializers.values(), *(v for node in graph for v in node.outputs)):
        if value not in ends:
            value.type = value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        if "declared" in value.meta:
            value.type, value.shape = value.meta["declared"]
