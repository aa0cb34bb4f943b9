"""The health report against replicas in numpy that see all the data at once."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, small_model
from click.testing import CliRunner
from onnx import TensorProto, helper
from PIL import Image
from test_rules import OPERATORS

from onnxgbp.cli import main
from onnxgbp.convert import GradientGraph
from onnxgbp.data import batches
from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.health import model_health
from onnxgbp.health_measure import steepest
from onnxgbp.model import load

RNG = np.random.default_rng(5)
PHOTOS = RNG.standard_normal((21, 3, 6, 5)).astype(np.float32)
CONV = RNG.standard_normal((8, 3, 1, 1)).astype(np.float32)
BIAS = np.array([0.1, -99, 0.3, 99, -0.2, -99, 0, 0.4], np.float32)  # 1 and 5 are never active, 3 is everywhere
DENSE = (0.2 * RNG.standard_normal((8, 12))).astype(np.float32)
SHIFT = np.array([0, 0, 60, 0, -60, 0, 0, 0, 0, 60, 0, 0], np.float32)
LAST = RNG.standard_normal((12, 4)).astype(np.float32)


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"n_{output}", **attributes)


def network(batch: int | str = "N", second: str = "Sigmoid", dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A feature map behind a ReLU, averaged, and a squashed layer: x [N, 3, 6, 5] -> y [N, 4]."""
    nodes = [
        node("Conv", "x CONV BIAS", "c"),
        node("Relu", "c", "r"),
        node("AveragePool", "r", "p", kernel_shape=[6, 5]),
        node("Flatten", "p", "f"),
        node("Gemm", "f DENSE SHIFT", "d"),
        node(second, "d", "s"),
        node("MatMul", "s LAST", "y"),
    ]
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = {"CONV": CONV, "BIAS": BIAS, "DENSE": DENSE, "SHIFT": SHIFT - 99 * DENSE[3], "LAST": LAST}
    constants = {name: array.astype(kind) for name, array in weights.items()}
    return small_model(nodes, {"x": [batch, 3, 6, 5]}, constants=constants, dtype=dtype)


def forward(x: Array) -> dict[str, Array]:
    """Every tensor of `network`, and the gradient of the largest score at each activation and at x, in float64."""
    x = x.astype(np.float64)
    c = np.einsum("nihw,oi->nohw", x, CONV[:, :, 0, 0]) + BIAS[:, None, None]
    r = np.maximum(c, 0)
    d = r.mean((2, 3)) @ DENSE + (SHIFT - 99 * DENSE[3])
    s = 1 / (1 + np.exp(-d))
    y = s @ LAST
    ds = LAST[:, y.argmax(1)].T
    dr = np.broadcast_to(((ds * s * (1 - s)) @ DENSE.T)[:, :, None, None] / 30, r.shape)
    dx = np.einsum("nohw,oi->nihw", dr * (c > 0), CONV[:, :, 0, 0])
    return {"r": r, "s": s, "ds": ds, "dr": dr, "dx": dx}


def save(tmp_path: Path, model: onnx.ModelProto, data: Array | None = None, **arrays: Array) -> tuple[Path, Path]:
    onnx.save(model, tmp_path / "net.onnx")
    if data is None:
        np.savez(tmp_path / "x.npz", **arrays)
        return tmp_path / "net.onnx", tmp_path / "x.npz"
    np.save(tmp_path / "x.npy", data)
    return tmp_path / "net.onnx", tmp_path / "x.npy"


def rows_of(found: Mapping[str, Any]) -> dict[str, Any]:
    return {row["node"]: row for row in found["activations"]}


def texts(found: Mapping[str, Any], about: str) -> list[str]:
    return [said["text"] for said in found["verdict"] if said["about"] == about]


