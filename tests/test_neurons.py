"""`onnxgbp neurons`: the images that excite a channel most, next to what its strongest unit answers to in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from PIL import Image

from onnxgbp import Explainer, convert, save
from onnxgbp.cli import main
from onnxgbp.errors import OnnxgbpError
from onnxgbp.images import Preprocessing, read
from onnxgbp.render import signed_picture
from onnxgbp.target import Channels, parse_channels

SIZE = 20
METADATA = {"size": SIZE, "crop": SIZE, "channels": "bgr", "scale": 0.01, "mean": [1, 2, 3], "std": [1, 1, 1]}


def network(path: Path, batch: str = "N", bias: float = -0.5, size: int | str = SIZE) -> Path:
    """Pictures into 4 classes; `r` is a feature map [N, 6, 9, 9] of fields of 7 x 7 pixels, 2 apart."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        net (float[{batch},3,{size},{size}] picture) => (float[{batch},4] p) {{
            c = Conv <strides = [2, 2]> (picture, W, b)  q = Relu(c)  d = Conv <pads = [1, 1, 1, 1]> (q, V)
            r = Relu(d)  a = GlobalAveragePool(r)  f = Flatten(a)  logits = MatMul(f, U)  p = Softmax(logits)
            t = Transpose <perm = [0, 2, 3, 1]> (r)  u = Relu(t)
        }}"""
    )
    rng = np.random.default_rng(8)
    weights = {"W": (5, 3, 3, 3), "V": (6, 5, 3, 3), "U": (6, 4)}
    for name, dims in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(dims).astype(np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.full(5, bias, np.float32), "b"))
    onnx.helper.set_model_props(model, {"onnxgbp.preprocessing": json.dumps(METADATA)})
    onnx.save(model, path)
    return path


def photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for seed in range(count):
        values = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE + seed % 3, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{seed:02}.png")
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["neurons", *map(str, arguments)])


def manifest(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return read


def inputs(model: Path, folder: Path) -> np.ndarray[Any, Any]:
    explainer = Explainer(model)
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
    return np.stack([prepared.prepare(read(path)) for path in sorted(folder.glob("*.png"))])


def maps(model: Path, x: np.ndarray[Any, Any], layer: str = "r") -> np.ndarray[Any, Any]:
    proto = onnx.load(model)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(layer, onnx.TensorProto.FLOAT, None))
    values: np.ndarray[Any, Any] = onnxruntime.InferenceSession(proto.SerializeToString()).run([layer], {"picture": x})[
        0
    ]
    return values


def test_the_best_images_their_units_and_their_fields(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 37), tmp_path / "out"
    result = run(model, "--layer", "r", "--channel", 4, "--channel", 1, "--images", folder, "--top", 5, "-o", out)
    assert result.exit_code == 0, result.output
    x = inputs(model, folder)  # more than two batches
    values = maps(model, x)
    said = manifest(out)
    assert (said["layer"], said["images"], said["errors"], said["field_lost_at"]) == ("r", 37, [], None)
    assert [row["channel"] for row in said["channels"]] == [4, 1]
    for row in said["channels"]:
        channel = row["channel"]
        strongest = values[:, channel].max(axis=(1, 2))
        assert row["excited_by"] == (strongest > 0).sum()
        order = np.argsort(-strongest, kind="stable")[:5]
        assert [entry["file"] for entry in row["top"]] == [str(folder / f"{i:02}.png") for i in order]
        np.testing.assert_allclose([entry["activation"] for entry in row["top"]], strongest[order], rtol=1e-5)
        whole = Explainer(model, output="r", unit=f"{channel},max")(x[order]).attribution
        for index, entry, attribution in zip(order, row["top"], whole, strict=True):
            place = np.unravel_index(values[index, channel].argmax(), (9, 9))
            assert entry["position"] == list(place)
            # Two 3 x 3 convolutions, the first with stride 2: 7 pixels, of which the padding is none.
            top, left = (max(2 * int(i) - 2, 0) for i in place)
            bottom, right = (min(2 * int(i) + 5, 19) for i in place)
            assert entry["box"] == [left, top, right, bottom]
            array = np.load(out / entry["array"])
            np.testing.assert_allclose(array, attribution[:, top:bottom, left:right], rtol=1e-4, atol=1e-6)
            attribution[:, top:bottom, left:right] = 0
            assert not attribution.any()  # all of it lies in the field
    names = {f"channel-{c}.{k}.npy" for c in (4, 1) for k in range(1, 6)}
    assert {path.name for path in out.iterdir()} == names | {
        "manifest.json",
        "channel-4.neurons.png",
        "channel-1.neurons.png",
    }
    assert "channel 4: " in result.output


def test_the_picture_has_reconstructions_left_and_crops_right(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 30), tmp_path / "out"
    assert run(model, "--layer", "r", "--channel", 2, "--images", folder, "--top", 20, "-o", out).exit_code == 0
    (row,) = manifest(out)["channels"]
    with Image.open(out / "channel-2.neurons.png") as opened:
        sheet = np.asarray(opened)
    side = max(max(e["box"][2] - e["box"][0], e["box"][3] - e["box"][1]) for e in row["top"])
    scale = round(64 / side)
    step = side * scale + 2
    assert sheet.shape == (4 * step - 2, 2 * (5 * step - 2) + 16, 3)  # 20 in five columns and four rows
    prepared = Preprocessing.of(Explainer(model).metadata, Explainer(model).inputs[0])
    for number, entry in enumerate(row["top"]):
        left, top, right, bottom = entry["box"]
        y, x = number // 5 * step, number % 5 * step
        reconstruction = sheet[y : y + side * scale : scale, x : x + side * scale : scale]
        start = 5 * step - 2 + 16 + x
        crop = sheet[y : y + side * scale : scale, start : start + side * scale : scale]
        # A field that the picture's border cuts stands against the side of the cell that looks into the picture.
        v = side - (bottom - top) if top == 0 else 0
        h = side - (right - left) if left == 0 else 0
        inside = slice(v, v + bottom - top), slice(h, h + right - left)
        pixels = np.asarray(prepared.cropped(read(Path(entry["file"]))))
        np.testing.assert_array_equal(crop[inside], pixels[top:bottom, left:right])
        drawn = signed_picture(np.load(out / entry["array"]), channels="bgr")
        assert drawn.clip == entry["clip"]
        np.testing.assert_array_equal(reconstruction[inside], np.asarray(drawn.image))
        for cell in (crop.copy(), reconstruction.copy()):
            cell[inside] = 128
            assert (cell == 128).all()
    cut = {(e["box"][0] == 0, e["box"][2] == 19) for e in row["top"]}
    assert cut == {(True, False), (False, True), (False, False)}  # or the comment above is idle


@pytest.mark.parametrize("seed", ["one", "activation"])
def test_the_whole_map(seed: str, tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 5), tmp_path / "out"
    options = ["--whole", "--seed", seed, "--method", "deconvnet", "--top", 2]
    assert run(model, "--layer", "r", "--channel", 3, "--images", folder, "-o", out, *options).exit_code == 0
    for entry in manifest(out)["channels"][0]["top"]:
        x = inputs(model, folder)[[int(Path(entry["file"]).stem)]]
        (whole,) = Explainer(model, method="deconvnet", output="r", unit=3, seed=seed)(x).attribution
        left, top, right, bottom = entry["box"]
        expected = whole[:, top:bottom, left:right]
        np.testing.assert_allclose(np.load(out / entry["array"]), expected, rtol=1e-4, atol=1e-5)
    assert manifest(out)["options"]["whole"] is True


def test_the_activation_as_the_seed_of_one_unit(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 3), tmp_path / "out"
    for seed in ("one", "activation"):
        options = ["--images", folder, "--top", 1, "--seed", seed, "-o", out / seed]
        assert run(model, "--layer", "r", "--channel", 3, *options).exit_code == 0
    (entry,) = manifest(out / "one")["channels"][0]["top"]
    one, own = (np.load(out / seed / entry["array"]) for seed in ("one", "activation"))
    np.testing.assert_allclose(own, one * entry["activation"], rtol=1e-4)


def test_a_fixed_batch_gives_the_same(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 6)
    said = {}
    for batch in ("N", "4"):
        model, out = network(tmp_path / f"{batch}.onnx", batch), tmp_path / batch
        options = ["--channel", "strongest:2", "--images", folder, "--top", 3, "-o", out]
        assert run(model, "--layer", "r", *options).exit_code == 0
        said[batch] = [
            [(e["file"], e["position"], np.load(out / e["array"]).round(3).tolist()) for e in row["top"]]
            for row in manifest(out)["channels"]
        ]
    assert said["N"] == said["4"]


def test_photos_of_any_size(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx", size="S"), photos(tmp_path / "photos", 6), tmp_path / "out"
    proto = onnx.load(model)
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "T"
    onnx.helper.set_model_props(proto, {"onnxgbp.preprocessing": json.dumps(METADATA | {"size": None, "crop": None})})
    onnx.save(proto, model)
    result = run(model, "--layer", "r", "--channel", 0, "--images", folder, "--top", 6, "-o", out)
    assert result.exit_code == 0, result.output
    entries = manifest(out)["channels"][0]["top"]
    assert {read(Path(entry["file"])).width for entry in entries} == {20, 21, 22}
    for entry in entries:
        x = np.asarray(read(Path(entry["file"])), np.float32)[..., ::-1] * np.float32(0.01) - np.float32([1, 2, 3])
        values = maps(model, x.transpose(2, 0, 1)[np.newaxis])[0, 0]
        np.testing.assert_allclose(entry["activation"], values.max(), rtol=1e-5)
        assert entry["position"] == list(np.unravel_index(values.argmax(), values.shape))


def test_channels_last_input(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> m (float[N,8,8,3] x) => (float[N,4] y) {
            t = Transpose <perm = [0, 3, 1, 2]> (x)  c = Conv (t, W)
            r = Relu(c)  a = GlobalAveragePool(r)  y = Flatten(a)
        }"""
    )
    weight = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    onnx.save(model, tmp_path / "m.onnx")
    options = ["--channel", "strongest:1", "--images", photos(tmp_path / "photos", 3), "-o", tmp_path / "out"]
    result = run(tmp_path / "m.onnx", "--layer", "c", *options)
    assert result.exit_code == 0, result.output
    assert "assumed" in result.output
    (said,) = manifest(tmp_path / "out")["channels"]
    assert said["top"]
    for entry in said["top"]:
        row, column = entry["position"]
        assert entry["box"] == [column, row, column + 3, row + 3]
        # The gradient of a convolution's unit is its kernel.
        found = np.load(tmp_path / "out" / entry["array"])
        np.testing.assert_allclose(found, weight[said["channel"]].transpose(1, 2, 0), rtol=1e-6)


