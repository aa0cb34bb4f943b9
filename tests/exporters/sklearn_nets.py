"""scikit-learn's differentiable classifiers, exported by skl2onnx.

scikit-learn has no gradients. Those of linear models and nets follow from its documented formulas and fitted
coefficients, and each is checked against central differences of scikit-learn's own predict_log_proba in float64 before
it is written down. Those of support vector machines are central differences of its decision_function.
"""

import functools
import warnings
from pathlib import Path

import numpy as np
from common import BATCH, CLASSES, main, seeded
from skl2onnx import to_onnx
from sklearn.base import BaseEstimator, ClassifierMixin, is_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

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


def decision(model: SVC | SVR, x: np.ndarray) -> np.ndarray:
    """[sample, class]: the scores that a map explains, one class against the rest; a regression has one."""
    if isinstance(model, SVR):
        return model.predict(x)[:, None]
    given, model.decision_function_shape = model.decision_function_shape, "ovr"
    scores = model.decision_function(x)
    model.decision_function_shape = given
    return np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores


def decision_gradients(model: SVC | SVR, x: np.ndarray) -> np.ndarray:
    """[class, sample, feature]."""
    steps = np.eye(x.shape[1]) * 1e-6
    changes = [(decision(model, x + step) - decision(model, x - step)) / 2e-6 for step in steps]
    return np.stack(changes, axis=-1).swapaxes(0, 1)


def returned(whole: BaseEstimator, x: np.ndarray) -> np.ndarray:
    """What the file returns beside the label, for a machine of two classes the second's score d as d and -d."""
    if not is_classifier(whole):
        return whole.predict(x)[:, None]
    if hasattr(whole, "predict_proba"):
        return whole.predict_proba(x)
    scores = whole.decision_function(x)
    return np.stack([scores, -scores], axis=1) if scores.ndim == 1 else scores


def export(model: BaseEstimator, classes: int, scaled: bool, opset: int, zipmap: bool, path: Path) -> dict:
    x, y = dataset(classes)
    if not is_classifier(model):
        y = np.sin(x).sum(axis=1)
    whole = make_pipeline(StandardScaler(), model) if scaled else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not converged serves as well
        whole.fit(x * 3 + 1, y)
    options = {id(model): {"zipmap": zipmap}} if is_classifier(model) else {}
    exported = to_onnx(whole, np.zeros((1, FEATURES), np.float32), options=options, target_opset=opset)
    path.write_bytes(exported.SerializeToString())

    x = (seeded("input").normal(size=(BATCH, FEATURES)) * 4 + 1).astype(np.float32)
    seen = whole[0].transform(x.astype(np.float64)) if scaled else x.astype(np.float64)
    scale = whole[0].scale_ if scaled else 1.0
    target = np.arange(BATCH) % classes
    if isinstance(model, (SVC, SVR)):  # no activation anywhere: every rule gives the gradient
        gradient = decision_gradients(model, seen)[target, np.arange(BATCH)] / scale
        return {
            "x": x,
            "target": target,
            "output": returned(whole, x.astype(np.float64)),
            "gradient": gradient,
            "guided": gradient,
        }
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
    return {"x": x, "target": target, "output": returned(whole, x.astype(np.float64)), **maps}


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
    "svc_linear_two_classes": (SVC(kernel="linear"), 2, False, 17, False),
    "svc_linear": (SVC(kernel="linear"), 3, False, 17, False),
    "svc_poly": (SVC(kernel="poly", coef0=1.0), 3, True, 17, False),
    "svc_rbf_two_classes": (SVC(), 2, False, 17, False),
    "svc_rbf": (SVC(), 3, False, 17, False),
    "svc_rbf_scaled": (SVC(), 3, True, 17, True),
    "svc_rbf_pairs": (SVC(decision_function_shape="ovo"), 4, False, 17, False),
    "svc_probabilities_two_classes": (SVC(probability=True, random_state=0), 2, True, 17, False),
    "svc_probabilities": (SVC(probability=True, random_state=0), 3, True, 17, False),
    "svc_sigmoid": (SVC(kernel="sigmoid"), 3, True, 17, False),
    "svr": (SVR(), 1, False, 17, False),
}

if __name__ == "__main__":
    main({name: functools.partial(export, *arguments) for name, arguments in MODELS.items()})
