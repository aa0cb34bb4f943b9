"""`onnxgbp batch`: rows against the Explainer, the same files however a run went, and faults put into real runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from test_explain import picture, tiny

from onnxgbp import Explainer
from onnxgbp.cli import main

NO_PYARROW = "the batch extra brings pyarrow: pip install -e '.[batch]'"
pyarrow, parquet = (pytest.importorskip(name, reason=NO_PYARROW) for name in ("pyarrow", "pyarrow.parquet"))

SLOW = ["--batch-size", "1", "--part-size", "4"]  # many small parts


def run(*arguments: Any) -> Result:
    """In this process, unless the arguments ask for workers."""
    return CliRunner().invoke(main, ["batch", "--workers", "1", *map(str, arguments)])


def rows_of(out: Path) -> list[dict[str, Any]]:
    return parquet.read_table(out).to_pylist()


def parts(out: Path) -> dict[str, str]:
    """The parts and the sha256 of each."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.parquet"))}


def refusal(result: Result) -> str:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "net.onnx", labels=["cat", "dog", "owl", "fox"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photos, three of them in a folder of the folder."""
    folder = tmp_path / "photos"
    for i in range(10):
        picture(folder / ("more" if i in (2, 3, 5) else "") / f"{i}.png", seed=i)
    return folder


def test_rows_are_what_the_explainer_gives(model: Path, photos: Path, tmp_path: Path) -> None:
    result = run(model, photos, "-o", tmp_path / "out", "--part-size", 4, "--batch-size", 3, "--attribution", "float32")
    assert result.exit_code == 0, result.output
    assert "10 rows, 0 with an error, 0 with a blank map" in result.stdout
    rows = rows_of(tmp_path / "out")
    ids = [str(path.relative_to(photos)) for path in photos.rglob("*.png")]
    assert [row["id"] for row in rows] == sorted(ids, key=lambda name: name.split("/"))
    assert [row["index"] for row in rows] == list(range(10))
    explainer = Explainer(model)
    for row in rows:
        with Image.open(photos / row["id"]) as opened:
            middle = opened.resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8))  # the shorter side is 8
        x = np.asarray(middle, np.float32).transpose(2, 0, 1)[np.newaxis] / 255
        wanted = explainer(x)
        tensor = np.asarray(row["attribution"], np.float32).reshape(3, 8, 8)
        np.testing.assert_allclose(tensor, wanted.attribution[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(row["scores"], wanted.scores[0], rtol=1e-4)
        assert (row["target"], row["error"]) == (wanted.target[0], None)
        assert row["label"] == ["cat", "dog", "owl", "fox"][row["target"]]
        assert row["checksum"] == hashlib.sha256((photos / row["id"]).read_bytes()).hexdigest()


def test_the_column_is_a_tensor(model: Path, photos: Path, tmp_path: Path) -> None:
    assert run(model, photos, "-o", tmp_path / "a", "--attribution", "float32").exit_code == 0
    assert run(model, photos, "-o", tmp_path / "b").exit_code == 0
    wide, half = (parquet.read_table(tmp_path / name)["attribution"] for name in "ab")
    assert str(half.type) == "extension<arrow.fixed_shape_tensor[value_type=halffloat, shape=[3,8,8]]>"
    arrays = [column.combine_chunks().to_numpy_ndarray() for column in (wide, half)]
    assert [array.shape for array in arrays] == [(10, 3, 8, 8)] * 2
    np.testing.assert_array_equal(arrays[0].astype(np.float16), arrays[1])


def test_pictures_or_nothing(model: Path, photos: Path, tmp_path: Path) -> None:
    assert run(model, photos, "-o", tmp_path / "png", "--attribution", "png", "--target", "owl").exit_code == 0
    for row in rows_of(tmp_path / "png"):
        with Image.open(io.BytesIO(row["attribution"])) as drawn:
            assert (drawn.size, drawn.mode, row["label"]) == ((8, 8), "RGB", "owl")
    assert run(model, photos, "-o", tmp_path / "none", "--attribution", "none").exit_code == 0
    assert "attribution" not in parquet.read_table(tmp_path / "none").column_names


def test_a_list_of_paths(model: Path, photos: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("photos/more/2.png\n\nphotos/0.png\nphotos/none.png\n")
    result = run(model, listed, "-o", tmp_path / "out")
    assert result.exit_code == 3
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == ["photos/more/2.png", "photos/0.png", "photos/none.png"]
    assert [row["error"] for row in rows] == [None, None, "cannot read photos/none.png: No such file or directory"]


def test_names_that_are_no_text(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    picture(folder / "a.png")
    try:
        (folder / "a.png").rename(folder / os.fsdecode(b"a\xff\n.png"))
    except OSError:
        pytest.skip("this file system takes names of text only")
    assert run(model, folder, "-o", tmp_path / "out").exit_code == 0
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["a\\xff\n.png"]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_in(model: Path, photos: Path, tmp_path: Path, struct: bool) -> None:
    """Row groups and files that are no multiples of a part; a row without an image."""
    files = sorted(photos.rglob("*.png"))
    cells: list[Any] = [path.read_bytes() for path in files]
    cells[4] = None
    if struct:
        cells = [{"bytes": cell, "path": f"p{i}"} for i, cell in enumerate(cells)]
        cells[4]["path"] = None
    (tmp_path / "data").mkdir()
    for name, some in (("a", cells[:7]), ("b", cells[7:])):
        table = pyarrow.table({"label": range(len(some)), "image": some})
        parquet.write_table(table, tmp_path / "data" / f"{name}.parquet", row_group_size=3)
    assert run(model, tmp_path / "data", "-o", tmp_path / "out", "--part-size", 4).exit_code == 3
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"p{i}" if struct and i != 4 else str(i) for i in range(10)]
    assert [row["index"] for row in rows if row["error"]] == [4]
    checksums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert [row["checksum"] for row in rows if not row["error"]] == checksums[:4] + checksums[5:]


def test_which_column(model: Path, photos: Path, tmp_path: Path) -> None:
    cell = (photos / "0.png").read_bytes()
    parquet.write_table(pyarrow.table({"a": [cell], "b": [cell], "c": [1]}), tmp_path / "x.parquet")
    said = refusal(run(model, tmp_path / "x.parquet", "-o", tmp_path / "out"))
    assert "has no one column of images: name with --column" in said
    assert "a, b" in said
    assert "holds no bytes" in refusal(run(model, tmp_path / "x.parquet", "-o", tmp_path / "out", "--column", "c"))
    assert not (tmp_path / "out").exists()
    assert run(model, tmp_path / "x.parquet", "-o", tmp_path / "out", "--column", "b").exit_code == 0


def test_arrays_in(model: Path, tmp_path: Path) -> None:
    """NaN in the input is an error of that sample; .npy and .npz give the same rows, a compressed one is refused."""
    x = np.random.default_rng(1).random((7, 3, 8, 8), np.float32)
    x[3, 0, 0, 0] = np.nan
    x[5, 1] = np.inf
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", other=x[:2], picture=x)
    np.savez_compressed(tmp_path / "small.npz", picture=x)
    options = ["--batch-size", 4, "--attribution", "float32"]
    for kind in ("npy", "npz"):
        assert run(model, tmp_path / f"x.{kind}", "-o", tmp_path / kind, *options).exit_code == 3
    rows = rows_of(tmp_path / "npy")
    assert rows == rows_of(tmp_path / "npz")
    assert {row["index"]: row["error"] for row in rows if row["error"]} == dict.fromkeys(
        (3, 5), "input 'picture' holds numbers that are not finite"
    )
    wanted = Explainer(model)(x[[0, 1, 2, 4, 6]])
    found = [np.asarray(row["attribution"]).reshape(3, 8, 8) for row in rows if not row["error"]]
    np.testing.assert_allclose(found, wanted.attribution, rtol=1e-4, atol=1e-6)
    assert rows[0]["checksum"] == hashlib.sha256(x[0].tobytes()).hexdigest()
    assert "save it with np.savez" in refusal(run(model, tmp_path / "small.npz", "-o", tmp_path / "out"))
    assert "is for photos" in refusal(run(model, tmp_path / "x.npy", "-o", tmp_path / "out", "--size", 9))


def test_a_method_that_samples(model: Path, tmp_path: Path) -> None:
    """Its options are options of the data set, and so is what is in its baseline."""
    x = np.random.default_rng(1).random((5, 3, 8, 8), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "from.npy", x[:1] / 2)
    options = ["--method", "integrated-gradients", "--n-steps", 4, "--baseline", tmp_path / "from.npy"]
    command = [model, tmp_path / "x.npy", "-o", tmp_path / "out", "--attribution", "float32", *options]
    assert run(*command).exit_code == 0
    explainer = Explainer(model, method="integrated-gradients", n_steps=4)
    found = [np.asarray(row["attribution"]).reshape(3, 8, 8) for row in rows_of(tmp_path / "out")]
    np.testing.assert_allclose(found, explainer(x, baseline=x[:1] / 2).attribution, rtol=1e-4, atol=1e-6)
    assert "was begun with n_steps 4, not 5" in refusal(run(*command, "--n-steps", 5))
    np.save(tmp_path / "from.npy", x[:1] / 3)
    assert "was begun with baseline samples " in refusal(run(*command))


def test_a_fixed_batch(photos: Path, tmp_path: Path) -> None:
    """The last one is filled up, and nothing of the filling is written."""
    model = tiny(tmp_path / "net.onnx", shape="4,3,8,8")
    assert run(model, photos, "-o", tmp_path / "out").exit_code == 0
    assert len(rows_of(tmp_path / "out")) == 10


def test_photos_of_any_size(photos: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path / "net.onnx", shape="N,3,H,W")
    picture(photos / "4b.png", (20, 30))
    said = refusal(run(model, photos, "-o", tmp_path / "out"))
    assert "give --crop, or --attribution png or none" in said
    assert run(model, photos, "-o", tmp_path / "out", "--attribution", "png").exit_code == 0
    sizes = []
    for row in rows_of(tmp_path / "out"):
        with Image.open(io.BytesIO(row["attribution"])) as drawn:
            sizes.append(drawn.size)
    assert sorted(sizes) == [(12, 10)] * 10 + [(20, 30)]


def bomb(path: Path) -> None:
    """20,000 x 20,000 pixels in half a megabyte."""
    Image.new("1", (20_000, 20_000)).save(path)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "noise": (lambda path: path.write_bytes(os.urandom(500)), "not an image"),
    "empty": (lambda path: path.write_bytes(b""), "not an image"),
    "cut": (lambda path: path.write_bytes(picture(path, (90, 90)).read_bytes()[:9000]), "truncated"),
    "huge": (bomb, "decompression bomb"),
    "large": (lambda path: Image.new("1", (10_000, 10_000)).save(path), "decompression bomb"),
    "folder": (lambda path: path.mkdir(), "is no regular file"),
}


def test_a_bad_image_is_a_row(model: Path, photos: Path, tmp_path: Path) -> None:
    """Between good ones, whose rows are the same as without it; one pixel is a photo as any other."""
    lines = []
    for i, (kind, (make, _)) in enumerate(BAD.items()):
        make(tmp_path / f"{kind}.png")
        lines += [f"photos/{(0, 1, 4)[i % 3]}.png", f"{kind}.png"]
    picture(tmp_path / "one.png", (1, 1))
    (tmp_path / "list.txt").write_text("\n".join([*lines, "one.png"]))
    (tmp_path / "good.txt").write_text("\n".join([*lines[::2], "one.png"]))
    assert run(model, tmp_path / "list.txt", "-o", tmp_path / "out", "--batch-size", 2).exit_code == 3
    assert run(model, tmp_path / "good.txt", "-o", tmp_path / "good", "--batch-size", 2).exit_code == 0
    rows = rows_of(tmp_path / "out")
    errors = {row["id"].removesuffix(".png"): row for row in rows if row["error"]}
    assert list(errors) == list(BAD)
    for kind, (_, reason) in BAD.items():
        row = errors[kind]
        assert reason in row["error"]
        assert {row[name] for name in ("target", "label", "attribution")} == {None}
        assert row["scores"] is None
        assert (row["checksum"] is None) == (kind == "folder")
    good, wanted = (
        [row | {"index": 0} for row in some if not row["error"]] for some in (rows, rows_of(tmp_path / "good"))
    )
    assert good == wanted


def test_too_many_errors(model: Path, photos: Path, tmp_path: Path) -> None:
    """The run stops; what was done stays, and it goes on when more are allowed."""
    for i in range(3):
        (photos / f"5-{i}.png").write_bytes(b"")
    command = [model, photos, "-o", tmp_path / "out", *SLOW]
    said = refusal(run(*command, "--max-errors", 1))
    assert "3 rows have errors, more than --max-errors 1" in said
    before = parts(tmp_path / "out")
    assert before
    assert run(*command, "--max-errors", 3).exit_code == 3
    assert before.items() <= parts(tmp_path / "out").items()
    assert "3 rows have errors" in refusal(run(*command, "--max-errors", 2)), "also of a data set that is complete"


def dividing(path: Path) -> Path:
    """A model whose scores are NaN where a pixel is zero, and whose maps overflow float16 where one is small."""
    text = """<ir_version: 8, opset_import: ["": 17]> net (float[N,3,8,8] picture) => (float[N,2] s) {
        m = ReduceMean <axes = [2, 3], keepdims = 0> (picture)  z = Sub(m, m)  d = Div(z, m)
        r = Reciprocal(m)  a = Add(r, d)  s = MatMul(a, V)
    }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([[1, 2]] * 3, np.float32), "V"))
    onnx.save(model, path)
    return path


