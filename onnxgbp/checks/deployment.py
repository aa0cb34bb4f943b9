"""What stands in the way of a runtime that the file shall run in: an operator, its form, the opset, the IR.

| `--for` | what is looked at |
|---|---|
| onnxruntime==1.17 | opset, IR and ai.onnx.ml that this release reads; without a version the oldest of the table |
| openvino | the ort profile's masks; one square weight read in both directions: a wrong map in silence, to 2026.4 |
| opencv | the forms below: OpenCV's dnn is wrong beyond the first sample |
| web | onnxruntime-web on WebGPU: MaxPool with Indices, and what scatters |
| triton | the batch is axis 0 of every input and output, and no sample changes another's: a server may batch them |
| portable | every form that the profile of that name promises not to use |

Opset and IR are the whole file's. Forms are looked for in what the conversion added: the forward pass is the source's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from onnxgbp.checks.row import Check
from onnxgbp.checks.subject import Subject
from onnxgbp.compare import label_of, median_error
from onnxgbp.constants import constant_value
from onnxgbp.emit import dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.opset import opset_of
from onnxgbp.trial import Array, is_free

__all__ = ["ONNXRUNTIME", "RUNTIMES", "Runtime", "parse_runtime", "stands_in_the_way"]

# ONNX Runtime's release: the newest opset, IR and opset of ai.onnx.ml of a model that it loads. Measured: one-operator
# models of every version were given to the last patch of each release.
ONNXRUNTIME: dict[tuple[int, int], tuple[int, int, int]] = {
    (1, 17): (20, 9, 4),
    (1, 18): (21, 10, 5),
    (1, 19): (21, 10, 5),
    (1, 20): (21, 10, 5),
    (1, 21): (22, 10, 5),
    (1, 22): (22, 10, 5),
    (1, 23): (23, 11, 5),
    (1, 24): (25, 13, 5),
    (1, 25): (26, 13, 5),
    (1, 26): (26, 13, 5),
    (1, 27): (26, 13, 5),
    (1, 28): (26, 13, 5),
    (1, 29): (26, 13, 5),
    (1, 30): (26, 13, 5),
    (1, 31): (26, 13, 5),
    (1, 32): (28, 14, 5),
}
_ROWS = 1e-2  # median relative error between a sample alone and among others; float16 rounds with the batch

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_ABSENT = _CONTROL_FLOW | {"MaxUnpool", "Col2Im", "OneHot"}
_SCATTERS = frozenset({"Scatter", "ScatterElements", "ScatterND"})


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One of RUNTIMES, and its release where that decides."""

    name: str
    release: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name}=={self.release[0]}.{self.release[1]}" if self.release else self.name


def parse_runtime(text: str) -> Runtime:
    """A runtime of 'openvino', 'onnxruntime==1.17', 'onnxruntime==1.17.3'.

    Raises:
        OnnxgbpError: none of RUNTIMES, or a release that was not measured.
    """
    name, given, version = text.strip().partition("==")
    if name not in RUNTIMES:
        raise OnnxgbpError(f"no runtime is called '{name}': choose one of {', '.join(RUNTIMES)}")
    if not given:
        return Runtime(name, min(ONNXRUNTIME) if name == "onnxruntime" else None)
    if name != "onnxruntime":
        raise OnnxgbpError(f"'{text}': only onnxruntime is told apart by its release; write {name}")
    numbers = version.split(".")
    release = (int(numbers[0]), int(numbers[1])) if len(numbers) > 1 and "".join(numbers).isdigit() else None
    if release not in ONNXRUNTIME:
        oldest, newest = (".".join(map(str, edge)) for edge in (min(ONNXRUNTIME), max(ONNXRUNTIME)))
        raise OnnxgbpError(f"'{text}': what ONNX Runtime reads is known of {oldest} to {newest}")
    return Runtime(name, release)


