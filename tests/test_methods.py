"""What is made of gradients: against literal replicas in float64, against Captum on whole nets, and what is refused.

The replicas know two nets alone: a convolution with ReLU, a mean and a matrix, for what goes into a graph; and
two matrices with a tanh or a ReLU between them, which ONNX Runtime computes in float64, for what `Explainer` does.
"""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from checking import Array, cosine, ort_run, reference_run, to_float64
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

import onnxgbp
from onnxgbp import Explainer, OnnxgbpError
from onnxgbp.cli import main
from onnxgbp.methods import METHODS, find_method, parse_method, rule_of
from onnxgbp.verify import verify_model

RNG = np.random.default_rng(11)


# --- a convolution, by hand -------------------------------------------------------------------------

W, B = RNG.standard_normal((5, 3, 3, 3)), RNG.standard_normal(5)
V = RNG.standard_normal((5, 4))
X = RNG.standard_normal((2, 3, 9, 14))


def conv_net(shape: str = "N,3,9,14", *, opset: int = 17, before: str = "", reads: str = "x") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}]> net (float[{shape}] x) => (float[N,4] p) {{
            {before} c = Conv <strides = [2, 3]> ({reads}, W, B)  r = Relu(c)  m = GlobalAveragePool(r)
            f = Flatten(m)  s = MatMul(f, V)  p = Softmax(s)
        }}"""
    )
    weights = {"W": W, "B": B, "V": V}
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items())
    return model


def by_hand(x: Array) -> tuple[Array, Array, Array, Array]:
    """The layer r, the strongest class, the gradient of its score at r and at x; strides 2 and 3."""
    w, b, v = (a.astype(np.float32).astype(np.float64) for a in (W, B, V))
    high, wide = (x.shape[2] - 3) // 2 + 1, (x.shape[3] - 3) // 3 + 1
    c = np.zeros((len(x), 5, high, wide)) + b[:, None, None]
    for n, o, i, j in np.ndindex(c.shape):
        c[n, o, i, j] += (x[n, :, 2 * i : 2 * i + 3, 3 * j : 3 * j + 3] * w[o]).sum()
    r = np.maximum(c, 0)
    target = (r.mean(axis=(2, 3)) @ v).argmax(axis=1)
    at_r = np.broadcast_to(v[:, target].T[:, :, None, None] / (high * wide), r.shape)
    at_c, at_x = np.where(c > 0, at_r, 0), np.zeros_like(x)
    for n, o, i, j in np.ndindex(c.shape):
        at_x[n, :, 2 * i : 2 * i + 3, 3 * j : 3 * j + 3] += at_c[n, o, i, j] * w[o]
    return r, target, at_r, at_x


def guided_by_hand(x: Array) -> Array:
    """For one ReLU: what arrives at it where that is positive and the ReLU active."""
    r, _, at_r, _ = by_hand(x)
    guided, w = np.zeros_like(x), W.astype(np.float32).astype(np.float64)
    for n, o, i, j in np.ndindex(r.shape):
        if r[n, o, i, j] > 0 and at_r[n, o, i, j] > 0:
            guided[n, :, 2 * i : 2 * i + 3, 3 * j : 3 * j + 3] += at_r[n, o, i, j] * w[o]
    return guided


def cam_by_hand(x: Array) -> Array:
    """Grad-CAM, interpolated pixel by pixel: the centres of both grids are compared, beyond the last it is flat."""
    r, _, at_r, _ = by_hand(x)
    weights = at_r.mean(axis=(2, 3))
    coarse = np.maximum((weights[:, :, None, None] * r).sum(axis=1), 0)
    fine = np.zeros((len(x), 1, *x.shape[2:]))
    for n, _, i, j in np.ndindex(fine.shape):
        value = 0.0
        row, column = ((k + 0.5) * a / b - 0.5 for k, a, b in zip((i, j), coarse.shape[1:], x.shape[2:], strict=True))
        for p, q in itertools.product(*(range(-1, size + 1) for size in coarse.shape[1:])):
            share = max(0, 1 - abs(row - p)) * max(0, 1 - abs(column - q))
            value += share * coarse[n, min(max(p, 0), coarse.shape[1] - 1), min(max(q, 0), coarse.shape[2] - 1)]
        fine[n, 0, i, j] = value
    return fine


BY_HAND: dict[str, Callable[[Array], Array]] = {
    "input-x-gradient": lambda x: x * by_hand(x)[3],
    "input-x-gradient:guided": lambda x: x * guided_by_hand(x),
    "grad-cam": cam_by_hand,
    "guided-grad-cam": lambda x: guided_by_hand(x) * cam_by_hand(x),
    "guided-grad-cam:gradient": lambda x: by_hand(x)[3] * cam_by_hand(x),
    "layer-activation-x-gradient": lambda x: by_hand(x)[0] * by_hand(x)[2],
}


def test_every_method_in_the_graph_has_its_replica() -> None:
    assert {name for name, method in METHODS.items() if name and method.sample is None} <= set(BY_HAND)


@pytest.mark.parametrize("shape", ["N,3,9,14", "N,3,H,W", "2,3,9,14"])
@pytest.mark.parametrize("method", BY_HAND)
def test_the_graph_is_the_formula(method: str, shape: str) -> None:
    made = onnxgbp.convert(conv_net(shape), method=method)
    onnx.checker.check_model(made, full_check=True)
    wanted = BY_HAND[method](X)
    assert wanted.any()
    found = reference_run(to_float64(made), {"x": X})
    assert found["attribution"].shape == wanted.shape
    # The weights of the interpolation are rounded to the model's own float32, as are the places of Resize.
    rtol = 1e-6 if "cam" in method else 1e-10
    np.testing.assert_allclose(found["attribution"], wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())
    np.testing.assert_array_equal(found["attribution_target"], by_hand(X)[1])
    ran = ort_run(made, {"x": X.astype(np.float32)})["attribution"]
    np.testing.assert_allclose(ran, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
def test_opsets(opset: int) -> None:
    """Resize with free sizes raises a file below opset 13; known sizes do not."""
    for shape, wanted in (("N,3,9,14", opset), ("N,3,H,W", max(opset, 13))):
        made = onnxgbp.convert(conv_net(shape, opset=opset), method="grad-cam", profile="portable")
        assert made.opset_import[0].version == wanted
        found = ort_run(made, {"x": X.astype(np.float32)})["attribution"]
        np.testing.assert_allclose(found, cam_by_hand(X), rtol=1e-3, atol=1e-5)


def test_channels_last() -> None:
    """The Transpose before the first convolution tells where the channels are, whatever the sizes suggest."""
    x = X.transpose(0, 2, 3, 1)
    for perm, given in (([0, 3, 1, 2], x), ([0, 3, 2, 1], x.transpose(0, 2, 1, 3))):
        before = f"t = Transpose <perm = {perm}> (x)"
        shape = ",".join(map(str, given.shape[1:]))
        made = onnxgbp.convert(conv_net(f"N,{shape}", before=before, reads="t"), method="grad-cam")
        found = reference_run(to_float64(made), {"x": given})["attribution"]
        assert found.shape == (*given.shape[:-1], 1)
        turned = found.transpose(0, perm[1], perm[2], perm[3])
        np.testing.assert_allclose(turned, cam_by_hand(X), rtol=1e-6, atol=1e-7)  # as above


def test_several_methods_and_targets() -> None:
    """Side by side over one forward pass, and for the K best classes."""
    methods = ["guided", "grad-cam", "guided-grad-cam", "input-x-gradient:guided"]
    made = onnxgbp.convert(conv_net(), methods=methods, target="top2")
    assert sum(node.op_type == "Conv" for node in made.graph.node) == 1
    found = ort_run(made, {"x": X.astype(np.float32)})
    assert found["attribution_grad-cam"].shape == (2, 2, 1, 9, 14)
    product = found["attribution_guided"] * found["attribution_grad-cam"]
    np.testing.assert_allclose(found["attribution_guided-grad-cam"], product, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        found["attribution_input-x-gradient_guided"], found["attribution_guided"] * X[:, None], rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(found["attribution_grad-cam"][:, 0], cam_by_hand(X), rtol=1e-3, atol=1e-5)
    rows = json.loads(next(entry.value for entry in made.metadata_props if entry.key == "onnxgbp.audit"))
    # Grad-CAM stops at the ReLU's own output: no activation lies behind it.
    assert {row["method"]: row["rule"] for row in rows} == {
        "guided": "guided",
        "guided-grad-cam": "guided",
        "input-x-gradient:guided": "guided",
    }


def test_one_graph_renders_any_method() -> None:
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(conv_net()))
    for method in ("guided", "grad-cam", "input-x-gradient:deconvnet"):
        wanted = onnxgbp.convert(conv_net(), method=method)
        assert graph.render(method=method).SerializeToString() == wanted.SerializeToString()


@pytest.mark.parametrize("scale", [1024.0, 2.0**-6])
@pytest.mark.parametrize("method", BY_HAND)
def test_the_seed_scale_is_in_it_once(method: str, scale: float) -> None:
    plain, scaled = (onnxgbp.convert(conv_net(), method=method, seed_scale=s) for s in (1.0, scale))
    feeds = {"x": X.astype(np.float32)}
    np.testing.assert_array_equal(
        ort_run(scaled, feeds)["attribution"], ort_run(plain, feeds)["attribution"] * np.float32(scale)
    )


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in BY_HAND]
    + [("grad-cam", {"layer": "c", "target": "input2"}), ("guided-grad-cam", {"view": "abs", "heatmap": True})]
    + [("input-x-gradient:rectgrad:90", {"target": "seed"}), ("grad-cam", {"output": "r", "unit": "2", "layer": "c"})],
)
def test_verified(tmp_path: Path, method: str, options: dict[str, Any], profile: str) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(conv_net(), source)
    onnxgbp.save(onnxgbp.convert(source, method=method, profile=profile, **options), out)
    for report in (verify_model(out, source), verify_model(out)):
        assert report.passed, report.to_text()
        figure = next(check.figure for check in report.checks if check.name == "attribution")
        assert figure is not None
        assert figure < 1e-6
    spoiled = onnx.load(out)
    node = next(n for n in spoiled.graph.node if n.name.startswith("method/") and n.op_type in ("Mul", "Relu"))
    node.op_type, node.input[:] = "Neg", [node.input[0]]  # a formula that is not the method's
    onnx.save(spoiled, out)
    failing = {check.name for check in verify_model(out, source).checks if not check.passed}
    assert "attribution reproduced" in failing


# --- two matrices, by hand --------------------------------------------------------------------------

W1, W2 = RNG.standard_normal((5, 6)), RNG.standard_normal((6, 4))
ROWS = RNG.standard_normal((3, 5))


def mlp(kind: str = "Tanh", dims: str = "N") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> mlp (double[{dims},5] x) => (double[{dims},4] p) {{
            h = MatMul(x, W1)  r = {kind}(h)  s = MatMul(r, W2)  p = Softmax(s)
        }}"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in (("W1", W1), ("W2", W2)))
    return model


def scores(x: Array, kind: str = "Tanh") -> Array:
    return np.asarray((np.tanh(x @ W1) if kind == "Tanh" else np.maximum(x @ W1, 0)) @ W2)


def slope(x: Array, target: Array, kind: str = "Tanh", guided: bool = False) -> Array:
    """The gradient of one class of each row, or the guided map."""
    dy, h = W2.T[target], x @ W1
    dy = np.maximum(dy, 0) if guided else dy
    return np.asarray((dy * (1 - np.tanh(h) ** 2 if kind == "Tanh" else h > 0)) @ W1.T)


def noisy(x: Array, n: int, width: Array | float, seed: int = 0) -> list[Array]:
    """The points of a row-wise method: one draw for all rows, and none for the last point."""
    rng = np.random.default_rng(seed)
    return [x + width * rng.standard_normal(x.shape[1:]) for _ in range(n - 1)] + [x]


def share(x: Array, percent: float) -> Array:
    return np.asarray(percent / 100 * (x.max(axis=1) - x.min(axis=1))[:, None])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("stdevs", "seed"), [(None, None), ("10%", 3), (0.4, 7)])
def test_noise(guided: bool, stdevs: str | float | None, seed: int | None) -> None:
    """SmoothGrad, its squares and VarGrad over a rule, for the class of the row itself."""
    width = share(ROWS, 15) if stdevs is None else share(ROWS, 10) if stdevs == "10%" else 0.4
    target = scores(ROWS, "Relu").argmax(axis=1)
    maps = np.stack([slope(x, target, "Relu", guided) for x in noisy(ROWS, 7, width, seed or 0)])
    wanted = {"smoothgrad": maps.mean(0), "smoothgrad-squared": (maps**2).mean(0), "vargrad": maps.var(0)}
    for name, map_ in wanted.items():
        method = f"{name}:guided" if guided else name
        explainer = Explainer(mlp("Relu"), method=method, n_samples=7, stdevs=stdevs, random_seed=seed)
        result = explainer(ROWS)
        assert result.attribution.dtype == np.float64
        np.testing.assert_allclose(result.attribution, map_, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(result.target, target)
        assert result.options == {
            "n_samples": 7,
            "stdevs": stdevs or "15%",
            "random_seed": seed or 0,
            "internal_batch_size": 8,
        }
        assert result.completeness_gap is None
        assert (explainer.metadata["onnxgbp.method"], explainer.methods) == (method, (method,))


@pytest.mark.parametrize("rule", ["gradient", "guided", "rectgrad:60"])
def test_one_sample_is_the_map_itself(rule: str) -> None:
    """Bit for bit, even where the batch is larger than what runs at once."""
    x = RNG.standard_normal((11, 5))
    plain = Explainer(mlp("Relu"), method=rule)(x, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]).attribution
    one = Explainer(mlp("Relu"), method=f"smoothgrad:{rule}", n_samples=1, internal_batch_size=4)
    np.testing.assert_array_equal(one(x, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]).attribution, plain)


METHODS_AT_POINTS: dict[str, dict[str, Any]] = {
    "smoothgrad": {"n_samples": 9},
    "smoothgrad-squared:guided": {"n_samples": 9},
    "vargrad": {"n_samples": 9},
    "integrated-gradients": {"n_steps": 9},
    "expected-gradients": {"n_samples": 9, "baseline": RNG.standard_normal((4, 3, 9, 14))},
}


def test_every_method_at_many_points_is_among_them() -> None:
    names = {name for name, method in METHODS.items() if method.sample is not None}
    assert names == {method.partition(":")[0] for method in METHODS_AT_POINTS}


@pytest.mark.parametrize("method", METHODS_AT_POINTS)
def test_neither_the_chunks_nor_the_batch_matter(method: str) -> None:
    """To rounding of float32: a runtime may sum in another order for another batch."""
    x = X.astype(np.float32)
    made = [
        Explainer(conv_net(), method=method, internal_batch_size=size, **METHODS_AT_POINTS[method])
        for size in (1, 2, 7, 100)
    ]
    first, *others = [explainer(x, [3, 1]).attribution for explainer in made]
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-6 * np.abs(first).max())
    alone = np.concatenate([made[2](x[i : i + 1], target).attribution for i, target in enumerate((3, 1))])
    np.testing.assert_allclose(alone, first, rtol=1e-5, atol=1e-6 * np.abs(first).max())
    again = Explainer(conv_net(), method=method, internal_batch_size=7, **METHODS_AT_POINTS[method])(x, [3, 1])
    np.testing.assert_array_equal(again.attribution, others[1])


def test_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than asked for, unless the batch itself is larger; and no more runs than that takes."""
    explainer = Explainer(mlp(), method="smoothgrad", n_samples=21, internal_batch_size=8)
    seen = list[int]()
    running = explainer._running
    run = running.run
    monkeypatch.setattr(running, "run", lambda feeds, hint: seen.append(len(feeds["x"])) or run(feeds, hint))
    for count, wanted in ((1, [1, 8, 8, 4]), (3, [3] + [6] * 10), (10, [10] * 21)):
        seen.clear()
        explainer(np.ones((count, 5)) * np.arange(5))
        assert seen == wanted


