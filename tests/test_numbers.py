"""The four float types: gradients in the model's own, and a scale of the seed that keeps float16 within its range."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from checking import Array, cosine, ort_run
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper
from PIL import Image

import onnxgbp
from onnxgbp import Explainer, OnnxgbpError
from onnxgbp.cli import main
from onnxgbp.float64 import evaluator, to_float64
from onnxgbp.scale import Census, fit, parse_seed_scale
from onnxgbp.verify import verify_model

X = np.random.default_rng(1).standard_normal((2, 3, 12, 12)).astype(np.float16)

# --- the types ------------------------------------------------------------------------------------

# Which of them onnxruntime's CPU provider runs; the others are judged on the reference evaluator, widened to float64.
TYPES = {
    "float32": (TensorProto.FLOAT, True),
    "float16": (TensorProto.FLOAT16, True),
    "bfloat16": (TensorProto.BFLOAT16, False),
    "float64": (TensorProto.DOUBLE, False),
}


def torch_net(kind: str) -> tuple[Any, Any, Any]:
    """A network, the same up to its logits, and an input: BatchNorm and MaxPool, LayerNorm, attention, softmax."""
    torch = pytest.importorskip("torch", reason="it exports the networks, and its gradients are the ones to meet")
    from torch import nn

    class Attention(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)
            self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: Any) -> Any:
            y = self.norm(x)
            scores = self.query(y) @ self.key(y).transpose(1, 2) / 12**0.5
            return self.head((y + torch.softmax(scores, -1) @ self.value(y)).mean(1))

    class Tokens(nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, x: Any) -> Any:
            return x.flatten(2).transpose(1, 2)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = [
            *(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU())
        ]
        convolutions[1].running_mean.normal_(std=0.1)
        convolutions[1].running_var.uniform_(0.5, 2.0)
        net = nn.Sequential(*convolutions, Tokens(), Attention()) if kind == "conv" else Attention()
        x = torch.randn(3, 3, 10, 10) if kind == "conv" else torch.randn(3, 7, 12)
    return nn.Sequential(net, nn.Softmax(-1)).eval(), net.eval(), x


@pytest.mark.parametrize("kind", ["conv", "attention"])
@pytest.mark.parametrize("name", TYPES)
def test_the_gradient_is_of_the_models_own_type(name: str, kind: str, tmp_path: Path) -> None:
    """Exported in the type; against torch's gradient in float64 of the very same rounded weights and input."""
    whole, logits, x = torch_net(kind)
    import torch

    dtype, (elem_type, has_kernels) = getattr(torch, name), TYPES[name]
    has_kernels = has_kernels or (name == "float64" and kind == "attention")  # it has MatMul and Softmax of float64
    whole, x = whole.to(dtype), x.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        file, axes = io.BytesIO(), {"x": {0: "N"}}
        # With BatchNormalization kept: folded into the weights, those are rounded once more.
        kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["p"], "dynamic_axes": axes}
        torch.onnx.export(whole, (x,), file, dynamo=False, opset_version=17, **names, **kept)
    model = onnx.load_from_string(file.getvalue())
    wide, wide_x = copy.deepcopy(logits).double(), x.detach().double().clone().requires_grad_()
    scores = wide(wide_x)
    target = scores.argmax(1)
    (gradient,) = torch.autograd.grad(scores.gather(1, target[:, None]).sum(), wide_x)
    want, feeds = gradient.numpy(), {"x": wide_x.detach().numpy(), "target": target.numpy()}

    converted = onnxgbp.convert(model, method="gradient", target="input")
    onnx.checker.check_model(converted, full_check=True)
    assert {o.name: o.type.tensor_type.elem_type for o in converted.graph.output}["attribution"] == elem_type
    widened = to_float64(converted)
    outputs = [output.name for output in converted.graph.output]
    # Constants of the gradient (1/n, a root) are rounded to the type: with 8 bits that is what is left.
    least = {"float64": 1 - 1e-12, "bfloat16": 0.9999}.get(name, 0.999999)
    got = dict(zip(outputs, evaluator(widened).run(None, feeds), strict=True))
    assert cosine(got["attribution"], want) >= least
    if has_kernels:
        result = Explainer(model, method="gradient", provider="cpu")(feeds["x"].astype(name), target=feeds["target"])
        assert result.attribution.dtype == np.dtype({"float64": "float64"}.get(name, "float32"))
        assert not result.warning
        assert cosine(result.attribution, want) >= 0.99999
    else:
        with pytest.raises(OnnxgbpError, match="cannot load the model: NOT_IMPLEMENTED"):
            Explainer(model, provider="cpu")
    onnx.save(model, tmp_path / "net.onnx")
    onnxgbp.save(onnxgbp.convert(model), tmp_path / "out.onnx")
    report = verify_model(tmp_path / "out.onnx", tmp_path / "net.onnx")
    assert report.passed, report.to_text()
    assert ("the reference evaluator in float64: " in report.to_text()) is not has_kernels


