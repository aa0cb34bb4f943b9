"""Support vector machines of ai.onnx.ml, against a literal replica in float64 of what ONNX Runtime computes."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checking import Array, ort_run
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper

import onnxgbp
from onnxgbp.cli import main

FEATURES, BATCH = 4, 5
KERNELS = ("LINEAR", "POLY", "RBF", "SIGMOID")
PARAMETERS = {"LINEAR": (0, 0, 0), "POLY": (0.4, 0.7, 3), "RBF": (0.3, 0, 0), "SIGMOID": (0.2, -0.1, 0)}
X = np.random.default_rng(1).standard_normal((BATCH, FEATURES)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A classifier with 2, 3, 4... support vectors for its classes, or without any (the linear form)."""

    kernel: str = "RBF"
    classes: int = 3
    vectors: bool = True
    platt: bool = False
    transform: str = "NONE"
    strings: bool = False
    offset: float = 0.0
    degree: float = 3

    def attributes(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.classes)
        counts = [2 + i for i in range(self.classes)] if self.vectors else []
        pairs = self.classes * (self.classes - 1) // 2
        width = (self.classes - 1) * sum(counts) if self.vectors else self.classes * FEATURES
        parameters = list(PARAMETERS[self.kernel])
        if self.kernel == "POLY":
            parameters[2] = self.degree
        given: dict[str, Any] = {
            "kernel_type": self.kernel,
            "kernel_params": [float(number) for number in parameters],
            "coefficients": rng.standard_normal(width),
            "rho": rng.standard_normal(pairs if self.vectors else 1),
            "post_transform": self.transform,
        }
        if self.vectors:
            given |= {"vectors_per_class": counts}
            given |= {"support_vectors": self.offset + rng.standard_normal(sum(counts) * FEATURES)}
        if self.platt:
            given |= {"prob_a": -1 - rng.random(pairs), "prob_b": rng.standard_normal(pairs)}
        labels = [f"c{i}" for i in range(self.classes)] if self.strings else list(range(self.classes))
        given["classlabels_strings" if self.strings else "classlabels_ints"] = labels
        # as the file holds them
        return {k: v.astype(np.float32).tolist() if isinstance(v, np.ndarray) else v for k, v in given.items()}

    def model(self) -> ModelProto:
        columns = self.classes if self.platt or not self.vectors or self.classes == 2 else None
        return one_node(
            "SVMClassifier",
            self.attributes(),
            {"label": TensorProto.STRING if self.strings else TensorProto.INT64},
            {"p": columns or self.classes * (self.classes - 1) // 2},
        )


def one_node(operator: str, attributes: dict[str, Any], labels: dict[str, int], floats: dict[str, int]) -> ModelProto:
    """x [N, 4] -> the operator -> a label [N], or none, and floats [N, columns]."""
    node = helper.make_node(operator, ["x"], [*labels, *floats], "machine", domain="ai.onnx.ml", **attributes)
    graph = helper.make_graph(
        [node],
        "svm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info(name, kind, ["N"]) for name, kind in labels.items()]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in floats.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def kernel(x: Array, v: Array, kind: str, parameters: list[float]) -> float:
    gamma, offset, degree = parameters
    if kind == "RBF":
        return float(np.exp(-gamma * ((x - v) ** 2).sum()))
    dot = float(x @ v)
    return {"LINEAR": dot, "POLY": (gamma * dot + offset) ** degree, "SIGMOID": np.tanh(gamma * dot + offset)}[kind]


def pair_scores(given: dict[str, Any], x: Array) -> tuple[Array, Array]:
    """[N, pairs], and the votes [N, classes], number by number in the order in which libsvm stores them."""
    counts, coefficients = given["vectors_per_class"], given["coefficients"]
    total, classes = sum(counts), len(counts)
    vectors = np.array(given["support_vectors"]).reshape(total, -1)
    scores, votes = [], np.zeros((len(x), classes))
    for n, row in enumerate(x):
        kernels = [kernel(row, v, given["kernel_type"], given["kernel_params"]) for v in vectors]
        scores.append([])
        for index, (i, j) in enumerate(itertools.combinations(range(classes), 2)):
            score = given["rho"][index]
            for m in range(sum(counts[:i]), sum(counts[: i + 1])):
                score += coefficients[(j - 1) * total + m] * kernels[m]
            for m in range(sum(counts[:j]), sum(counts[: j + 1])):
                score += coefficients[i * total + m] * kernels[m]
            scores[-1].append(score)
            votes[n, i if score > 0 else j] += 1
    return np.array(scores), votes


def linear(given: dict[str, Any], x: Array) -> Array:
    return x @ np.array(given["coefficients"]).reshape(-1, x.shape[1]).T + given["rho"][0]


def class_scores(machine: Machine, x: Array) -> Array:
    """scikit-learn's decision_function, one class against the rest; of two classes s and -s, s being the first's."""
    given = machine.attributes()
    if not machine.vectors:
        return linear(given, x)
    scores, votes = pair_scores(given, x)
    if machine.classes == 2:
        return np.concatenate([scores, -scores], axis=1)
    total = np.zeros_like(votes)
    for index, (i, j) in enumerate(itertools.combinations(range(machine.classes), 2)):
        total[:, i] += scores[:, index]
        total[:, j] -= scores[:, index]
    return votes + total / (3 * (np.abs(total) + 1))


def squashed(scores: Array, transform: str) -> Array:
    if transform == "LOGISTIC":
        return 1 / (1 + np.exp(-scores))
    if transform.startswith("SOFTMAX"):  # no score is 0 here, which SOFTMAX_ZERO would leave out
        return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return scores


def returned(machine: Machine, x: Array) -> Array:
    """The second output, without Platt's probabilities."""
    given = machine.attributes()
    scores = pair_scores(given, x)[0] if machine.vectors else linear(given, x)
    if machine.vectors and machine.classes == 2:
        return np.concatenate([-scores, scores], axis=1)
    return squashed(scores, machine.transform)


def differences(function: Any, seed: Array, x: Array) -> Array:
    """The gradient of sum(seed * function(x)), by central differences in float64."""
    x = x.astype(np.float64)
    gradient = np.zeros_like(x)
    for n, feature in np.ndindex(*x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[n, feature] += sign * 1e-5
            ends.append((seed * function(moved)).sum())
        gradient[n, feature] = (ends[0] - ends[1]) / 2e-5
    return gradient


def assert_near(got: Array, want: Array, tolerance: float = 2e-5) -> None:
    """float32 against float64: sums of some twenty products, of numbers up to 10 for the cubes of POLY."""
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


OUTPUTS = [
    *(Machine(kernel, classes) for kernel in KERNELS for classes in (2, 3, 4)),
    *(Machine("POLY", degree=degree) for degree in (0, 1, 2)),
    *(Machine(transform=transform) for transform in ("LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO")),
    *(
        Machine("LINEAR", classes, vectors=False, transform=transform)
        for classes in (2, 3)
        for transform in ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO")
    ),
]


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("machine", OUTPUTS, ids=str)
def test_gradient_of_the_output(machine: Machine, profile: str) -> None:
    """Of what the node itself returns, with --output."""
    source = machine.model()
    before = ort_run(source, {"x": X})
    np.testing.assert_allclose(before["p"], returned(machine, X.astype(np.float64)), rtol=1e-4, atol=1e-5)
    seed = np.random.default_rng(2).standard_normal(before["p"].shape).astype(np.float32)
    converted = onnxgbp.convert(source, method="gradient", target="seed", output="p", profile=profile)
    assert [node.op_type for node in converted.graph.node].count("SVMClassifier") == 1  # no scores that nobody reads
    results = ort_run(converted, {"x": X, "seed": seed})
    np.testing.assert_array_equal(results["p"], before["p"])
    assert_near(results["attribution"], differences(lambda x: returned(machine, x), seed, X))


HIDDEN = [
    *(Machine(kernel, classes, platt=True) for kernel in KERNELS for classes in (2, 3, 4)),
    *(Machine(classes=classes, platt=platt, strings=True) for classes in (2, 3) for platt in (False, True)),
    *(Machine(classes=classes, transform="LOGISTIC") for classes in (2, 4)),
    *(Machine("LINEAR", 3, vectors=False, transform=transform) for transform in ("LOGISTIC", "SOFTMAX")),
]


@pytest.mark.parametrize("machine", HIDDEN, ids=str)
def test_the_scores_of_the_classes_are_explained(machine: Machine) -> None:
    source, target = machine.model(), np.arange(BATCH) % machine.classes
    before = ort_run(source, {"x": X})
    converted = onnxgbp.convert(source, method="gradient", target="input")
    results = ort_run(converted, {"x": X, "target": target})
    for name, array in before.items():
        np.testing.assert_array_equal(results[name], array)
    seed = np.eye(machine.classes)[target]
    assert_near(results["attribution"], differences(lambda x: class_scores(machine, x), seed, X))
    strongest = ort_run(converted, {"x": X, "target": np.full(BATCH, -1)})["attribution_target"]
    np.testing.assert_array_equal(strongest, class_scores(machine, X.astype(np.float64)).argmax(axis=1))
    said = {entry.key: entry.value for entry in converted.metadata_props}
    assert said["onnxgbp.explained"] == "p/scores"
    assert "SVMClassifier 'machine'" in said["onnxgbp.stripped"]


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("platt", [False, True])
def test_the_strongest_class_is_the_label(classes: int, platt: bool) -> None:
    """Which the second output's strongest column is not: of two classes it is the other one."""
    x = np.random.default_rng(3).standard_normal((200, FEATURES)).astype(np.float32)
    machine = Machine(classes=classes, platt=platt)
    results = ort_run(onnxgbp.convert(machine.model(), method="gradient"), {"x": x})
    votes = np.sort(pair_scores(machine.attributes(), x.astype(np.float64))[1], axis=1)
    won = votes[:, -1] > votes[:, -2]  # where votes tie the label is the first of them
    assert len(np.unique(results["label"][won])) > 1
    np.testing.assert_array_equal(results["attribution_target"][won], results["label"][won])


def test_features_far_from_zero() -> None:
    """The squared distances of an RBF are not the small differences of large squares."""
    machine = Machine(classes=2, offset=1000.0)
    x = X + np.float32(1000)
    got = ort_run(onnxgbp.convert(machine.model(), method="gradient", target=0), {"x": x})["attribution"]
    want = differences(lambda at: class_scores(machine, at)[:, :1], np.ones(1), x)
    assert_near(got, want, 1e-4)  # x itself has steps of 6e-5


@pytest.mark.parametrize("classes", [2, 3])
def test_features_in_float64(classes: int) -> None:
    """The scores stay float32, as the standard has them; the attribution is of the input's type."""
    machine = Machine(classes=classes, platt=True)
    source = machine.model()
    source.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    x = X.astype(np.float64)
    got = ort_run(onnxgbp.convert(source, method="gradient", target=1), {"x": x})["attribution"]
    assert got.dtype == np.float64
    assert_near(got, differences(lambda at: class_scores(machine, at)[:, 1:2], np.ones(1), x))


@pytest.mark.parametrize("machine", [Machine(platt=True), Machine(classes=2), Machine(platt=True, strings=True)])
def test_verify(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(machine.model().SerializeToString())
    onnxgbp.save(onnxgbp.convert(tmp_path / "net.onnx", method="gradient"), tmp_path / "out.onnx")
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "out.onnx"), "--source", str(tmp_path / "net.onnx")])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (Machine(platt=True), "an iteration makes its probabilities of the scores"),
        (Machine(classes=2, transform="SOFTMAX"), "two classes with post_transform SOFTMAX, which ONNX Runtime leaves"),
        (Machine("LINEAR", vectors=False, transform="PROBIT"), "post_transform PROBIT"),
    ],
    ids=str,
)
def test_refused_outputs(machine: Machine, why: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=why):
        onnxgbp.convert(machine.model(), target="seed", output="p")


