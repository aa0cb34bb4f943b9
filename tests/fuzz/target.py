"""What the fuzzer runs, in an environment of its own: load, inspect, convert with both profiles; see run.py.

    python tests/fuzz/target.py FINDINGS [libFuzzer's options] CORPUS

An input is a model's bytes. It may be converted, or refused by an OnnxgbpError of one printable line; nothing else may
lie in the model's folder then. What else is raised is written to FINDINGS, once for each place, and the run goes on. A
hang, too much memory and a crash of native code end the process: libFuzzer keeps their inputs.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path

import atheris
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mutations

with atheris.instrument_imports(include=["onnxgbp"]):
    import onnxgbp
    import onnxgbp.inspection

MEMORY = 4 << 30  # of address space, of which the interpreter and onnx take half a gigabyte

FINDINGS = Path(sys.argv[1])
FOLDER = Path(tempfile.mkdtemp(prefix="onnxgbp-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
MODEL = FOLDER / "model.onnx"
WEIGHTS = FOLDER / "weights.bin"
SEEN: set[str] = set()


class WrongError(Exception):
    """A refusal that is not as it should be."""


def attempt(data: bytes) -> None:
    MODEL.write_bytes(data)
    try:
        try:
            onnxgbp.load(MODEL)
            inspected = onnxgbp.inspection.inspect_model(MODEL)
            if not all(line.isprintable() for line in inspected.to_text().split("\n")):
                raise WrongError("a report with control characters")
            inspected.to_dict()
            for profile in ("ort", "portable"):
                made = onnxgbp.convert(MODEL, profile=profile)
                onnx.ModelProto.FromString(made.SerializeToString())
        except onnxgbp.OnnxgbpError as error:
            if not str(error).strip() or not str(error).isprintable():
                raise WrongError(f"no printable line: {error!r}") from None
            if error.__cause__ is not None:
                raise error.__cause__ from None  # a rule met what it did not expect: it might say what is wrong
        if left := {path.name for path in FOLDER.iterdir()} - {MODEL.name, WEIGHTS.name}:
            raise WrongError(f"left {left}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/onnxgbp/" in frame.filename]
        place = f"{Path(frames[-1].filename).stem}-{frames[-1].lineno}" if frames else "target"
        name = f"{type(error).__name__}-{place}"
        if name not in SEEN:
            SEEN.add(name)
            FINDINGS.mkdir(parents=True, exist_ok=True)
            (FINDINGS / f"{name}.onnx").write_bytes(data)
            (FINDINGS / f"{name}.txt").write_text(traceback.format_exc())
            sys.stderr.write(f"finding: {name}: {str(error)[:200]!r}\n")


def parsed(data: bytes) -> onnx.ModelProto | None:
    try:
        return onnx.ModelProto.FromString(data)
    except Exception:  # noqa: BLE001 - no model: its bytes are mutated as they are
        return None


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Mostly edits of the graph; now and then of the bytes, as libFuzzer makes them."""
    dice = random.Random(seed)
    model = parsed(data)
    if model is None or dice.random() < 0.05:
        return atheris.Mutate(data, max_size)
    for _ in range(dice.choice([1, 1, 2, 3, 5])):
        with contextlib.suppress(TypeError, UnicodeError):  # an edit of bytes made a name that is no text
            mutations.mutate(model, dice)
    return serialised(model, data, max_size)


def cross(data: bytes, other: bytes, max_size: int, seed: int) -> bytes:
    model, given = parsed(data), parsed(other)
    if model is None or given is None:
        return data
    with contextlib.suppress(TypeError, UnicodeError):
        mutations.cross(model, given, random.Random(seed))
    return serialised(model, data, max_size)


def serialised(model: onnx.ModelProto, data: bytes, max_size: int) -> bytes:
    try:
        made = model.SerializeToString()
    except Exception:  # noqa: BLE001 - nested more deeply than protobuf writes
        return data
    return made if len(made) <= min(max_size, mutations.LARGEST) else data


if __name__ == "__main__":
    WEIGHTS.write_bytes(bytes(range(256)) * 16)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    atheris.Setup([sys.argv[0], *sys.argv[2:]], attempt, custom_mutator=mutate, custom_crossover=cross)
    atheris.Fuzz()