def test_numbers_that_cannot_be_written(tmp_path: Path) -> None:
    """NaN of the model, and what float16 cannot hold, are errors and no numbers; float32 holds the latter."""
    model, x = dividing(tmp_path / "net.onnx"), np.ones((5, 3, 8, 8), np.float32)
    x[1], x[2], x[3] = 0, 1e-4, 1e4
    np.save(tmp_path / "x.npy", x)
    errors = {}
    for form in ("float16", "float32"):
        assert run(model, tmp_path / "x.npy", "-o", tmp_path / form, "--attribution", form).exit_code == 3
        errors[form] = {row["index"]: row["error"] for row in rows_of(tmp_path / form) if row["error"]}
    assert errors["float32"] == {1: "the model gives scores that are not numbers"}
    assert list(errors["float16"]) == [1, 2, 3]
    assert "float16 cannot hold a map whose largest value is 3.12e+06" in errors["float16"][2]
    assert "float16 cannot hold a map whose largest value is 3.12e-10" in errors["float16"][3]


def test_one_sample_takes_no_other_along(tmp_path: Path) -> None:
    """A token id out of range stops the runtime for its whole batch: the others are explained one by one."""
    text = """<ir_version: 8, opset_import: ["": 17]> net (int64[N,3] ids) => (float[N,2] s) {
        e = Gather(E, ids)  m = ReduceMean <axes = [1], keepdims = 0> (e)  s = MatMul(m, V)
    }"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("E", (5, 4)), ("V", (4, 2))):
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "net.onnx")
    np.save(tmp_path / "ids.npy", np.array([[0, 1, 2], [3, 99, 1], [4, 4, 4]]))
    result = run(tmp_path / "net.onnx", tmp_path / "ids.npy", "-o", tmp_path / "out")
    assert result.exit_code == 3, result.output
    errors = [row["error"] for row in rows_of(tmp_path / "out")]
    assert errors[::2] == [None, None]
    assert "ONNX Runtime could not run" in errors[1]
    assert str(parquet.read_schema(tmp_path / "out" / "part-000000.parquet").field("attribution").type).endswith(
        "shape=[3,4]]>"
    )


def test_a_blank_map_is_counted(photos: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path / "net.onnx", bias=-100.0)
    result = run(model, photos, "-o", tmp_path / "out")
    assert (result.exit_code, "10 with a blank map" in result.stdout) == (0, True), result.output


def test_other_options_are_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [model, photos, "-o", out, "--part-size", 4]
    assert run(*command).exit_code == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "was begun with method guided, not gradient" in refusal(run(*command, "--method", "gradient"))
    assert "was begun with part size 4, not 1000" in refusal(run(*command[:-2]))
    assert "was begun with class None, not 1" in refusal(run(*command, "--target", 1))
    assert "was begun with maps float16, not png" in refusal(run(*command, "--attribution", "png"))
    assert "was begun with model " in refusal(run(tiny(tmp_path / "other.onnx"), *command[1:]))
    picture(photos / "new.png")
    assert "was begun with other input (10 of photos, now 11 of photos" in refusal(run(*command))
    (photos / "new.png").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert run(*command, "--workers", 2).exit_code == 0, "how it is made is not what it is"


def test_refusals(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is no data set" in refusal(run(model, photos / "0.png", "-o", out))
    assert "No such file" in refusal(run(model, tmp_path / "none.txt", "-o", out))
    (tmp_path / "empty").mkdir()
    assert "no image in" in refusal(run(model, tmp_path / "empty", "-o", out))
    assert "are for the engine ray" in refusal(run(model, photos, "-o", out, "--num-gpus", 1))
    assert not out.exists()
    shutil.copytree(photos, out)
    (out / "x.parquet").write_bytes(b"")
    assert "holds Parquet files but no _manifest.json" in refusal(run(model, photos, "-o", out))
    assert "cannot write" in refusal(run(model, photos, "-o", model / "out"))


@pytest.mark.parametrize(
    ("missing", "more", "said"),
    [("pyarrow", [], "pip install 'onnxgbp[batch]'"), ("ray", ["--engine", "ray"], "pip install 'onnxgbp[ray]'")],
)
def test_what_is_not_installed(
    model: Path, photos: Path, tmp_path: Path, missing: str, more: list[str], said: str
) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from onnxgbp.cli import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", program, "batch", model, photos, "-o", tmp_path / "out", *more]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert said in line


def test_it_travels_by_pickle(model: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(2).random((2, 3, 8, 8), np.float32)
    explainer = Explainer(model, method="deconvnet", threads=1, diagnose=False)
    again = pickle.loads(pickle.dumps(explainer))
    np.testing.assert_array_equal(again(x).attribution, explainer(x).attribution)


# Runs in processes of their own, to be killed.


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A list of 60 photos, of which only four are files; the tenth is none. They are large: a run takes its time."""
    for i in range(4):
        picture(tmp_path / f"{i}.png", (1000, 800), seed=i)
    (tmp_path / "many.txt").write_text("".join(f"{i % 4 if i != 10 else 'none'}.png\n" for i in range(60)))
    return tmp_path / "many.txt"


