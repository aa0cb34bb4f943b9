"""`onnxgbp inspect`: what would be done with a model, what stands in the way, and what a converted file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

import onnxgbp
from onnxgbp.cli import main
from onnxgbp.inspection import inspect_model

PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 2, 6, 6] x) => (float[N, 4] p)
<float zero = {0.0}, float six = {6.0}>
{
    [conv1] a = Conv (x, w1)
    [relu1] b = Relu (a)
    [squeeze] s = GlobalAveragePool (b)
    [fc] t = Conv (s, w2)
    [gate] g = Sigmoid (t)
    [excite] h = Mul (b, g)
    [max] i = Max (h, zero)
    [cap] j = Clip (i, zero, six)
    [tanh] k = Tanh (j)
    [pool] l = GlobalMaxPool (k)
    [flat] y = Flatten (l)
    [soft] p = Softmax (y)
}
"""


def written(tmp_path: Path, text: str, name: str = "net.onnx") -> Path:
    model = onnx.parser.parse_model(text)
    onnx.save(model, tmp_path / name)
    return tmp_path / name


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A net with a ReLU, a gate, a ReLU spelled as Max, a ReLU6, a Tanh and a last Softmax."""
    model = onnx.parser.parse_model(PLAIN)
    for name, shape in (("w1", [4, 2, 3, 3]), ("w2", [4, 4, 1, 1])):
        size = shape[0] * shape[1] * shape[2] * shape[3]
        model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, shape, [1.0] * size))
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


def told(path: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["inspect", str(path), "--json", *options])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["node"]: row for row in found["activations"]}


def test_the_facts_of_the_file(plain: Path) -> None:
    found = told(plain)
    assert found["file"] == str(plain)
    assert len(found["sha256"]) == 64
    assert (found["opset"], found["ir_version"]) == (17, 8)
    assert found["inputs"] == [{"name": "x", "dtype": "float", "shape": ["N", 2, 6, 6]}]
    assert found["outputs"] == [{"name": "p", "dtype": "float", "shape": ["N", 4]}]
    assert found["operators"]["Conv"] == 2
    assert found["converted"] is False


def test_what_is_explained_and_of_what(plain: Path) -> None:
    found = told(plain)
    assert found["explained"]["name"] == "y"
    assert found["explained"]["output"] == "p"
    assert found["explained"]["stripped"] == [{"operator": "Softmax", "node": "soft"}]
    assert [value["name"] for value in found["wrt"]] == ["x"]
    assert found["convertible"] is True
    assert found["missing"] == found["obstacles"] == []


def test_every_activation_its_rule_and_why(plain: Path) -> None:
    found = rows(told(plain))
    assert list(found) == ["relu1", "gate", "max", "cap", "tanh"]
    assert (found["relu1"]["kind"], found["relu1"]["rule"], found["relu1"]["reason"]) == (
        "Relu",
        "guided",
        "matches '*'",
    )
    assert (found["max"]["kind"], found["max"]["spelled"]) == ("Relu", "Max")
    assert (found["cap"]["kind"], found["cap"]["spelled"]) == ("Relu6", "Clip")
    assert found["gate"]["rule"] == "gradient"
    assert found["gate"]["gate"] == "it multiplies tensor 'b'"
    assert "papers" in found["tanh"]["note"]


def test_activations_relu_leaves_the_others_plain(plain: Path) -> None:
    found = told(plain, "--activations", "relu")
    assert {name: row["rule"] for name, row in rows(found).items()} == {
        "relu1": "guided",
        "gate": "gradient",
        "max": "guided",
        "cap": "guided",
        "tanh": "gradient",
    }
    assert found["plain"] == ["gate", "tanh"]
    assert "--activations" in rows(found)["tanh"]["reason"]


def test_rules_by_name(plain: Path) -> None:
    found = rows(told(plain, "--rule", "relu*=deconvnet", "--rule", "ca?=gradient", "--method", "guided"))
    assert found["relu1"]["rule"] == "deconvnet"
    assert found["relu1"]["reason"] == "matches 'relu*'"
    assert found["cap"]["rule"] == "gradient"
    assert found["tanh"]["rule"] == "guided"


def test_a_rule_that_matches_nothing_stands_in_the_way(plain: Path) -> None:
    found = told(plain, "--rule", "layer4*=guided")
    assert found["convertible"] is False
    assert "layer4*" in found["obstacles"][0]


def test_a_target_behind_a_relu_is_said(plain: Path) -> None:
    assert "all-zero guided map" in told(plain, "--output", "b", "--unit", "1")["notes"][0]
    assert "all-zero guided map" in told(plain, "--output", "j", "--unit", "1")["notes"][0]  # a Clip
    assert not any("all-zero" in note for note in told(plain)["notes"])


def test_activations_that_the_gradient_does_not_reach(plain: Path) -> None:
    found = told(plain, "--output", "b", "--unit", "1")
    assert list(rows(found)) == ["relu1"]
    assert found["not_reached"] == ["gate", "max", "cap", "tanh"]


def test_the_text(plain: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(plain)])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{plain}: opset 17, IR 8")
    assert "input      x: float [N, 2, 6, 6]" in lines
    assert any("Relu as Max" in line for line in lines)
    assert any("a gate: it multiplies tensor 'b'" in line for line in lines)
    assert lines[-1] == "convertible: yes"


def test_an_operator_without_a_rule_is_listed_once_with_its_nodes(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 4] x) => (float[N, 4] y)
        {
            [first] a = Bernoulli (x)
            [relu] b = Relu (a)
            [second] c = Bernoulli (b)
            [last] y = Identity (c)
        }
        """,
    )
    found = told(path)
    assert found["convertible"] is False
    assert found["missing"] == [{"operator": "Bernoulli", "count": 2, "nodes": ["first", "second"]}]
    text = CliRunner().invoke(main, ["inspect", str(path)]).stdout
    assert "no gradient rule for Bernoulli, 2 nodes: 'first', 'second'" in text
    assert text.splitlines()[-1] == "convertible: no"


