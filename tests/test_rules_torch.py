"""The rules on whole networks, against torch: there each call of an activation is one `autograd.Function` of ours.

`Rules` stands between a network and torch and sees every call of an activation: of a module, a function or a method, in
place or not. No derivative is written down here, torch differentiates the very function that was called; and the rule
acts on that call's own edge, because each call is a node of torch's graph.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, ort_run, reference_run, to_float64

import onnxgbp

torch = pytest.importorskip("torch", reason="it computes the attributions to meet")

import torch.nn.functional as F  # noqa: E402
from nets import NETS, Apply, build  # noqa: E402 - imports torch
from torch import Tensor, nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

METHODS = ("gradient", "deconvnet", "guided", "as-relu", "rectgrad:90")
BATCH, TARGET = 2, 3

# --- the rules in torch ---------------------------------------------------------------------------


class Ruled(torch.autograd.Function):
    """y, whose backward step is the rule's: x, y and the slope f'(x) are what the call has found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor, method: str, like_relu: bool) -> Tensor:
        ctx.save_for_backward(x.detach().clone(), y, slope)  # a clone: x may be written to in place
        ctx.method, ctx.like_relu = method, like_relu
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (x, y, slope) = grads, ctx.saved_tensors
        rule, _, percentile = ctx.method.partition(":")
        dx = dy * slope
        if rule == "deconvnet":
            dx = dy.clamp(min=0)
        elif rule == "guided":
            dx = dx * (dy > 0)
        elif rule == "as-relu":
            dx = (dy if ctx.like_relu else dx) * (dy > 0)
            dx = dx * (x > 0) if ctx.like_relu else dx
        elif rule == "rectgrad":
            weight = (y * dy).flatten(1)
            threshold = torch.quantile(weight, float(percentile) / 100, dim=1, keepdim=True)
            dx = dx * (weight > threshold).view_as(dx)
        return dx, None, None, None, None


CLIPS = {torch.clamp, torch.clamp_, torch.clip, torch.clamp_min, torch.maximum, F.hardtanh, F.hardtanh_}
CLIPS |= {Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clamp_min}
RELUS = {F.relu, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_} | CLIPS
LIKE_RELU = {F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, F.elu, F.elu_, F.selu, torch.selu, F.celu, torch.celu}
LIKE_RELU |= {F.softplus, F.gelu, F.silu, F.mish, F.hardswish}
SQUASHING = {F.tanh, torch.tanh, Tensor.tanh, F.softsign}
SIGMOIDS = {F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.hardsigmoid}


class Rules(TorchFunctionMode):
    """While it is entered, each call of an activation passes gradients back as the method says."""

    def __init__(self, method: str, activations: set[Callable[..., Any]]) -> None:
        super().__init__()
        self.method, self.activations, self.calls = method, activations, 0

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in self.activations:
            return function(*args, **(kwargs or {}))
        self.calls += 1
        with torch.enable_grad():
            leaf = args[0].detach().clone().requires_grad_()
            given = leaf.clone()
            made = function(given, *args[1:], **(kwargs or {}))
            (slope,) = torch.autograd.grad(made.sum(), leaf)
        y: Tensor = Ruled.apply(args[0], made.detach(), slope, self.method, function in LIKE_RELU)
        return args[0].copy_(y) if made is given else y


def in_torch(
    net: nn.Module, x: Tensor, method: str, calls: int, activations: set[Callable[..., Any]]
) -> tuple[Array, Array]:
    """The scores, and the attribution of the score TARGET of each sample to x."""
    x = x.clone().requires_grad_()
    with Rules(method, activations) as rules:
        scores = net(x)
    assert rules.calls == calls
    (attribution,) = torch.autograd.grad(scores[:, TARGET].sum(), x)
    return scores.detach().numpy(), attribution.numpy()


# --- the networks ---------------------------------------------------------------------------------

Make = Callable[[], nn.Module]


