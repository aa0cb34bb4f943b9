"""Faithfulness figures: curves against numpy's, and nets of which it is known what they look at."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, small_model
from click.testing import CliRunner, Result
from onnx import helper
from PIL import Image

import onnxgbp
from onnxgbp import Explainer
from onnxgbp.cli import main
from onnxgbp.faithfulness import check_faithfulness
from onnxgbp.faithfulness_report import FaithfulnessReport, MethodFigures, SampleFigures
from onnxgbp.images import Preprocessing

RNG = np.random.default_rng(43)
SIDE = 24
LOOKED_AT = (slice(4, 10), slice(12, 20))  # rows, columns
X = RNG.standard_normal((6, 3, SIDE, SIDE)).astype(np.float32)
X[:, :, 4:10, 12:20] += 2


def weights() -> Array:
    """Class 1 is the sum of a rectangle, with a different weight for each pixel; class 0 is nothing."""
    held = np.zeros((3, SIDE, SIDE, 2), np.float32)
    rows, columns = LOOKED_AT
    held[:, rows, columns, 1] = RNG.uniform(0.01, 0.03, (3, 6, 8))
    return held.reshape(-1, 2)


W = weights()


def looking_net(path: Path, *, batch: int | str = "N", last: str = "", w: Array = W, **metadata: Any) -> Path:
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "W"], ["s" if last else "y"])]
    nodes += [helper.make_node(last, ["s"], ["y"])] if last else []
    model = small_model(nodes, {"x": [batch, 3, SIDE, SIDE]}, constants={"W": w})
    if metadata:
        model.metadata_props.add(key="onnxgbp.preprocessing", value=json.dumps(metadata))
    onnx.save(model, path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", X)
    return tmp_path / "x.npy"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["faithfulness", *map(str, arguments)])


def of(report: FaithfulnessReport, method: str) -> MethodFigures:
    (found,) = (one for one in report.figures if one.method == method)
    return found


# --- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["", "Softmax", "Sigmoid"])
@pytest.mark.parametrize("batch", ["N", 4])
def test_curves_are_those_of_numpy(tmp_path: Path, data: Path, last: str, batch: int | str) -> None:
    net = looking_net(tmp_path / "net.onnx", batch=batch, last=last)
    found = check_faithfulness(net, data, methods="gradient", baseline="mean", steps=20, noise_samples=0)
    order = W[:, 1].reshape(3, SIDE, SIDE).sum(axis=0).ravel().argsort()[::-1]
    for x, row in zip(X, of(found, "gradient").rows, strict=True):
        gone = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape).reshape(3, -1)
        whole = x.reshape(3, -1)
        for curve, before, behind in ((row.deletion, whole, gone), (row.insertion, gone, whole)):
            wanted = []
            for share in np.linspace(0, 1, 21):
                changed, taken = before.copy(), order[: round(share * order.size)]
                changed[:, taken] = behind[:, taken]
                score = changed.ravel().astype(np.float64) @ W[:, 1]
                wanted.append(1 / (1 + np.exp(-score)))  # of two classes, of which one is always 0, softmax is the same
            np.testing.assert_allclose(curve, wanted, atol=1e-5)
            area = row.areas[curve is row.insertion]
            assert area == pytest.approx(sum((a + b) / 40 for a, b in itertools.pairwise(wanted)), abs=1e-5)
        assert row.sensitivity is None
        assert row.hit is None


@pytest.mark.parametrize("batch", ["N", 4])
def test_expected_gradients_draw_from_the_samples(tmp_path: Path, data: Path, batch: int | str) -> None:
    net = looking_net(tmp_path / "net.onnx", batch=batch)
    found = check_faithfulness(net, data, methods="expected-gradients", baseline="mean", steps=20, noise_samples=0)
    explainer = Explainer(looking_net(tmp_path / "free.onnx"), method="expected-gradients", baseline=X)
    maps = np.abs(explainer(X).attribution).sum(axis=1).reshape(6, -1)
    for x, one, row in zip(X.reshape(6, 3, -1), maps, of(found, "expected-gradients").rows, strict=True):
        kept = np.where(np.argsort(np.argsort(-one)) < round(0.05 * one.size), x.mean(axis=1, keepdims=True), x)
        score = kept.ravel().astype(np.float64) @ W[:, 1]
        assert row.deletion[1] == pytest.approx(1 / (1 + np.exp(-score)), abs=1e-5)


def test_samples_that_can_be_no_baselines_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=1),
        helper.make_node("ReduceMean", ["f"], ["y"], axes=[2, 3], keepdims=0),
    ]
    onnx.save(small_model(nodes, {"x": [1, 3, 8, 8]}, opset=17, dtype=onnx.TensorProto.UINT8), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 8, 8), np.uint8))
    result = run(tmp_path / "net.onnx", "--images", tmp_path / "x.npy", "--methods", "gradient,expected-gradients")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: expected-gradients draws its baselines from the samples")


def test_blurring_leaves_the_means_and_takes_the_edges(tmp_path: Path, data: Path) -> None:
    found = check_faithfulness(looking_net(tmp_path / "net.onnx"), data, methods="gradient", noise_samples=0)
    for row in of(found, "gradient").rows:
        assert row.deletion[0] == row.insertion[-1]
        assert row.deletion[-1] == row.insertion[0]
        assert row.deletion[0] > row.deletion[-1]


def test_maps_that_point_at_what_is_looked_at_win(tmp_path: Path, data: Path) -> None:
    net = looking_net(tmp_path / "net.onnx")
    found = check_faithfulness(net, data, methods="gradient,guided", noise_samples=3)
    verdicts = found.verdicts()
    assert verdicts["gradient"].startswith("beats a random map (deletion better by ")
    assert verdicts["gradient"].endswith("; beats an edge detector in deletion and insertion")
    assert set(verdicts) == {"gradient", "guided", "sobel"}
    # The gradient of a linear score is the same everywhere; a random map is another each time.
    assert [row.sensitivity for row in of(found, "gradient").rows] == pytest.approx([0] * 6, abs=1e-6)
    assert [row.sensitivity for row in of(found, "random").rows] == pytest.approx([0.5**0.5] * 6, rel=0.1)
    again = check_faithfulness(net, data, methods="gradient,guided", noise_samples=3)
    assert again == found
    other = check_faithfulness(net, data, methods="gradient,guided", noise_samples=3, random_seed=1)
    assert of(other, "random") != of(found, "random")
    # Four samples are too few to say.
    assert "no verdict from fewer than 5 samples" in check_faithfulness(net, data, limit=4).verdicts()["gradient"]


def figures(name: str, areas: list[float]) -> MethodFigures:
    return MethodFigures(name, tuple(SampleFigures((area,) * 3, (1 - area,) * 3, None, None) for area in areas))


@pytest.mark.parametrize(
    ("areas", "said"),
    [
        ([0.1, 0.12, 0.11, 0.1, 0.13], "beats a random map (deletion better by 0.388 +- 0.006"),
        ([0.9, 0.92, 0.9, 0.91, 0.9], "does NOT beat a random map (deletion worse by -0.406 +- 0.004"),
        ([0.9, 0.1, 0.9, 0.1, 0.5], "does NOT beat a random map (deletion not told apart, insertion not told apart)"),
    ],
)
def test_verdicts(areas: list[float], said: str) -> None:
    both = (figures("guided", areas), figures("random", [0.5] * 5))
    report = FaithfulnessReport("m", "", "y", "p", "blur", 2, 0.02, 0, 0, tuple("abcde"), (), both)
    assert report.verdicts()["guided"].startswith(said)
    assert "deletion AUC" in report.to_text()


# --- the pointing game ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (64, 64), (40, 500)])
@pytest.mark.parametrize("options", [{"size": 32, "crop": (24, 28)}, {"size": 25}, {"crop": (30, 36)}, {}])
def test_a_box_is_where_the_crop_puts_it(size: tuple[int, int], options: dict[str, Any]) -> None:
    """A bright rectangle in a dark photo is found in the crop."""
    width, height = size
    box = (width // 2 - 8, height // 2 - 6, width // 2 + 10, height // 2 + 4)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    prepared = Preprocessing(**options)
    shown = np.asarray(prepared.cropped(Image.fromarray(pixels)), float)[..., 0] > 127
    rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
    placed = np.clip(prepared.placed(box, size), 0, [shown.shape[1], shown.shape[0]] * 2)
    assert placed == pytest.approx([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], abs=1)


def test_the_pointing_game(tmp_path: Path) -> None:
    """The net looks at rows 4 to 10 and columns 12 to 20 of the middle of a photo that is twice as large."""
    strong = np.zeros((3, SIDE, SIDE, 2), np.float32)
    strong[:, 2, 3, 1] = 1  # one pixel near the upper left corner
    w = strong.reshape(-1, 2)
    net = looking_net(tmp_path / "net.onnx", w=w, size=SIDE, crop=[SIDE, SIDE])
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abcde":
        Image.fromarray(RNG.integers(50, 256, (2 * SIDE, 2 * SIDE + 20, 3), np.uint8)).save(folder / f"{name}.png")
    # The crop starts at column 10 of the photo; the strong pixel is at x 16 to 18, y 4 to 6 there.
    boxes = {
        "a.png": [15, 3, 20, 8],
        "b.png": [50, 40, 60, 47],  # 15 pixels of the crop and more away
        "c.png": [[50, 40, 60, 47], [30, 10, 34, 14]],  # the second is within 15
        "d.png": [0, 0, 9, 9],  # cut off
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    found = check_faithfulness(net, folder, methods="gradient", boxes=tmp_path / "boxes.json", noise_samples=0)
    assert [row.hit for row in of(found, "gradient").rows] == [True, False, True, None, None]
    assert of(found, "gradient").summary()["hit"]["mean"] == pytest.approx(2 / 3)
    assert "3 of 5 samples have a box" in found.to_text()
    # Of an array, a sample is called by its index.
    np.save(tmp_path / "x.npy", np.ones((3, 3, SIDE, SIDE), np.float32))
    (tmp_path / "boxes.json").write_text(json.dumps({"1": [2, 1, 5, 4], "2": [20, 20, 24, 24]}))
    found = check_faithfulness(net, tmp_path / "x.npy", methods="gradient", boxes=tmp_path / "boxes.json")
    assert [row.hit for row in of(found, "gradient").rows] == [None, True, False]


# --- what is written, what is refused -------------------------------------------------------------


def test_a_folder_of_curves_and_figures(tmp_path: Path, data: Path) -> None:
    net, out = looking_net(tmp_path / "net.onnx"), tmp_path / "out"
    result = run(net, "--images", data, "--methods", "gradient,deconvnet", "--steps", "8", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads((out / "faithfulness.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert {**json.loads(result.stdout), "files": told["files"]} == told
    assert sorted(path.name for path in out.iterdir()) == ["curves.faithfulness.png", "faithfulness.json"]
    assert [one["method"] for one in told["methods"]] == ["gradient", "deconvnet", "random", "sobel"]
    assert told["methods"][2]["verdict"] is None
    assert len(told["methods"][0]["samples"]) == 6
    assert len(told["methods"][0]["samples"][0]["deletion"]) == 9
    mean = np.mean([row["deletion_auc"] for row in told["methods"][0]["samples"]])
    assert told["methods"][0]["deletion"]["mean"] == pytest.approx(mean)
    with Image.open(out / "curves.faithfulness.png") as picture:
        assert picture.width > 400


def test_inputs_that_are_no_pictures(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"])]
    w = np.zeros((40, 3), np.float32)
    w[:5, 1] = 1
    onnx.save(small_model(nodes, {"x": ["N", 40]}, constants={"W": w}), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.abs(RNG.standard_normal((8, 40))).astype(np.float32) * ([3] * 5 + [1] * 35))
    found = check_faithfulness(tmp_path / "net.onnx", tmp_path / "x.npy", methods="gradient")
    assert [one.method for one in found.figures] == ["gradient", "random"]
    assert found.verdicts()["gradient"].startswith("beats a random map (")


def test_what_cannot_be_measured_is_refused(tmp_path: Path, data: Path) -> None:
    net, out = looking_net(tmp_path / "net.onnx"), tmp_path / "out"
    onnxgbp.save(onnxgbp.convert(net), tmp_path / "converted.onnx")
    for name, text in {
        "list": "[1]",
        "broken": "{",
        "box": '{"0": [5, 5, 1, 9]}',
        "none": '{"7": [0, 0, 1, 1]}',
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    for model, options, message in (
        (net, ("--methods", "lime"), "called 'lime'"),
        (net, ("--methods", "gradient,random"), "'random' is measured beside the methods"),
        (net, ("--baseline", "grey"), "no baseline is called 'grey'"),
        (net, ("--radius", "0"), "the radius above 0"),
        (net, ("--boxes", str(tmp_path / "there.json")), "cannot read"),
        (net, ("--boxes", str(tmp_path / "list.json")), "no JSON object of file names and boxes"),
        (net, ("--boxes", str(tmp_path / "broken.json")), "it is no JSON"),
        (net, ("--boxes", str(tmp_path / "box.json")), "the box of '0' is [5, 5, 1, 9], not [x0, y0, x1, y1]"),
        (tmp_path / "converted.onnx", (), "is already a converted file"),
    ):
        result = run(model, "--images", data, "-o", out, *options)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not out.exists()
    result = run(net, "--images", data, "-o", out, "--boxes", tmp_path / "none.json")
    assert result.exit_code == 1
    assert "has a box within the crop for none of the 6 samples" in result.stderr
    assert not list(out.iterdir())
