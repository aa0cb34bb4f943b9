"""GridSample and STFT against torch: onnx's evaluator runs them in float32 only."""

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxgbp

torch = pytest.importorskip("torch")


def _model(node, inputs, initializers=(), opset=20) -> ModelProto:
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in initializers],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _run(model: ModelProto, feeds) -> dict[str, np.ndarray]:
    converted = onnxgbp.convert(model, method="gradient", target="seed", output="y")
    session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds)))


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_grid_sample(mode: str, padding: str, align: int) -> None:
    node = helper.make_node("GridSample", ["x", "g"], ["y"], mode=mode, padding_mode=padding, align_corners=align)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 7, 5)).astype(np.float32)
    grid = rng.uniform(-1.4, 1.4, (2, 4, 6, 2)).astype(np.float32)  # beyond the border as well
    seed = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
    got = _run(_model(node, {"x": ["N", 3, 7, 5], "g": ["N", 4, 6, 2]}), {"x": x, "g": grid, "seed": seed})
    image, places = torch.tensor(x, requires_grad=True), torch.tensor(grid, requires_grad=True)
    torch_mode = {"linear": "bilinear"}.get(mode, mode)
    y = torch.nn.functional.grid_sample(image, places, torch_mode, padding, align_corners=bool(align))
    y.backward(torch.tensor(seed))
    # float32 against float32: a few roundings of numbers up to 30
    np.testing.assert_allclose(got["attribution_x"], image.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(got["attribution_g"], places.grad.numpy(), atol=2e-5)


@pytest.mark.parametrize("samples", [128, 121])
@pytest.mark.parametrize("windowed", [False, True])
def test_stft(windowed: bool, samples: int) -> None:
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
