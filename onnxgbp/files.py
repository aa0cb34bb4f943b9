"""Files that are written whole or not at all, and small ones that are read."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnxgbp.errors import OnnxgbpError

__all__ = ["MANIFEST", "durable_file", "listed_files", "output_file", "read_text", "result_folder", "write"]

MANIFEST = "manifest.json"


def write(path: Path, data: bytes) -> None:
    """Writes a file aside and moves it into place, so that no half of it is ever seen under its name."""
    with output_file(path) as aside:
        aside.write_bytes(data)


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A file to write aside; on success it is moved to `path`, on failure nothing is left.

    A link is followed, so that what it names is written and the link stays.
    """
    aside: Path | None = None
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
            raise OnnxgbpError(f"cannot write {path}: it is there already and no regular file")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        aside = Path(name)
        with os.fdopen(handle):
            umask = os.umask(0)
            os.umask(umask)
            aside.chmod(0o666 & ~umask)  # mkstemp's 0600 would surprise whoever deploys the file
        yield aside
        aside.replace(path)
    except OSError as error:
        raise OnnxgbpError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def result_folder(out: Path, last: str) -> None:
    """Makes the folder for the files of a run, without `last`: written last, it says that the folder is complete."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / last).unlink(missing_ok=True)
    except OSError as error:
        raise OnnxgbpError(f"cannot write {out}: {error.strerror or error}") from None
    with output_file(out / f"{last}.tmp"):  # found out before the work, not after it
        pass
    (out / f"{last}.tmp").unlink(missing_ok=True)


def listed_files(folder: Path) -> list[str]:
    """The files of a folder that a manifest of ours lists there; none where there is none, or it is not ours."""
    try:
        said = json.loads((folder / MANIFEST).read_bytes())
        entries = said["channels" if "layer" in said else "images"]  # `neurons` writes the one, `explain` the other
        names = [str(name) for entry in entries for name in entry.get("files", {}).values()]
        names += [str(name) for name in said.get("files", {}).values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    return [name for name in names if Path(name).name == name]


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[Path]:
    """As `output_file`, and on the disk when it returns: a power failure leaves all of the file or nothing."""
    with output_file(path) as aside:
        yield aside
        _sync(aside, os.O_RDWR)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        try:
            _sync(path.resolve().parent, os.O_RDONLY)
        except OSError as error:
            raise OnnxgbpError(f"cannot write {path}: {error.strerror or error}") from None


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(path: Path) -> str:
    """A small text file of a user's, in UTF-8 with or without its mark.

    Raises:
        OnnxgbpError: it cannot be read, or is no text.
    """
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OnnxgbpError(f"cannot read {path}: it is no text in UTF-8") from None
