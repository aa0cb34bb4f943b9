"""onnxgbp-run, the native program: built with all warnings on, compared with the Python package, and its refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

import onnxgbp
from onnxgbp.images import Preprocessing, read
from onnxgbp.render import signed_picture

ROOT = Path(__file__).resolve().parent.parent
STRICT = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic -Werror"


@dataclasses.dataclass(frozen=True)
class Native:
    """build: CMake's folder; program: onnxgbp-run in it; library: the installed wheel's own ONNX Runtime."""

    build: Path
    program: Path
    library: Path
    goldens: Path

    def __call__(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"ONNXRUNTIME_LIBRARY": str(self.library)} | environment
        return subprocess.run([self.program, *arguments], capture_output=True, text=True, env=env, timeout=120)

    def refused(self, *arguments: str | Path, status: int = 1, **environment: str) -> str:
        """The one line that it refuses with."""
        run = self(*arguments, **environment)
        assert run.returncode == status, run
        assert run.stdout == ""
        assert run.stderr.startswith("onnxgbp-run: ")
        assert run.stderr.count("\n") == 1, run.stderr
        return run.stderr


def lacking(what: str) -> None:
    """Skips the test; in CI, where everything has to be there, fails it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the native program cannot be built: {what}")


def cmake(*arguments: str | Path) -> str:
    run = subprocess.run(["cmake", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory, squeezenet: Path) -> Native:
    for tool in ("cmake", "c++", "make"):
        if shutil.which(tool) is None:
            lacking(f"no {tool} is installed")
    headers = subprocess.run([ROOT / "tools" / "onnxruntime_headers"], capture_output=True, text=True)
    if headers.returncode:
        lacking(headers.stderr.strip())
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if library is None:
        lacking("the installed onnxruntime has no libonnxruntime.so")
    assert library is not None
    folder = tmp_path_factory.mktemp("native")
    goldens = folder / "goldens"
    subprocess.run([sys.executable, ROOT / "tests" / "native_goldens.py", goldens], check=True, cwd=ROOT)
    build = folder / "build"
    said = cmake("-S", ROOT, "-B", build, STRICT, f"-DONNXGBP_GOLDENS={goldens}", f"-DONNXRUNTIME_LIBRARY={library}")
    if "libpng was not found" in said:
        lacking("libpng's headers are not installed")
    cmake("--build", build, "--parallel", "2")
    return Native(build, build / "onnxgbp-run", library, goldens)


@pytest.fixture
def model(native: Native) -> Path:
    """The default network, converted with --target input."""
    return native.goldens / "model.onnx"


def squares(
    path: Path,
    shape: list[int | str | None],
    *,
    dtype: int = TensorProto.FLOAT,
    metadata: dict[str, str] | None = None,
    convert: bool = True,
    **options: Any,
) -> Path:
    """A model with the one score sum(x²): its gradient 2x shows what the picture was made into, to the last bit."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "x"], ["square"]),
            helper.make_node("ReduceSum", ["square", "axes"], ["sum"], keepdims=1),
            helper.make_node("Flatten", ["sum"], ["scores"]),
        ],
        "squares",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("scores", dtype, ["N", 1])],
        [axes],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    helper.set_model_props(proto, metadata or {})
    onnxgbp.save(onnxgbp.convert(proto, method="gradient", **options) if convert else proto, path)
    return path


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, *channels), np.uint8))


def test_ctest_compares_with_the_goldens(native: Native) -> None:
    run = subprocess.run(["ctest", "--test-dir", native.build, "--verbose"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "8 cases, 0 failed" in run.stdout
    assert "100% tests passed, 0 tests failed out of 1" in run.stdout


@pytest.mark.parametrize("kind", ["input", "attribution", "scores", "target", "picture"])
def test_ctest_sees_a_difference(native: Native, kind: str, tmp_path: Path) -> None:
    shutil.copy(native.goldens / "model.onnx", tmp_path)
    case = shutil.copytree(native.goldens / "tabby", tmp_path / "tabby")
    if kind == "target":
        (case / "target.txt").write_text("281 285\n")
    elif kind == "picture":
        read(case / "picture.ppm").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(case / "picture.ppm")
    else:
        values = np.load(case / f"{kind}.npy")
        values.flat[values.argmax()] *= 1.001
        np.save(case / f"{kind}.npy", values)
    env = os.environ | {"ONNXRUNTIME_LIBRARY": str(native.library)}
    run = subprocess.run([native.build / "goldens-test", tmp_path], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert "1 cases, 1 failed" in run.stdout


@pytest.mark.parametrize(("suffix", "target"), [(".png", None), (".ppm", 281)])
def test_a_photo(native: Native, model: Path, photo: Path, suffix: str, target: int | None, tmp_path: Path) -> None:
    given = tmp_path / f"photo{suffix}"
    read(photo).save(given)
    out, raw = tmp_path / f"out{suffix}", tmp_path / "raw.npy"
    options = [] if target is None else ["--target", str(target)]
    run = native(model, given, "-o", out, "--raw", raw, "--top", "3", *options)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""

    explainer = onnxgbp.Explainer(model, provider="cpu")
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
    result = explainer(prepared.prepare(read(photo))[np.newaxis], target)
    attribution = np.load(raw)
    assert attribution.shape == (3, 224, 224)
    assert attribution.dtype == np.float32
    wanted = result.attribution[0]
    # Another run of float32 sums, which the runtime may split over its threads otherwise.
    np.testing.assert_allclose(attribution, wanted, rtol=0, atol=1e-4 * np.ptp(wanted))
    picture = signed_picture(attribution, layout=prepared.layout, channels=prepared.channels)
    np.testing.assert_array_equal(np.asarray(read(out)), np.asarray(picture.image))

    labels = json.loads(explainer.metadata["onnxgbp.labels"])
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"{model}: guided of 'logits' on cpu; explaining 'logits', the scores before Softmax")
    assert lines[1] == f"input: {prepared}"
    for line, index in zip(lines[3:6], np.argsort(-result.scores[0])[:3], strict=True):
        score, named = line.split(maxsplit=1)
        assert named == f"{index} {labels[index]}"
        assert float(score) == pytest.approx(result.scores[0, index], rel=1e-3)
    assert lines[6] == f"  explained: {result.target[0]} {labels[result.target[0]]}"
    assert lines[7].startswith(f"  clip: {picture.clip:.4g} ")
    assert len(lines) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, given.name, "raw.npy"]
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(given.stat().st_mode)


FORMULA = {"scale": 0.0173, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("shape", "said", "image"),
    [
        (["N", 3, 16, 16], None, noise(40, 30)),
        (["N", 3, 16, 16], {"size": 20, "crop": 16, "channels": "bgr"} | FORMULA, noise(61, 43)),
        (["N", 16, 20, 3], {"size": 33, "crop": [16, 20], "mean": "1,2,3", "scale": 1} | {"std": None}, noise(43, 61)),
        (["N", 1, 16, 16], {"size": 16, "mean": 0.5, "std": 0.25}, noise(57, 31)),
        (["N", 3, "H", "W"], None, noise(7, 5)),
        (["N", 3, "H", "W"], {"size": 57}, noise(11, 5)),
        (["N", "A", "B", "C"], {"layout": "nhwc", "channels": "grey", "crop": 5}, noise(8, 8)),
        (["N", 3, 5, 9], {"crop": [5, 9]}, noise(7, 6)),
        (["N", 3, 64, 64], {"size": 64}, noise(3000, 2)),
        (["N", 3, 64, 64], {"size": 64}, noise(2, 900)),
        ([1, 3, 8, 8], {"size": 8}, noise(8, 8)),
    ],
)
def test_preprocessing_is_that_of_images(
    native: Native, shape: list[Any], said: dict[str, Any] | None, image: Image.Image, tmp_path: Path
) -> None:
    metadata = {"onnxgbp.preprocessing": json.dumps(said)} if said is not None else {}
    path = squares(tmp_path / "model.onnx", shape, metadata=metadata)
    image.save(tmp_path / "photo.ppm")
    run = native(path, tmp_path / "photo.ppm", "--raw", tmp_path / "raw.npy")
    assert run.returncode == 0, run.stderr
    explainer = onnxgbp.Explainer(path, provider="cpu")
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
    np.testing.assert_array_equal(np.load(tmp_path / "raw.npy"), 2 * prepared.prepare(image))
    assert f"\ninput: {prepared}\n" in run.stdout
    assumed = f"the model does not say how to prepare an image; assumed {', '.join(prepared.assumed)}\n"
    assert (assumed in run.stdout) is bool(prepared.assumed)


def png(
    *chunks: tuple[bytes, bytes], size: tuple[int, int] = (4, 3), depth: int = 8, colour: int = 2, interlaced: int = 0
) -> bytes:
    """A PNG from its chunks behind the header."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gradient is twice the pixels, in a picture of any size."""
    said = {"scale": 1}
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    return squares(path, ["N", 3, "H", "W"], metadata={"onnxgbp.preprocessing": json.dumps(said)})


def pictures() -> dict[str, Any]:
    """Files of every kind that is read, by name: an image and how it is saved, or bytes."""
    rows = b"".join(b"\0" + bytes(range(y, y + 24)) for y in range(3))
    rgb16 = png((b"gAMA", struct.pack(">I", 30000)), (b"IDAT", zlib.compress(rows)), depth=16)
    passes = b"".join(b"\0" + bytes(row) for row in ([1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 12]))  # of 2 x 2 pixels
    interlaced = png((b"IDAT", zlib.compress(passes)), size=(2, 2), interlaced=1)
    keyed = noise(9, 7)
    keyed.putpixel((3, 3), (1, 2, 3))
    return {
        "grey.png": (noise(9, 7, "L"), {}),
        "grey-alpha.png": (noise(9, 7, "LA"), {}),
        "alpha.png": (noise(33, 29, "RGBA"), {}),
        "bits.png": (noise(9, 7, "L").convert("1"), {}),
        "palette.png": (noise(9, 7).quantize(5), {}),
        "palette-clear.png": (noise(9, 7).quantize(5), {"transparency": b"\x00\x80\xff"}),
        "keyed.png": (keyed, {"transparency": (1, 2, 3)}),
        "grey16.png": (Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 997), {}),
        "rgb16.png": rgb16,
        "interlaced.png": interlaced,
        "grey.pgm": (noise(9, 7, "L"), {}),
        "few.ppm": b"P6\n# a comment\n2 1 # another\n6\n" + bytes([0, 1, 2, 3, 6, 7]),
        "long.ppm": b"P6 1 1 255\n" + bytes([9, 8, 7]) + b"what follows",
    } | {f"turned{turn}.png": (noise(9, 7), {"exif": exif(turn)}) for turn in range(1, 9)}


