"""What torch's exporters write of functions whose arguments are computed from sizes, batch and size free.

Each net is exported by both exporters at one size and judged at another, against torch's own gradient.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import pytest
from checking import cosine, ort_run

import onnxgbp

torch = pytest.importorskip("torch", reason="it exports the nets, and its gradients are the ones to meet")
F = torch.nn.functional

CHANNELS = 8


def cut_to_eights(y: Any) -> Any:
    return y[:, :, : y.shape[2] // 8 * 8, : y.shape[3] // 8 * 8]


def filled_to_eights(y: Any) -> Any:
    return F.pad(y, (0, (8 - y.shape[3] % 8) % 8, 0, (8 - y.shape[2] % 8) % 8))


def dynamic_convolution(y: Any) -> Any:
    weight = y.mean((0, 2, 3)).reshape(1, CHANNELS, 1, 1) * torch.linspace(-1, 1, CHANNELS).reshape(-1, 1, 1, 1)
    return F.conv2d(y, weight)


def windows(y: Any) -> Any:
    """Squares of 4 x 4, each scaled by its own mean."""
    n, c, height, width = y.shape
    parts = y.reshape(n, c, height // 4, 4, width // 4, 4)
    return (parts * parts.mean((3, 5), keepdim=True)).reshape(n, c, height, width)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "interpolate to a size": lambda y: F.interpolate(y, size=(11, 9), mode="bilinear"),
    "interpolate to the size of another": lambda y: F.interpolate(F.max_pool2d(y, 2), size=y.shape[-2:]) + y,
    "interpolate by a scale": lambda y: F.interpolate(y, scale_factor=0.5, mode="bicubic"),
    "interpolate, aligned": lambda y: F.interpolate(y, size=(11, 9), mode="bicubic", align_corners=True),
    "roll": lambda y: torch.roll(y, (1, -2), (2, 3)) * y,
    "difference": lambda y: y[:, :, 1:] - y[:, :, : y.shape[2] - 1],
    "cut to a multiple": cut_to_eights,
    "filled to a multiple": filled_to_eights,
    "reflected": lambda y: F.pad(y, (1, 2, 2, 1), mode="reflect"),
    "repeated": lambda y: y.mean((2, 3), keepdim=True).repeat(1, 1, y.shape[2], y.shape[3]) * y,
    "windows": windows,
    "clamp to the mean": lambda y: torch.clamp(y, min=y.mean()),
    "an output whose batch is lost": lambda y: y.unflatten(1, (2, 4)).amax(2).repeat(1, 4, 1, 1),
    "dynamic convolution": dynamic_convolution,
    "ceil mode, a window in the padding": lambda y: F.max_pool2d(y[:, :, :15, :15], 2, 2, padding=1, ceil_mode=True),
}


class Net(torch.nn.Module):  # type: ignore[misc,name-defined] # torch is imported at run time
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Conv2d(3, CHANNELS, 3, padding=1), torch.nn.Linear(CHANNELS, 5)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.last(F.silu(self.function(self.first(x))).mean((2, 3)))


def exported(net: Any, exporter: str) -> onnx.ModelProto:
    photo = torch.zeros(2, 3, 16, 16)
    axes = {0: "N", 2: "H", 3: "W"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations within torch and of constants that the tracer sees
        if exporter == "dynamo":
            pytest.importorskip("onnxscript", reason="torch's dynamo exporter writes its graphs with it")
            program = torch.onnx.export(
                net, (photo,), dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=(axes,)
            )
            made: onnx.ModelProto = program.model_proto
            return made
        file = io.BytesIO()
        torch.onnx.export(net, photo, file, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes={"x": axes})
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_at_another_size(name: str, exporter: str) -> None:
    net = Net(FUNCTIONS[name]).eval()
    model = exported(net, exporter)
    x = torch.randn(3, 3, 20, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    net(x)[:, 2].sum().backward()
    for profile in ("ort", "portable"):
        converted = onnxgbp.convert(model, method="gradient", target=2, profile=profile)
        attribution = ort_run(converted, {"x": x.detach().numpy()})["attribution"]
        assert cosine(attribution, x.grad.numpy()) >= 0.999999
        assert attribution.shape == x.shape
