"""What cannot be used is refused in one clear line, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import small_model
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxgbp
from onnxgbp.cli import main

CORPUS = Path(__file__).parent / "data" / "corpus"
GOOD = CORPUS / "torch_mnist_tanh.dyn.onnx"


def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, **attributes)


def linear(**constants: np.ndarray) -> ModelProto:
    """X [N, 4] -> MatMul -> Relu -> y [N, 3]."""
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    nodes = [node("MatMul", ["x", "w"], ["h"], name="fc"), node("Relu", ["h"], ["y"], name="act")]
    return small_model(nodes, {"x": ["N", 4]}, constants={"w": w, **constants})


def refused(tmp_path: Path, model: ModelProto | Path | bytes, *options: str, out: Path | None = None) -> str:
    """The one line on stderr; exit status 1, no traceback, no file left."""
    path = tmp_path / "model.onnx"
    if isinstance(model, Path):
        path = model
    else:
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, ["convert", str(path), "-o", str(out or tmp_path / "out.onnx"), *options])
    assert result.exit_code == 1, f"exit {result.exit_code}: {result.output} {result.exception!r}"
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    return result.stderr


# --- files ----------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    assert "cannot read" in refused(tmp_path, tmp_path / "nothing.onnx")


def test_directory(tmp_path: Path) -> None:
    assert "cannot read" in refused(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hello world\n" * 50, b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(64), b"PK\x03\x04" + bytes(200)],
)
def test_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    assert "not an ONNX file" in refused(tmp_path, content)


def test_truncated(tmp_path: Path) -> None:
    """Wherever it is cut, a file is refused, or what was cut changes nothing."""
    data = GOOD.read_bytes()
    whole = onnxgbp.convert(GOOD)
    sizes = {*range(1, 40), *range(len(data) - 200, len(data)), *range(0, len(data), max(len(data) // 60, 1))}
    messages: list[str] = []
    for size in sorted(sizes):
        path = tmp_path / "cut.onnx"
        path.write_bytes(data[:size])
        try:
            converted = onnxgbp.convert(path)
        except onnxgbp.OnnxgbpError as error:
            messages.append(str(error))
            continue
        assert converted.graph.SerializeToString() == whole.graph.SerializeToString(), f"cut at {size}"
    assert len(messages) >= len(sizes) * 0.9
    assert not any("\n" in message for message in messages)


def test_truncated_says_so(tmp_path: Path) -> None:
    data = GOOD.read_bytes()
    assert "cut off or damaged" in refused(tmp_path, data[: len(data) // 2])


def test_opset_6(tmp_path: Path) -> None:
    model = linear()
    model.opset_import[0].version = 6
    assert "opset 6" in refused(tmp_path, model)


def test_opset_of_the_future(tmp_path: Path) -> None:
    model = linear()
    model.opset_import[0].version = 999
    assert "opset 999" in refused(tmp_path, model)


def test_training_info(tmp_path: Path) -> None:
    model = linear()
    model.training_info.add()
    assert "training" in refused(tmp_path, model)


def test_sparse_initializer(tmp_path: Path) -> None:
    model = linear()
    values = numpy_helper.from_array(np.ones(2, np.float32), "sparse_w")
    indices = numpy_helper.from_array(np.array([0, 5], np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    message = refused(tmp_path, model)
    assert "sparse" in message
    assert "sparse_w" in message


def test_sparse_constant(tmp_path: Path) -> None:
    model = linear()
    values = numpy_helper.from_array(np.ones(2, np.float32), "v")
    indices = numpy_helper.from_array(np.array([0, 5], np.int64), "i")
    sparse = helper.make_sparse_tensor(values, indices, [4, 3])
    model.graph.node.insert(0, node("Constant", [], ["s"], sparse_value=sparse))
    assert "sparse" in refused(tmp_path, model)


def test_duplicated_names(tmp_path: Path) -> None:
    model = linear()
    model.graph.node.append(node("Neg", ["x"], ["h"], name="again"))
    message = refused(tmp_path, model)
    assert "'h'" in message
    assert "again" in message


def test_cycle(tmp_path: Path) -> None:
    model = small_model(
        [node("Add", ["x", "b"], ["a"], name="first"), node("Neg", ["a"], ["b"])], {"x": ["N", 4]}, ("b",)
    )
    assert "cycl" in refused(tmp_path, model)


def test_tensor_from_nowhere(tmp_path: Path) -> None:
    assert "'nowhere'" in refused(tmp_path, small_model([node("Add", ["x", "nowhere"], ["y"])], {"x": ["N", 4]}))


def test_output_from_nowhere(tmp_path: Path) -> None:
    model = linear()
    model.graph.output[0].name = "nowhere"
    assert "'nowhere'" in refused(tmp_path, model)


def test_converted_already(tmp_path: Path) -> None:
    converted = onnxgbp.convert(linear(), method="deconvnet", target=1)
    line = refused(tmp_path, converted)
    said = {entry.key: entry.value for entry in converted.metadata_props}
    assert "already converted: it holds deconvnet of 'y' (target 1)" in line
    assert f"the model that it was made from (its sha256 is {said['onnxgbp.sha256'][:12]}...)" in line
    assert "(unit 1)" in refused(tmp_path, onnxgbp.convert(linear(), unit=1))


# --- external data --------------------------------------------------------------------------------


def _external(tmp_path: Path, location: str) -> Path:
    """A model in a folder of its own, whose weight lies at `location`."""
    folder = tmp_path / "models"
    folder.mkdir()
    model = linear()
    weight = model.graph.initializer[0]
    (tmp_path / "weights.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_missing(tmp_path: Path) -> None:
    message = refused(tmp_path, _external(tmp_path, "gone.bin"))
    assert "missing" in message
    assert "gone.bin" in message


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin"])
def test_external_data_outside(tmp_path: Path, location: str) -> None:
    assert "outside" in refused(tmp_path, _external(tmp_path, location))


def test_external_data_absolute(tmp_path: Path) -> None:
    assert "outside" in refused(tmp_path, _external(tmp_path, str(tmp_path / "weights.bin")))


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    path = _external(tmp_path, "link.bin")
    (path.parent / "link.bin").symlink_to(tmp_path / "weights.bin")
    assert "outside" in refused(tmp_path, path)


def test_external_data_without_location(tmp_path: Path) -> None:
    assert "external" in refused(tmp_path, _external(tmp_path, ""))


def test_external_data_cut_off(tmp_path: Path) -> None:
    path = _external(tmp_path, "weights.bin")
    (path.parent / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:10])
    refused(tmp_path, path)


def test_external_data_of_a_proto() -> None:
    model = linear()
    weight = model.graph.initializer[0]
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    with pytest.raises(onnxgbp.OnnxgbpError, match="as a path"):
        onnxgbp.convert(model)


# --- operators ------------------------------------------------------------------------------------


def test_operator_without_a_rule(tmp_path: Path) -> None:
    model = small_model([node("Neg", ["x"], ["h"], name="fancy_1"), node("Relu", ["h"], ["y"])], {"x": ["N", 4]})
    model.graph.node[0].op_type, model.graph.node[0].domain = "Fancy", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    message = refused(tmp_path, model)
    for part in ("Fancy", "fancy_1", "com.example", "--output", "--wrt h"):
        assert part in message


def test_operator_off_the_path_is_fine() -> None:
    nodes = [
        node("Bernoulli", ["m"], ["b"]),
        node("ReduceMax", ["b"], ["d"], keepdims=0),
        node("Relu", ["x"], ["r"]),
        node("Mul", ["r", "d"], ["y"]),
    ]
    model = small_model(nodes, {"x": ["N", 4]}, constants={"m": np.eye(3, dtype=np.float32)})
    onnxgbp.convert(model)


def test_batch_normalization_in_training_mode(tmp_path: Path) -> None:
    v = np.ones(4, np.float32)
    bn = node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "m2", "v2"], training_mode=1, name="bn1")
    message = refused(tmp_path, small_model([bn], {"x": ["N", 4]}, constants={"s": v, "b": v, "m": v, "v": v}))
    assert "training" in message
    assert "bn1" in message


def test_dropout_in_training_mode(tmp_path: Path) -> None:
    constants = {"r": np.array(0.5, np.float32), "t": np.array(True)}
    model = small_model([node("Dropout", ["x", "r", "t"], ["y"], name="drop")], {"x": ["N", 4]}, constants=constants)
    message = refused(tmp_path, model)
    assert "training" in message
    assert "drop" in message


def test_an_argument_that_is_computed(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], ["integers"], to=TensorProto.INT64),
        node("ReduceMax", ["integers"], ["most"], keepdims=1, axes=[0, 1]),
        node("Reshape", ["most", "one"], ["step"]),
        node("Slice", ["x", "one", "four", "one", "step"], ["y"], name="cut1"),
    ]
    constants = {"one": np.array([1]), "four": np.array([4])}
    assert "cut1" in refused(tmp_path, small_model(nodes, {"x": ["N", 4]}, constants=constants))


# --- what to explain ------------------------------------------------------------------------------


def test_no_float_tensor(tmp_path: Path) -> None:
    """Floats there are, but none that is made of the input's values."""
    nodes = [node("Shape", ["ids"], ["s"]), node("Cast", ["s"], ["f"], to=1), node("Unsqueeze", ["f"], ["y"], axes=[0])]
    model = small_model(nodes, {"ids": ["N", 4]}, dtype=TensorProto.INT64, opset=11)
    for value in model.graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    message = refused(tmp_path, model)
    for part in ("no tensor to attribute to", "no float input", "'ids'", "--wrt"):
        assert part in message