def test_float16() -> None:
    """The seed's scale is chosen for each run and divided out of its maps."""
    narrow = conv_net()
    for tensor in narrow.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*narrow.graph.input, *narrow.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for method in ("guided-grad-cam", "smoothgrad:guided", "integrated-gradients"):
        options: dict[str, Any] = {"method": method} | ({"n_samples": 5} if "smooth" in method else {})
        found = Explainer(narrow, **options)(X.astype(np.float16), 2)
        wanted = Explainer(conv_net(), **options)(X.astype(np.float16).astype(np.float32), 2)
        assert found.attribution.dtype == np.float32
        for one, other in zip(found.attribution, wanted.attribution, strict=True):
            assert cosine(one, other) > 0.999


@pytest.mark.parametrize("dims", ["3", "N"])
def test_integrated_gradients(dims: str) -> None:
    """Also where the batch is fixed. The completeness gap of a smooth net is that of the integral alone."""
    target = scores(ROWS).argmax(axis=1)
    places, weights = np.polynomial.legendre.leggauss(40)
    for baseline in (0.0, 0.5, ROWS[::-1].copy(), RNG.standard_normal(5)):
        start = np.broadcast_to(baseline, ROWS.shape)
        parts = [
            w / 2 * slope(start + (1 + t) / 2 * (ROWS - start), target) for t, w in zip(places, weights, strict=True)
        ]
        explainer = Explainer(mlp(dims=dims), method="integrated-gradients", n_steps=40, baseline=baseline)
        result = explainer(ROWS)
        np.testing.assert_allclose(result.attribution, (ROWS - start) * sum(parts), rtol=1e-11, atol=1e-13)
        rows = np.arange(3)
        change = scores(ROWS)[rows, target] - scores(start)[rows, target]
        np.testing.assert_allclose(result.completeness_gap, result.attribution.sum(axis=1) - change, atol=1e-12)
        assert np.max(np.abs(result.completeness_gap)) < 1e-8
        np.testing.assert_allclose(result.attribution.sum(axis=1), change, atol=1e-8)
        coarse = Explainer(mlp(dims=dims), method="integrated-gradients", n_steps=2)(ROWS, baseline=baseline)
        assert np.max(np.abs(coarse.completeness_gap)) > 1e-4
    assert list(result.outputs) == ["p"]