def test_the_strongest_channels(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 8), tmp_path / "out"
    options = ["--channel", "strongest:3", "--channel", 5, "--images", folder, "--top", 4, "-o", out]
    assert run(model, "--layer", "r", *options).exit_code == 0
    strongest = maps(model, inputs(model, folder)).max(axis=(2, 3))
    order = np.argsort(-np.sort(strongest, axis=0)[-4:].mean(axis=0))[:3].tolist()
    assert [row["channel"] for row in manifest(out)["channels"]] == list(dict.fromkeys([5, *order]))


def test_an_image_that_does_not_excite_is_not_shown(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 0), tmp_path / "out"
    for number, colour in enumerate(np.random.default_rng(2).integers(0, 256, (8, 3))):
        Image.new("RGB", (SIZE, SIZE), tuple(map(int, colour))).save(folder / f"{number}.png")
    excited = (maps(model, inputs(model, folder)).max(axis=(2, 3)) > 0).sum(axis=0)
    channel = int(((excited > 0) & (excited < 8)).argmax())
    assert 0 < excited[channel] < 8
    result = run(model, "--layer", "r", "--channel", channel, "--images", folder, "-o", out)
    assert result.exit_code == 0, result.output
    (row,) = manifest(out)["channels"]
    assert row["excited_by"] == len(row["top"]) == excited[channel]
    assert f"{excited[channel]} of 8 images excite it" in result.output