def test_bfloat16_is_not_taken_from_python() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 22]> g (bfloat16[N,4] x) => (float[N,4] y) { y = Cast <to = 1> (x) }'
    )
    with pytest.raises(OnnxgbpError, match="input 'x' is bfloat16, which ONNX Runtime does not take from Python"):
        Explainer(model)


# --- the scale of the seed ------------------------------------------------------------------------


def net(size: float, kind: str = "float16") -> onnx.ModelProto:
    """Two convolutions and a head, all weights of one size: the gradient is of about its third power."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> net ({kind}[N,3,12,12] x) => ({kind}[N,5] y) {{
            c = Conv(x, A)  r = Relu(c)  q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
            d = Conv(q, B)  s = Relu(d)  p = GlobalAveragePool(s)  f = Flatten(p)  y = MatMul(f, V)
        }}"""
    )
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(s) * size for name, s in {"A": (8, 3, 3, 3), "B": (8, 8, 3, 3), "V": (8, 5)}.items()
    }
    dtype = {"float16": np.float16, "float": np.float32}[kind]
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(dtype), name) for name, w in weights.items())
    return model


def in_float64(model: onnx.ModelProto, x: Array, method: str, target: Array) -> Array:
    converted = onnxgbp.convert(model, method=method, target="input")
    names = [output.name for output in converted.graph.output]
    found = evaluator(to_float64(converted)).run(None, {"x": x.astype(np.float64), "target": target})
    return np.asarray(found[names.index("attribution")])


SMALL, LARGE = 0.002, 25.0
CASES = {"underflows": (SMALL, X), "overflows": (LARGE, X * np.float16(0.01)), "is in range": (1.0, X)}


@pytest.mark.parametrize("method", ["gradient", "guided", "deconvnet"])
@pytest.mark.parametrize("case", CASES)
def test_the_explainer_chooses_the_scale(case: str, method: str) -> None:
    size, x = CASES[case]
    model = net(size)
    result = Explainer(model, method=method, provider="cpu")(x)
    assert result.attribution.dtype == np.float32
    want = in_float64(model, x, method, result.target)
    assert cosine(result.attribution, want) >= 0.9999
    assert np.linalg.norm(result.attribution) == pytest.approx(np.linalg.norm(want), rel=1e-3)
    plain = Explainer(model, method=method, provider="cpu", seed_scale=1)(x, result.target)
    if case == "is in range":
        assert (result.warning, plain.warning) == ("", "")
        assert cosine(plain.attribution, want) >= 0.9999
        return
    assert plain.warning.endswith(plain.float16)
    if case == "overflows":
        broken = np.count_nonzero(~np.isfinite(plain.attribution))
        assert f"{broken} of {want.size} entries overflowed" in plain.float16
        assert "a seed scale of 0.00390625 fits" in plain.float16
        assert result.float16 == ""
    else:
        magnitude = np.abs(plain.attribution)
        subnormal = np.count_nonzero((magnitude > 0) & (magnitude < 2.0**-14))
        flushed = np.count_nonzero((magnitude == 0) & (result.attribution != 0))
        assert flushed > 800
        assert f"{subnormal} of {want.size} entries are below 6.1e-05 and have lost digits" in plain.float16
        assert f"{flushed} more became zero" in plain.float16
        assert "seed scale of 32768 keeps most" in plain.float16
        assert cosine(plain.attribution, want) < 0.9


