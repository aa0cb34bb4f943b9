"""Inputs found by themselves: token ids at their lookup, pictures of integers at their floats, masks left alone."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from checking import Array, cosine, ort_run
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

import onnxgbp
from onnxgbp.cli import main
from onnxgbp.verify import verify_model

RNG = np.random.default_rng(5)


def model_of(body: str, opset: int = 17, **weights: Array) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> net {body}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def table(rows: int, width: int = 3) -> Array:
    return RNG.standard_normal((rows, width)).astype(np.float32)


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key.removeprefix("onnxgbp."): entry.value for entry in model.metadata_props}


def attributed(model: onnx.ModelProto, **options: Any) -> list[str]:
    names: list[str] = json.loads(metadata(onnxgbp.convert(model, **options))["wrt"])
    return names


HEAD = "p = ReduceMean <axes = [1], keepdims = 0> (h)  y = MatMul(p, V)"
FORMS = {
    "lookup": ("(int64[N,4] ids) => (float[N,2] y) { h = Gather(W, ids) " + HEAD + " }", ["h"]),
    "int32 and a Cast": (
        "(int32[N,4] ids) => (float[N,2] y) { i = Cast <to = 7> (ids) h = Gather(W, i) " + HEAD + "}",
        ["h"],
    ),
    "reshaped": (
        "(int64[N,4] ids) => (float[N,2] y) { f = Reshape(ids, flat) e = Gather(W, f) h = Reshape(e, back) "
        + HEAD
        + "}",
        ["e"],
    ),
    "GatherND": (
        "(int64[N,4] ids) => (float[N,2] y) { i = Unsqueeze(ids, last) h = GatherND(W, i) " + HEAD + "}",
        ["h"],
    ),
    "OneHot": (
        "(int64[N,4] ids) => (float[N,2] y) { o = OneHot(ids, depth, ends) h = MatMul(o, W) " + HEAD + "}",
        ["h"],
    ),
    "Equal": (
        "(int64[N,4] ids) => (float[N,2] y) "
        "{ i = Unsqueeze(ids, last) q = Equal(i, every) o = Cast <to = 1> (q) h = MatMul(o, W) " + HEAD + "}",
        ["h"],
    ),
    "words, types and positions": (
        "(int64[N,4] types, int64[N,4] ids, int64[N,4] position_ids) => (float[N,2] y) "
        "{ t = Gather(T, types) e = Gather(W, ids) k = Gather(P, position_ids) "
        "s = Mul(e, two) u = Add(t, s) h = Add(u, k) " + HEAD + "}",
        ["e"],
    ),
    "categories side by side": (
        "(int64[N,4] colour, int64[N,4] size) => (float[N,2] y) "
        "{ e = Gather(W, colour) t = Gather(T, size) h = Add(e, t) a = Concat <axis = 1> (e, h) "
        "p = ReduceMean <axes = [1], keepdims = 0> (a)  y = MatMul(p, V) }",
        ["e", "t"],  # e is read twice, so the gradients of the two differ
    ),
    "a mask and lengths": (
        "(int64[N,4] ids, int64[N,4] mask, int64[N,1] lengths) => (float[N,2] y) "
        "{ e = Gather(W, ids) m = Cast <to = 1> (mask) n = Unsqueeze(m, last) h = Mul(e, n) "
        "s = ReduceSum <keepdims = 0> (h, one) l = Cast <to = 1> (lengths) p = Div(s, l)  y = MatMul(p, V) }",
        ["e"],
    ),
    "a picture and a mask": (
        "(uint8[N,4,4,3] image, bool[N,4,4,1] mask) => (float[N,2] y) "
        "{ t = Transpose <perm = [0, 3, 1, 2]> (image) f = Cast <to = 1> (t) m = Cast <to = 1> (mask) "
        "n = Transpose <perm = [0, 3, 1, 2]> (m) g = Mul(f, n) r = Relu(g) "
        "p = ReduceMean <axes = [2, 3], keepdims = 0> (r) y = MatMul(p, V) }",
        ["f"],
    ),
    "quantised pixels": (
        "(uint8[N,3,4,4] image) => (float[N,2] y) "
        "{ f = DequantizeLinear(image, two) p = ReduceMean <axes = [2, 3], keepdims = 0> (f) y = MatMul(p, V) }",
        ["f"],
    ),
    "a table of counts": (
        "(int64[N,3] counts) => (float[N,2] y) { f = Cast <to = 1> (counts) r = Relu(f) y = MatMul(r, V) }",
        ["f"],
    ),
}
WEIGHTS = {
    "W": table(9),
    "T": table(2),
    "P": table(4),
    "V": table(3, 2),
    "flat": np.array([-1]),
    "back": np.array([-1, 4, 3]),
    "last": np.array([-1]),
    "one": np.array([1]),
    "depth": np.array(9),
    "ends": np.array([0, 1], np.float32),
    "every": np.arange(9),
    "two": np.array(2, np.float32),
}


def form(name: str) -> onnx.ModelProto:
    body, _ = FORMS[name]
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return model_of(body, **{key: value for key, value in WEIGHTS.items() if key in words})


@pytest.mark.parametrize("name", FORMS)
def test_what_is_attributed_to(name: str, tmp_path: Path) -> None:
    """The tensor, its shape and type, and that verify finds the attribution right."""
    model, wanted = form(name), FORMS[name][1]
    converted = onnxgbp.convert(model, method="gradient")
    assert json.loads(metadata(converted)["wrt"]) == wanted
    onnx.save(model, tmp_path / "net.onnx")
    onnxgbp.save(converted, tmp_path / "out.onnx")
    report = verify_model(tmp_path / "out.onnx", tmp_path / "net.onnx")
    assert report.passed, report.to_text()
    (check,) = [check for check in report.checks if check.name == "attribution"]
    assert "both are zero" not in check.detail


def test_the_note_is_in_convert_and_inspect(tmp_path: Path) -> None:
    onnx.save(form("words, types and positions"), tmp_path / "net.onnx")
    converted = CliRunner().invoke(main, ["convert", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "out.onnx")])
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "net.onnx")])
    for result in (converted, inspected):
        assert result.exit_code == 0, result.output
        assert "'e' is the lookup of 'ids' in 'W'" in result.stdout
        assert "'types', 'position_ids' added to a lookup, with the same gradient" in result.stdout
    onnx.save(form("a mask and lengths"), tmp_path / "net.onnx")
    assert "left alone: 'mask', 'lengths'" in CliRunner().invoke(main, ["inspect", str(tmp_path / "net.onnx")]).stdout


def test_lookups_that_are_added_have_the_same_gradient() -> None:
    """Why one of them is enough."""
    model = form("words, types and positions")
    ids = RNG.integers(0, 2, (3, 4))
    found = ort_run(
        onnxgbp.convert(model, method="gradient", wrt=["e", "t", "k"]),
        dict.fromkeys(("types", "ids", "position_ids"), ids),
    )
    assert np.array_equal(found["attribution_t"], found["attribution_k"])
    assert np.allclose(found["attribution_e"], 2 * found["attribution_t"])


def test_a_float_input_comes_first() -> None:
    model = model_of(
        "(float[N,3] x, int64[N,4] ids, float[N,3] unused) => (float[N,2] y, float[N,3] z) "
        "{ h = Gather(W, ids) p = ReduceMean <axes = [1], keepdims = 0> (h) s = Add(p, x) y = MatMul(s, V) "
        "z = Floor(unused) }",
        W=table(9),
        V=table(3, 2),
    )
    converted = onnxgbp.convert(model)
    assert json.loads(metadata(converted)["wrt"]) == ["x"]  # none reaches the other float
    assert metadata(converted)["attributed"] == "not attributed to: 'ids' (--wrt 'h')"
    assert attributed(model, wrt=["h", "x"]) == ["h", "x"]


def test_floats_that_reach_no_score_leave_the_ids() -> None:
    model = model_of(
        "(float[N,4] mask, int64[N,4] ids) => (float[N,2] y) "
        "{ b = Cast <to = 9> (mask) c = Unsqueeze(b, last) e = Gather(W, ids) h = Where(c, e, zero) " + HEAD + "}",
        W=table(9),
        V=table(3, 2),
        last=np.array([-1]),
        zero=np.zeros((), np.float32),
    )
    assert attributed(model) == ["e"]


def test_a_selection_is_no_table() -> None:
    """The last step is picked by the length; what it is picked from depends on the ids."""
    model = model_of(
        "(int64[N,4] ids, int64[1] last_step) => (float[N,2] y) "
        "{ e = Gather(W, ids) s = Gather <axis = 1> (e, last_step) p = Squeeze(s, one) y = MatMul(p, V) }",
        W=table(9),
        V=table(3, 2),
        one=np.array([1]),
    )
    assert attributed(model) == ["e"]


def test_the_explainer_gives_the_map_of_the_inner_tensor() -> None:
    model, ids = form("lookup"), np.array([[1, 2, 3, 8]])
    result = onnxgbp.Explainer(model, method="gradient")(ids, target=1)
    assert result.attribution.shape == (1, 4, 3)
    assert np.allclose(result.attribution, np.broadcast_to(WEIGHTS["V"][:, 1] / 4, (1, 4, 3)))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_explain_draws_a_picture_of_integers(tmp_path: Path, layout: str) -> None:
    turn = "t = Transpose <perm = [0, 3, 1, 2]> (f)" if layout == "nhwc" else "t = Identity(f)"
    dims = "8,8,3" if layout == "nhwc" else "3,8,8"
    kernel = RNG.standard_normal((2, 3, 3, 3)).astype(np.float32)
    model = model_of(
        f"(uint8[N,{dims}] image) => (float[N,2] y) {{ f = Cast <to = 1> (image) {turn} c = Conv(t, K) r = Relu(c) "
        "p = GlobalAveragePool(r) y = Flatten(p) }",
        K=kernel,
    )
    onnx.save(model, tmp_path / "net.onnx")
    pixels = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    result = CliRunner().invoke(
        main, ["explain", str(tmp_path / "net.onnx"), str(tmp_path / "photo.png"), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "'f' is 'image' as floats" in result.output
    x = pixels[np.newaxis] if layout == "nhwc" else pixels.transpose(2, 0, 1)[np.newaxis]
    wanted = onnxgbp.Explainer(model)(x).attribution[0]
    assert np.array_equal(np.load(tmp_path / "out" / "photo.attribution.npy"), wanted)
    drawn = onnxgbp.render.signed_picture(wanted, layout=layout).image
    with Image.open(tmp_path / "out" / "photo.attribution.png") as opened:
        assert np.array_equal(np.asarray(opened), np.asarray(drawn))
    refused = CliRunner().invoke(
        main,
        [
            "explain",
            str(tmp_path / "net.onnx"),
            str(tmp_path / "photo.png"),
            "-o",
            str(tmp_path / "out"),
            "--mean",
            "9",
        ],
    )
    assert refused.exit_code == 1
    assert "cannot hold" in refused.stderr


# --- real exports ---------------------------------------------------------------------------------

BATCH, STEPS, WORDS = 3, 8, 60


def torch_net(name: str) -> tuple[Any, dict[str, Any], Any]:
    """A network, its inputs by name, and the module whose output (or the function whose result) is attributed to."""
    torch = pytest.importorskip("torch", reason="it exports the networks, and its gradients are the ones to meet")
    from nets import BertLayer
    from torch import nn

    draw = torch.Generator().manual_seed(3)

    class Bert(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.types, self.positions = (nn.Embedding(rows, 24) for rows in (WORDS, 2, 16))
            self.norm, self.layer, self.classifier = nn.LayerNorm(24), BertLayer(24, 3), nn.Linear(24, 5)

        def forward(self, ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
            y = self.norm(self.words(ids) + self.types(token_type_ids) + self.positions(places))
            mask = (1.0 - attention_mask[:, None, None, :].to(y.dtype)) * torch.finfo(y.dtype).min
            return self.classifier(torch.tanh(self.layer(y, mask.expand(-1, -1, ids.shape[1], -1))[:, 0]))

    class Classifier(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.cell = nn.Embedding(WORDS, 12), nn.LSTM(12, 10, batch_first=True, bidirectional=True)
            self.head = nn.Linear(20, 5)

        def forward(self, ids: Any, lengths: Any) -> Any:
            y, _ = self.cell(self.words(ids))
            inside = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) < lengths.unsqueeze(1)
            return self.head((y * inside.unsqueeze(2).to(y.dtype)).sum(1) / lengths.unsqueeze(1).to(y.dtype))

    class Floats(nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, image: Any) -> Any:
            return image.to(torch.float32)

    class Picture(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.floats = Floats()
            self.net = nn.Sequential(
                *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
            )

        def forward(self, image: Any) -> Any:
            x = (self.floats(image) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.25])
            return self.net(x.permute(0, 3, 1, 2))

    ids = torch.randint(0, WORDS, (BATCH, STEPS), generator=draw)
    lengths = torch.tensor([8, 5, 3])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if name == "BERT":
            types = torch.randint(0, 2, (BATCH, STEPS), generator=draw)
            mask = (torch.arange(STEPS) < lengths.unsqueeze(1)).long()
            bert = Bert().eval()
            return bert, {"ids": ids, "attention_mask": mask, "token_type_ids": types}, bert.words
        if name == "LSTM":
            classifier = Classifier().eval()
            return classifier, {"ids": ids, "lengths": lengths}, classifier.words
        picture = Picture().eval()
        pixels = torch.randint(0, 256, (BATCH, 32, 32, 3), generator=draw, dtype=torch.uint8)
        return picture, {"image": pixels}, picture.floats


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", ["BERT", "LSTM", "picture"])
def test_real_exports_have_torchs_gradient(name: str, exporter: str, tmp_path: Path) -> None:
    net, feeds, embedding = torch_net(name)
    import torch

    options: dict[str, Any] = {"input_names": list(feeds), "output_names": ["scores"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        if exporter == "dynamo":
            pytest.importorskip("onnxscript", reason="torch's dynamo exporter writes its graphs with it")
            free = ({0: torch.export.Dim("N")},) * len(feeds)
            args = tuple(feeds.values())
            program = torch.onnx.export(
                net, args, dynamo=True, dynamic_shapes=free, verbose=False, opset_version=18, **options
            )
            model = program.model_proto
        else:
            file, axes = io.BytesIO(), {key: {0: "N"} for key in feeds}
            torch.onnx.export(
                net, tuple(feeds.values()), file, dynamo=False, dynamic_axes=axes, opset_version=17, **options
            )
            model = onnx.load_from_string(file.getvalue())
    explained: list[Any] = []
    embedding.register_forward_hook(
        lambda _module, _given, made: explained.append(made.detach().requires_grad_()) or explained[0]
    )
    scores = net(*feeds.values())
    (want,) = torch.autograd.grad(scores.max(dim=1).values.sum(), explained)
    result = onnxgbp.Explainer(model, method="gradient", provider="cpu")({k: v.numpy() for k, v in feeds.items()})
    assert result.attribution.shape == tuple(want.shape)
    assert np.allclose(result.scores, scores.detach().numpy(), atol=1e-5)
    for got, wanted in zip(result.attribution, want.numpy(), strict=True):
        assert wanted.any()
        assert cosine(got, wanted) >= (0.9999 if name == "picture" else 0.999999)
        assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(wanted), rel=1e-3)
    onnx.save(model, tmp_path / "net.onnx")
    onnxgbp.save(onnxgbp.convert(model, target="input"), tmp_path / "out.onnx")
    report = verify_model(tmp_path / "out.onnx")
    assert report.passed, report.to_text()
