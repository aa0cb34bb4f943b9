"""The domain ai.onnx.ml: the steps of scikit-learn's pipelines, and the linear models at their end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs, variadic
from onnxgbp.vjps.shape import contract, copies
from onnxgbp.vjps.squashing import SQUASHING, labels_of, squashed
from onnxgbp.vjps.svm import class_scores, votes

__all__ = ["VJPS", "find_scores", "hides_scores", "scores_name", "write_scores"]


def scaler_x(op: Emit, s: Step) -> ir.Value:
    """y = (x - offset) scale, one number each or one per feature."""
    return op.cast_like(op.Mul(s.dy, op.like(np.asarray(s.argument("scale"), np.float64), s.y)), s.x)


def normalizer_x(op: Emit, s: Step) -> ir.Value:
    """y = x / n with n the 1- or 2-norm of each row: dx = (dy - dn/dx sum(dy y)) / n."""
    total = op.ReduceSum(op.Mul(s.dy, s.y), axes=[1], keepdims=1)
    norm = str(s.argument("norm"))
    if norm == "L1":
        return op.Div(op.Sub(s.dy, op.Mul(op.Sign(s.x), total)), op.ReduceL1(s.x, axes=[1], keepdims=1))
    if norm == "L2":
        return op.Div(op.Sub(s.dy, op.Mul(s.y, total)), op.ReduceL2(s.x, axes=[1], keepdims=1))
    raise s.refuse(f"its norm '{norm}' has no rule")


def scores_name(classifier: ir.Node) -> str:
    """What the scores behind a classifier's probabilities are called."""
    return f"{classifier.outputs[1].name}/scores"


def find_scores(graph: ir.Graph, classifier: ir.Node) -> ir.Value | None:
    name = scores_name(classifier)
    return next((value for node in graph for value in node.outputs if value.name == name), None)


def hides_scores(node: ir.Node) -> bool:
    """Whether what a classifier of scikit-learn's returns beside its label is no score of each class.

    Either its post_transform has made probabilities of the scores, or they are of pairs of classes.
    """
    kind = f"{node.domain}::{node.op_type}"
    if kind not in ("ai.onnx.ml::LinearClassifier", "ai.onnx.ml::SVMClassifier") or len(node.outputs) < 2:
        return False
    s = Step(node)
    return str(s.argument("post_transform")) in SQUASHING or (node.op_type == "SVMClassifier" and votes(s))


def write_scores(op: Emit, s: Step) -> ir.Value:
    """The scores of each class before any probability, [N, classes], float32."""
    return class_scores(op, s) if s.node.op_type == "SVMClassifier" else _linear_scores(op, s)


def _linear_scores(op: Emit, s: Step) -> ir.Value:
    """The scores x W' + b of a LinearClassifier before its post_transform, [N, classes], float32."""
    weight, bias = _weight(s)
    x = s.x if s.x.dtype == ir.DataType.FLOAT else op.Cast(s.x, to=int(ir.DataType.FLOAT))
    return op.Add(op.MatMul(x, op.constant(np.ascontiguousarray(weight.T))), op.constant(bias))


def _weight(s: Step) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """W [outputs, features] and b [outputs]; the single row that tells two classes apart stands for both."""
    numbers, given = np.asarray(s.argument("coefficients"), np.float32), s.argument("intercepts")
    features, labels = (dims_of(s.x) or (None,))[-1], labels_of(s)
    rows = len(given) if given is not None else numbers.size // features if isinstance(features, int) else labels
    if not rows or numbers.size % rows:
        raise s.refuse(f"its {numbers.size} coefficients do not make {rows} rows")
    weight = numbers.reshape(rows, -1)
    bias = np.zeros(rows, np.float32) if given is None else np.asarray(given, np.float32)
    if rows == 1 and labels == 2:
        return np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    return weight, bias


def linear_classifier_x(op: Emit, s: Step) -> ir.Value:
    """dx = dz W, with dz = dy f'(z) where the post_transform f makes probabilities p of the scores z."""
    scores, dy = s.node.outputs[1], s.dys[1]
    if dy is None:
        raise s.refuse("only its label is explained, which has no gradient")
    weight, _ = _weight(s)
    kind = str(s.argument("post_transform"))
    if kind.startswith("SOFTMAX") and labels_of(s) == 2 and np.asarray(s.argument("coefficients")).size < weight.size:
        raise s.refuse(f"one row of coefficients with post_transform {kind}, which ONNX Runtime leaves out")
    dy = squashed(op, s, kind, scores, dy)
    return op.cast_like(op.MatMul(dy, op.like(weight, scores)), s.x)


def linear_regressor_x(op: Emit, s: Step) -> ir.Value:
    if str(s.argument("post_transform")) != "NONE":
        raise s.refuse(f"its post_transform {s.argument('post_transform')} has no rule")
    weight = np.asarray(s.argument("coefficients"), np.float32).reshape(int(s.argument("targets")), -1)
    return op.cast_like(op.MatMul(s.dy, op.like(weight, s.dy)), s.x)


def feature_extractor_x(op: Emit, s: Step) -> ir.Value:
    """A Gather along the last axis, contracted with the 0/1 matrix that tells which entry each index took."""
    taken = op.Reshape(op.Cast(s.input(1), to=int(ir.DataType.INT64)), [-1])
    if s.rank() < 2:
        raise s.refuse("its input is a vector, for which runtimes give results of different ranks")
    return contract(op, s.dy, s.rank() - 1, s.rank(), copies(op, s, s.rank() - 1, taken))


def feature_vectorizer(op: Emit, s: Step, index: int) -> ir.Value:
    """A Concat of columns, of which each input has as many as the attribute says."""
    sizes = s.ints("inputdimensions") or []
    if len(sizes) != len(s.node.inputs):
        raise s.refuse("its inputdimensions do not say how many columns each input has")
    start = sum(sizes[:index])
    dx = op.Slice(s.dy, starts=[start], ends=[start + sizes[index]], axes=[1])
    return op.cast_like(op.reshape_like(dx, s.input(index)), s.input(index))


def imputer_x(op: Emit, s: Step) -> ir.Value:
    """What was replaced, NaN above all, is a constant; the rest is handed on."""
    return op.Where(op.Equal(s.x, s.y), s.dy, op.like(0, s.dy))


VJPS = {
    "ai.onnx.ml::ArrayFeatureExtractor": inputs(feature_extractor_x),
    "ai.onnx.ml::FeatureVectorizer": variadic(feature_vectorizer),
    "ai.onnx.ml::Imputer": inputs(imputer_x),
    "ai.onnx.ml::LinearClassifier": inputs(linear_classifier_x),
    "ai.onnx.ml::LinearRegressor": inputs(linear_regressor_x),
    "ai.onnx.ml::Normalizer": inputs(normalizer_x),
    "ai.onnx.ml::Scaler": inputs(scaler_x),
}
