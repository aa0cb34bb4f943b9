"""Entries of a Triton model repository, read back with the schema that Triton's own client brings."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checking import Array, small_model
from click.testing import CliRunner
from conftest import ROOT
from onnx import helper

import onnxgbp
from onnxgbp import OnnxgbpError
from onnxgbp.cli import main
from onnxgbp.triton import export_triton

CORPUS = Path(__file__).parent / "data" / "corpus"
W1 = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6)
W2 = np.linspace(1, -1, 24, dtype=np.float32).reshape(6, 4)


def net(path: Path, batch: int | str = "N", labels: list[str] | None = None, name: str = "x", **options: Any) -> Path:
    """A converted file."""
    nodes = [
        helper.make_node("MatMul", [name, "W1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "W2"], ["y"]),
        helper.make_node("Softmax", ["y"], ["p"], axis=1),
    ]
    model = small_model(nodes, {name: [batch, 5]}, ["p"], constants={"W1": W1, "W2": W2})
    if labels:
        model.metadata_props.add(key="onnxgbp.labels", value=json.dumps(labels))
    onnxgbp.save(onnxgbp.convert(model, **options), path)
    return path


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's message definitions; its client would hold protobuf back, so they are not part of this environment."""
    folder = tmp_path_factory.mktemp("schema")
    packages = ["tritonclient==2.73.0", "protobuf==6.33.6"]
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*pip, folder, *packages], check=True)
    return folder


READ = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
from google.protobuf import json_format, text_format
place = sys.argv[1] + "/tritonclient/grpc/model_config_pb2.py"  # without its package, which imports gRPC
spec = importlib.util.spec_from_file_location("model_config_pb2", place)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for path in sys.argv[2:]:
    config = text_format.Parse(open(path, encoding="utf-8").read(), module.ModelConfig())
    print(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)))
