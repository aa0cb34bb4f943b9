"""`onnxgbp report`: one file that holds everything, read in a real browser; stopped, and gone on with."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result
from environments import NotInstalledError, program
from PIL import Image
from runtimes.run import RUNTIMES
from test_explain import picture
from test_sanity import picture_net

pytest.importorskip("jinja2", reason="the report extra brings it: pip install -e '.[report]'")

from onnxgbp import Explainer, OnnxgbpError, convert, save
from onnxgbp.cli import main
from onnxgbp.faithfulness import check_faithfulness
from onnxgbp.health import model_health
from onnxgbp.images import Preprocessing, read
from onnxgbp.render import PERCENTILE, diverging
from onnxgbp.report import METHODS, write_report
from onnxgbp.sanity import check_sanity

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["ant", "bee", "Egyptian cat", "dog"]
FEW = "gradient,guided"


def net(path: Path, labels: list[str] = LABELS) -> Path:
    """Two convolutions and a product, 16 x 16 pictures into 4 classes, with their names."""
    model = onnx.load(picture_net(path))
    model.metadata_props.add(key="onnxgbp.labels", value=json.dumps(labels))
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return net(tmp_path / "net.onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(4):
        picture(tmp_path / "photos" / f"{i}.png", (24 + i, 20), seed=i)
    return tmp_path / "photos"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def words(page: Path) -> str:
    """What a page says: without its markup, its own styles and script."""
    text = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)))


def pictures(page: Path) -> dict[str, Image.Image]:
    """The pictures of the photos, by what they are called."""
    found = {}
    for tag in re.findall(r"<img [^>]*>", page.read_text()):
        data, name = (re.search(rf'{key}="([^"]*)"', tag) for key in ("src", "alt"))
        if data is not None and name is not None and name[1] and data[1]:
            coded = base64.b64decode(data[1].removeprefix("data:image/webp;base64,"), validate=True)
            found[html.unescape(name[1])] = Image.open(io.BytesIO(coded)).convert("RGB")
    return found


# --- what it holds ----------------------------------------------------------------------------------


def test_the_file_holds_everything(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = run(model, "--images", photos, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert result.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "photos", "report.html"]
    said = words(out)
    assert Explainer(model).sha256 in said
    assert "1 Softmax" in said
    assert "Relu(b)" in said
    for method in METHODS:
        assert method in said
    for one in check_sanity(model, photos, methods=METHODS[:6], limit=5).methods:
        assert one.verdict(zero_mean=False).partition(". ")[2] in said
    for name, line in check_faithfulness(model, photos, methods=METHODS, noise_samples=0, limit=5).verdicts().items():
        assert f"{name} " in said
        assert line.replace("+- ", "± ") in said
    for line in model_health(model, photos).to_dict()["verdict"]:
        assert line["text"] in said


def test_maps_are_the_explainers_on_a_scale_about_zero(model: Path, photos: Path, tmp_path: Path) -> None:
    write_report(model, photos, tmp_path / "r.html", methods="guided,smoothgrad:guided", evaluate=0)
    shown = pictures(tmp_path / "r.html")
    for method in ("guided", "smoothgrad:guided"):
        explainer = Explainer(model, method=method)
        prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
        for photo in sorted(photos.iterdir()):
            found = explainer(prepared.prepare(read(photo))[np.newaxis])
            label = LABELS[int(found.target[0])]
            values = found.attribution[0].sum(axis=0).astype(np.float64)
            wanted = np.clip(values / np.percentile(np.abs(values), PERCENTILE), -1, 1)
            picture = shown[f"{method} map of {photo.name} for {found.target[0]} {label}"]
            coarse = np.asarray(diverging(np.rint(wanted * 31) / 31), int)
            assert np.abs(np.asarray(picture, int) - coarse).max() <= 8  # a value between two steps may fall on either
            assert np.mean(np.asarray(picture, int) != coarse) < 0.01
    assert {"0.png, as the model sees it", "1.png, as the model sees it"} < set(shown)


def test_the_options(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    options = ["--methods", "guided", "--target", "egyptian cat", "--limit", 2, "--evaluate", 0, "--mean", "0.1"]
    result = run(model, "--images", photos, "-o", out, *options)
    assert result.exit_code == 0, result.output
    said = words(out)
    assert "2 of 4 photos" in said
    assert said.count("explained: 2 Egyptian cat") == 2
    assert "mean 0.1" in said
    assert "Sanity checks" not in said
    explainer = Explainer(model, method="guided")
    x = Preprocessing.of(explainer.metadata, explainer.inputs[0], mean=[0.1]).prepare(read(photos / "0.png"))
    clip = np.percentile(np.abs(explainer(x[np.newaxis], 2).attribution[0].sum(axis=0, dtype=np.float64)), PERCENTILE)
    assert f"±{clip:.3g}" in said


def test_the_same_bytes_again(model: Path, photos: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert write_report(model, photos, tmp_path / f"{name}.html", methods=FEW) == []
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_grey_channels_last_and_a_fixed_batch(tmp_path: Path) -> None:
    photo = picture(tmp_path / "photo.png", (9, 9))
    for name, shape, perm in (("grey", "1,1,8,8", [0, 1, 2, 3]), ("last", "3,8,8,3", [0, 3, 1, 2])):
        made = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]> m (float[{shape}] x) => (float[{shape[0]},C] y) {{
                t = Transpose <perm = {perm}> (x)  r = Relu(t)  a = GlobalAveragePool(r)  y = Flatten(a)
            }}"""
        )
        onnx.save(made, tmp_path / f"{name}.onnx")
        failed = write_report(tmp_path / f"{name}.onnx", photo, tmp_path / "r.html", methods="guided", evaluate=1)
        assert failed == []
        (found,) = (one for title, one in pictures(tmp_path / "r.html").items() if title.startswith("guided map"))
        assert found.size == (8, 8)
        # No layer has weights: the section says so, and the others are there.
        assert "no layer with weights" in words(tmp_path / "r.html")
        assert "random (baseline)" in words(tmp_path / "r.html")


