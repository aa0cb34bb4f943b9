"""The nets, inputs and right answers that every runtime is given.

For each net and method one converted file of the portable profile, whose bytes every runtime gets, and for each batch
the inputs. A right answer comes from the other spelling (profile `ort`) of the same method in float64 on onnx's
reference evaluator, so that neither a runtime's fault nor one of the portable spelling can hide in it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from checking import Array, small_model
from onnx import helper

import onnxgbp
from onnxgbp.float64 import evaluator, to_float64
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing, read

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = ("gradient", "deconvnet", "guided")
BATCHES = (1, 3)
TARGETS = np.array([4, 0, 2])  # of `pools`, which takes its classes as an input; -1 would be the strongest


@dataclasses.dataclass(frozen=True)
class Case:
    """One file and one batch; `wanted` holds each output that is compared, in float64."""

    net: str
    method: str
    batch: int
    model: Path
    inputs: dict[str, Array]
    wanted: dict[str, Array]

    @property
    def name(self) -> str:
        return f"{self.net}-{self.method}-{self.batch}"


def pools() -> onnx.ModelProto:
    """A net of what runtimes get wrong: windows that overlap, edges that no stride divides, a pool without padding that
    drops its last column, groups, and square weights, which a gradient reads in both directions.
    """
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Array:
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    constants = {
        "w1": weight(8, 3, 3, 3),
        "w2": weight(8, 8, 3, 3),
        "w3": weight(8, 2, 3, 3),
        "scale": np.linspace(0.5, 1.5, 8, dtype=np.float32),
        "shift": np.linspace(-0.3, 0.3, 8, dtype=np.float32),
        "mean": np.linspace(-0.2, 0.2, 8, dtype=np.float32),
        "var": np.linspace(0.5, 2, 8, dtype=np.float32),
        "w4": weight(8, 8),
        "b4": np.linspace(-0.1, 0.3, 8, dtype=np.float32),
        "w5": weight(5, 8),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1"], ["c1"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0]),
        node("Relu", ["c1"], ["r1"]),
        node("MaxPool", ["r1"], ["p1"], kernel_shape=[3, 3], strides=[2, 2]),
        node("Conv", ["p1", "w2"], ["c2"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["c2"], ["r2"]),
        node("MaxPool", ["r2"], ["p2"], kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]),
        node("Conv", ["p2", "w3"], ["c3"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=4),
        node("BatchNormalization", ["c3", "scale", "shift", "mean", "var"], ["n3"]),
        node("Clip", ["n3", "zero", "six"], ["r3"]),
        node("Add", ["r3", "p1"], ["a3"]),
        node("MaxPool", ["a3"], ["p3"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
        node("AveragePool", ["p3"], ["m3"], kernel_shape=[2, 2], strides=[1, 2]),
        node("GlobalAveragePool", ["m3"], ["g3"]),
        node("Flatten", ["g3"], ["f3"]),
        node("Gemm", ["f3", "w4", "b4"], ["c4"], transB=1),
        node("Relu", ["c4"], ["r4"]),
        node("Gemm", ["r4", "w5"], ["y"], transB=1),
    ]
    return small_model(nodes, {"x": ["N", 3, 33, 30]}, constants=constants)


def photos(squeezenet: Path) -> Array:
    """Chelsea whole, mirrored, and upside down, as SqueezeNet takes them: float32 [3, 3, 224, 224]."""
    said = {entry.key: entry.value for entry in onnx.load(squeezenet).metadata_props}
    prepared = Preprocessing.of(said, InputSpec("image", np.dtype(np.float32), ("N", 3, 224, 224)))
    x = prepared.prepare(read(ROOT / "models/photos/chelsea.png"))
    return np.ascontiguousarray(np.stack([x, x[:, ::-1, ::-1], x[:, ::-1]]))


def cases(folder: Path) -> Iterator[Case]:
    """Converts into the folder, and gives every case. The file of a net and method is the same for all batches."""
    squeezenet = ROOT / "models/squeezenet1_1.onnx"
    noise = np.random.default_rng(1).standard_normal((3, 3, 33, 30)).astype(np.float32)
    nets = {
        "squeezenet1_1": (onnx.load(squeezenet), "argmax", {"image": photos(squeezenet)}),
        "pools": (pools(), "input", {"x": noise, "target": TARGETS}),
    }
    for net, (source, target, inputs) in nets.items():
        for method in METHODS:
            path = folder / f"{net}-{method}.onnx"
            onnxgbp.save(onnxgbp.convert(source, method=method, target=target, profile="portable"), path)
            other = to_float64(onnxgbp.convert(source, method=method, target=target, profile="ort"))
            names = [source.graph.output[0].name, "attribution", "attribution_target"]
            wide = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in inputs.items()}
            answers = evaluator(other).run(names, wide)
            for batch in BATCHES:
                wanted = {name: np.asarray(answer)[:batch] for name, answer in zip(names, answers, strict=True)}
                fed = {name: np.ascontiguousarray(x[:batch]) for name, x in inputs.items()}
                yield Case(net, method, batch, path, fed, wanted)


def write(case: Case, folder: Path) -> dict[str, object]:
    """Writes the inputs as raw little-endian numbers and tells where they lie: an entry of `cases.json`."""
    inputs = {}
    for name, x in case.inputs.items():
        file = folder / f"{case.name}.{name}.in"
        file.write_bytes(x.astype(x.dtype.newbyteorder("<")).tobytes())
        inputs[name] = {"file": file.name, "dtype": str(x.dtype), "shape": list(x.shape)}
    return {"name": case.name, "model": case.model.name, "inputs": inputs, "outputs": list(case.wanted)}


def write_all(given: list[Case], folder: Path) -> None:
    """Writes `cases.json`, all that an adapter reads besides the files it names."""
    (folder / "cases.json").write_text(json.dumps([write(case, folder) for case in given]))
