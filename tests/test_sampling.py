"""GridSample, RoiAlign and STFT: against torch, or against differences of what ONNX Runtime computes in float64."""

import numpy as np
import pytest
from checking import ort_run
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxgbp
from onnxgbp.float64 import evaluator
from onnxgbp.verify import verify_model

PROFILES = ("ort", "portable")
DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64}


def _model(node, inputs, initializers=(), opset=20, dtype=TensorProto.FLOAT) -> ModelProto:
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in initializers],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _run(model: ModelProto, feeds, profile="ort", wrt=()) -> dict[str, np.ndarray]:
    converted = onnxgbp.convert(model, method="gradient", target="seed", output="y", profile=profile, wrt=wrt)
    return ort_run(converted, feeds)


# mode of opset 20, of opset 16, of torch
MODES = [("linear", "bilinear", "bilinear"), ("nearest", "nearest", "nearest"), ("cubic", "bicubic", "bicubic")]
SPATIAL = {2: ((7, 5), (4, 6)), 3: ((4, 7, 5), (3, 2, 6))}


def _sampled(mode, padding, align, rank, opset, dtype, profile):
    """What the converted model gives, and torch: gradients for X and the grid."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    named = mode[1] if opset < 20 else mode[0]
    node = helper.make_node("GridSample", ["x", "g"], ["y"], mode=named, padding_mode=padding, align_corners=align)
    rng = np.random.default_rng(0)
    size, places = SPATIAL[rank]
    x = rng.standard_normal((2, 3, *size)).astype(DTYPES[dtype])
    grid = rng.uniform(-2.6, 2.6, (2, *places, rank)).astype(DTYPES[dtype])  # far beyond the border as well
    seed = rng.standard_normal((2, 3, *places)).astype(DTYPES[dtype])
    free = {"x": ["N", 3, *(f"S{i}" for i in range(rank))], "g": ["N", *(f"P{i}" for i in range(rank)), rank]}
    model = _model(node, free, opset=opset, dtype=dtype)
    got = _run(model, {"x": x, "g": grid, "seed": seed}, profile)
    image, at = torch.tensor(x, requires_grad=True), torch.tensor(grid, requires_grad=True)
    y = torch.nn.functional.grid_sample(image, at, mode[2], padding, align_corners=bool(align))
    y.backward(torch.tensor(seed))
    return got, image.grad.numpy(), at.grad.numpy()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("opset", [20, 22])
@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(("mode", "rank"), [(MODES[0], 2), (MODES[1], 2), (MODES[2], 2), (MODES[0], 3), (MODES[1], 3)])
def test_grid_sample(mode, rank, padding, align, opset, profile) -> None:
    got, image, grid = _sampled(mode, padding, align, rank, opset, TensorProto.DOUBLE, profile)
    np.testing.assert_allclose(got["attribution_x"], image, atol=1e-12)
    np.testing.assert_allclose(got["attribution_g"], grid, atol=1e-11)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", MODES)
def test_grid_sample_of_opset_16(mode, padding, align) -> None:
    got, image, grid = _sampled(mode, padding, align, 2, 16, TensorProto.FLOAT, "ort")
    # float32 against float32: a few roundings of numbers up to 30; ONNX Runtime has no float64 here before opset 20
    np.testing.assert_allclose(got["attribution_x"], image, atol=2e-5)
    np.testing.assert_allclose(got["attribution_g"], grid, atol=5e-5)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample_of_one_pixel(padding, align) -> None:
    """An axis of one pixel has no extent to reflect in, and none to move along."""
    torch = pytest.importorskip("torch")
    node = helper.make_node("GridSample", ["x", "g"], ["y"], mode="linear", padding_mode=padding, align_corners=align)
    rng = np.random.default_rng(0)
    x, grid = rng.standard_normal((1, 2, 1, 4)), rng.uniform(-1.6, 1.6, (1, 5, 3, 2))
    seed = rng.standard_normal((1, 2, 5, 3))
    model = _model(node, {"x": [1, 2, 1, 4], "g": [1, 5, 3, 2]}, dtype=TensorProto.DOUBLE)
    got = _run(model, {"x": x, "g": grid, "seed": seed})
    image, at = torch.tensor(x, requires_grad=True), torch.tensor(grid, requires_grad=True)
    torch.nn.functional.grid_sample(image, at, "bilinear", padding, align_corners=bool(align)).backward(
        torch.tensor(seed)
    )
    np.testing.assert_allclose(got["attribution_x"], image.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(got["attribution_g"], at.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(("mode", "rank"), [("linear", 2), ("nearest", 2), ("cubic", 2), ("linear", 3), ("nearest", 3)])
def test_the_kernel_that_verify_runs_is_that_of_onnx_runtime(mode, rank, padding, align) -> None:
    node = helper.make_node("GridSample", ["x", "g"], ["y"], mode=mode, padding_mode=padding, align_corners=align)
    rng, (size, places) = np.random.default_rng(0), SPATIAL[rank]
    feeds = {"x": rng.standard_normal((2, 3, *size)), "g": rng.uniform(-2.6, 2.6, (2, *places, rank))}
    model = _model(node, {name: array.shape for name, array in feeds.items()}, dtype=TensorProto.DOUBLE)
    np.testing.assert_allclose(evaluator(model).run(None, feeds)[0], ort_run(model, feeds)["y"], atol=1e-12)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("align", [0, 1])
def test_verify_checks_a_spatial_transformer_in_float64(align, mode, tmp_path) -> None:
    """x -> a few numbers -> an affine grid -> x sampled there: both gradients of GridSample, and that of the grid."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["six"]),
        helper.make_node("Reshape", ["six", "form"], ["theta"]),
        helper.make_node("AffineGrid", ["theta", "size"], ["grid"], align_corners=align),
        helper.make_node("GridSample", ["x", "grid"], ["moved"], mode=mode, align_corners=align),
        helper.make_node("Flatten", ["moved"], ["features"]),
        helper.make_node("Gemm", ["features", "v"], ["y"]),
    ]
    constants = {
        "w": rng.standard_normal((2 * 5 * 6, 6)).astype(np.float32) * 0.03,
        "b": np.array([0.8, 0.1, 0.1, -0.1, 0.9, -0.1], np.float32),
        "form": np.array([-1, 2, 3]),
        "size": np.array([2, 2, 4, 7]),
        "v": rng.standard_normal((2 * 4 * 7, 3)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "transformer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2, 5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    onnxgbp.save(onnxgbp.convert(tmp_path / "net.onnx", method="gradient"), tmp_path / "out.onnx")
    rows = {check.name: check for check in verify_model(tmp_path / "out.onnx", tmp_path / "net.onnx").checks}
    assert all(check.passed for check in rows.values()), rows
    assert "in float64" in rows["attribution"].detail
    assert "not run" not in rows["runtime"].detail


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 6), (2, 3, 3, 4, 5)])
def test_affine_grid(size, align, profile) -> None:
    torch = pytest.importorskip("torch")
    rank = len(size) - 2
    node = helper.make_node("AffineGrid", ["theta", "size"], ["y"], align_corners=align)
    rng = np.random.default_rng(0)
    theta, seed = rng.standard_normal((2, rank, rank + 1)), rng.standard_normal((2, *size[2:], rank))
    model = _model(
        node, {"theta": ["N", rank, rank + 1]}, [("size", np.array(size, np.int64))], dtype=TensorProto.DOUBLE
    )
    got = _run(model, {"theta": theta, "seed": seed}, profile)
    tensor = torch.tensor(theta, requires_grad=True)
    torch.nn.functional.affine_grid(tensor, size, align_corners=bool(align)).backward(torch.tensor(seed))
    np.testing.assert_allclose(got["attribution"], tensor.grad.numpy(), atol=1e-11)


