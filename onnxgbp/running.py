"""A converted model in a session: which inputs and outputs are the source's and which are ours, and one run of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from onnxgbp.binding import Fixed, run_bound
from onnxgbp.converted import scores_output
from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec, dtype_of
from onnxgbp.model import METADATA, Source
from onnxgbp.results import result_names
from onnxgbp.scale import Census, fit, lost, start
from onnxgbp.session import fault, open_session, provider_of
from onnxgbp.target import classes_of
from onnxgbp.values import Value, is_held

__all__ = ["Made", "Running"]

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Made:
    """What one run of the model gives."""

    outputs: dict[str, Any]  # the model's own
    attributions: list[Value]
    chosen: npt.NDArray[np.int64]
    explained: Any  # the explained tensor, None where no method needs it
    scale: float  # of the seed; it is divided out
    float16: str  # what that could not hold


class Running:
    """A converted model and its session.

    inputs: the source's; target_input, scale_input: ours, None where the model has no such input. mode, top, methods,
    wrt, metadata, scores_output: as `Explainer` has them. fixed_scale: of the seed, None where each run finds its own.

    Args:
        proto: the converted model; source: what it was made of.
        provider: of the session; options: the others of `open_session`.
        seed_scale: the fixed one, if any.
        float16: whether the model computes in it.
        watch: whether the explained tensor is wanted of each run.
        stay: whether outputs stay on the device, but for the class that was explained.

    Raises:
        OnnxgbpError: as `open_session`; a size is free and a CUDA graph is to be captured; or outputs are to stay on
            the device where the seed's scale has to be divided out of them.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        source: Source,
        provider: str,
        options: Mapping[str, Any],
        *,
        seed_scale: float | None,
        float16: bool,
        watch: bool,
        stay: bool,
    ) -> None:
        self.name = source.name
        self.metadata = {entry.key: entry.value for entry in proto.metadata_props}
        self.fixed_scale = seed_scale
        self._float16 = float16
        self._watched: list[str] = []
        proto = self._watching(proto) if watch else proto
        self.session = open_session(proto, source, provider, **options)
        self.provider = provider_of(self.session)
        self._read_interface(proto)
        self._outputs = [*self._theirs, *self._ours, *self._watched]
        self._stay = frozenset(self._outputs) - {"attribution_target"} if stay else frozenset()
        if stay:
            self._refuse_to_stay()
        self._fixed = Fixed(self.session, self.provider, self._outputs) if options.get("cuda_graph") else None

    def _watching(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """The model with the explained tensor among its outputs."""
        explained = self.metadata[METADATA + "explained"]
        if explained in {output.name for output in proto.graph.output}:
            return proto
        self._watched = [explained]
        watching = onnx.ModelProto()  # the other may be the caller's own
        watching.CopyFrom(proto)
        watching.graph.output.append(onnx.ValueInfoProto(name=explained))
        return watching

    def _read_interface(self, proto: onnx.ModelProto) -> None:
        """Which inputs and outputs are the source's, and which are ours: ours stand last, in a fixed order."""
        inputs = [InputSpec(i.name, dtype_of(i.name, i.type), tuple(i.shape)) for i in self.session.get_inputs()]
        self.scale_input = inputs.pop() if self.metadata.get(METADATA + "seed_scale") == "input" else None
        if self.scale_input is not None:
            self.metadata[METADATA + "seed_scale"] = str(self.fixed_scale or "auto")
        else:
            self.fixed_scale = float(self.metadata.get(METADATA + "seed_scale", 1))
        self.mode = self.metadata[METADATA + "target"]
        self.target_input = inputs.pop() if self.mode.startswith("input") else None
        self.top = classes_of(self.mode)
        self.methods = tuple(self.metadata[METADATA + "method"].split(","))
        self.inputs: tuple[InputSpec, ...] = tuple(inputs)
        self.wrt = tuple(json.loads(self.metadata[METADATA + "wrt"]))
        names = [output.name for output in self.session.get_outputs()]
        self._ours = [*result_names(self.methods, self.wrt), "attribution_target"]
        ours = {*self._ours, *self._watched}
        if lacking := [name for name in self._ours if name not in names]:
            raise OnnxgbpError(f"{self.name} is no whole converted file: it has no output '{lacking[0]}'")
        self._theirs = [name for name in names if name not in ours]  # and the views, which stand last
        types = {output.name: output.type for output in self.session.get_outputs()}
        self.scores_output = scores_output(proto, self.metadata[METADATA + "explained"], self._theirs)
        if self.scores_output is None:
            floats = (
                name for name in self._theirs if types[name] in ("tensor(float)", "tensor(double)", "tensor(float16)")
            )
            self.scores_output = next(floats, self._theirs[0] if self._theirs else None)

    def _refuse_to_stay(self) -> None:
        if self.fixed_scale != 1 or self.scale_input is not None:
            raise OnnxgbpError("device_outputs: the seed's scale is divided out on the CPU; leave one of them out")
        for output in self.session.get_outputs():
            if not output.type.startswith("tensor("):
                raise OnnxgbpError(f"device_outputs: output '{output.name}' is no tensor but a {output.type}")

    def _call(self, feeds: Mapping[str, Value]) -> list[Any]:
        """The values of the outputs, each an array, or an OrtValue if it stays on the device."""
        if self._fixed is not None:
            return self._fixed.run(feeds, self._stay)
        if self._stay or any(map(is_held, feeds.values())):
            return run_bound(self.session, self.provider, feeds, self._outputs, self._stay)
        values: list[Any] = self.session.run(self._outputs, feeds)
        return values

    def run(self, feeds: Mapping[str, Value], hint: str) -> Made:
        """What the model gives, with the scale of its seed divided out.

        Raises:
            OnnxgbpError: an input lies on another device, or the runtime fails; then `hint` stands at the end.
        """
        for name, value in feeds.items():
            if is_held(value) and value.device_name() not in ("cpu", self.provider):
                raise OnnxgbpError(
                    f"input '{name}' lies on {value.device_name()}, and the session runs on {self.provider}: copy it, "
                    "or choose the other provider"
                )
        factor = self.scale_input
        runs = dict[float, list[Any]]()
        ours = slice(len(self._theirs), len(self._theirs) + len(self._ours))

        def maps(scale: float) -> list[Array]:
            more = {factor.name: np.asarray(scale, factor.dtype)} if factor is not None else {}
            try:
                runs[scale] = self._call({**feeds, **more})
            except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
                raise OnnxgbpError(f"ONNX Runtime could not run {self.name}: {fault(error)}{hint}") from None
            return runs[scale][ours][:-1]

        def fitting() -> tuple[int, Sequence[Array]]:
            return fit(lambda exponent: maps(2.0**exponent), start(None))

        if self.fixed_scale is None:
            found = fitting()
            scale, said = 2.0 ** found[0], lost(found[1], 2.0 ** found[0], found)
        else:
            scale, own = self.fixed_scale, maps(self.fixed_scale)
            better = fitting() if factor is not None and not Census.of(own).fits else None
            said = lost(own, scale, better) if self._float16 else ""
        theirs = dict(zip(self._theirs, runs[scale], strict=False))
        *attributions, chosen = runs[scale][ours]
        if scale != 1 or factor is not None:
            attributions = [np.asarray(a, np.result_type(a, np.float32)) / np.float32(scale) for a in attributions]
        explained = runs[scale][-1] if self._watched else theirs.get(self.metadata[METADATA + "explained"])
        return Made(theirs, attributions, chosen, explained, scale, said)
