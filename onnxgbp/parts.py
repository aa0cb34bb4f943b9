"""One part of a batch's data set: a range of the samples read, explained, and written as one Parquet file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
from PIL import Image

from onnxgbp.errors import OnnxgbpError
from onnxgbp.explain import axes_of
from onnxgbp.explainer import Explainer
from onnxgbp.files import durable_file
from onnxgbp.images import Preprocessing, in_type, read
from onnxgbp.model import METADATA
from onnxgbp.render import signed_picture
from onnxgbp.samples import Sample, Samples

__all__ = ["FLOATS", "FORMS", "Counts", "Job"]

Array: TypeAlias = npt.NDArray[Any]
A = TypeVar("A")
B = TypeVar("B")

FLOATS = ("float16", "float32")
FORMS = (*FLOATS, "png", "none")
_RUN, _COUNTS = b"onnxgbp.run", b"onnxgbp.counts"  # in a part's own metadata
_ROW_GROUP = 32 * 2**20  # bytes from which on rows are written


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of rows: how many there are, how many have an error, how many maps are nothing but zeros."""

    rows: int = 0
    errors: int = 0
    blank: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rows + other.rows, self.errors + other.errors, self.blank + other.blank)


@dataclasses.dataclass(frozen=True)
class _Read:
    """A sample that was read: the arrays that the model takes, or why there are none."""

    sample: Sample
    checksum: str | None
    arrays: dict[str, Array] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class _Row:
    """What one sample gave: an error and nothing else, or all the rest. attribution: as it is written."""

    target: int | None = None
    scores: Array | None = None
    attribution: Any = None
    blank: bool = False
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """All that makes a part; it pickles, so that it can travel to a worker.

    prepared: how photos are prepared, and how a map is drawn; None for arrays.
    baseline: the samples that a method starts from. batch: samples in one run of the model.
    form: one of FORMS. shape: of one sample's map, for FLOATS.
    threads: that read and decode. run: what tells this data set from another, written into each part.
    """

    explainer: Explainer
    samples: Samples
    prepared: Preprocessing | None
    out: Path
    target: int | str | None
    baseline: Array | None
    batch: int
    form: str
    shape: tuple[int, ...] | None
    threads: int
    run: str

    def path(self, part: int) -> Path:
        """Where the part is."""
        return self.out / f"part-{part:06}.parquet"

    def done(self, part: int) -> Counts | None:
        """What an earlier run wrote of this part, None where it is not there whole."""
        try:
            said = pyarrow.parquet.read_metadata(self.path(part)).metadata or {}
            return Counts(*map(int, said[_COUNTS].split())) if said[_RUN] == self.run.encode() else None
        except (OSError, pyarrow.ArrowException, KeyError, ValueError):
            return None

    def write(self, part: int) -> Generator[Counts]:
        """Writes a part, and counts its rows as it goes: its file is there when this ends, and not before.

        What a part holds depends on nothing outside it, so whoever writes it, and when, writes the same.

        Raises:
            OnnxgbpError: the file cannot be written, or the data set not be read on.
        """
        total, held = Counts(), list[pyarrow.RecordBatch]()
        with (
            durable_file(self.path(part)) as aside,
            ThreadPoolExecutor(self.threads) as readers,
            ThreadPoolExecutor(self.threads) as writers,  # of their own: what is read ahead must not be in their way
            _bombs_are_errors(),
            aside.open("wb") as stream,
            # A dictionary of values that hardly repeat would only cost time, and so would a map's least and largest.
            pyarrow.parquet.ParquetWriter(
                stream,
                self._schema(),
                use_dictionary=["label", "error"],
                write_statistics=["index", "id", "target", "label", "checksum", "error"],
                write_page_checksum=True,
            ) as writer,
        ):
            samples = _ahead(readers, self._read, self.samples.part(part), 2 * self.batch)
            for group in _grouped(samples, self.batch):
                rows, counts = self._rows(group, writers)
                held.append(rows)
                if sum(batch.nbytes for batch in held) >= _ROW_GROUP:
                    writer.write_table(pyarrow.Table.from_batches(held))
                    held.clear()
                total += counts
                yield counts
            if held:
                writer.write_table(pyarrow.Table.from_batches(held))
            said = " ".join(str(count) for count in dataclasses.astuple(total))
            writer.add_key_value_metadata({_RUN: self.run, _COUNTS: said})

    def _read(self, sample: Sample) -> _Read:
        checksum = None
        try:
            if isinstance(sample.held, dict):
                arrays = self._cast(sample.held)
                checksum = _sha256(array.tobytes() for array in arrays.values())
                for name, array in arrays.items():
                    if array.dtype.kind == "f" and not np.isfinite(array).all():
                        raise OnnxgbpError(f"input '{name}' holds numbers that are not finite")
            else:
                assert self.prepared is not None
                data, spec = sample.data(), self.explainer.inputs[0]
                checksum = _sha256([data])
                arrays = {spec.name: in_type(self.prepared.prepare(read(Path(sample.id), data)), spec.dtype)}
        except OnnxgbpError as error:
            return _Read(sample, checksum, error=str(error))
        except MemoryError:
            return _Read(sample, checksum, error="there was not enough memory to read it")
        return _Read(sample, checksum, arrays)

    def _cast(self, held: Mapping[str, Array]) -> dict[str, Array]:
        with np.errstate(over="ignore"):  # found out by what looks for infinities
            return {spec.name: np.asarray(held[spec.name], spec.dtype) for spec in self.explainer.inputs}

    def _rows(self, group: Sequence[_Read], pool: ThreadPoolExecutor) -> tuple[pyarrow.RecordBatch, Counts]:
        explained = iter(self._explained([one.arrays for one in group if one.arrays is not None], pool))
        rows = [_Row(error=one.error) if one.arrays is None else next(explained) for one in group]
        labels = self.explainer.labels
        columns: dict[str, Any] = {
            "index": [one.sample.index for one in group],
            "id": [one.sample.id for one in group],
            "target": [row.target for row in rows],
            "label": [
                labels[row.target] if row.target is not None and row.target < len(labels) else None for row in rows
            ],
            "scores": [row.scores for row in rows],
            "attribution": self._column([row.attribution for row in rows]),
            "checksum": [one.checksum for one in group],
            "error": [row.error for row in rows],
        }
        schema = self._schema()
        counts = Counts(len(rows), sum(row.error is not None for row in rows), sum(row.blank for row in rows))
        return pyarrow.record_batch([columns[name] for name in schema.names], schema=schema), counts

    def _explained(self, samples: Sequence[dict[str, Array]], pool: ThreadPoolExecutor) -> list[_Row]:
        """One row for each; where a batch cannot be explained, each for itself, so that one takes no other along."""
        if not samples:
            return []
        fixed = self.explainer.inputs[0].shape[0]
        filled = [*samples, *[samples[-1]] * (fixed - len(samples) if isinstance(fixed, int) else 0)]
        try:
            x = {name: np.stack([one[name] for one in filled]) for name in samples[0]}
            result = self.explainer(x, self.target, baseline=self.baseline)
        except OnnxgbpError as error:
            if len(samples) == 1:
                return [_Row(error=str(error))]
            return [row for one in samples for row in self._explained([one], pool)]
        shapes = [samples[0][self.explainer.inputs[0].name].shape] * len(samples)
        return list(pool.map(self._row, result.scores, result.attribution, result.target, shapes))

    def _row(self, scores: Array, attribution: Array, target: int, x: tuple[int, ...]) -> _Row:
        try:
            if np.isnan(scores).any():  # an infinity may be the logarithm of a probability of zero
                raise OnnxgbpError("the model gives scores that are not numbers")
            if not np.isfinite(attribution).all():
                raise OnnxgbpError("the model gives an attribution with numbers that are not finite")
            blank = not attribution.any()
            unit = METADATA + "unit" in self.explainer.metadata
            values = np.ravel(scores).astype(np.float32)
            return _Row(None if unit else int(target), values, self._written(attribution, x), blank)
        except OnnxgbpError as error:
            return _Row(error=str(error))

    def _written(self, attribution: Array, x: tuple[int, ...]) -> Any:
        if self.form == "none":
            return None
        if self.form == "png":
            assert self.prepared is not None
            layout, channels = axes_of(self.explainer, self.prepared, x, attribution.shape)
            stream = io.BytesIO()
            signed_picture(attribution, layout=layout, channels=channels).image.save(stream, "PNG")
            return stream.getvalue()
        if attribution.shape != self.shape:
            raise OnnxgbpError(f"the attribution has the shape {list(attribution.shape)}, not {list(self.shape or ())}")
        return _narrowed(attribution, np.dtype(self.form))

    def _attribution_type(self) -> pyarrow.DataType:
        if self.form in FLOATS:
            return pyarrow.fixed_shape_tensor(pyarrow.from_numpy_dtype(np.dtype(self.form)), self.shape)
        return pyarrow.binary()

    def _schema(self) -> pyarrow.Schema:
        fields = [
            ("index", pyarrow.int64()),
            ("id", pyarrow.string()),
            ("target", pyarrow.int64()),
            ("label", pyarrow.string()),
            ("scores", pyarrow.list_(pyarrow.float32())),
            *([("attribution", self._attribution_type())] if self.form != "none" else []),
            ("checksum", pyarrow.string()),
            ("error", pyarrow.string()),
        ]
        return pyarrow.schema(fields)

    def _column(self, maps: Sequence[Any]) -> pyarrow.Array:
        """The maps as Arrow holds them, null where there is none."""
        kind = self._attribution_type()
        if self.form not in FLOATS:
            return pyarrow.array(maps, kind)
        none = np.zeros(self.shape or (), self.form)
        values = np.stack([none if one is None else one for one in maps]).reshape(-1)
        empty = pyarrow.array([one is None for one in maps])
        stored = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), none.size, mask=empty)
        return pyarrow.ExtensionArray.from_storage(kind, stored)


