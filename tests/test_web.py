"""The page of tools/web: used in a real browser, and its numbers against Python's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checking import cosine
from environments import NotInstalledError, program
from PIL import Image
from runtimes.run import RUNTIMES, largest_error

import onnxgbp
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing, read

ROOT = Path(__file__).resolve().parent.parent
TABBY = 281


def node(*arguments: object, **variables: str) -> None:
    done = subprocess.run(
        [program("node"), *map(str, arguments)], env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr


@pytest.fixture(scope="module")
def browser() -> dict[str, str]:
    """The variables that name Chromium and the folder of npm's packages."""
    try:
        return RUNTIMES["chromium"].command()[1]
    except NotInstalledError as error:
        pytest.skip(f"no browser: {error}")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a copy of the page in the folder."""
    command = [sys.executable, str(folder / "serve.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def page(folder: Path, browser: dict[str, str], *, models: bool = True, runtime: bool = True) -> Path:
    """A copy of the page, with what `tools/web/start` puts beside it, or without."""
    ignored = shutil.ignore_patterns("models", "node_modules", "__pycache__")
    shutil.copytree(ROOT / "tools" / "web", folder, ignore=ignored)
    if models:
        command = [sys.executable, str(ROOT / "tools" / "web" / "build.py"), "--out", str(folder / "models")]
        subprocess.run(command, check=True, capture_output=True)
    if runtime:
        (folder / "node_modules").symlink_to(browser["NODE_PATH"])
    return folder


def used(folder: Path, photo: Path, out: Path, browser: dict[str, str]) -> dict[str, Any]:
    """What the page said, step by step, when web.mjs used it; its maps lie in `out`."""
    out.mkdir()
    with served(folder) as url:
        node(ROOT / "tests" / "web.mjs", url, photo, out, **browser)
    told: dict[str, Any] = json.loads((out / "told.json").read_text())
    # Nothing left the computer, and nothing went wrong in silence.
    assert all(request.startswith((url, "blob:", "data:")) for request in told["requests"])
    return told


def explained(model: Path, photo: Path, method: str, target: int | None) -> Any:
    explainer = onnxgbp.Explainer(model, method=method, provider="cpu")
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
    return explainer(prepared.prepare(read(photo))[np.newaxis], target)


@pytest.fixture(scope="module")
def visit(
    squeezenet: Path, photo: Path, tmp_path_factory: pytest.TempPathFactory, browser: dict[str, str]
) -> tuple[dict[str, Any], Path]:
    """What the page said when Chelsea was dropped on it, and where its maps lie."""
    folder = tmp_path_factory.mktemp("visit")
    return used(page(folder / "web", browser), photo, folder / "out", browser), folder / "out"


def test_a_photo_dropped_on_the_page(visit: tuple[dict[str, Any], Path], squeezenet: Path, photo: Path) -> None:
    told, out = visit
    assert told["console"] == []
    assert told["unlabelled"] == []
    assert told["overflow"] <= 0, "a narrow window needs no sideways scrolling"
    labels = json.loads(onnxgbp.Explainer(squeezenet, provider="cpu").metadata["onnxgbp.labels"])
    strongest = np.argsort(-explained(squeezenet, photo, "guided", None).scores[0])[:5]
    assert told["guided"]["top"] == [labels[index] for index in strongest]
    second = int(strongest[1])
    for step, method, target in (
        ("guided", "guided", int(strongest[0])),
        ("other_class", "guided", TABBY),
        ("second", "guided", second),
        ("gradient", "gradient", second),
        ("deconvnet", "deconvnet", second),
    ):
        assert labels[target] in told[step]["status"]
        assert told[step]["file"] == f"chelsea.{method}.{target}.npy"
        found = np.load(out / f"{step}.npy")
        assert found.dtype == np.float32
        # The page decodes, resizes, crops and runs by itself: of a PNG every pixel comes out the same.
        assert largest_error(found, explained(squeezenet, photo, method, target).attribution) <= 1e-4


def test_what_the_page_refuses(visit: tuple[dict[str, Any], Path]) -> None:
    """One line each, and the page goes on: the last result stays, with its own status."""
    told, _ = visit
    assert told["no_image"]["error"] == "notes.txt is not an image that this browser reads"
    assert told["no_model"]["error"] == "broken.onnx is no ONNX file, or a damaged one"
    assert told["no_class"]["error"].startswith('no class is called "no such class"')
    assert told["no_class"]["status"] == told["other_class"]["status"]
    for step in ("no_image", "no_model"):
        assert told[step]["status"] == told["empty"]["status"] == "Ready: choose a photo."
    assert told["plain_model"]["error"].startswith("plain.onnx gives no attribution: convert it first")


@pytest.mark.parametrize(("part", "said"), [("models", "no model is next to this page"), ("runtime", "npm install")])
def test_a_page_with_a_part_missing(
    part: str, said: str, squeezenet: Path, photo: Path, tmp_path: Path, browser: dict[str, str]
) -> None:
    told = used(page(tmp_path / "web", browser, **{part: False}), photo, tmp_path / "out", browser)
    assert said in told["empty"]["error"]


def test_a_jpeg_from_a_phone(squeezenet: Path, photo: Path, tmp_path: Path, browser: dict[str, str]) -> None:
    """Turned by its EXIF data as Python turns it. Two JPEG decoders differ by a level here and there, so the map by
    a little more.
    """
    picture = Image.open(photo).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it clockwise to see it upright
    picture.save(tmp_path / "phone.jpg", quality=95, exif=exif)
    told = used(page(tmp_path / "web", browser), tmp_path / "phone.jpg", tmp_path / "out", browser)
    wanted = explained(squeezenet, tmp_path / "phone.jpg", "guided", None)
    assert told["guided"]["file"] == f"phone.guided.{wanted.target[0]}.npy"
    assert cosine(np.load(tmp_path / "out" / "guided.npy"), wanted.attribution) > 0.99


# width, height, what the model says (None: nothing), the shape of its input
PHOTOS = {
    "shrunk": (
        451,
        300,
        {"size": 256, "crop": 224, "channels": "bgr", "scale": 1, "mean": [1, 2.5, 3]},
        [1, 3, 224, 224],
    ),
    "tall": (97, 211, {"size": 40, "crop": [32, 36], "std": [0.229, 0.224, 0.225]}, [1, 3, 32, 36]),
    "enlarged": (13, 9, {"size": 31, "crop": 28, "scale": 1 / 127.5, "mean": 1}, [1, 3, 28, 28]),
    "sliver": (400, 11, {"size": 24, "crop": 24}, [1, 3, 24, 24]),
    "grey": (50, 41, {"size": 32, "crop": 28, "channels": "grey"}, [1, 1, 28, 28]),
    "last": (64, 80, {"size": 33, "crop": 32, "layout": "nhwc"}, [1, 32, 32, 3]),
    "uncropped": (30, 30, {"size": 20}, [1, 3, "H", "W"]),
    "unsaid": (90, 71, None, [1, 3, 48, 48]),
    "unsaid_oblong": (90, 71, None, [1, 40, 48, 3]),
    "as_it_is": (48, 48, {"size": 48, "crop": 48}, [1, 3, 48, 48]),
}


def test_photos_are_prepared_as_python_does(tmp_path: Path) -> None:
    """Bit for bit: the filter, the crop, and float32 at every step."""
    if shutil.which("node") is None:
        pytest.skip("needs node on the PATH")
    rng = np.random.default_rng(0)
    given, wanted = [], {}
    for name, (width, height, said, shape) in PHOTOS.items():
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        (tmp_path / name).write_bytes(pixels.tobytes())
        text = None if said is None else json.dumps(said)
        given.append({"file": name, "width": width, "height": height, "text": text, "shape": shape})
        metadata = {} if text is None else {"onnxgbp.preprocessing": text}
        spec = InputSpec("x", np.dtype(np.float32), tuple(shape))
        wanted[name] = Preprocessing.of(metadata, spec).prepare(Image.fromarray(pixels))
    (tmp_path / "cases.json").write_text(json.dumps(given))
    node(ROOT / "tests" / "web_photo.mjs", tmp_path)
    for name, x in wanted.items():
        found = np.fromfile(tmp_path / f"{name}.in", np.float32).reshape(x.shape)
        np.testing.assert_array_equal(found, x, err_msg=name)
