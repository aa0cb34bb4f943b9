"""Two models held against each other: figures written out in numpy, and faults planted to be caught."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, small_model
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnxgbp
from onnxgbp import OnnxgbpError
from onnxgbp.cli import main
from onnxgbp.compare import rank_correlation
from onnxgbp.diff import Thresholds, diff_models

CORPUS = Path(__file__).parent / "data" / "corpus"
RNG = np.random.default_rng(23)
W1 = RNG.standard_normal((6, 16)).astype(np.float32)
W2 = RNG.standard_normal((16, 7)).astype(np.float32)
X = RNG.standard_normal((20, 6)).astype(np.float32)
NODES = [
    helper.make_node("MatMul", ["x", "W1"], ["h"]),
    helper.make_node("Relu", ["h"], ["r"], name="relu"),
    helper.make_node("MatMul", ["r", "W2"], ["y"]),
]


def net(path: Path, w1: Array = W1, w2: Array = W2, *, batch: int | str = "N", softmax: bool = False) -> Path:
    last = [helper.make_node("Softmax", ["y"], ["p"], axis=1)] if softmax else []
    outputs = ["p"] if softmax else ["y"]
    onnx.save(small_model([*NODES, *last], {"x": [batch, 6]}, outputs, constants={"W1": w1, "W2": w2}), path)
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return net(tmp_path / "a.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", X)
    return tmp_path / "x.npy"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


# --- the figures ----------------------------------------------------------------------------------


def guided(x: Array, w1: Array, w2: Array, target: Array) -> Array:
    dy = w2.T[target]
    return np.asarray(np.where((x @ w1 > 0) & (dy > 0), dy, 0) @ w1.T)


def test_the_figures_are_those_of_numpy(a: Path, data: Path, tmp_path: Path) -> None:
    other = W1 + RNG.standard_normal(W1.shape).astype(np.float32) * np.float32(0.6)
    found = diff_models(a, net(tmp_path / "b.onnx", other), data)
    mine, theirs = (np.maximum(X @ w1, 0) @ W2 for w1 in (W1, other))
    target = mine.argmax(axis=1)
    maps = [guided(X, w1, W2, target).astype(np.float64) for w1 in (W1, other)]
    assert [row.name for row in found.rows] == [str(i) for i in range(20)]
    for i, row in enumerate(found.rows):
        one, two = (m[i] for m in maps)
        assert row.top1 == (mine[i].argmax(), theirs[i].argmax())
        assert row.target == row.target_b == target[i]
        best = [set(np.argsort(-s[i])[:5]) for s in (mine, theirs)]
        assert row.top5_overlap == len(best[0] & best[1]) / 5
        assert row.score_difference == pytest.approx(np.abs(mine - theirs)[i].max(), rel=1e-4)
        assert row.mean_score_difference == pytest.approx(np.abs(mine - theirs)[i].mean(), rel=1e-4)
        assert row.divergence is None
        (said,) = row.maps
        assert said.cosine == pytest.approx(one @ two / np.sqrt((one @ one) * (two @ two)), rel=1e-5)
        ranks = [np.argsort(np.argsort(m)) for m in (one, two)]
        assert said.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
        counted = np.abs(one) > 1e-3 * np.abs(one).max()
        assert said.sign_agreement == pytest.approx(np.mean((one > 0) == (two > 0), where=counted))
        assert said.relative_error == pytest.approx(np.median((np.abs(two - one) / np.abs(one))[counted]), rel=1e-4)
    agreement = np.mean(mine.argmax(axis=1) == theirs.argmax(axis=1))
    assert 0 < agreement < 1
    summary = found.summary()
    assert summary["top1_agreement"] == agreement
    cosines = [row.maps[0].cosine for row in found.rows]
    wanted = {"median": np.median(cosines), "1st percentile": np.percentile(cosines, 1)}
    assert summary["cosine"] == pytest.approx(wanted | {"min": min(cosines), "max": max(cosines)})


def test_equal_entries_share_the_middle_of_their_ranks() -> None:
    one, two = np.array([0.0, 0, 0, 5, 7]), np.array([1.0, 3, 2, 3, 4])
    ranks = [1.0, 1, 1, 3, 4], [0.0, 2.5, 1, 2.5, 4]
    assert rank_correlation(one, two) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(one, np.ones(5)) is None


def test_probabilities_have_a_divergence(a: Path, data: Path, tmp_path: Path) -> None:
    pair = [net(tmp_path / f"{i}.onnx", W1 * scale, softmax=True) for i, scale in enumerate((1, np.float32(1.1)))]
    found = diff_models(*pair, data)
    p, q = (
        np.exp(s) / np.exp(s).sum(axis=1, keepdims=True) for s in (np.maximum(X @ (W1 * f), 0) @ W2 for f in (1, 1.1))
    )
    m = (p + q) / 2
    wanted = (np.sum(p * np.log(p / m), axis=1) + np.sum(q * np.log(q / m), axis=1)) / 2
    assert [row.divergence for row in found.rows] == pytest.approx(list(wanted), rel=1e-3, abs=1e-7)
    mixed = diff_models(pair[0], a, data)
    assert "of B, which returns no probabilities as the other does, the softmax is compared" in mixed.to_text()
    assert mixed.summary()["max_score_difference"] < 1e-6


# --- planted faults -------------------------------------------------------------------------------

STRICT = Thresholds(cosine=0.99, agreement=0.999, score_difference=1e-3, relative_error=1e-4)


def swapped_weight(model: onnx.ModelProto) -> None:
    w1 = numpy_helper.to_array(model.graph.initializer[0]).copy()
    w1[:, [2, 9]] = w1[:, [9, 2]]  # two channels of one layer, with those of the next as they were
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w1, model.graph.initializer[0].name))


def changed_output(model: onnx.ModelProto) -> None:
    """The classes come out in another order."""
    (last,) = (node for node in model.graph.node if list(node.output) == ["y"])
    last.output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 0, 2, 3, 4, 6, 5]), "order"))
    model.graph.node.append(helper.make_node("Gather", ["before", "order"], ["y"], axis=1))


def flipped_mask(model: onnx.ModelProto) -> None:
    """The first comparison with zero of the gradient goes the other way."""
    node = next(node for node in model.graph.node if node.op_type == "Greater")
    node.op_type = "Less"


def rounded_map(model: onnx.ModelProto) -> None:
    (maker,) = (node for node in model.graph.node if "attribution" in node.output)
    maker.output[0] = "exact"
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["exact"], ["narrow"], to=TensorProto.BFLOAT16),
            helper.make_node("Cast", ["narrow"], ["attribution"], to=TensorProto.FLOAT),
        ]
    )


def broken_map(model: onnx.ModelProto) -> None:
    (maker,) = (node for node in model.graph.node if "attribution" in node.output)
    maker.output[0] = "exact"
    model.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
    model.graph.node.append(helper.make_node("Mul", ["exact", "nan"], ["attribution"]))


@pytest.mark.parametrize(
    ("fault", "converted", "missed"),
    [
        (swapped_weight, False, {"agreement", "score difference", "cosine", "relative error"}),
        (swapped_weight, True, {"agreement", "score difference", "cosine", "relative error"}),
        (changed_output, False, {"agreement", "score difference", "cosine", "relative error"}),
        (flipped_mask, True, {"cosine", "relative error"}),
        (rounded_map, True, {"relative error"}),
        (broken_map, True, {"cosine", "relative error"}),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN is what broken_map is about
def test_a_planted_fault_is_caught(
    a: Path, data: Path, tmp_path: Path, fault: Callable[[onnx.ModelProto], None], converted: bool, missed: set[str]
) -> None:
    model = onnxgbp.convert(a, target="input") if converted else onnx.load(a)
    onnx.save(model, tmp_path / "right.onnx")
    assert diff_models(a, tmp_path / "right.onnx", data, thresholds=STRICT).passed
    fault(model)
    onnx.save(model, tmp_path / "b.onnx")
    found = diff_models(a, tmp_path / "b.onnx", data, thresholds=STRICT)
    assert {line.partition(" is ")[0].rstrip("0123456789. ") for line in found.missed} == missed
    # The rounded map is as good as the right one to a cosine.
    if fault is rounded_map:
        assert found.summary()["cosine"]["min"] > 0.99999


def test_a_missed_threshold_names_the_samples(a: Path, data: Path, tmp_path: Path) -> None:
    w2 = W2.copy()
    w2[:, 3] += np.float32(0.2)  # class 3 comes out stronger
    b = net(tmp_path / "b.onnx", w2=w2)
    mine, theirs = (np.maximum(X @ W1, 0) @ w for w in (W2, w2))
    wrong = np.flatnonzero(mine.argmax(axis=1) != theirs.argmax(axis=1))
    assert 0 < len(wrong) <= 5
    result = run(a, b, "--data", data, "--min-agreement", "0.999", "--max-score-difference", "100")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    share = 1 - len(wrong) / 20
    assert line.startswith(f"FAIL: agreement {share:g} is below 0.999 in {len(wrong)} of 20 samples: ")
    assert all(f"{i} (A {mine[i].argmax()}, B 3)" in line for i in wrong)
    assert f"top-1 agreement    {share:g}" in result.stdout

    far = run(a, b, "--data", data, "--max-score-difference", "0.001", "--json")
    assert far.exit_code == 1
    told = json.loads(far.stdout)
    assert not told["passed"]
    assert told["missed"] == [far.stderr.removeprefix("FAIL: ").rstrip("\n")]
    worst = int(np.abs(mine - theirs).max(axis=1).argmax())
    assert told["missed"][0].startswith(f"score difference is above 0.001 in 20 of 20 samples: {worst} (")
    assert told["missed"][0].endswith(" and 15 more")
    assert [row["name"] for row in told["samples"]] == [str(i) for i in range(20)]
    assert run(a, b, "--data", data).exit_code == 0


def test_json_has_no_infinity(a: Path, data: Path, tmp_path: Path) -> None:
    b = net(tmp_path / "b.onnx", w2=np.where(np.arange(7) == 2, np.nan, W2).astype(np.float32))
    result = run(a, b, "--data", data, "--json", "--max-score-difference", "1e9")
    assert result.exit_code == 1
    told = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["samples"][0]["score_difference"] is None
    assert told["samples"][0]["top1"][1] is None
    assert told["summary"]["top1_agreement"] == 0


# --- the class that is explained ------------------------------------------------------------------


def test_both_explain_the_class_of_a(a: Path, data: Path, tmp_path: Path) -> None:
    b = net(tmp_path / "b.onnx", w2=W2[:, ::-1].copy())  # its strongest is another nearly always
    found = diff_models(a, b, data)
    strongest = (np.maximum(X @ W1, 0) @ W2).argmax(axis=1)
    assert [row.target for row in found.rows] == [row.target_b for row in found.rows] == strongest.tolist()
    assert {row.target for row in diff_models(a, b, data, target=4).rows} == {4}


@pytest.mark.parametrize("swap", [False, True])
def test_a_converted_file_that_chooses_leads(a: Path, data: Path, tmp_path: Path, swap: bool) -> None:
    onnxgbp.save(onnxgbp.convert(net(tmp_path / "b.onnx", w2=W2[:, ::-1].copy())), tmp_path / "c.onnx")
    pair = (tmp_path / "c.onnx", a) if swap else (a, tmp_path / "c.onnx")
    chosen = (np.maximum(X @ W1, 0) @ W2[:, ::-1]).argmax(axis=1)
    found = diff_models(*pair, data)
    assert [row.target for row in found.rows] == [row.target_b for row in found.rows] == chosen.tolist()
    assert all(row.maps for row in found.rows)
    with pytest.raises(OnnxgbpError, match="converted with --target argmax"):
        diff_models(*pair, data, target=2)


def test_two_that_choose_are_compared_where_they_chose_the_same(a: Path, data: Path, tmp_path: Path) -> None:
    w2 = W2.copy()
    w2[:, 3] += np.float32(0.5)
    onnxgbp.save(onnxgbp.convert(a), tmp_path / "1.onnx")
    onnxgbp.save(onnxgbp.convert(net(tmp_path / "b.onnx", w2=w2)), tmp_path / "2.onnx")
    found = diff_models(tmp_path / "1.onnx", tmp_path / "2.onnx", data, thresholds=Thresholds(cosine=-1))
    for row in found.rows:
        assert bool(row.maps) == row.agrees
    apart = [row for row in found.rows if not row.maps]
    assert 0 < len(apart) < 20
    (line,) = found.missed
    assert f"cosine is below -1 in {len(apart)} of 20 samples" in line
    assert f"{apart[0].name} (A explains {apart[0].target}, B 3)" in line
    assert f"the same class explained in {20 - len(apart)}" in found.to_text()


def test_several_classes_and_methods_of_two_files(a: Path, data: Path, tmp_path: Path) -> None:
    model = onnxgbp.convert(a, methods=["gradient", "guided"], target="top2")
    onnxgbp.save(model, tmp_path / "1.onnx")
    onnxgbp.save(model, tmp_path / "2.onnx")
    found = diff_models(tmp_path / "1.onnx", tmp_path / "2.onnx", data, thresholds=STRICT)
    assert found.passed
    assert [one.name for one in found.rows[0].maps] == ["gradient", "guided"]
    assert len(found.rows[0].target) == 2


# --- data that fits both --------------------------------------------------------------------------

KERNEL = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
HEAD = RNG.standard_normal((4 * 10 * 12, 5)).astype(np.float32)
IMAGES = RNG.standard_normal((5, 3, 10, 12)).astype(np.float32)


def image_net(path: Path, axes: str, *, normalised: bool = False, name: str = "x", **metadata: Any) -> Path:
    """Normalised: pixels in RGB from 0 to 255 go in, and the net does what `PREPARED` says."""
    nodes, constants = [], {"W": KERNEL, "V": HEAD}
    x = name
    if axes == "nhwc":
        nodes.append(helper.make_node("Transpose", [x], ["turned"], perm=[0, 3, 1, 2]))
        x = "turned"
    if normalised:
        constants |= {
            "order": np.array([2, 1, 0]),
            "mean": np.array(PREPARED["mean"], np.float32).reshape(3, 1, 1),
            "slope": (1 / np.array(PREPARED["std"], np.float32)).reshape(3, 1, 1),
        }
        nodes += [
            helper.make_node("Gather", [x, "order"], ["bgr"], axis=1),
            helper.make_node("Sub", ["bgr", "mean"], ["centred"]),
            helper.make_node("Mul", ["centred", "slope"], ["scaled"]),
        ]
        x = "scaled"
    nodes += [
        helper.make_node("Conv", [x, "W"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("MatMul", ["f", "V"], ["y"]),
    ]
    shape = [3, 10, 12] if axes == "nchw" else [10, 12, 3]
    model = small_model(nodes, {name: ["N", *shape]}, constants=constants)
    if metadata:
        model.metadata_props.add(key="onnxgbp.preprocessing", value=json.dumps(metadata))
    onnx.save(model, path)
    return path


PREPARED: dict[str, Any] = {"channels": "bgr", "scale": 1, "mean": [100, 110, 120], "std": [50, 60, 70]}
CUT = {"size": 12, "crop": [10, 12]}


def test_arrays_are_turned_only_when_that_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "turned.npy", IMAGES.transpose(0, 2, 3, 1))
    nchw, nhwc = image_net(tmp_path / "a.onnx", "nchw"), image_net(tmp_path / "b.onnx", "nhwc", name="image")
    with pytest.raises(OnnxgbpError, match=r"no array fits both: A takes 'x' \[N, 3, 10, 12\].*--layout-b"):
        diff_models(nchw, nhwc, tmp_path / "x.npy")
    assert diff_models(nchw, nhwc, tmp_path / "x.npy", layout_b="nhwc", thresholds=STRICT).passed
    assert diff_models(nhwc, nchw, tmp_path / "turned.npy", layout_b="nchw", thresholds=STRICT).passed
    with pytest.raises(OnnxgbpError, match="no array fits both"):
        diff_models(nchw, nchw, tmp_path / "x.npy", layout_b="nhwc")
    # With K classes the maps have an axis more.
    for name, model in (("a", nchw), ("b", nhwc)):
        onnxgbp.save(onnxgbp.convert(model, target="top2"), tmp_path / f"{name}2.onnx")
    pair = tmp_path / "a2.onnx", tmp_path / "b2.onnx"
    assert diff_models(*pair, tmp_path / "x.npy", layout_b="nhwc", thresholds=STRICT).passed


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(RNG.integers(0, 256, (14 + i, 20, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_photos_are_prepared_for_each_and_the_maps_are_of_pixels(tmp_path: Path, photos: Path) -> None:
    """One net takes BGR, normalised, as NCHW; the other takes pixels as NHWC and does the same inside."""
    outside = image_net(tmp_path / "a.onnx", "nchw", **PREPARED, **CUT)
    inside = image_net(tmp_path / "b.onnx", "nhwc", normalised=True, scale=1, layout="nhwc", **CUT)
    for pair in ((outside, inside), (inside, outside)):
        found = diff_models(*pair, photos, thresholds=Thresholds(0.9999, 1, 1e-2, 1e-3))
        assert found.passed, found.missed
        assert [Path(row.name).name for row in found.rows] == ["0.png", "1.png", "2.png"]
    assert "input of B: shorter side 12, crop 10 x 12, bgr, scale 1, mean 100,110,120" in found.to_text()
    swapped = image_net(tmp_path / "c.onnx", "nchw", **{**PREPARED, "channels": "rgb"}, **CUT)
    assert not diff_models(outside, swapped, photos, thresholds=STRICT).passed


def test_photos_seen_differently_are_refused(tmp_path: Path, photos: Path) -> None:
    one = image_net(tmp_path / "a.onnx", "nchw", size=14)
    two = image_net(tmp_path / "b.onnx", "nchw", size=13)
    with pytest.raises(OnnxgbpError, match="the models see different parts of a photo"):
        diff_models(one, two, photos)
    result = run(one, two, "--data", photos, "--size", "14", "--min-cosine", "0.9999")
    assert result.exit_code == 0, result.output
    assert "assumed, since the model does not say: crop, channels" in result.output


def test_batches_of_different_sizes(data: Path, tmp_path: Path) -> None:
    nets = [net(tmp_path / f"{batch}.onnx", batch=batch) for batch in ("N", 3, 8)]
    for a in nets:
        for b in nets:
            found = diff_models(a, b, data, thresholds=STRICT)
            assert found.passed
            assert len(found.rows) == 20
    assert len(diff_models(nets[1], nets[2], data, limit=7).rows) == 7


def test_several_inputs_are_matched_by_name(tmp_path: Path) -> None:
    def two(path: Path, first: str, second: str) -> Path:
        nodes = [helper.make_node("Mul", ["p", "q"], ["x"]), *NODES]
        inputs: dict[str, list[int | str | None]] = {first: ["N", 6], second: ["N", 6]}
        onnx.save(small_model(nodes, inputs, constants={"W1": W1, "W2": W2}), path)
        return path

    np.savez(tmp_path / "x.npz", p=X, q=X[::-1])
    pair = two(tmp_path / "1.onnx", "p", "q"), two(tmp_path / "2.onnx", "q", "p")
    found = diff_models(*pair, tmp_path / "x.npz", thresholds=STRICT)
    assert found.passed
    assert sorted(one.name for one in found.rows[0].maps) == ["p", "q"]
    with pytest.raises(OnnxgbpError, match="A takes 2 inputs and B 1"):
        diff_models(pair[0], net(tmp_path / "b.onnx"), tmp_path / "x.npz")


def test_what_cannot_be_compared_is_refused(a: Path, data: Path, tmp_path: Path) -> None:
    onnxgbp.save(onnxgbp.convert(a, method="gradient"), tmp_path / "plain.onnx")
    onnxgbp.save(onnxgbp.convert(a, seed="activation"), tmp_path / "seed.onnx")
    fewer = net(tmp_path / "fewer.onnx", w2=W2[:, :4].copy())
    for b, options, message in (
        (tmp_path / "plain.onnx", (), r"different kinds cannot be compared: .* has method guided, .* has gradient"),
        (tmp_path / "seed.onnx", (), "has seed one, .* has activation; convert both with the same options"),
        (fewer, (), "A explains one of 7 classes, B one of 4"),
        (a, ("--layout-b", "nhwc"), "an input of four axes"),
        (a, ("--target", "cat"), "names no classes"),
        (a, ("--method", "lime"), "no method is called 'lime'"),
        (a, ("--min-cosine", "nan"), "the threshold of cosine is nan, no finite number"),
        (tmp_path / "none.onnx", (), "cannot read"),
    ):
        result = run(a, b, "--data", data, *options)
        assert result.exit_code in (1, 2)
        assert re.search(message, result.stderr), result.stderr
    assert run(a, tmp_path / "plain.onnx", "--data", data, "--method", "gradient").exit_code == 0
    onnxgbp.save(onnxgbp.convert(a, rule="relu=gradient"), tmp_path / "ruled.onnx")
    told = run(a, tmp_path / "ruled.onnx", "--data", data)
    assert 'rules: A has ["*=guided"], B has ["relu=gradient", "*=guided"]' in told.stdout


# --- real files -----------------------------------------------------------------------------------


def real(one: str, two: str, arrays: str, tmp_path: Path, **options: Any) -> Any:
    source = onnxgbp.load(CORPUS / one).model.graph.inputs[0].name
    np.savez(tmp_path / "x.npz", **{str(source): np.load(CORPUS / arrays)["x"]})
    return diff_models(CORPUS / one, CORPUS / two, tmp_path / "x.npz", **options)


def test_two_exporters_of_one_net_agree(tmp_path: Path) -> None:
    for one, two, arrays in (
        ("torch_mnist_relu.ts17.onnx", "torch_mnist_relu.dyn20.onnx", "torch_mnist_relu.npz"),
        ("torch_mnist_gelu.ts17.onnx", "torch_mnist_gelu.dyn.onnx", "torch_mnist_gelu.npz"),
        ("keras_tensorflow_relu.kexport.onnx", "keras_tensorflow_relu.tf2onnx11.onnx", "keras_tensorflow_relu.npz"),
    ):
        for method in ("gradient", "guided"):
            found = real(one, two, arrays, tmp_path, method=method, thresholds=Thresholds(0.9999, 1, 1e-4, 1e-4))
            assert found.passed, found.missed


def test_quantised_and_float16_differ_by_what_is_known_of_them(tmp_path: Path) -> None:
    base = "torch_mnist_relu.ts17.onnx"
    for two, cosine in (("torch_mnist_relu.fp16_keepio.onnx", 0.99), ("torch_mnist_relu.qdq.onnx", 0.98)):
        found = real(base, two, "torch_mnist_relu.npz", tmp_path, thresholds=Thresholds(cosine, 0.999, 0.5))
        assert found.passed, found.missed
        assert not real(base, two, "torch_mnist_relu.npz", tmp_path, thresholds=STRICT).passed
    other = real(base, "torch_mnist_relu6.ts17.onnx", "torch_mnist_relu.npz", tmp_path, thresholds=Thresholds(0.99))
    assert not other.passed