def test_large_pictures_are_shown_smaller(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> m (float[N,3,H,W] x) => (float[N,3] y) {
            r = Relu(x)  a = GlobalAveragePool(r)  y = Flatten(a)
        }"""
    )
    onnx.save(made, tmp_path / "free.onnx")
    photo = picture(tmp_path / "photo.png", (900, 300))
    write_report(tmp_path / "free.onnx", photo, tmp_path / "r.html", methods="guided", evaluate=0)
    assert [one.size for name, one in pictures(tmp_path / "r.html").items() if "photo.png" in name] == [(448, 149)] * 2


def test_methods_that_the_model_does_not_admit(tmp_path: Path, photos: Path) -> None:
    """Without being asked for they are left out, and the page says why; asked for, that is an error."""
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> m (float[N,3,16,16] x) => (float[N,5] y) {
            f = Flatten(x)  r = Relu(f)  y = MatMul(r, W)
        }"""
    )
    weights = np.random.default_rng(0).standard_normal((768, 5)).astype(np.float32)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weights, "W"))
    onnx.save(made, tmp_path / "flat.onnx")
    write_report(tmp_path / "flat.onnx", photos, tmp_path / "r.html", evaluate=1)
    said = words(tmp_path / "r.html")
    assert "does not admit it: grad-cam: no feature map [N, C, h, w] lies on every way to 'y'" in said
    assert "does not admit it: guided-grad-cam" in said
    assert not [name for name in pictures(tmp_path / "r.html") if "grad-cam map" in name]
    result = run(tmp_path / "flat.onnx", "--images", photos, "-o", tmp_path / "no.html", "--methods", "grad-cam")
    assert result.exit_code == 1
    assert "no feature map" in result.stderr
    assert not (tmp_path / "no.html").exists()


# --- what goes wrong --------------------------------------------------------------------------------