def stands_in_the_way(s: Subject, runtime: Runtime) -> Check:
    """Every obstacle of one runtime, the first three told, with the way out."""
    obstacles = list(RUNTIMES[runtime.name](s, runtime))
    said = "; ".join(obstacles[:3]) if obstacles else "nothing stands in the way"
    if len(obstacles) > 3:
        said += f"; and {len(obstacles) - 3} more"
    if obstacles and runtime.name in _BY_PROFILE:
        again = s.record.said.get("profile") != "portable"
        said += ". Convert it with --profile portable" if again else ". The portable profile has no other spelling"
    return Check("", not obstacles, said, len(obstacles), 0)


def _onnxruntime(s: Subject, runtime: Runtime) -> Iterator[str]:
    assert runtime.release is not None  # parse_runtime gives it
    opset, version, ml = ONNXRUNTIME[runtime.release]
    reads, named = f"the newest that ONNX Runtime {'.'.join(map(str, runtime.release))} reads", opset_of(s.proto)
    if named > opset:
        newer = [node for node in _added(s) if _since(node, named) > opset]
        needs = f", which {newer[0].op_type} ('{label_of(newer[0])}') of the gradient needs" if newer else ""
        yield f"opset {named} is above {opset}, {reads}{needs}: export the source with opset {opset} or older"
    if s.proto.ir_version > version:
        yield (
            f"IR {s.proto.ir_version} is above {version}, {reads}: set the source's ir_version to {version}, "
            "which is enough for its opset, and convert it again"
        )
    own = next((entry.version for entry in s.proto.opset_import if entry.domain == "ai.onnx.ml"), 0)
    if own > ml:
        yield f"opset {own} of ai.onnx.ml is above {ml}, {reads}: export the source with {ml} or older"


def _since(node: onnx.NodeProto, opset: int) -> int:
    """The opset that brought the version of an operator that a file of this opset uses."""
    try:
        return int(onnx.defs.get_schema(node.op_type, opset, node.domain).since_version)
    except onnx.defs.SchemaError:
        return 0


def _added(s: Subject) -> list[onnx.NodeProto]:
    """The nodes that the conversion added."""
    forward = {output for node in s.forward.graph.node for output in node.output}
    return [node for node in s.proto.graph.node if not forward & set(node.output)]


def _masks(s: Subject) -> Iterator[str]:
    """SqueezeNet in OpenVINO 2026.4, float32: guided off by 0.04 of the map's range, the gradient by 180 times it."""
    if s.record.said.get("profile") != "ort":
        return
    added = {name for node in _added(s) for name in node.output}
    nodes = [node for node in s.converted.model.graph if node.outputs[0].name in added]
    if any(node.op_type == "HardSigmoid" or (node.op_type == "Conv" and _closes(node.inputs[1])) for node in nodes):
        yield "its gates are masks that only ONNX Runtime's convolutions are known to keep exact"


def _closes(weight: ir.Value | None) -> bool:
    """Whether a convolution closes a gate as `onnxgbp/blocked.py` has it do."""
    if weight is None or (dims_of(weight) or ())[1:] != (1, 1, 1):
        return False
    known = constant_value(weight)
    return known is not None and known.size > 0 and bool(known.min() < -(2.0**99))


def _openvino(s: Subject, _: Runtime) -> Iterator[str]:
    yield from _masks(s)
    for weight in sorted(_tied(s)):
        yield f"the square weight '{weight}' is read in both directions, and OpenVINO gives a wrong map in silence"


def _tied(s: Subject) -> set[str]:
    """The square weights that are read as they are and transposed. What only moves numbers is looked through: it does
    not help; Neg does, and two of them are the number itself.
    """
    graph = s.proto.graph
    constants = [node for node in graph.node if node.op_type == "Constant"]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes |= {node.output[0]: tuple(a.t.dims) for node in constants for a in node.attribute if a.name == "value"}
    # Of each tensor that is a weight: which one, and whether it has been transposed on the way.
    weights = {name: (name, False) for name, dims in shapes.items() if len(dims) >= 2 and _is_square(dims)}
    directions: dict[str, set[bool]] = {}
    for node in graph.node:
        source = node.input[0] if node.input else ""
        if source in weights and node.op_type in ("Identity", "Reshape", "Slice", "Split"):
            weights |= dict.fromkeys(node.output, weights[source])
        elif source in weights and node.op_type == "Transpose":
            name, turned = weights[source]
            weights[node.output[0]] = (name, not turned)
        elif len(node.input) > 1 and node.input[1] in weights and node.op_type in _READERS:
            name, turned = weights[node.input[1]]
            against = node.op_type == "ConvTranspose" or bool(_attribute(node, "transB", 0))
            directions.setdefault(name, set()).add(turned != against)
    return {name for name, found in directions.items() if len(found) > 1}


