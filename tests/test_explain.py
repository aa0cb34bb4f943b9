"""`onnxgbp explain`: pictures, arrays and a manifest in a folder, and one clear line for what cannot be done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from PIL import Image

import onnxgbp.explain
from onnxgbp import Explainer, convert, save
from onnxgbp.cli import main

RNG = np.random.default_rng(3)


def tiny(path: Path, *, shape: str = "N,3,8,8", channels: int = 3, bias: float = 0.0, **metadata: Any) -> Path:
    """A classifier of 8 x 8 pictures into 4 classes: Conv, Relu, GlobalAveragePool, Conv, Softmax."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> tiny (float[{shape}] picture) => (float[N,4] p) {{
            c = Conv <pads = [1, 1, 1, 1]> (picture, W, b)  r = Relu(c)  a = GlobalAveragePool(r)
            s = Conv(a, V)  logits = Flatten(s)  p = Softmax(logits)
        }}"""
    )
    weights = {
        "W": RNG.standard_normal((6, channels, 3, 3)),
        "V": RNG.standard_normal((4, 6, 1, 1)),
        "b": np.full(6, bias),
    }
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items())
    onnx.helper.set_model_props(model, {f"onnxgbp.{name}": json.dumps(value) for name, value in metadata.items()})
    onnx.save(model, path)
    return path


def picture(path: Path, size: tuple[int, int] = (12, 10), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def manifest(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return read


def test_writes_pictures_array_and_manifest(tmp_path: Path) -> None:
    model = tiny(tmp_path / "m.onnx", labels=["ant", "bee", "cat", "dog"])
    image = picture(tmp_path / "photo.png")
    out = tmp_path / "deep" / "out"
    result = run(model, image, "-o", out, "--target", 2)
    assert result.exit_code == 0, result.output
    names = ["manifest.json", "photo.attribution.npy", "photo.attribution.png", "photo.overlay.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert size_of(out / "photo.attribution.png") == size_of(out / "photo.overlay.png") == (8, 8)
    array = np.load(out / "photo.attribution.npy")
    assert (array.shape, array.dtype) == ((3, 8, 8), np.float32)
    assert array.min() < 0 < array.max()
    said = manifest(out)
    assert said["sha256"] == Explainer(model).sha256
    assert said["options"]["method"] == "guided"
    (entry,) = said["images"]
    assert (entry["target"], entry["label"], entry["error"]) == (2, "cat", None)
    assert entry["files"]["array"] == "photo.attribution.npy"
    assert [row["score"] for row in entry["top"]] == sorted((row["score"] for row in entry["top"]), reverse=True)
    assert "explained: 2 cat" in result.output
    assert f"clip: {entry['clip']:.4g}" in result.output
    assert "the scores before Softmax" in result.output
    assert "assumed" in result.output  # this model says nothing of how to prepare an image


def test_the_array_is_what_the_explainer_gives(tmp_path: Path) -> None:
    metadata = {"size": 9, "crop": 8, "channels": "bgr", "scale": 1.0, "mean": [1, 2, 3], "std": [4, 5, 6]}
    model = tiny(tmp_path / "m.onnx", preprocessing=metadata)
    image = picture(tmp_path / "photo.png", (9, 9))
    result = run(model, image, "-o", tmp_path / "out", "--method", "gradient", "--size", 9)
    assert result.exit_code == 0, result.output
    assert "assumed layout" in result.output
    with Image.open(image) as opened:
        pixels = np.asarray(opened, np.float32)[:8, :8, ::-1]
    x = ((pixels - np.array([1, 2, 3])) / np.array([4, 5, 6])).transpose(2, 0, 1)[np.newaxis]
    expected = Explainer(model, method="gradient")(x)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "photo.attribution.npy"), expected.attribution[0], rtol=1e-5)
    assert manifest(tmp_path / "out")["images"][0]["target"] == expected.target[0]


def test_grey_and_channels_last(tmp_path: Path) -> None:
    image = picture(tmp_path / "photo.png")
    grey = tiny(tmp_path / "grey.onnx", shape="N,1,8,8", channels=1)
    assert run(grey, image, "-o", tmp_path / "grey").exit_code == 0
    assert np.load(tmp_path / "grey" / "photo.attribution.npy").shape == (1, 8, 8)
    last = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> m (float[N,8,8,3] x) => (float[N,3] y) {
            t = Transpose <perm = [0, 3, 1, 2]> (x)  r = Relu(t)  a = GlobalAveragePool(r)  y = Flatten(a)
        }"""
    )
    onnx.save(last, tmp_path / "last.onnx")
    assert run(tmp_path / "last.onnx", image, "-o", tmp_path / "last").exit_code == 0
    assert np.load(tmp_path / "last" / "photo.attribution.npy").shape == (8, 8, 3)
    assert size_of(tmp_path / "last" / "photo.attribution.png") == (8, 8)