def check(row: Mapping[str, Any], y: Array, active: Array, dy: Array, *, rel: float = 1e-5) -> None:
    """A row against the values themselves, all samples at once; units on axis 1."""
    over = tuple(i for i in range(y.ndim) if i != 1)
    counts, places = active.sum(over), y.size // y.shape[1]
    assert row["units"] == y.shape[1]
    assert row["values"] == y.size
    assert row["not_finite"] == 0
    assert row["per_unit"]["active"] == counts.tolist()
    assert row["per_unit"]["places"] == [places] * y.shape[1]
    assert row["dead"]["indices"] == np.flatnonzero(counts == 0).tolist()
    assert row["dead"]["count"] == (counts == 0).sum()
    assert row["dead"]["share"] == (counts == 0).mean()
    assert row["always_active"]["indices"] == np.flatnonzero(counts == places).tolist()
    assert row["active"] == active.mean()
    assert row["saturated"] == pytest.approx(1 - active.mean())
    scale = float(np.abs(y).max())
    for name, value in (("mean", y.mean(over)), ("std", y.std(over)), ("min", y.min(over)), ("max", y.max(over))):
        assert row["per_unit"][name] == pytest.approx(value.tolist(), rel=rel, abs=rel * scale), name
    for name, whole in (("mean", y.mean()), ("std", y.std()), ("min", y.min()), ("max", y.max())):
        assert row[name] == pytest.approx(float(whole), rel=rel, abs=rel * scale), name
    bins = row["histogram"]
    edges = bins["start"] + bins["width"] * np.arange(len(bins["counts"]) + 1)
    assert sum(bins["counts"]) == y.size
    assert math.log2(bins["width"]).is_integer()
    clear = np.abs(y / bins["width"] - np.rint(y / bins["width"])).min(where=y != 0, initial=1) > 1e-3
    if clear:  # no value so near an edge that float32 may put it on the other side
        assert bins["counts"] == np.histogram(y, edges)[0].tolist()
    assert row["gradient"]["rms"] == pytest.approx(math.sqrt((dy**2).mean()), rel=rel)
    assert row["gradient"]["norm"] == pytest.approx(math.sqrt((dy**2).sum() / len(dy)), rel=rel)


def sigmoid_active(s: Array, threshold: float = 0.01) -> Array:
    return s * (1 - s) >= threshold * 0.25


def test_planted_units_are_found(tmp_path: Path) -> None:
    found = model_health(*save(tmp_path, network(), PHOTOS)).to_dict()
    seen, rows = forward(PHOTOS), rows_of(found)
    assert found["samples"] == 21
    check(rows["n_r"], seen["r"], seen["r"] > 0, seen["dr"])
    check(rows["n_s"], seen["s"], sigmoid_active(seen["s"]), seen["ds"])
    assert rows["n_r"]["dead"]["indices"] == [1, 5]
    assert rows["n_r"]["dead"]["constant"] == 2
    assert rows["n_r"]["always_active"]["indices"] == [3]
    assert rows["n_s"]["dead"]["indices"] == [2, 4, 9]
    assert found["inputs"][0]["rms"] == pytest.approx(math.sqrt((seen["dx"] ** 2).mean()), rel=1e-4)
    r, s = (math.sqrt((seen[name] ** 2).mean()) for name in ("dr", "ds"))
    assert [level["nodes"] for level in found["depths"]] == [["n_r"], ["n_s"]]
    assert found["depths"][0]["to_next"] == pytest.approx(r / s, rel=1e-5)
    assert found["depths"][0]["to_last"] == rows["n_r"]["gradient"]["to_last"] == pytest.approx(r / s, rel=1e-5)
    assert found["depths"][1]["to_last"] == 1
    norms = [math.sqrt((seen[name] ** 2).sum() / 21) for name in ("dr", "ds")]
    assert [level["norm"] for level in found["depths"]] == pytest.approx(norms, rel=1e-5)
    assert "2 of 8 channels of 'n_r' were never active in 21 samples: they carried nothing here" in texts(found, "dead")
    assert "1 unit of 'n_r' was active at every place in 21 samples: linear there" in texts(found, "always active")


def test_enough_samples_take_the_doubt_out_of_the_words(tmp_path: Path) -> None:
    many = RNG.standard_normal((120, 3, 6, 5)).astype(np.float32)
    found = model_health(*save(tmp_path, network(), many)).to_dict()
    assert "2 of 8 channels of 'n_r' were never active in 120 samples: they carry nothing" in texts(found, "dead")
    (doubt,) = [text for text in texts(found, "dead") if "does not mean never" in text]
    assert f"in up to {1 - 0.05 ** (1 / 120):.2g} of all" in doubt
    assert not texts(found, "samples")
    assert texts(model_health(*save(tmp_path, network(), PHOTOS)).to_dict(), "samples")