def test_a_bad_photo_is_an_entry(model: Path, photos: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "r.html", tmp_path / "good"
    good.mkdir()
    for photo in photos.iterdir():
        (good / photo.name).write_bytes(photo.read_bytes())
    (photos / "2a.png").write_text("no picture")
    (photos / "3a.png").write_bytes((photos / "3.png").read_bytes()[:200])
    result = run(model, "--images", photos, "-o", out, "--methods", FEW)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0] == f"Error: {photos / '2a.png'}: not an image, or of an unknown kind"
    assert lines[1].startswith(f"Error: {photos / '3a.png'}: ")
    assert lines[2:] == ["Error: 2 of the photos could not be explained; the report is done"]
    said = words(out)
    assert "2a.png Not explained: not an image, or of an unknown kind" in said
    # The others are evaluated as if these were not there.
    for one in check_sanity(model, good, methods=FEW, limit=5).methods:
        assert one.verdict(zero_mean=False).partition(". ")[2] in said
    assert "Means over 4 photos" in said


def test_what_is_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    save(convert(model), tmp_path / "converted.onnx")
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 16, 16), np.float32))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_text("no picture")
    (tmp_path / "folder.html").mkdir()
    dense = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> m (float[N,6] x) => (float[N,6] y) { y = Relu(x) }"""
    )
    onnx.save(dense, tmp_path / "dense.onnx")
    out = tmp_path / "r.html"
    before = sorted(tmp_path.iterdir())
    for chosen, images, target, options, message in (
        (tmp_path / "converted.onnx", photos, out, (), "is already a converted file"),
        (tmp_path / "none.onnx", photos, out, (), "cannot read"),
        (tmp_path / "dense.onnx", photos, out, ("--methods", "guided"), "takes no pictures"),
        (model, tmp_path / "x.npy", out, (), "holds arrays: give a folder of photos"),
        (model, tmp_path / "none", out, (), "no such file or folder"),
        (model, tmp_path / "bad", out, (), "none of the photos"),
        (model, photos, out, ("--methods", "lime"), "no method is called 'lime'"),
        (model, photos, out, ("--methods", "guided,guided"), "are no list of different methods"),
        (model, photos, out, ("--methods", "expected-gradients"), "needs photos as baselines"),
        (model, photos, out, ("--target", "9"), "out of range"),
        (model, photos, out, ("--target", "newt"), "no class is called 'newt'"),
        (model, photos, tmp_path / "folder.html", (), "no regular file"),
        (model, photos, tmp_path / "nowhere" / "r.html", (), "cannot write"),
    ):
        result = run(chosen, "--images", images, "-o", target, *options)
        assert result.exit_code == 1, (message, result.output)
        assert message in result.stderr
        assert not result.stdout
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(OnnxgbpError, match="limit must be 1 or more"):
        write_report(model, photos, out, limit=0)


def test_without_jinja2(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxgbp.report", "onnxgbp.page"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run(model, "--images", photos, "-o", tmp_path / "r.html")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: a report is written with jinja2, which is missing: pip install 'onnxgbp[report]'\n"
    )


# --- stopped, and gone on with ----------------------------------------------------------------------


# A shell that runs the tests in the background has interrupts ignored, and what it starts inherits that.
INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import onnxgbp.cli as c; c.main()"
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on(how: signal.Signals, model: Path, photos: Path, tmp_path: Path) -> None:
    for i in range(4, 60):  # so many that it cannot be done before it is stopped
        picture(photos / f"{i:02}.png", (24, 20), seed=i)
    out, whole = tmp_path / "r.html", tmp_path / "whole.html"
    options = [str(model), "--images", str(photos), "--methods", "guided,smoothgrad", "--evaluate", "1"]
    command = [sys.executable, "-c", INTERRUPTIBLE, "report", *options, "-o", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parts = tmp_path / "r.html.parts"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as started:
        while started.poll() is None and len(list(parts.glob("*.json"))) < 3:
            time.sleep(0.005)
        started.send_signal(how)
        _, said = started.communicate(timeout=60)
    assert not out.exists()
    kept = sorted(parts.glob("*.json"))
    assert 3 <= len(kept) < 60
    if how is signal.SIGINT:
        assert started.returncode == 130
        assert said == f"Interrupted: what is done stays in {parts}, and the same command goes on\n"
    # What is there is not made again: a mark in it comes out in the page.
    marked = json.loads(kept[0].read_bytes()) | {"label": "made before"}
    kept[0].write_text(json.dumps(marked))
    before = {path.name: path.read_bytes() for path in kept}
    assert run(*options, "-o", out).exit_code == 0
    assert "made before" in words(out)
    assert not parts.exists()
    assert run(*options, "-o", whole).exit_code == 0
    clean = whole.read_text()
    assert "made before" not in clean
    # With the parts as they were, and a half-written one, the file is that of a run that was never stopped.
    parts.mkdir()
    for name, data in list(before.items())[1:]:
        (parts / name).write_bytes(data)
    (parts / kept[0].name).write_bytes(before[kept[0].name][:100])
    (parts / f".{kept[0].name}.abc").write_bytes(b"{")
    assert run(*options, "-o", out).exit_code == 0
    assert out.read_text() == clean
    assert not parts.exists()


def test_parts_of_other_options_are_not_taken(model: Path, photos: Path, tmp_path: Path) -> None:
    def stop(done: int, count: int, what: str) -> None:
        assert count == 7
        if what == "sanity":
            raise KeyboardInterrupt

    out, parts = tmp_path / "r.html", tmp_path / "r.html.parts"
    with pytest.raises(KeyboardInterrupt):
        write_report(model, photos, out, methods=FEW, progress=stop)
    assert len(list(parts.iterdir())) == 5  # four photos, and the health
    (parts / "notes.txt").write_text("somebody's own")
    for i, options in enumerate(({"target": 1}, {"mean": [0.2]}, {"methods": "guided"}, {"limit": 2})):
        write_report(model, photos, out, **{"methods": FEW, "evaluate": 1} | options)
        fresh = tmp_path / f"{i}.html"
        write_report(model, photos, fresh, **{"methods": FEW, "evaluate": 1} | options)
        assert out.read_bytes() == fresh.read_bytes()
    assert [path.name for path in parts.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_not_the_photos_fault(model: Path, photos: Path, tmp_path: Path) -> None:
    """A folder that is gone cannot be written either."""

    def remove(done: int, count: int, what: str) -> None:
        if what == "2.png":
            shutil.rmtree(tmp_path / "r.html.parts")

    with pytest.raises(OnnxgbpError, match="cannot write"):
        write_report(model, photos, tmp_path / "r.html", methods=FEW, progress=remove)
    assert not (tmp_path / "r.html").exists()


# --- in a browser -----------------------------------------------------------------------------------

HOSTILE = "<script>window.pwned=1</script>"
QUOTED = '"><img src=x onerror="window.pwned=2">'


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A model and photos whose every name wants to be run."""
    path = net(tmp_path / "<b>net&amp;.onnx", [f"{HOSTILE} {i}" for i in range(3)] + [QUOTED])
    made = onnx.load(path)
    for number, node in enumerate(made.graph.node):
        node.name = f"{HOSTILE}{number}{QUOTED}"
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = f"{name}{QUOTED}" if name not in {t.name for t in made.graph.initializer} else name
    for value in (*made.graph.input, *made.graph.output):
        value.name += QUOTED
    made.producer_name = f"</title>{HOSTILE}"
    made.metadata_props.add(key="author", value=HOSTILE)
    onnx.save(made, path)
    folder = tmp_path / f"photos {QUOTED}"
    for i, name in enumerate(
        ["<img src=x onerror=alert(1)>.png", f"javascript:alert(2) {QUOTED}.png", "{{ 7 * 7 }}.png"]
    ):
        picture(folder / name, (24, 20), seed=i)
    (folder / "<svg onload=alert(3)>.png").write_text("no picture")
    return path, folder


