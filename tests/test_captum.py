"""Where Captum's hooks are right, and where they are not: both figures, and why.

Captum (0.9) puts a hook on each `nn.ReLU` and overrides the gradient of the *tensor* that the module reads. That is the
rule where the module is that tensor's only reader (see FOR_CAPTUM in test_architectures.py for networks like that). It
is not where another node reads the tensor too; and an activation that is no `nn.ReLU` is left plain without a word.
"""

from __future__ import annotations

import io
import warnings
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, ort_run

import onnxgbp

torch = pytest.importorskip("torch", reason="Captum explains its modules")
attr = pytest.importorskip("captum.attr", reason="the comparison is with Captum")

import torch.nn.functional as F  # noqa: E402
from nets import NETS, Apply, build  # noqa: E402 - imports torch
from torch import Tensor, nn  # noqa: E402

EXPLAINERS = {"gradient": attr.Saliency, "guided": attr.GuidedBackprop, "deconvnet": attr.Deconvolution}


def captums(net: nn.Module, x: Tensor, method: str, target: int) -> Array:
    options = {"abs": False} if method == "gradient" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum says that it sets hooks
        made = EXPLAINERS[method](net).attribute(x.clone().requires_grad_(), target=target, **options)
    return made.detach().numpy()


def ours(net: nn.Module, x: Tensor, method: str, target: int, **options: Any) -> Array:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch, constants that the tracer sees
        torch.onnx.export(net, (x,), file, dynamo=False, opset_version=17, input_names=["x"], output_names=["scores"])
    converted = onnxgbp.convert(onnx.load_from_string(file.getvalue()), method=method, target=target, **options)
    return ort_run(converted, {"x": x.numpy()})["attribution"]


@pytest.mark.parametrize("name", ["GoogLeNet", "DenseNet", "Inception-v3"])
def test_functions_made_modules_agree(name: str) -> None:
    """These call F.relu, which Captum does not see; each as a module it does."""
    torch.set_num_threads(1)  # test workers share the cores
    net, x = build(name), NETS[name].feeds(2)["x"]
    functions = [(p, key) for p in net.modules() for key, child in p.named_children() if isinstance(child, Apply)]
    for method in ("guided", "deconvnet"):
        blind = captums(net, x, method, 3)
        assert cosine(blind, ours(net, x, method, 3)) < 0.99
    for parent, key in functions:
        setattr(parent, key, nn.ReLU())
    for method in ("guided", "deconvnet"):
        for got, want in zip(ours(net, x, method, 3), captums(net, x, method, 3)):
            assert want.any()
            assert cosine(got, want) >= 0.9999


class Minus3h(nn.Module):
    """The sum of relu(h) - 3 h, as the one score: h has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, h: Tensor) -> Tensor:
        return (self.relu(h) - 3 * h).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("method", "captum", "right"),
    [("gradient", [-2, -3], [-2, -3]), ("guided", [0, 0], [-2, -3]), ("deconvnet", [1, 1], [-2, -2])],
)
def test_a_tensor_with_two_readers(method: str, captum: list[float], right: list[float]) -> None:
    """At h = [1, -1]. The ReLU passes 1 where it is open (guided: [1, 0]) or wherever 1 > 0 (deconvnet: [1, 1]), and
    the other branch adds its -3. Captum's hook sits on h and replaces the sum of both: by what is positive of it,
    nothing (guided), or by what arrived at the ReLU's output (deconvnet). Either way the -3 is lost.
    """
    h = torch.tensor([[1.0, -1.0]])
    assert ours(Minus3h(), h, method, 0).tolist() == [right]
    assert captums(Minus3h(), h, method, 0).tolist() == [captum]


# The activation between x and the score, and its slope at x = [1, -1], [8, 0.5].
UNSEEN = {
    "F.relu": (F.relu, [[1, 0], [1, 1]]),
    "Tensor.relu": (Tensor.relu, [[1, 0], [1, 1]]),
    "clamp": (partial(torch.clamp, min=0), [[1, 0], [1, 1]]),
    "nn.ReLU6": (nn.ReLU6(), [[1, 0], [0, 1]]),
    "nn.LeakyReLU": (nn.LeakyReLU(0.25), [[1, 0.25], [1, 1]]),
    "nn.GELU": (nn.GELU(), [[1.0833155, -0.0833155], [1, 0.8674952]]),
    "nn.SiLU": (nn.SiLU(), [[0.9276705, 0.0723295], [1.0023451, 0.7399612]]),
    "nn.ELU": (nn.ELU(), [[1, 0.3678794], [1, 1]]),
}
READ = np.array([[2.0, 5.0], [-3.0, -7.0]])  # what arrives at the activation


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_no_relu_module_captum_leaves_plain(name: str) -> None:
    """Captum's guided map and its deconvnet map are its gradient; the rules stop what is not positive."""
    act, slope = UNSEEN[name]
    weights = torch.tensor(READ, dtype=torch.float32)
    net = nn.Sequential(Apply(act) if not isinstance(act, nn.Module) else act, Apply(lambda y: y * weights))
    net.append(Apply(lambda y: y.sum(1, keepdim=True)))
    x = torch.tensor([[1.0, -1.0], [8.0, 0.5]])
    right = {"gradient": READ * slope, "guided": READ * slope * (READ > 0), "deconvnet": READ * (READ > 0)}
    for method, want in right.items():
        assert np.allclose(ours(net, x, method, 0), want, atol=1e-6)
        assert np.allclose(captums(net, x, method, 0), right["gradient"], atol=1e-6)