@pytest.mark.parametrize("batch", [1, 4, 5, 21, 32])
def test_batches_make_no_difference(tmp_path: Path, batch: int) -> None:
    """Where the model fixes its batch, the last one is filled up with copies, which count for nothing."""
    free = model_health(*save(tmp_path, network(), PHOTOS)).to_dict()
    fixed = model_health(*save(tmp_path, network(batch), PHOTOS)).to_dict()
    assert fixed["samples"] == 21
    seen, rows = forward(PHOTOS), rows_of(fixed)
    check(rows["n_r"], seen["r"], seen["r"] > 0, seen["dr"])
    check(rows["n_s"], seen["s"], sigmoid_active(seen["s"]), seen["ds"])
    for name, row in rows_of(free).items():
        for key in ("dead", "always_active", "histogram", "values", "units"):
            assert rows[name][key] == row[key], (name, key)
    assert [said["text"] for said in fixed["verdict"]] == [said["text"] for said in free["verdict"]]


def test_the_histogram_widens_as_larger_values_come(tmp_path: Path) -> None:
    """Batches of ever larger and of ever smaller values end in the same bins."""
    model = small_model([node("Tanh", "x", "t"), node("LeakyRelu", "x", "l"), node("Sub", "l t", "y")], {"x": ["N", 2]})
    x = (RNG.standard_normal((64, 2)) * np.logspace(-3, 4, 64)[:, None]).astype(np.float32)
    first, last = (
        rows_of(model_health(*save(tmp_path, model, data), target=0).to_dict())["n_l"]["histogram"]
        for data in (x, x[::-1].copy())
    )
    assert first == last
    y = np.where(x > 0, x, np.float32(0.01) * x)
    edges = first["start"] + first["width"] * np.arange(len(first["counts"]) + 1)
    assert first["counts"] == np.histogram(y, edges)[0].tolist()
    assert 32 <= y.max() / first["width"] < 64


@pytest.mark.parametrize("kind", [*OPERATORS, "PRelu"])
@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_every_activation_saturates_where_its_slope_is_small(tmp_path: Path, kind: str, threshold: float) -> None:
    operator, opset, attributes, slope = OPERATORS.get(kind, ("PRelu", 17, {}, None))
    slopes = np.array([0.25, -0.001, 4.0, 0.02, 0.5], np.float32)
    nodes = [helper.make_node(operator, ["x", "slope"] if kind == "PRelu" else ["x"], ["a"], name="act", **attributes)]
    if kind == "Swish":  # ONNX Runtime has no kernel for the operator
        parts = [("Mul", "x alpha", "ax"), ("Sigmoid", "ax", "g"), ("Mul", "x g", "a")]
        nodes, opset = (
            [node(*part) for part in parts[:-1]] + [helper.make_node("Mul", ["x", "g"], ["a"], name="act")],
            17,
        )
    nodes.append(node("MatMul", "a w", "y"))
    weights = {"slope": slopes, "alpha": np.float32(1.5), "w": RNG.standard_normal((5, 3)).astype(np.float32)}
    read = {name for one in nodes for name in one.input}
    constants = {name: value for name, value in weights.items() if name in read}
    x = (RNG.standard_normal((40, 5)) * 4 + [0, -12, 12, 0, 3]).astype(np.float32)
    model = small_model(nodes, {"x": ["N", 5]}, constants=constants, opset=opset)
    found = model_health(*save(tmp_path, model, x), threshold=threshold).to_dict()
    if slope is None:
        f = np.where(x > 0, 1, slopes)
        cutoff = threshold * np.maximum(1, np.abs(slopes))
    else:
        f = np.vectorize(slope, otypes=[np.float64])(x)
        cutoff = threshold * np.abs(np.vectorize(slope)(np.linspace(-12, 12, 100_001))).max()
    active = np.abs(f) >= cutoff
    (row,) = found["activations"]
    assert row["kind"] == kind
    assert row["per_unit"]["active"] == active.sum(0).tolist()
    assert row["dead"]["indices"] == np.flatnonzero(~active.any(0)).tolist()
    assert row["saturated"] == pytest.approx(1 - active.mean())


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_steepest_slope(kind: str) -> None:
    operator, opset, attributes, slope = OPERATORS[kind]
    model = small_model([node(operator, "x", "y", **attributes)], {"x": ["N", 5]}, opset=opset)
    (activation,) = GradientGraph.build(load(model), target=0, output="y").found
    assert steepest(activation) == pytest.approx(
        np.abs(np.vectorize(slope)(np.linspace(-12, 12, 100_001))).max(), rel=1e-4
    )


