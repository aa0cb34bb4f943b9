"""What a call is given, checked: arrays in the types and shapes of the model's inputs, and classes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.emit import shape_text
from onnxgbp.errors import OnnxgbpError
from onnxgbp.labels import find_label
from onnxgbp.session import fault
from onnxgbp.values import Value, from_device, is_held, shape_of

__all__ = ["InputSpec", "Target", "class_indices", "dtype_of", "feeds_of", "wrong_length", "zeros"]

Array: TypeAlias = npt.NDArray[Any]
Target: TypeAlias = "int | str | Sequence[int | str] | Sequence[Sequence[int | str]] | npt.NDArray[Any] | None"

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """An input of the model. shape: a size, or the name (or None) of a free dimension, per axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"input '{self.name}'"


def feeds_of(inputs: Sequence[InputSpec], x: Any) -> dict[str, Value]:
    """The arrays by input name, checked and cast; what lies on a device as an OrtValue, checked."""
    names = ", ".join(f"'{spec.name}'" for spec in inputs)
    if not isinstance(x, Mapping):
        if len(inputs) != 1:
            raise OnnxgbpError(f"the model has {len(inputs)} inputs: give a dict of arrays for {names}")
        x = {inputs[0].name: x}
    known = {spec.name for spec in inputs}
    if unknown := [str(name) for name in x if name not in known]:
        raise OnnxgbpError(f"the model has no input '{unknown[0]}': it takes {names}")
    if missing := [spec for spec in inputs if spec.name not in x]:
        raise OnnxgbpError(f"{missing[0]} is missing: the model takes {names}")
    feeds = {spec.name: _checked(spec, x[spec.name]) for spec in inputs}
    sizes: dict[str, tuple[int, InputSpec]] = {}
    for spec in inputs:
        for dim, size in zip(spec.shape, shape_of(feeds[spec.name]), strict=True):
            # A free dimension that two inputs share by name has one size; an anonymous one is its own.
            if isinstance(dim, str) and sizes.setdefault(dim, (size, spec))[0] != size:
                first = sizes[dim]
                raise OnnxgbpError(f"dimension '{dim}' is {first[0]} in {first[1]} but {size} in {spec}")
    return feeds


def zeros(inputs: Sequence[InputSpec], shape: Any) -> dict[str, Array]:
    """A batch to warm up with.

    Args:
        inputs: of the model.
        shape: that of the one input, or a dict of shapes by input name; True for one sample, where sizes are fixed.

    Raises:
        OnnxgbpError: a size behind the batch is free and not given, or what is given is no shape.
    """
    shapes: Any = {} if shape is True else shape if isinstance(shape, Mapping) else {inputs[0].name: shape}
    return {spec.name: np.zeros(_sizes(spec, shapes.get(spec.name)), spec.dtype) for spec in inputs}


def _sizes(spec: InputSpec, given: Any) -> list[int]:
    if given is not None:
        try:
            sizes = [operator.index(size) for size in given]
        except TypeError:
            sizes = []
        if min(sizes, default=0) < 1:
            raise OnnxgbpError(f"warm_up is {given!r}: give True, a shape such as (8, 3, 224, 224), or a dict of them")
        return sizes
    sizes = [dim if isinstance(dim, int) else 1 for dim in spec.shape[:1]]
    for dim in spec.shape[1:]:
        if not isinstance(dim, int):
            raise OnnxgbpError(f"warm_up: {spec} has a free size '{dim or '?'}': give a shape, warm_up=(1, ...)")
        sizes.append(dim)
    return sizes


def dtype_of(name: str, kind: str) -> np.dtype[Any]:
    if kind == "tensor(bfloat16)":
        raise OnnxgbpError(
            f"input '{name}' is bfloat16, which ONNX Runtime does not take from Python: convert the model and feed the "
            "file from another language, or put a Cast from float32 before it"
        )
    if kind not in _DTYPES:
        raise OnnxgbpError(f"input '{name}' is a {kind}, which numpy arrays cannot hold")
    return np.dtype(_DTYPES[kind])


