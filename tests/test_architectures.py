"""The usual architectures, exported by both of torch's exporters with a free batch, against torch's own gradients.

The networks are those of `nets.py`. Each is exported at one batch and judged at another, sample by sample. Tests of
the same exported file run one after the other and share it: see `exported`.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, forward_error, optimised, ort_run, torch_reference

import onnxgbp

torch = pytest.importorskip("torch", reason="it exports the networks, and its gradients are the ones to meet")

from nets import NETS, VOCABULARY, build  # noqa: E402 - imports torch

EXPORTED_BATCH, BATCH = 2, 3

# Every network at a usual opset of either exporter; some at the oldest still in use and at the newest.
CASES = [(name, exporter, opset) for name in NETS for exporter, opset in (("torchscript", 17), ("dynamo", 18))]
CASES += [(name, "torchscript", 11) for name in ("AlexNet", "ResNet-18", "MobileNetV2", "ShuffleNetV2", "Swin")]
CASES += [(name, "torchscript", 13) for name in ("MobileNetV3", "ConvNeXt", "MLP-Mixer", "LSTM")]
CASES += [("ConvNeXt", "dynamo", 20), ("DeiT", "dynamo", 23)]  # with Gelu, with Attention

# All that Captum's hooks can see: each ReLU is a module and the only reader of its input (see test_captum.py).
FOR_CAPTUM = ("AlexNet", "VGG-16", "ResNet-18", "ResNet-50", "ResNeXt", "SqueezeNet")
FOR_CAPTUM += ("ShuffleNetV2", "RegNet", "MobileNetV3", "CNN-1D")

# Files with an operator that `reference.py` does not know, and the same network's file that it reads in their place.
STAND_IN = {
    ("AlexNet", "torchscript", 11): ("dynamo", 18),  # If, around a Squeeze in the local response normalisation
    ("AlexNet", "torchscript", 17): ("dynamo", 18),
    ("ViT", "torchscript", 17): ("dynamo", 18),  # Mod, of dims
    ("DeiT", "dynamo", 23): ("torchscript", 17),  # Attention
}


@dataclass(frozen=True)
class Exported:
    name: str
    case: tuple[str, str, int]
    model: onnx.ModelProto
    graph: onnxgbp.GradientGraph

    @property
    def feeds(self) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in NETS[self.name].feeds(BATCH).items()}


@functools.cache
def _export(name: str, exporter: str, opset: int) -> onnx.ModelProto:
    """With the first axis of every input free."""
    if exporter == "dynamo":
        pytest.importorskip("onnxscript", reason="torch's dynamo exporter writes its graphs with it")
    net, feeds = build(name), NETS[name].feeds(EXPORTED_BATCH)
    options: dict[str, Any] = {"input_names": list(feeds), "output_names": ["scores"], "opset_version": opset}
    args = tuple(feeds.values())
    with warnings.catch_warnings():
        # Of deprecations within torch, of constants that the tracer sees, of opsets: the exporters' affair, not ours.
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            free = {0: torch.export.Dim("N")}
            program = torch.onnx.export(
                net, args, dynamo=True, dynamic_shapes=(free,) * len(args), verbose=False, **options
            )
            model: onnx.ModelProto = program.model_proto
        else:
            file = io.BytesIO()
            torch.onnx.export(net, args, file, dynamo=False, dynamic_axes={name: {0: "N"} for name in feeds}, **options)
            model = onnx.load_from_string(file.getvalue())
    assert {o.version for o in model.opset_import if o.domain in ("", "ai.onnx")} == {opset}
    return model


def _explained_input(model: onnx.ModelProto) -> str:
    """The image or sequence; for token ids, what the Gather from the table of words gives."""
    if model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
        return model.graph.input[0].name
    tables = {tensor.name for tensor in model.graph.initializer if tensor.dims[:1] == [VOCABULARY]}
    return next(n.output[0] for n in model.graph.node if n.op_type == "Gather" and n.input[0] in tables)


def _torch_gradient(name: str) -> tuple[Array, Array]:
    """The scores, and the gradient of each sample's best one with respect to the input or the embedded words."""
    net: Any = build(name)
    feeds, explained = NETS[name].feeds(BATCH), []
    torch.set_num_threads(1)  # test workers share the cores
    if "ids" in feeds:
        net.words.register_forward_hook(lambda _module, _given, made: explained.append(made.requires_grad_()))
    else:
        explained.append(feeds["x"].requires_grad_())
    scores = net(*feeds.values())
    (gradient,) = torch.autograd.grad(scores.max(dim=1).values.sum(), explained)
    return scores.detach().numpy(), gradient.numpy()


