"""What is explained: classes by index and name, several of them, units, slices, the strongest unit, and the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, ort_run, reference_run, small_model
from click.testing import CliRunner
from onnx import helper

import onnxgbp
from onnxgbp import Explainer, OnnxgbpError
from onnxgbp.cli import main
from onnxgbp.labels import find_label, labels_of

RNG = np.random.default_rng(3)
W1 = RNG.standard_normal((5, 8)).astype(np.float32)
W2 = RNG.standard_normal((8, 6)).astype(np.float32)
KERNEL = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
X = RNG.standard_normal((3, 5)).astype(np.float32)
IMAGES = RNG.standard_normal((2, 3, 6, 5)).astype(np.float32)
LABELS = ["tench, Tinca tinca", "goldfish", "tabby, tabby cat", "tiger cat", "drake", "crane"]


def classifier() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "W2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"], axis=1),
    ]
    model = small_model(nodes, {"x": ["N", 5]}, constants={"W1": W1, "W2": W2})
    helper.set_model_props(model, {"onnxgbp.labels": json.dumps(LABELS)})
    return model


def convolution() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "K"], ["pre"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["pre"], ["map"], name="relu"),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["y"]),
    ]
    return small_model(nodes, {"x": ["N", 3, 6, 5]}, constants={"K": KERNEL})


def weighted(model: onnx.ModelProto, x: Array, seed: Array, **options: Any) -> Array:
    """The attribution under a seed that is written out here."""
    return reference_run(onnxgbp.convert(model, target="seed", **options), {"x": x, "seed": seed})["attribution"]


def one_hot(shape: tuple[int, ...], classes: Array) -> Array:
    seed = np.zeros(shape, np.float32)
    seed[np.arange(len(classes)), classes] = 1
    return seed


def logits() -> Array:
    return np.maximum(X @ W1, 0) @ W2


@pytest.mark.parametrize("method", ["gradient", "guided"])
def test_the_k_best_classes_come_from_one_forward_pass(method: str) -> None:
    converted = onnxgbp.convert(classifier(), target="top3", method=method)
    assert sum(node.op_type == "Softmax" for node in converted.graph.node) == 1
    found = reference_run(converted, {"x": X})
    best = np.argsort(-logits(), axis=1)[:, :3]
    assert np.array_equal(found["attribution_target"], best)
    assert found["attribution"].shape == (3, 3, 5)
    for k in range(3):
        want = weighted(classifier(), X, one_hot((3, 6), best[:, k]), method=method)
        assert np.array_equal(found["attribution"][:, k], want)


def test_k_classes_as_an_input_and_minus_one_for_the_kth_best() -> None:
    converted = onnxgbp.convert(classifier(), target="input2")
    (target,) = [value for value in converted.graph.input if value.name == "target"]
    assert [dim.dim_value or dim.dim_param for dim in target.type.tensor_type.shape.dim] == ["N", 2]
    best = np.argsort(-logits(), axis=1)
    asked = np.array([[4, 0], [-1, -1], [2, -1]])
    found = ort_run(converted, {"x": X, "target": asked})
    want = np.array([[4, 0], best[1, :2], [2, best[2, 1]]])
    assert np.array_equal(found["attribution_target"], want)
    for k in range(2):
        assert np.allclose(
            found["attribution"][:, k], weighted(classifier(), X, one_hot((3, 6), want[:, k])), atol=1e-6
        )


def test_explainer_takes_a_matrix_of_classes_or_the_k_best() -> None:
    explainer = Explainer(classifier())
    result = explainer(X, target=[[0, 5], ["drake", "tabby"], [2, 3]])
    assert result.target.tolist() == [[0, 5], [4, 2], [2, 3]]
    assert result.attribution.shape == (3, 2, 5)
    for k in range(2):
        single = explainer(X, target=result.target[:, k])
        assert np.allclose(result.attribution[:, k], single.attribution, atol=1e-6)
        assert np.array_equal(result.scores, single.scores)
    best = Explainer(classifier(), top=4)(X)
    assert np.array_equal(best.target, np.argsort(-logits(), axis=1)[:, :4])
    with pytest.raises(OnnxgbpError, match=r"target has shape \[3\]: give \[3, 4\], 4 per sample"):
        Explainer(classifier(), top=4)(X, target=[1, 2, 3])
    with pytest.raises(OnnxgbpError, match="target 6 is out of range"):
        explainer(X, target=[[0, 5], [4, 6], [2, 3]])


@pytest.mark.parametrize("target", ["top0", "input0"])
def test_no_class_at_all_is_refused(target: str) -> None:
    with pytest.raises(OnnxgbpError, match=f"target '{target}' is none of"):
        onnxgbp.convert(classifier(), target=target)


def test_more_classes_than_there_are_is_refused() -> None:
    with pytest.raises(OnnxgbpError, match="top7 is out of range: tensor 'logits' has 6 classes"):
        onnxgbp.convert(classifier(), target="top7")


@pytest.mark.parametrize(("name", "index"), [("goldfish", 1), ("Tabby Cat", 2), ("tench", 0), ("tiger cat", 3)])
def test_a_class_by_its_name(name: str, index: int) -> None:
    converted = onnxgbp.convert(classifier(), target=name)
    assert reference_run(converted, {"x": X})["attribution_target"].tolist() == [index] * 3
    assert Explainer(classifier())(X, target=name).target.tolist() == [index] * 3


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("cat", LABELS, "no class is called 'cat'; there is 'tabby, tabby cat', 'tiger cat'"),
        ("goldfsh", LABELS, "no class is called 'goldfsh'; there is 'goldfish'"),
        ("crane", ["crane", "drake", "crane"], r"2 classes are called 'crane': give one of the indices \[0, 2\]"),
        ("crane", [], "the model's metadata names no classes"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, labels: list[str], message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message):
        find_label(name, labels)


@pytest.mark.parametrize(
    "metadata",
    [
        {"onnxgbp.labels": '["a", "b"]'},
        {"names": "{0: 'a', 1: 'b'}"},
        {"names": '{"1": "b", "0": "a"}'},
        {"classes": "['a', 'b']"},
        {"labels": "a, b", "class_names": '["a", "b"]'},
    ],
)
def test_labels_as_exporters_write_them(metadata: dict[str, str]) -> None:
    assert labels_of(metadata) == ["a", "b"]


@pytest.mark.parametrize(
    ("unit", "where"),
    [
        ("2", np.s_[:, 2]),
        ("2,3", np.s_[:, 2, 3]),
        ("2,3,1", np.s_[:, 2, 3, 1]),
        ("1:3", np.s_[:, 1:3]),
        ("2,:,1", np.s_[:, 2, :, 1]),
        ("2,1:,:3", np.s_[:, 2, 1:, :3]),
        (":,2,2", np.s_[:, :, 2, 2]),
        ((2, slice(1, 4)), np.s_[:, 2, 1:4]),
        (3, np.s_[:, 3]),
    ],
)
@pytest.mark.parametrize("tensor", ["pre", "map"])
def test_a_unit_or_the_sum_of_a_slice(tensor: str, unit: Any, where: Any) -> None:
    converted = onnxgbp.convert(convolution(), output=tensor, unit=unit)
    seed = np.zeros((2, 4, 6, 5), np.float32)
    seed[where] = 1
    found = reference_run(converted, {"x": IMAGES})["attribution"]
    assert np.array_equal(found, weighted(convolution(), IMAGES, seed, output=tensor))


@pytest.mark.parametrize("unit", ["max", "1,max", "1:3,max", "2,:,max"])
@pytest.mark.parametrize("method", ["guided", "deconvnet"])
def test_the_strongest_unit_of_each_sample(unit: str, method: str) -> None:
    converted = onnxgbp.convert(convolution(), output="map", unit=unit, method=method)
    found = reference_run(converted, {"x": IMAGES})
    inner = np.ascontiguousarray(_inner("map"))
    inside = np.full_like(inner, -np.inf)
    where = {"max": np.s_[:], "1,max": np.s_[:, 1], "1:3,max": np.s_[:, 1:3], "2,:,max": np.s_[:, 2]}[unit]
    inside[where] = inner[where]
    places = inside.reshape(2, -1).argmax(1)
    assert np.array_equal(found["attribution_target"], places)
    seed = np.zeros_like(inner)
    seed.reshape(2, -1)[[0, 1], places] = 1
    want = weighted(convolution(), IMAGES, seed, output="map", method=method)
    assert np.array_equal(found["attribution"], want)
    assert np.any(want)


def _inner(tensor: str) -> Array:
    model = convolution()
    model.graph.output.append(helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return reference_run(model, {"x": IMAGES})[tensor]


def test_seed_activation_sends_back_the_feature_map_itself() -> None:
    """The deconvnet of a whole map starts from its activations, Zeiler & Fergus 2013."""
    inner = np.ascontiguousarray(_inner("map"))
    seed = np.zeros_like(inner)
    seed[:, 2] = inner[:, 2]
    converted = onnxgbp.convert(convolution(), output="map", unit=2, seed="activation", method="deconvnet")
    found = reference_run(converted, {"x": IMAGES})["attribution"]
    assert np.array_equal(found, weighted(convolution(), IMAGES, seed, output="map", method="deconvnet"))
    classes = onnxgbp.convert(classifier(), seed="activation")
    best = logits().argmax(1)
    want = weighted(classifier(), X, one_hot((3, 6), best) * logits())
    assert np.allclose(reference_run(classes, {"x": X})["attribution"], want, rtol=1e-5)


def test_a_node_is_named_as_well_as_its_tensor() -> None:
    by_node = onnxgbp.convert(convolution(), output="relu", unit=1)
    by_tensor = onnxgbp.convert(convolution(), output="map", unit=1)
    assert by_node.SerializeToString(deterministic=True) == by_tensor.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("4", "unit index 4 is out of range: axis 1 of tensor 'map' has 4 entries"),
        ("2:9", "unit index 8 is out of range"),
        ("2:2", "unit 2:2 is empty"),
        ("-1", "unit index -1 is out of range"),
        ("0,0,0,0", "has 4 indices"),
        ("max,1", "max stands last"),
        ("1:3:2", "unit '1:3:2' is none such as"),
        ("a", "unit 'a' is none such as"),
        ("", "unit '' is none such as"),
    ],
)
def test_a_unit_that_is_none_is_refused(unit: str, message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message):
        onnxgbp.convert(convolution(), output="map", unit=unit)


def test_a_seed_that_is_none_is_refused() -> None:
    with pytest.raises(OnnxgbpError, match="no seed is called 'two': choose one of one, activation"):
        onnxgbp.convert(classifier(), seed="two")
    with pytest.raises(OnnxgbpError, match="leave seed activation out"):
        onnxgbp.convert(classifier(), seed="activation", target="seed")


# --- several methods over one forward pass --------------------------------------------------------

SEVERAL = ("gradient", "deconvnet", "guided", "rectgrad:75")


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("target", ["argmax", "top2"])
def test_several_methods_share_the_forward_pass(target: str, profile: str) -> None:
    together = onnxgbp.convert(convolution(), methods=SEVERAL, target=target, profile=profile)
    assert sum(node.op_type == "Conv" and list(node.output) == ["pre"] for node in together.graph.node) == 1
    names = [output.name for output in together.graph.output]
    assert names == [
        "y",
        "attribution_gradient",
        "attribution_deconvnet",
        "attribution_guided",
        "attribution_rectgrad_75",
        "attribution_target",
    ]
    in_runtime, in_reference = ort_run(together, {"x": IMAGES}), reference_run(together, {"x": IMAGES})
    for method, name in zip(SEVERAL, names[1:-1]):
        alone = onnxgbp.convert(convolution(), method=method, target=target, profile=profile)
        assert np.array_equal(in_reference[name], reference_run(alone, {"x": IMAGES})["attribution"])
        assert np.array_equal(in_runtime[name], ort_run(alone, {"x": IMAGES})["attribution"])


def test_several_methods_by_the_explainer_and_by_one_graph() -> None:
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(classifier()))
    together = graph.render(methods="gradient,guided")
    assert json.loads({p.key: p.value for p in together.metadata_props}["onnxgbp.rules"]) == ["*=gradient,guided"]
    result = Explainer(classifier(), methods=["gradient", "guided"])(X)
    assert list(result.attribution) == ["gradient", "guided"]
    again = Explainer(together)(X)
    for method in ("gradient", "guided"):
        alone = Explainer(classifier(), method=method)(X)
        assert np.array_equal(result.attribution[method], alone.attribution)
        assert np.array_equal(again.attribution[method], alone.attribution)


def test_a_method_named_twice_is_refused() -> None:
    with pytest.raises(OnnxgbpError, match="a method is named twice: guided, guided"):
        onnxgbp.convert(classifier(), methods="guided,guided")


# --- the command line -----------------------------------------------------------------------------


def test_the_command_line_aims_alike(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "net.onnx")
    onnx.save(convolution(), tmp_path / "maps.onnx")

    def converted(source: str, *options: str) -> onnx.ModelProto:
        out = tmp_path / "out.onnx"
        result = CliRunner().invoke(main, ["convert", str(tmp_path / source), "-o", str(out), *options])
        assert result.exit_code == 0, result.output
        model = onnx.load(out)
        out.unlink()
        return model

    def same(model: onnx.ModelProto, source: str, **options: Any) -> bool:
        again = onnxgbp.convert(tmp_path / source, **options)
        return model.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)

    assert same(converted("net.onnx", "--target", "goldfish"), "net.onnx", target=1)
    assert same(converted("net.onnx", "--target", "top2"), "net.onnx", target="top2")
    methods = converted("net.onnx", "--methods", "gradient,rectgrad:75")
    assert same(methods, "net.onnx", methods=["gradient", "rectgrad:75"])
    unit = ("--output", "relu", "--unit", "1:3,max", "--seed", "activation")
    assert same(converted("maps.onnx", *unit), "maps.onnx", output="relu", unit="1:3,max", seed="activation")
    last = ("--method", "gradient", "--rule", "depth:>=-1=guided")
    assert same(converted("maps.onnx", *last), "maps.onnx", method="gradient", rule=["depth:>=-1=guided"])


def test_inspect_tells_what_a_converted_file_holds(tmp_path: Path) -> None:
    onnxgbp.save(onnxgbp.convert(classifier(), methods="gradient,guided", target="tabby"), tmp_path / "out.onnx")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "out.onnx"), "--json"])
    found = json.loads(result.output)
    assert found["holds"].startswith("gradient,guided of 'logits' (target 2) with respect to 'x'")
    assert [(row["method"], row["node"], row["rule"]) for row in found["recorded"]["audit"]] == [
        ("gradient", "relu", "gradient"),
        ("guided", "relu", "guided"),
    ]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target", "no such class"], 1, "no class is called 'no such class'"),
        (["--target", "top0"], 2, "none of"),
        (["--methods", "guided,nothing"], 2, "no method is called 'nothing'"),
        (["--method", "rectgrad:x"], 2, "does not take x"),
        (["--method", "rectgrad:100"], 1, "rectgrad:100 is no percentile"),
        (["--unit", "max,1"], 2, "max stands last"),
        (["--seed", "two"], 2, "two"),
    ],
)
def test_a_wrong_aim_leaves_no_file(tmp_path: Path, options: list[str], code: int, message: str) -> None:
    onnx.save(classifier(), tmp_path / "net.onnx")
    result = CliRunner().invoke(
        main, ["convert", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "out.onnx"), *options]
    )
    assert result.exit_code == code
    assert message in result.output
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (9, {"methods": ("guided", "gradient")}),
        (17, {"method": "gradient"}),
        (20, {"method": "integrated-gradients", "n_steps": 3}),
    ],
)
def test_many_classes_take_several_runs(count: int, options: dict[str, Any]) -> None:
    """The graph never has more than eight sweeps, and each class gives what it gives alone."""
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weights = {"W1": (5, 16), "W2": (16, 30)}
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> m (float[N,5] x) => (float[N,30] y) {
            h = MatMul(x, W1)  r = Relu(h)  y = MatMul(r, W2)
        }"""
    )
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    explainer = onnxgbp.Explainer(model, **options)
    x, target = rng.standard_normal((3, 5)).astype(np.float32), rng.integers(0, 30, (3, count))
    found = explainer(x, target)
    np.testing.assert_array_equal(found.target, target)
    assert max(explainer._of_several) <= 8
    alone = [explainer(x, column) for column in target.T]
    np.testing.assert_array_equal(found.scores, alone[0].scores)
    maps = found.attribution if isinstance(found.attribution, dict) else {"": found.attribution}
    for name, joined in maps.items():
        wanted = np.stack([one.attribution[name] if name else one.attribution for one in alone], axis=1)
        np.testing.assert_allclose(joined, wanted, rtol=1e-4, atol=1e-5)
    if found.completeness_gap is not None:
        gaps = np.stack([one.completeness_gap for one in alone], axis=1)
        np.testing.assert_allclose(found.completeness_gap, gaps, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        OnnxgbpError, match=rf"target has shape \[2, {count}\]: give \[3, {count}\], {count} per sample"
    ):
        explainer(x, target[:2])