@pytest.mark.parametrize(("scale", "size"), [(32768, SMALL), (2.0**-8, LARGE)])
def test_a_scaled_file(scale: float, size: float, tmp_path: Path) -> None:
    """Its output is scaled and the Explainer divides it out again; verify knows, and counts."""
    x = CASES["underflows" if size == SMALL else "overflows"][1]
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(net(size), source)
    arguments = ["convert", str(source), "-o", str(out), "--method", "gradient", "--seed-scale", str(scale)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert f", times {scale:g}" in done.stdout
    converted = onnx.load(out)
    assert {e.key: e.value for e in converted.metadata_props}["onnxgbp.seed_scale"] == str(float(scale))
    raw = ort_run(converted, {"x": x})
    want = in_float64(net(size), x, "gradient", raw["attribution_target"])
    assert raw["attribution"].dtype == np.float16
    assert cosine(raw["attribution"].astype(np.float64), want) >= 0.9999
    assert np.linalg.norm(raw["attribution"].astype(np.float64)) == pytest.approx(
        scale * np.linalg.norm(want), rel=1e-3
    )
    result = Explainer(out, provider="cpu")(x)
    assert np.array_equal(result.attribution, raw["attribution"].astype(np.float32) / np.float32(scale))
    report = verify_model(out, source)
    assert report.passed, report.to_text()
    assert "float16 range" in report.to_text()
    with pytest.raises(OnnxgbpError, match=f"already converted with seed_scale {float(scale)}, not 2.0"):
        Explainer(out, seed_scale=2)


def test_a_file_that_underflows_says_so(tmp_path: Path) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(net(SMALL), source)
    onnxgbp.save(onnxgbp.convert(source, method="gradient"), out)
    said = Explainer(out, provider="cpu")(X).float16
    assert "have lost digits, zeros are not counted, a seed scale of 32768 may fit" in said
    (row,) = [check for check in verify_model(out, source).checks if check.name == "float16 range"]
    assert row.passed
    assert "more became zero" in row.detail
    onnx.save(net(LARGE), source)
    onnxgbp.save(onnxgbp.convert(source, method="gradient"), out)
    (row,) = [check for check in verify_model(out, source).checks if check.name == "float16 range"]
    assert not row.passed
    assert "entries overflowed" in row.detail


@pytest.mark.parametrize(("size", "least", "most"), [(SMALL, 2.0**15, 2.0**15), (LARGE, 2.0**-16, 2.0**-1)])
def test_convert_with_auto(size: float, least: float, most: float) -> None:
    converted = onnxgbp.convert(net(size), seed_scale="auto")
    scale = float({e.key: e.value for e in converted.metadata_props}["onnxgbp.seed_scale"])
    assert least <= scale <= most


def test_auto_is_one_for_other_types() -> None:
    model = net(SMALL, "float")
    assert onnxgbp.convert(model, seed_scale="auto") == onnxgbp.convert(model)
    explainer = Explainer(model, provider="cpu")
    assert "onnxgbp.seed_scale" not in explainer.metadata
    x = X.astype(np.float32)
    scaled = Explainer(model, provider="cpu", seed_scale=2.0**10)(x)
    assert np.array_equal(scaled.attribution, explainer(x).attribution)  # exact: not a digit is lost


def test_scaling_is_exact_while_nothing_leaves_the_range() -> None:
    model = net(1.0)
    one, other = (Explainer(model, provider="cpu", seed_scale=scale)(X).attribution for scale in (16, 256))
    assert cosine(one, other) >= 1 - 1e-9
    assert np.mean(one == other) > 0.99  # but for entries so small that even 16 times they are subnormal


@pytest.mark.parametrize("target", ["seed", "input"])
def test_every_seed_is_scaled(target: str) -> None:
    model = net(1.0, "float")
    x = X.astype(np.float32)
    more: dict[str, Array] = {"target": np.array([1, 2])}
    if target == "seed":
        more = {"seed": np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)}
    plain, scaled = (
        ort_run(onnxgbp.convert(model, target=target, seed_scale=scale), {"x": x, **more}) for scale in (1, 4)
    )
    assert np.array_equal(4 * plain["attribution"], scaled["attribution"])
    unit = {"output": "d", "unit": (3, 1, 1)}
    plain, scaled = (ort_run(onnxgbp.convert(model, **unit, seed_scale=scale), {"x": x}) for scale in (1, 4))
    assert np.array_equal(4 * plain["attribution"], scaled["attribution"])


