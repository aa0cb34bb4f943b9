"""`verify --for`: what stands in the way of a runtime; and what the portable profile may write at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from click.testing import CliRunner
from light import LIGHT, light
from onnx import helper, numpy_helper

import onnxgbp
from onnxgbp.checks.deployment import ONNXRUNTIME
from onnxgbp.checks.row import Check
from onnxgbp.cli import main
from onnxgbp.verify import verify_model

CORPUS = Path(__file__).parent / "data" / "corpus"
RNG = np.random.default_rng(5)


def parse(text: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    model: onnx.ModelProto = onnx.parser.parse_model(text)
    model.graph.initializer.extend(
        numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32) / 2, name)
        for name, shape in weights.items()
    )
    return model


def pools(ir_version: int = 8, opset: int = 17) -> onnx.ModelProto:
    """Square weights in a Conv, a Gemm with transB and a MatMul; a pool whose windows overlap; groups of several."""
    text = f"""
    <ir_version: {ir_version}, opset_import: ["" : {opset}]>
    net (float[N, 4, 9, 8] x) => (float[N, 5] y)
    {{
        a = Conv <pads = [1, 1, 1, 1]> (x, square)
        b = Relu (a)
        c = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (b)
        d = Conv <group = 2> (c, grouped)
        e = Relu (d)
        f = GlobalAveragePool (e)
        g = Flatten (f)
        h = Gemm <transB = 1> (g, turned)
        i = Relu (h)
        j = MatMul (i, straight)
        k = Relu (j)
        y = MatMul (k, last)
    }}
    """
    return parse(text, square=(4, 4, 3, 3), grouped=(6, 2, 2, 2), turned=(6, 6), straight=(6, 6), last=(6, 5))


def rows_for(tmp_path: Path, model: onnx.ModelProto, *runtimes: str) -> list[Check]:
    onnxgbp.save(model, tmp_path / "out.onnx")
    report = verify_model(tmp_path / "out.onnx", runtimes=runtimes)
    return [check for check in report.checks if check.name.startswith("for ")]


def test_the_portable_profile_is_in_nobodys_way(tmp_path: Path) -> None:
    names = ("onnxruntime", "onnxruntime==1.31.0", "openvino", "opencv", "web", "triton", "portable")
    rows = rows_for(tmp_path, onnxgbp.convert(pools(), profile="portable"), *names)
    assert [row.name for row in rows] == ["for " + n for n in ("onnxruntime==1.17", "onnxruntime==1.31", *names[2:])]
    assert all(row.passed and row.detail == "nothing stands in the way" for row in rows), rows


# --- ONNX Runtime's releases ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ir_version", "opset", "release", "said"),
    [
        (10, 17, "1.17", "IR 10 is above 9"),
        (10, 17, "1.18.1", ""),
        (8, 21, "1.17", "opset 21 is above 20"),
        (8, 21, "1.20", ""),
        (11, 22, "1.22", "IR 11 is above 10"),
        (11, 23, "1.23", ""),
        (12, 17, "1.23", "IR 12 is above 11"),
        (12, 24, "1.24", ""),
    ],
)
def test_a_release_reads_so_much(tmp_path: Path, ir_version: int, opset: int, release: str, said: str) -> None:
    (row,) = rows_for(tmp_path, onnxgbp.convert(pools(ir_version, opset)), f"onnxruntime=={release}")
    assert row.passed == (not said), row
    assert said in row.detail


def test_the_table_is_what_the_installed_release_reads() -> None:
    major, minor = onnxruntime.__version__.split(".")[:2]
    release = min((int(major), int(minor)), max(ONNXRUNTIME))  # a newer one than the table knows reads as much
    opset, ir_version, ml = ONNXRUNTIME[release]

    def loads(ir_version: int, opset: int, ml: int) -> bool:
        node = helper.make_node("Normalizer", ["x"], ["y"], domain="ai.onnx.ml", norm="MAX")
        ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy"]
        domains = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", ml)]
        model = onnx.ModelProto(ir_version=ir_version, graph=helper.make_graph([node], "g", ends[:1], ends[1:]))
        model.opset_import.extend(domains)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # noqa: BLE001 - the runtime's exceptions share no base class of their own
            return False
        return True

    assert loads(ir_version, opset, ml)
    if (int(major), int(minor)) > release:
        return
    assert not loads(ir_version + 1, opset, ml)
    assert not loads(ir_version, opset + 1, ml)
    assert not loads(ir_version, opset, ml + 1)


# --- forms ----------------------------------------------------------------------------------------


def tie(model: onnx.ModelProto, weight: str) -> None:
    """What unties a weight is taken out again."""
    made = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Neg"}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == made[made[weight]]:
                node.input[i] = weight


@pytest.mark.parametrize("weight", ["square", "turned", "straight"])
def test_openvino_is_told_of_each_square_weight(tmp_path: Path, weight: str) -> None:
    model = onnxgbp.convert(pools(), profile="portable")
    tie(model, weight)
    (row,) = rows_for(tmp_path, model, "openvino")
    assert not row.passed
    assert row.figure == 1
    assert f"square weight '{weight}' is read in both directions" in row.detail


def test_a_group_of_one_channel_each_is_no_obstacle(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4, 6, 6] x) => (float[N, 4] y)
    { a = Conv <group = 4> (x, w)  b = Relu (a)  c = Conv <group = 4> (b, w)  d = GlobalAveragePool (c)
      y = Flatten (d) }
    """
    (row,) = rows_for(tmp_path, onnxgbp.convert(parse(text, w=(4, 1, 3, 3)), profile="portable"), "portable")
    assert row.passed, row


