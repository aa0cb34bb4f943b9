"""A data set of any length, cut into parts that are read one at a time: photos, rows of Parquet, or arrays.

What is held in memory is an offset per part, never an entry per sample. Everything here pickles, and is read anew where
it is used: a worker, perhaps on another machine that has the same files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxgbp.data import checked_arrays
from onnxgbp.errors import OnnxgbpError
from onnxgbp.given import InputSpec
from onnxgbp.images import is_photo

__all__ = ["Sample", "Samples", "samples_of"]

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample before it is read: index in the data set, a name, and where it is (a file, its bytes, or arrays)."""

    index: int
    id: str
    held: Path | bytes | dict[str, Array] | None

    def data(self) -> bytes:
        """The bytes of a photo.

        Raises:
            OnnxgbpError: there are none.
        """
        if isinstance(self.held, Path):
            try:
                if self.held.exists() and not self.held.is_file():  # a pipe would be waited for, for ever
                    raise OnnxgbpError(f"cannot read {self.id}: it is no regular file")
                return self.held.read_bytes()
            except OnnxgbpError:
                raise
            except (OSError, ValueError) as error:  # a path may hold a NUL
                raise OnnxgbpError(f"cannot read {self.id}: {_first_line(error)}") from None
        if not isinstance(self.held, bytes):
            raise OnnxgbpError(f"cannot read {self.id}: there is no image in this row")
        return self.held


class Samples(Protocol):
    """count: how many there are. part(i) reads samples i * size to (i + 1) * size, in order."""

    @property
    def count(self) -> int: ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from another: of files their names, sizes and times, not what is in them."""
        ...

    def part(self, index: int) -> Iterator[Sample]: ...


def samples_of(path: Path, inputs: Sequence[InputSpec], listing: Path, size: int, column: str | None = None) -> Samples:
    """The data set at a path: a folder of photos (with those in its folders), a .txt file with a path of a photo on
    each line, a .parquet file or a folder of them, or a .npy or .npz.

    Args:
        path: of the data set.
        inputs: what the model takes.
        listing: the file in which the paths of photos are written down, so that they need not be held.
        size: samples in a part.
        column: the images of a Parquet data set; None finds it.

    Raises:
        OnnxgbpError: nothing there, or nothing that fits the model.
    """
    kind = path.suffix.lower()
    if column is not None and kind != ".parquet" and not path.is_dir():
        raise OnnxgbpError(f"{path} is no Parquet data set: leave the column out")
    if kind in (".npy", ".npz"):
        return _Rows(path.absolute(), tuple(inputs), checked_arrays(path, inputs, mapped=True)[1], size)
    if len(inputs) != 1:
        raise OnnxgbpError(f"the model takes {len(inputs)} inputs: give them as arrays in a .npz file")
    tables = _tables(path)
    if tables:
        return _cells(path, tables, column, size)
    if path.is_dir():
        if column is not None:
            raise OnnxgbpError(f"there is no Parquet file in {path}: leave the column out")
        return _listed(path, _walk(path, ""), listing, size)
    if kind != ".txt":
        raise OnnxgbpError(
            f"{path} is no data set: give a folder of photos, a .txt file of paths, a .parquet, a .npy or a .npz"
        )
    return _listed(path.parent, _lines(path), listing, size)


@dataclasses.dataclass(frozen=True)
class _Files:
    """Photos in files, by their paths from `root`."""

    root: Path
    listing: Path
    offsets: tuple[int, ...]  # of each part's first line
    count: int
    size: int
    sha256: str

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "photos", "count": self.count, "sha256": self.sha256}

    def part(self, index: int) -> Iterator[Sample]:
        try:
            with self.listing.open("rb") as stream:
                stream.seek(self.offsets[index])
                for i in range(index * self.size, min((index + 1) * self.size, self.count)):
                    path = json.loads(stream.readline())[0]
                    # A name that is not UTF-8 is no text for Parquet: its odd bytes are written out.
                    named = os.fsencode(path).decode("utf-8", "backslashreplace")
                    yield Sample(i, named, self.root / path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it was changed"
            raise OnnxgbpError(f"cannot read {self.listing}: {reason}") from None


def _listed(root: Path, paths: Iterator[str], listing: Path, size: int) -> Samples:
    """Writes the listing: a line of JSON for each photo, with its path, its size and its time."""
    offsets, count, digest, place = list[int](), 0, hashlib.sha256(), 0
    try:
        with listing.open("wb") as stream:
            for path in paths:
                if count % size == 0:
                    offsets.append(place)
                line = json.dumps([path, *_stamp(root / path)]).encode() + b"\n"
                stream.write(line)
                digest.update(line)
                place += len(line)
                count += 1
    except OSError as error:
        raise OnnxgbpError(f"cannot write {listing}: {error.strerror or error}") from None
    if not count:
        raise OnnxgbpError(f"no image in {root}")
    return _Files(root.absolute(), listing, tuple(offsets), count, size, digest.hexdigest())


def _walk(root: Path, below: str) -> Iterator[str]:
    """The photos of a folder and of those in it, sorted by name within each; links to folders are not followed."""
    try:
        with os.scandir(root / below) as entries:
            found = sorted((e.name, e.is_dir(follow_symlinks=False), e.is_file()) for e in entries)
    except OSError as error:
        raise OnnxgbpError(f"cannot read {root / below}: {error.strerror}") from None
    for name, is_folder, is_file in found:
        path = f"{below}/{name}" if below else name
        if is_folder:
            yield from _walk(root, path)
        elif is_file and is_photo(name):
            yield path


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as stream:
            for line in stream:
                if line.strip():
                    yield line.rstrip("\r\n")
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror}") from None


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file; zeros where there is none, which becomes an error of that sample alone."""
    try:
        said = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return (said.st_size, said.st_mtime_ns) if stat.S_ISREG(said.st_mode) else (0, 0)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Photos in a column of Parquet files: bytes, or a struct of bytes and path as in Hugging Face's data sets."""

    files: tuple[tuple[Path, int], ...]  # with the number of rows
    column: str
    size: int

    @property
    def count(self) -> int:
        return sum(rows for _, rows in self.files)

    def fingerprint(self) -> dict[str, Any]:
        said = [[path.name, rows, *_stamp(path)] for path, rows in self.files]
        digest = hashlib.sha256(json.dumps([self.column, said]).encode()).hexdigest()
        return {"kind": "parquet", "count": self.count, "sha256": digest}

    def part(self, index: int) -> Iterator[Sample]:
        start, stop, first = index * self.size, min((index + 1) * self.size, self.count), 0
        for path, rows in self.files:
            if first < stop and start < first + rows:
                low = max(start - first, 0)
                for i, cell in enumerate(self._rows(path, low, min(stop - first, rows)), first + low):
                    yield _cell(i, cell, path.parent)
            first += rows

    def _rows(self, path: Path, start: int, stop: int) -> Iterator[Any]:
        """The cells of rows start to stop: only the row groups that hold them are read, a few rows at a time."""
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table:
                ends = np.cumsum([table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)])
                groups = [
                    int(i)
                    for i in range(np.searchsorted(ends, start, "right"), len(ends))
                    if (ends[i - 1] if i else 0) < stop
                ]
                row = int(ends[groups[0] - 1]) if groups[0] else 0
                for batch in table.iter_batches(_ROWS, row_groups=groups, columns=[self.column]):
                    for cell in batch.column(0)[max(start - row, 0) : max(stop - row, 0)]:
                        yield cell.as_py()
                    row += len(batch)
        except (OSError, pyarrow.ArrowException) as error:
            raise OnnxgbpError(f"cannot read {path}: {_first_line(error)}") from None


