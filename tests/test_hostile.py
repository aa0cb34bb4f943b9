"""Models are untrusted input: whatever a file holds, a command does what it says or refuses it in one line.

Every command runs in a process with 4 GiB of address space; it may take at most MEGABYTES of memory more than the
process held before, and SECONDS on a busy machine (most take a tenth of one). Nothing
is written where a command refuses, nothing outside of the folder that was named, and nothing outside of the model's
folder is opened.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import hostile
import numpy as np
import onnx
import pytest
from hostile import FILES, FORGED, Outcome, Worker
from onnx import TensorProto
from PIL import Image

import onnxgbp
from onnxgbp.errors import printable

MEMORY = 4 << 30  # bytes of address space; the interpreter, onnx and onnxruntime take one GiB of it
MEGABYTES = 400  # resident: a few times the tables that a gradient needs (`emit.LARGEST_TABLE`, 128 MB)
SECONDS = 60.0

# What is only odd is converted: nothing that such a file asks for is done before it runs.
FINE = {
    *(
        "nodes of one name",
        "output twice",
        "input with negative dims",
        "500 folded constants",
        "If in If 3 times",
        "Loop without end",
    ),
    *("Loop of 2^62", "Scan over 2^40", "1,100 nodes in a row", "1,100 Identity nodes", "NaN and inf", "Clip from NaN"),
    *("ConstantOfShape 2^40", "ConstantOfShape 2^64", "Expand 2^40", "Expand 2^64", "Tile 2^40", "Range 2^40"),
    *(
        "Range by 0",
        "Range by NaN",
        "Pad 2^40",
        "Reshape 2^40",
        "OneHot 2^40",
        "Gather 2^40",
        "Slice 2^63",
        "Slice of dim -1",
        "Resize by 1e30",
        "Slice of what a kernel left of nothing",
    ),
    *("Conv of 2^20", "Conv with pads 2^40", "Conv with strides 2^62", "Conv with dilations 2^40", "MaxPool of 2^20"),
    *(
        "LpPool to the 2^40",
        "AveragePool of more than there is",
        "Flatten at -2^63",
        "Softmax at 2^62",
        "Unsqueeze at 100 axes",
        "Trilu at 2^62",
    ),
    *(
        "Slice 2^63",
        "Slice of dim -1",
        "Resize by 1e30",
        "Slice of what a kernel left of nothing",
        "CumSum at 2^62",
        "DFT of 2^17",
        "LSTM of 2^40",
        "Einsum of 2,000 letters",
        "GroupNormalization of 0",
    ),
}
# The sentence that says what is wrong, where a reader could not do without it.
SAID = {
    "IR version 2^40": "has IR version 1099511627776",
    "two opsets": "names two opsets of domain 'ai.onnx': 17 and 3",
    "initializer twice": "initializer 'w' stands there twice",
    "type 999": "tensor 'w' has the unknown type 999",
    "10,000 dims": "has 10000 axes, more than 64",
    "2^64 elements without data": "has the dims [4294967296, 4294967296], which no memory holds",
    "attribute that refers to nothing": "of a function, and it is in none",
    "functions that double 40 times": "has about 1.09951e+12 nodes, more than the 100000 that can be converted",
    "function that calls itself": "more than 100 deep, or in a circle",
    "If in If 10 times": "control flow in control flow, more than 8 deep",
    "100,001 nodes": "has 100001 nodes, more than the 100000 that can be converted",
    "name that is no UTF-8": "it holds a name that is no UTF-8",
    "AveragePool of 2^20": "takes a table of 1 x 1 x 1048576 x 1048576 numbers, more than 16777216",
    "Conv with group 0": "its 4 outputs cannot be split into 0 groups",
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    running = Worker(MEMORY)
    yield running
    running.stop()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for the model, beside one with what is none of its business."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "weights.bin").write_bytes(bytes(64))
    (tmp_path / "model").mkdir()
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (10, 9), "red").save(tmp_path / "photos" / "red.png")
    return tmp_path


def commands(place: Path) -> dict[str, list[str]]:
    model, out = str(place / "model" / "net.onnx"), str(place / "out.onnx")
    photo = str(place / "photos" / "red.png")
    return {
        "convert": ["convert", model, "-o", out],
        "portable": ["convert", model, "-o", out, "--profile", "portable"],
        "inspect": ["inspect", model],
        "json": ["inspect", model, "--json"],
        "verify": ["verify", model],
        "explain": ["explain", model, photo, "-o", str(place / "pictures")],
    }


def tried(worker: Worker, place: Path, command: str) -> Outcome:
    """The outcome, once it is known to be one of the two that there may be."""
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    outcome = worker.run(commands(place)[command], SECONDS)
    assert not outcome.raised, outcome.raised
    assert outcome.status in (0, 1), outcome
    lines = outcome.stderr.splitlines()
    assert outcome.stderr == "".join(f"{line}\n" for line in lines)
    assert all(line.isprintable() for line in (*lines, *outcome.stdout.split("\n"))), (outcome.stdout, lines)
    assert outcome.megabytes <= MEGABYTES, outcome
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    new = {path.relative_to(place).parts[0] for path in after.keys() - before.keys()}
    assert before.items() <= after.items()
    if outcome.status == 0:
        assert lines == []
        assert new <= {"out.onnx", "pictures"}
    elif command == "verify" and outcome.stdout:  # a report of checks, of which one has failed
        assert lines == []
        assert "FAIL" in outcome.stdout
    elif command == "explain" and len(lines) == 2:  # the model is fine, and ONNX Runtime cannot run it
        assert lines[1] == "Error: 1 of the inputs could not be explained; the others are done"
    else:
        assert len(lines) == 1, lines
        assert lines[0].startswith("Error: ")
        assert new <= ({"pictures"} if command == "explain" else set())
    mine = str(place.resolve())
    read = {Path(name).resolve() for name in outcome.opened if name.startswith((mine, "/etc", "/root", "/dev"))}
    assert not any(path.is_relative_to(place / "secret") for path in read), read
    for path in (place / "out.onnx", *place.glob("pictures/*")):
        path.unlink(missing_ok=True)
    return outcome


def put(place: Path, data: bytes) -> Path:
    path = place / "model" / "net.onnx"
    path.write_bytes(data)
    return path


def converts(worker: Worker, place: Path, name: str) -> None:
    outcome = tried(worker, place, "convert")
    assert outcome.status == (0 if name in FINE else 1), outcome
    assert SAID.get(name, "") in outcome.stderr


@pytest.mark.parametrize("name", FILES)
def test_malformed(worker: Worker, place: Path, name: str) -> None:
    put(place, FILES[name]())
    converts(worker, place, name)
    for command in ("portable", "inspect"):
        tried(worker, place, command)


@pytest.mark.parametrize("name", ["empty", "type 999", "cycle", "name that is no UTF-8", "two opsets", "Loop of 2^62"])
def test_malformed_in_other_commands(worker: Worker, place: Path, name: str) -> None:
    put(place, FILES[name]())
    for command in ("json", "verify", "explain"):
        assert tried(worker, place, command).status == (0 if (name, command) == ("Loop of 2^62", "json") else 1)


@pytest.mark.parametrize("name", FORGED)
def test_forged_metadata(worker: Worker, place: Path, name: str) -> None:
    put(place, hostile.forged(FORGED[name]))
    for command in ("convert", "inspect", "json", "verify", "explain"):
        tried(worker, place, command)


def test_every_cut(worker: Worker, place: Path) -> None:
    """Also in the middle of functions, external data and metadata."""
    made = hostile.laughs(2, 2)
    made.MergeFrom(onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key="onnxgbp.labels", value="[]")]))
    data = made.SerializeToString()
    for size in range(0, len(data), 7):
        put(place, data[:size])
        tried(worker, place, "inspect")


@pytest.mark.parametrize("name", ["type 999", "name that is no UTF-8", "functions that double 40 times", "cycle"])
def test_in_python(place: Path, name: str) -> None:
    path = put(place, FILES[name]())
    for use in (onnxgbp.load, onnxgbp.convert, onnxgbp.Explainer, lambda p: onnxgbp.convert(onnx.load(p))):
        with pytest.raises(onnxgbp.OnnxgbpError) as caught:
            use(path)
        assert str(caught.value).isprintable()


# --- external data --------------------------------------------------------------------------------


def external(place: Path, **entries: str) -> Path:
    """X + w, whose numbers lie elsewhere; `weights.bin` beside the model has 64 bytes, of which w needs 16."""
    made = hostile.with_initializer(dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        made.graph.initializer[0].external_data.add(key=key, value=value)
    (place / "model" / "weights.bin").write_bytes(bytes(64))
    return put(place, made.SerializeToString())


def test_external_data_that_is_fine(worker: Worker, place: Path) -> None:
    external(place, location="weights.bin", offset="48", length="16")
    assert tried(worker, place, "convert").status == 0


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../secret/weights.bin"},
        {"location": "/etc/hostname"},
        {"location": "out/weights.bin"},
        {"location": "link.bin"},
        {"location": "loop.bin"},
        {"location": "pipe"},
        {"location": "socket"},
        {"location": "/dev/zero"},
        {"location": "zero"},
        {"location": "."},
        {"location": "folder"},
        {"location": "gone.bin"},
        {"location": "n" * 5000},
        {"location": "a\0b"},
        {"location": "a\nb\x1b[31m"},
        {"location": "weights.bin", "offset": "60"},
        {"location": "weights.bin", "offset": "-1"},
        {"location": "weights.bin", "offset": str(1 << 70)},
        {"location": "weights.bin", "offset": "1.5"},
        {"location": "weights.bin", "offset": "9" * 5000},
        {"location": "weights.bin", "length": "-16"},
        {"location": "weights.bin", "length": "15"},
        {"location": "weights.bin", "length": str(1 << 62)},
        {"location": "weights.bin", "length": ""},
    ],
    ids=lambda entries: " ".join(entries.values())[:40],
)
def test_external_data(worker: Worker, place: Path, entries: dict[str, str]) -> None:
    model = external(place, **entries).parent
    (model / "out").symlink_to(place / "secret")
    (model / "link.bin").symlink_to(place / "secret" / "weights.bin")
    (model / "loop.bin").symlink_to(model / "loop.bin")
    (model / "zero").symlink_to("/dev/zero")
    (model / "folder").mkdir()
    os.mkfifo(model / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(model)  # a socket's path may have a hundred characters
        listening.bind("socket")
        os.chdir(here)
        for command in ("convert", "inspect", "explain"):
            assert tried(worker, place, command).status == 1


def test_external_data_of_unknown_type(worker: Worker, place: Path) -> None:
    path = external(place, location="weights.bin")
    made = onnx.load(path, load_external_data=False)
    for kind, dims in ((999, [4]), (TensorProto.STRING, [4]), (0, [4]), (1, [-4]), (1, [1 << 40]), (1, [1 << 32] * 2)):
        made.graph.initializer[0].data_type = kind
        made.graph.initializer[0].dims[:] = dims
        put(place, made.SerializeToString())
        assert tried(worker, place, "convert").status == 1


def test_a_saved_model_takes_no_file_from_elsewhere(place: Path) -> None:
    """`save` copies external data beside the new file: only what lies in the folder that was named, and only there."""
    for location in ("../secret/weights.bin", "/etc/hostname", "a\0b"):
        model = onnx.load(external(place, location=location), load_external_data=False)
        with pytest.raises(onnxgbp.OnnxgbpError, match="outside the model's folder"):
            onnxgbp.save(model, place / "photos" / "out.onnx", data_folder=place / "model")
    assert [path.name for path in (place / "photos").iterdir()] == ["red.png"]


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Größe 3 µm, 猫", "plain, Größe 3 µm, 猫"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31m\x07\x9b", "\\x1b[31m\\x07\\x9b"),
        ("\u202egpj.exe\u2028", "\\u202egpj.exe\\u2028"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(onnxgbp.OnnxgbpError(text)) == shown


def test_a_long_error_keeps_both_ends() -> None:
    said = str(onnxgbp.OnnxgbpError("tensor '" + "n" * 1_000_000 + "': the way out"))
    assert len(said) < 5000
    assert said.startswith("tensor 'nnn")
    assert said.endswith("nnn': the way out")


def test_names_forge_no_line_of_a_report(worker: Worker, place: Path) -> None:
    """A converted file, so that `inspect` and `verify` have something to say of each name."""
    evil = "\nok    forward unchanged\x1b[2K"
    made = hostile.classifier(labels=json.dumps([evil] * 4))
    made.graph.node[1].name = f"act{evil}"
    renamed = made.SerializeToString().replace(b"hostile", b"hos\x1b[1m")
    converted = onnxgbp.convert(onnx.ModelProto.FromString(renamed))
    put(place, converted.SerializeToString())
    for command, status in (("inspect", 0), ("verify", 0), ("explain", 0)):
        outcome = tried(worker, place, command)
        assert outcome.status == status, outcome
        assert not any(line.startswith("ok    forward unchanged\\x1b") for line in outcome.stdout.splitlines())


# --- pictures -------------------------------------------------------------------------------------


def explained(worker: Worker, place: Path, picture: Path) -> Outcome:
    put(place, hostile.classifier().SerializeToString())
    picture.rename(place / "photos" / "red.png")
    return tried(worker, place, "explain")


def test_a_bomb_is_refused(worker: Worker, place: Path) -> None:
    """A png of 400 million pixels in half a megabyte, refused before it is unpacked."""
    bomb = place / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    assert bomb.stat().st_size < 1 << 20
    outcome = explained(worker, place, bomb)
    assert outcome.status == 1
    assert "exceeds limit" in outcome.stderr
    assert outcome.megabytes < 100


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode(worker: Worker, place: Path, mode: str) -> None:
    picture = place / "picture.tiff"
    Image.new(mode, (9, 9)).save(picture)
    assert explained(worker, place, picture).status == 0  # and its name says png


def test_one_pixel(worker: Worker, place: Path) -> None:
    Image.new("RGB", (1, 1)).save(place / "one.bmp")
    assert explained(worker, place, place / "one.bmp").status == 0


def test_an_animation_shows_its_first_frame(worker: Worker, place: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "green")]
    frames[0].save(place / "a.gif", save_all=True, append_images=frames[1:])
    from onnxgbp.images import read

    np.testing.assert_array_equal(np.asarray(read(place / "a.gif")), np.asarray(frames[0]))
    assert explained(worker, place, place / "a.gif").status == 0


def test_a_broken_picture(worker: Worker, place: Path) -> None:
    for content in (
        b"",
        b"GIF89a" + bytes(20),
        b"<svg/>",
        b"P6 99999999999 99999999999 255\n",
        b"II*\0" + b"\xff" * 99,
    ):
        (place / "broken").write_bytes(content)
        assert explained(worker, place, place / "broken").status == 1