def test_an_unknown_domain_is_named(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        <ir_version: 8, opset_import: ["" : 17, "org.example" : 1]>
        net (float[N, 4] x) => (float[N, 4] y) { [own] a = org.example.Secret (x)  y = Relu (a) }
        """,
    )
    found = told(path)
    assert found["convertible"] is False
    assert found["operators"]["org.example::Secret"] == 1
    assert found["missing"] or found["obstacles"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("net (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Relu (x)  z = Neg (x) }", "ambiguous output"),
        ("net (int64[N, 4] x) => (int64[N, 4] y) { y = Neg (x) }", "no tensor to attribute to"),
        ("net (float[N, 4] x) => (bool[N, 4] y) { y = IsNaN (x) }", "no output depends"),
        ("net (float[N, 4, 5] x) => (float[N, 4, 5] y) { y = Relu (x) }", "--unit"),
    ],
)
def test_what_stands_in_the_way_is_said_and_no_error(tmp_path: Path, body: str, said: str) -> None:
    path = written(tmp_path, '<ir_version: 8, opset_import: ["" : 17]>' + body)
    found = told(path)
    assert found["convertible"] is False
    assert said in found["obstacles"][0]
    assert "obstacle" in CliRunner().invoke(main, ["inspect", str(path)]).stdout


def test_a_raised_opset_is_noted(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '<ir_version: 4, opset_import: ["" : 7]> net (float[N, 4] x) => (float[N, 4] y) { a = Relu (x)  y = Neg (a) }',
    )
    found = told(path)
    assert found["opset"] == 7
    assert any("opset" in note for note in found["notes"])


def test_a_converted_file_tells_what_it_holds(plain: Path) -> None:
    out = plain.with_name("out.onnx")
    onnxgbp.save(onnxgbp.convert(plain, method="deconvnet", rule=["relu*=guided"], target=2), out)
    found = told(out)
    assert found["converted"] is True
    assert found["recorded"]["method"] == "deconvnet"
    assert found["recorded"]["rules"] == ["relu*=guided", "*=deconvnet"]
    assert found["recorded"]["target"] == "2"
    assert found["holds"].startswith("deconvnet, with relu*=guided, of 'y' (target 2) with respect to 'x'")
    assert "guided, of 'y'" in CliRunner().invoke(main, ["inspect", str(out)]).stdout


def test_inspect_agrees_with_convert(plain: Path) -> None:
    before = plain.read_bytes()
    found = inspect_model(plain).to_dict()
    model = onnxgbp.convert(plain)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["onnxgbp.explained"] == found["explained"]["name"]
    assert said["onnxgbp.sha256"] == found["sha256"]
    assert plain.read_bytes() == before


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("no model")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "a.onnx")])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


BODIES = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3] x, bool which, float[T,N,3] xs) => (float[N,3] y)
<int64 three = {3}, bool on = {1}>
{
  [before] a = Tanh (x)
  [choice] b = If (which) <
    then_branch = f () => (float[N,3] o) { [first] o = Relu (a) },
    else_branch = g () => (float[N,3] o) {
      [inner] o = If (which) <then_branch = h () => (float[N,3] p) { [deep] p = Elu (a) },
                              else_branch = i () => (float[N,3] p) { [deeper] p = Selu (a) }> }
  >
  [steps] c = Scan <num_scan_inputs = 1, body = j (float[N,3] s, float[N,3] t) => (float[N,3] u) {
      v = Add (s, t)  [turn] u = Softplus (v) }> (b, xs)
  [again] y = Loop (three, on, c) <body = k (int64 n, bool go, float[N,3] s) => (bool more, float[N,3] t) {
      more = Identity (go)  [round] t = Relu (s) }>
}
"""


def test_activations_inside_control_flow_are_listed(tmp_path: Path) -> None:
    path = written(tmp_path, BODIES)
    found = told(path, "--wrt", "x", "--target", "seed", "--rule", "deep*=deconvnet", "--rule", "round=gradient")
    assert found["convertible"], found["obstacles"]
    rows = {row["node"]: (row["kind"], row["inside"], row["rule"]) for row in found["activations"]}
    assert rows == {
        "before": ("Tanh", None, "guided"),
        "first": ("Relu", "choice", "guided"),
        "deep": ("Elu", "inner", "deconvnet"),
        "deeper": ("Selu", "inner", "deconvnet"),
        "turn": ("Softplus", "steps", "guided"),
        "round": ("Relu", "again", "gradient"),
    }
    assert found["plain"] == ["round"]
    text = CliRunner().invoke(main, ["inspect", str(path), "--wrt", "x", "--target", "seed"]).stdout
    assert "activations on the path: 6" in text
    assert "inside 'choice'" in text