@pytest.fixture
def whole(model: Path, many: Path, tmp_path: Path) -> dict[str, str]:
    """The parts of a run that nothing disturbed."""
    assert run(model, many, "-o", tmp_path / "whole", *SLOW).exit_code == 3
    return parts(tmp_path / "whole")


def command(model: Path, many: Path, out: Path, *more: Any) -> list[str]:
    return [sys.executable, "-m", "onnxgbp", "batch", *map(str, (model, many, "-o", out, *SLOW, *more))]


@contextlib.contextmanager
def started(*arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """A run in a process group of its own, which ends with the block."""
    # As in a terminal, also where the tests run in the background of a shell, which has Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    for _ in range(12_000):
        found = condition()
        if found:
            return found
        assert process is None or process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.01)
    raise AssertionError("waited for two minutes")


def group(process: subprocess.Popen[str]) -> set[int]:
    """The living processes of its group, without itself."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(process.pid)], capture_output=True, text=True).stdout
    alive = {int(pid) for pid, state in map(str.split, listed.splitlines()) if not state.startswith("Z")}
    return alive - {process.pid}


def commandline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""


def goes_on(model: Path, many: Path, out: Path, whole: dict[str, str], *more: Any) -> None:
    """What is there is whole and stays as it is; the same command makes the rest, and nothing else is left."""
    before = {name: (out / name).stat().st_mtime_ns for name in parts(out)}
    assert parts(out).items() <= whole.items()
    again = subprocess.run(command(model, many, out, *more), capture_output=True, text=True)
    assert again.returncode == 3, again.stderr
    assert parts(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert {path.name for path in out.iterdir()} == {*whole, "_manifest.json", "_lock"}
    assert json.loads((out / "_manifest.json").read_text())["complete"] == {"rows": 60, "errors": 1, "blank": 0}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_is_killed(model: Path, many: Path, whole: dict[str, str], tmp_path: Path, workers: int) -> None:
    """Lost are the parts in flight, one for each worker, and no worker outlives the command."""
    out = tmp_path / "out"
    with started(model, many, out, "--workers", workers) as process:
        wait_for(lambda: len(parts(out)) >= 2, process)
        process.kill()
        process.wait()
        wait_for(lambda: not group(process))
    assert json.loads((out / "_manifest.json").read_text())["complete"] is None
    goes_on(model, many, out, whole, "--workers", workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted(model: Path, many: Path, whole: dict[str, str], tmp_path: Path, workers: int) -> None:
    """Ctrl-C reaches every process of the group: one line, no traceback, nothing half-written."""
    out = tmp_path / "out"
    with started(model, many, out, "--workers", workers) as process:
        wait_for(lambda: len(parts(out)) >= 1, process)
        os.killpg(process.pid, signal.SIGINT)
        stderr = process.communicate()[1]
        assert process.returncode == 130, stderr
        wait_for(lambda: not group(process))
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    goes_on(model, many, out, whole)


def test_a_worker_for_each_core(model: Path, many: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Where nobody says how many; the bytes are those of one."""
    out, seen = tmp_path / "out", set[int]()
    cores = min(len(os.sched_getaffinity(0)), 8, len(whole))
    with started(model, many, out) as process:
        while process.poll() is None:
            seen |= {pid for pid in group(process) if "spawn_main" in commandline(pid)}
            time.sleep(0.01)
        assert process.returncode == 3  # one row has an error
    assert len(seen) == (cores if cores > 1 else 0)
    assert parts(out) == whole


