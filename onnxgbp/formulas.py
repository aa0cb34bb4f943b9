"""Tells an activation from its values: each with its formula, and how its parameters are read off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.activations import SELU_ALPHA, SELU_GAMMA

__all__ = ["GRID", "known_function"]

Array: TypeAlias = npt.NDArray[np.float64]

GRID: Array = np.concatenate([np.linspace(-9.7, 9.7, 78), [-1.0, 1.0, 1e-3, -1e-3, 60.0, -60.0]])
"""Where a function is evaluated, at least."""


def known_function(points: Array, y: Array, tolerance: float) -> tuple[str, dict[str, Any]] | None:
    """The kind and the arguments of the first in the table that takes these values, relative to 1 + |y|; or None.

    points: GRID, and where the function may jump. y: float64, as long.
    """
    for kind, guess, formula in _FAMILIES:
        arguments = guess(points, y)
        if arguments is None:
            continue
        with np.errstate(all="ignore"):
            wanted = formula(points, **arguments)
        # Bounds are exact, or an epsilon behind one would pass for a part of it.
        allowed = 0.0 if kind in ("Identity", "Relu", "Relu6", "Clip") else tolerance
        if np.all(np.abs(y - wanted) <= allowed * (1 + np.abs(wanted))):
            return kind, arguments
    return None


def _at(points: Array, y: Array, x: float) -> float:
    return float(y[np.argmin(np.abs(points - x))])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _erf(x: Array) -> Array:
    return np.array([math.erf(point) for point in x])


def _fixed(points: Array, y: Array) -> dict[str, Any]:
    return {}


def _leaky(points: Array, y: Array) -> dict[str, Any] | None:
    alpha = -_at(points, y, -1.0)
    return (
        {"alpha": alpha} if 0 < alpha < 0.999 else None
    )  # 1 is the identity (or adds an epsilon), -1 the absolute value


def _elu(points: Array, y: Array) -> dict[str, Any] | None:
    alpha = -_at(points, y, -60.0)
    return {"alpha": alpha} if np.isfinite(alpha) and alpha > 0 else None


def _shrink(points: Array, y: Array) -> dict[str, Any] | None:
    lambd = _jump(np.abs(points), y)
    return {"lambd": lambd, "bias": 60.0 - _at(points, y, 60.0)} if lambd is not None else None


def _thresholded(points: Array, y: Array) -> dict[str, Any] | None:
    alpha = _jump(points, y)
    return {"alpha": alpha} if alpha is not None else None


def _jump(points: Array, y: Array) -> float | None:
    """Up to where y is zero, if the next point stands right beside; else it could be anywhere between the two."""
    zero, beyond = points[y == 0].max(initial=-np.inf), points[y != 0].min(initial=np.inf)
    return float(zero) if zero < beyond <= zero + 1e-12 else None


def _clip(points: Array, y: Array) -> dict[str, Any] | None:
    low, high = _at(points, y, -60.0), _at(points, y, 60.0)
    bounds = {"min": low if low > -50 else None, "max": high if high < 50 else None}  # the grid ends at 60
    return bounds if low < high and any(bound is not None for bound in bounds.values()) else None


def _swish(points: Array, y: Array) -> dict[str, Any] | None:
    s = _at(points, y, 1.0)
    alpha = float(np.log(s / (1 - s))) if 0 < s < 1 else 0.0
    return {"alpha": round(alpha, 6)} if alpha > 0.01 else None  # 0 is x / 2


def _hard_sigmoid(points: Array, y: Array) -> dict[str, Any] | None:
    slope = (_at(points, y, 1e-3) - _at(points, y, -1e-3)) / 2e-3
    beta = (_at(points, y, 1e-3) + _at(points, y, -1e-3)) / 2
    return {"alpha": slope, "beta": beta} if slope > 0 else None


# kind, its parameters as read off the values on the grid (None: cannot be), its formula.
_FAMILIES: list[tuple[str, Callable[[Array, Array], dict[str, Any] | None], Callable[..., Array]]] = [
    ("Identity", _fixed, lambda x: x),  # no activation
    ("Relu", _fixed, lambda x: np.maximum(x, 0)),
    ("Relu6", lambda p, y: {"min": 0.0, "max": 6.0}, lambda x, min, max: np.clip(x, min, max)),
    ("Swish", _swish, lambda x, alpha: x * _sigmoid(alpha * x)),
    ("Gelu", _fixed, lambda x: x * (1 + _erf(x / np.sqrt(2))) / 2),
    ("GeluTanh", _fixed, lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2),
    ("HardSwish", _fixed, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("Mish", _fixed, lambda x: x * np.tanh(np.logaddexp(0, x))),
    ("Softplus", _fixed, lambda x: np.logaddexp(0, x)),
    ("Sigmoid", _fixed, _sigmoid),
    ("Tanh", _fixed, np.tanh),
    ("Softsign", _fixed, lambda x: x / (1 + np.abs(x))),
    ("LeakyRelu", _leaky, lambda x, alpha: np.where(x > 0, x, alpha * x)),
    ("Elu", _elu, lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))),
    (
        "Selu",
        lambda p, y: {"alpha": SELU_ALPHA, "gamma": SELU_GAMMA},
        lambda x, alpha, gamma: gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
    ),
    ("HardSigmoid", _hard_sigmoid, lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1)),
    ("Shrink", _shrink, lambda x, lambd, bias: np.where(np.abs(x) > lambd, x - np.sign(x) * bias, 0)),
    ("ThresholdedRelu", _thresholded, lambda x, alpha: np.where(x > alpha, x, 0)),
    ("Clip", _clip, lambda x, min, max: np.clip(x, min, max)),
]
assert {kind for kind, _, _ in _FAMILIES} >= {"Relu", "Relu6"}  # `--activations relu` finds both in any spelling
