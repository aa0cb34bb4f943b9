"""Resize and Upsample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxgbp.constants import constant_value, evaluate
from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs
from onnxgbp.vjps.shape import contract

__all__ = ["VJPS"]

_KEPT = {"mode", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "nearest_mode", "antialias"}
_ROWS = 256
_LONGEST = 1 << 16  # the evaluator, which computes the matrix, goes by single entries
_POLICIES = {"not_larger": min, "not_smaller": max}


def resize_x(op: Emit, s: Step) -> ir.Value:
    """Every mode of Resize is linear and works axis by axis: its gradient is each axis's matrix, transposed.

    The matrix of an axis is what the node itself makes of the identity matrix along that axis: a constant, or made in
    the graph where the sizes are free. What a crop has beyond the input is a constant, so that its rows are 0.
    """
    sizes, outs = dims_of(s.x), dims_of(s.y)
    if sizes is None or outs is None:
        raise s.refuse("the rank of its input is not known; export the model with input shapes")
    axes = [axis % s.rank() for axis in s.ints("axes") or range(s.rank())]
    _refuse_disagreement(s, axes)
    dy = s.dy
    for position, axis in enumerate(axes):
        size, out, region = sizes[axis], outs[axis], _region(s, position, len(axes))
        same = size is not None and size == out and s.argument("keep_aspect_ratio_policy") not in _POLICIES
        scale = _scale(s, position)
        if region in (None, (0.0, 1.0)) and (scale == 1 if scale is not None else same):
            continue
        unknown = _scales_run(s) or _left_to_the_runtime(s, scale)
        if unknown or not isinstance(size, int) or not isinstance(out, int):
            dy = contract(op, dy, axis, len(sizes), _matrix_at_run(op, s, axis, position))
            continue
        op.sized(size, max(size, out))
        if out > _LONGEST:
            raise s.refuse(f"it makes an axis of {out} entries, more than {_LONGEST}, which takes too long to compute")
        arrays = dict[str, np.ndarray[Any, Any]]()
        if region is not None:
            # One entry is read in the middle: said so, since the evaluator takes a length of 0.999... for more.
            start, end = region if out > 1 else (sum(region) / 2,) * 2
            arrays["roi"] = np.array([0, start, 1, end], np.asarray(s.argument("roi")).dtype)
        if scale is not None:
            arrays["scales"] = np.array([1, scale], np.float32)
        else:
            arrays["sizes"] = np.array([size, out])
        matrix = _matrix(s, size, arrays, _limit(s, arrays, axes, position))
        if matrix.shape != (size, out):
            raise s.refuse("its matrix could not be computed for these sizes and attributes")
        dy = contract(op, dy, axis, len(sizes), op.like(matrix.T, s.x))
    return dy


def _matrix_at_run(op: Emit, s: Step, axis: int, position: int) -> ir.Value:
    """The matrix [out, size] of an axis, by the node's own operator: the last axis of [1, 1, size, size] resized."""
    if s.argument("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise s.refuse("it crops a free dim; export the model with a fixed input size")
    if s.argument("keep_aspect_ratio_policy") in _POLICIES:
        raise s.refuse("it keeps the aspect ratio of a free dim; export the model with a fixed input size")
    size = op.dim(s.x, axis)
    zeros = op.Expand(op.constant(np.array(0, np.float32)), op.Concat(size, size, axis=0))
    identity = op.cast_like(op.Unsqueeze(op.EyeLike(zeros), axes=[0, 1]), s.x)
    arguments = {name: attribute.value for name, attribute in s.node.attributes.items() if name in _KEPT}
    arguments |= {"roi": s.tensor("roi"), "scales": s.tensor("scales")}  # empty, but asked for by opsets 11 and 12
    scale = _scale(s, position)
    if scale is not None:
        arguments["scales"] = np.array([1, 1, 1, scale], np.float32)
    elif _scales_run(s):
        same = op.constant(np.ones(3, np.float32))
        arguments["scales"] = op.Concat(same, op.Gather(s.tensor("scales"), [position], axis=0), axis=0)
    else:
        arguments["sizes"] = op.Concat(op.int64([1, 1]), size, op.dim(s.y, axis), axis=0)
    made = getattr(op, s.node.op_type)(
        identity, **{name: value for name, value in arguments.items() if value is not None}
    )
    return op.Transpose(op.Squeeze(made, axes=[0, 1]), perm=[1, 0])


def _refuse_disagreement(s: Step, axes: Sequence[int]) -> None:
    """Refuses where ONNX Runtime computes something else than the standard says."""
    sizes, outs = dims_of(s.x) or (), dims_of(s.y) or ()
    scales = [_scale(s, position) for position in range(len(axes))]
    if sizes == outs and set(scales) - {None, 1.0}:
        raise s.refuse("its scales round to the size of its input, which ONNX Runtime then copies, and others resize")
    for position, (axis, scale) in enumerate(zip(axes, scales, strict=True)):
        size, region = sizes[axis], _region(s, position, len(axes))
        if region in (None, (0.0, 1.0)):
            continue
        if size == outs[axis]:
            raise s.refuse(
                "it crops an axis to the size that it has, which ONNX Runtime then copies, and others resize"
            )
        if scale is not None and isinstance(size, int) and not (scale * size).is_integer():
            raise s.refuse("it crops by scales that give no whole number of entries, which ONNX Runtime rounds first")


def _scale(s: Step, position: int) -> float | None:
    """By how much the node stretches an axis, where it says so, which is not always what the rounded sizes say."""
    if _scales_run(s):
        return None
    scales = s.argument("scales")
    return float(scales[position]) if scales is not None and len(scales) else None


def _scales_run(s: Step) -> bool:
    """Whether the scales are computed while the model runs."""
    scales = s.tensor("scales")
    return scales is not None and constant_value(scales) is None


def _left_to_the_runtime(s: Step, scale: float | None) -> bool:
    """Opset 10 does not say which entry is the nearest: ONNX Runtime takes the one above where an axis gets smaller."""
    return s.since == 10 and s.argument("mode") == "nearest" and scale is not None and scale < 1


def _region(s: Step, position: int, axes: int) -> tuple[float, float] | None:
    """What tf_crop_and_resize cuts out of an axis, as shares of its length."""
    if s.argument("coordinate_transformation_mode") != "tf_crop_and_resize":
        return None
    roi = np.asarray(s.argument("roi"), np.float64)
    if roi.shape != (2 * axes,):
        raise s.refuse("its roi has not a start and an end for each axis")
    return float(roi[position]), float(roi[axes + position])


def _limit(s: Step, arrays: dict[str, np.ndarray[Any, Any]], axes: Sequence[int], position: int) -> int:
    """Where the aspect ratio is kept, one axis sets the scale of all: it comes along as a third axis, of this size."""
    policy, dims = str(s.argument("keep_aspect_ratio_policy")), dims_of(s.x) or ()
    wanted = s.ints("sizes") if policy in _POLICIES else None
    if wanted is None:
        return 0
    sizes = [dim for dim in (dims[axis] for axis in axes) if isinstance(dim, int)]
    if len(sizes) != len(axes):
        raise s.refuse("it keeps the aspect ratio of a free dim; export the model with a fixed input size")
    first = _POLICIES[policy](range(len(axes)), key=lambda i: wanted[i] / sizes[i])
    arrays["sizes"] = np.array([wanted[position], wanted[first]])
    return sizes[first]


def _matrix(s: Step, size: int, arrays: Mapping[str, np.ndarray[Any, Any]], third: int) -> np.ndarray[Any, Any]:
    """What the node makes of the rows of the identity, a few at a time: the evaluator takes several times as much.

    Returns:
        Of shape [size, out], or another where the evaluator fails.
    """
    parts = []
    for row in range(0, size, _ROWS):
        x = np.eye(min(_ROWS, size - row), size, row)
        given = {**arrays, "x": np.repeat(x[:, :, None], third, axis=2) if third else x}
        if "sizes" in arrays and not third:
            given["sizes"] = np.array([len(x), arrays["sizes"][1]])
        part = _resized(s, given)
        if part is None:
            break
        parts.append(part)
    return np.concatenate(parts) if parts else np.zeros(0)


def _resized(s: Step, arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any] | None:
    """What the node makes of the second axis of x; with a third one both are resized, and the third is constant."""
    attributes = [attribute for attribute in ir.to_proto(s.node).attribute if attribute.name in _KEPT]
    if s.node.op_type == "Upsample" or s.since == 10:
        # Their coordinates are asymmetric, and nearest takes the entry below.
        fields = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        attributes += [onnx.helper.make_attribute(name, value) for name, value in fields.items()]
    for attribute in attributes:
        if attribute.name == "mode" and attribute.s == b"bilinear":
            attribute.s = b"linear"
        if attribute.s == b"pytorch_half_pixel" and arrays.get("sizes", [2, 2])[1] == 1:
            attribute.s = b"align_corners"  # a single entry is read at 0, for which the evaluator takes -0.5
    names = [name if name in arrays else "" for name in ("x", "roi", "scales", "sizes")]
    resize = onnx.helper.make_node("Resize", names, ["y"])
    resize.attribute.extend(attributes)
    third = arrays["x"].ndim == 3
    if third:
        policy = str(s.argument("keep_aspect_ratio_policy"))
        resize.attribute.extend(
            onnx.helper.make_attribute(*given) for given in (("axes", [1, 2]), ("keep_aspect_ratio_policy", policy))
        )
    results = evaluate(resize, 18, arrays)
    return None if not results else results[0][:, :, 0] if third else results[0]


VJPS = {
    "Resize": inputs(resize_x),
    "Upsample": inputs(resize_x),
}