@pytest.mark.parametrize("runtime", ["openvino", "opencv", "portable"])
def test_masks_of_the_ort_profile_are_for_onnx_runtime(tmp_path: Path, runtime: str) -> None:
    """OpenVINO gives a wrong map of them in silence."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 16, 8, 8] x) => (float[N, 16] y)
    { a = Conv (x, w)  b = Relu (a)  c = Conv (b, v)  d = GlobalAveragePool (c)  y = Flatten (d) }
    """
    source = parse(text, w=(16, 16, 3, 3), v=(16, 16, 1, 1))
    portable, ort = (
        rows_for(tmp_path, onnxgbp.convert(source, profile=profile), runtime)[0] for profile in ("portable", "ort")
    )
    assert "its gates are masks" in ort.detail
    assert ort.detail.endswith("Convert it with --profile portable")
    assert "masks" not in portable.detail


def test_the_way_out_is_the_portable_profile(tmp_path: Path) -> None:
    model = onnxgbp.convert(pools(), profile="portable")
    tie(model, "turned")
    (entry,) = (entry for entry in model.metadata_props if entry.key == "onnxgbp.profile")
    entry.value = "ort"
    (row,) = rows_for(tmp_path, model, "openvino")
    assert row.detail.endswith("Convert it with --profile portable")


def dead(op_type: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    def plant(model: onnx.ModelProto) -> None:
        numbers = {"indices": np.zeros((1, 4), np.int64), "depth": np.array(3), "values": np.array([0, 1], np.float32)}
        numbers |= {"pads": np.array([0, 0, -1, 0, 0, 0, 0, 0]), "image": np.array([4, 4]), "block": np.array([1, 1])}
        numbers |= {"places": np.zeros((1, 4, 1, 1), np.int64), "one": np.ones((1, 4, 1, 1), np.float32)}
        numbers |= {"kernel": np.ones((4, 1, 3, 3), np.float32), "columns": np.ones((1, 4, 16), np.float32)}
        numbers |= {"groups": np.ones((4, 2, 3, 3), np.float32), "yes": np.array(True)}
        used = [name for name in numbers if name in inputs]
        model.graph.initializer.extend(numpy_helper.from_array(numbers[name], name) for name in used)
        names = [f"planted{i}" for i in range(outputs)]
        model.graph.node.append(helper.make_node(op_type, inputs, names, name="planted", **attributes))

    return plant


BRANCH = helper.make_graph(
    [helper.make_node("Identity", ["x"], ["branch"])], "b", [], [helper.make_empty_tensor_value_info("branch")]
)


@pytest.mark.parametrize(
    ("plant", "said", "web"),
    [
        (dead("MaxPool", ["x"], 2, kernel_shape=[2, 2]), "MaxPool with Indices", True),
        (dead("ScatterElements", ["x", "places", "one"]), "is ScatterElements", True),
        (dead("OneHot", ["indices", "depth", "values"]), "is OneHot", False),
        (dead("Col2Im", ["columns", "image", "block"]), "is Col2Im", False),
        (dead("If", ["yes"], then_branch=BRANCH, else_branch=BRANCH), "is If", False),
        (dead("ConvTranspose", ["x", "kernel"], output_shape=[20, 20]), "with output_shape", False),
        (dead("ConvTranspose", ["x", "groups"], group=2), "several inputs a group", False),
        (dead("Pad", ["x", "pads"]), "a negative pad", False),
    ],
    ids=["indices", "scatter", "onehot", "col2im", "if", "output_shape", "groups", "pad"],
)
def test_a_form_is_named(tmp_path: Path, plant: Callable[[onnx.ModelProto], None], said: str, web: bool) -> None:
    model = onnxgbp.convert(pools(opset=18), profile="portable")
    plant(model)
    portable, opencv, browser, openvino = rows_for(tmp_path, model, "portable", "opencv", "web", "openvino")
    assert portable.figure == opencv.figure == 1
    assert "node 'planted' is" in portable.detail
    assert said in portable.detail
    assert browser.passed != web
    assert openvino.passed


# --- a server that batches ------------------------------------------------------------------------


def test_a_heatmap_is_scaled_by_sample(tmp_path: Path) -> None:
    (row,) = rows_for(tmp_path, onnxgbp.convert(pools(), view="abs", reduce="sum", heatmap=True), "triton")
    assert row.passed, row


def test_what_hangs_on_the_batch_is_named(tmp_path: Path) -> None:
    model = onnxgbp.convert(pools(), profile="portable")
    shared = helper.make_tensor_value_info("shared", onnx.TensorProto.FLOAT, None)
    model.graph.node.append(helper.make_node("Div", ["attribution", "total"], ["shared"]))
    model.graph.node.append(helper.make_node("ReduceMax", ["attribution"], ["total"], keepdims=0))
    model.graph.output.extend([shared, helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, [])])
    (row,) = rows_for(tmp_path, model, "triton")
    assert row.figure == 2
    assert "output 'total' has shape [] for 3 samples" in row.detail
    assert "output 'shared' of a sample changes with the other samples of its batch" in row.detail