def test_a_converted_model_is_run_as_it_is(tmp_path: Path) -> None:
    source = tiny(tmp_path / "m.onnx")
    save(convert(source, method="deconvnet", target=1), tmp_path / "done.onnx")
    image = picture(tmp_path / "photo.png")
    result = run(tmp_path / "done.onnx", image, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert manifest(tmp_path / "out")["options"]["method"] == "deconvnet"
    assert "explained: 1" in result.output
    refused = run(tmp_path / "done.onnx", image, "-o", tmp_path / "other", "--method", "guided")
    assert refused.exit_code == 1
    assert "already converted with method deconvnet" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_inner_tensors(tmp_path: Path) -> None:
    model, image = tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png")
    result = run(model, image, "-o", tmp_path / "unit", "--output", "c", "--unit", "3")
    assert result.exit_code == 0, result.output
    assert "'c' (unit 3)" in result.output
    assert "explained: unit 3\n" in result.output
    (entry,) = manifest(tmp_path / "unit")["images"]
    assert (entry["unit"], entry["target"], entry["label"], entry["score"]) == ("3", None, None, None)
    result = run(model, image, "-o", tmp_path / "wrt", "--wrt", "r")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "wrt" / "photo.attribution.npy").shape == (6, 8, 8)


def test_a_bad_image_is_skipped(tmp_path: Path) -> None:
    model = tiny(tmp_path / "m.onnx")
    good = [picture(tmp_path / f"{name}.png", seed=n) for n, name in enumerate("ab")]
    cut = tmp_path / "cut.png"
    cut.write_bytes(good[0].read_bytes()[:-40])
    result = run(model, good[0], cut, tmp_path / "nowhere.png", good[1], "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()[:2]] == [
        f"cannot read {cut}",
        f"cannot read {tmp_path / 'nowhere.png'}",
    ]
    assert "2 of the inputs could not be explained" in result.stderr.splitlines()[-1]
    entries = manifest(tmp_path / "out")["images"]
    assert [entry["error"] is None for entry in entries] == [True, False, False, True]
    assert (tmp_path / "out" / "b.overlay.png").exists()
    assert not list((tmp_path / "out").glob("cut*"))


def test_images_of_one_stem_do_not_collide(tmp_path: Path) -> None:
    model = tiny(tmp_path / "m.onnx")
    images = [
        picture(tmp_path / name, seed=n)
        for n, name in enumerate(["x/cat.png", "y/cat.png", "z/Cat.bmp", "z/cat-2.png"])
    ]
    out = tmp_path / "out"
    assert run(model, *images, "-o", out).exit_code == 0
    arrays = [entry["files"]["array"] for entry in manifest(out)["images"]]
    assert arrays == [f"{stem}.attribution.npy" for stem in ("cat", "cat-3", "Cat-4", "cat-2")]
    assert len({np.load(out / name).tobytes() for name in arrays}) == 4