def test_completeness_of_several_classes_units_and_seeds() -> None:
    method = {"method": "integrated-gradients"}
    classes = np.array([[0, 3], [1, 2], [2, 0]])
    result = Explainer(mlp(), **method)(ROWS, classes)
    assert result.attribution.shape == (3, 2, 5)
    change = np.take_along_axis(scores(ROWS) - scores(0 * ROWS), classes, axis=1)
    np.testing.assert_allclose(result.attribution.sum(axis=2), change, atol=1e-7)
    np.testing.assert_allclose(result.completeness_gap, result.attribution.sum(axis=2) - change, atol=1e-12)
    best = Explainer(mlp(), top=2, **method)(ROWS)
    change = np.sort(scores(ROWS), axis=1)[:, :1:-1] - np.take_along_axis(scores(0 * ROWS), best.target, axis=1)
    np.testing.assert_allclose(best.attribution.sum(axis=2), change, atol=1e-7)
    hidden = np.tanh(ROWS @ W1)
    for options, value in (
        ({"output": "r", "unit": "2"}, hidden[:, 2]),
        ({"output": "r", "unit": "1:4"}, hidden[:, 1:4].sum(axis=1)),
        ({"output": "r", "unit": "2", "seed": "activation"}, hidden[:, 2] ** 2 / 2),
    ):
        result = Explainer(mlp(), **method, **options)(ROWS)
        np.testing.assert_allclose(result.attribution.sum(axis=1), value, atol=1e-7)
        np.testing.assert_allclose(result.completeness_gap, result.attribution.sum(axis=1) - value, atol=1e-12)
    weighed = onnxgbp.convert(mlp(), method="gradient", target="seed")
    before = weighed.SerializeToString(deterministic=True)
    seed = RNG.standard_normal((3, 4))
    result = Explainer(weighed, **method)({"x": ROWS, "seed": seed})
    change = ((scores(ROWS) - scores(0 * ROWS)) * seed).sum(axis=1)
    np.testing.assert_allclose(result.attribution.sum(axis=1), change, atol=1e-7)
    assert list(result.outputs) == ["p"]
    assert weighed.SerializeToString(deterministic=True) == before


