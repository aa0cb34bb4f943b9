"""Scatter, Compress, Einsum, Resize, Slice, Clip and MaxUnpool in the forms that the wheel's cases lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from checking import Array, apart, check_vjp, ort_run, small_model, written_model
from onnx import ModelProto, TensorProto, helper

import onnxgbp

PROFILES = ("ort", "portable")
DOUBLE = TensorProto.DOUBLE


def assert_right(model: ModelProto, feeds: Mapping[str, Array], *, linear: bool) -> None:
    for profile in PROFILES:
        for name in feeds:
            figures = check_vjp(model, feeds, output="y", wrt=[name], linear=linear, profile=profile)
            assert all(figure.right for figure in figures), [f for f in figures if not f.right]


def values(*shapes: Sequence[int]) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {f"x{i}": apart(shape, rng, i) for i, shape in enumerate(shapes)}


# --- Scatter --------------------------------------------------------------------------------------

ELEMENTS = np.array([[0, 2, 0], [2, 2, 1]])  # several updates meet at one place
ROWS = np.array([[2], [0], [2]])


def scatter(operator: str, reduction: str, opset: int, axis: int = 1, dtype: int = DOUBLE) -> ModelProto:
    given = {"reduction": reduction} if reduction else {}
    if operator != "ScatterND":
        given["axis"] = axis
    indices = ROWS if operator == "ScatterND" else ELEMENTS
    updates = [3, 4] if operator == "ScatterND" else [2, 3]
    node = helper.make_node(operator, ["x0", "i", "x1"], ["y"], **given)
    return small_model([node], {"x0": [3, 4], "x1": updates}, constants={"i": indices}, opset=opset, dtype=dtype)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_elements(axis: int, reduction: str) -> None:
    linear = reduction == "add"
    assert_right(scatter("ScatterElements", reduction, 18, axis), values([3, 4], [2, 3]), linear=linear)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_scatter_nd(reduction: str) -> None:
    assert_right(scatter("ScatterND", reduction, 18), values([3, 4], [3, 4]), linear=reduction == "add")


@pytest.mark.parametrize(("operator", "opset"), [("Scatter", 9), ("ScatterElements", 11)])
def test_scatter_without_reduction(operator: str, opset: int) -> None:
    node = helper.make_node(operator, ["x0", "i", "x1"], ["y"], axis=1)
    indices = np.array([[1, 3, 0], [2, 0, 3]])  # without a reduction no two may meet
    model = small_model(
        [node], {"x0": [3, 4], "x1": [2, 3]}, constants={"i": indices}, opset=opset, dtype=TensorProto.DOUBLE
    )
    assert_right(model, values([3, 4], [2, 3]), linear=False)


TORCH = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@pytest.mark.parametrize("zeros", [(), ((0, 0),), ((0, 0), (0, 2)), ((1, 0),)])
@pytest.mark.parametrize("own", [(), ((0, 0),), ((1, 2),)])
@pytest.mark.parametrize("reduction", list(TORCH))
def test_scatter_with_zeros_and_ties_as_torch(reduction: str, own, zeros) -> None:
    """Zeros in a product, of the data, of one update, of two that meet; and ties, which share the gradient."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    data, updates = (rng.integers(1, 3, shape).astype(np.float32) for shape in ((3, 4), (2, 3)))
    for array, places in ((data, own), (updates, zeros)):
        for place in places:
            array[place] = 0
    seed = rng.standard_normal((3, 4)).astype(np.float32)
    model = scatter("ScatterElements", reduction, 18, dtype=TensorProto.FLOAT)
    converted = onnxgbp.convert(model, method="gradient", target="seed", output="y")
    got = ort_run(converted, {"x0": data, "x1": updates, "seed": seed})
    x, u = torch.tensor(data, requires_grad=True), torch.tensor(updates, requires_grad=True)
    y = x.scatter_reduce(1, torch.tensor(ELEMENTS), u, TORCH[reduction], include_self=True)
    y.backward(torch.tensor(seed))
    np.testing.assert_array_equal(got["y"], y.detach().numpy())
    np.testing.assert_allclose(got["attribution_x0"], x.grad.numpy(), atol=1e-6)  # float32
    np.testing.assert_allclose(got["attribution_x1"], u.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_compress(axis: int | None) -> None:
    size = 12 if axis is None else (3, 4)[axis]
    kept = np.arange(size) % 3 != 1
    node = helper.make_node("Compress", ["x0", "kept"], ["y"], **({} if axis is None else {"axis": axis}))
    model = small_model([node], {"x0": [3, 4]}, constants={"kept": kept}, opset=11, dtype=DOUBLE)
    assert_right(model, values([3, 4]), linear=True)


@pytest.mark.parametrize(
    ("batch", "indices"),
    [
        (0, [[0, 1], [1, 2], [0, 1]]),
        (1, [[[2, 0], [1, 3], [2, 0]], [[0, 0], [0, -1], [1, 1]]]),
        (2, [[[1], [0], [1]], [[3], [3], [2]]]),
        (1, [[2], [0]]),
    ],
)
@pytest.mark.parametrize("free", [False, True])
def test_gather_nd(batch: int, indices: Sequence[object], free: bool) -> None:
    node = helper.make_node("GatherND", ["x0", "i"], ["y"], batch_dims=batch)
    shape = ["N", 3, 4] if free and batch else [2, 3, 4]
    model = small_model([node], {"x0": shape}, constants={"i": np.array(indices)}, opset=13, dtype=DOUBLE)
    assert_right(model, values([2, 3, 4]), linear=True)


# --- Einsum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ii->i", [(3, 3)]),
        ("ii->", [(3, 3)]),
        ("ii", [(3, 3)]),
        ("iii->i", [(3, 3, 3)]),
        ("iji->j", [(3, 4, 3)]),
        ("bii,bi->b", [(2, 3, 3), (2, 3)]),
        ("ij,jj->ij", [(2, 3), (3, 3)]),
        ("...ii->...i", [(2, 4, 3, 3)]),
        ("...ij,...jk->...ik", [(2, 1, 3, 4), (1, 5, 4, 2)]),
        ("...ij,...jk", [(1, 3, 4), (2, 4, 2)]),
        ("...ij,jk->...ik", [(2, 5, 3, 4), (4, 2)]),
        ("i...,i...->...", [(3, 1, 4), (3, 2, 1)]),
        ("i...->i...", [(3, 1)]),
        ("...i,...i->...i", [(4, 3), (1, 3)]),
        ("a...,...->a...", [(2, 3, 1), (3, 5)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    feeds = values(*shapes)
    node = helper.make_node("Einsum", list(feeds), ["y"], equation=equation)
    model, single = (
        small_model([node], dict(zip(feeds, shapes, strict=True)), opset=12, dtype=dtype)
        for dtype in (DOUBLE, TensorProto.FLOAT)
    )
    for profile in PROFILES:
        for name in feeds:
            figures = check_vjp(model, feeds, output="y", wrt=[name], linear=True, profile=profile)
            # linear, but einsum adds in another order than the difference: a few roundings of sums of a dozen terms
            assert all(figure.error <= 1e-10 for figure in figures)
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(array, requires_grad=True) for array in feeds.values()]
    y = torch.einsum(equation, *tensors)
    seed = np.random.default_rng(1).standard_normal(tuple(y.shape))
    y.backward(torch.tensor(seed))
    converted = onnxgbp.convert(single, method="gradient", target="seed", output="y", wrt=list(feeds))
    got = ort_run(converted, {n: a.astype(np.float32) for n, a in ({**feeds, "seed": seed}).items()})
    for name, tensor in zip(feeds, tensors, strict=True):
        attribution = got["attribution" if len(feeds) == 1 else f"attribution_{name}"]
        np.testing.assert_allclose(attribution, tensor.grad.numpy(), atol=2e-5)  # float32


# --- Resize ---------------------------------------------------------------------------------------


def resize(size, attributes, opset=19, **given) -> tuple[ModelProto, ModelProto]:
    """The model in float64 and in float32; given: roi, scales or sizes."""
    names = ["x0", *(name if name in given else "" for name in ("roi", "scales", "sizes"))]
    node = helper.make_node("Resize", names, ["y"], **attributes)
    made = []
    for dtype in (DOUBLE, TensorProto.FLOAT):
        constants = {n: np.array(v, np.int64 if n == "sizes" else np.float32) for n, v in given.items()}
        made.append(small_model([node], {"x0": size}, constants=constants, opset=opset, dtype=dtype))
    return made[0], made[1]


CROP = {"coordinate_transformation_mode": "tf_crop_and_resize"}
SIZE = (1, 2, 5, 7)
RESIZES = {
    "crop": (SIZE, {**CROP, "mode": "linear"}, {"roi": [0, 0, 0.2, 0.1, 1, 1, 0.9, 0.7], "sizes": [1, 2, 4, 6]}),
    "crop beyond": (
        SIZE,
        {**CROP, "mode": "linear", "extrapolation_value": 9.0},
        {"roi": [0, 0, -0.3, 0.4, 1, 1, 0.9, 1.3], "sizes": [1, 2, 6, 8]},
    ),
    "crop nearest": (SIZE, {**CROP, "mode": "nearest"}, {"roi": [0, 0, 0.1, 0, 1, 1, 0.8, 1], "sizes": [1, 2, 3, 9]}),
    "crop backwards": (SIZE, {**CROP, "mode": "linear"}, {"roi": [0, 0, 0.9, 0, 1, 1, 0.1, 1], "sizes": [1, 2, 3, 7]}),
    "crop to one": (SIZE, {**CROP, "mode": "linear"}, {"roi": [0, 0, 0.3, 0, 1, 1, 0.8, 1], "sizes": [1, 2, 1, 7]}),
    "crop by scales": (
        SIZE,
        {**CROP, "mode": "linear"},
        {"roi": [0, 0, 0.2, 0.1, 1, 1, 0.9, 0.7], "scales": [1, 1, 2, 3]},
    ),
    "sizes that no float32 ratio gives": ((1, 1, 3, 49), {"mode": "linear"}, {"sizes": [1, 1, 10, 1]}),
    "a scale that rounds to the same size": ((1, 1, 3, 4), {"mode": "linear"}, {"scales": [1, 1, 1.2, 2.3]}),
    "one of 49": (
        (1, 1, 49, 5),
        {**CROP, "mode": "linear"},
        {"roi": [0, 0, 0.2, 0, 1, 1, 0.7, 1], "sizes": [1, 1, 1, 5]},
    ),
    "antialias": (SIZE, {"mode": "linear", "antialias": 1}, {"sizes": [1, 2, 3, 4]}),
    "antialias cubic": (SIZE, {"mode": "cubic", "antialias": 1}, {"scales": [1, 1, 0.6, 0.5]}),
    "exclude outside": (SIZE, {"mode": "cubic", "exclude_outside": 1}, {"sizes": [1, 2, 8, 9]}),
    "not larger": (
        (1, 2, 3, 5),
        {"mode": "linear", "keep_aspect_ratio_policy": "not_larger", "axes": [2, 3]},
        {"sizes": [7, 8]},
    ),
    "not smaller": (
        (1, 2, 3, 5),
        {"mode": "linear", "keep_aspect_ratio_policy": "not_smaller", "axes": [3, 2]},
        {"sizes": [8, 4]},
    ),
    "symmetric": (
        SIZE,
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
        {"scales": [1, 1, 1.7, 0.7]},
    ),
    "pytorch": (
        SIZE,
        {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
        {"sizes": [1, 2, 1, 9]},
    ),
}


EVALUATOR_AT_FAULT = {
    "one of 49": "its length is 49 (1 / 49) < 1, so that it does not read the middle",
    "pytorch": "reads a single entry at -0.5, where the standard has 0",
}


def assert_linear_right(model: ModelProto, x: Array, profile: str = "ort") -> None:
    """The gradient of a linear y(x0) against a difference, both in ONNX Runtime."""
    seed = np.random.default_rng(1).standard_normal(ort_run(model, {"x0": x})["y"].shape).astype(np.float32)
    converted = onnxgbp.convert(model, method="gradient", target="seed", output="y", profile=profile)
    assert converted.opset_import[0].version == model.opset_import[0].version
    results = ort_run(converted, {"x0": x, "seed": seed})
    v = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    above, below = (ort_run(model, {"x0": x + sign * v})["y"] for sign in (1, -1))
    change = float((seed.astype(np.float64) * (above.astype(np.float64) - below)).sum() / 2)
    product = results["attribution"].astype(np.float64) * v
    assert np.any(product)
    assert abs(product.sum() - change) <= 1e-5 * np.linalg.norm(product)  # float32


@pytest.mark.parametrize("name", RESIZES)
def test_resize(name: str) -> None:
    size, attributes, given = RESIZES[name]
    wide, narrow = resize(size, attributes, **given)
    feeds = values(size)
    for profile in PROFILES if name not in EVALUATOR_AT_FAULT else ():
        figures = check_vjp(wide, feeds, output="y", wrt=["x0"], linear=True, profile=profile)
        # The matrix is made with scales and a roi of float32, as the node has them: rounding alone.
        assert all(figure.error <= 1e-9 for figure in figures), figures
    assert_linear_right(narrow, feeds["x0"].astype(np.float32))


# What resizes x0 [N, 2, H, W] to y, in the textual syntax of ONNX, with the opset.
LEADING = "shape = Shape (x0)  two = Slice (shape, zero, second)"
FREE = {
    "to a fixed size": (
        f'{LEADING}  sizes = Concat <axis=0> (two, to)  y = Resize <mode="linear"> (x0, , , sizes)',
        13,
    ),
    "to a fixed size, with empty inputs": (
        f'{LEADING}  sizes = Concat <axis=0> (two, to)  y = Resize <mode="cubic"> (x0, none, none, sizes)',
        11,
    ),
    "aligned": (
        f"{LEADING}  sizes = Concat <axis=0> (two, to)"
        '  y = Resize <mode="linear", coordinate_transformation_mode="align_corners"> (x0, , , sizes)',
        17,
    ),
    "antialiased": ('y = Resize <mode="linear", antialias=1, axes=[2, 3]> (x0, , , to)', 18),
    "nearest, two axes": ('y = Resize <mode="nearest", nearest_mode="floor", axes=[3, 2]> (x0, , factors)', 18),
    "to the size of another tensor": (
        f"pool = AveragePool <kernel_shape=[2, 2], strides=[2, 2]> (x0)  {LEADING}  sizes = Shape (x0)"
        "  y = Resize <mode='linear'> (pool, , , sizes)".replace("'", '"'),
        13,
    ),
    "by scales": ('y = Resize <mode="linear"> (x0, , scales)', 13),
    "by scales, opset 10": ('y = Resize <mode="linear"> (x0, scales)', 10),
    "by scales, opset 9": ('y = Upsample <mode="linear"> (x0, scales)', 9),
    "to less, opset 10": ("y = Resize (x0, less)", 10),
    "by scales computed": (
        "shape = Shape (x0)  wide = Cast <to=1> (shape)  goal = Mul (wide, scales)  ratio = Div (goal, wide)"
        '  y = Resize <mode="linear"> (x0, , ratio)',
        13,
    ),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dims", [("N", 2, "H", "W"), ("N", 2, 6, 8), (2, 2, 6, 8)])
@pytest.mark.parametrize("name", FREE)
def test_resize_of_free_sizes(name: str, dims: tuple[int | str, ...], profile: str) -> None:
    text, opset = FREE[name]
    ints = {"zero": [0], "second": [2], "to": [4, 9]}
    floats: dict[str, list[float]] = {"scales": [1, 1, 2, 1.5], "less": [1, 1, 0.7, 2], "factors": [0.5, 2], "none": []}
    constants = {n: np.array(v, np.int64) for n, v in ints.items()}
    constants |= {n: np.array(v, np.float32) for n, v in floats.items()}
    model = written_model(text, {"x0": dims}, constants, opset=opset)
    assert_linear_right(model, values([2, 2, 6, 8])["x0"].astype(np.float32), profile)


@pytest.mark.parametrize(
    ("attributes", "given", "why"),
    [
        ({**CROP, "mode": "linear"}, {"roi": [0, 0, 0.2, 0, 1, 1, 1, 1], "sizes": [1, 1, 2, 2]}, "it crops a free dim"),
        (
            {"mode": "linear", "keep_aspect_ratio_policy": "not_larger", "axes": [2, 3]},
            {"sizes": [7, 8]},
            "it keeps the aspect ratio of a free dim",
        ),
    ],
)
def test_resize_of_free_sizes_refused(attributes, given, why: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=why):
        onnxgbp.convert(resize((1, 1, "H", "W"), attributes, **given)[1], output="y", target="seed")


@pytest.mark.parametrize(
    ("attributes", "given", "why"),
    [
        ({"mode": "linear"}, {"scales": [1, 1, 1.2, 1.1]}, "its scales round to the size of its input"),
        (
            {**CROP, "mode": "linear"},
            {"roi": [0, 0, 0.2, 0, 1, 1, 1, 1], "sizes": [1, 1, 3, 2]},
            "the size that it has",
        ),
        ({**CROP, "mode": "linear"}, {"roi": [0, 0, 0.2, 0, 1, 1, 1, 1], "scales": [1, 1, 1.5, 1]}, "no whole number"),
    ],
)
def test_resize_in_which_runtimes_disagree_is_refused(attributes, given, why: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=why):
        onnxgbp.convert(resize((1, 1, 3, 4), attributes, **given)[1], output="y", target="seed")


def test_resize_of_a_region_that_is_fed_is_refused() -> None:
    node = helper.make_node("Resize", ["x", "roi", "", "sizes"], ["y"], **CROP)
    model = small_model(
        [node], {"x": [1, 1, 4, 4], "roi": [8]}, constants={"sizes": np.array([1, 1, 2, 2])}, dtype=TensorProto.FLOAT
    )
    with pytest.raises(onnxgbp.OnnxgbpError, match="argument 'roi' is computed while the model runs"):
        onnxgbp.convert(model, output="y", target="seed", wrt="x")


# --- Conv with a weight that is computed ----------------------------------------------------------

CONVS: dict[str, tuple[str, list[int], list[int], dict[str, object]]] = {
    "plain": ("Conv", [2, 3, 7, 6], [4, 3, 3, 2], {}),
    "strided": ("Conv", [2, 3, 8, 9], [4, 3, 3, 2], {"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    "dilated": ("Conv", [2, 3, 9, 9], [2, 3, 3, 2], {"dilations": [2, 3], "strides": [2, 1]}),
    "grouped": ("Conv", [2, 6, 7, 6], [4, 3, 3, 3], {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ("Conv", [2, 4, 7, 6], [4, 1, 3, 3], {"group": 4, "strides": [2, 2]}),
    "auto_pad": ("Conv", [2, 3, 7, 6], [4, 3, 3, 2], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "1-D": ("Conv", [2, 3, 9], [4, 3, 3], {"strides": [2]}),
    "3-D": ("Conv", [1, 2, 5, 4, 5], [3, 2, 2, 2, 3], {"pads": [0, 1, 1, 1, 0, 0]}),
    "transposed": ("ConvTranspose", [2, 3, 4, 5], [3, 4, 3, 2], {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
    "transposed in groups": (
        "ConvTranspose",
        [2, 4, 4, 5],
        [4, 3, 3, 3],
        {"group": 2, "strides": [2, 2], "output_padding": [1, 0], "dilations": [1, 2]},
    ),
}


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_conv_with_a_weight_that_is_computed(name: str, *, free: bool) -> None:
    operator, size, kernel, attributes = CONVS[name]
    outputs = kernel[1] * int(str(attributes.get("group", 1))) if operator == "ConvTranspose" else kernel[0]
    node = helper.make_node(operator, ["x0", "x1", "x2"], ["y"], **attributes)
    fixed = "auto_pad" in attributes or operator == "ConvTranspose"  # whose padding depends on the sizes
    dims: list[int | str] = [
        ("N" if free else size[0]),
        size[1],
        *(size[2:] if not free or fixed else "HWD"[: len(size) - 2]),
    ]
    model = small_model([node], {"x0": dims, "x1": kernel, "x2": [outputs]}, dtype=DOUBLE)
    assert_right(model, values(size, kernel, [outputs]), linear=True)


# --- Slice ----------------------------------------------------------------------------------------

# What cuts y out of x0 [N, H, 7], in the textual syntax of ONNX; last is [H - 1], and bound is [[H - 2], [6]].
SLICES = {
    "ends computed": "y = Slice (x0, zero, last, one)",
    "starts computed": "start = Neg (last)  y = Slice (x0, start, far, one)",
    "beyond both ends": (
        "twice = Add (size, size)  start = Neg (twice)  end = Add (last, many)  y = Slice (x0, start, end, one)"
    ),
    "nothing": "start = Add (last, many)  part = Slice (x0, start, far, one)  y = Concat <axis=1> (part, x0)",
    "several axes": "y = Slice (x0, starts, bound, axes)",
    "steps": "y = Slice (x0, starts, bound, axes, steps)",
    "backwards": "y = Slice (x0, last, zero, one, minus)",
    "known numbers": "y = Slice (x0, one, minus, one)",
    "int32": "a = Cast <to=6> (one)  b = Cast <to=6> (last)  y = Slice (x0, a, b, a)",
}


@pytest.mark.parametrize("dims", [("N", "H", 7), ("N", 6, 7)])
@pytest.mark.parametrize("name", SLICES)
def test_slice_of_computed_places(name: str, dims: tuple[int | str, ...]) -> None:
    text = (
        "shape = Shape (x0)  size = Gather (shape, one)  last = Sub (size, one)"
        f"  before = Sub (last, one)  bound = Concat <axis=0> (before, six)  {SLICES[name]}"
    )
    numbers = {"zero": [0], "one": [1], "minus": [-1], "six": [6], "many": [99], "far": [2**62]}
    numbers |= {"starts": [1, -6], "axes": [1, 2], "steps": [1, 2]}
    model = written_model(text, {"x0": dims}, {n: np.array(v) for n, v in numbers.items()}, dtype=DOUBLE)
    assert_right(model, values([2, 6, 7]), linear=True)


def sliced(text: str, dims: Sequence[int | str], weight: Sequence[int]) -> ModelProto:
    numbers = {"zero": [0], "many": [100], "minus": [-100], "far": [2**62], "one": [1], "axes": [1, 2], "zeros": [0, 0]}
    constants = {n: np.array(v) for n, v in (numbers | {"sizes": [6, 5]}).items()}
    return written_model(text, {"x": dims}, {**constants, "w": np.ones(weight, np.float32)})


@pytest.mark.parametrize("part", ["Slice (x, zero, many, one)", "Slice (x, minus, far, one)"])
@pytest.mark.parametrize("length", [60, 100, 150])
def test_slice_that_is_longer_than_a_free_axis(part: str, length: int) -> None:
    """What is sliced off is as long as the slice says, or as the input is; the mean divides by that."""
    text = f"part = {part}  m = ReduceMean <axes=[1], keepdims=0> (part)  y = MatMul (m, w)"
    converted = onnxgbp.convert(sliced(text, ["N", "L", 4], [4, 3]), method="gradient", target=1)
    got = ort_run(converted, {"x": np.ones((2, length, 4), np.float32)})["attribution"]
    taken = min(length, 100)
    expected = np.zeros((2, length, 4), np.float32)
    expected[:, length - taken if "minus" in part else 0 :][:, :taken] = 1 / taken
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_slice_whose_length_is_needed() -> None:
    text = "part = Slice (x, zeros, sizes, axes)  flat = Flatten (part)  y = MatMul (flat, w)"
    converted = onnxgbp.convert(sliced(text, ["N", "H", "W"], [30, 3]), method="gradient", target=1)
    got = ort_run(converted, {"x": np.ones((2, 7, 9), np.float32)})["attribution"]
    expected = np.zeros((2, 7, 9), np.float32)
    expected[:, :6, :5] = 1
    np.testing.assert_array_equal(got, expected)


# --- Pad ------------------------------------------------------------------------------------------

# What pads x0 [N, H, 7], in the textual syntax of ONNX; more is [2], less is [-2], where H is 6.
PADS = {
    "constant": "pads = Concat <axis=0> (zero, more, zero, zero, less, one)  y = Pad (x0, pads)",
    "of one axis": "pads = Concat <axis=0> (more, one)  y = Pad (x0, pads, , one)",
    "of two axes": "pads = Concat <axis=0> (more, less, one, zero)  y = Pad (x0, pads, , axes)",
    "reflected": 'pads = Concat <axis=0> (zero, more, one, zero, one, more)  y = Pad <mode="reflect"> (x0, pads)',
    "repeated": 'pads = Concat <axis=0> (one, more)  y = Pad <mode="edge"> (x0, pads, , one)',
}


@pytest.mark.parametrize("dims", [("N", "H", 7), ("N", 6, 7)])
@pytest.mark.parametrize("name", PADS)
def test_pad_by_what_is_computed(name: str, dims: tuple[int | str, ...]) -> None:
    text = f"shape = Shape (x0)  size = Gather (shape, one)  more = Sub (size, four)  less = Neg (more)  {PADS[name]}"
    numbers = {"zero": [0], "one": [1], "four": [4], "axes": [2, 1]}
    constants = {n: np.array(v) for n, v in numbers.items()}
    model = written_model(text, {"x0": dims}, constants, opset=19, dtype=DOUBLE)
    assert_right(model, values([2, 6, 7]), linear=True)


@pytest.mark.parametrize("dims", [("N", "H", 7), (2, 6, 7)])
def test_tile_by_what_is_computed(dims: tuple[int | str, ...]) -> None:
    text = (
        "shape = Shape (x0)  size = Gather (shape, one)  half = Div (size, two)"
        "  repeats = Concat <axis=0> (two, half, one)  y = Tile (x0, repeats)"
    )
    model = written_model(text, {"x0": dims}, {"one": np.array([1]), "two": np.array([2])}, dtype=DOUBLE)
    assert_right(model, values([2, 6, 7]), linear=True)


# --- Clip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "low = ReduceMean <keepdims=0> (x0)  y = Clip (x0, low)",
        "high = ReduceMean <keepdims=0> (x0)  y = Clip (x0, , high)",
        "low = ReduceMean <keepdims=0> (x0)  high = Add (low, step)  y = Clip (x0, low, high)",
        "high = ReduceMean <keepdims=0> (x0)  low = Add (high, step)  y = Clip (x0, low, high)",  # high wins
    ],
)
def test_clip_to_bounds_of_the_input(text: str) -> None:
    model = written_model(text, {"x0": ["N", 5]}, {"step": np.array(0.7)}, dtype=DOUBLE)
    assert_right(model, values([2, 5]), linear=False)


def test_a_slope_of_the_input_is_refused() -> None:
    nodes = [helper.make_node("Abs", ["x0"], ["slope"]), helper.make_node("PRelu", ["x0", "slope"], ["y"])]
    with pytest.raises(onnxgbp.OnnxgbpError, match="its slope depends on the explained input"):
        onnxgbp.convert(small_model(nodes, {"x0": [2, 3]}, dtype=TensorProto.FLOAT), output="y", target="seed")


# --- MaxUnpool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[1, 2, 5, 6], [1, 2, 4, 4]])
def test_max_unpool_into_a_given_shape(shape: list[int]) -> None:
    """ONNX Runtime and the standard put the elements in different places: the gradient follows whichever runs it."""
    indices = np.array([[[[5, 7], [13, 15]], [[16, 18], [27, 28]]]])
    node = helper.make_node("MaxUnpool", ["x0", "i", "shape"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    constants = {"i": indices, "shape": np.array(shape)}
    wide = small_model([node], {"x0": [1, 2, 2, 2]}, constants=constants, opset=11, dtype=DOUBLE)
    wide.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", DOUBLE, shape))  # onnx infers none
    feeds = values([1, 2, 2, 2])
    assert_right(wide, feeds, linear=True)
    single = small_model([node], {"x0": [1, 2, 2, 2]}, constants=constants, opset=11)
    converted = onnxgbp.convert(single, method="gradient", target="seed", output="y")
    seed = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    got = ort_run(converted, {"x0": feeds["x0"].astype(np.float32), "seed": seed})
    for place in np.ndindex(1, 2, 2, 2):
        one = np.zeros((1, 2, 2, 2), np.float32)
        one[place] = 1
        assert got["attribution"][place] == pytest.approx((ort_run(single, {"x0": one})["y"] * seed).sum())


# --- Det, Unique, Range ---------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_det_of_a_singular_matrix(profile: str) -> None:
    model = small_model([helper.make_node("Det", ["x"], ["y"])], {"x": ["N", 3, 3]})
    x = np.array([[[1, 2, 3], [2, 4, 6], [0, 1, 5]]], np.float32)
    converted = onnxgbp.convert(model, method="gradient", target="seed", output="y", profile=profile)
    got = ort_run(converted, {"x": x, "seed": np.ones(1, np.float32)})["attribution"]
    cofactors = [[[14, -10, 2], [-7, 5, -1], [0, 0, 0]]]  # by hand
    np.testing.assert_allclose(got, cofactors, atol=1e-6)


def test_det_of_a_large_matrix_is_refused() -> None:
    model = small_model([helper.make_node("Det", ["x"], ["y"])], {"x": [2, 40, 40]})
    with pytest.raises(onnxgbp.OnnxgbpError, match="its matrices have 40 rows, for which 24 are the most"):
        onnxgbp.convert(model, target="seed", output="y")


@pytest.mark.parametrize(
    ("given", "x", "seed", "want"),
    [
        ({}, [2, 1, 1, 3], [6, 2, 5], [2, 3, 3, 5]),
        ({"sorted": 0}, [2, 1, 1, 3], [6, 2, 5], [6, 1, 1, 5]),
        ({"axis": 0, "sorted": 0}, [[3, 1], [0, 2], [3, 1]], [[2, 4], [5, 7]], [[1, 2], [5, 7], [1, 2]]),
        ({"axis": 1, "sorted": 1}, [[3, 0, 3], [1, 1, 1]], [[5, 2], [7, 4]], [[1, 5, 1], [2, 7, 2]]),
    ],
)
def test_unique_shares_among_those_that_are_alike(given, x, seed, want) -> None:
    """In ONNX Runtime; the evaluator places the columns of an unsorted one wrongly."""
    feeds = {"x": np.array(x, np.float32), "seed": np.array(seed, np.float32)}
    model = small_model([helper.make_node("Unique", ["x"], ["y"], **given)], {"x": feeds["x"].shape})
    converted = onnxgbp.convert(model, method="gradient", target="seed", output="y")
    np.testing.assert_array_equal(ort_run(converted, feeds)["attribution"], want)


@pytest.mark.parametrize("profile", PROFILES)
def test_range_of_floats(profile: str) -> None:
    nodes = [helper.make_node("Range", ["start", "limit", "delta"], ["y"])]
    model = small_model(nodes, {"start": [], "limit": [], "delta": []})
    converted = onnxgbp.convert(
        model, method="gradient", target="seed", output="y", profile=profile, wrt=["start", "limit", "delta"]
    )
    numbers = {"start": 1, "limit": 2.9, "delta": 0.5}
    feeds = {name: np.array(number, np.float32) for name, number in numbers.items()}
    results = ort_run(converted, {**feeds, "seed": np.array([1, 2, 4, 8], np.float32)})
    assert [float(results[f"attribution_{name}"]) for name in feeds] == [15, 0, 2 + 8 + 24]
