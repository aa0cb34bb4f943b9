"""Small nets for the comparison with onnxruntime-training: what it differentiates, and what it gets wrong."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

__all__ = ["SMALL", "small"]

SMALL = {
    "small_residual": (
        "(float[N, 3, 11, 9] x) => (float[N, 5] y)",
        "a = Conv <pads = [1, 0, 1, 2], strides = [2, 1]> (x, w)  b = Relu (a)  c = Conv <pads = [1, 1, 1, 1]> (b, v) "
        "d = Add (b, c)  e = Relu (d)  f = AveragePool <kernel_shape = [2, 3], strides = [2, 2]> (e) "
        "g = GlobalAveragePool (f)  h = Flatten (g)  y = Gemm <transB = 1> (h, u)",
        {"w": (6, 3, 3, 3), "v": (6, 6, 3, 3), "u": (5, 6)},
    ),
    "small_dilated": (
        "(float[N, 4, 12, 12] x) => (float[N, 6] y)",
        "a = Conv <dilations = [2, 2]> (x, w)  b = Relu (a)  c = Conv <group = 2> (b, v)  d = Relu (c) "
        "e = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (d) "
        "f = ReduceMean <axes = [2, 3], keepdims = 0> (e)  y = MatMul (f, u)",
        {"w": (4, 4, 3, 3), "v": (8, 2, 3, 3), "u": (8, 6)},
    ),
    "small_auto_pad": (
        "(float[N, 3, 10, 10] x) => (float[N, 4] y)",
        'a = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)  b = Relu (a) '
        "c = GlobalAveragePool (b)  y = Flatten (c)",
        {"w": (4, 3, 3, 3)},
    ),
    "small_dropout": (
        "(float[N, 3, 8, 8] x) => (float[N, 4] y)",
        "a = Conv (x, w)  b = Relu (a)  c = Dropout (b)  d = GlobalAveragePool (c)  y = Flatten (d)",
        {"w": (4, 3, 3, 3)},
    ),
    "small_average_3d": (
        "(float[N, 2, 6, 6, 6] x) => (float[N, 4] y)",
        "a = Conv (x, w)  b = Relu (a)  c = AveragePool <kernel_shape = [2, 3, 2], strides = [1, 1, 2]> (b) "
        "d = Flatten (c)  y = MatMul (d, u)",
        {"w": (3, 2, 3, 3, 3), "u": (36, 4)},
    ),
}


def small(name: str) -> onnx.ModelProto:
    ends, nodes, weights = SMALL[name]
    model: onnx.ModelProto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net {ends} {{ {nodes} }}'
    )
    rng = np.random.default_rng(0)
    for weight, shape in weights.items():
        values = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:]) / 2))
        model.graph.initializer.append(numpy_helper.from_array(values, weight))
    return model