@pytest.mark.parametrize("name", pictures())
def test_pictures_are_read_as_images_reads_them(native: Native, plain: Path, name: str, tmp_path: Path) -> None:
    path, made = tmp_path / name, pictures()[name]
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        made[0].save(path, **made[1])
    run = native(plain, path, "--raw", tmp_path / "raw.npy")
    assert run.returncode == 0, run.stderr
    wanted = np.asarray(read(path)).astype(np.float32).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.load(tmp_path / "raw.npy") / 2, wanted)


def damaged() -> dict[str, tuple[bytes, str]]:
    """Files that are no usable picture, and what is said of them."""
    pixels = zlib.compress(b"".join(b"\0" + bytes(12) for _ in range(3)))
    whole = png((b"IDAT", pixels))
    flipped = bytearray(whole)
    flipped[30] ^= 1
    return {
        "empty": (b"", "no PNG and no binary PPM"),
        "text": (b"P3\n1 1\n255\n1 2 3\n", "no PNG and no binary PPM"),
        "jpeg": (b"\xff\xd8\xff\xe0", "no PNG and no binary PPM"),
        "cut": (b"P6\n4 4\n255\n" + bytes(47), "the file is cut off"),
        "no pixels": (b"P6\n0 4\n255\n", "it has no pixels"),
        "huge": (b"P6\n99999 99999\n255\n", "too many pixels"),
        "overflowing": (b"P6\n18446744073709551617 1\n255\n123", "its header is damaged"),
        "negative": (b"P6\n-4 4\n255\n", "its header is damaged"),
        "header only": (b"P6\n# 4 4", "its header is damaged"),
        "deep": (b"P5\n1 1\n65535\n12", "more than 8 bits"),
        "signature": (whole[:8], "the file is cut off"),
        "half": (whole[: len(whole) // 2], "the file is cut off"),
        "no end": (whole[:-12], "the file is cut off"),
        "crc": (bytes(flipped), "CRC error"),
        "short of rows": (png((b"IDAT", zlib.compress(bytes(13)))), "Not enough image data"),
        "no palette": (png((b"IDAT", pixels), colour=3), "PLTE"),
        "wide": (png((b"IDAT", pixels), size=(2**31 - 1, 2**31 - 1)), "too many pixels"),
        "flat": (png((b"IDAT", pixels), size=(0, 3)), "IHDR"),
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_pictures_are_refused(native: Native, plain: Path, name: str, tmp_path: Path) -> None:
    data, message = damaged()[name]
    path = tmp_path / "photo"
    path.write_bytes(data)
    said = native.refused(plain, path, "-o", tmp_path / "out.ppm", "--raw", tmp_path / "raw.npy")
    assert f"cannot read {path}: " in said
    assert message in said
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("shape", "said", "options"),
    [
        (["N", 1, 12, 12], {"mean": 0.5}, {}),
        (["N", 3, 12, 12], {"mean": 0.5, "channels": "bgr"}, {}),
        (["N", 12, 12, 3], {"mean": 0.5}, {}),
        (["N", 3, 12, 12], {"mean": 0.5}, {"wrt": "square"}),
    ],
)
def test_the_picture_is_that_of_render(
    native: Native, shape: list[Any], said: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """Grey and inner tensors are drawn as a sum in blue, white and red."""
    path = squares(tmp_path / "m.onnx", shape, metadata={"onnxgbp.preprocessing": json.dumps(said)}, **options)
    noise(20, 14).save(tmp_path / "photo.png")
    run = native(path, tmp_path / "photo.png", "-o", tmp_path / "out.PNG", "--raw", tmp_path / "raw.npy")
    assert run.returncode == 0, run.stderr
    explainer = onnxgbp.Explainer(path, provider="cpu")
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
    layout, channels = ("nchw", "") if options else (prepared.layout, prepared.channels)
    picture = signed_picture(np.load(tmp_path / "raw.npy"), layout=layout, channels=channels)
    np.testing.assert_array_equal(np.asarray(read(tmp_path / "out.PNG")), np.asarray(picture.image))
    assert f"clip: {picture.clip:.4g} " in run.stdout


def test_a_blank_map_and_broken_numbers_are_said(native: Native, tmp_path: Path) -> None:
    path = squares(tmp_path / "model.onnx", ["N", 3, 4, 4])
    Image.new("RGB", (4, 4)).save(tmp_path / "black.ppm")
    assert "warning: the attribution is zero everywhere" in native(path, tmp_path / "black.ppm").stdout
    huge = {"onnxgbp.preprocessing": json.dumps({"scale": 3e38})}
    path = squares(tmp_path / "model.onnx", ["N", 3, 4, 4], metadata=huge)
    noise(4, 4).save(tmp_path / "noise.ppm")
    assert "of 48 values are not finite" in native(path, tmp_path / "noise.ppm").stdout


@pytest.mark.parametrize(("dtype", "numpy"), [(TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)])
def test_other_float_types(native: Native, dtype: int, numpy: Any, tmp_path: Path) -> None:
    path = squares(tmp_path / "model.onnx", ["N", 3, 4, 4], dtype=dtype)
    noise(4, 4).save(tmp_path / "photo.ppm")
    run = native(path, tmp_path / "photo.ppm", "--raw", tmp_path / "raw.npy", "-o", tmp_path / "out.ppm")
    assert run.returncode == 0, run.stderr
    raw = np.load(tmp_path / "raw.npy")
    assert raw.dtype == numpy
    wanted = 2 * Preprocessing(4, (4, 4)).prepare(read(tmp_path / "photo.ppm")).astype(numpy)
    np.testing.assert_array_equal(raw, wanted)


@pytest.mark.parametrize(
    ("converted", "arguments", "message"),
    [
        ("input", ["--target", "1000"], "target 1000 is out of range: the model has 1000 classes, 0 to 999"),
        ("argmax", ["--target", "3"], "was converted with --target argmax: leave the target out"),
        ("281", ["--target", "3"], "was converted with --target 281: leave the target out"),
        ("281", ["--target", "281"], None),
        ("281", ["--target", "argmax"], None),
        ("argmax", [], None),
        ("seed", [], "was converted with --target seed, and this program feeds one class"),
        ("top2", [], "was converted with --target top2, and this program feeds one class"),
        ("input2", [], "was converted with --target input2, and this program feeds one class"),
    ],
)
def test_targets(
    native: Native,
    squeezenet: Path,
    photo: Path,
    converted: str,
    arguments: list[str],
    message: str | None,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.onnx"
    onnxgbp.save(onnxgbp.convert(squeezenet, target=converted), path)
    if message is not None:
        assert message in native.refused(path, photo, *arguments)
    else:
        run = native(path, photo, *arguments)
        assert run.returncode == 0, run.stderr
        assert f"explained: {281 if converted == '281' else 285} " in run.stdout


def test_several_methods_are_refused(native: Native, squeezenet: Path, photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnxgbp.save(onnxgbp.convert(squeezenet, methods=["gradient", "guided"]), path)
    assert "was converted with --methods gradient,guided; this program explains by one" in native.refused(path, photo)


def test_a_unit_is_no_class(native: Native, squeezenet: Path, photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    rule = "fire8*=guided"
    onnxgbp.save(onnxgbp.convert(squeezenet, method="gradient", rule=rule, output="fire9/squeeze1x1", unit=3), path)
    assert "unit 3 is explained: leave the target out" in native.refused(path, photo, "--target", "3")
    lines = native(path, photo).stdout.splitlines()
    assert "gradient, with fire8*=guided of 'fire9/squeeze1x1' (unit 3) on cpu" in lines[0]
    assert "  explained: 3" in lines


def test_models_that_are_refused(native: Native, squeezenet: Path, photo: Path, tmp_path: Path) -> None:
    assert "cannot read nowhere.onnx: no such file" in native.refused("nowhere.onnx", photo)
    assert "no converted file" in native.refused(squeezenet, photo)
    (tmp_path / "text.onnx").write_text("no model")
    assert "ONNX Runtime cannot load" in native.refused(tmp_path / "text.onnx", photo)
    assert "ONNX Runtime cannot load" in native.refused(tmp_path, photo)
    path = squares(tmp_path / "four.onnx", [4, 3, 8, 8])
    assert "takes 4 pictures at a time" in native.refused(path, photo)
    path = squares(tmp_path / "five.onnx", ["N", 5, 8, 8])
    assert "has 5 channels" in native.refused(path, photo)
    path = squares(tmp_path / "fake.onnx", ["N", 3, 8, 8], convert=False)
    proto = onnx.load(path)
    said = {"onnxgbp.method": "guided", "onnxgbp.target": "argmax", "onnxgbp.wrt": '["x"]', "onnxgbp.explained": "x"}
    helper.set_model_props(proto, said)
    onnx.save(proto, path)
    assert "not those that onnxgbp convert writes" in native.refused(path, photo)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("preprocessing", "{", "is no JSON: no '\"' at byte 1"),
        ("preprocessing", "[" * 100000, "is no JSON: nested too deeply"),
        ("preprocessing", '{"size": 08}', "is no JSON"),
        ("preprocessing", '{"size": 8} x', "something follows its end"),
        ("preprocessing", '"\\ud8"', "four hexadecimal digits"),
        ("preprocessing", "[]", "is no JSON object"),
        ("preprocessing", '{"resample": 3}', "unknown entry 'resample'"),
        ("preprocessing", '{"size": 8.0}', "size that is no integer"),
        ("preprocessing", '{"size": 1e99}', "size that is no integer"),
        ("preprocessing", '{"size": 7}', "size 7 is smaller than the crop 8 x 8"),
        ("preprocessing", '{"size": 999999999}', "is too large"),
        ("preprocessing", '{"crop": 7}', "does not fit the crop 7 x 7"),
        ("preprocessing", '{"crop": [1, 2, 3]}', "neither an integer nor a height and a width"),
        ("preprocessing", '{"channels": "grey"}', "has a channel axis of 3"),
        ("preprocessing", '{"layout": "hwc"}', "unknown layout"),
        ("preprocessing", '{"mean": [1, 2]}', "has 2 values of mean or std for 3 channels"),
        ("preprocessing", '{"mean": "1,b,c"}', "mean that is no number"),
        ("preprocessing", '{"std": [1, 0, 1]}', "scale and std not 0"),
        ("preprocessing", '{"scale": 1e999}', "finite"),
        ("labels", "{}", "is no JSON list"),
    ],
)
def test_malformed_metadata(native: Native, photo: Path, key: str, text: str, message: str, tmp_path: Path) -> None:
    path = squares(tmp_path / "model.onnx", ["N", 3, 8, 8], metadata={f"onnxgbp.{key}": text})
    assert message in native.refused(path, photo)


def test_labels_are_text_of_any_kind(native: Native, photo: Path, tmp_path: Path) -> None:
    for text, shown in [
        ('["na\\u00efve \\ud83d\\ude00 \\"q\\""]', 'naïve 😀 "q"'),
        ('["ä\\ud800"]', "ä\ufffd"),
        ('["\\u001b[31m"]', "?[31m"),
        ("[3]", ""),
        ("[]", ""),
    ]:
        path = squares(tmp_path / "model.onnx", ["N", 3, 8, 8], metadata={"onnxgbp.labels": text})
        assert f"explained: 0 {shown}".rstrip() in native(path, photo).stdout.splitlines()[-2]


def test_libraries_that_are_refused(native: Native, model: Path, photo: Path, tmp_path: Path) -> None:
    missing = native.refused(model, photo, "--library", "/nowhere/libonnxruntime.so")
    assert "cannot load ONNX Runtime: /nowhere/libonnxruntime.so: " in missing
    assert "/elsewhere.so" in native.refused(model, photo, ONNXRUNTIME_LIBRARY="/elsewhere.so")
    assert "is no ONNX Runtime" in native.refused(model, photo, "--library", "libm.so.6")
    if shutil.which("ldconfig") is None or "libonnxruntime" not in subprocess.getoutput("ldconfig -p"):
        assert "libonnxruntime.so.1" in native.refused(model, photo, ONNXRUNTIME_LIBRARY="")
    # What the loader finds, by the name that a distribution gives it.
    (tmp_path / "libonnxruntime.so.1").symlink_to(native.library)
    run = native(model, photo, ONNXRUNTIME_LIBRARY="", LD_LIBRARY_PATH=str(tmp_path))
    assert run.returncode == 0, run.stderr


def test_a_runtime_that_is_too_old(native: Native, model: Path, photo: Path, tmp_path: Path) -> None:
    """What releases before the headers' answer, whichever way they say it; the real ones are no longer installable
    everywhere."""
    for version, message in [("1.20.1", "1.20.1 is too old: "), ("2.0.0", "2.0.0 is too old: ")]:
        (tmp_path / "old.c").write_text(
            f"""
            #include <stddef.h>
            static const void *get_api(unsigned version) {{ (void)version; return NULL; }}
            static const char *get_version(void) {{ return "{version}"; }}
            static const struct {{ const void *(*api)(unsigned); const char *(*version)(void); }} base
                = {{get_api, get_version}};
            const void *OrtGetApiBase(void) {{ return &base; }}
            """
        )
        library = tmp_path / f"old-{version}.so"
        subprocess.run(["c++", "-xc", "-shared", "-fPIC", tmp_path / "old.c", "-o", library], check=True)
        assert message in native.refused(model, photo, "--library", library)


def test_cuda_is_cuda_or_an_error(native: Native, model: Path, photo: Path) -> None:
    run = native(model, photo, "--provider", "cuda")
    if run.returncode == 0:  # here it works
        assert " on cuda;" in run.stdout
    else:
        assert run.returncode == 1
        without = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
        assert ("this ONNX Runtime has no CUDA: " if without else "CUDA does not work here (") in run.stderr
        assert run.stderr.count("\n") == 1


def test_files_are_written_whole_or_not_at_all(native: Native, model: Path, photo: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.ppm"
    (tmp_path / "link.ppm").symlink_to(target)
    assert native(model, photo, "-o", tmp_path / "link.ppm").returncode == 0
    assert (tmp_path / "link.ppm").is_symlink()
    assert read(target).size == (224, 224)
    before = sorted(tmp_path.iterdir())
    assert "No such file" in native.refused(model, photo, "-o", tmp_path / "nowhere" / "out.ppm")
    (tmp_path / "folder.ppm").mkdir()
    assert "no regular file" in native.refused(model, photo, "-o", tmp_path / "folder.ppm")
    assert "no regular file" in native.refused(model, photo, "--raw", "/dev/null")
    limited = ["sh", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$@"', "sh"]  # a disk that is full after some kilobytes
    command = [*limited, native.program, model, photo, "--library", native.library, "-o", tmp_path / "full.ppm"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"cannot write {tmp_path / 'full.ppm'}: File too large" in run.stderr
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "folder.ppm"])
    with Path("/dev/full").open("w") as full:
        command = [native.program, model, photo, "--library", native.library]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert "cannot print" in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model.onnx"],
        ["model.onnx", "photo.ppm", "more"],
        ["--nothing"],
        ["a", "b", "--target"],
        ["a", "b", "--target", "cat"],
        ["a", "b", "--target", "-1"],
        ["a", "b", "--threads", "0"],
        ["a", "b", "--top", "3x"],
        ["a", "b", "--provider", "auto"],
    ],
)
def test_wrong_usage(native: Native, arguments: list[str]) -> None:
    run = native(*arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith(("onnxgbp-run: ", f"{native.program}: "))


def test_help_version_and_options(native: Native, model: Path, photo: Path, tmp_path: Path) -> None:
    said = native("--help").stdout
    assert said.startswith("Usage: onnxgbp-run ")
    assert all(len(line) <= 120 for line in said.splitlines())
    version = onnxgbp.convert(squares(tmp_path / "m.onnx", ["N", 3, 8, 8], convert=False)).metadata_props
    assert native("--version").stdout == f"onnxgbp-run {next(e.value for e in version if e.key.endswith('version'))}\n"
    run = native("--threads", "1", "--top", "0", "--", model, photo)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[3] == "  explained: 285 Egyptian cat"
    assert "choose a name in .ppm or .png" in native.refused(model, photo, "-o", tmp_path / "out.jpg")


def test_install(native: Native, tmp_path: Path) -> None:
    cmake("--install", native.build, "--prefix", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "bin" / "onnxgbp-run"]
    run = subprocess.run([tmp_path / "bin" / "onnxgbp-run", "--version"], capture_output=True, text=True)
    assert run.stdout.startswith("onnxgbp-run ")
    linked = subprocess.run(["ldd", tmp_path / "bin" / "onnxgbp-run"], capture_output=True, text=True).stdout
    assert "libonnxruntime" not in linked


def test_without_libpng(native: Native, model: Path, photo: Path, tmp_path: Path) -> None:
    without_png = ("-DCMAKE_DISABLE_FIND_PACKAGE_PNG=ON", "-DCMAKE_BUILD_TYPE=Debug")  # Debug: compiled faster
    said = cmake("-S", ROOT, "-B", tmp_path / "build", STRICT, *without_png)
    assert "will read and write PPM only" in said
    cmake("--build", tmp_path / "build", "--parallel", "2")
    without = dataclasses.replace(native, program=tmp_path / "build" / "onnxgbp-run")
    assert "built without libpng: convert it to PPM" in without.refused(model, photo)
    assert "built without libpng; choose a name in .ppm" in without.refused(model, photo, "-o", tmp_path / "out.png")
    run = without(model, native.goldens / "tabby" / "photo.ppm", "-o", tmp_path / "out.ppm")
    assert run.returncode == 0, run.stderr
    assert read(tmp_path / "out.ppm").size == (224, 224)


def test_without_headers(native: Native, tmp_path: Path) -> None:
    said = cmake("-S", ROOT, "-B", tmp_path / "build", "-DONNXRUNTIME_INCLUDE_DIR=")  # empty: nothing is looked for
    assert "onnxgbp-run is not built: ONNX Runtime's headers were not found" in said
    cmake("--build", tmp_path / "build")
    run = subprocess.run(["ctest", "--test-dir", tmp_path / "build"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "No tests were found" in run.stdout + run.stderr
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DONNXRUNTIME_INCLUDE_DIR={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "no onnxruntime_cxx_api.h in" in run.stderr