def test_ambiguous_output(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Neg", ["x"], ["b"])]
    message = refused(tmp_path, small_model(nodes, {"x": ["N", 4]}, ("a", "b")))
    for part in ("ambiguous", "'a'", "'b'", "--output"):
        assert part in message


def test_no_output_depends_on_the_input(tmp_path: Path) -> None:
    nodes = [node("Relu", ["w"], ["y"]), node("Neg", ["x"], ["unused"])]
    refused(tmp_path, small_model(nodes, {"x": ["N", 4]}, constants={"w": np.ones((2, 3), np.float32)}))


@pytest.mark.parametrize("name", ["target", "seed", "attribution", "attribution_target"])
def test_an_input_with_a_name_of_ours(tmp_path: Path, name: str) -> None:
    model = small_model([node("Relu", [name], ["y"])], {name: ["N", 4]})
    options = {"target": ["--target", "input"], "seed": ["--target", "seed"]}.get(name, [])
    assert f"'{name}'" in refused(tmp_path, model, *options)


@pytest.mark.parametrize("name", ["target", "attribution", "attribution_target"])
def test_an_inner_tensor_with_a_name_of_ours(name: str) -> None:
    nodes = [node("Relu", ["x"], [name]), node("Neg", [name], ["y"])]
    converted = onnxgbp.convert(small_model(nodes, {"x": ["N", 4]}), target="input")
    onnx.checker.check_model(converted, full_check=True)
    made = [output for n in converted.graph.node for output in n.output]
    assert len(made) == len(set(made))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--target", "3"], "out of range"),
        (["--target", "-1"], "out of range"),
        (["--output", "nothing"], "'nothing'"),
        (["--wrt", "nothing"], "'nothing'"),
        (["--wrt", "y", "--output", "h"], "no gradient reaches"),
        (["--rule", "nothing*=guided"], "nothing*"),
        (["--output", "h", "--unit", "3"], "out of range"),
        (["--output", "h", "--unit", "-1"], "out of range"),
        (["--output", "h", "--unit", "0,0"], "axes"),
        (["--unit", "0", "--target", "1"], "unit"),
    ],
)
def test_options(tmp_path: Path, options: list[str], part: str) -> None:
    assert part in refused(tmp_path, linear(), *options)