def _is_square(dims: tuple[int, ...]) -> bool:
    """Of a convolution its channels, of a matrix, or a stack of them, its last two dims."""
    return dims[0] == dims[1] if len(dims) != 3 else dims[0] == dims[1] or dims[1] == dims[2]


# What reads a weight as its second input; ConvTranspose and a Gemm with transB against the direction it is stored in.
_READERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def _forms(s: Subject, runtime: Runtime) -> Iterator[str]:
    values = {value.name: value for node in s.converted.model.graph for value in (*node.inputs, *node.outputs) if value}
    numbers = {tensor.name: tensor for tensor in s.proto.graph.initializer}
    for function in s.proto.functions:
        yield f"local function {function.name}"
    yield from _masks(s)
    yield from _scattering(s, runtime)
    for node in _added(s):
        where = f"node '{label_of(node)}'"
        if node.op_type in _ABSENT:
            yield f"{where} is {node.op_type}"
        if node.op_type == "ConvTranspose":
            group, kernel = int(_attribute(node, "group", 1)), dims_of(values[node.input[1]])
            if _attribute(node, "output_shape", None) is not None:
                yield f"{where} is ConvTranspose with output_shape"
            if group > 1 and (kernel is None or kernel[0] != group):
                yield f"{where} is ConvTranspose with several inputs a group"
        if node.op_type == "Pad":
            pads = _attribute(node, "pads", None)
            if pads is None and len(node.input) > 1 and node.input[1] in numbers:
                pads = numpy_helper.to_array(numbers[node.input[1]]).tolist()
            if any(pad < 0 for pad in pads or ()):
                yield f"{where} is Pad with a negative pad"


def _scattering(s: Subject, _: Runtime) -> Iterator[str]:
    for node in _added(s):
        if node.op_type in _SCATTERS:
            yield f"node '{label_of(node)}' is {node.op_type}"
        if node.op_type == "MaxPool" and len(node.output) > 1:
            yield f"node '{label_of(node)}' is MaxPool with Indices"


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _triton(s: Subject, _: Runtime) -> Iterator[str]:
    s.require_facts()
    weights = {tensor.name for tensor in s.proto.graph.initializer}
    given = [value for value in s.proto.graph.input if value.name not in weights]
    for output in s.proto.graph.output:
        if not output.type.HasField("tensor_type"):
            yield f"output '{output.name}' is no tensor: export the source without a ZipMap"
            return
    fixed = [value.name for value in given if not is_free(value, 0)]
    if fixed:
        yield f"input '{fixed[0]}' has no free batch as axis 0: export the source with one"
        return
    feeds = s.with_extra(s.inputs(3))
    together = s.out_run(feeds)
    for name, array in together.items():
        if array.shape[:1] != (3,):
            yield f"output '{name}' has shape {list(array.shape)} for 3 samples: its axis 0 is not the batch"
    alone = [s.out_run({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(3)]
    for name, array in together.items():
        if array.shape[:1] == (3,) and not _same(array, np.concatenate([one[name] for one in alone])):
            yield f"output '{name}' of a sample changes with the other samples of its batch"


def _same(together: Array, alone: Array) -> bool:
    if together.shape != alone.shape:
        return False
    if together.dtype.kind not in "fV" and together.dtype != np.uint8:  # a label; the heatmap is one byte
        return bool(np.array_equal(together, alone))
    return median_error(together.astype(np.float64), alone.astype(np.float64)) <= _ROWS


# The obstacles of each.
RUNTIMES: dict[str, Callable[[Subject, Runtime], Iterator[str]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "opencv": _forms,
    "web": _scattering,
    "triton": _triton,
    "portable": _forms,
}
_BY_PROFILE = frozenset({"openvino", "opencv", "web", "portable"})  # whose obstacles the profile decides