def test_names_are_words_not_markup(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    write_report(*hostile, out, methods=FEW)
    page = out.read_text()
    for text in (HOSTILE, QUOTED, "<img src=x", "<svg onload", "<b>net", "</title><"):
        assert text not in page
    assert page.count("<script>") == page.count("</script>") == page.count("<style>") == 1
    for text in (HOSTILE, QUOTED, "{{ 7 * 7 }}.png", "net&amp;.onnx"):
        assert text in html.unescape(page)
    assert not re.search(r"https?:|url\(|@import| style=| on[a-z]+=\"", re.sub(r"&[#a-z0-9]+;[^<]*", "", page))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:"
    for name, source in rules.items():
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", source), name


@pytest.fixture(scope="module")
def browser() -> dict[str, str]:
    """The variables that name Chromium and the folder of npm's packages."""
    try:
        program("node")
        return RUNTIMES["chromium"].command()[1]
    except NotInstalledError as error:
        pytest.skip(f"no browser: {error}")


def visit(report: Path, out: Path, browser: dict[str, str]) -> dict[str, Any]:
    """What report.mjs found in it."""
    out.mkdir()
    command = [program("node"), str(ROOT / "tests" / "report.mjs"), str(report), str(out)]
    done = subprocess.run(command, env=os.environ | browser, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    told: dict[str, Any] = json.loads((out / "told.json").read_text())
    assert told["console"] == []
    assert [url for url in told["requests"] if not url.startswith("data:")] == [told["url"]]
    assert told["dialogs"] == 0
    assert told["pwned"] is None
    assert told["markup"]["scripts"] == 1
    assert told["markup"]["broken"] == 0
    return told


def test_read_in_a_browser(model: Path, photos: Path, tmp_path: Path, browser: dict[str, str]) -> None:
    (photos / "9.png").write_text("no picture")
    write_report(model, photos, tmp_path / "r.html", methods="gradient,guided,grad-cam")
    told = visit(tmp_path / "r.html", tmp_path / "out", browser)
    assert told["title"] == "net.onnx: attribution report"
    assert Explainer(model).sha256 in told["text"]
    markup = told["markup"]
    assert (markup["mains"], markup["unlabelled"], markup["silent"], markup["scopeless"]) == (1, 0, 0, 0)
    assert len(markup["ids"]) == len(set(markup["ids"]))
    assert markup["headings"][:3] == ["H1 net.onnx", "H2 Photos", "H3 0.png"]
    assert markup["error"] == ["Not explained: not an image, or of an unknown kind"]
    assert len(markup["alts"]) == 12
    assert markup["alts"][1].startswith("guided map of 0.png for ")
    assert told["overflow"] <= 0
    assert told["narrow"] <= 0, "a narrow window needs no sideways scrolling"

    every = ["0.png", "1.png", "2.png", "3.png", "9.png"]
    assert told["all"] == {"files": every, "maps": 12, "status": "5 of 5 photos"}
    assert told["by_file"] == {"files": ["0.png"], "status": "1 of 5 photos"}
    named = [alt.split(" for ")[1].split()[0] for alt in markup["alts"][::3]]
    wanted = [name for name, index in zip(every, named, strict=False) if index == told["by_class"]["target"]]
    assert told["by_class"]["files"] == wanted != []
    assert told["by_method"] == {
        "maps": 8,
        "pressed": "false",
        "method": "gradient",
        "left": ["guided", "grad-cam"],
    }
    assert told["again"] == {"files": every, "maps": 12}

    first, second = markup["alts"][:2]
    assert told["outline"] != "none"
    assert told["zoomed"] == {"open": True, "title": first, "focus": "zoom-close"}
    assert told["next"] == {"open": True, "title": second, "focus": "zoom-close"}
    assert told["closed"] == {"open": False, "title": second, "focus": second}
    assert told["photo"]["title"] == "0.png, as the model sees it"

    assert told["dark"]["pressed"] == "true"
    assert told["dark"]["ground"] != told["light"]
    assert told["toggled"] == {"ground": told["light"], "pressed": "false"}


def test_a_hostile_model_in_a_browser(hostile: tuple[Path, Path], tmp_path: Path, browser: dict[str, str]) -> None:
    write_report(*hostile, tmp_path / "r.html", methods=FEW)
    told = visit(tmp_path / "r.html", tmp_path / "out", browser)
    assert HOSTILE in told["text"]
    assert QUOTED in told["text"]
    assert "{{ 7 * 7 }}.png" in told["text"]
    assert told["narrow"] <= 0