def test_a_leaky_relu_at_the_threshold_is_not_saturated(tmp_path: Path) -> None:
    """0.01 is torch's default slope, and the default threshold."""
    nodes = [node("LeakyRelu", "x", "a", alpha=0.01), node("MatMul", "a w", "y")]
    model = small_model(nodes, {"x": ["N", 2]}, constants={"w": np.ones((2, 2), np.float32)})
    (row,) = model_health(*save(tmp_path, model, -np.ones((3, 2), np.float32))).to_dict()["activations"]
    assert row["saturated"] == 0


def test_an_output_that_jumps_carries_something(tmp_path: Path) -> None:
    """A ReLU6 that is at 0 or at 6, never between: no gradient passes, but it tells two sides apart."""
    bounds = {"low": np.float32(0), "high": np.float32(6), "w": np.ones((2, 2), np.float32)}
    model = small_model(
        [node("Clip", "x low high", "a"), node("MatMul", "a w", "y")], {"x": ["N", 2]}, constants=bounds
    )
    x = np.array([[-9, -9], [9, -9], [9, -9]], np.float32)
    found = model_health(*save(tmp_path, model, x)).to_dict()
    (row,) = found["activations"]
    assert (row["dead"]["count"], row["dead"]["constant"]) == (2, 1)
    assert (
        "2 of 2 units of 'n_a' were never active in 3 samples: no gradient passes, though the output of 1 still changes"
        in (texts(found, "dead"))
    )


@pytest.mark.parametrize(("gain", "word"), [(1e-5, "vanishes"), (1e5, "explodes")])
def test_where_the_gradient_vanishes_or_explodes(tmp_path: Path, gain: float, word: str) -> None:
    nodes = [
        node("Tanh", "x", "a"),
        node("MatMul", "a w1", "b"),
        node("Tanh", "b", "c"),
        node("MatMul", "c w2", "d"),
        node("Relu", "d", "e"),
        node("MatMul", "e w2", "y"),
    ]
    eye = np.eye(4, dtype=np.float32)
    x = np.abs(RNG.standard_normal((10, 4))).astype(np.float32) * np.float32(1e-6)
    model = small_model(nodes, {"x": ["N", 4]}, constants={"w1": np.float32(gain) * eye, "w2": eye})
    found = model_health(*save(tmp_path, model, x), target=0).to_dict()
    first, middle, last = found["depths"]
    assert (middle["to_next"], last["to_next"]) == (pytest.approx(1, rel=1e-4), None)
    assert first["to_next"] == pytest.approx(gain, rel=0.05)
    step, way = texts(found, "gradient")
    assert f"it {word} from 'n_c' back to 'n_a'" in step
    assert f"the gradient's RMS {word} on the way" in way


def test_a_gradient_that_only_spreads_does_not_vanish(tmp_path: Path) -> None:
    """Over 400 places behind an average each gets a 400th, and the whole a 20th."""
    nodes = [
        node("Relu", "x", "a"),
        node("GlobalAveragePool", "a", "p"),
        node("Flatten", "p", "f"),
        node("Relu", "f", "b"),
        node("MatMul", "b w", "y"),
    ]
    model = small_model(nodes, {"x": ["N", 3, 20, 20]}, constants={"w": np.ones((3, 2), np.float32)})
    found = model_health(*save(tmp_path, model, np.ones((4, 3, 20, 20), np.float32))).to_dict()
    assert found["depths"][0]["to_next"] == pytest.approx(1 / 400)
    assert texts(found, "gradient") == [
        "no layer vanishes or explodes: the gradient's RMS changes by at most 400x from layer to layer, its norm by "
        "20x; at the first activation the RMS is 0.0025 of that at the last"
    ]