def _assert_agree(got: Array, want: Array, least: float) -> None:
    """Each sample's direction, and its length, to which a cosine is blind."""
    assert got.shape == want.shape
    for one, other in zip(got, want, strict=True):
        assert other.any()
        assert cosine(one, other) >= least
        assert np.linalg.norm(one) == pytest.approx(np.linalg.norm(other), rel=10 * (1 - least))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join(map(str, case)))
def exported(request: pytest.FixtureRequest) -> Exported:
    """Its scope makes pytest order the tests by file, so that each is exported once, whichever worker has it."""
    model = _export(*request.param)
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(model), wrt=_explained_input(model))
    return Exported(request.param[0], request.param, model, graph)


def test_the_gradient_is_torchs(exported: Exported) -> None:
    scores, want = _torch_gradient(exported.name)
    before = ort_run(exported.model, exported.feeds)
    assert np.abs(before["scores"] - scores).max() <= 1e-4 * np.ptp(scores)
    converted = exported.graph.render(method="gradient")
    onnx.checker.check_model(converted, full_check=True)
    after = ort_run(converted, exported.feeds)
    assert forward_error(before, after) <= 1e-5
    assert after["attribution_target"].tolist() == scores.argmax(axis=1).tolist()
    # Where the last bit decides a ReLU or a maximum, single pixels move: 0.999. Elsewhere nothing does.
    _assert_agree(after["attribution"], want, 0.999999 if NETS[exported.name].smooth else 0.999)


@pytest.mark.parametrize("name", NETS)
def test_the_optimisers_file_gives_the_same_map(name: str, tmp_path: Path) -> None:
    """Whatever ONNX Runtime's optimiser fuses in it."""
    model, feeds = _export(name, "torchscript", 17), {n: t.numpy() for n, t in NETS[name].feeds(BATCH).items()}
    got, want = (
        ort_run(onnxgbp.convert(source, method="guided"), feeds) for source in (optimised(model, tmp_path), model)
    )
    assert forward_error({"scores": want["scores"]}, got) <= 1e-5
    for key in (key for key in want if key.startswith("attribution") and want[key].dtype.kind == "f"):
        _assert_agree(got[key], want[key], 0.999999 if NETS[name].smooth else 0.999)


def test_the_activations_are_found(exported: Exported) -> None:
    found = {activation.kind for activation in exported.graph.found if activation.gate is None}
    assert found == set(NETS[exported.name].activations)


@pytest.mark.parametrize("method", ["guided", "deconvnet"])
def test_the_rules_are_the_references(exported: Exported, method: str) -> None:
    got = ort_run(exported.graph.render(method=method), exported.feeds)["attribution"]
    if not exported.graph.found:  # recurrent: gates are no activations
        assert np.array_equal(got, ort_run(exported.graph.render(method="gradient"), exported.feeds)["attribution"])
        return
    stand_in = STAND_IN.get(exported.case)
    model = _export(exported.name, *stand_in) if stand_in else exported.model
    wrt = _explained_input(model)
    wanted, _ = torch_reference().attribution(model, exported.feeds, "scores", None, [wrt], method)
    _assert_agree(got, wanted[wrt], 0.999)


@pytest.mark.parametrize("name", FOR_CAPTUM)
@pytest.mark.parametrize(("method", "explainer"), [("guided", "GuidedBackprop"), ("deconvnet", "Deconvolution")])
def test_captum_agrees(name: str, method: str, explainer: str) -> None:
    attr = pytest.importorskip("captum.attr", reason="the comparison is with Captum")
    net, x = build(name), NETS[name].feeds(BATCH)["x"].requires_grad_()
    converted = onnxgbp.convert(_export(name, "torchscript", 17), method=method, activations="relu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum says that it sets hooks
        want = getattr(attr, explainer)(net).attribute(x, target=net(x).argmax(dim=1))
    got = ort_run(converted, {"x": x.detach().numpy()})["attribution"]
    _assert_agree(got, want.detach().numpy(), 0.9999)
