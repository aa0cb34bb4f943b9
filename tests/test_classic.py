"""The linear models of ai.onnx.ml: gradients of their scores, and which scores are explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checking import Array, ort_run
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper

import onnxgbp
from onnxgbp.cli import main

FEATURES, BATCH = 4, 3
PROFILES = ("ort", "portable")


def model(
    operator: str, attributes: dict[str, Any], *, nodes: Sequence[Any] = (), outputs: tuple[str, ...] = ()
) -> ModelProto:
    """x [N, 4] -> the operator -> label and p, or y; then further nodes."""
    made = ["label", "p"] if operator.endswith("Classifier") else ["y"]
    names = outputs or tuple(made)
    given = {name: value for name, value in attributes.items() if value is not None}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], made, "model", domain="ai.onnx.ml", **given), *nodes],
        "classic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [
            helper.make_tensor_value_info(name, TensorProto.INT64 if name == "label" else TensorProto.FLOAT, None)
            for name in names
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def numbers(rows: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, FEATURES)).astype(np.float32), rng.standard_normal(rows).astype(np.float32)


def classifier(rows: int, transform: str | None, *, strings: bool = False, **more: Any) -> ModelProto:
    weight, bias = numbers(rows)
    count = max(rows, 2)
    labels = {"classlabels_strings": [f"c{i}" for i in range(count)]} if strings else {"classlabels_ints": range(count)}
    attributes = {
        "coefficients": weight.ravel().tolist(),
        "intercepts": bias.tolist(),
        "post_transform": transform,
        "multi_class": int(rows > 2),
    }
    return model("LinearClassifier", {**attributes, **{k: list(v) for k, v in labels.items()}}, **more)


LINEAR = {
    "coefficients": numbers(3)[0].ravel().tolist(),
    "intercepts": numbers(3)[1].tolist(),
    "classlabels_ints": [0, 1, 2],
}

X = np.random.default_rng(1).standard_normal((BATCH, FEATURES)).astype(np.float32)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("rows", "transform"),
    [
        *((rows, transform) for rows in (2, 3) for transform in ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO", None)),
        (1, "NONE"),
        (1, "LOGISTIC"),
    ],
)
def test_gradient_of_the_output(rows: int, transform: str | None, profile: str) -> None:
    """Of what the node itself returns, with --output, against differences."""
    source = classifier(rows, transform)
    before = ort_run(source, {"x": X})
    seed = np.random.default_rng(2).standard_normal(before["p"].shape).astype(np.float32)
    converted = onnxgbp.convert(source, method="gradient", target="seed", output="p", profile=profile)
    results = ort_run(converted, {"x": X, "seed": seed})
    np.testing.assert_array_equal(results["p"], before["p"])
    np.testing.assert_array_equal(results["label"], before["label"])
    rng = np.random.default_rng(3)
    for _ in range(3):
        v = rng.standard_normal(X.shape).astype(np.float32)
        above, below = (
            ort_run(source, {"x": X + np.float32(sign * 1e-2) * v})["p"].astype(np.float64) for sign in (1, -1)
        )
        change = float((seed * (above - below)).sum() / 2e-2)
        product = results["attribution"].astype(np.float64) * v
        # float32 differences with a step of 1e-2: the third derivative of a sigmoid leaves some 1e-4
        assert abs(product.sum() - change) <= 1e-3 * np.linalg.norm(product)


@pytest.mark.parametrize("transform", ["LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("strings", [False, True])
def test_the_scores_behind_the_probabilities_are_explained(rows: int, transform: str, strings: bool) -> None:
    source = classifier(rows, transform, strings=strings)
    if strings:
        source.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    before = ort_run(source, {"x": X})
    target = np.array([0, 1, -1])
    converted = onnxgbp.convert(source, method="gradient", target="input")
    results = ort_run(converted, {"x": X, "target": target})
    for name, array in before.items():
        np.testing.assert_array_equal(results[name], array)
    weight, bias = numbers(rows)
    if rows == 1:
        weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    chosen = np.where(target < 0, (X @ weight.T + bias).argmax(axis=1), target)
    np.testing.assert_array_equal(results["attribution_target"], chosen)
    np.testing.assert_array_equal(results["attribution"], weight[chosen])
    said = {entry.key: entry.value for entry in converted.metadata_props}
    assert said["onnxgbp.explained"] == "p/scores"
    assert "LinearClassifier 'model'" in said["onnxgbp.stripped"]


def test_a_normalizer_and_a_zipmap_are_walked_back_over(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Normalizer", ["p"], ["q"], domain="ai.onnx.ml", norm="L1"),
        helper.make_node("ZipMap", ["q"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
    ]
    source = classifier(3, "LOGISTIC", nodes=nodes, outputs=("label", "z"))
    source.graph.output[1].ClearField("type")
    key, value = TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    source.graph.output[1].type.CopyFrom(helper.make_sequence_type_proto(helper.make_map_type_proto(key, value)))
    (tmp_path / "net.onnx").write_bytes(source.SerializeToString())
    model_ = onnxgbp.convert(tmp_path / "net.onnx", method="guided", target=1)
    np.testing.assert_array_equal(ort_run(model_, {"x": X})["attribution"], numbers(3)[0][[1] * BATCH])
    onnxgbp.save(model_, tmp_path / "out.onnx")
    for source_option in ([], ["--source", str(tmp_path / "net.onnx")]):  # without it the file itself is read again
        done = CliRunner().invoke(main, ["verify", str(tmp_path / "out.onnx"), *source_option])
        assert done.exit_code == 0, done.output


def test_unused_scores_leave_no_node_behind() -> None:
    converted = onnxgbp.convert(classifier(3, "SOFTMAX"), method="gradient", target="seed", output="p")
    assert not any("p/scores" in node.output for node in converted.graph.node)


@pytest.mark.parametrize(
    ("rows", "transform", "why"),
    [(1, "SOFTMAX", "one row of coefficients with post_transform SOFTMAX"), (3, "PROBIT", "post_transform PROBIT")],
)
def test_refused_classifiers(rows: int, transform: str, why: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=why):
        onnxgbp.convert(classifier(rows, transform), target="seed", output="p")


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("intercepts", [True, False])
def test_linear_regressor(targets: int, intercepts: bool) -> None:
    weight, bias = numbers(targets)
    source = model(
        "LinearRegressor",
        {
            "coefficients": weight.ravel().tolist(),
            "intercepts": bias.tolist() if intercepts else None,
            "targets": targets,
        },
    )
    seed = np.random.default_rng(2).standard_normal((BATCH, targets)).astype(np.float32)
    converted = onnxgbp.convert(source, method="gradient", target="seed")
    results = ort_run(converted, {"x": X, "seed": seed})
    np.testing.assert_array_equal(results["y"], ort_run(source, {"x": X})["y"])
    np.testing.assert_allclose(results["attribution"], seed @ weight, atol=1e-6)  # float32


def test_extracted_features() -> None:
    nodes = [helper.make_node("ArrayFeatureExtractor", ["p", "columns"], ["one"], domain="ai.onnx.ml")]
    source = classifier(3, "NONE", nodes=nodes, outputs=("one",))
    source.graph.initializer.append(helper.make_tensor("columns", TensorProto.INT64, [2], [2, 0]))
    converted = onnxgbp.convert(source, method="gradient", target="input")
    got = ort_run(converted, {"x": X, "target": np.array([0, 1, 1])})["attribution"]
    np.testing.assert_array_equal(got, numbers(3)[0][[2, 0, 0]])


def test_an_imputer_passes_what_it_leaves() -> None:
    nodes = [helper.make_node("LinearClassifier", ["y"], ["label", "p"], "linear", domain="ai.onnx.ml", **LINEAR)]
    source = model("Imputer", {"imputed_value_floats": [1.0, 2.0, 3.0, 4.0], "replaced_value_float": np.nan})
    source.graph.node.extend(nodes)
    source.graph.output[0].CopyFrom(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 3]))
    x = X.copy()
    x[0, 1] = x[2, 3] = np.nan
    got = ort_run(onnxgbp.convert(source, method="gradient", target=2), {"x": x})["attribution"]
    np.testing.assert_array_equal(got, np.where(np.isnan(x), 0, numbers(3)[0][[2] * BATCH]))


def test_columns_that_are_put_together() -> None:
    widths = {"a": 1, "b": 2, "c": 1}
    nodes = [
        helper.make_node("FeatureVectorizer", list(widths), ["y"], domain="ai.onnx.ml", inputdimensions=[1, 2, 1]),
        helper.make_node("LinearClassifier", ["y"], ["label", "p"], "linear", domain="ai.onnx.ml", **LINEAR),
    ]
    graph = helper.make_graph(
        nodes,
        "columns",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name, width in widths.items()],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    source = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    parts = dict(zip(widths, np.split(X, [1, 3], axis=1), strict=True))
    results = ort_run(onnxgbp.convert(source, method="gradient", target=1, wrt=list(widths)), parts)
    got = np.concatenate([results[f"attribution_{name}"] for name in widths], axis=1)
    np.testing.assert_array_equal(got, numbers(3)[0][[1] * BATCH])


@pytest.mark.parametrize("operator", ["TreeEnsembleClassifier", "TreeEnsembleRegressor"])
def test_trees_have_no_gradient(operator: str) -> None:
    made = ["label", "p"] if operator.endswith("Classifier") else ["p"]
    nodes = [helper.make_node(operator, ["x"], made, "forest", domain="ai.onnx.ml")]
    graph = helper.make_graph(
        nodes,
        "trees",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 2])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    source = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    with pytest.raises(onnxgbp.OnnxgbpError, match="a tree ensemble is piecewise constant: it has no gradient"):
        onnxgbp.convert(source)