def test_expected_gradients() -> None:
    baselines = RNG.standard_normal((4, 5))
    target, rng, parts = np.array([0, 1, 2]), np.random.default_rng(5), []
    for _ in range(30):
        start, t = baselines[rng.integers(4)], rng.random()
        parts.append((ROWS - start) * slope(start + t * (ROWS - start), target))
    explainer = Explainer(
        mlp(), method="expected-gradients", baseline=baselines, n_samples=30, random_seed=5, internal_batch_size=4
    )
    result = explainer(ROWS, [0, 1, 2])
    np.testing.assert_allclose(result.attribution, np.mean(parts, axis=0), rtol=1e-11, atol=1e-13)
    one = explainer(ROWS, [0, 1, 2], baseline=ROWS[:1])  # a call's own; no way from the row to itself
    assert not one.attribution[0].any()
    assert "zeros for samples [0]" in one.warning


def test_several_inputs() -> None:
    """Noise and the way from the baseline are of all inputs together; another input stays as it is."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> two (double[N,5] a, double[N,5] b, double[5] c) => (double[N,4] s) {
            ab = Mul(a, b)  abc = Add(ab, c)  h = MatMul(abc, W1)  r = Tanh(h)  s = MatMul(r, W2)
        }"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in (("W1", W1), ("W2", W2)))
    a, b, c = ROWS, ROWS[::-1].copy(), RNG.standard_normal(5)
    explainer = Explainer(
        model, method="integrated-gradients", wrt=["a", "b"], baseline={"a": 0, "b": np.ones(5)}, internal_batch_size=12
    )
    result = explainer({"a": a, "b": b, "c": c}, 1)
    change = scores(a * b + c)[:, 1] - scores(np.broadcast_to(c, a.shape))[:, 1]
    total = result.attribution["a"].sum(axis=1) + result.attribution["b"].sum(axis=1)
    np.testing.assert_allclose(total, change, atol=1e-9)
    np.testing.assert_allclose(result.completeness_gap, total - change, atol=1e-12)
    target = np.array([1, 1, 1])
    result = Explainer(model, method="smoothgrad", wrt="b", n_samples=4, stdevs=0.3)({"a": a, "b": b, "c": c}, 1)
    wanted = np.mean([a * slope(a * point + c, target) for point in noisy(b, 4, 0.3)], axis=0)
    np.testing.assert_allclose(result.attribution, wanted, rtol=1e-11, atol=1e-13)


def test_over_a_converted_file(tmp_path: Path) -> None:
    made = onnxgbp.convert(mlp("Relu"), method="guided", target="input")
    wanted = Explainer(mlp("Relu"), method="smoothgrad:guided", n_samples=5)(ROWS, 2).attribution
    np.testing.assert_array_equal(Explainer(made, method="smoothgrad:guided", n_samples=5)(ROWS, 2).attribution, wanted)
    with pytest.raises(OnnxgbpError, match="already converted with method guided, not gradient"):
        Explainer(made, method="smoothgrad")
    with pytest.raises(OnnxgbpError, match=r"another class at each of the points .* convert with --target input"):
        Explainer(onnxgbp.convert(mlp("Relu")), method="smoothgrad:guided")


def test_it_travels() -> None:
    explainer = Explainer(
        conv_net(), method="expected-gradients:guided", n_samples=3, baseline=X[:1].astype(np.float32), random_seed=2
    )
    again = pickle.loads(pickle.dumps(explainer))
    x = X.astype(np.float32)
    np.testing.assert_array_equal(again(x).attribution, explainer(x).attribution)
    assert "baseline='an array [1, 3, 9, 14]'" in repr(again)
    cam = pickle.loads(pickle.dumps(Explainer(conv_net(), method="grad-cam", layer="c")))
    assert cam.metadata["onnxgbp.layer"] == "c"
    assert cam(x).attribution.shape == (2, 1, 9, 14)


# --- names and refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "method", "rule"),
    [
        ("guided", "", "guided"),
        ("rectgrad:95", "", "rectgrad:95"),
        ("grad-cam", "grad-cam", "gradient"),
        ("guided-grad-cam", "guided-grad-cam", "guided"),
        ("smoothgrad:rectgrad:95", "smoothgrad", "rectgrad:95"),
        (" input-x-gradient:deconvnet ", "input-x-gradient", "deconvnet"),
    ],
)
def test_names(text: str, method: str, rule: str) -> None:
    assert parse_method(text) == text.strip()
    assert rule_of(text.strip()) == rule
    assert (
        find_method(text.strip())
        is METHODS[text.strip().partition(":")[0] if text.strip() not in ("guided", "rectgrad:95") else ""]
    )


@pytest.mark.parametrize("text", ["", "grad_cam", "smoothgrad:", "smoothgrad:lime", "smoothgrad:rectgrad:x", ":guided"])
def test_no_such_method(text: str) -> None:
    with pytest.raises(OnnxgbpError, match=r"no method is called|no rule is called|does not take"):
        parse_method(text)


def two_images() -> onnx.ModelProto:
    model = conv_net()
    model.graph.input.append(onnx.helper.make_tensor_value_info("y", 1, ["N", 4]))
    model.graph.node[-1].input[0] = "sy"
    model.graph.node.insert(5, onnx.helper.make_node("Add", ["s", "y"], ["sy"]))
    return model


def ids() -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> ids (int64[N,4] i) => (float[N,4] s) {
            e = Gather(T, i)  m = ReduceMean <axes = [1], keepdims = 0> (e)  s = MatMul(m, V)
        }"""
    )
    weights = {"T": RNG.standard_normal((9, 5)), "V": V}
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items())
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (conv_net, {"method": "grad-cam", "layer": "nowhere"}, "--layer: the model has no tensor 'nowhere'"),
        (conv_net, {"method": "grad-cam", "layer": "f"}, r"layer 'f' has shape \[N, 5\], and Grad-CAM needs a feature"),
        (conv_net, {"method": "grad-cam", "layer": "p"}, "no gradient reaches 'p' from 's'"),
        (conv_net, {"method": "grad-cam", "layer": 3}, "layer 3 is no name of a tensor"),
        (
            conv_net,
            {"method": "guided", "layer": "r"},
            "guided has no layer: .* choose one of grad-cam, guided-grad-cam",
        ),
        (mlp, {"method": "grad-cam"}, r"no feature map \[N, C, h, w\] lies on every way to 's': .* --layer"),
        (two_images, {"method": "grad-cam"}, "grad-cam is of one tensor, .* 'x', 'y'; choose by --wrt"),
        (ids, {"method": "grad-cam", "layer": "m"}, r"layer 'm' has shape \[N, 5\], and Grad-CAM needs a feature map"),
        (
            conv_net,
            {"methods": "guided,smoothgrad"},
            "smoothgrad runs the model at many points, so it is no single graph",
        ),
        (conv_net, {"method": "grad-cam", "n_samples": 4}, "grad-cam takes no n_samples: it is one run of one graph"),
        (conv_net, {"method": "smoothgrad", "n_steps": 4}, "smoothgrad takes no n_steps: it takes n_samples, stdevs"),
        (conv_net, {"method": "smoothgrad", "n_samples": 0}, "n_samples is 0, not a whole number of 1 or more"),
        (conv_net, {"method": "smoothgrad", "n_samples": 2.5}, "n_samples is 2.5, not a whole number"),
        (conv_net, {"method": "smoothgrad", "n_samples": True}, "n_samples is True, not a whole number"),
        (conv_net, {"method": "smoothgrad", "stdevs": -1}, "stdevs is -1: give a share"),
        (conv_net, {"method": "smoothgrad", "stdevs": "nan"}, "stdevs is 'nan': give a share"),
        (conv_net, {"method": "smoothgrad", "random_seed": -1}, "random_seed is -1, not a whole number of 0 or more"),
        (conv_net, {"method": "smoothgrad", "internal_batch_size": 0}, "internal_batch_size is 0"),
        (conv_net, {"method": "vargrad", "n_samples": 1}, "vargrad is a variance: n_samples is 1"),
        (conv_net, {"method": "expected-gradients"}, "expected-gradients needs baselines to draw from"),
        (
            conv_net,
            {"method": "expected-gradients", "baseline": X[0]},
            r"have shape \[3, 9, 14\]: give samples, \[M, 3, 9",
        ),
        (
            conv_net,
            {"method": "integrated-gradients", "baseline": X[0, 0, 0, :5]},
            r"has shape \[5\], the input \[2, 3, 9",
        ),
        (conv_net, {"method": "integrated-gradients", "baseline": "dark"}, "neither a number nor an array"),
        (conv_net, {"method": "integrated-gradients", "baseline": {"z": 0}}, "the baselines are for z, not for x"),
        (conv_net, {"method": "smoothgrad", "output": "r", "unit": "max"}, "unit max may be another at each"),
        (ids, {"method": "smoothgrad"}, "'e' is no input of the model"),
    ],
)
def test_refused(model: Callable[[], onnx.ModelProto], options: dict[str, Any], message: str) -> None:
    made = model()
    x = X.astype(np.float32) if model is conv_net else np.ones((2, 4), np.int64) if model is ids else ROWS
    with pytest.raises(OnnxgbpError, match=message) as caught:
        Explainer(made, **options)(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS_AT_POINTS)
