"""The spellings of the ort profile that stay in ONNX Runtime's blocked layout: the same maps, and that they do stay."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checking import Array, cosine, ort_run, small_model
from onnx import helper

import onnxgbp

METHODS = ("gradient", "deconvnet", "guided")
RNG = np.random.default_rng(3)


def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, **attributes)


def weight(*shape: int) -> Array:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) / 2)).astype(np.float32)


def net(
    *nodes: onnx.NodeProto, size: int = 13, batch: int | str = "N", opset: int = 17, **constants: Array
) -> onnx.ModelProto:
    """x [N, 16, size, size] through the nodes, from `a` to `b`, between two convolutions; all of `b` is explained."""
    given = {"w1": weight(16, 16, 3, 3), "w2": weight(32, 16, 1, 1), **constants}
    before = node("Conv", ["x", "w1"], ["a"], name="first", pads=[1, 1, 1, 1])
    return small_model(
        [before, *nodes, node("Conv", ["b", "w2"], ["y"], name="last")],
        {"x": [batch, 16, size, size]},
        ("y",),
        given,
        opset=opset,
    )


def maps(model: onnx.ModelProto, x: Array, method: str) -> list[Array]:
    """The attribution of every position of channel 3, by the ort and by the portable profile."""
    converted = (
        onnxgbp.convert(model, method=method, output="y", unit=3, profile=profile) for profile in ("ort", "portable")
    )
    return [ort_run(each, {"x": x})["attribution"] for each in converted]


def photos(size: int = 13, batch: int = 2) -> Array:
    return RNG.standard_normal((batch, 16, size, size)).astype(np.float32)


CLIP = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
CROP = {name: np.array(ends, np.int64) for name, ends in (("from", [2, 0]), ("to", [9, -2]), ("axes", [2, 3]))}
BLOCKS: dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
    "relu": ([node("Relu", ["a"], ["b"])], {}),
    "relu6": ([node("Clip", ["a", "zero", "six"], ["b"])], CLIP),
    "sigmoid": ([node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["b"])], {}),
    "residual": ([node("Relu", ["a"], ["r"]), node("Add", ["r", "a"], ["s"]), node("Relu", ["s"], ["b"])], {}),
    "concat": (
        [
            node("Relu", ["a"], ["r"]),
            node("Concat", ["r", "a"], ["c"], axis=1),
            node("Conv", ["c", "w3"], ["d"]),
            node("Relu", ["d"], ["b"]),
        ],
        {"w3": weight(16, 32, 1, 1)},
    ),
    "norm": (
        [node("BatchNormalization", ["a", "scale", "bias", "bias", "var"], ["n"]), node("Relu", ["n"], ["b"])],
        {name: RNG.uniform(0.5, 2, 16).astype(np.float32) for name in ("scale", "bias", "var")},
    ),
    "dense layer": (
        [
            node("BatchNormalization", ["a", "scale", "bias", "bias", "var"], ["n"]),
            node("Relu", ["n"], ["r"]),
            node("Conv", ["r", "w3"], ["d"]),
            node("Add", ["d", "a"], ["b"]),
        ],
        {name: RNG.uniform(0.5, 2, 16).astype(np.float32) for name in ("scale", "bias", "var")}
        | {"w3": weight(16, 16, 1, 1)},
    ),
    "groups": (
        [node("Conv", ["a", "w3"], ["d"], group=2, pads=[1, 1, 1, 1]), node("Relu", ["d"], ["b"])],
        {"w3": weight(16, 8, 3, 3)},
    ),
    "dilated": (
        [node("Conv", ["a", "w3"], ["d"], dilations=[2, 1], pads=[2, 0, 1, 2]), node("Relu", ["d"], ["b"])],
        {"w3": weight(16, 16, 3, 3)},
    ),
}
for kernel, stride, pads in ((3, 2, [1, 1, 1, 1]), (3, 2, [0, 0, 0, 0]), (1, 2, [0] * 4), (5, 2, [2, 1, 0, 2])):
    geometry = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": pads}
    BLOCKS[f"conv {kernel}/{stride} {pads}"] = (
        [node("Conv", ["a", "w3"], ["d"], **geometry), node("Relu", ["d"], ["b"])],
        {"w3": weight(16, 16, kernel, kernel)},
    )
    BLOCKS[f"depthwise {kernel}/{stride} {pads}"] = (
        [node("Conv", ["a", "w3"], ["d"], group=16, **geometry), node("Relu", ["d"], ["b"])],
        {"w3": weight(16, 1, kernel, kernel)},
    )
for kernel, stride, pads, ceil in ((2, 2, [0] * 4, 0), (3, 2, [1] * 4, 0), (3, 2, [0] * 4, 1), (3, 1, [1, 1, 1, 1], 0)):
    geometry = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": pads, "ceil_mode": ceil}
    relu = node("Relu", ["a"], ["r"])
    BLOCKS[f"max pool {kernel}/{stride} {pads} {ceil}"] = ([relu, node("MaxPool", ["r"], ["b"], **geometry)], {})
    BLOCKS[f"average pool {kernel}/{stride} {pads} {ceil}"] = (
        [relu, node("AveragePool", ["r"], ["b"], count_include_pad=1, **geometry)],
        {},
    )

pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
BLOCKS |= {
    "relu6 and pool": ([node("Clip", ["a", "zero", "six"], ["r"]), node("MaxPool", ["r"], ["b"], **pool)], CLIP),
    "two pools": (
        [
            node("Relu", ["a"], ["r"]),
            node("MaxPool", ["r"], ["p"], **pool),
            node("MaxPool", ["r"], ["q"], **pool),
            node("Add", ["p", "q"], ["b"]),
        ],
        {},
    ),
    "cropped": ([node("Relu", ["a"], ["r"]), node("Slice", ["r", "from", "to", "axes"], ["b"])], CROP),
    "cropped average": (
        [
            node("AveragePool", ["a"], ["p"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
            node("Slice", ["p", "from", "to", "axes"], ["b"]),
        ],
        CROP,
    ),
    "window in the padding": (  # which onnx counts and no runtime does
        [
            node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=[1] * 4, ceil_mode=1),
            node("Relu", ["p"], ["b"]),
        ],
        {},
    ),
    "pool of a pool": (
        [node("Relu", ["a"], ["r"]), node("MaxPool", ["r"], ["p"], **pool), node("MaxPool", ["p"], ["b"], **pool)],
        {},
    ),
    "two strided": (  # whose gradients are added before they are laid out
        [
            node("Relu", ["a"], ["r"]),
            node("Conv", ["r", "w3"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
            node("Conv", ["r", "w4"], ["d"], strides=[2, 2]),
            node("Add", ["c", "d"], ["b"]),
        ],
        {"w3": weight(16, 16, 3, 3), "w4": weight(16, 16, 1, 1)},
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("name", BLOCKS)
def test_both_profiles_give_one_map(name: str, size: int, method: str) -> None:
    nodes, constants = BLOCKS[name]
    fast, portable = maps(net(*nodes, size=size, **constants), photos(size), method)
    assert np.any(portable)
    assert cosine(fast, portable) >= 0.999999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("opset", [9, 10, 13])
def test_older_opsets(opset: int, method: str) -> None:
    strided = node("Conv", ["a", "w3"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1])
    pool = node("MaxPool", ["r"], ["b"], kernel_shape=[3, 3], strides=[2, 2])
    model = net(strided, node("Relu", ["c"], ["r"]), pool, opset=opset, w3=weight(16, 16, 3, 3))
    fast, portable = maps(model, photos(), method)
    assert onnxgbp.convert(model, output="y", unit=3).opset_import[0].version == opset
    assert cosine(fast, portable) >= 0.999999


@pytest.mark.parametrize("method", ["gradient", "guided"])
@pytest.mark.parametrize(("kind", "top"), [("relu", None), ("relu6", 6.0), ("relu6", 1.0), ("relu6", 0.7)])
def test_a_mask_is_exact_at_the_ends_and_near_them(kind: str, top: float | None, method: str) -> None:
    """From 0 and -0 over the smallest normal number to the neighbours of the top: open strictly between the bounds."""
    nodes, constants = BLOCKS[kind]
    six = np.float32(top or 6)
    if top is not None:
        constants = constants | {"six": six}
    edges = [
        0.0,
        -0.0,
        1.2e-38,
        -1.2e-38,
        1e-30,
        1e-7,
        1.0,
        -1.0,
        np.nextafter(six, 0),
        six,
        np.nextafter(six, 7),
        1e30,
    ]
    x = np.resize(np.array(edges, np.float32), (1, 16, 13, 13))
    identity = np.zeros((16, 16, 3, 3), np.float32)
    identity[range(16), range(16), 1, 1] = 1
    signs = np.resize(np.array([1, -1], np.float32), (1, 16, 1, 1))
    model = net(*nodes, w1=identity, w2=np.abs(weight(32, 16, 1, 1)) * signs, **constants)
    open_at = (x > 0) & (x < six) if kind == "relu6" else x > 0
    fast, portable = maps(model, x, method)
    passing = signs > 0 if method == "guided" else np.ones_like(signs, bool)
    assert np.array_equal(fast != 0, open_at & passing)
    assert np.array_equal(fast, portable)


@pytest.mark.parametrize(("kernel", "pads"), [(2, [0] * 4), (3, [0] * 4), (3, [1] * 4)])
def test_the_first_maximum_wins_every_tie(kernel: int, pads: list[int]) -> None:
    """Whole numbers from 0 to 2, so that most windows have several maxima, and many nothing but zeros."""
    pool = node("MaxPool", ["a"], ["b"], kernel_shape=[kernel, kernel], strides=[2, 2], pads=pads)
    identity = np.zeros((16, 16, 3, 3), np.float32)
    identity[range(16), range(16), 1, 1] = 1
    x = RNG.integers(0, 3, (2, 16, 12, 12)).astype(np.float32)
    x[0, :8] = 0
    fast, portable = maps(net(pool, size=12, w1=identity), x, "gradient")
    assert np.array_equal(fast != 0, portable != 0)
    assert np.allclose(fast, portable, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kernel", "pads"), [(2, [0] * 4), (2, [1] * 4), (3, [0] * 4), (3, [1] * 4)])
def test_ties_behind_a_relu(kernel: int, pads: list[int], method: str) -> None:
    """Where deconvnet gives the gradient of a window of zeros to its first element, and the others to none."""
    behind = node("MaxPool", ["r"], ["b"], kernel_shape=[kernel, kernel], strides=[2, 2], pads=pads)
    identity = np.zeros((16, 16, 3, 3), np.float32)
    identity[range(16), range(16), 1, 1] = 1
    x = RNG.integers(-2, 3, (2, 16, 12, 12)).astype(np.float32)
    x[0, :8] = 0
    fast, portable = maps(net(node("Relu", ["a"], ["r"]), behind, size=12, w1=identity), x, method)
    assert np.array_equal(fast != 0, portable != 0)
    assert np.allclose(fast, portable, rtol=1e-6)


@pytest.mark.parametrize("method", ["gradient", "guided"])
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_a_gate_is_asked_on_the_small_side_of_a_pool(profile: str, method: str) -> None:
    """x is 12 wide and y 6: nothing that could be a gate's is on x's side."""
    model = net(*BLOCKS["max pool 2/2 [0, 0, 0, 0] 0"][0], size=12)
    model = onnxgbp.convert(model, method=method, profile=profile, output="y", unit=3)
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    wide = {value.name for value in known if value.type.tensor_type.shape.dim[-1].dim_value == 12}
    gates = [each for each in model.graph.node if each.op_type in ("Where", "HardSigmoid", "Relu", "Mul")]
    gates = [each for each in gates if each.name.startswith("gradient/")]
    assert gates
    assert wide
    assert not wide & {each.output[0] for each in gates}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "pads"),
    [
        (3, 24, 7, 2, [3] * 4),
        (3, 24, 7, 2, [2, 3, 3, 2]),
        (3, 28, 6, 2, [0] * 4),
        (1, 32, 5, 2, [2] * 4),
        (3, 26, 7, 2, [3] * 4),
        (3, 24, 3, 2, [1] * 4),
        (3, 24, 3, 1, [1] * 4),
        (4, 23, 5, 1, [0] * 4),
        (5, 24, 3, 1, [1] * 4),
    ],
)
def test_images_of_few_channels(
    channels: int, size: int, kernel: int, stride: int, pads: list[int], method: str
) -> None:
    given = {"w1": weight(16, channels, kernel, kernel), "w2": weight(32, 16, 1, 1)}
    nodes = [
        node("Conv", ["x", "w1"], ["a"], name="first", strides=[stride, stride], pads=pads),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["y"], name="last"),
    ]
    model = small_model(nodes, {"x": ["N", channels, size, size]}, ("y",), given, opset=17)
    fast, portable = maps(model, RNG.standard_normal((2, channels, size, size)).astype(np.float32), method)
    assert np.any(portable)
    assert np.allclose(fast, portable, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [32, 36, 40])
@pytest.mark.parametrize(("kernel", "pads"), [(2, [0] * 4), (3, [0] * 4), (3, [1] * 4), (3, [0, 0, 1, 1])])
def test_an_image_behind_a_pool(kernel: int, pads: list[int], size: int, method: str) -> None:
    """Whose gradient is made of the pool's phases, without the whole between."""
    given = {"w1": weight(16, 3, 7, 7), "w2": weight(32, 16, 1, 1)}
    nodes = [
        node("Conv", ["x", "w1"], ["a"], name="first", strides=[2, 2], pads=[3] * 4),
        node("Relu", ["a"], ["r"]),
        node("MaxPool", ["r"], ["b"], kernel_shape=[kernel, kernel], strides=[2, 2], pads=pads),
        node("Conv", ["b", "w2"], ["y"], name="last"),
    ]
    model = small_model(nodes, {"x": ["N", 3, size, size]}, ("y",), given, opset=17)
    fast, portable = maps(model, RNG.standard_normal((2, 3, size, size)).astype(np.float32), method)
    assert np.any(portable)
    assert np.allclose(fast, portable, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["argmax", "input", "top2", "input2"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_the_row_of_a_class_is_looked_up(transposed: int, target: str) -> None:
    """Whichever way the last weight lies; nothing multiplies all rows of it with a seed of 0 and 1."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["r"]),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w"], ["y"], transB=transposed),
    ]
    given = {"w1": weight(16, 16, 3, 3), "w": weight(10, 16) if transposed else weight(16, 10)}
    model = small_model(nodes, {"x": ["N", 16, 8, 8]}, ("y",), given, opset=17)
    feeds: dict[str, Array] = {"x": photos(8)}
    if target.startswith("input"):
        feeds["target"] = np.array([3, -1]) if target == "input" else np.array([[3, 9], [0, 4]])
    fast, portable = (onnxgbp.convert(model, target=target, profile=profile) for profile in ("ort", "portable"))
    assert "MatMul" in {each.op_type for each in portable.graph.node}
    assert "MatMul" not in {each.op_type for each in fast.graph.node}
    maps = [ort_run(each, feeds)["attribution"] for each in (fast, portable)]
    assert np.any(maps[0])
    assert np.allclose(*maps, rtol=1e-5, atol=1e-7)


def test_negative_maxima_beat_the_padding() -> None:
    pool = node("MaxPool", ["a"], ["b"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    identity = np.zeros((16, 16, 3, 3), np.float32)
    identity[range(16), range(16), 1, 1] = 1
    fast, portable = maps(net(pool, size=12, w1=identity), -1 - np.abs(photos(12)), "gradient")
    assert np.array_equal(fast != 0, portable != 0)


def renamed(last: onnx.NodeProto, output: str) -> onnx.NodeProto:
    """The same node with another output."""
    copy = onnx.NodeProto.FromString(last.SerializeToString())
    copy.output[0] = output
    return copy


def operators(model: onnx.ModelProto, folder: Path) -> collections.Counter[str]:
    """What ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # that the file fits this processor alone is what is wanted
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return collections.Counter(f"{each.domain}::{each.op_type}" for each in nodes)


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("name", ["relu", "relu6", "residual", "conv 3/2 [1, 1, 1, 1]", "max pool 3/2 [0, 0, 0, 0] 1"])
def test_nothing_leaves_the_blocked_layout(name: str, batch: int | str, tmp_path: Path) -> None:
    nodes, constants = BLOCKS[name]
    classes = node("GlobalAveragePool", ["c"], ["b"])
    model = net(*nodes[:-1], renamed(nodes[-1], "c"), classes, size=12, batch=batch, **constants)
    if "com.microsoft.nchwc::Conv" not in operators(model, tmp_path):
        pytest.skip("ONNX Runtime has no blocked layout on this processor")
    found = operators(onnxgbp.convert(model), tmp_path)
    assert not {"::Where", "::Greater", "::Conv", "com.microsoft::FusedConv"} & set(found)
    # x, the seed and the gradient behind the pool enter, their like leave; so does what is laid out over a stride: a
    # part for each phase, or for each element of a window.
    laid_out = found["::ConvTranspose"]
    assert found["com.microsoft.nchwc::ReorderInput"] <= 3 + 2 * laid_out
    assert found["com.microsoft.nchwc::ReorderOutput"] <= 3 + 10 * laid_out