def call(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Make:
    """A module that calls the function on what it gets."""
    return lambda: Apply(lambda x: function(x, *args, **kwargs))


def made(module: type[nn.Module], *args: Any, **kwargs: Any) -> Make:
    return partial(module, *args, **kwargs)


# Every way in which torch spells an activation: a network gets them in turn, so that its modules, functions and methods
# are one file. The kinds are those that onnxgbp must find in it.
FORMS: dict[str, tuple[str, list[Make]]] = {
    "ReLU": (
        "Relu",
        [
            *(made(nn.ReLU), call(F.relu), call(torch.relu), call(Tensor.relu), call(torch.clamp, min=0)),
            *(made(nn.ReLU, inplace=True), call(F.relu, inplace=True), call(torch.relu_), call(Tensor.relu_)),
            *(call(Tensor.clamp, min=0.0), call(Tensor.clamp_, min=0), call(torch.clip, min=0), call(Tensor.clip, 0)),
            *(call(torch.clamp_min, 0), call(Tensor.clamp_min, 0.0), call(torch.maximum, torch.zeros(()))),
        ],
    ),
    "ReLU6": (
        "Relu6",
        [
            *(made(nn.ReLU6), call(F.relu6), call(Tensor.clamp, 0, 6), call(F.hardtanh, 0.0, 6.0)),
            *(made(nn.ReLU6, inplace=True), call(torch.clamp, min=0, max=6), made(nn.Hardtanh, 0.0, 6.0)),
        ],
    ),
    "Clip": ("Clip", [made(nn.Hardtanh, -1.5, 2.0), call(F.hardtanh, -1.5, 2.0), call(Tensor.clamp, -1.5, 2.0)]),
    "LeakyReLU": (
        "LeakyRelu",
        [
            *(made(nn.LeakyReLU, 0.125), made(nn.LeakyReLU, 0.125, inplace=True)),
            *(call(F.leaky_relu, 0.125), call(F.leaky_relu_, 0.125)),
        ],
    ),
    "PReLU": ("PRelu", [made(nn.PReLU), made(nn.PReLU, init=-0.5), call(lambda x: F.prelu(x, x.new_tensor([0.125])))]),
    "ELU": ("Elu", [made(nn.ELU), call(F.elu), call(F.elu_), made(nn.ELU, inplace=True)]),
    "SELU": ("Selu", [made(nn.SELU), call(F.selu), call(torch.selu)]),
    "CELU": ("Celu", [made(nn.CELU, 2.0), call(F.celu, 2.0), call(torch.celu, 2.0)]),
    "Softplus": ("Softplus", [made(nn.Softplus), call(F.softplus)]),
    "GELU": ("Gelu", [made(nn.GELU), call(F.gelu)]),
    "GELU tanh": ("GeluTanh", [made(nn.GELU, "tanh"), call(F.gelu, approximate="tanh")]),
    "SiLU": ("Swish", [made(nn.SiLU), call(F.silu), made(nn.SiLU, inplace=True), call(F.silu, inplace=True)]),
    "Mish": ("Mish", [made(nn.Mish), call(F.mish)]),
    "Hardswish": ("HardSwish", [made(nn.Hardswish), call(F.hardswish), made(nn.Hardswish, inplace=True)]),
    "Tanh": ("Tanh", [made(nn.Tanh), call(torch.tanh), call(Tensor.tanh), call(F.tanh)]),
    "Sigmoid": ("Sigmoid", [made(nn.Sigmoid), call(torch.sigmoid), call(Tensor.sigmoid), call(F.sigmoid)]),
    "Hardsigmoid": ("HardSigmoid", [made(nn.Hardsigmoid), call(F.hardsigmoid)]),
    "Softsign": ("Softsign", [made(nn.Softsign), call(F.softsign)]),
}
SMOOTH = {"ELU", "SELU", "CELU", "Softplus", "GELU", "GELU tanh", "SiLU", "Mish", "Tanh", "Sigmoid", "Softsign"}

USUAL = ("ReLU", "ReLU6", "LeakyReLU", "ELU", "GELU", "SiLU", "Hardswish")
CLASSICS = ("AlexNet", "VGG-16", "ResNet-18", "GoogLeNet", "MobileNetV2", "DenseNet")

# Network, activation (None: its own, as nets.py spells them), exporter.
CASES: list[tuple[str, str | None, str]] = [(name, None, "torchscript") for name in CLASSICS]
CASES += [(name, None, "torchscript") for name in ("MobileNetV3", "EfficientNet-B0", "RegNet")]  # with gates
CASES += [(name, activation, "torchscript") for name in CLASSICS for activation in USUAL]
CASES += [("ResNet-18", activation, "torchscript") for activation in FORMS if activation not in USUAL]
CASES += [("ResNet-18", "ReLU", "dynamo"), ("VGG-16", "GELU", "dynamo")]


def is_activation(module: nn.Module) -> bool:
    if isinstance(module, Apply):
        return getattr(module.function, "func", None) is F.relu
    return isinstance(module, nn.ReLU | nn.ReLU6 | nn.SiLU | nn.Hardswish)


def network(name: str, activation: str | None) -> tuple[nn.Module, int]:
    """The network, and how many activations it has."""
    net = build(name)
    spots = [(p, key) for p in net.modules() for key, child in p.named_children() if is_activation(child)]
    for index, (parent, key) in enumerate(spots):
        if activation:
            forms = FORMS[activation][1]
            setattr(parent, key, forms[index % len(forms)]())
    return net.eval().requires_grad_(False), len(spots)


def exported(net: nn.Module, x: Tensor, exporter: str) -> onnx.ModelProto:
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["scores"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch, constants that the tracer sees
        if exporter == "dynamo":
            pytest.importorskip("onnxscript", reason="torch's dynamo exporter writes its graphs with it")
            program = torch.onnx.export(net, (x,), dynamo=True, verbose=False, opset_version=20, **options)
            model: onnx.ModelProto = program.model_proto
            return model
        file = io.BytesIO()
        torch.onnx.export(net, (x,), file, dynamo=False, opset_version=17, **options)
        return onnx.load_from_string(file.getvalue())


# --- whole networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "activation", "exporter"), CASES)
def test_whole_network(name: str, activation: str | None, exporter: str) -> None:
    """One file with all rules: in ONNX Runtime against torch's single precision, widened against torch's double."""
    torch.set_num_threads(1)  # test workers share the cores
    x = NETS[name].feeds(BATCH)["x"]
    net, count = network(name, activation)
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(exported(net, x, exporter)), target=TARGET)
    kinds = [found.kind for found in graph.found if found.gate is None]
    assert len(kinds) == count
    assert set(kinds) == ({FORMS[activation][0]} if activation else set(NETS[name].activations))

    converted = graph.render(methods=METHODS)
    single = ort_run(converted, {"x": x.numpy()})
    double = reference_run(to_float64(converted), {"x": x.double().numpy()})
    ruled = RELUS | LIKE_RELU | SQUASHING | (SIGMOIDS if activation else set())  # where not put there, they are gates
    smooth = activation in SMOOTH if activation else NETS[name].smooth
    exact = copy.deepcopy(net).double()
    for method in METHODS:
        scores, wanted = in_torch(net, x, method, count, ruled)
        _, ideal = in_torch(exact, x.double(), method, count, ruled)
        assert np.abs(single["scores"] - scores).max() <= 1e-5 * np.ptp(scores)
        output = f"attribution_{method.replace(':', '_')}"
        for got, got_double, want, want_double in zip(single[output], double[output], wanted, ideal):
            assert want_double.any()
            # The exporter folds BatchNorm into the weights in float32; nothing else is rounded.
            assert np.linalg.norm(got_double - want_double) <= 1e-5 * np.linalg.norm(want_double), method
            # Far below 0 a float32 GELU is nothing but rounding, which then decides a MaxPool: where torch's own single
            # and double part over that (0.90 for deconvnet, which passes all there), no more is asked of ONNX Runtime.
            least = 0.99999 if smooth else 0.9999
            assert cosine(got, want) >= min(least, cosine(want, want_double)), method


# --- edges ----------------------------------------------------------------------------------------


class Minus3h(nn.Module):
    """relu(h) - 3 h: the tensor before the activation has a second reader."""

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h) - 3 * h


