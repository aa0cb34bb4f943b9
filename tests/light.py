"""The nine architectures of the onnx wheel (`backend/test/data/light`) with usable weights.

As shipped every large weight is a ConstantOfShape of 0.02. `light` puts seeded weights in their
place, as initializers, and reseeds the small ones that the files do carry (trained statistics do
not fit random weights). The files are IR 3, so every initializer stays a graph input.
"""

import math
import zlib
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

LIGHT = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)


def _weights(role: tuple[str, int], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Values for a float parameter that is input number `role[1]` of an operator `role[0]`.

    Besides operators: "linear", a Conv that reads a BatchNormalization, and "residual", a
    BatchNormalization that a Sum reads.
    """

    def normal(mean: float, deviation: float) -> np.ndarray:
        return np.float32(mean) + np.float32(deviation) * rng.standard_normal(shape, np.float32)

    match role:
        case ("Conv" | "Gemm", 1):
            return normal(0, math.sqrt(2 / math.prod(shape[1:])))  # He; Gemm has transB = 1
        case ("linear", 1):
            return normal(0, math.sqrt(1 / math.prod(shape[1:])))  # no ReLU halves its input
        case ("BatchNormalization", 4):
            return rng.uniform(0.8, 1.25, shape).astype(np.float32)
        case ("BatchNormalization", 1) | ("Mul", 1):
            return normal(1, 0.1)
        case ("residual", 1):
            return normal(0.3, 0.05)  # near 1, sixteen sums let the logits grow to 1e5
    return normal(0, 0.1)  # biases, means, and the weights that nothing reads


def light(name: str, dynamic: bool = False) -> onnx.ModelProto:
    """One of LIGHT: opset 9, IR 3, input [1, 3, 224, 224], the same weights at every call.

    dynamic frees the batch: input and output start with "N", and a Reshape of activations with -1.
    """
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = onnx.load(folder / f"light_{name}.onnx")
    graph = model.graph
    rng = np.random.default_rng(zlib.crc32(name.encode()))

    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    filled = [n for n in graph.node if n.op_type == "ConstantOfShape"]
    shapes |= {n.output[0]: tuple(values[n.input[0]].tolist()) for n in filled}
    small = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    parameters = small | {n.output[0] for n in filled}

    roles: dict[str, tuple[str, int]] = {}
    summed = {i for n in graph.node if n.op_type == "Sum" for i in n.input}
    normalised = {n.output[0] for n in graph.node if n.op_type == "BatchNormalization"}
    for n in reversed(graph.node):  # backwards, so that a reshaped parameter has its reader's role
        for at, source in enumerate(n.input):
            moved = n.op_type in ("Reshape", "Unsqueeze") and at == 0
            roles[source] = roles.get(n.output[0], ("", 0)) if moved else (n.op_type, at)
        if n.op_type == "BatchNormalization" and n.output[0] in summed:
            roles[n.input[1]] = ("residual", 1)
        if n.op_type == "Conv" and n.input[0] in normalised:
            roles[n.input[1]] = ("linear", 1)

    gone = {n.input[0] for n in filled}
    kept = [i for i in graph.initializer if i.name not in parameters | gone]
    inputs = [i for i in graph.input if i.name not in gone]
    if dynamic:
        kept = [_free_batch(i, values[i.name]) for i in kept]
        for value in [i for i in inputs if i.name not in shapes] + list(graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "N"
    fresh = [numpy_helper.from_array(_weights(roles.get(p, ("", 0)), shapes[p], rng), p) for p in sorted(parameters)]
    inputs += [helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, shapes[n.output[0]]) for n in filled]
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    for field, items in (("initializer", kept + fresh), ("input", inputs), ("node", nodes)):
        graph.ClearField(field)
        getattr(graph, field).extend(items)
    return model


def _free_batch(target: onnx.TensorProto, value: np.ndarray) -> onnx.TensorProto:
    """Integer initializers are Reshape targets; those of activations start with the batch of 1."""
    if value.dtype != np.int64 or value[0] != 1:
        return target
    return numpy_helper.from_array(np.array([-1, *value[1:]], np.int64), target.name)