@pytest.mark.parametrize("rule", ["*=nothing", "guided", "=guided", "act="])
def test_no_such_rule(rule: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match="rule"):
        onnxgbp.convert(linear(), rule=[rule])


@pytest.mark.parametrize(
    "options",
    [
        {"method": "nothing"},
        {"profile": "nothing"},
        {"target": "nothing"},
        {"target": 1.5},
        {"activations": "nothing"},
        {"unit": "a"},
        {"output": "h", "unit": [1.5]},
        {"method": 3},
        {"method": ["guided"]},
        {"methods": 3},
        {"methods": [3]},
        {"rule": 3},
        {"rule": [3]},
        {"rule": [("a", "guided", "b")]},
        {"rule": [("a", 3)]},
        {"wrt": 5},
        {"wrt": [5]},
        {"output": 5},
        {"output": ["h"]},
        {"activations": None},
        {"activations": [3]},
        {"profile": 3},
        {"profile": ["ort"]},
        {"seed": 3},
        {"seed": ["one"]},
        {"target": ["argmax"]},
        {"unit": {}},
    ],
)
def test_no_such_choice(options: dict[str, Any]) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError) as caught:
        onnxgbp.convert(linear(), **options)
    assert "\n" not in str(caught.value)


def test_no_class_axis(tmp_path: Path) -> None:
    message = refused(tmp_path, small_model([node("Relu", ["x"], ["y"])], {"x": ["N", 3, 8, 8]}))
    assert "--unit" in message


# --- writing --------------------------------------------------------------------------------------