def test_no_file_holds_many_points(tmp_path: Path, method: str) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(conv_net(), source)
    result = CliRunner().invoke(main, ["convert", str(source), "-o", str(out), "--method", method])
    assert (result.exit_code, out.exists()) == (1, False)
    assert "so it is no single graph: use onnxgbp explain" in result.output
    with pytest.raises(OnnxgbpError, match="no single graph"):
        onnxgbp.GradientGraph.build(onnxgbp.load(conv_net())).render(method=method)


def test_a_blank_class_map_says_so() -> None:
    model = conv_net()
    made = next(tensor for tensor in model.graph.initializer if tensor.name == "V")
    made.CopyFrom(numpy_helper.from_array(-np.abs(V).astype(np.float32), "V"))
    result = Explainer(model, method="grad-cam")(X.astype(np.float32))
    assert not result.attribution.any()
    assert "a gradient arrives, and what grad-cam makes of it is zero" in result.warning


# --- the commands -----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a folder with three photos."""
    onnx.save(conv_net("N,3,9,9"), tmp_path / "net.onnx")
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "net.onnx", tmp_path / "photos"


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("smoothgrad:guided", ["--n-samples", 3], ["n_samples 3, stdevs 15%, random_seed 0, internal_batch_size 8"]),
        ("integrated-gradients", ["--n-steps", 5], ["n_steps 5, baseline 0.0", "completeness gap: "]),
        ("integrated-gradients", ["--baseline", "-1.5"], ["baseline -1.5", "completeness gap: "]),
        ("integrated-gradients", ["--baseline", "photos/0.png"], ["baseline photos/0.png", "completeness gap: "]),
        ("expected-gradients", ["--baseline", "photos"], ["baseline photos"]),
        ("grad-cam", [], ["grad-cam of 's' at 'r'"]),
        ("guided-grad-cam", ["--layer", "c"], ["guided-grad-cam of 's' at 'c'"]),
        ("layer-activation-x-gradient", [], ["layer-activation-x-gradient of 's' at 'r'"]),
    ],
)
def test_explain(
    files: tuple[Path, Path],
    method: str,
    options: list[Any],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = files
    monkeypatch.chdir(model.parent)
    arguments = ["explain", "net.onnx", "photos/1.png", "-o", "out", "--method", method, *map(str, options)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for text in said:
        assert text in result.output
    manifest = json.loads((model.parent / "out" / "manifest.json").read_text())
    assert manifest["options"]["method"] == method
    assert ("completeness_gap" in manifest["images"][0]) == (method == "integrated-gradients")
    if "--n-samples" in options:
        recorded = {name: manifest["options"][name] for name in ("n_samples", "stdevs", "random_seed")}
        assert recorded == {"n_samples": "3", "stdevs": "15%", "random_seed": "0"}
    array = np.load(model.parent / "out" / "1.attribution.npy")
    assert array.shape == {"grad-cam": (1, 9, 9), "layer-activation-x-gradient": (5, 4, 3)}.get(method, (3, 9, 9))
    assert np.isfinite(array).all()


def test_malformed_options_are_usage_errors(files: tuple[Path, Path]) -> None:
    model, photos = files
    for option in (
        ["--n-samples", "0"],
        ["--stdevs", "wide"],
        ["--random-seed", "-1"],
        ["--method", "smoothgrad:lime"],
    ):
        arguments = ["explain", str(model), str(photos), "-o", str(model.parent / "out"), *option]
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, (model.parent / "out").exists()) == (2, False)


def test_baselines_are_asked_for_before_anything_is_written(files: tuple[Path, Path]) -> None:
    model, photos = files
    arguments = ["explain", str(model), str(photos), "-o", str(model.parent / "out"), "--method", "expected-gradients"]
    for baseline, said in (([], "Error: expected-gradients needs baselines"), (["--baseline", "nowhere"], "nowhere")):
        result = CliRunner().invoke(main, [*arguments, *baseline])
        assert (result.exit_code, (model.parent / "out").exists()) == (1, False)
        assert said in result.output
        assert len(result.output.splitlines()) == 1


def test_inspect(files: tuple[Path, Path]) -> None:
    model, _ = files

    def inspected(*options: str) -> dict[str, Any]:
        result = CliRunner().invoke(main, ["inspect", str(model), "--json", *options])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.output)
        return found

    found = inspected("--method", "grad-cam")
    assert found["layer"] == {"name": "r", "dtype": "float", "shape": ["N", 5, 4, 3]}
    assert found["convertible"]
    assert found["activations"] == []
    assert "every rule gives the plain gradient" in " ".join(found["notes"])
    found = inspected("--method", "guided-grad-cam", "--layer", "c")
    assert found["layer"]["name"] == "c"
    assert [row["rule"] for row in found["activations"]] == ["guided"]
    found = inspected("--method", "smoothgrad:deconvnet")
    assert not found["convertible"]
    assert "no single graph" in found["obstacles"][0]
    assert [row["rule"] for row in found["activations"]] == ["deconvnet"]
    text = CliRunner().invoke(main, ["inspect", str(model), "--method", "grad-cam"]).output
    assert "layer      r: float [N, 5, 4, 3]" in text