_ROWS = 16  # of Parquet, read at once


def _cell(index: int, cell: Any, folder: Path) -> Sample:
    name, held = str(index), cell
    if isinstance(cell, dict):
        path, held = cell.get("path"), cell.get("bytes")
        name = path or name
        held = folder / path if held is None and path else held
    return Sample(index, name, held)


def _tables(path: Path) -> list[Path]:
    """The Parquet files at a path, sorted by name; none where it is something else."""
    try:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror}") from None
    return [file for file in inside if file.suffix.lower() == ".parquet" and file.name[0] not in "._"]


def _cells(path: Path, tables: Sequence[Path], column: str | None, size: int) -> Samples:
    import pyarrow.parquet

    rows, found = list[tuple[Path, int]](), set[str]()
    try:
        for table in tables:
            with pyarrow.parquet.ParquetFile(table) as opened:
                rows.append((table.absolute(), opened.metadata.num_rows))
                found.add(_image_column(table, opened.schema_arrow, column))
    except (OSError, pyarrow.ArrowException) as error:
        raise OnnxgbpError(f"cannot read {table}: {_first_line(error)}") from None
    if len(found) != 1:
        raise OnnxgbpError(f"the files of {path} have their images in different columns: name one with --column")
    cells = _Cells(tuple(rows), found.pop(), size)
    if not cells.count:
        raise OnnxgbpError(f"no row in {path}")
    return cells


def _image_column(path: Path, schema: Any, column: str | None) -> str:
    """The column asked for, or `image`, or the only one that holds bytes."""
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return "bytes" in kind.names and holds_bytes(kind.field("bytes").type)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    fit = [field.name for field in schema if holds_bytes(field.type)]
    wanted = column or ("image" if "image" in fit else fit[0] if len(fit) == 1 else None)
    if wanted in fit:
        return str(wanted)
    which = f"column '{column}' of {path} holds no bytes" if column else f"{path} has no one column of images"
    raise OnnxgbpError(
        f"{which}: name with --column one of bytes, or a struct with bytes; there is {', '.join(fit) or 'none'}"
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Arrays, the samples along axis 0."""

    path: Path
    inputs: tuple[InputSpec, ...]
    count: int
    size: int

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([self.path.suffix, *_stamp(self.path)]).encode()).hexdigest()
        return {"kind": "arrays", "count": self.count, "sha256": digest}

    @functools.cached_property
    def arrays(self) -> dict[str, Array]:
        return checked_arrays(self.path, self.inputs, mapped=True)[0]

    def part(self, index: int) -> Iterator[Sample]:
        for i in range(index * self.size, min((index + 1) * self.size, self.count)):
            yield Sample(i, str(i), {spec.name: self.arrays[spec.name][i] for spec in self.inputs})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}  # each worker maps its own


def _first_line(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