def _narrowed(attribution: Array, dtype: np.dtype[Any]) -> Array:
    """The map in the type that is written, if that can hold it.

    What lies below the smallest normal number loses digits, but is off by no more than the type's precision of a map's
    largest value as long as that one is normal; so it is the largest that has to fit.
    """
    if attribution.dtype.itemsize > dtype.itemsize:
        largest, limits = float(np.abs(attribution).max(initial=0)), np.finfo(dtype)
        if largest > float(limits.max) or 0 < largest < float(limits.smallest_normal):
            raise OnnxgbpError(
                f"{dtype} cannot hold a map whose largest value is {largest:.3g}: use a wider --attribution"
            )
    if attribution.dtype == np.float32 and dtype == np.float16:
        # The same values as astype's, which takes 15 times as long for those below the smallest normal number.
        narrow = pyarrow.array(attribution.ravel()).cast(pyarrow.float16(), safe=False)
        return np.asarray(narrow).reshape(attribution.shape)
    return attribution.astype(dtype)


def _grouped(samples: Iterable[_Read], size: int) -> Iterator[list[_Read]]:
    """Groups with as many samples as one run takes, all of one shape, and those between them that have an error."""
    group, shapes = list[_Read](), list[list[tuple[int, ...]]]()
    for one in samples:
        shape = None if one.arrays is None else [array.shape for array in one.arrays.values()]
        if shape is not None and shapes and (len(shapes) == size or shape != shapes[0]):
            yield group
            group, shapes = [], []
        group.append(one)
        shapes += [] if shape is None else [shape]
    if group:
        yield group


def _ahead(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """As map, in order; the pool works on the next `ahead` items while the caller is busy with what it got."""
    items, running = iter(items), deque[Future[B]]()
    for item in itertools.islice(items, ahead):
        running.append(pool.submit(work, item))
    while running:
        done = running.popleft().result()
        running.extend(pool.submit(work, item) for item in itertools.islice(items, 1))
        yield done


@contextlib.contextmanager
def _bombs_are_errors() -> Iterator[None]:
    """A picture of more pixels than Pillow finds safe is an error, where Pillow would read on up to twice as many."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
