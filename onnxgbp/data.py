"""A data set as batches of the model's inputs: a folder of photos, one photo, or arrays in .npy or .npz."""

from __future__ import annotations

import dataclasses
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.emit import dims_of, shape_text
from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing, in_type, photos_in, read

__all__ = ["Batch", "batches", "checked_arrays", "inputs_of", "whole"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Batch:
    """names: of the samples, a file or an index each; feeds: the arrays by input name.

    Where the model fixes its batch, the last one is filled up with copies: only the first len(names) samples count.
    """

    names: tuple[str, ...]
    feeds: dict[str, Array]

    @property
    def filled(self) -> int:
        """How many copies of the last sample stand at the end."""
        return len(next(iter(self.feeds.values()))) - len(self.names)


def inputs_of(graph: ir.Graph) -> list[InputSpec]:
    """What a model has to be fed; weights that are graph inputs too are not."""
    return [
        InputSpec(value.name or "", np.dtype(value.dtype.numpy()), dims_of(value) or ())
        for value in graph.inputs
        if not value.is_initializer() and value.dtype is not None
    ]


def batches(
    path: str | Path,
    inputs: Sequence[InputSpec],
    metadata: Mapping[str, str],
    *,
    batch: int = 8,
    limit: int | None = None,
    on_error: Callable[[str], Any] | None = None,
    **preprocessing: Any,
) -> Iterator[Batch]:
    """Reads a data set batch by batch; memory does not grow with its length.

    Args:
        path: a folder of photos or one photo, for a model of one image input; a .npy with the samples along axis 0, for
            a model of one input; or a .npz with an array for each input.
        inputs: what the model takes; where it fixes the batch, `batch` follows.
        metadata: the model's, which says how a photo is prepared.
        batch: samples in one. Photos of different sizes never share one.
        limit: read no more samples than this.
        on_error: is told of a photo that cannot be read, which is then left out; without it the error is raised.
        **preprocessing: overrides, as for `Preprocessing.of`.

    Raises:
        OnnxgbpError: nothing there, or nothing that fits the model.
    """
    path = Path(path)
    fixed = inputs[0].shape[0] if inputs and inputs[0].shape else None
    size = fixed if isinstance(fixed, int) else batch
    samples = _arrays(path, inputs) if path.suffix.lower() in (".npy", ".npz") else None
    if samples is None:
        if len(inputs) != 1:
            raise OnnxgbpError(f"the model takes {len(inputs)} inputs: give them as arrays in a .npz file")
        samples = _photos(path, inputs[0], Preprocessing.of(metadata, inputs[0], **preprocessing), on_error)
    found = False
    for group in _grouped(samples, size, limit):
        found = True
        names = tuple(name for name, _ in group)
        filled = [sample for _, sample in group]
        filled += [filled[-1]] * (size - len(filled) if isinstance(fixed, int) else 0)
        yield Batch(names, {name: np.stack([sample[name] for sample in filled]) for name in filled[0]})
    if not found:
        raise OnnxgbpError(f"no sample could be read from {path}")


def whole(
    path: str | Path, inputs: Sequence[InputSpec], metadata: Mapping[str, str], name: str, **options: Any
) -> npt.NDArray[Any]:
    """What a data set holds for the input of that name, in one array [M, ...]; other arguments as for `batches`.

    Raises:
        OnnxgbpError: as there, or for samples of different shapes.
    """
    parts = [batch.feeds[name][: len(batch.names)] for batch in batches(path, inputs, metadata, **options)]
    if len({part.shape[1:] for part in parts}) > 1:
        raise OnnxgbpError(f"the samples of {path} differ in shape: give --size and --crop, or samples of one shape")
    return np.concatenate(parts)


_Sample = tuple[str, dict[str, Array]]


def _grouped(samples: Iterator[_Sample], size: int, limit: int | None) -> Iterator[list[_Sample]]:
    group: list[_Sample] = []
    for count, sample in enumerate(samples):
        if limit is not None and count >= limit:
            break
        shapes = [array.shape for array in sample[1].values()]
        if group and (len(group) == size or [array.shape for array in group[0][1].values()] != shapes):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _photos(
    path: Path, spec: InputSpec, prepared: Preprocessing, on_error: Callable[[str], Any] | None
) -> Iterator[_Sample]:
    for photo in photos_in(path) if path.is_dir() else [path]:
        array = _photo(photo, prepared, on_error)
        if array is not None:
            yield str(photo), {spec.name: in_type(array, spec.dtype)}


def _photo(photo: Path, prepared: Preprocessing, on_error: Callable[[str], Any] | None) -> Array | None:
    try:
        return prepared.prepare(read(photo))
    except OnnxgbpError as error:
        if on_error is None:
            raise
        said = str(error)
        on_error(said if str(photo) in said else f"{photo}: {said}")
        return None


def _arrays(path: Path, inputs: Sequence[InputSpec]) -> Iterator[_Sample]:
    arrays, count = checked_arrays(path, inputs)
    for i in range(count):
        yield str(i), {spec.name: np.asarray(arrays[spec.name][i], spec.dtype) for spec in inputs}


def checked_arrays(path: Path, inputs: Sequence[InputSpec], *, mapped: bool = False) -> tuple[dict[str, Array], int]:
    """The arrays of a .npy or .npz by input name, and how many samples they hold; checked to fit the model.

    A .npy stays on the disk; so does a .npz if `mapped`, which then must not be compressed.

    Raises:
        OnnxgbpError: not there, no such file, or nothing that fits the model.
    """
    try:
        if path.suffix.lower() == ".npy":
            if len(inputs) != 1:
                raise OnnxgbpError(f"the model takes {len(inputs)} inputs: give them as arrays in a .npz file")
            arrays = {inputs[0].name: np.load(path, mmap_mode="r", allow_pickle=False)}
        elif mapped:
            arrays = _mapped(path)
        else:
            with np.load(path, allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
    except OnnxgbpError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "no array of numbers in numpy's format"
        raise OnnxgbpError(f"cannot read {path}: {reason}") from None
    if missing := [spec.name for spec in inputs if spec.name not in arrays]:
        raise OnnxgbpError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; input '{missing[0]}' is missing")
    counts = {len(arrays[spec.name]) if arrays[spec.name].ndim else 0 for spec in inputs}
    if len(counts) != 1:
        raise OnnxgbpError(f"the arrays in {path} hold different numbers of samples: {sorted(counts)}")
    for spec in inputs:
        array = arrays[spec.name]
        dims = spec.shape[1:]
        fits = array.ndim == len(spec.shape) and all(
            not isinstance(dim, int) or dim == length for dim, length in zip(dims, array.shape[1:], strict=True)
        )
        if not fits or (array.dtype != spec.dtype and (array.dtype.kind != "f" or spec.dtype.kind != "f")):
            expected = f"{spec.dtype} {shape_text(('N', *dims))}"
            raise OnnxgbpError(f"{spec} is {expected}, but {path} holds {array.dtype} {list(array.shape)}")
    return arrays, counts.pop()


def _mapped(path: Path) -> dict[str, Array]:
    """The arrays of a .npz, read from the disk where they are used: `np.savez` stores each as it is in memory."""
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise OnnxgbpError(f"{path} is compressed and would have to be held in memory: save it with np.savez")
            # The lengths of the name and of the extra field end the local header, and with it lies the array.
            stream.seek(member.header_offset + 26)
            stream.seek(sum(struct.unpack("<HH", stream.read(4))), os.SEEK_CUR)
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(stream)
            if dtype.hasobject:
                raise ValueError("pickled")
            order: Literal["C", "F"] = "F" if fortran else "C"
            offset = stream.tell()
            arrays[member.filename.removesuffix(".npy")] = np.memmap(path, dtype, "r", offset, shape, order)
    return arrays