class ReadTwice(nn.Module):
    """One activation with two readers: their sum arrives at it, 2 - 3 or 3 - 2."""

    def forward(self, h: Tensor) -> Tensor:
        y = torch.relu(h)
        sign = torch.tensor([1.0, -1.0], dtype=h.dtype)
        return 2 * sign * y - 3 * sign * y


class TwoOfOne(nn.Module):
    """Two activations of one tensor: each has what arrives at itself, 2 or -3. Of two alike the exporter makes one."""

    def forward(self, h: Tensor) -> Tensor:
        return 2 * h.relu() - 3 * F.relu6(h)


class InPlace(nn.Module):
    """What is written to in place is read as written: the activation's output, twice."""

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1.0
        h.relu_()
        return 2 * h - 3 * h * h


@pytest.mark.parametrize(("net", "count"), [(Minus3h(), 1), (ReadTwice(), 1), (TwoOfOne(), 2), (InPlace(), 1)])
def test_edges(net: nn.Module, count: int) -> None:
    x = torch.tensor([[1.0, -1.0], [0.25, 2.0]])
    graph = onnxgbp.GradientGraph.build(
        onnxgbp.load(exported(net, x, "torchscript")), target="seed", output="scores", wrt="x"
    )
    for method in METHODS:
        x.requires_grad_()
        with Rules(method, RELUS) as rules:
            y = net(x)
        assert rules.calls == count
        (want,) = torch.autograd.grad(y.sum(), x)
        feeds = {"x": x.detach().numpy(), "seed": np.ones((2, 2), np.float32)}
        assert ort_run(graph.render(method=method), feeds)["attribution"].tolist() == want.tolist(), method


def test_a_call_that_is_no_activation_of_the_table_stays_as_it_is() -> None:
    """The mode changes nothing but what it lists: without any it gives torch's own gradient."""
    x = NETS["AlexNet"].feeds(BATCH)["x"]
    net, _ = network("AlexNet", None)
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(net(leaf)[:, TARGET].sum(), leaf)
    assert np.array_equal(in_torch(net, x, "guided", 0, set())[1], plain.numpy())
    assert cosine(in_torch(net, x, "guided", 7, RELUS)[1], plain.numpy()) < 0.99