# Inside, over every border, outside altogether, smaller than a pixel, turned round, larger than the image.
REGIONS = [
    [0.3, 0.2, 8.1, 6.3],
    [1.3, 2.2, 11.4, 9.1],
    [-3.2, -4.1, 2.3, 3.4],
    [2.1, 2.2, 2.25, 2.35],
    [30.1, 3.2, 40.3, 8.4],
    [6.2, 5.1, 2.3, 1.4],
    [-5.1, -6.2, 31.3, 22.4],
]


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("opset", "coordinates"), [(10, None), (16, "half_pixel"), (16, "output_half_pixel"), (16, None)]
)
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("regions", [REGIONS, REGIONS[3:4], []])
def test_roi_align(regions, mode, opset, coordinates, ratio) -> None:
    given = {} if coordinates is None else {"coordinate_transformation_mode": coordinates}
    sizes = {"output_height": 3, "output_width": 2, "sampling_ratio": ratio, "spatial_scale": 0.7}
    nodes = [  # the sum over the regions: with none of them there is still something to explain
        helper.make_node("RoiAlign", ["x", "rois", "images"], ["aligned"], mode=mode, **sizes, **given),
        helper.make_node("Mul", ["aligned", "weights"], ["weighed"]),
        helper.make_node("ReduceSum", ["weighed"], ["y"], keepdims=1, **({"axes": [0]} if opset < 13 else {})),
    ]
    if opset >= 13:
        nodes[2].input.append("axes")
    graph = helper.make_graph(
        nodes,
        "regions",
        [
            helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["N", 3, "H", "W"]),
            helper.make_tensor_value_info("rois", TensorProto.DOUBLE, ["R", 4]),
            helper.make_tensor_value_info("images", TensorProto.INT64, ["R"]),
            helper.make_tensor_value_info("weights", TensorProto.DOUBLE, ["R", 3, 3, 2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(np.array([0]), "axes")] if opset >= 13 else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    rng = np.random.default_rng(0)
    x, count = rng.standard_normal((2, 3, 7, 9)), len(regions)
    feeds = {
        "x": x,
        "rois": np.array(regions, np.float64).reshape(-1, 4),
        "images": np.array([0, 1, 1, 0, 1, 0, 1][:count], np.int64),
        "weights": rng.standard_normal((count, 3, 3, 2)),
    }
    seed, direction, step = rng.standard_normal((1, 3, 3, 2)), rng.standard_normal(x.shape), 1e-6
    above, below = (ort_run(model, {**feeds, "x": x + sign * step * direction})["y"] for sign in (1, -1))
    difference = float((seed * (above - below)).sum() / (2 * step))
    for profile in PROFILES:
        results = _run(model, {**feeds, "seed": seed}, profile, "x")
        product = results["attribution"] * direction
        np.testing.assert_array_equal(results["y"], ort_run(model, feeds)["y"])
        assert abs(product.sum() - difference) <= 1e-8 * max(np.linalg.norm(product), 1e-3)


@pytest.mark.parametrize("samples", [128, 121])
@pytest.mark.parametrize("windowed", [False, True])
def test_stft(windowed: bool, samples: int) -> None:
    torch = pytest.importorskip("torch")
    length, hop = 16, 5
    window = np.hanning(length).astype(np.float32)
    node = helper.make_node("STFT", ["x", "hop", "window" if windowed else "", "length"], ["y"], onesided=1)
    constants = [("hop", np.array(hop)), ("window", window), ("length", np.array(length))]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, samples, 1)).astype(np.float32)
    seed = rng.standard_normal((2, (samples - length) // hop + 1, length // 2 + 1, 2)).astype(np.float32)
    got = _run(_model(node, {"x": ["N", samples, 1]}, constants, opset=17), {"x": x, "seed": seed})
    signal = torch.tensor(x[..., 0], requires_grad=True)
    taper = torch.tensor(window) if windowed else torch.ones(length)
    spectrum = torch.stft(signal, length, hop, length, taper, center=False, onesided=True, return_complex=True)
    torch.view_as_real(spectrum).permute(0, 2, 1, 3).backward(torch.tensor(seed))
    np.testing.assert_allclose(got["attribution"][..., 0], signal.grad.numpy(), atol=1e-5)  # float32, as above