def test_a_folder_is_its_images_in_order(tmp_path: Path) -> None:
    model = tiny(tmp_path / "m.onnx")
    for n in (2, 0, 1, 4, 3):
        picture(tmp_path / "photos" / f"{n}.png", seed=n)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    result = run(model, tmp_path / "photos", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [Path(entry["file"]).name for entry in manifest(tmp_path / "out")["images"]] == [
        f"{n}.png" for n in range(5)
    ]
    (tmp_path / "none").mkdir()
    result = run(model, tmp_path / "none", "-o", tmp_path / "out")
    assert (result.exit_code, "no image in the folder" in result.stderr) == (1, True)


def test_an_inactive_unit_is_said(tmp_path: Path) -> None:
    model, image = tiny(tmp_path / "m.onnx", bias=-1e3), picture(tmp_path / "photo.png")
    result = run(model, image, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "warning: the attribution is zero everywhere" in result.output
    assert manifest(tmp_path / "out")["images"][0]["clip"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "4"], "target 4 is out of range: the model has 4 classes"),
        (["--crop", "7"], "takes 8 x 8 pixels, but the crop is 7 x 7"),
        (["--mean", "1,2"], "mean has 2 values for 3 channels"),
        (["--output", "nothing"], "no tensor 'nothing'"),
        (["--provider", "cuda"], "CUDA"),
    ],
)
def test_refused_with_one_line_and_nothing_written(tmp_path: Path, arguments: list[str], message: str) -> None:
    if "cuda" in arguments and "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("CUDA may be there")
    result = run(tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png"), "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_image_and_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no image given" in run(tiny(tmp_path / "m.onnx"), "-o", tmp_path / "out").stderr
    assert "cannot read" in run(tmp_path / "none.onnx", picture(tmp_path / "p.png"), "-o", tmp_path / "out").stderr
    monkeypatch.setattr(onnxgbp.explain, "DEFAULT_MODEL", tmp_path / "absent.onnx")
    result = run(tmp_path / "p.png", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "tools/build_squeezenet.py" in result.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png"), "-o", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: cannot write {tmp_path / 'file' / 'out'}: ")
    assert len(result.stderr.splitlines()) == 1


def test_an_old_manifest_does_not_outlive_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, out = tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png"), tmp_path / "out"
    assert run(model, image, "-o", out).exit_code == 0

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Explainer, "__call__", broken)
    assert run(model, image, "-o", out).exit_code == 1
    assert not (out / "manifest.json").exists()


def test_the_default_network_sees_the_cat(squeezenet: Path, photo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onnxgbp", "explain", str(photo), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "explained: 285 Egyptian cat" in done.stdout
    (entry,) = manifest(tmp_path / "out")["images"]
    assert entry["top"][0]["label"] == "Egyptian cat"
    assert manifest(tmp_path / "out")["model"].endswith(squeezenet.name)
    # The rows and columns of the cat's left eye stand out: by 3.0 with guided, by 1.5 with the other two methods.
    magnitude = np.abs(np.load(tmp_path / "out" / "chelsea.attribution.npy")).sum(axis=0)
    assert magnitude[55:110, 35:95].mean() > 2.5 * magnitude.mean()


def test_target_argmax_is_the_default_and_input_is_for_others(tmp_path: Path) -> None:
    model, image = tiny(tmp_path / "net.onnx"), picture(tmp_path / "a.png")
    assert run(model, image, "-o", tmp_path / "out", "--target", "argmax").exit_code == 0
    assert run(model, image, "-o", tmp_path / "out", "--target", "input").exit_code == 2


def test_pictures_of_an_earlier_run_are_not_explained(tmp_path: Path) -> None:
    model, folder = tiny(tmp_path / "net.onnx"), tmp_path / "photos"
    folder.mkdir()
    picture(folder / "a.png")
    for _ in range(2):
        assert run(model, folder, "-o", folder).exit_code == 0
    assert [entry["file"] for entry in manifest(folder)["images"]] == [str(folder / "a.png")]


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    """What the manifest before lists is gone, and nothing else: not a file of the user's, not an image to explain."""
    model, out = tiny(tmp_path / "m.onnx"), tmp_path / "out"
    first, second = picture(tmp_path / "first.png"), picture(tmp_path / "second.png", seed=1)
    assert run(model, first, "-o", out).exit_code == 0
    (out / "notes.txt").write_text("mine")
    picture(out / "first.png")
    picture(tmp_path / "precious.png")
    said = manifest(out)
    said["images"][0]["files"]["stranger"] = "../precious.png"
    (out / "manifest.json").write_text(json.dumps(said))
    assert run(model, second, out / "first.overlay.png", "-o", out).exit_code == 0
    made = {name for entry in manifest(out)["images"] for name in entry["files"].values()}
    mine = {"manifest.json", "notes.txt", "first.png", "first.overlay.png"}
    assert {path.name for path in out.iterdir()} == made | mine
    assert (tmp_path / "precious.png").exists()


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"images": 3}', '{"images": [{"files": ["a"]}]}'])
def test_a_strange_manifest_is_replaced(tmp_path: Path, text: str) -> None:
    model, image, out = tiny(tmp_path / "m.onnx"), picture(tmp_path / "photo.png"), tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    assert run(model, image, "-o", out).exit_code == 0
    assert len(manifest(out)["images"]) == 1
