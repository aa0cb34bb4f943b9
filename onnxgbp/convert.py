"""The pipeline: load -> recognise -> differentiate -> install rules -> lower -> one plain ONNX model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from onnxgbp import training
from onnxgbp.activations import Activation
from onnxgbp.differentiate import differentiate, refuse_missing
from onnxgbp.emit import PRIVATE, Emit
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError
from onnxgbp.explained import Explained, explained_tensor
from onnxgbp.external import copy_beside
from onnxgbp.graph_methods import Sweeps, find_layer
from onnxgbp.inputs import attributed, integer_ranges
from onnxgbp.labels import labels_of
from onnxgbp.lower import PROFILES, lower, merge_equal, prune
from onnxgbp.metadata import already_converted, audited, describe, first_matches, place_options
from onnxgbp.methods import METHODS, Method, find_method, parse_methods, refuse_sampled, rule_of
from onnxgbp.model import METADATA, ModelLike, Source, load, raised, to_proto
from onnxgbp.recognise import recognise
from onnxgbp.results import add_results, declare_as_source, join_outputs, name_sweeps, result_names, stacked
from onnxgbp.rules import Choice, Measure, Rules, choose, depths, install, listed, parse_activations, parse_rules
from onnxgbp.scale import computes_in_float16, parse_seed_scale, scaled
from onnxgbp.seed import make_seed, parse_seed
from onnxgbp.stream import is_large, large_last, stream
from onnxgbp.target import classes_of, parse_target, parse_unit, resolve_target
from onnxgbp.views import View, add_views

_NO_VIEW = View()

__all__ = ["BUILDERS", "GradientGraph", "convert", "fixed_scale"]

# What writes the gradient of the explained tensor.
BUILDERS = {"onnxgbp": differentiate, training.NAME: training.differentiate_by_training}


def convert(
    model: ModelLike,
    *,
    method: str = "guided",
    methods: str | Sequence[str] = (),
    target: str | int = "argmax",
    output: str | None = None,
    unit: Any = None,
    seed: str = "one",
    wrt: str | Sequence[str] = (),
    layer: str | None = None,
    rule: Rules = (),
    activations: str | Sequence[str] = "all",
    profile: str = "ort",
    view: str = "signed",
    reduce: str = "none",
    heatmap: bool = False,
    seed_scale: float | str = 1.0,
    builder: str = "onnxgbp",
) -> onnx.ModelProto:
    """Turns a classifier into one plain ONNX model that gives the original outputs and the attribution.

    The result has the source's inputs (and `target`, int64 [N], -1 for argmax, or `seed`, the shape of the explained
    tensor, where those are asked for), the source's outputs first, then `attribution` (raw and signed, shape and type
    of what is attributed to; `attribution_<name>` each for several), then `attribution_target` (int64 [N]).
    With K classes a sample, attributions are [N, K, ...] and `attribution_target` is [N, K]. With several methods there
    is an `attribution_<method>` for each, over one forward pass. The shape of what is more than the map of a rule
    stands in `graph_methods.py`: that of grad-cam is [N, 1, H, W].

    Args:
        model: a path, or a `ModelProto`.
        method: the rule at every activation: gradient, deconvnet, guided, as-relu or rectgrad; or what is made of its
            map, METHOD or METHOD:RULE: input-x-gradient, grad-cam, guided-grad-cam or layer-activation-x-gradient.
            Formulas and papers stand in `rules.py` and `graph_methods.py`.
        methods: several of them, one attribution each, instead of `method`.
        target: what is explained for each sample: argmax, topK (such as top5), a class by its index or, where the
            metadata has labels, by its name; or input, inputK, seed to feed it when the model runs.
        output: the tensor to explain, or the node that makes it; by default the scores before a last softmax or
            sigmoid.
        unit: of an inner tensor, the place behind the batch axis: a channel, a channel and a position, a slice (its
            sum), or max for the strongest unit: 3, '3,7,7', '3:6', '3,max'.
        seed: one, or activation: the value at the target itself, as deconvnet's authors project a feature map.
        wrt: the tensors to attribute to; by default every float input, or, where the model has none, what is looked
            up for token ids and the floats of a uint8 picture: see `inputs.py`.
        layer: the feature map of the methods that have one, a tensor or the node that makes it; by default the last
            before its spatial axes are pooled or flattened.
        rule: (pattern, rule) pairs or 'PATTERN=RULE' strings; the first pattern that matches wins over `method`: a glob
            over node names, `type:` and a glob over operators, or `depth:<5`.
        activations: all, relu, or names: which activations get the rule, the others stay plain.
        profile: ort spells the gradient for ONNX Runtime's speed, portable for every runtime.
        view, reduce, heatmap: further outputs `<attribution>_view` and `<attribution>_heatmap`, see `views.View`.
        seed_scale: a power of two that the seed, and with it the whole of `attribution`, is multiplied by, so that a
            float16 map keeps within its range; `auto` tries the model on random inputs (with ONNX Runtime) and is 1
            for any other type. `input` makes it the last input, a scalar of the explained tensor's type.
        builder: what differentiates: onnxgbp, or ort-training for a second opinion by that package, see `training.py`.

    Raises:
        OnnxgbpError: the model or an option cannot be used; the message names what, where, and the way out.
    """
    names = parse_methods(method, methods)
    source = load(model)
    place: dict[str, Any] = {
        "target": target,
        "output": output,
        "unit": unit,
        "seed": seed,
        "wrt": wrt,
        "layer": layer,
        "methods": names,
        "builder": builder,
    }
    look: dict[str, Any] = {"method": method, "methods": methods, "rule": rule, "activations": activations}
    look |= {"profile": profile, "view": view, "reduce": reduce, "heatmap": heatmap}
    scale = fixed_scale(source, seed_scale, place, look)
    return GradientGraph.build(source, **place, seed_scale=scale).render(**look)


def fixed_scale(source: Source, seed_scale: Any, place: Mapping[str, Any], look: Mapping[str, Any]) -> Any:
    """What `auto` is for this model under the options of `GradientGraph.build` and `render`; others as they are."""
    if not isinstance(seed_scale, str) or seed_scale != "auto":
        return seed_scale
    if not computes_in_float16(source.model.graph):
        return 1.0
    from onnxgbp.trial import fitting_exponent  # onnxruntime: only here

    made = GradientGraph.build(source, **place, seed_scale="input").render(**look)
    return 2.0 ** fitting_exponent(made, integer_ranges(source.model.graph))


@dataclasses.dataclass(frozen=True)
class GradientGraph:
    """A model with its gradient, differentiated once, its activation steps still open for any rule.

    `kinds` are the methods of one rendering, side by side, without their rules; a rendering with others differentiates
    anew.
    """

    source: Source
    model: ir.Model
    found: tuple[Activation, ...]  # the activations that a gradient passes, in forward order
    passed: tuple[frozenset[str], ...]  # those of each sweep, by the name of their tensor y
    depths: dict[str, int]  # by the name of their tensor y
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
        unit: Any = None,
        seed: str = "one",
        wrt: str | Sequence[str] = (),
        layer: str | None = None,
        methods: str | Sequence[str] = ("gradient",),
        seed_scale: float | str = 1.0,
        builder: str = "onnxgbp",
    ) -> GradientGraph:
        """Differentiates a model. The arguments are those of `convert`; a seed_scale of `auto` is for `fixed_scale`.

        Of the methods it counts here only what they make of a map, not their rules.
        """
        if METADATA + "method" in source.model.metadata_props:
            raise OnnxgbpError(already_converted(source))
        names, kinds = listed(wrt, "wrt"), parse_methods("gradient", methods)
        refuse_sampled(kinds)
        for option, name in [("output", output), ("layer", layer), *(("wrt", name) for name in names)]:
            if name is not None and not isinstance(name, str):
                raise OnnxgbpError(f"{option} {name!r} is no name of a tensor")
        arguments: dict[str, Any] = {
            "target": parse_target(target),
            "output": output,
            "unit": parse_unit(unit),
            "seed": parse_seed(seed),
            "wrt": names,
            "layer": layer,
            "methods": kinds,
            "builder": builder,
            "seed_scale": seed_scale if seed_scale == "input" else parse_seed_scale(seed_scale),
        }
        if builder not in BUILDERS:
            raise OnnxgbpError(f"no builder is called '{builder}': choose one of {', '.join(BUILDERS)}")
        try:
            return cls._build(source, arguments)
        except OpsetTooLowError as error:
            return cls.build(raised(source, error.opset), **arguments)

    @classmethod
    def _build(cls, source: Source, arguments: dict[str, Any]) -> GradientGraph:
        target = resolve_target(arguments["target"], labels_of(source.model.metadata_props))
        model = source.model.clone()
        graph = model.graph
        for node in graph:
            node.meta["forward"] = True
        chosen = attributed(graph, arguments["wrt"], arguments["output"])
        inputs = chosen.tensors
        explained = explained_tensor(graph, inputs, arguments["output"])
        found = recognise(graph)
        refuse_missing(graph, explained.tensor, inputs, found)  # first: behind an unknown operator no shape is known
        op = Emit(graph)
        seed = make_seed(op, explained, target, arguments["unit"], arguments["seed"])
        seeds = scaled(op, seed.seeds, arguments["seed_scale"])
        layer = _layer(graph, explained, inputs, found, arguments)

        def sweep(number: int, seed: ir.Value) -> Callable[[Sequence[ir.Value]], list[ir.Value]]:
            def gradients(tensors: Sequence[ir.Value]) -> list[ir.Value]:
                op.sweep = number
                swept = BUILDERS[arguments["builder"]](op, explained.tensor, seed, tensors, found)
                op.scope = "method"
                return [swept[value] for value in tensors]

            return gradients

        results, methods = [], arguments["methods"]
        for number, method in enumerate(methods):
            write = find_method(method).write
            each = []
            for one, unscaled in zip(seeds, seed.seeds, strict=True):
                own, plain = sweep(number, one), sweep(len(methods), unscaled)  # the last of the sweeps stays plain
                each.append(write(Sweeps(op, inputs, layer, source.model.metadata_props, own, plain)))
            results.append([(stacked(op, maps, seed), maps[0].shape) for maps in zip(*each, strict=True)])
        add_results(op, inputs, results, explained.tensor, seed)
        marks = [node for node in graph.all_nodes() if node.op_type == "Activation" and node.domain == PRIVATE]
        marked = [node.meta["activation"] for node in marks]
        passed = [
            frozenset(node.meta["activation"].y.name or "" for node in marks if node.meta["sweep"] == number)
            for number in range(len(methods))
        ]
        options = place_options(arguments | {"target": target}, explained, inputs, layer, chosen.note)
        order = [activation for activation in found.values() if activation in marked]
        order += [activation for activation in marked if activation.node not in found]  # in the bodies of control flow
        return cls(source, model, tuple(order), tuple(passed), depths(graph, order), explained, options, arguments)

    @property
    def kinds(self) -> list[Method]:
        return [find_method(method) for method in self.arguments["methods"]]

    @property
    def seed_classes(self) -> int | None:
        """K, where K classes of each sample are explained."""
        return classes_of(self.options["target"])

    def choices(
        self, *, method: str = "guided", rule: Rules = (), activations: str | Sequence[str] = "all"
    ) -> dict[str, Choice]:
        """The rule of every activation, keyed by the name of its output: the audit."""
        return choose(self.found, parse_rules(rule_of(method), rule), parse_activations(activations), self.depths)

    def render(
        self,
        *,
        method: str = "guided",
        methods: str | Sequence[str] = (),
        rule: Rules = (),
        activations: str | Sequence[str] = "all",
        profile: str = "ort",
        view: str = "signed",
        reduce: str = "none",
        heatmap: bool = False,
    ) -> onnx.ModelProto:
        """The finished model under one choice of rules. The arguments are those of `convert`."""
        names, shown = parse_methods(method, methods), View(view, reduce, heatmap)
        return to_proto(self._finished(names, rule, activations, profile, shown), self.source)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        method: str = "guided",
        methods: str | Sequence[str] = (),
        rule: Rules = (),
        activations: str | Sequence[str] = "all",
        profile: str = "ort",
        view: str = "signed",
        reduce: str = "none",
        heatmap: bool = False,
    ) -> str:
        """Writes what `render` gives, the same bytes, without a second copy of the weights in memory.

        Returns:
            One line on what the file explains.
        """
        names, shown = parse_methods(method, methods), View(view, reduce, heatmap)
        model = self._finished(names, rule, activations, profile, shown)
        initializers = model.graph.initializers
        if self.source.path is not None and Path(path).exists() and Path(path).samefile(self.source.path):
            raise OnnxgbpError(f"cannot write {path}: it is the model itself; choose another name")
        large = [value for value in initializers.values() if is_large(value.const_value)]
        for value in large:
            del initializers[value.name or ""]
        skeleton = to_proto(model, self.source)
        copy_beside(skeleton, Path(path), self.source.path.parent if self.source.path else None)
        stream(skeleton, large, Path(path))
        rows = json.loads(model.metadata_props[METADATA + "audit"])
        plain = sum(row["rule"] == "gradient" for row in rows)
        counted = f"{len(rows)} activations, {plain} of them plain" if "method" not in (rows or [{}])[0] else "audited"
        return f"{describe(skeleton)}; {counted}"

    def measured(
        self, measure: Measure, *, method: str = "guided", rule: Rules = (), activations: str | Sequence[str] = "all"
    ) -> onnx.ModelProto:
        """The model under one choice of rules with what `measure` writes as its outputs, where that is anything."""
        return to_proto(self._finished([method], rule, activations, "ort", measure=measure), self.source)

    def _finished(
        self,
        methods: Sequence[str],
        rule: Rules,
        activations: str | Sequence[str],
        profile: str,
        view: View = _NO_VIEW,
        *,
        measure: Measure | None = None,
    ) -> ir.Model:
        if profile not in PROFILES:
            raise OnnxgbpError(f"no profile is called '{profile}': choose one of {', '.join(PROFILES)}")
        if [find_method(method) for method in methods] != self.kinds:
            again = GradientGraph.build(self.source, **self.arguments | {"methods": methods})
            return again._finished(methods, rule, activations, profile, view, measure=measure)
        rules = listed(rule, "rule")
        choices = [self.choices(method=method, rule=rules, activations=activations) for method in methods]
        model = self.model.clone()
        op = Emit(model.graph)
        name_sweeps(op, methods)
        try:
            names = list(result_names(methods, json.loads(self.options["wrt"])))
            found = install(op, [*choices, self.choices(method="gradient")], measure=measure)
            if measure is not None:
                _measure(op, found, measure, names)
            lower(op, profile)
            if view.asked:
                rows = 1 if self.seed_classes is None else 2
                add_views(op, names, view, self.source.model.metadata_props, rows)
        except OpsetTooLowError as error:
            again = GradientGraph.build(raised(self.source, error.opset), **self.arguments)
            return again._finished(methods, rules, activations, profile, view, measure=measure)
        merge_equal(model.graph)
        prune(model.graph)
        join_outputs(model.graph)
        declare_as_source(model.graph)
        large_last(model.graph)
        options = (
            self.options
            | view.metadata()
            | {
                "activations": activations if isinstance(activations, str) else ",".join(activations),
                "audit": json.dumps(audited(methods, choices, self.passed), ensure_ascii=False),
                "method": ",".join(methods),
                "profile": profile,
                "rules": json.dumps([f"{pattern}={name}" for pattern, name in first_matches(methods, rules)]),
                "sha256": self.source.sha256,
                "version": importlib.metadata.version("onnxgbp"),
            }
        )
        model.metadata_props.update({METADATA + name: value for name, value in sorted(options.items())})
        return model


def _measure(op: Emit, found: dict[str, ir.Value], measure: Measure, maps: Sequence[str]) -> None:
    """Puts what is measured at the activations, and of the maps, in the place of the graph's outputs."""
    op.scope = "onnxgbp"
    for output in op.graph.outputs:
        if measure.attribution is not None and output.name in maps:
            found |= measure.attribution(op, output)
    op.graph.extend(op.take())
    for name, value in found.items():
        value.name = name
    op.graph.outputs[:] = found.values() or op.graph.outputs


def _layer(
    graph: ir.Graph,
    explained: Explained,
    inputs: Sequence[ir.Value],
    found: Mapping[ir.Node, Activation],
    arguments: Mapping[str, Any],
) -> ir.Value | None:
    """The feature map of the methods that have one."""
    methods = [method for method in arguments["methods"] if find_method(method).layer]
    if not methods:
        if arguments["layer"] is not None:
            having = ", ".join(name for name, method in METHODS.items() if method.layer)
            raise OnnxgbpError(f"{arguments['methods'][0]} has no layer: leave it out, or choose one of {having}")
        return None
    if len(inputs) > 1:
        names = ", ".join(f"'{value.name}'" for value in inputs)
        raise OnnxgbpError(f"{methods[0]} is of one tensor, and these would be attributed to: {names}; choose by --wrt")
    return find_layer(graph, explained, inputs, found, arguments["layer"])
