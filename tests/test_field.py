"""The receptive field that is told from the graph, against the support of gradients."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from onnxgbp.convert import GradientGraph
from onnxgbp.field import Field, FieldFinder
from onnxgbp.model import load

RNG = np.random.default_rng(11)


def net(body: str, shape: str = "N,3,17,19", opset: int = 18, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """`body` makes y of x; weights are random and positive, so that no sum of paths cancels."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}]> net (float[{shape}] x) => (float[N,C,H,W] y) {{ {body} }}"""
    )
    for name, dims in weights.items():
        values = RNG.uniform(0.5, 1, dims).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def fields(model: onnx.ModelProto, shape: tuple[int, ...], layer: str = "y") -> FieldFinder:
    return FieldFinder(load(model).model, "x", shape, layer)


def support(model: onnx.ModelProto, shape: tuple[int, ...], samples: int = 24) -> dict[tuple[int, int], list[object]]:
    """By place of y: the first and the last index along each axis of x that some gradients reach; None for all."""
    graph = GradientGraph.build(load(model), target="seed", output="y")
    session = onnxruntime.InferenceSession(graph.render(method="gradient").SerializeToString())
    x = np.random.default_rng(5).uniform(0.1, 1, (samples, *shape[1:])).astype(np.float32)
    y = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})[0]
    found = {}
    for row, column in np.ndindex(y.shape[2:]):
        seed = np.zeros_like(y)
        seed[:, :, row, column] = 1
        touched = np.nonzero(session.run(["attribution"], {"x": x, "seed": seed})[0])[1:]
        if touched[0].size:  # else a place that nothing is added to
            ends = [(int(indices.min()), int(indices.max())) for indices in touched]
            found[row, column] = [None if e == (0, size - 1) else e for e, size in zip(ends, shape[1:])]
    return found


