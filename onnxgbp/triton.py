"""A converted file as an entry of a Triton model repository: config.pbtxt, 1/model.onnx, the names of the classes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir

from onnxgbp import external
from onnxgbp.converted import scores_output
from onnxgbp.emit import dims_of
from onnxgbp.errors import OnnxgbpError
from onnxgbp.labels import labels_of
from onnxgbp.model import METADATA, load
from onnxgbp.results import result_names
from onnxgbp.untrusted import require_record

__all__ = ["export_triton"]

_MAX_BATCH = 8
_LABELS = "labels.txt"
_TYPES = {
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.UINT16: "TYPE_UINT16",
    ir.DataType.UINT32: "TYPE_UINT32",
    ir.DataType.UINT64: "TYPE_UINT64",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT16: "TYPE_INT16",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.BFLOAT16: "TYPE_BF16",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.DOUBLE: "TYPE_FP64",
    ir.DataType.STRING: "TYPE_STRING",
}


class _Tensor(NamedTuple):
    """An input or output; dims: a size, a symbol, or None where neither is said."""

    name: str
    kind: str
    dims: tuple[int | str | None, ...]


def export_triton(
    model: str | Path, repository: str | Path, *, name: str | None = None, max_batch: int | None = None
) -> str:
    """Writes REPOSITORY/NAME/config.pbtxt and REPOSITORY/NAME/1/model.onnx, with its external data if it has any, and
    labels.txt for the scores where the model's metadata names the classes. All of it or nothing.

    Where axis 0 of every input and output is free, it is the batch: the server may put requests together, as many as
    `max_batch`. Else max_batch_size is 0 and requests carry the whole shapes.

    Args:
        model: a file that `convert` wrote.
        repository: the folder of models, made where it is missing.
        name: of the model; None for the file's, without .onnx.
        max_batch: samples at once; None for 8, or 0 where the model does not allow it; 0 for no batches.

    Returns:
        One line on what was written.

    Raises:
        OnnxgbpError: no converted file, an input that Triton cannot be told of, `max_batch` where the batch is not
            free, an entry of that name is there already, or it cannot be written.
    """
    path, repository = Path(model), Path(repository)
    name = path.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise OnnxgbpError(f"'{name}' is no name for a model: letters, digits, '_', '.' and '-' are (see --name)")
    if max_batch is not None and max_batch < 0:
        raise OnnxgbpError(
            f"a batch of at most {max_batch} samples makes no sense: give 1 or more, or 0 for no batches"
        )
    inputs, outputs, left_out = _ends(path)
    fixed = next(_not_batched([*inputs, *outputs]), None)
    if max_batch and fixed:
        raise OnnxgbpError(f"{path} cannot be batched by a server: {fixed}; leave --max-batch out")
    size = _MAX_BATCH if max_batch is None else max_batch
    size = 0 if fixed else size
    proto = onnx.load(path, load_external_data=False)
    scores, labels = _labelled(proto)
    config = _config(name, size, inputs, outputs, scores)
    entry = repository / name
    if entry.exists():
        raise OnnxgbpError(f"cannot write {entry}: it is there already; remove it, or choose another --name")
    staging = repository / f".{name}.{os.getpid()}"
    try:
        (staging / "1").mkdir(parents=True)
        shutil.copyfile(path, staging / "1" / "model.onnx")
        external.copy_beside(proto, staging / "1" / "model.onnx", path.resolve().parent)
        if scores is not None:
            (staging / _LABELS).write_text("".join(f"{' '.join(label.split())}\n" for label in labels), "utf-8")
        (staging / "config.pbtxt").write_text(config, "utf-8")
        staging.rename(entry)
    except OSError as error:
        raise OnnxgbpError(f"cannot write {entry}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    said = [f"max_batch_size {size}" + (f" ({fixed})" if fixed else "")]
    said += [f"class names of '{scores}' in {_LABELS}"] if scores is not None else []
    said += [f"output '{one}' is no tensor and is left out" for one in left_out]
    return f"{entry}: {'; '.join(said)}"


def _ends(path: Path) -> tuple[list[_Tensor], list[_Tensor], list[str]]:
    """The inputs, the outputs, and the names of outputs that are no tensors (a list of maps, say)."""
    source = load(path)
    if METADATA + "method" not in source.model.metadata_props:
        raise OnnxgbpError(f"{path} is no converted file: make one with onnxgbp convert {path} -o OUT.onnx")
    require_record(source.model.metadata_props, str(path))
    ends: tuple[list[_Tensor], list[_Tensor]] = ([], [])
    weights = set(source.model.graph.initializers)
    for found, values in zip(ends, (source.model.graph.inputs, source.model.graph.outputs), strict=True):
        for value in values:
            if value.name in source.odd_outputs or value.name in weights:
                continue
            kind = _TYPES.get(value.dtype) if value.dtype is not None else None
            dims = dims_of(value)
            if kind is None or dims is None:
                what = f"is of type {value.dtype}" if kind is None else "has no known shape"
                raise OnnxgbpError(f"{path}: '{value.name}' {what}, which Triton cannot be told of")
            found.append(_Tensor(value.name or "", kind, tuple(dims)))
    return *ends, list(source.odd_outputs)


def _not_batched(tensors: Sequence[_Tensor]) -> Iterator[str]:
    """Why a server may not put requests together along axis 0."""
    for tensor in tensors:
        if not tensor.dims:
            yield f"'{tensor.name}' is one number for all samples"
        elif isinstance(tensor.dims[0], int):
            yield f"axis 0 of '{tensor.name}' is fixed at {tensor.dims[0]}"
    first = {tensor.dims[0]: tensor.name for tensor in tensors if tensor.dims}
    for tensor in tensors:
        for axis, dim in enumerate(tensor.dims[1:], 1):
            if isinstance(dim, str) and dim in first:
                yield f"'{dim}' is axis 0 of '{first[dim]}', but axis {axis} of '{tensor.name}'"


def _labelled(proto: onnx.ModelProto) -> tuple[str | None, list[str]]:
    """The output that holds the scores, and the names of its classes; None where there are no names."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    methods, wrt = metadata[METADATA + "method"].split(","), json.loads(metadata[METADATA + "wrt"])
    ours = {*result_names(methods, wrt), "attribution_target"}
    theirs = [output.name for output in proto.graph.output if output.name not in ours]
    labels = labels_of(metadata)
    return scores_output(proto, metadata[METADATA + "explained"], theirs) if labels else None, labels


def _config(
    name: str, max_batch: int, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor], labelled: str | None
) -> str:
    """The text form of Triton's ModelConfig."""
    lines = [f"name: {_quoted(name)}", 'backend: "onnxruntime"', f"max_batch_size: {max_batch}"]
    if max_batch > 1:
        lines.append("dynamic_batching { }")
    for what, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            dims = [dim if isinstance(dim, int) else -1 for dim in tensor.dims[1 if max_batch else 0 :]]
            lines += [f"{what} {{", f"  name: {_quoted(tensor.name)}", f"  data_type: {tensor.kind}"]
            # Dims may not be empty: what has none of its own is one number a sample, reshaped on its way.
            lines.append(f"  dims: [ {', '.join(map(str, dims or [1]))} ]")
            lines += [] if dims else ["  reshape { shape: [ ] }"]
            lines += [f"  label_filename: {_quoted(_LABELS)}"] if what == "output" and tensor.name == labelled else []
            lines.append("}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string as protobuf's text form has it: UTF-8 as it is, the rest escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\{ord(match.group()):03o}", escaped) + '"'