def test_workers_never_hear_of_an_interruption(model: Path, many: Path, tmp_path: Path) -> None:
    """From their first moment on: one that came while they import would show as a traceback."""
    seen = 0
    with started(model, many, tmp_path / "out", "--workers", 2) as process:
        while not parts(tmp_path / "out"):
            for pid in group(process):
                if "spawn_main" in commandline(pid):
                    masks = re.findall(r"Sig(?:Blk|Ign):\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
                    assert any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)
                    seen += 1
            assert process.poll() is None
    assert seen


def test_a_worker_is_killed(model: Path, many: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Nothing is lost: the parts in flight are made again by new workers, in the same run."""
    out = tmp_path / "out"
    with started(model, many, out, "--workers", 2) as process:
        wait_for(lambda: len(parts(out)) >= 1, process)
        for pid in group(process):
            if "spawn_main" in commandline(pid):
                os.kill(pid, signal.SIGKILL)
                break
        stderr = process.communicate()[1]
        assert process.returncode == 3, stderr
    assert parts(out) == whole
    goes_on(model, many, out, whole)


def test_the_folder_goes_away(model: Path, many: Path, tmp_path: Path) -> None:
    """The run ends with one line; lost is what was in the folder."""
    out = tmp_path / "out"
    with started(model, many, out) as process:
        wait_for(lambda: len(parts(out)) >= 1, process)
        out.rename(tmp_path / "elsewhere")
        stderr = process.communicate()[1]
    assert process.returncode == 1, stderr
    # What misses the folder first is either the next part's write or the next look into the listing that lies in it.
    assert stderr.splitlines()[-1].startswith((f"Error: cannot write {out}", f"Error: cannot read {out}"))
    assert "Traceback" not in stderr
    assert not out.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_disk_is_full(model: Path, tmp_path: Path, workers: int) -> None:
    """A limit on the size of files fails a write as a full disk does: one line, nothing half-written; it goes on."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # noqa: E731
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((60, 3, 8, 8), np.float32))
    arguments = command(model, tmp_path / "x.npy", tmp_path / "out", "--part-size", 30, "--workers", workers)
    full = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1, full.stderr
    assert full.stderr.splitlines()[-1].startswith("Error: cannot write ")
    assert "Traceback" not in full.stderr
    assert not [path.name for path in (tmp_path / "out").iterdir() if "part" in path.name]
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert len(rows_of(tmp_path / "out")) == 60


