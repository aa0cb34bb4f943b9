"""The same source and options give the same bytes: in another process, with other hashes, written either way."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

import onnxgbp
from onnxgbp.cli import main

CORPUS = Path(__file__).parent / "data" / "corpus"

# A loop of a number of steps that is known only when it runs, and a choice within it.
LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3] x, int64 count) => (float[N,3] y) <float[3,3] w = {1, 2, -1, 0.5, -2, 1, 0, 1, 3}>
{
  yes = Constant <value = bool {1}> ()
  y = Loop (count, yes, x) <body = step (int64 i, bool going, float[N,3] h) => (bool again, float[N,3] next) {
    again = Identity (going)  m = MatMul (h, w)  [act] r = Relu (m)  next = Add (r, h) }>
}
"""
# source, the options as the command takes them
CASES: list[tuple[str, list[str]]] = [
    ("torch_mnist_relu.ts17", ["--method", "guided"]),
    ("torch_mnist_relu.ts17", ["--methods", "gradient,deconvnet,guided", "--target", "top3"]),
    ("torch_mnist_silu.ts17", ["--method", "guided", "--target", "input2", "--profile", "portable"]),
    ("hf_vit.optimum", ["--method", "gradient", "--target", "input"]),
    ("keras_tensorflow_mobile.tf2onnx15", ["--view", "abs", "--reduce", "sum", "--heatmap"]),
    ("torch_mnist_relu.qdq", ["--rule", "*=deconvnet"]),
    ("loop", ["--wrt", "x"]),
    ("loop", ["--wrt", "x", "--methods", "guided,gradient", "--target", "input2"]),
]

WRITES = """
import json, sys
from click.testing import CliRunner
from onnxgbp.cli import main
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
"""


def as_keywords(options: list[str]) -> dict[str, Any]:
    """The command's options as `convert` takes them; one without a value is a flag."""
    pairs = zip(options, [*options[1:], "--"], strict=True)
    return {
        name[2:]: True if value.startswith("--") else [value] if name in ("--rule", "--wrt") else value
        for name, value in pairs
        if name.startswith("--")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<seed of the hashes>-<case>.onnx`, each seed by a process of its own."""
    folder = tmp_path_factory.mktemp("reproducible")
    onnx.save(onnx.parser.parse_model(LOOP), folder / "loop.onnx")
    for seed in ("0", "1", "4242"):
        calls = [
            ["convert", str(source_of(folder, name)), "-o", str(folder / f"{seed}-{i}.onnx"), *options]
            for i, (name, options) in enumerate(CASES)
        ]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", WRITES, json.dumps(calls)], env=environment, check=True)
    return folder


def source_of(folder: Path, name: str) -> Path:
    return folder / "loop.onnx" if name == "loop" else CORPUS / f"{name}.onnx"


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name} {' '.join(options)}" for name, options in CASES])
def test_the_same_bytes_however_they_are_written(folder: Path, case: int) -> None:
    name, options = CASES[case]
    digests = {hashlib.sha256((folder / f"{seed}-{case}.onnx").read_bytes()).hexdigest() for seed in (0, 1, 4242)}
    model = onnxgbp.convert(source_of(folder, name), **as_keywords(options))
    onnxgbp.save(model, folder / f"convert-{case}.onnx")
    digests.add(hashlib.sha256((folder / f"convert-{case}.onnx").read_bytes()).hexdigest())
    # A model in memory has bytes of its own, and with them another sha256; nothing else may differ.
    given = onnxgbp.convert(onnx.load(source_of(folder, name)), **as_keywords(options))
    for made in (given, model):
        (entry,) = (entry for entry in made.metadata_props if entry.key == "onnxgbp.sha256")
        entry.value = ""
    assert given.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert len(digests) == 1


def test_a_bit_of_an_option_is_seen(folder: Path) -> None:
    """The comparison above can fail."""
    out = folder / "other.onnx"
    arguments = ["convert", str(source_of(folder, CASES[0][0])), "-o", str(out), "--method", "guided", "--target", "3"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert out.read_bytes() != (folder / "0-0.onnx").read_bytes()


FACTS = (
    "version",
    "method",
    "rules",
    "audit",
    "activations",
    "target",
    "seed",
    "explained",
    "wrt",
    "profile",
    "sha256",
)


def test_the_metadata_tells_how_the_file_was_made(tmp_path: Path) -> None:
    source = onnx.load(CORPUS / "torch_mnist_relu.ts17.onnx")
    labels, size = json.dumps([f"digit {i}" for i in range(10)]), json.dumps({"size": 28, "channels": "rgb"})
    theirs = {"author": "somebody", "onnxgbp.labels": labels, "onnxgbp.preprocessing": size}
    onnx.helper.set_model_props(source, theirs)
    path = tmp_path / "net.onnx"
    onnx.save(source, path)
    model = onnxgbp.convert(
        path, method="deconvnet", rule=["depth:1=guided"], target="digit 3", profile="portable", activations="relu"
    )
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert {name: said[name] for name in theirs} == theirs
    facts = {name: said[f"onnxgbp.{name}"] for name in FACTS}
    assert {name for name in said if name.startswith("onnxgbp.")} == {
        *(f"onnxgbp.{name}" for name in FACTS),
        "onnxgbp.labels",
        "onnxgbp.preprocessing",
    } | ({"onnxgbp.stripped"} & set(said))
    assert facts["method"] == "deconvnet"
    assert json.loads(facts["rules"]) == ["depth:1=guided", "*=deconvnet"]
    assert facts["target"] == "3"
    assert facts["profile"] == "portable"
    assert facts["activations"] == "relu"
    assert facts["seed"] == "one"
    assert json.loads(facts["wrt"]) == [source.graph.input[0].name]
    assert facts["explained"] in {name for node in source.graph.node for name in node.output}
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["version"] == importlib.metadata.version("onnxgbp")
    rows = json.loads(facts["audit"])
    relus = [node.name for node in source.graph.node if node.op_type == "Relu"]
    assert [row["node"] for row in rows] == relus
    assert [row["rule"] for row in rows] == ["guided", *["deconvnet"] * (len(relus) - 1)]