NETS: dict[str, onnx.ModelProto] = {
    "strides and asymmetric pads": net(
        "a = Conv <strides = [2, 2], pads = [0, 0, 1, 1]> (x, W)  b = Relu(a)"
        "  c = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (b)  y = Conv <pads = [1, 1, 1, 1]> (c, V)",
        W=(4, 3, 3, 3),
        V=(5, 4, 3, 3),
    ),
    "a ragged edge that padding covers": net(
        "a = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)  y = Conv <pads = [2, 2, 2, 2]> (a, W)",
        W=(4, 3, 3, 3),
    ),
    "dilation and groups": net(
        "a = Conv <dilations = [2, 3], pads = [2, 1, 2, 1]> (x, W)  b = Concat <axis = 1> (a, a)"
        "  y = Conv <group = 2, strides = [2, 1]> (b, V)",
        W=(4, 3, 3, 3),
        V=(4, 4, 3, 1),
    ),
    "auto_pad": net(
        'a = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, W)  '
        'y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (a, V)',
        W=(4, 3, 4, 4),
        V=(4, 4, 2, 2),
    ),
    "ceil_mode": net(
        "a = AveragePool <kernel_shape = [3, 3], strides = [3, 3], ceil_mode = 1> (x)  y = Conv (a, W)", W=(4, 3, 2, 2)
    ),
    "channel shuffle": net(
        "a = Conv <strides = [2, 2]> (x, W)  s = Constant <value_ints = [0, 2, 2, 8, 9]> ()  b = Reshape(a, s)"
        "  c = Transpose <perm = [0, 2, 1, 3, 4]> (b)  t = Constant <value_ints = [0, 4, 8, 9]> ()  y = Reshape(c, t)",
        W=(4, 3, 2, 2),
    ),
    "a picture of one channel, turned by a Reshape": net(
        "s = Constant <value_ints = [0, 1, 17, 19]> ()  a = Reshape(x, s)  y = Conv <strides = [2, 1]> (a, W)",
        shape="N,17,19,1",
        W=(4, 1, 3, 3),
    ),
    "every second pixel, as a Focus layer takes them": net(
        "one = Constant <value_ints = [0, 1]> ()  big = Constant <value_ints = [1000, 1000]> ()"
        "  two = Constant <value_ints = [2, 2]> ()  axes = Constant <value_ints = [2, 3]> ()"
        "  zero = Constant <value_ints = [0, 0]> ()  p = Constant <value_ints = [0, 0, 0, 0, 0, 0, 1, 1]> ()"
        "  wide = Pad(x, p)  a = Slice(wide, zero, big, axes, two)  b = Slice(wide, one, big, axes, two)"
        "  c = Concat <axis = 1> (a, b)  y = Conv <pads = [1, 1, 1, 1]> (c, W)",
        W=(4, 6, 3, 3),
    ),
    "backwards": net(
        "s = Constant <value_ints = [-1]> ()  e = Constant <value_ints = [-1000]> ()"
        "  m = Constant <value_ints = [-1]> ()  h = Constant <value_ints = [2]> ()  a = Slice(x, s, e, h, m)"
        "  y = Conv (a, W)",
        W=(4, 3, 3, 3),
    ),
    "reflected edges": net(
        'p = Constant <value_ints = [0, 0, 3, 2, 0, 0, 1, 2]> ()  a = Pad <mode = "reflect"> (x, p)  y = Conv (a, W)',
        W=(4, 3, 3, 3),
    ),
    "blocks": net(
        "a = SpaceToDepth <blocksize = 2> (x)  b = Conv (a, W)  y = DepthToSpace <blocksize = 2> (b)",
        shape="N,3,12,14",
        W=(4, 12, 2, 2),
    ),
    "transposed convolution": net(
        "a = Conv <strides = [2, 2]> (x, W)  "
        "y = ConvTranspose <strides = [2, 3], pads = [1, 0, 0, 2], output_padding = [1, 0]> (a, V)",
        W=(4, 3, 3, 3),
        V=(4, 3, 4, 5),
    ),
    "channels last, mixed by MatMul": net(
        "a = Transpose <perm = [0, 2, 3, 1]> (x)  b = MatMul(a, W)  c = Gelu(b)"
        "  d = Transpose <perm = [0, 3, 1, 2]> (c)  y = Conv (d, V)",
        opset=20,
        W=(3, 4),
        V=(2, 4, 3, 2),
    ),
    "split and joined along the picture": net(
        "n = Constant <value_ints = [8, 9]> ()  a, b = Split <axis = 2> (x, n)  c = Concat <axis = 2> (b, a)"
        "  y = Conv (c, W)",
        W=(4, 3, 3, 3),
    ),
    "some rows": net(
        "i = Constant <value_ints = [12, 3, 7]> ()  a = Gather <axis = 2> (x, i)  y = Conv (a, W)", W=(2, 3, 2, 2)
    ),
    "a mean over the width": net(
        "n = Constant <value_ints = [3]> ()  a = ReduceMean(x, n)  y = Conv <strides = [2, 1]> (a, W)", W=(2, 3, 3, 1)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_field_is_the_support_of_the_gradient(name: str) -> None:
    dims = NETS[name].graph.input[0].type.tensor_type.shape.dim
    shape = (1, *(dim.dim_value for dim in dims[1:]))
    finder = fields(NETS[name], shape)
    for (row, column), expected in support(NETS[name], shape).items():
        found = finder((None, None, (row, row), (column, column)))
        assert not found.lost
        assert list(found.spans[1:]) == expected, (row, column)


def test_a_box_of_units_and_a_size_that_the_model_leaves_open() -> None:
    model = net("a = Conv <strides = [2, 2]> (x, W)  y = Relu(a)", shape="N,3,H,W_", W=(4, 3, 3, 3))
    assert fields(model, (1, 3, 40, 30))((None, None, (2, 5), (0, 0))) == Field((None, None, (4, 12), (0, 2)))
    assert fields(model, (2, 3, 13, 30))((None, None, (0, 5), (13, 13))).spans == (None, None, None, (26, 28))


def test_gates_and_statistics_have_no_place() -> None:
    gated = net(
        "a = Conv <pads = [1, 1, 1, 1]> (x, W)  m = GlobalAveragePool(a)  g = Sigmoid(m)  b = Mul(a, g)"
        "  n = InstanceNormalization(b, S, B)  y = Relu(n)",
        W=(4, 3, 3, 3),
        S=(4,),
        B=(4,),
    )
    assert fields(gated, (1, 3, 17, 19))((None, None, (5, 5), (0, 0))) == Field((None, None, (4, 6), (0, 1)))


def test_all_of_the_picture_where_nothing_is_known() -> None:
    model = net(
        "a = Conv (x, W)  s = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()  big = Resize(a, , s)"
        "  y = Conv (big, V)",
        W=(4, 3, 3, 3),
        V=(4, 4, 3, 3),
    )
    found = fields(model, (1, 3, 17, 19))((None, None, (5, 5), (0, 0)))
    assert found.spans == (None,) * 4
    assert "big" in found.lost


def test_the_default_network(squeezenet: object) -> None:
    finder = FieldFinder(load(str(squeezenet)).model, "image", (1, 3, 224, 224), "fire5/concat")
    assert finder((None, None, (13, 13), (0, 0))).spans == (None, None, (80, 142), (0, 38))  # 63 pixels