def test_a_gradient_far_below_float32s_squares_is_measured(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "a"), node("Mul", "a tiny", "b"), node("Relu", "b", "c"), node("MatMul", "c w", "y")]
    constants = {"tiny": np.float32(1e-30), "w": np.ones((3, 2), np.float32)}
    model = small_model(nodes, {"x": ["N", 3]}, constants=constants)
    found = model_health(*save(tmp_path, model, np.ones((2, 3), np.float32))).to_dict()
    assert found["depths"][0]["to_last"] == pytest.approx(1e-30, rel=1e-5)


def test_no_gradient_at_all(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "a"), node("MatMul", "a w", "b"), node("Relu", "b", "c"), node("MatMul", "c w", "y")]
    model = small_model(nodes, {"x": ["N", 2]}, constants={"w": -np.ones((2, 2), np.float32)})
    found = model_health(*save(tmp_path, model, np.ones((2, 2), np.float32))).to_dict()
    assert "no gradient at all arrives at 'n_a'" in texts(found, "gradient")
    json.dumps(found, allow_nan=False)


def test_a_saturated_layer_is_named(tmp_path: Path) -> None:
    model = network(second="Tanh")
    model.graph.initializer[3].CopyFrom(onnx.numpy_helper.from_array(np.full(12, 50, np.float32), "SHIFT"))
    found = model_health(*save(tmp_path, model, PHOTOS)).to_dict()
    assert rows_of(found)["n_s"]["saturated"] > 0.5
    assert any(text.startswith("'n_s' (Tanh) is saturated at ") for text in texts(found, "saturated"))


def test_float16_is_measured_in_float32(tmp_path: Path) -> None:
    """Sums of thousands and squares of small gradients leave float16's range."""
    x = PHOTOS.astype(np.float16)
    found = model_health(*save(tmp_path, network(dtype=TensorProto.FLOAT16), x)).to_dict()
    seen, rows = forward(x), rows_of(found)
    assert rows["n_r"]["dead"]["indices"] == [1, 5]
    assert rows["n_r"]["always_active"]["indices"] == [3]
    assert rows["n_r"]["mean"] == pytest.approx(seen["r"].mean(), rel=1e-2)
    assert rows["n_r"]["std"] == pytest.approx(seen["r"].std(), rel=1e-2)
    assert rows["n_s"]["gradient"]["rms"] == pytest.approx(math.sqrt((seen["ds"] ** 2).mean()), rel=1e-2)


def test_a_double_model(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Tanh", "h", "a"), node("MatMul", "a w", "y")]
    w = RNG.standard_normal((4, 4))
    model = small_model(nodes, {"x": ["N", 4]}, constants={"w": w}, dtype=TensorProto.DOUBLE)
    x = RNG.standard_normal((11, 4))
    (row,) = model_health(*save(tmp_path, model, x), target=2).to_dict()["activations"]
    y = np.tanh(x @ w)
    check(row, y, 1 - y**2 >= 0.01, np.broadcast_to(w[:, 2], y.shape))


# --- which axis the units lie on ------------------------------------------------------------------


def axis_of(tmp_path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], **weights: Array) -> int | None:
    model = small_model(nodes, {"x": shape}, constants={name: np.asarray(w, np.float32) for name, w in weights.items()})
    data = RNG.standard_normal([3, *[dim if isinstance(dim, int) else 6 for dim in shape[1:]]]).astype(np.float32)
    (row,) = model_health(*save(tmp_path, model, data), output="y", unit="0").to_dict()["activations"]
    y = onnx.shape_inference.infer_shapes(model).graph
    dims = next(v for v in (*y.value_info, *y.output) if v.name == row["output"]).type.tensor_type.shape.dim
    assert row["units"] == (1 if row["axis"] is None else dims[row["axis"]].dim_value)
    return row["axis"]


def test_the_features_of_tokens_are_the_units(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b", "k"), node("Relu", "k", "y")]
    assert axis_of(tmp_path, nodes, ["N", 7, 4], w=np.ones((4, 5)), b=np.ones(5)) == 2


def test_the_channels_of_a_sequence_are_the_units(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "h"), node("Mul", "h b", "k"), node("Relu", "k", "y")]
    assert axis_of(tmp_path, nodes, ["N", 4, 9], w=np.ones((5, 4, 2)), b=np.ones((5, 1))) == 1


