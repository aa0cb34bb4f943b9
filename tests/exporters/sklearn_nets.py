"""scikit-learn's differentiable classifiers, exported by skl2onnx.

scikit-learn has no gradients. The ones here follow from its documented formulas and fitted coefficients, and each is
checked against central differences of scikit-learn's own predict_log_proba in float64 before it is written down.
"""

import functools
import warnings
from pathlib import Path

import numpy as np
from common import BATCH, CLASSES, main, seeded
from skl2onnx import to_onnx
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FEATURES = 12


def dataset(classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = seeded("dataset")
    y = np.arange(300) % classes
    centres = rng.normal(size=(classes, FEATURES)) * 1.5
    return centres[y] + rng.normal(size=(300, FEATURES)), y


ACTIVATIONS = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "logistic": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
}


def logit_gradients(model: ClassifierMixin, x: np.ndarray, guided: bool) -> np.ndarray:
    """[class, sample, feature]: of each logit; a net for two classes has one, the second class's."""
    if isinstance(model, LogisticRegression):
        return np.repeat(model.coef_[:, None, :], len(x), axis=1)
    function, slope = ACTIVATIONS[model.activation]
    before = []
    for matrix, bias in zip(model.coefs_[:-1], model.intercepts_[:-1]):
        before.append(x @ matrix + bias)
        x = function(before[-1])
    gradients = np.repeat(model.coefs_[-1].T[:, None, :], len(x), axis=1)
    for matrix, z in zip(model.coefs_[-2::-1], before[::-1]):
        if guided and model.activation != "identity":
            gradients = np.maximum(gradients, 0)
        gradients = gradients * slope(z) @ matrix.T
    return gradients


def of_probabilities(logit: np.ndarray, p: np.ndarray, guided: bool) -> np.ndarray:
    """[class, sample, feature]: of 1 - p and p, what a file for two classes returns: no logit of the first exists.

    The sigmoid is an activation like any other, so the guided rule blocks the first class's negative gradient there.
    """
    second = p * (1 - p) * logit
    return np.stack([np.zeros_like(second) if guided else -second, second])


def check(model: ClassifierMixin, x: np.ndarray, logits: np.ndarray) -> None:
    """Raises where the gradient of log p = logit - log(sum(exp(logits))) is not what the model's own output does."""
    if len(logits) == 1:
        logits = np.concatenate([np.zeros_like(logits), logits])
    p = model.predict_proba(x).T[:, :, None]
    analytic = logits - (p * logits).sum(axis=0)
    for feature in range(x.shape[1]):
        step = np.zeros(x.shape[1])
        step[feature] = 1e-5
        difference = (model.predict_log_proba(x + step) - model.predict_log_proba(x - step)) / 2e-5
        np.testing.assert_allclose(analytic[:, :, feature], difference.T, rtol=1e-4, atol=1e-6)


def export(model: ClassifierMixin, classes: int, scaled: bool, opset: int, zipmap: bool, path: Path) -> dict:
    x, y = dataset(classes)
    whole = make_pipeline(StandardScaler(), model) if scaled else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not converged serves as well
        whole.fit(x * 3 + 1, y)
    options = {id(model): {"zipmap": zipmap}}
    exported = to_onnx(whole, np.zeros((1, FEATURES), np.float32), options=options, target_opset=opset)
    path.write_bytes(exported.SerializeToString())

    x = (seeded("input").normal(size=(BATCH, FEATURES)) * 4 + 1).astype(np.float32)
    seen = whole[0].transform(x.astype(np.float64)) if scaled else x.astype(np.float64)
    scale = whole[0].scale_ if scaled else 1.0
    target = np.arange(BATCH) % classes
    maps = {}
    for rule in ("gradient", "guided"):
        gradients = logit_gradients(model, seen, rule == "guided")
        if rule == "gradient":
            check(model, seen, gradients)
        if len(gradients) == 1 and isinstance(model, LogisticRegression):
            gradients = np.concatenate([-gradients, gradients])  # its file has a score of its own for either class
        elif len(gradients) == 1:
            gradients = of_probabilities(gradients[0], model.predict_proba(seen)[:, 1:], rule == "guided")
        maps[rule] = gradients[target, np.arange(BATCH)] / scale
    return {"x": x, "target": target, "output": whole.predict_proba(x.astype(np.float64)), **maps}


def mlp(activation: str, *hidden: int) -> MLPClassifier:
    return MLPClassifier(hidden or (16, 10), activation=activation, max_iter=60, random_state=0)


# Classifier, classes, behind a StandardScaler, opset, with a ZipMap.
MODELS = {
    "mlp_relu": (mlp("relu"), CLASSES, False, 17, False),
    "mlp_relu_zipmap": (mlp("relu"), CLASSES, False, 17, True),
    "mlp_relu_opset11": (mlp("relu"), CLASSES, False, 11, False),
    "mlp_tanh": (mlp("tanh"), CLASSES, False, 18, False),
    "mlp_logistic": (mlp("logistic", 14), CLASSES, False, 21, False),
    "mlp_scaled": (mlp("relu"), CLASSES, True, 17, False),
    "mlp_two_classes": (mlp("relu"), 2, False, 17, False),
    "logistic_regression": (LogisticRegression(), CLASSES, False, 17, False),
    "logistic_regression_scaled": (LogisticRegression(), CLASSES, True, 17, False),
    "logistic_regression_two_classes": (LogisticRegression(), 2, False, 17, False),
    "logistic_regression_zipmap": (LogisticRegression(), CLASSES, True, 17, True),
}

if __name__ == "__main__":
    main({name: functools.partial(export, *arguments) for name, arguments in MODELS.items()})