def regressor(kind: str, vectors: int = 6, **more: Any) -> tuple[ModelProto, dict[str, Any]]:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "kernel_type": kind,
        "kernel_params": [float(number) for number in PARAMETERS[kind]],
        "coefficients": rng.standard_normal(vectors or FEATURES).astype(np.float32).tolist(),
        "rho": [0.25],
        "n_supports": vectors,
        "support_vectors": rng.standard_normal(vectors * FEATURES).astype(np.float32).tolist(),
        **more,
    }
    return one_node("SVMRegressor", {k: v for k, v in given.items() if v != []}, {}, {"y": 1}), given


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize(("kind", "vectors"), [*((kind, 6) for kind in KERNELS), ("LINEAR", 0)])
def test_regressor(kind: str, vectors: int, profile: str) -> None:
    source, given = regressor(kind, vectors)

    def value(x: Array) -> Array:
        if not vectors:
            return linear(given, x)
        at = np.array(given["support_vectors"]).reshape(vectors, -1)
        rows = [[kernel(row, v, kind, given["kernel_params"]) for v in at] for row in x]
        return np.array(rows) @ np.array(given["coefficients"])[:, None] + given["rho"][0]

    converted = onnxgbp.convert(source, method="gradient", target="seed", profile=profile)
    seed = np.random.default_rng(2).standard_normal((BATCH, 1)).astype(np.float32)
    results = ort_run(converted, {"x": X, "seed": seed})
    np.testing.assert_array_equal(results["y"], ort_run(source, {"x": X})["y"])
    np.testing.assert_allclose(results["y"], value(X.astype(np.float64)), rtol=1e-4, atol=1e-5)
    assert_near(results["attribution"], differences(value, seed, X))


def test_one_class_is_constant() -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match="with one_class it gives 1 or -1"):
        onnxgbp.convert(regressor("RBF", one_class=1)[0], target="seed")
