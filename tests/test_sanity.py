"""The sanity checks: figures against scikit-image's and literal ones, changed weights against new models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, small_model
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper
from PIL import Image

import onnxgbp
from onnxgbp import Explainer, OnnxgbpError
from onnxgbp.cli import main
from onnxgbp.images import Preprocessing, read
from onnxgbp.maps import MEASURES, edges, likeness, similarity, smoothed, ssim, without_channels
from onnxgbp.sanity import check_sanity
from onnxgbp.sanity_report import MethodChecks
from onnxgbp.weights import open_weights, random_weights

CORPUS = Path(__file__).parent / "data" / "corpus"
RNG = np.random.default_rng(41)
W1 = RNG.standard_normal((6, 16)).astype(np.float32)
W2 = RNG.standard_normal((16, 9)).astype(np.float32)
W3 = RNG.standard_normal((9, 5)).astype(np.float32)
X = RNG.standard_normal((11, 6)).astype(np.float32)
DENSE = [
    helper.make_node("MatMul", ["x", "W1"], ["a"], name="first"),
    helper.make_node("Relu", ["a"], ["b"]),
    helper.make_node("MatMul", ["b", "W2"], ["c"], name="second"),
    helper.make_node("Relu", ["c"], ["d"]),
    helper.make_node("MatMul", ["d", "W3"], ["y"], name="third"),
]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    onnx.save(small_model(DENSE, {"x": ["N", 6]}, constants={"W1": W1, "W2": W2, "W3": W3}), tmp_path / "dense.onnx")
    np.save(tmp_path / "x.npy", X)
    return tmp_path / "dense.onnx"


KERNELS = [RNG.standard_normal(shape).astype(np.float32) / 4 for shape in ((8, 3, 3, 3), (8,), (6, 8, 3, 3), (6,))]
HEAD = RNG.standard_normal((6, 4)).astype(np.float32)
PICTURES = [
    helper.make_node("Conv", ["x", "K1", "B1"], ["a"], name="low", pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["a"], ["b"]),
    helper.make_node("Conv", ["b", "K2", "B2"], ["c"], name="high", pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["c"], ["d"]),
    helper.make_node("GlobalAveragePool", ["d"], ["e"]),
    helper.make_node("Flatten", ["e"], ["f"]),
    helper.make_node("MatMul", ["f", "H"], ["g"], name="head"),
    helper.make_node("Softmax", ["g"], ["y"], axis=1),
]


def picture_net(path: Path, batch: int | str = "N") -> Path:
    constants = {**dict(zip(("K1", "B1", "K2", "B2"), KERNELS, strict=True)), "H": HEAD}
    model = small_model(PICTURES, {"x": [batch, 3, 16, 16]}, constants=constants)
    prepared = {"size": 16, "crop": [16, 16], "mean": [0.5], "std": [0.25]}
    model.metadata_props.add(key="onnxgbp.preprocessing", value=json.dumps(prepared))
    onnx.save(model, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(RNG.integers(0, 256, (20, 24 + i, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["sanity", *map(str, arguments)])


# --- the figures ----------------------------------------------------------------------------------


def sample_pair() -> tuple[Array, Array]:
    rng = np.random.default_rng(5)
    a = rng.random((23, 31))
    return a, np.clip(a + 0.3 * rng.standard_normal((23, 31)), 0, 1)


def test_figures_of_pictures_are_those_of_scikit_image() -> None:
    """scikit-image 0.26.0: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False),
    filters.sobel(mode="reflect"), filters.gaussian(sigma=2, mode="reflect", truncate=3.5).
    """
    a, b = sample_pair()
    assert ssim(a, b, 1.0) == pytest.approx(0.746566226266253, rel=1e-12)
    assert ssim(2 * a - 1, 1 - 2 * b, 2.0) == pytest.approx(0.19929777434750498, rel=1e-12)
    blurred = smoothed(a, 2.0)
    assert [blurred[0, 0], blurred[10, 7]] == pytest.approx([0.47940353405765734, 0.5274903569257002], rel=1e-12)
    sobel = edges(a) * np.sqrt(2)  # scikit-image halves the sum of the squares
    assert [sobel.sum(), sobel[3, 4]] == pytest.approx([166.13676754673244, 0.3277079674564466], rel=1e-12)


def test_ssim_is_the_mean_over_windows() -> None:
    a, b = sample_pair()
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for top in range(23 - 10):
        for left in range(31 - 10):
            p, q = (one[top : top + 11, left : left + 11] for one in (a, b))
            m, n = (window * p).sum(), (window * q).sum()
            v, w, c = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum(), (window * (p - m) * (q - n)).sum()
            found.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4)))
    assert ssim(a, b, 1.0) == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim(a, a, 1.0) == pytest.approx(1, rel=1e-12)


def test_likeness_of_maps() -> None:
    a = RNG.standard_normal((3, 16, 16))
    same = likeness(a, 7 * a, 0)
    assert [same.rank_absolute, same.rank_signed, same.ssim_absolute, same.ssim_signed] == pytest.approx([1, 1, 1, 1])
    turned = likeness(a, -a, 0)
    assert turned.rank_absolute == pytest.approx(1)
    assert turned.rank_signed == pytest.approx(-1)
    assert turned.ssim_signed is not None
    assert turned.ssim_signed < 0.5
    assert likeness(a[:, :10], a[:, :10], 0).ssim_absolute is None  # smaller than a window
    nothing = likeness(a, 0 * a, 0)
    assert nothing.blank
    assert likeness(a, np.where(a > 2, np.nan, a), 0).blank
    assert similarity([same, nothing, same]) == pytest.approx(similarity([same]) | {"blank": 1})
    assert similarity([same, nothing]) == dict.fromkeys(MEASURES) | {"blank": 1}
    signed, absolute = without_channels(a, 0)
    np.testing.assert_allclose(signed, a.sum(axis=0))
    np.testing.assert_allclose(absolute, np.abs(a).sum(axis=0))
    last = without_channels(a.transpose(1, 2, 0), 2)
    np.testing.assert_allclose(last, (signed, absolute))


def test_expected_gradients_draw_from_the_samples(dense: Path) -> None:
    report = check_sanity(dense, dense.parent / "x.npy", methods="expected-gradients", random_seed=2)
    explainer = Explainer(dense, method="expected-gradients", baseline=X)
    trained = explainer(X)
    scores = np.maximum(np.maximum(X @ W1, 0) @ W2, 0) @ W3
    second = np.argsort(scores, axis=1)[:, -2]
    pairs = zip(trained.attribution, explainer(X, second).attribution, strict=True)
    assert report.methods[0].class_swap == pytest.approx(similarity([likeness(a, b, None) for a, b in pairs]), abs=1e-3)


def test_a_photo_that_cannot_be_read_is_no_baseline_either(tmp_path: Path, photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    said: list[str] = []
    net = picture_net(tmp_path / "net.onnx")
    report = check_sanity(net, photos, methods="expected-gradients", on_error=said.append)
    assert [Path(name).name for name in report.samples] == ["0.png", "1.png", "2.png"]
    assert len(said) == 1
    with pytest.raises(OnnxgbpError, match=r"bad\.png"):
        check_sanity(net, photos, methods="expected-gradients")


# --- weights as inputs ----------------------------------------------------------------------------


def transposed(model: onnx.ModelProto) -> None:
    _replace(
        model, "K2", [helper.make_node("Transpose", ["raw"], ["K2"], perm=[1, 0, 2, 3])], KERNELS[2].swapaxes(0, 1)
    )


def constant_node(model: onnx.ModelProto) -> None:
    _replace(model, "K2", [helper.make_node("Constant", [], ["K2"], value=numpy_helper.from_array(KERNELS[2]))])


def quantised(model: onnx.ModelProto) -> None:
    scale = helper.make_node("Constant", [], ["scale"], value_float=0.01)
    whole = np.clip(np.rint(KERNELS[2] * 100), -128, 127).astype(np.int8)
    _replace(model, "K2", [scale, helper.make_node("DequantizeLinear", ["raw", "scale"], ["K2"])], whole)


def listed_inputs(model: onnx.ModelProto) -> None:
    """As files up to IR 3 do."""
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _replace(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto], raw: Array | None = None) -> None:
    (old,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    model.graph.initializer.remove(old)
    if raw is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(raw), "raw"))
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


@pytest.mark.parametrize("spelling", [None, transposed, constant_node, quantised, listed_inputs])
@pytest.mark.parametrize("method", ["gradient", "guided"])
def test_changed_weights_are_those_of_a_new_model(spelling: Any, method: str, tmp_path: Path) -> None:
    """Fed to the one session, weights give what a model does that was written with them."""
    path = picture_net(tmp_path / "net.onnx")
    model = onnx.load(path)
    if spelling is not None:
        spelling(model)
    opened = open_weights(onnxgbp.load(model))
    assert [layer.name for layer in opened.layers] == ["head", "high", "low"]
    assert [len(layer.weights) for layer in opened.layers] == [1, 2, 2]
    assert opened.wrt == ("x",)
    assert opened.kept == {}
    explainer = Explainer(opened.model, method=method, wrt=opened.wrt)
    x = RNG.standard_normal((4, 3, 16, 16)).astype(np.float32)
    trained = {name: array for layer in opened.layers for name, array in layer.weights.items()}
    agree(explainer({"x": x} | trained), Explainer(model, method=method)(x))

    high = random_weights(opened.layers[1], (3, 1))
    other = onnx.load(path)
    for tensor, array in zip(("K2", "B2"), high.values(), strict=True):
        (old,) = (one for one in other.graph.initializer if one.name == tensor)
        old.CopyFrom(numpy_helper.from_array(array, tensor))
    agree(explainer({"x": x} | trained | high), Explainer(other, method=method)(x))


def agree(one: Any, other: Any) -> None:
    assert (one.target == other.target).all()
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-6)
    scale = np.abs(other.attribution).max()
    np.testing.assert_allclose(one.attribution, other.attribution, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "name",
    "flax_linen_relu.jax2onnx_dyn hf_vit.optimum keras_tensorflow_mobile.tf2onnx15 paddle_relu.p2o11 "
    "skl_mlp_relu.zipmap torch_mnist_relu.fp16_keepio torch_mnist_relu.qdq torch_mnist_relu.ts17_kiai".split(),
)
def test_trained_weights_give_the_maps_of_real_files(name: str) -> None:
    path = CORPUS / f"{name}.onnx"
    given = np.load(CORPUS / f"{name.partition('.')[0]}.npz")
    opened = open_weights(onnxgbp.load(path))
    plain = Explainer(path, method="guided")
    feeds = {spec.name: given[spec.name if spec.name in given.files else "x"] for spec in plain.inputs}
    trained = {key: array for layer in opened.layers for key, array in layer.weights.items()}
    assert len(trained) > 2
    found = Explainer(opened.model, method="guided", wrt=opened.wrt)(feeds | trained)
    a, b = (np.asarray(one.attribution, np.float64).ravel() for one in (plain(feeds), found))
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.9999


def test_random_weights_have_the_mean_and_deviation_of_their_own() -> None:
    constants = {
        "W1": (3 + 2 * RNG.standard_normal((6, 4000))).astype(np.float32),
        "W2": np.ones((4000, 2), np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", "W1"], ["a"]), helper.make_node("MatMul", ["a", "W2"], ["y"])]
    opened = open_weights(onnxgbp.load(small_model(nodes, {"x": ["N", 6]}, constants=constants)))
    (drawn,) = random_weights(opened.layers[1], (0, 1)).values()
    assert drawn.dtype == np.float32
    assert [drawn.mean(), drawn.std()] == pytest.approx([3, 2], abs=0.05)
    (same,) = random_weights(opened.layers[1], (0, 1)).values()
    (other,) = random_weights(opened.layers[1], (1, 1)).values()
    assert (same == drawn).all()
    assert (other != drawn).all()
    (centred,) = random_weights(opened.layers[1], (0, 1), zero_mean=True).values()
    assert [centred.mean(), centred.std()] == pytest.approx([0, 2], abs=0.05)


def test_shared_and_kept_numbers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["a"], name="below"),
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "W"], ["y"], name="above"),
    ]
    constants = {"W": W1[:, :6], "bias": np.arange(6, dtype=np.float32)}
    opened = open_weights(onnxgbp.load(small_model(nodes, {"x": ["N", 6]}, constants=constants)))
    assert [layer.name for layer in opened.layers] == ["above"]
    assert opened.kept == {"Add": 1}
    onnx.save(small_model(nodes, {"x": ["N", 6]}, constants=constants), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", X)
    said = run(tmp_path / "net.onnx", "--images", tmp_path / "x.npy", "--methods", "gradient").stdout
    assert "trained numbers of these stay as they are: 1 Add" in said


# --- the checks -----------------------------------------------------------------------------------


def guided(x: Array, weights: list[Array], target: Array) -> Array:
    a = x @ weights[0]
    c = np.maximum(a, 0) @ weights[1]
    dy = weights[2].T[target]
    dy = np.where((c > 0) & (dy > 0), dy, 0) @ weights[1].T
    return np.asarray(np.where((a > 0) & (dy > 0), dy, 0) @ weights[0].T)


def spearman(a: Array, b: Array) -> float:
    ranks = [np.argsort(np.argsort(one)) for one in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_the_curves_are_those_of_numpy(dense: Path) -> None:
    found = check_sanity(dense, dense.with_name("x.npy"), methods="guided", random_seed=4)
    trained = [W1, W2, W3]
    layers = open_weights(onnxgbp.load(dense)).layers
    drawn = [next(iter(random_weights(layer, (4, i)).values())) for i, layer in enumerate(layers)][::-1]
    scores = np.maximum(np.maximum(X @ W1, 0) @ W2, 0) @ W3
    target = scores.argmax(axis=1)
    maps = guided(X, trained, target)
    (one,) = found.methods
    assert [layer.name for layer in found.layers] == ["third", "second", "first"]
    for step in range(3):
        place = 2 - step
        cascading = [*trained[:place], *drawn[place:]]
        independent = [drawn[i] if i == place else trained[i] for i in range(3)]
        for weights, row in ((cascading, one.cascading[step]), (independent, one.independent[step])):
            changed = guided(X, weights, target)
            pairs = [(a, b) for a, b in zip(maps, changed, strict=True) if a.any() and b.any()]
            assert row["blank"] == len(X) - len(pairs)
            assert row["rank_signed"] == pytest.approx(np.median([spearman(a, b) for a, b in pairs]), abs=1e-6)
            assert row["rank_absolute"] == pytest.approx(
                np.median([spearman(np.abs(a), np.abs(b)) for a, b in pairs]), abs=1e-6
            )
            assert row["ssim_signed"] is None
    second = np.argsort(-scores, axis=1)[:, 1]
    pairs = [(a, b) for a, b in zip(maps, guided(X, trained, second), strict=True) if a.any() and b.any()]
    assert one.class_swap is not None
    assert one.class_swap["rank_signed"] == pytest.approx(np.median([spearman(a, b) for a, b in pairs]), abs=1e-6)
    assert one.random_logit is not None
    assert one.random_logit["rank_signed"] < 0.999  # never the class itself


def rows(*ranks: float | None) -> tuple[dict[str, Any], ...]:
    return tuple({"rank_absolute": rank, "rank_signed": rank, "blank": 0} for rank in ranks)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ((0.5, 0.3, 0.2, 0.1), "78% of the change comes with the upper half, 56% with the scores' layer: depends on"),
        ((0.992, 0.94, 0.9, 0.6), "15% of the change comes with the upper half, 2% with the scores' layer: FAILS"),
        ((0.9, 0.8, 0.6, 0.4), "33% of the change comes with the upper half, 17% with the scores' layer: depends part"),
        ((1.0, 0.99, 0.98, 0.95), "FAILS: the map hardly depends on the weights at all"),
        (
            (0.9, None, None, None),
            "most maps are blank from 2 random layers on, which tells nothing of the rest; --zero-mean may keep them",
        ),
    ],
)
def test_the_verdict_says_what_the_curve_shows(ranks: tuple[float | None, ...], said: str) -> None:
    (near,) = rows(0.99)
    checks = MethodChecks("guided", rows(*ranks), rows(*ranks), near, near)
    verdict = checks.verdict(zero_mean=False)
    assert said in verdict
    assert verdict.endswith("The runner-up's map: 0.99, a random class's: 0.99: tells classes hardly apart")
    assert "tells classes" not in MethodChecks("guided", rows(*ranks), rows(*ranks), None, None).verdict(zero_mean=True)


def test_blank_maps_are_said_to_be(dense: Path, tmp_path: Path) -> None:
    some = (rows(0.9)[0] | {"blank": 2}, *rows(0.2))
    assert "(up to 2 blank maps in a step are left out)" in MethodChecks("guided", some, some, None, None).verdict(
        zero_mean=True
    )
    constants = {"W1": W1, "W2": W2, "W3": 0 * W3}  # no gradient passes, nor do random weights around 0 times 0
    onnx.save(small_model(DENSE, {"x": ["N", 6]}, constants=constants), dense)
    result = run(dense, "--images", dense.with_name("x.npy"), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "gradient: the layer of the scores random: blank; " in result.stdout
    assert "most maps are blank from 1 random layers on" in result.stdout
    told = json.loads((tmp_path / "out" / "sanity.json").read_text())
    assert told["files"] == {}
    assert told["methods"][0]["cascading"][0] == dict.fromkeys(MEASURES) | {"blank": 11}


def test_a_folder_of_pictures_and_figures(photos: Path, tmp_path: Path) -> None:
    net, out = picture_net(tmp_path / "net.onnx"), tmp_path / "out"
    result = run(net, "--images", photos, "--methods", "gradient,guided,rectgrad:95", "-o", out)
    assert result.exit_code == 0, result.output
    told = json.loads((out / "sanity.json").read_text())
    assert told["samples"] == [str(photos / f"{i}.png") for i in range(3)]
    assert [layer["name"] for layer in told["layers"]] == ["head", "high", "low"]
    assert told["layers"][1]["shapes"] == [[6, 8, 3, 3], [6]]
    assert [one["method"] for one in told["methods"]] == ["gradient", "guided", "rectgrad:95"]
    assert all(len(one[kind]) == 3 for one in told["methods"] for kind in ("cascading", "independent"))
    assert told["methods"][0]["cascading"][0]["ssim_absolute"] is not None
    assert sorted(path.name for path in out.iterdir()) == ["curves.sanity.png", "maps.sanity.png", "sanity.json"]
    with Image.open(out / "maps.sanity.png") as grid:
        assert grid.height > 3 * 112
        assert grid.width > 5 * 112  # the photo, trained, three layers
    assert "guided: the layer of the scores random: " in result.stdout
    # Pictures among the photos are not taken for photos, and another seed gives other figures.
    again = run(net, "--images", photos, "--methods", "gradient", "-o", photos, "--json", "--random-seed", "1")
    more = run(net, "--images", photos, "--methods", "gradient", "--json", "--random-seed", "1")
    one, two = (json.loads(each.stdout) for each in (again, more))
    assert one == two
    assert len(one["samples"]) == 3
    assert one["methods"][0]["cascading"] != told["methods"][0]["cascading"]


def test_a_fixed_batch_gives_the_same(photos: Path, tmp_path: Path) -> None:
    found = [
        check_sanity(picture_net(tmp_path / f"{batch}.onnx", batch), photos, methods="guided").to_dict()
        for batch in ("N", 2)
    ]
    for kind in ("cascading", "independent"):
        for a, b in zip(found[0]["methods"][0][kind], found[1]["methods"][0][kind], strict=True):
            assert a == pytest.approx(b, abs=1e-3)


def test_what_cannot_be_checked_is_refused(dense: Path, tmp_path: Path) -> None:
    x = dense.with_name("x.npy")
    onnx.save(onnxgbp.convert(dense), tmp_path / "converted.onnx")
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])]
    onnx.save(small_model(nodes, {"x": ["N", 6]}), tmp_path / "bare.onnx")
    out = tmp_path / "out"
    for model, options, message in (
        (dense, ("--methods", "lime"), "called 'lime'"),
        (dense, ("--methods", "guided,guided"), "are no list of different methods"),
        (dense, ("--methods", ""), "are no list of different methods"),
        (dense, ("--output", "nowhere"), "nowhere"),
        (tmp_path / "converted.onnx", (), "is already a converted file"),
        (tmp_path / "bare.onnx", (), "no layer with weights"),
        (tmp_path / "none.onnx", (), "cannot read"),
    ):
        result = run(model, "--images", x, "-o", out, *options)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not out.exists()
    result = run(dense, "--images", tmp_path / "none.npy", "-o", out)
    assert result.exit_code == 1
    assert not list(out.iterdir())
    with pytest.raises(OnnxgbpError, match="random seed is -1"):
        check_sanity(dense, x, random_seed=-1)


def test_guided_backpropagation_fails_on_a_real_network_and_the_gradient_does_not(
    squeezenet: Path, photo: Path
) -> None:
    """What Adebayo et al. found: with the scores' weights random the gradient is another one, guided the same."""
    opened = open_weights(onnxgbp.load(squeezenet))
    assert len(opened.layers) == 26
    assert opened.layers[0].name == "conv10"
    assert opened.layers[-1].name == "conv1"
    trained = {name: array for layer in opened.layers for name, array in layer.weights.items()}
    drawn = trained
    for place, layer in enumerate(opened.layers[:4]):
        drawn = drawn | random_weights(layer, (0, place))
    found = {}
    for method in ("gradient", "guided"):
        explainer = Explainer(opened.model, method=method, wrt=opened.wrt, diagnose=False)
        spec = explainer.inputs[0]
        x = Preprocessing.of(explainer.metadata, spec).prepare(read(photo))[np.newaxis]
        first = explainer({spec.name: x} | trained)
        changed = explainer({spec.name: x} | drawn, first.target)
        found[method] = likeness(first.attribution[0], changed.attribution[0], 0)
    assert found["guided"].rank_signed is not None
    assert found["gradient"].rank_signed is not None
    assert found["guided"].rank_signed > 0.9
    assert found["gradient"].rank_signed < 0.3