def test_output_in_a_missing_folder(tmp_path: Path) -> None:
    assert "cannot write" in refused(tmp_path, linear(), out=tmp_path / "nowhere" / "out.onnx")


def test_output_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "cannot write" in refused(tmp_path, linear(), out=tmp_path / "folder")


def test_output_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot write" in refused(tmp_path, linear(), out=tmp_path / "file" / "out.onnx")


def test_output_on_a_read_only_file_system(tmp_path: Path) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc, the one place where even root cannot write")
    assert "cannot write" in refused(tmp_path, linear(), out=Path("/proc/self/out.onnx"))


def test_a_failed_conversion_keeps_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    refused(tmp_path, b"hello", out=out)
    assert out.read_bytes() == b"old"


# --- wrong usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["convert"],
        ["convert", "net.onnx"],
        ["convert", "-o", "out.onnx"],
        ["convert", "net.onnx", "-o", "out.onnx", "--method", "nothing"],
        ["convert", "net.onnx", "-o", "out.onnx", "--target", "top0"],
        ["convert", "net.onnx", "-o", "out.onnx", "--unit", "a"],
        ["convert", "net.onnx", "-o", "out.onnx", "--profile", "nothing"],
        ["convert", "net.onnx", "-o", "out.onnx", "--nothing"],
        ["convert", "net.onnx", "-o", "out.onnx", "--rule", "guided"],
        ["convert", "net.onnx", "-o", "out.onnx", "--rule", "*=nothing"],
        ["convert", "net.onnx", "-o", "out.onnx", "--activations", "nothing"],
        ["inspect", "net.onnx", "--activations", "relu,nothing"],
        ["explain", "net.onnx", "p.png", "-o", "out", "--mean", "a"],
        ["explain", "net.onnx", "p.png", "-o", "out", "--std", "1,,2"],
        ["inspect"],
        ["verify"],
        ["ops", "--nothing"],
    ],
)
def test_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_as_a_process(tmp_path: Path) -> None:
    """The same through a real process: one line, status 1, nothing written."""
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    command = [sys.executable, "-m", "onnxgbp", "convert", "bad.onnx", "-o", "out.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.onnx"]


@pytest.mark.parametrize("method", ["convert", "load"])
def test_a_proto_without_a_graph(method: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError) as caught:
        getattr(onnxgbp, method)(ModelProto())
    assert "\n" not in str(caught.value)


def test_output_is_the_model_itself(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(linear().SerializeToString())
    assert "the model itself" in refused(tmp_path, path, out=path)
    assert path.read_bytes() == linear().SerializeToString()


def test_output_is_no_regular_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "no regular file" in refused(tmp_path, linear(), out=pipe)
    assert pipe.is_fifo()


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.onnx", tmp_path / "link.onnx"
    link.symlink_to(real)
    onnxgbp.save(onnxgbp.convert(linear()), link)
    assert link.is_symlink()
    assert onnx.load(real) == onnxgbp.convert(linear())


def test_a_weight_is_no_tensor_to_explain(tmp_path: Path) -> None:
    assert "is a weight" in refused(tmp_path, linear(), "--wrt", "w")


# --- operators that are refused with a reason -----------------------------------------------------


def _of_one(operator: str, inputs: list[str], opset: int = 17, domain: str = "", **given: Any) -> onnx.ModelProto:
    """x [N, 4] -> the operator -> y."""
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"], "node", domain=domain, **given)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize(
    ("operator", "domain", "why"),
    [
        ("Bernoulli", "", "it draws random numbers; export the model for inference"),
        ("GroupQueryAttention", "com.microsoft", "it attends with the cache of a text generator"),
        ("MatMulNBits", "com.microsoft", "its weights are packed in ONNX Runtime's own form"),
        ("NhwcFusedConv", "com.microsoft", "ONNX Runtime's optimiser wrote it for one kind of processor"),
        ("RemovePadding", "com.microsoft", "it leaves out the padding between texts"),
    ],
)
def test_an_operator_without_a_gradient_says_why(operator: str, domain: str, why: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=why):
        onnxgbp.convert(_of_one(operator, ["x"], domain=domain), target=0)


def test_sequences_are_refused() -> None:
    model = _of_one("SequenceAt", ["parts", "first"])
    model.graph.node.insert(0, helper.make_node("SplitToSequence", ["x"], ["parts"], "split", axis=0))
    model.graph.initializer.append(helper.make_tensor("first", TensorProto.INT64, [], [0]))
    with pytest.raises(onnxgbp.OnnxgbpError, match="a gradient passes through tensors, not through sequences"):
        onnxgbp.convert(model, target=0)