def test_no_image_excites(tmp_path: Path) -> None:
    model, folder = network(tmp_path / "m.onnx", bias=-1e4), photos(tmp_path / "photos", 4)
    result = run(model, "--layer", "r", "--channel", 1, "--images", folder, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == "Error: none of the 4 images excites channel 1 of 'r'\n"
    assert not list((tmp_path / "out").iterdir())


def test_a_bad_image_is_skipped(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 4), tmp_path / "out"
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:-40])
    result = run(model, "--layer", "r", "--channel", 1, "--images", folder, "-o", out)
    assert result.exit_code == 1
    first, last = result.stderr.splitlines()
    assert first.startswith(f"Error: cannot read {folder / '01.png'}: ")
    assert last == "Error: 1 of the images could not be used; the others are done"
    said = manifest(out)
    assert (said["images"], len(said["errors"])) == (3, 1)
    assert str(folder / "01.png") not in {entry["file"] for entry in said["channels"][0]["top"]}


def test_pictures_of_an_earlier_run_are_not_looked_at(tmp_path: Path) -> None:
    model, folder = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 3)
    for _ in range(2):
        assert run(model, "--layer", "r", "--channel", 1, "--images", folder, "-o", folder).exit_code == 0
        assert manifest(folder)["images"] == 3


def test_what_an_earlier_run_wrote_goes_with_its_manifest(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 3), tmp_path / "out"
    for channel in (1, 3):
        assert run(model, "--layer", "r", "--channel", channel, "--images", folder, "-o", out).exit_code == 0
    assert {path.name for path in out.iterdir()} == {
        "manifest.json",
        "channel-3.neurons.png",
        *(f"channel-3.{number}.npy" for number in (1, 2, 3)),
    }
    assert CliRunner().invoke(main, ["explain", str(model), str(folder / "00.png"), "-o", str(out)]).exit_code == 0
    assert not list(out.glob("channel*"))


