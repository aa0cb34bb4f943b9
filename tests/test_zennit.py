"""The rules against zennit's own, hooked into the same networks. `tools/test --zennit` fetches it; elsewhere skipped.

zennit's package imports torchvision, for canonizers that join ResNet's BatchNorm to its convolutions: no rule needs
them, and releases of torchvision bring another torch than the one that is pinned here. So zennit is installed without
what it asks for, and where torchvision is missing, two empty classes stand in for the two that zennit names.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import types
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, ort_run

import onnxgbp

torch = pytest.importorskip("torch", reason="zennit hooks its modules")
if not importlib.util.find_spec("zennit"):
    pytest.skip("zennit is not installed: tools/test --zennit", allow_module_level=True)

from nets import NETS, build  # noqa: E402 - imports torch
from torch import Tensor, nn  # noqa: E402


def _composites() -> dict[str, Any]:
    names = () if importlib.util.find_spec("torchvision") else ("", ".models", ".models.resnet")
    stand_ins = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    if stand_ins:
        resnet: Any = stand_ins["torchvision.models.resnet"]
        resnet.BasicBlock, resnet.Bottleneck = type("BasicBlock", (), {}), type("Bottleneck", (), {})
    sys.modules.update(stand_ins)
    try:
        from zennit.composites import DeconvNet, GuidedBackprop
    finally:
        for name in stand_ins:  # others ask whether torchvision is there
            del sys.modules[name]
    return {"deconvnet": DeconvNet, "guided": GuidedBackprop}


COMPOSITES = _composites()


def zennits(net: nn.Module, x: Tensor, method: str, seed: Tensor) -> Array:
    """The attribution to x of the scores, weighted by seed."""
    x = x.clone().requires_grad_()
    with COMPOSITES[method]().context(net) as hooked:
        (attribution,) = torch.autograd.grad(hooked(x), x, seed)  # within: zennit drops its hooks on leaving
    return attribution.numpy()


def exported(net: nn.Module, x: Tensor) -> onnx.ModelProto:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch, constants that the tracer sees
        torch.onnx.export(net, (x,), file, dynamo=False, opset_version=17, input_names=["x"], output_names=["scores"])
    return onnx.load_from_string(file.getvalue())


# Where each ReLU is a module; zennit rules no other activation, so neither does the file.
@pytest.mark.parametrize("name", ["AlexNet", "VGG-16", "ResNet-18", "ResNet-50", "ResNeXt", "ShuffleNetV2", "RegNet"])
def test_networks(name: str) -> None:
    torch.set_num_threads(1)  # test workers share the cores
    net, x = build(name), NETS[name].feeds(2)["x"]
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(exported(net, x)), target=3)
    for method in COMPOSITES:
        seed = torch.zeros(2, 10)
        seed[:, 3] = 1
        want = zennits(net, x, method, seed)
        got = ort_run(graph.render(method=method, activations="relu"), {"x": x.numpy()})["attribution"]
        for one, other in zip(got, want):
            assert other.any()
            assert cosine(one, other) >= 0.9999, method
            assert np.linalg.norm(one) == pytest.approx(np.linalg.norm(other), rel=1e-3), method


class Minus3h(nn.Module):
    """relu(h) - 3 h."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, h: Tensor) -> Tensor:
        return self.relu(h) - 3 * h


@pytest.mark.parametrize(("method", "figure"), [("guided", [[-2, -3]]), ("deconvnet", [[-2, -2]])])
def test_both_act_on_the_edge(method: str, figure: list[list[float]]) -> None:
    """Where Captum gives [0, 0] and [1, 1]: see test_captum.py."""
    h = torch.tensor([[1.0, -1.0]])
    converted = onnxgbp.convert(exported(Minus3h(), h), method=method, target="seed", output="scores")
    got = ort_run(converted, {"x": h.numpy(), "seed": np.ones((1, 2), np.float32)})["attribution"]
    assert got.tolist() == figure
    assert zennits(Minus3h(), h, method, torch.ones(1, 2)).tolist() == figure