# --- whole networks, against Captum -----------------------------------------------------------------

NAMES = {"ResNet-18": ("9", "/9/relu/Relu_output_0"), "VGG-16": ("29", "/29/Relu_output_0")}


class Whole:
    """A network, its file, one batch, and its last feature map, in torch and in the file."""

    def __init__(self, name: str) -> None:
        torch = pytest.importorskip("torch", reason="Captum explains torch's networks")
        pytest.importorskip("captum.attr", reason="the comparison is with Captum")
        from nets import NETS, build
        from test_architectures import _export

        torch.set_num_threads(1)  # test workers share the cores
        self.net: Any = build(name)
        self.x = NETS[name].feeds(3)["x"]
        self.model = _export(name, "torchscript", 17)
        self.target = self.net(self.x).argmax(dim=1)
        self.place, self.tensor = NAMES[name]
        self.layer = self.net.get_submodule(self.place)

    def agree(self, method: str, wanted: Any, **options: Any) -> Any:
        """Compares direction and length, sample by sample."""
        result = Explainer(self.model, method=method, provider="cpu", threads=1, **options)(self.x.numpy())
        wanted = wanted.detach().numpy()
        assert result.attribution.shape == wanted.shape
        for one, other in zip(result.attribution, wanted, strict=True):
            assert other.any()
            assert cosine(one, other) >= 0.9999
            assert np.linalg.norm(one) == pytest.approx(np.linalg.norm(other), rel=1e-3)
        return result