def test_an_input_of_integers(tmp_path: Path) -> None:
    model, folder, out = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 3), tmp_path / "out"
    proto = onnx.load(model)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    proto.graph.node[0].input[0] = "floats"
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", ["picture"], ["floats"], to=onnx.TensorProto.FLOAT))
    onnx.helper.set_model_props(proto, {"onnxgbp.preprocessing": json.dumps({"size": SIZE, "crop": SIZE})})
    onnx.save(proto, model)
    result = run(model, "--layer", "r", "--channel", "strongest:1", "--images", folder, "-o", out)
    assert result.exit_code == 0, result.output
    (row,) = manifest(out)["channels"]
    assert row["excited_by"] == 3
    for entry in row["top"]:
        pixels = inputs(model, folder)[[int(Path(entry["file"]).stem)]].astype(np.uint8)
        (whole,) = Explainer(model, output="r", unit=f"{row['channel']},max")(pixels).attribution
        left, top, right, bottom = entry["box"]
        np.testing.assert_allclose(np.load(out / entry["array"]), whole[:, top:bottom, left:right], rtol=1e-4)


def test_a_node_names_its_tensor(tmp_path: Path) -> None:
    model, folder = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 2)
    proto = onnx.load(model)
    next(node for node in proto.graph.node if node.output[0] == "r").name = "block/relu"
    onnx.save(proto, model)
    options = ["--channel", 1, "--images", folder, "-o", tmp_path / "out"]
    assert run(model, "--layer", "block/relu", *options).exit_code == 0
    assert manifest(tmp_path / "out")["layer"] == "r"
    refused = run(model, "--layer", "block_relu", *options)
    assert refused.stderr == "Error: --layer: the model has no tensor 'block_relu'; there is 'block/relu'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "zzz"], "the model has no tensor 'zzz'; its outputs are 'p'"),
        (["--layer", "logits"], "tensor 'logits' [N, 4] is no feature map [N, C, H, W]"),
        (["--layer", "W"], "'W' is a weight"),
        (["--layer", "u"], "its axis 1 runs over the picture"),
        (["--channel", "6"], "channel 6 is out of range: 'r' has 6 channels"),
        (["--images", "nowhere"], "cannot read nowhere: it is no folder of photos"),
        (["--crop", "7"], "the crop is 7 x 7"),
    ],
)
def test_refused_with_one_line_and_nothing_written(tmp_path: Path, arguments: list[str], message: str) -> None:
    model, folder = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 2)
    asked = {"--layer": "r", "--channel": "1", "--images": folder} | dict([arguments])
    result = run(model, *[word for pair in asked.items() for word in pair], "-o", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_photos_and_a_converted_file(tmp_path: Path) -> None:
    model, folder = network(tmp_path / "m.onnx"), photos(tmp_path / "photos", 2)
    (tmp_path / "none").mkdir()
    options = ["--layer", "r", "--channel", 1, "-o", tmp_path / "out"]
    assert "no image in the folder" in run(model, *options, "--images", tmp_path / "none").stderr
    save(convert(model, target="input"), tmp_path / "done.onnx")
    assert "already a converted file" in run(tmp_path / "done.onnx", *options, "--images", folder).stderr
    assert not (tmp_path / "out").exists()


def test_parse_channels() -> None:
    assert parse_channels(["3", "7", "3"]) == Channels((3, 7))
    assert parse_channels(["strongest:16", 2]) == Channels((2,), 16)
    for wrong in (["-1"], ["strongest:0"], ["strongest:"], ["weakest:3"], ["1.5"], []):
        with pytest.raises(OnnxgbpError):
            parse_channels(wrong)
    assert run("m.onnx", "--layer", "r", "--channel", "x", "--images", ".", "-o", "out").exit_code == 2


def test_the_default_network_answers_to_the_cats_eye(squeezenet: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(photo) as opened:
        opened.crop((75, 0, 375, 300)).save(folder / "chelsea.png")
    options = ["--layer", "fire6/concat", "--channel", 273, "--images", folder, "-o", tmp_path / "out"]
    result = run(squeezenet, *options)
    assert result.exit_code == 0, result.output
    (entry,) = manifest(tmp_path / "out")["channels"][0]["top"]
    assert entry["box"] == [8, 24, 119, 135]  # 111 pixels
    magnitude = np.abs(np.load(tmp_path / "out" / entry["array"])).sum(axis=0)
    assert magnitude[30:90, 25:95].sum() > 0.6 * magnitude.sum()  # the eye fills 34% of the field