def test_a_damaged_part_is_made_again(model: Path, many: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Cut off, gone, or of another data set: each is made again, the others stay."""
    out = tmp_path / "whole"
    (out / "part-000003.parquet").write_bytes((out / "part-000003.parquet").read_bytes()[:-9])
    (out / "part-000005.parquet").unlink()
    assert run(model, many, "-o", tmp_path / "other", *SLOW, "--method", "gradient").exit_code == 3
    shutil.copy(tmp_path / "other" / "part-000007.parquet", out)
    assert run(model, many, "-o", out, *SLOW).exit_code == 3
    assert parts(out) == whole


def test_two_at_once(model: Path, many: Path, tmp_path: Path) -> None:
    """The second is refused, and the first not disturbed."""
    out = tmp_path / "out"
    with started(model, many, out) as process:
        wait_for(lambda: len(parts(out)) >= 1, process)
        process.send_signal(signal.SIGSTOP)
        assert "another command is writing" in refusal(run(model, many, "-o", out, *SLOW))
        process.send_signal(signal.SIGCONT)
        stderr = process.communicate()[1]
    assert process.returncode == 3, stderr


def test_memory_stays_flat(model: Path, tmp_path: Path) -> None:
    """Twelve times the images take no more: what is held is bounded by the batch, not by the data set."""
    peaks = []
    picture(tmp_path / "0.png", (300, 300))
    for count in (100, 1200):
        (tmp_path / f"{count}.txt").write_text("0.png\n" * count)
        measured = (
            "import resource, sys; from onnxgbp.cli import main\n"
            "main(sys.argv[1:], standalone_mode=False)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        arguments = ["batch", model, tmp_path / f"{count}.txt", "-o", tmp_path / f"out{count}", "--part-size", 300]
        done = subprocess.run([sys.executable, "-c", measured, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 40, f"{peaks} MB"
