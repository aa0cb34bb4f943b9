"""Support vector machines of ai.onnx.ml: sums of kernels between x and the support vectors.

A classifier has one score for each pair of classes, positive for the first of them. ONNX Runtime returns the pairs'
scores, or probabilities of the classes that an iteration finds for them (Platt 1999; Wu, Lin, Weng 2004), and for two
classes the score of the *second* column is that of the first class. None of these is a score per class, which
`class_scores` writes beside the classifier as scikit-learn's decision_function defines it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.emit import Emit
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs
from onnxgbp.vjps.squashing import labels_of, squashed

__all__ = ["VJPS", "class_scores", "columns", "votes"]

Array = npt.NDArray[np.float64]

# What only squashes the scores, for `class_scores` to leave out.
_AFTER = ("post_transform", "prob_a", "prob_b")


def votes(s: Step) -> bool:
    """Whether a classifier has support vectors and so a score for each pair; else it is linear, with one per class."""
    return any(s.argument("vectors_per_class") or ())


def _pairs(classes: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(classes) for j in range(i + 1, classes)]


def columns(s: Step) -> int:
    """How many numbers a classifier returns for a sample beside its label."""
    classes = labels_of(s)
    return len(_pairs(classes)) if votes(s) and classes > 2 and not s.argument("prob_a") else classes


def class_scores(op: Emit, s: Step) -> ir.Value:
    """The scores of a classifier's classes before any probability, [N, classes], float32.

    Of two classes they are s and -s, of more the votes of the pairs plus t / (3 (|t| + 1)), where t adds a class's
    scores against each other one: the highest is the class that is returned, but where votes tie.
    """
    attributes = [attribute for name, attribute in s.node.attributes.items() if name not in _AFTER]
    node = ir.Node("ai.onnx.ml", "SVMClassifier", [s.x], attributes, num_outputs=2, name=op.name(f"{op.scope}/scores"))
    for value, like in zip(node.outputs, s.node.outputs, strict=True):
        value.name, value.type = op.name(f"{node.name}/{value.index()}"), like.type
    op.nodes.append(node)
    result, classes = node.outputs[1], labels_of(s)
    result.type = ir.TensorType(ir.DataType.FLOAT)
    if not votes(s):
        return result
    if classes == 2:
        return op.MatMul(result, op.like(np.array([[0, 0], [1, -1]]), result))
    first, second = (np.array([np.eye(classes)[pair[k]] for pair in _pairs(classes)]) for k in (0, 1))
    total = op.MatMul(result, op.like(first - second, result))
    won = op.cast_like(op.Greater(result, 0.0), result)
    lost = op.Sub(op.like(1, result), won)
    count = op.Add(op.MatMul(won, op.like(first, result)), op.MatMul(lost, op.like(second, result)))
    return op.Add(count, op.Div(total, op.Mul(op.Add(op.Abs(total), 1), 3)))


@dataclasses.dataclass(frozen=True)
class _Machine:
    """The scores K(x, vectors) weights, up to a constant: vectors [V, features], weights [V, scores]."""

    vectors: Array
    weights: Array


def _numbers(s: Step, name: str) -> Array:
    return np.asarray(s.argument(name) or (), np.float64)


def _classifier(s: Step) -> _Machine:
    """The coefficients of class i against class j stand in row j - 1 for its own vectors, in row i for those of j."""
    counts = [int(count) for count in s.argument("vectors_per_class")]
    ends = np.cumsum([0, *counts])
    vectors, classes = int(ends[-1]), len(counts)
    given = _numbers(s, "coefficients")
    if classes != labels_of(s) or given.size < (classes - 1) * vectors:
        raise s.refuse(f"its {given.size} coefficients and {classes} classes do not fit its {vectors} support vectors")
    rows = given[: (classes - 1) * vectors].reshape(classes - 1, vectors)
    weights = np.zeros((vectors, len(_pairs(classes))))
    for column, (i, j) in enumerate(_pairs(classes)):
        for mine, row in ((i, j - 1), (j, i)):
            own = slice(ends[mine], ends[mine + 1])
            weights[own, column] = rows[row, own]
    return _Machine(_numbers(s, "support_vectors").reshape(vectors, -1), weights)


def _kernels_x(op: Emit, s: Step, machine: _Machine, dy: ir.Value) -> ir.Value:
    """The gradient dy [N, scores] passed through weights and kernels to x [N, features]."""
    kind, x = str(s.argument("kernel_type")), s.x
    gamma, offset, degree = (*(float(number) for number in s.argument("kernel_params") or ()), 0.0, 0.0, 0.0)[:3]
    if s.rank() != 2:
        raise s.refuse("its input is a vector, for which it needs a batch axis")
    dk = op.MatMul(dy, op.like(machine.weights.T, x))  # [N, V]
    if kind == "LINEAR":
        return op.MatMul(dk, op.like(machine.vectors, x))
    if kind == "RBF":  # k = exp(-gamma |x - v|^2): dx = 2 gamma sum(dk k (v - x))
        # Around the vectors' mean, or the squares of an offset that all share would drown their differences.
        mean = machine.vectors.mean(axis=0)
        vectors, x = machine.vectors - mean, op.Sub(x, op.like(mean, x))
        length = op.ReduceSum(op.Mul(x, x), axes=[1], keepdims=1)
        product = op.MatMul(x, op.like(2 * vectors.T, x))
        distance = op.Add(op.Sub(length, product), op.like((vectors**2).sum(axis=1), x))
        share = op.Mul(dk, op.Exp(op.Mul(distance, -gamma)))
        pulls = op.Sub(op.MatMul(share, op.like(vectors, x)), op.Mul(x, op.ReduceSum(share, axes=[1], keepdims=1)))
        return op.Mul(pulls, 2 * gamma)
    inner = op.Add(op.MatMul(x, op.like(gamma * machine.vectors.T, x)), offset)
    if kind == "POLY":
        slope = op.Mul(op.Pow(inner, op.like(degree - 1 if degree else 0, x)), degree)
    elif kind == "SIGMOID":
        curve = op.Tanh(inner)
        slope = op.Sub(op.like(1, x), op.Mul(curve, curve))
    else:
        raise s.refuse(f"its kernel '{kind}' has no rule")
    return op.MatMul(op.Mul(dk, slope), op.like(gamma * machine.vectors, x))


def classifier_x(op: Emit, s: Step) -> ir.Value:
    """Of the pairs' scores; probabilities are refused, since the scores behind them are what is explained."""
    if s.dys[1] is None:
        raise s.refuse(
            "only its label is explained, which counts the votes of pairs of classes: it is constant nearly everywhere"
        )
    dy, y, kind, classes = op.cast_like(s.dys[1], s.x), op.cast_like(s.node.outputs[1], s.x), _kind(s), labels_of(s)
    if not votes(s):
        weight = _numbers(s, "coefficients").reshape(classes, -1)
        return op.MatMul(squashed(op, s, kind, y, dy), op.like(weight, s.x))
    if s.argument("prob_a"):
        raise s.refuse(
            "an iteration makes its probabilities of the scores; explain those scores, by leaving --output out"
        )
    if classes != 2:
        return _kernels_x(op, s, _classifier(s), squashed(op, s, kind, y, dy))
    if kind != "NONE":
        raise s.refuse(f"two classes with post_transform {kind}, which ONNX Runtime leaves out")
    return _kernels_x(op, s, _classifier(s), op.MatMul(dy, op.like(np.array([[-1], [1]]), s.x)))


def _kind(s: Step) -> str:
    return str(s.argument("post_transform"))


def regressor_x(op: Emit, s: Step) -> ir.Value:
    if s.argument("one_class"):
        raise s.refuse("with one_class it gives 1 or -1: it is constant nearly everywhere")
    if _kind(s) != "NONE":
        raise s.refuse(f"post_transform {_kind(s)}, which ONNX Runtime leaves out")
    count, weights = int(s.argument("n_supports")), _numbers(s, "coefficients")
    if not count:
        return op.cast_like(op.MatMul(s.dy, op.like(weights.reshape(1, -1), s.dy)), s.x)
    machine = _Machine(_numbers(s, "support_vectors").reshape(count, -1), weights[:count].reshape(count, 1))
    return _kernels_x(op, s, machine, op.cast_like(s.dy, s.x))


VJPS = {
    "ai.onnx.ml::SVMClassifier": inputs(classifier_x),
    "ai.onnx.ml::SVMRegressor": inputs(regressor_x),
}