"""


def read(schema: Path, *entries: Path) -> list[dict[str, Any]]:
    configs = [entry / "config.pbtxt" for entry in entries]
    done = subprocess.run([sys.executable, "-I", "-c", READ, schema, *configs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def tensor(name: str, kind: str, *dims: int, **more: Any) -> dict[str, Any]:
    """Dims as the JSON form has them: 64-bit integers are strings."""
    return {"name": name, "data_type": f"TYPE_{kind}", "dims": [str(dim) for dim in dims], **more}


def scalar(name: str, kind: str) -> dict[str, Any]:
    return tensor(name, kind, 1, reshape={})


def test_configurations(schema: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    labels = ["tench", "tiger cat,\nfeline", 'the "fourth"', "é"]
    said = [
        export_triton(net(tmp_path / "free.onnx", labels=labels), repository),
        export_triton(net(tmp_path / "fed.onnx", target="input"), repository, max_batch=32),
        export_triton(net(tmp_path / "seed.onnx", target="seed"), repository, max_batch=1),
        export_triton(net(tmp_path / "five.onnx", target="input3", methods=["gradient", "guided"]), repository),
        export_triton(net(tmp_path / "fixed.onnx", batch=2, target="input"), repository),
        export_triton(net(tmp_path / "off.onnx"), repository, max_batch=0),
        export_triton(net(tmp_path / "odd.onnx", name='an "odd"\\\tname ü'), repository),
    ]
    names = ("free", "fed", "seed", "five", "fixed", "off", "odd")
    free, fed, seed, five, fixed, off, odd = read(schema, *(repository / name for name in names))

    ours = [tensor("attribution", "FP32", 5), scalar("attribution_target", "INT64")]
    scores = tensor("p", "FP32", 4)
    assert free == {
        "name": "free",
        "backend": "onnxruntime",
        "max_batch_size": 8,
        "dynamic_batching": {},
        "input": [tensor("x", "FP32", 5)],
        "output": [{**scores, "label_filename": "labels.txt"}, *ours],
    }
    assert (repository / "free" / "labels.txt").read_text("utf-8") == 'tench\ntiger cat, feline\nthe "fourth"\né\n'
    assert said[0] == f"{repository / 'free'}: max_batch_size 8; class names of 'p' in labels.txt"

    assert fed["max_batch_size"] == 32
    assert fed["input"] == [tensor("x", "FP32", 5), scalar("target", "INT64")]
    assert fed["output"] == [scores, *ours]
    assert not (repository / "fed" / "labels.txt").exists()

    assert (seed["max_batch_size"], "dynamic_batching" in seed) == (1, False)
    assert seed["input"] == [tensor("x", "FP32", 5), tensor("seed", "FP32", 4)]

    assert five["input"][1] == tensor("target", "INT64", 3)
    maps = [tensor(f"attribution_{method}", "FP32", 3, 5) for method in ("gradient", "guided")]
    assert five["output"] == [scores, *maps, tensor("attribution_target", "INT64", 3)]

    assert "max_batch_size" not in fixed  # 0
    assert fixed["input"] == [tensor("x", "FP32", 2, 5), tensor("target", "INT64", 2)]
    assert fixed["output"][1] == tensor("attribution", "FP32", 2, 5)
    assert "max_batch_size 0 (axis 0 of 'x' is fixed at 2)" in said[4]

    assert "max_batch_size" not in off
    assert off["input"] == [tensor("x", "FP32", -1, 5)]
    assert off["output"][2] == tensor("attribution_target", "INT64", -1)

    assert odd["input"][0]["name"] == 'an "odd"\\\tname ü'


def test_real_files(schema: Path, tmp_path: Path, squeezenet: Path) -> None:
    repository = tmp_path / "repository"
    wanted = {
        squeezenet: 8,
        CORPUS / "keras_tensorflow_relu.tf2onnx11.onnx": 8,
        CORPUS / "flax_linen_relu.jax2onnx_dyn.onnx": 8,
        CORPUS / "flax_linen_relu6.jax2onnx_static.onnx": 0,
        CORPUS / "torch_mnist_relu.ts17_kiai.onnx": 8,  # weights are inputs of the graph
        CORPUS / "skl_mlp_relu.zipmap.onnx": 8,
        CORPUS / "hf_vit.optimum.onnx": 8,
    }
    entries = []
    for i, (source, size) in enumerate(wanted.items()):
        onnxgbp.save(onnxgbp.convert(source), tmp_path / f"m{i}.onnx")
        said = export_triton(tmp_path / f"m{i}.onnx", repository)
        assert f"max_batch_size {size}" in said, source
        assert ("is no tensor and is left out" in said) == ("zipmap" in source.name)
        entries.append(repository / f"m{i}")
    for entry, config in zip(entries, read(schema, *entries), strict=True):
        session = onnxruntime.InferenceSession(entry / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        assert [one["name"] for one in config["input"]] == [one.name for one in session.get_inputs()]
        assert {one["name"] for one in config["output"]} <= {one.name for one in session.get_outputs()}


def test_what_is_not_the_batch(tmp_path: Path) -> None:
    """[T, N, 5] -> [N, 4]: a server that stacks requests along axis 0 would stack time."""
    nodes = [
        helper.make_node("Gather", ["x", "last"], ["now"], axis=0),
        helper.make_node("MatMul", ["now", "W1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "W2"], ["y"]),
    ]
    constants: dict[str, Array] = {"W1": W1, "W2": W2, "last": np.array(-1)}
    for name, dims in (("named", ["T", "N", 5]), ("nameless", [None, None, 5])):
        path = tmp_path / f"{name}.onnx"
        model = small_model(nodes, {"x": dims}, constants=constants)
        if name == "nameless":
            model.graph.output[0].type.tensor_type.shape.dim[0].Clear()
        onnxgbp.save(onnxgbp.convert(model, method="gradient"), path)
        assert "max_batch_size 0 (" in export_triton(path, tmp_path / "repository")
        with pytest.raises(OnnxgbpError, match=r"cannot be batched by a server: .* leave --max-batch out"):
            export_triton(path, tmp_path / "other", max_batch=4)


def test_external_data_comes_along(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "weights").mkdir(parents=True)
    model = onnx.load(net(tmp_path / "m.onnx"))
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="weights/m.bin", size_threshold=64)
    export_triton(folder / "m.onnx", tmp_path / "repository", name="external")
    entry = tmp_path / "repository" / "external"
    assert (entry / "1" / "weights" / "m.bin").read_bytes() == (folder / "weights" / "m.bin").read_bytes()
    x = np.ones((2, 5), np.float32)
    here, there = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for path in (tmp_path / "m.onnx", entry / "1" / "model.onnx")
    )
    for one, two in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_command_and_what_it_refuses(tmp_path: Path) -> None:
    path, repository = net(tmp_path / "guided.v1.onnx"), tmp_path / "new" / "repository"

    def run(*arguments: str | Path) -> Any:
        return CliRunner().invoke(main, ["export-triton", *map(str, arguments)])

    assert run(path, "-o", repository).exit_code == 0
    assert {one.name for one in (repository / "guided.v1").iterdir()} == {"1", "config.pbtxt"}
    assert (repository / "guided.v1" / "1" / "model.onnx").read_bytes() == path.read_bytes()
    assert stat.S_IMODE((repository / "guided.v1").stat().st_mode) & 0o500 == 0o500

    plain = CORPUS / "torch_mnist_relu.ts17.onnx"
    (tmp_path / "file").touch()
    for arguments, message in (
        ((path, "-o", repository), "it is there already; remove it, or choose another --name"),
        ((plain, "-o", repository), "is no converted file: make one with onnxgbp convert"),
        ((path, "-o", repository, "--name", "../up"), "'../up' is no name for a model"),
        ((path, "-o", tmp_path / "file", "--name", "m"), "cannot write"),
        ((tmp_path / "none.onnx", "-o", repository), "cannot read"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert [one.name for one in repository.iterdir()] == ["guided.v1"]  # nothing half-written


def test_the_page_on_serving(squeezenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands have the options that they are given, and its example runs as it stands."""
    page = (ROOT / "docs" / "serving.md").read_text()
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    onnxgbp ")]
    assert {command for command, *_ in commands} == {"convert", "verify", "diff", "export-triton"}
    for command, *arguments in commands:
        options = {option for parameter in main.commands[command].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= options
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    onnxgbp.save(onnxgbp.convert(squeezenet, target="input"), "net.guided.onnx")
    names: dict[str, Any] = {}
    exec(compile(example, "serving.md", "exec"), names)
    assert names["attribution"].shape == (2, 3, 224, 224)
    assert names["target"][0] == 285
