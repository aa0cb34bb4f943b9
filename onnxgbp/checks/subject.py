"""The file under test, the model that it is compared with, and the inputs that both are run on."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx

from onnxgbp.checks.record import Record
from onnxgbp.checks.row import Failed
from onnxgbp.compare import extract, first_line
from onnxgbp.emit import numel
from onnxgbp.errors import OnnxgbpError
from onnxgbp.float64 import to_float64
from onnxgbp.inputs import integer_ranges
from onnxgbp.installed import onnxruntime_module
from onnxgbp.model import METADATA, load
from onnxgbp.target import parse_unit
from onnxgbp.trial import (
    SIZES,
    Array,
    Arrays,
    Run,
    is_free,
    random_inputs,
    reference,
    session,
    sizes_that_run,
)

__all__ = ["DIRECTIONS", "Subject"]

DIRECTIONS = 2  # random ones of the finite differences, besides the gradient's own
_SCALES = (1.0, 16.0, 256.0)  # of the random input: a small one can leave a network dead


class Subject:
    """What the checks share, made at first use.

    Raises:
        OnnxgbpError: `out` or `source` cannot be read, or `out` is no converted file; onnxruntime is missing.
    """

    def __init__(self, out: Path, source: Path | None) -> None:
        self.out, self.source_path = out, source
        self.converted = load(out)
        self.proto = onnx.load(out)  # with external data
        prefix = len(METADATA)
        self.record = Record({e.key[prefix:]: e.value for e in self.proto.metadata_props if e.key.startswith(METADATA)})
        if "method" not in self.record.said:
            raise OnnxgbpError(f"{out} is no converted file: it has no {METADATA}method in its metadata")
        if self.record.said.get("seed_scale") == "input":
            raise OnnxgbpError(f"{out} is given the scale of its seed when it runs: verify one with a fixed scale")
        self.source = load(source) if source is not None else None
        onnxruntime_module()

    def require_facts(self) -> None:
        if self.record.missing:
            raise Failed("the metadata does not say how the file was made")

    @functools.cached_property
    def added(self) -> set[str]:
        return {"attribution_target"} | {o.name for o in self.proto.graph.output if o.name.startswith("attribution")}

    @functools.cached_property
    def trusted(self) -> bool:
        """Whether the source was given and is the recorded one; else the file itself has to tell what it was."""
        return self.source is not None and self.source.sha256 == self.record.said.get("sha256")

    @functools.cached_property
    def types(self) -> dict[str, int]:
        """The element type of every tensor."""
        graph = self.converted.model.graph
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        return {value.name or "": int(value.dtype) for value in values if value.dtype is not None}

    @functools.cached_property
    def forward(self) -> onnx.ModelProto:
        """The file without what the conversion added, whether or not that is the source."""
        names = [output.name for output in self.proto.graph.output if output.name not in self.added]
        keep = [] if self.record.missing else [self.record.said["explained"], *self.record.wrt]
        keep += [] if self.record.missing else self.record.differentiated
        cut = extract(self.proto, self.types, [*names, *(name for name in keep if name in self.types)])
        del cut.graph.output[len(names) :]
        read = {value.name for value in cut.graph.input}
        cut.graph.input.extend(
            value for value in self.fed if value.name not in read
        )  # a caller feeds them all the same
        return cut

    @property
    def forward_model(self) -> str | onnx.ModelProto:
        """The model to convert afresh."""
        return str(self.source_path) if self.trusted else self.forward

    @functools.cached_property
    def without_kernels(self) -> str:
        """Why onnxruntime's CPU provider cannot run the model at all: float64 and bfloat16 have few kernels; or ''."""
        try:
            session(self.forward)
        except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
            return first_line(error) if "NOT_IMPLEMENTED" in str(error) else ""
        return ""

    def run_of(self, model: onnx.ModelProto | Path) -> Run:
        """The model in onnxruntime, or, where that has no kernels for it, in float64 on the reference evaluator."""
        if not self.without_kernels:
            return session(model)
        wide = reference(to_float64(onnx.load(model) if isinstance(model, Path) else model))
        return lambda feeds: wide(self.cast(dict(feeds), "float64"))

    @functools.cached_property
    def original_run(self) -> Run:
        return self.run_of(self.source_path if self.source_path is not None else self.forward)

    @functools.cached_property
    def out_run(self) -> Run:
        return self.run_of(self.out)

    @functools.cached_property
    def inner_run(self) -> Run:
        """The forward part up to the explained tensor and those that are attributed to."""
        inner = [name for name in self.record.differentiated if name not in {value.name for value in self.fed}]
        return self.run_of(extract(self.forward, self.types, [self.record.said["explained"], *inner]))

    @functools.cached_property
    def free_batch(self) -> bool:
        return any(is_free(value, 0) for value in self.fed)

    @functools.cached_property
    def fed(self) -> list[onnx.ValueInfoProto]:
        """The inputs of the source, as the file has them."""
        graph = self.proto.graph
        target = self.record.said.get("target", "")
        added = "target" if target.startswith("input") else target if target == "seed" else None
        other = {tensor.name for tensor in graph.initializer} | {added}
        return [value for value in graph.input if value.name not in other]

    @functools.cached_property
    def ranges(self) -> dict[str, range]:
        return integer_ranges(self.converted.model.graph)

    @functools.cached_property
    def free_sizes(self) -> tuple[int, int]:
        """Channels, and any other free dim that is not the batch, with which the model runs."""
        sizes = sizes_that_run(self.run_of(self.forward), self.fed, self.ranges, {})
        if sizes is None:
            tried = ", ".join(str(size) for size in dict.fromkeys(size for _, size in SIZES))
            raise Failed(f"the model runs with none of the sizes {tried} for its free dims")
        return sizes

    def inputs(self, batch: int | None, scale: float = 1.0) -> Arrays:
        return random_inputs(self.fed, batch or 2, self.free_sizes, scale, self.ranges)

    @functools.cached_property
    def feeds(self) -> Arrays:
        """The first input with which the file's map is not zero; if there is none, the last."""
        for batch, scale in [(b, s) for s in _SCALES for b in (2, 1)]:
            feeds = self.inputs(batch, scale)
            try:
                results = self.out_run(self.with_extra(feeds))
            except Exception:
                if batch == 1:
                    raise
                continue  # a free batch that was baked in all the same
            if any(np.any(results[result]) for result in self.record.results):
                break
        return feeds

    @functools.cached_property
    def found(self) -> Arrays:
        return self.out_run(self.with_extra(self.feeds))

    @functools.cached_property
    def middle(self) -> Arrays:
        """The explained tensor, and tensors of `wrt` that are no inputs."""
        return self.inner_run(self.feeds)

    def with_extra(self, feeds: Arrays) -> Arrays:
        """The input that `--target input` or `seed` adds: per sample -1, 0, 1, -1...; a random weighting."""
        target, count = self.record.said.get("target", ""), self.record.classes
        if target != "seed" and not target.startswith("input"):
            return feeds
        explained = self.inner_run(feeds)[self.record.said["explained"]]
        if target == "seed":
            return feeds | {"seed": np.random.default_rng(2).standard_normal(explained.shape).astype(explained.dtype)}
        size = len(explained) * (count or 1)
        given = np.arange(size, dtype=np.int64) % min(3, explained.shape[1] + 1) - 1
        return feeds | {"target": given if count is None else given.reshape(-1, count)}

    @functools.cached_property
    def expected_target(self) -> Array:
        """The class or unit that has to be explained for each sample, int64 [N], or [N, K] for K classes."""
        explained, target = self.middle[self.record.said["explained"]], self.record.said["target"]
        if "unit" in self.record.said:
            return self._unit[1]
        if target == "seed":
            seed = self.with_extra(self.feeds)["seed"]
            return seed.reshape(len(seed), -1).argmax(1) if seed.ndim > 1 else np.full(len(seed), -1)
        count = self.record.classes
        best: Array = np.argsort(-explained.reshape(len(explained), -1), axis=1, kind="stable")[:, : count or 1]
        best = best if count is not None else best[:, 0]
        if target.startswith("input"):
            given = self.with_extra(self.feeds)["target"]
            return np.where(given == -1, best, given)
        return best if target == "argmax" or count is not None else np.full(len(explained), int(target))

    @functools.cached_property
    def _unit(self) -> tuple[Array, Array]:
        """The unit as a seed of ones, and what `attribution_target` has to say of it."""
        explained = self.middle[self.record.said["explained"]]
        parts = parse_unit(self.record.said["unit"]) or ()
        region = np.zeros(explained.shape, bool)
        region[(slice(None), *(part for part in parts if not isinstance(part, str)))] = True
        if parts[-1] != "max":
            first = parts[0].start or 0 if isinstance(parts[0], slice) else int(parts[0])
            return region.astype(np.float64), np.full(len(explained), first)
        inside = np.where(region, explained, -np.inf).reshape(len(explained), -1)
        strongest = inside.argmax(1)
        seed = np.zeros(inside.shape)
        seed[np.arange(len(seed)), strongest] = 1
        return seed.reshape(explained.shape), strongest

    @functools.cached_property
    def seeds(self) -> list[Array]:
        """The gradients at the explained tensor, made here once more and not by the code under test."""
        explained, scale = self.middle[self.record.said["explained"]], self.record.seed_scale
        if self.record.said["target"] == "seed":
            return [self.with_extra(self.feeds)["seed"].astype(np.float64) * scale]
        if "unit" in self.record.said:
            seeds = [self._unit[0]]
        else:
            columns = self.expected_target.reshape(len(explained), -1).T
            seeds = [np.zeros(explained.shape) for _ in columns]
            for seed, column in zip(seeds, columns, strict=True):
                seed.reshape(len(seed), -1)[np.arange(len(seed)), column] = 1
        size = explained.astype(np.float64) if self.record.said["seed"] == "activation" else 1.0
        return [scale * seed * size for seed in seeds]

    @functools.cached_property
    def cost(self) -> float:
        """Multiplications of all passes that the checks make in float64, from the shapes."""
        batch = next(iter(self.feeds.values())).shape[0] if self.feeds else 1
        total = 0.0
        for node in self.converted.model.graph:
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or weight is None:
                continue
            transposed = node.op_type == "ConvTranspose"
            shapes = [value.shape for value in (weight, node.inputs[0] if transposed else node.outputs[0]) if value]
            sizes = [[dim if isinstance(dim, int) else self.free_sizes[1] for dim in shape or ()] for shape in shapes]
            along = sizes[1][2:] if "Conv" in node.op_type else sizes[1][1:-1]
            total += batch * float(numel(sizes[0]) or 0) * float(numel(along) or 0)
        # The sum holds one forward and one backward pass, and each direction takes two forward passes.
        return total * (2 + (DIRECTIONS + 1) * len(self.record.results))

    @staticmethod
    def engine(model: onnx.ModelProto, kind: str) -> Run:
        return reference(to_float64(model)) if kind == "float64" else session(model)

    @staticmethod
    def cast(feeds: Arrays, kind: str) -> Arrays:
        if kind == "float32":
            return feeds
        return {name: x.astype(np.float64) if x.dtype.kind in "fV" else x for name, x in feeds.items()}
