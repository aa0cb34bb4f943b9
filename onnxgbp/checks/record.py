"""The options of a conversion, as its file's metadata tells them."""

from __future__ import annotations

import dataclasses
import json

import onnx

from onnxgbp.convert import convert
from onnxgbp.methods import find_method
from onnxgbp.results import result_names
from onnxgbp.target import classes_of
from onnxgbp.views import View

__all__ = ["Record"]

_FACTS = (
    "version",
    "method",
    "rules",
    "audit",
    "activations",
    "target",
    "seed",
    "explained",
    "wrt",
    "profile",
    "sha256",
)


@dataclasses.dataclass(frozen=True)
class Record:
    """said: the metadata under `onnxgbp.`, without that prefix."""

    said: dict[str, str]

    @property
    def missing(self) -> list[str]:
        return [fact for fact in _FACTS if fact not in self.said]

    @property
    def wrt(self) -> list[str]:
        return [str(name) for name in json.loads(self.said["wrt"])]

    @property
    def rules(self) -> list[str]:
        return [str(rule) for rule in json.loads(self.said["rules"])]

    @property
    def plain(self) -> bool:
        """Whether the file's own attribution is the plain gradient."""
        return self.methods == ["gradient"] and all(rule.endswith("=gradient") for rule in self.rules)

    @property
    def methods(self) -> list[str]:
        return self.said["method"].split(",")

    @property
    def differentiated(self) -> list[str]:
        """The tensors whose gradient the methods take: those that are attributed to, the layer of Grad-CAM."""
        made = [find_method(method) for method in self.methods]
        layer = [self.said["layer"]] if "layer" in self.said else []
        return list(dict.fromkeys([*(self.wrt if any(method.inputs for method in made) else []), *layer]))

    @property
    def results(self) -> dict[str, str]:
        """The outputs that a conversion adds, and the tensor that each is the attribution of."""
        return result_names(self.methods, self.wrt)

    @property
    def plain_results(self) -> dict[str, str]:
        """The same of a conversion to the plain gradient."""
        return self.results if self.plain else result_names(["gradient"], self.differentiated)

    @property
    def classes(self) -> int | None:
        """K, where K classes of each sample are explained."""
        return classes_of(self.said["target"])

    @property
    def views(self) -> list[str]:
        """The outputs behind all others."""
        made = View(self.said.get("view", "signed"), self.said.get("reduce", "none"))
        ends = ["view"] if made.changes else []
        ends += ["heatmap"] if self.said.get("heatmap") == "uint8" else []
        return [f"{name}_{end}" for name in self.results for end in ends]

    @property
    def seed_scale(self) -> float:
        return float(self.said.get("seed_scale", 1))

    def convert(
        self, model: str | onnx.ModelProto, *, plain: bool = False, seed_scale: float | str | None = None
    ) -> onnx.ModelProto:
        return convert(
            model,
            methods=["gradient"] if plain else self.methods,
            rule=[] if plain else self.rules[:-1],  # the last is the method
            activations=self.said["activations"],
            target=self.said["target"],
            output=self.said["explained"],
            unit=self.said.get("unit"),
            seed=self.said["seed"],
            wrt=self.differentiated if plain else self.wrt,
            layer=None if plain else self.said.get("layer"),
            profile=self.said["profile"],
            view="signed" if plain else self.said.get("view", "signed"),
            reduce="none" if plain else self.said.get("reduce", "none"),
            heatmap=not plain and self.said.get("heatmap") == "uint8",
            seed_scale=self.seed_scale if seed_scale is None else seed_scale,
        )