def _read(spec: InputSpec, value: Any) -> Value:
    try:
        value = from_device(value)
        return value if is_held(value) else np.asarray(value)
    except OnnxgbpError:
        raise
    except Exception as error:  # noqa: BLE001 - anything may be handed in, and raise anything
        raise OnnxgbpError(f"{spec} cannot be read as an array: {fault(error)}") from None


def _checked(spec: InputSpec, value: Any) -> Value:
    """The value as an array of the input's type and shape, or as an OrtValue that has them."""
    array = _read(spec, value)
    if is_held(array):
        if _DTYPES.get(array.data_type()) != spec.dtype:
            raise OnnxgbpError(f"{spec} is {spec.dtype}, got an OrtValue of {array.data_type()}: cast it first")
    elif array.dtype != spec.dtype:
        array = _cast(spec, array, is_array=getattr(value, "dtype", None) is not None)
    shape = shape_of(array)
    expected = shape_text(spec.shape)
    fits = len(spec.shape) == len(shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        batch = " (is the batch axis missing?)" if len(shape) == len(spec.shape) - 1 else ""
        raise OnnxgbpError(f"{spec} has shape {expected}, got {list(shape)}{batch}")
    if 0 in shape:
        raise OnnxgbpError(f"{spec} is empty: its shape is {list(shape)}")
    return array


def _cast(spec: InputSpec, array: Array, *, is_array: bool) -> Array:
    wanted, got = spec.dtype, array.dtype
    floats = wanted.kind == "f" and got.kind == "f"
    from_list = (
        not is_array and got.kind in "iuf" and (wanted.kind == "f" or (wanted.kind in "iu" and got.kind in "iu"))
    )
    if not (floats or from_list or (wanted.kind in "iu" and np.can_cast(got, wanted)) or wanted.kind == "O"):
        hint = ""
        if wanted.kind == "f" and got.kind in "iub":
            hint = f"; scale it as the model was trained, then .astype(np.{wanted})"
        elif wanted.kind in "iu" and got.kind in "iuf":
            hint = f"; cast it with .astype(np.{wanted}) if that is meant"
        raise OnnxgbpError(f"{spec} is {wanted}, got {'an object' if got.kind == 'O' else got}{hint}")
    with np.errstate(over="ignore"):
        cast = array.astype(wanted)
    lost = (
        np.isfinite(array).all() and not np.isfinite(cast).all()
        if floats
        else (cast != array).any() and wanted.kind in "iu"
    )
    if lost:
        raise OnnxgbpError(f"{spec} is {wanted}, which cannot hold the values of the {got} array")
    return cast


def class_indices(target: Any, labels: Sequence[str]) -> npt.NDArray[np.integer[Any]]:
    """Indices of any shape, of indices and names."""
    try:
        given = np.asarray(target, dtype=object) if isinstance(target, (str, list, tuple)) else np.asarray(target)
    except (ValueError, TypeError):
        given = np.asarray(None)
    if given.dtype.kind in "OU":
        for place, one in np.ndenumerate(given := given.astype(object)):
            if isinstance(one, str):
                given[place] = find_label(one, labels)
        if all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) for one in given.flat):
            given = given.astype(np.int64)
    if given.dtype.kind not in "iu":
        raise OnnxgbpError(f"target {target!r} is neither a class (index or name) nor a list of them")
    return given


def wrong_length(given: Array, count: int | None) -> str:
    has = (
        f"{len(given)} {'class' if len(given) == 1 else 'classes'}" if given.ndim == 1 else f"shape {list(given.shape)}"
    )
    samples = "" if count is None else f", but there {'is 1 sample' if count == 1 else f'are {count} samples'}"
    return f"target has {has}{samples}: give one class, or one per sample"