def test_channels_are_followed_through_a_transpose(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
        node("Conv", "t w", "h"),
        node("Transpose", "h", "k", perm=[0, 2, 3, 1]),
        node("Relu", "k", "y"),
    ]
    assert axis_of(tmp_path, nodes, ["N", 6, 7, 3], w=np.ones((5, 3, 1, 1))) == 3


def test_free_sizes_along_the_units_make_one_of_all(tmp_path: Path) -> None:
    assert axis_of(tmp_path, [node("Relu", "x", "y")], ["N", "F"]) is None


# --- data -----------------------------------------------------------------------------------------


def test_an_npz_of_two_inputs(tmp_path: Path) -> None:
    nodes = [node("Add", "a b", "h"), node("Relu", "h", "r"), node("MatMul", "r w", "y")]
    w = RNG.standard_normal((4, 3)).astype(np.float32)
    model = small_model(nodes, {"a": ["N", 4], "b": ["N", 4]}, constants={"w": w})
    a, b = RNG.standard_normal((2, 19, 4)).astype(np.float32)
    found = model_health(*save(tmp_path, model, a=a, b=b), target=1).to_dict()
    y = np.maximum(a + b, 0)
    check(rows_of(found)["n_r"], y, y > 0, np.broadcast_to(w[:, 1], y.shape))
    assert [one["tensor"] for one in found["inputs"]] == ["a", "b"]


def test_a_folder_of_photos(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (9, 6, 5, 3), np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    onnx.save(network(), tmp_path / "net.onnx")
    found = model_health(tmp_path / "net.onnx", folder).to_dict()
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, 6, 5))
    read = [batch.feeds["x"] for batch in batches(folder, [spec], {}, on_error=lambda line: None)]
    seen = forward(np.concatenate(read))
    check(rows_of(found)["n_r"], seen["r"], seen["r"] > 0, seen["dr"])
    assert found["samples"] == 9
    assert [Path(one["sample"]).name for one in found["left_out"]] == ["broken.png"]
    assert "broken.png" in texts(found, "left out")[0]
    some = model_health(tmp_path / "net.onnx", folder, limit=4).to_dict()
    assert some["samples"] == 4


@pytest.mark.parametrize("batch", ["N", 4])
def test_a_sample_with_a_nan_is_left_out_and_said(tmp_path: Path, batch: int | str) -> None:
    x = PHOTOS.copy()
    x[2, 1, 3, 3], x[20, 0, 0, 0] = np.nan, np.inf
    found = model_health(*save(tmp_path, network(batch), x)).to_dict()
    assert found["samples"] == 19
    assert [one["sample"] for one in found["left_out"]] == ["2", "20"]
    (text,) = texts(found, "left out")
    assert text.startswith("2 samples left out: 2: input 'x' holds numbers that are not finite")
    seen = forward(np.delete(PHOTOS, [2, 20], axis=0))
    check(rows_of(found)["n_r"], seen["r"], seen["r"] > 0, seen["dr"])
    with pytest.raises(OnnxgbpError, match=r"every sample of .* holds numbers that are not finite"):
        model_health(*save(tmp_path, network(batch), np.full_like(PHOTOS, np.nan)))


def test_numbers_that_overflow_inside_are_counted(tmp_path: Path) -> None:
    nodes = [node("Exp", "x", "e"), node("Relu", "e", "a"), node("MatMul", "a w", "y")]
    model = small_model(nodes, {"x": ["N", 3]}, constants={"w": np.ones((3, 2), np.float32)})
    x = np.array([[0, 1, 99], [1, 99, 99]], np.float32)
    found = model_health(*save(tmp_path, model, x)).to_dict()
    (row,) = found["activations"]
    assert (row["values"], row["not_finite"]) == (6, 3)
    assert row["per_unit"]["places"] == row["per_unit"]["active"] == [2, 1, 0]
    assert row["always_active"]["indices"] == [0, 1]
    assert row["mean"] == pytest.approx(np.exp([0, 1, 1]).mean(), rel=1e-6)
    assert (row["min"], row["max"]) == (1.0, pytest.approx(math.e))
    assert row["per_unit"]["mean"][2] is row["per_unit"]["min"][2] is None
    assert row["dead"]["count"] == 0
    assert sum(row["histogram"]["counts"]) == 3
    assert texts(found, "not finite") == ["3 of 6 values of 'n_a' are not finite, and not counted"]
    json.dumps(found, allow_nan=False)