def test_a_fixed_batch_cannot_be_batched(tmp_path: Path) -> None:
    source = pools()
    for value in (*source.graph.input, *source.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    (row,) = rows_for(tmp_path, onnxgbp.convert(source), "triton")
    assert "input 'x' has no free batch" in row.detail


def test_a_list_of_maps_is_no_tensor(tmp_path: Path) -> None:
    (row,) = rows_for(tmp_path, onnxgbp.convert(CORPUS / "skl_mlp_relu.zipmap.onnx"), "triton")
    assert "is no tensor" in row.detail


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorrt", "no runtime is called 'tensorrt': choose one of onnxruntime, openvino"),
        ("onnxruntime==1.16", "known of 1.17 to 1."),
        ("onnxruntime==new", "known of 1.17 to 1."),
        ("openvino==2025.1", "write openvino"),
    ],
)
def test_another_runtime_is_a_usage_error(tmp_path: Path, text: str, said: str) -> None:
    onnxgbp.save(onnxgbp.convert(pools()), tmp_path / "out.onnx")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out.onnx"), "--for", text])
    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")


def test_the_gate(tmp_path: Path) -> None:
    out = str(tmp_path / "out.onnx")
    onnxgbp.save(onnxgbp.convert(pools(10)), out)
    runtimes = ["--for", "onnxruntime==1.17", "--for", "onnxruntime==1.20", "--for", "triton"]
    result = CliRunner().invoke(main, ["verify", out, *runtimes, "--json"])
    assert result.exit_code == 1
    passed = {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}
    assert list(passed)[-3:] == ["for onnxruntime==1.17", "for onnxruntime==1.20", "for triton"]
    assert [name for name, fine in passed.items() if not fine] == ["for onnxruntime==1.17"]


# --- what the portable profile writes -------------------------------------------------------------

# Each was right in every runtime of the measured ones that the profile is for, alone and together.
PORTABLE = frozenset(
    "Add And ArgMax Cast Concat Constant Conv ConvTranspose Div Equal Erf Exp Expand Gather Greater Less MatMul Max "
    "Min Mul Neg Pad Pow ReduceMean ReduceSum Relu Reshape Shape Sigmoid Slice Split Sqrt Sub Transpose Unsqueeze "
    "Where".split()
)
SOURCES: dict[str, Callable[[], onnx.ModelProto]] = {
    path.stem: (lambda path=path: onnx.load(path)) for path in sorted(CORPUS.glob("*.onnx"))
} | {name: (lambda name=name: light(name, dynamic=True)) for name in LIGHT}


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


@pytest.mark.parametrize("name", SOURCES)
def test_the_portable_profile_keeps_to_its_list(name: str) -> None:
    source = SOURCES[name]()
    own = {output for node in source.graph.node for output in node.output}
    before = {node.op_type for node in source.graph.node}
    graphs = [onnxgbp.convert(source, method=method, profile="portable") for method in ("guided", "gradient")]
    for model in graphs:
        arrays = {tensor.name: tensor for tensor in model.graph.initializer}
        added = [node for node in model.graph.node if not own & set(node.output)]
        negated = {node.output[0]: node.input[0] for node in added if node.op_type == "Neg"}
        assert {node.op_type for node in added} <= PORTABLE | (before & {"Identity"})
        assert not model.functions
        for node in added:
            assert not any(a.HasField("g") or a.graphs for a in node.attribute)
            if node.op_type == "ConvTranspose":
                assert not attribute(node, "output_shape", None)
                group, weight = attribute(node, "group", 1), node.input[1]
                weight = negated[negated[weight]] if weight in negated else weight  # untied
                assert group == 1 or list(arrays[weight].dims[:2]) == [group, 1]
            if node.op_type == "Pad":
                pads = attribute(node, "pads", None)
                known = numpy_helper.to_array(arrays[node.input[1]]) if pads is None and node.input[1] in arrays else []
                assert all(pad >= 0 for pad in (pads if pads is not None else known))