@pytest.mark.parametrize("scale", [0, -2, 3, 1.5, np.inf, np.nan, "much", True, None, [2]])
def test_what_is_no_power_of_two_is_refused(scale: Any) -> None:
    with pytest.raises(OnnxgbpError, match="is no power of two"):
        onnxgbp.convert(net(1.0), seed_scale=scale)


def test_a_scale_that_the_type_cannot_hold_is_refused() -> None:
    assert parse_seed_scale("65536") == 65536
    with pytest.raises(OnnxgbpError, match="65536 cannot be held in the float16"):
        onnxgbp.convert(net(1.0), seed_scale=65536)
    onnxgbp.convert(net(1.0, "float"), seed_scale=65536)


def test_usage_of_the_option(tmp_path: Path) -> None:
    onnx.save(net(1.0), tmp_path / "net.onnx")
    result = CliRunner().invoke(
        main, ["convert", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "o.onnx"), "--seed-scale", "3"]
    )
    assert result.exit_code == 2
    assert "no power of two" in result.stderr


def test_it_travels() -> None:
    explainer = Explainer(net(SMALL), provider="cpu", seed_scale=2.0**14)
    assert np.array_equal(pickle.loads(pickle.dumps(explainer))(X).attribution, explainer(X).attribution)


def test_explain_prints_what_was_lost(tmp_path: Path) -> None:
    onnx.save(net(2 * LARGE), tmp_path / "net.onnx")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)).save(tmp_path / "p.png")
    arguments = ["explain", str(tmp_path / "net.onnx"), str(tmp_path / "p.png"), "--scale", "0.00002"]
    plain = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "a"), "--seed-scale", "1"])
    assert plain.exit_code == 0, plain.output
    assert "entries overflowed" in plain.output
    auto = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "b")])
    assert auto.exit_code == 0, auto.output
    assert "warning" not in auto.output
    assert np.isfinite(np.load(tmp_path / "b" / "p.attribution.npy")).all()


# --- the search -----------------------------------------------------------------------------------


def maps_of(peak: float, ceiling: float) -> Any:
    """A model whose map has one peak, and whose inner tensors overflow as soon as the seed exceeds the ceiling."""

    def run(exponent: int) -> list[Array]:
        runs.append(exponent)
        with np.errstate(over="ignore"):
            map_ = np.array([[peak, peak / 3]]) * 2.0**exponent if 2.0**exponent <= ceiling else np.array([[np.inf, 1]])
            return [map_.astype(np.float16)]

    runs: list[int] = []
    run.runs = runs  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("power", range(-30, 26, 3))
def test_the_search_ends_in_range(power: int) -> None:
    run = maps_of(2.0**power, np.inf)
    exponent, maps = fit(run, 8)
    census = Census.of(maps)
    assert not census.broken
    assert census.fits or exponent == 15
    assert len(run.runs) <= 4
    assert len(set(run.runs)) == len(run.runs)


@pytest.mark.parametrize("ceiling", range(-20, 12, 4))
def test_the_search_keeps_below_what_overflows_inside(ceiling: int) -> None:
    """The map itself is tiny, so that its size alone would ask for more."""
    run = maps_of(2.0**-10, 2.0**ceiling)
    exponent, maps = fit(run, 8)
    assert not Census.of(maps).broken
    assert ceiling - 5 <= exponent <= ceiling
    assert len(run.runs) <= 6


def test_a_blank_map_is_tried_once_more() -> None:
    run = maps_of(0.0, np.inf)
    maps = fit(run, 8)[1]
    assert run.runs == [8, 15]
    assert not np.any(maps[0])