# --- models ---------------------------------------------------------------------------------------


def test_a_model_without_activations(tmp_path: Path) -> None:
    w = RNG.standard_normal((4, 3)).astype(np.float32)
    model = small_model([node("MatMul", "x w", "y")], {"x": ["N", 4]}, constants={"w": w})
    data = RNG.standard_normal((9, 4)).astype(np.float32)
    found = model_health(*save(tmp_path, model, data), target=2, out=tmp_path / "out").to_dict()
    assert found["activations"] == found["depths"] == []
    assert found["inputs"][0]["rms"] == pytest.approx(math.sqrt((w[:, 2] ** 2).mean()), rel=1e-6)
    assert texts(found, "activations") == [
        "no activation lies on the path: only the gradient at the input was measured"
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["health.json"]


def test_gates_are_listed_as_gates(tmp_path: Path) -> None:
    nodes = [node("Sigmoid", "x", "g"), node("Tanh", "x", "t"), node("Mul", "g x", "m"), node("Add", "m t", "y")]
    nodes[2] = node("Mul", "g t", "m")
    x = np.full((6, 3), 30, np.float32)
    found = model_health(*save(tmp_path, small_model(nodes, {"x": ["N", 3]}), x)).to_dict()
    rows = rows_of(found)
    assert rows["n_g"]["gate"] == "it multiplies tensor 't'"
    assert rows["n_g"]["saturated"] == 1
    assert "gates, measured and not judged: 'n_g', 'n_t'" in texts(found, "gates")
    assert not texts(found, "saturated")
    assert not texts(found, "dead")


def test_what_is_not_measured_is_named(tmp_path: Path) -> None:
    scalar = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    bodies = {
        name: helper.make_graph([node(operator, "x", "z")], name, [], [scalar])
        for name, operator in (("then_branch", "Relu"), ("else_branch", "Tanh"))
    }
    nodes = [
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum none", "yes"),
        node("If", "yes", "i", **bodies),
        node("Relu", "i", "r"),
        node("MatMul", "r w", "y"),
        node("Sigmoid", "sum", "aside"),
    ]
    for body in (nodes[2].attribute[0].g, nodes[2].attribute[1].g):
        body.node[0].output[0] = body.output[0].name = f"{body.name}_z"
        body.node[0].name = body.name
    constants = {"w": np.ones((3, 2), np.float32), "none": np.float32(0)}
    model = small_model(nodes, {"x": ["N", 3]}, ("y", "aside"), constants)
    found = model_health(*save(tmp_path, model, np.ones((2, 3), np.float32)), output="y").to_dict()
    rows = rows_of(found)
    assert [name for name, row in rows.items() if row["measured"]] == ["n_r"]
    inside, aside = sorted(texts(found, "not measured"), reverse=True)[::-1]
    assert inside.startswith("not measured inside If, Loop or Scan: ")
    assert aside == "not measured, since no gradient reaches them: 'n_aside'"
    assert "not measured" in model_health(tmp_path / "net.onnx", tmp_path / "x.npy", output="y").to_text()


def test_a_relu_that_a_quantiser_hid_is_measured_in_real_numbers(tmp_path: Path) -> None:
    scale, zero = np.float32(0.5), np.uint8(0)
    nodes = [
        node("MatMul", "x w", "h"),
        node("QuantizeLinear", "h scale zero", "q"),
        node("DequantizeLinear", "q scale zero", "d"),
        node("MatMul", "d v", "y"),
    ]
    w, v = RNG.standard_normal((4, 6)).astype(np.float32), RNG.standard_normal((6, 3)).astype(np.float32)
    model = small_model(nodes, {"x": ["N", 4]}, constants={"w": w, "v": v, "scale": scale, "zero": zero})
    x = RNG.standard_normal((17, 4)).astype(np.float32) * 3
    (row,) = model_health(*save(tmp_path, model, x), target=1).to_dict()["activations"]
    assert row["kind"] == "QuantizedRelu"
    y = np.clip(np.rint(x @ w / scale), 0, 255) * scale
    check(row, y, x @ w > 0, np.broadcast_to(v[:, 1], y.shape))


def test_an_old_opset_is_raised_for_it(tmp_path: Path) -> None:
    model = network()
    model.opset_import[0].version, model.ir_version = 9, 4
    found = model_health(*save(tmp_path, model, PHOTOS)).to_dict()
    seen = forward(PHOTOS)
    check(rows_of(found)["n_r"], seen["r"], seen["r"] > 0, seen["dr"])


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    model, data = save(tmp_path, network(), PHOTOS)
    out = tmp_path / "new" / "out"
    result = CliRunner().invoke(main, ["health", str(model), "--data", str(data), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "2 of 8 channels of 'n_r' were never active in 21 samples" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["gradient.png", "health.json", "histograms.png"]
    written = json.loads((out / "health.json").read_text())
    for name in ("gradient.png", "histograms.png"):
        with Image.open(out / name) as plot:
            assert min(plot.size) > 200
    shown = CliRunner().invoke(main, ["health", str(model), "--data", str(data), "--json"])
    assert json.loads(shown.output) == written
    assert written["rules"] == ["*=gradient"]
    guided = ["--json", "--method", "guided", "--rule", "n_s=deconvnet", "--target", "1", "--threshold", "0.999"]
    asked = json.loads(CliRunner().invoke(main, ["health", str(model), "--data", str(data), *guided]).output)
    assert asked["rules"] == ["n_s=deconvnet", "*=guided"]
    assert asked["target"] == "1"
    assert rows_of(asked)["n_s"]["saturated"] > rows_of(written)["n_s"]["saturated"]
    assert "the RMS of what n_s=deconvnet, *=guided passes" in texts(asked, "gradient")[0]


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda p: np.save(p, PHOTOS[:, :2]), {}, "but .* holds float32"),
        (lambda p: np.save(p, PHOTOS[:0]), {}, "no sample could be read"),
        (lambda p: p.write_bytes(b"no array"), {}, "no array of numbers in numpy's format"),
        (lambda p: None, {}, "no such file or folder"),
        (lambda p: np.save(p, PHOTOS), {"target": "top3"}, "give argmax or a class"),
        (lambda p: np.save(p, PHOTOS), {"target": "seed"}, "give argmax or a class"),
        (lambda p: np.save(p, PHOTOS), {"target": 4}, "out of range|only 4 classes"),
        (lambda p: np.save(p, PHOTOS), {"threshold": 1.0}, "is no share of the largest slope"),
        (lambda p: np.save(p, PHOTOS), {"method": "smoothgrad"}, "no rule is called 'smoothgrad'"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, write: Any, options: dict[str, Any], message: str) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    write(tmp_path / "x.npy")
    with pytest.raises(OnnxgbpError, match=message) as caught:
        model_health(tmp_path / "net.onnx", tmp_path / "x.npy", out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    model, _ = save(tmp_path, network(), PHOTOS)
    result = CliRunner().invoke(main, ["health", str(model), "--data", str(tmp_path / "none.npy")])
    assert result.exit_code == 1
    assert result.output == f"Error: cannot read {tmp_path / 'none.npy'}: no such file or folder\n"


def test_plots_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = save(tmp_path, network(), PHOTOS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OnnxgbpError, match=r"pip install 'onnxgbp\[plots\]'"):
        model_health(model, data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert model_health(model, data).to_dict()["samples"] == 21


def test_an_earlier_report_does_not_outlive_a_run_that_fails(tmp_path: Path) -> None:
    model, data = save(tmp_path, network(), PHOTOS)
    out = tmp_path / "out"
    model_health(model, data, out=out)
    (out / "gradient.png").unlink()
    (out / "gradient.png").mkdir()
    with pytest.raises(OnnxgbpError, match="cannot write"):
        model_health(model, data, out=out)


def test_the_default_network_passes_its_gradient(squeezenet: Path, photo: Path) -> None:
    found = model_health(squeezenet, photo).to_dict()
    assert len(found["activations"]) == 25
    assert {row["kind"] for row in found["activations"]} == {"Relu"}
    assert len(found["depths"]) == 17
    assert "no layer vanishes or explodes" in texts(found, "gradient")[0]
