"""What the gates of each activation remove, against sums written out in numpy; and the data it is measured over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, small_model
from click.testing import CliRunner
from onnx import helper
from PIL import Image

from onnxgbp.cli import main
from onnxgbp.data import batches, whole
from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.inspection import inspect_model

RNG = np.random.default_rng(11)
W1 = RNG.standard_normal((5, 8)).astype(np.float32)
W2 = RNG.standard_normal((8, 7)).astype(np.float32)
W3 = RNG.standard_normal((7, 3)).astype(np.float32)
X = RNG.standard_normal((20, 5)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "W2"], ["c"]),
        helper.make_node("Tanh", ["c"], ["d"], name="tanh"),
        helper.make_node("MatMul", ["d", "W3"], ["y"]),
    ]
    onnx.save(small_model(nodes, {"x": ["N", 5]}, constants={"W1": W1, "W2": W2, "W3": W3}), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def energies(method: str) -> dict[str, dict[str, float]]:
    """For target 1."""
    a = X @ W1
    c = np.maximum(a, 0) @ W2
    rows: dict[str, dict[str, float]] = {}
    dy = np.broadcast_to(W3[:, 1], c.shape)
    for name, slope, weight in (("tanh", 1 - np.tanh(c) ** 2, W2), ("relu", (a > 0).astype(float), W1)):
        dx, positive = dy * slope, dy > 0
        passed = {"gradient": dx, "guided": dx * positive, "deconvnet": dy * positive}[method]
        rows[name] = {
            "x_gate": 1 - np.sum(dx**2) / np.sum(dy**2),
            "dy_gate": float(np.sum(dx[~positive] ** 2) / np.sum(dy**2)),
            "passed": float(np.sum(passed**2) / np.sum(dy**2)),
        }
        dy = passed @ weight.T
    return rows


@pytest.mark.parametrize("method", ["gradient", "guided", "deconvnet"])
def test_energies_are_the_sums_over_the_data(model: Path, tmp_path: Path, method: str) -> None:
    np.save(tmp_path / "x.npy", X)
    report = inspect_model(model, method=method, target=1, data=tmp_path / "x.npy").to_dict()
    assert report["samples"] == 20
    for row in report["activations"]:
        assert row["energy"] == pytest.approx(energies(method)[row["node"]], rel=1e-4), row["node"]


def test_copies_that_fill_a_fixed_batch_up_do_not_count(model: Path, tmp_path: Path) -> None:
    fixed = onnx.load(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8  # of 20 samples the last batch holds 4
    onnx.save(fixed, tmp_path / "fixed.onnx")
    np.save(tmp_path / "x.npy", X)
    report = inspect_model(tmp_path / "fixed.onnx", target=1, data=tmp_path / "x.npy").to_dict()
    assert report["samples"] == 20
    for row in report["activations"]:
        assert row["energy"] == pytest.approx(energies("guided")[row["node"]], rel=1e-4), row["node"]


def test_the_command_shows_them(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X.astype(np.float64))
    arguments = ["inspect", str(model), "--target", "1", "--data", str(tmp_path / "x.npz")]
    text = CliRunner().invoke(main, arguments)
    want = energies("guided")["relu"]
    assert f"x-gate {want['x_gate']:.0%}, dy-gate {want['dy_gate']:.0%}" in text.output
    assert "over 20 samples" in text.output
    some = CliRunner().invoke(main, [*arguments, "--limit", "3", "--json"])
    assert json.loads(some.output)["samples"] == 3


def test_where_no_gradient_arrives_there_is_no_share(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5), np.float32))
    report = inspect_model(model, target=1, seed="activation", data=tmp_path / "x.npy")
    assert all(set(row["energy"].values()) == {None} for row in report.to_dict()["activations"])
    assert "no gradient arrives" in report.to_text()


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda p: np.save(p, X), {"target": "seed"}, "target seed has to be fed"),
        (lambda p: np.save(p, X), {"target": "top2"}, "target top2 has a sweep for each class"),
        (lambda p: np.save(p, X[:, :4]), {}, r"input 'x' is float32 \[N, 5\], but .* holds float32 \[20, 4\]"),
        (lambda p: np.save(p, X.astype(int)), {}, "but .* holds int64"),
        (lambda p: p.write_bytes(b"no array"), {}, "no array of numbers in numpy's format"),
        (lambda p: np.save(p, X[:0]), {}, "no sample could be read"),
        (lambda p: np.save(p, np.array([None])), {}, "no array of numbers in numpy's format"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    model: Path, tmp_path: Path, write: Any, options: dict[str, Any], message: str
) -> None:
    write(tmp_path / "x.npy")
    with pytest.raises(OnnxgbpError, match=message):
        inspect_model(model, data=tmp_path / "x.npy", **options)


# --- data sets as batches -------------------------------------------------------------------------

FREE = InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))


def photos(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.fromarray(np.full((size[1], size[0], 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_folder_of_photos(tmp_path: Path) -> None:
    folder = photos(tmp_path / "p", (8, 8), (16, 12), (9, 30))
    made = list(batches(folder, [FREE], {}, batch=2))
    assert [len(batch.names) for batch in made] == [2, 1]
    assert [Path(name).name for batch in made for name in batch.names] == ["0.png", "1.png", "2.png"]
    arrays = np.concatenate([batch.feeds["x"] for batch in made])
    assert arrays.shape == (3, 3, 8, 8)
    assert np.allclose(arrays[:, 0, 0, 0], [0, 40 / 255, 80 / 255])


def test_photos_of_different_sizes_share_no_batch(tmp_path: Path) -> None:
    folder = photos(tmp_path / "p", (8, 8), (8, 8), (9, 8))
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, "H", "W"))
    assert [batch.feeds["x"].shape for batch in batches(folder, [spec], {})] == [(2, 3, 8, 8), (1, 3, 8, 9)]


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    spec = InputSpec("x", np.dtype(np.float32), (8, 5))
    made = list(batches(tmp_path / "x.npy", [spec], {}, batch=3))
    assert [(len(batch.names), len(batch.feeds["x"])) for batch in made] == [(8, 8), (8, 8), (4, 8)]
    assert np.array_equal(np.concatenate([b.feeds["x"][: len(b.names)] for b in made]), X)


def test_all_samples_in_one_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    fixed = InputSpec("x", np.dtype(np.float32), (8, 5))  # the last batch ends in copies, which are no samples
    assert np.array_equal(whole(tmp_path / "x.npy", [fixed], {}, "x"), X)
    folder = photos(tmp_path / "p", (8, 8), (9, 8))
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, "H", "W"))
    with pytest.raises(OnnxgbpError, match=r"the samples of .* differ in shape: give --size and --crop"):
        whole(folder, [spec], {}, "x")


def test_a_photo_that_cannot_be_read_is_left_out_or_raised(tmp_path: Path) -> None:
    folder = photos(tmp_path / "p", (8, 8))
    (folder / "bad.png").write_bytes(b"no picture")
    said: list[str] = []
    assert [len(batch.names) for batch in batches(folder, [FREE], {}, on_error=said.append)] == [1]
    assert len(said) == 1
    assert "bad.png" in said[0]
    with pytest.raises(OnnxgbpError, match=r"bad\.png"):
        list(batches(folder, [FREE], {}))


def test_several_inputs_come_from_an_npz(tmp_path: Path) -> None:
    specs = [InputSpec("a", np.dtype(np.float32), ("N", 5)), InputSpec("b", np.dtype(np.int64), ("N",))]
    ids: Array = np.arange(20)
    np.savez(tmp_path / "x.npz", a=X, b=ids, c=X)
    (batch,) = batches(tmp_path / "x.npz", specs, {}, batch=32)
    assert np.array_equal(batch.feeds["b"], ids)
    assert set(batch.feeds) == {"a", "b"}
    np.savez(tmp_path / "y.npz", a=X)
    with pytest.raises(OnnxgbpError, match="holds a; input 'b' is missing"):
        list(batches(tmp_path / "y.npz", specs, {}))
    np.savez(tmp_path / "z.npz", a=X, b=ids[:3])
    with pytest.raises(OnnxgbpError, match=r"different numbers of samples: \[3, 20\]"):
        list(batches(tmp_path / "z.npz", specs, {}))
    with pytest.raises(OnnxgbpError, match="takes 2 inputs"):
        list(batches(photos(tmp_path / "p", (8, 8)), specs, {}))