@pytest.fixture(scope="module", params=NAMES)
def whole(request: pytest.FixtureRequest) -> Whole:
    return Whole(request.param)


@pytest.mark.filterwarnings("ignore")  # Captum says that it sets hooks, and that it makes inputs require gradients
class TestCaptum:
    def test_the_last_feature_map_is_found(self, whole: Whole) -> None:
        made = onnxgbp.convert(whole.model, method="grad-cam")
        assert {e.value for e in made.metadata_props if e.key == "onnxgbp.layer"} == {whole.tensor}

    def test_input_x_gradient(self, whole: Whole) -> None:
        from captum.attr import InputXGradient

        whole.agree("input-x-gradient", InputXGradient(whole.net).attribute(whole.x, target=whole.target))

    def test_layer_activation_x_gradient(self, whole: Whole) -> None:
        from captum.attr import LayerGradientXActivation

        explainer = LayerGradientXActivation(whole.net, whole.layer)
        whole.agree("layer-activation-x-gradient", explainer.attribute(whole.x, target=whole.target))

    def test_grad_cam(self, whole: Whole) -> None:
        """Captum's map is of the layer's size and without the paper's ReLU unless it is asked for."""
        from captum.attr import LayerAttribution, LayerGradCam

        coarse = LayerGradCam(whole.net, whole.layer).attribute(
            whole.x, target=whole.target, relu_attributions=True, attr_dim_summation=True
        )
        fine = LayerAttribution.interpolate(coarse, tuple(whole.x.shape[2:]), "bilinear")
        whole.agree("grad-cam", fine)

    def test_guided_grad_cam(self, whole: Whole) -> None:
        """Captum repeats the pixels of the coarse map unless bilinear interpolation is asked for."""
        from captum.attr import GuidedGradCam

        explainer = GuidedGradCam(whole.net, whole.layer)
        wanted = explainer.attribute(whole.x, target=whole.target, interpolate_mode="bilinear")
        whole.agree("guided-grad-cam", wanted, activations="relu")

    def test_integrated_gradients(self, whole: Whole) -> None:
        from captum.attr import IntegratedGradients

        explainer = IntegratedGradients(whole.net)
        for baseline in (0.0, 0.25):
            wanted, gap = explainer.attribute(
                whole.x, baselines=baseline, target=whole.target, n_steps=20, return_convergence_delta=True
            )
            result = whole.agree("integrated-gradients", wanted, n_steps=20, baseline=baseline)
            np.testing.assert_allclose(result.completeness_gap, gap.numpy(), rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize(
        ("method", "kind"),
        [("smoothgrad", "smoothgrad"), ("smoothgrad-squared", "smoothgrad_sq"), ("vargrad", "vargrad")],
    )
    @pytest.mark.parametrize("rule", ["gradient", "guided"])
    def test_noise(self, whole: Whole, method: str, kind: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Captum's own sums over our noise: its own has none without noise, and differs for each sample of a batch."""
        import torch
        from captum.attr import GuidedBackprop, NoiseTunnel, Saliency

        n, width = 6, 0.2
        rng = np.random.default_rng(4)
        draws = [width * rng.standard_normal(whole.x.shape[1:]) for _ in range(n - 1)] + [np.zeros(whole.x.shape[1:])]
        noise = torch.tensor(np.concatenate([draws] * len(whole.x)), dtype=torch.float32)
        monkeypatch.setattr(torch, "normal", lambda _mean, _stdevs: noise)
        if rule == "guided":
            tunnel, more = NoiseTunnel(GuidedBackprop(whole.net)), {}
        else:
            tunnel, more = NoiseTunnel(Saliency(whole.net)), {"abs": False}
        wanted = tunnel.attribute(whole.x, nt_type=kind, nt_samples=n, stdevs=width, target=whole.target, **more)
        options = {"n_samples": n, "stdevs": width, "random_seed": 4, "activations": "relu"}
        whole.agree(f"{method}:{rule}", wanted, **options)

    def test_expected_gradients(self, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
        """For one baseline they are Captum's integral, at our places on the way and with equal weights.

        GradientShap itself draws its places from numpy's global state, one for each row.
        """
        from captum.attr import IntegratedGradients

        baseline, n, rng = 0.1 * whole.x[:1], 4, np.random.default_rng(0)
        places = [(rng.integers(1), rng.random())[1] for _ in range(n)]  # which baseline is drawn as well
        rule = (lambda _: [1 / n] * n, lambda _: places)
        monkeypatch.setattr("captum.attr._core.integrated_gradients.approximation_parameters", lambda _name: rule)
        explainer = IntegratedGradients(whole.net)
        wanted = explainer.attribute(
            whole.x, baselines=baseline.expand_as(whole.x), target=whole.target, n_steps=n, method="riemann_middle"
        )
        whole.agree("expected-gradients", wanted, n_samples=n, baseline=baseline.numpy())
