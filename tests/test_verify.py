"""`onnxgbp verify`: a correct file passes, and every planted fault is a failing row and not a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import onnxgbp
from onnxgbp.cli import main
from onnxgbp.float64 import evaluator, to_float64
from onnxgbp.verify import Check, Report, verify_model

RNG = np.random.default_rng(3)

CONVOLUTIONAL = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 2, 9, 8] x) => (float[N, 5] p)
{
    a = Conv <kernel_shape = [3, 3], pads = [1, 0, 1, 1]> (x, w1)
    b = Relu (a)
    c = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (b)
    d = Conv <kernel_shape = [2, 2], strides = [1, 1], group = 2> (c, w2)
    e = Clip (d, zero, six)
    f = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (e)
    g = Flatten (f)
    y = Gemm (g, w3)
    p = Softmax (y)
}
"""


def convolutional() -> onnx.ModelProto:
    model = onnx.parser.parse_model(CONVOLUTIONAL)
    weights = {
        "w1": RNG.standard_normal((6, 2, 3, 3)) / 3,
        "w2": RNG.standard_normal((4, 3, 2, 2)) / 2,
        "w3": RNG.standard_normal((24, 5)) / 3,
        "zero": np.array(0.0),
        "six": np.array(6.0),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()
    )
    return model


MODEL = convolutional()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(MODEL, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def made(source: Path, change: Callable[[onnx.ModelProto], None] = lambda _: None, **options: Any) -> Path:
    model = onnxgbp.convert(source, **options)
    change(model)
    out = source.with_name("out.onnx")
    onnxgbp.save(model, out)
    return out


def failing(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def row(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("method", ["gradient", "deconvnet", "guided"])
def test_a_correct_file_passes(source: Path, method: str, profile: str) -> None:
    out = made(source, method=method, profile=profile)
    report = verify_model(out, source)
    assert report.passed, report.to_text()
    assert row(report, "attribution").figure < 1e-6
    assert "float64" in row(report, "attribution").detail
    assert "batch 1 and 3" in row(report, "forward unchanged").detail
    assert verify_model(out).passed


@pytest.mark.parametrize(
    "options",
    [
        {"target": 4},
        {"target": "input"},
        {"target": "seed"},
        {"output": "e", "unit": "3"},
        {"output": "b", "unit": "1,4,2"},
        {"output": "p"},
        {"target": "top3"},
        {"target": "input2"},
        {"seed": "activation"},
        {"output": "e", "unit": "max"},
        {"output": "b", "unit": "1,2:5,max", "seed": "activation"},
        {"output": "b", "unit": ":,4"},
        {"methods": "gradient,guided,rectgrad:80"},
        {"methods": "guided,as-relu", "wrt": ["x", "c"], "target": "top2"},
        {"wrt": ["c"]},
        {"wrt": ["x", "c"]},
        {"rule": ["b=gradient", "Relu*=deconvnet"]},
        {"activations": "relu"},
    ],
    ids=str,
)
def test_every_option_passes(source: Path, options: dict[str, Any]) -> None:
    if "rule" in options:
        model = onnx.load(source)
        model.graph.node[1].name, model.graph.node[4].name = "b", "Relu6"
        onnx.save(model, source)
    out = made(source, **options)
    for report in (verify_model(out, source), verify_model(out)):
        assert report.passed, report.to_text()


def test_a_fixed_batch_passes(source: Path) -> None:
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, source)
    report = verify_model(made(source), source)
    assert report.passed, report.to_text()
    assert "as fixed" in row(report, "forward unchanged").detail


def test_an_input_that_nothing_reads_is_fed_all_the_same(source: Path) -> None:
    model = onnx.load(source)
    model.graph.input.append(onnx.helper.make_tensor_value_info("unread", onnx.TensorProto.INT64, ["N"]))
    onnx.save(model, source)
    out = made(source, wrt=["x"])
    for report in (verify_model(out, source), verify_model(out)):
        assert report.passed, report.to_text()


def test_the_same_file_gives_the_same_report(source: Path) -> None:
    out = made(source)
    assert verify_model(out, source) == verify_model(out, source)


def flip_mask(model: onnx.ModelProto) -> None:
    """The activation gate lets through what it should block."""
    mask = next(node for node in model.graph.node if node.op_type == "Where")
    mask.input[1], mask.input[2] = mask.input[2], mask.input[1]


def drop_relu(model: onnx.ModelProto) -> None:
    """One activation is left plain: its gradient is not rectified."""
    relu = next(node for node in model.graph.node if node.op_type == "Relu" and node.name.startswith("gradient/"))
    relu.op_type = "Identity"


def round_map(model: onnx.ModelProto) -> None:
    """The map is computed in bfloat16."""
    maker = next(node for node in model.graph.node if "attribution" in node.output)
    maker.output[0] = "exact"
    model.graph.node.extend(
        [
            onnx.helper.make_node("Cast", ["exact"], ["rounded"], to=onnx.TensorProto.BFLOAT16),
            onnx.helper.make_node("Cast", ["rounded"], ["attribution"], to=onnx.TensorProto.FLOAT),
        ]
    )


def wrong_target(model: onnx.ModelProto) -> None:
    maker = next(node for node in model.graph.node if "attribution_target" in node.output)
    name = maker.output[0]
    maker.output[0] = "right"
    for node in model.graph.node:
        for i, source in enumerate(node.input):
            if source == name:
                node.input[i] = "right"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    model.graph.node.append(onnx.helper.make_node("Add", ["right", "one"], [name]))


@pytest.mark.parametrize("change", [flip_mask, drop_relu, round_map, wrong_target])
@pytest.mark.parametrize("given", [True, False], ids=["source", "alone"])
def test_a_wrong_map_is_caught(source: Path, change: Callable[[onnx.ModelProto], None], given: bool) -> None:
    report = verify_model(made(source, change), source if given else None)
    assert "attribution reproduced" in failing(report), report.to_text()
    assert failing(report) <= {"attribution reproduced", "runtime"}  # nothing else is blamed


def test_a_wrong_plain_gradient_fails_against_finite_differences(source: Path) -> None:
    report = verify_model(made(source, flip_mask, method="gradient"), source)
    assert {"attribution", "attribution reproduced"} <= failing(report)


def swap_weight(model: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w3")
    array = numpy_helper.to_array(weight)[:, [1, 0, 2, 3, 4]]
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), "w3"))


def test_a_swapped_weight_is_caught_and_named(source: Path) -> None:
    report = verify_model(made(source, swap_weight), source)
    assert {"forward structure", "forward unchanged"} <= failing(report)
    assert "weight 'w3' differs" in row(report, "forward structure").detail


def change_output(model: onnx.ModelProto) -> None:
    """The scores are a little larger."""
    maker = next(node for node in model.graph.node if "p" in node.output)
    maker.output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1.001, np.float32), "more"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "more"], ["p"]))


def change_attribute(model: onnx.ModelProto) -> None:
    pool = next(node for node in model.graph.node if node.op_type == "AveragePool")
    pool.attribute.append(onnx.helper.make_attribute("count_include_pad", 1))


@pytest.mark.parametrize(("change", "named"), [(change_output, "Mul"), (change_attribute, "count_include_pad")])
def test_a_changed_output_is_caught(source: Path, change: Callable[[onnx.ModelProto], None], named: str) -> None:
    report = verify_model(made(source, change), source)
    assert {"forward structure", "forward unchanged"} <= failing(report)
    assert named in row(report, "forward structure").detail


def private_operator(model: onnx.ModelProto) -> None:
    relu = next(node for node in model.graph.node if node.op_type == "Relu" and node.name.startswith("gradient/"))
    relu.domain, relu.op_type = "com.microsoft", "QuickGelu"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def dead_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Neg", ["attribution"], ["unread"], name="unread"))


def local_function(model: onnx.ModelProto) -> None:
    identity = onnx.helper.make_node("Identity", ["a"], ["b"])
    opset = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("own", "kept", ["a"], ["b"], [identity], opset))


@pytest.mark.parametrize(
    ("change", "named"), [(private_operator, "QuickGelu"), (dead_node, "'unread'"), (local_function, "kept")]
)
def test_what_is_not_plain_is_caught(source: Path, change: Callable[[onnx.ModelProto], None], named: str) -> None:
    report = verify_model(made(source, change), source)
    assert "standard operators" in failing(report)
    assert named in row(report, "standard operators").detail


def forget(model: onnx.ModelProto) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == "onnxgbp.rules")
    model.metadata_props.remove(entry)


def test_missing_metadata_is_named(source: Path) -> None:
    report = verify_model(made(source, forget), source)
    assert "onnxgbp.rules" in row(report, "recorded facts").detail
    assert {"recorded facts", "attribution reproduced"} <= failing(report)


def test_another_source_is_a_failing_row(source: Path) -> None:
    out = made(source)
    other = source.with_name("other.onnx")
    model = onnx.load(source)
    swap_weight(model)
    onnx.save(model, other)
    report = verify_model(out, other)
    assert {"source file", "forward structure", "forward unchanged"} <= failing(report)
    assert not {"attribution", "attribution reproduced"} & failing(report)  # the file itself is whole


def test_a_source_with_other_inputs_is_a_failing_row(source: Path) -> None:
    out = made(source)
    other = source.with_name("other.onnx")
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[2] z) => (float[2] y) { y = Relu (z) }'
        ),
        other,
    )
    report = verify_model(out, other)
    assert {"source file", "forward structure", "forward unchanged"} <= failing(report)


def test_an_older_opset_that_had_to_be_raised_is_said(source: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 4, opset_import: ["" : 7]> g (float[N, 3] x) => (float[N, 3] y) { a = Relu (x)  y = Sigmoid (a) }'
    )
    onnx.save(model, source)
    report = verify_model(made(source), source)
    assert report.passed, report.to_text()
    assert "raised from opset 7" in row(report, "recorded facts").detail


def test_token_inputs_and_an_embedding(source: Path) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (int64[N, T] ids, int64[N, T] mask) => (float[N, 4] y)
        <float[12, 6] table, float[6, 4] w>
        {
            e = Gather (table, ids)
            m = Cast <to = 1> (mask)
            axes = Constant <value_ints = [2]> ()
            n = Unsqueeze (m, axes)
            k = Mul (e, n)
            t = Tanh (k)
            s = ReduceMean <axes = [1], keepdims = 0> (t)
            y = MatMul (s, w)
        }
        """
    )
    for tensor in list(model.graph.initializer):
        model.graph.initializer.remove(tensor)
    weights = {"table": RNG.standard_normal((12, 6)), "w": RNG.standard_normal((6, 4))}
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items())
    onnx.save(model, source)
    report = verify_model(made(source, wrt=["e"]), source)
    assert report.passed, report.to_text()


def test_the_command(source: Path) -> None:
    good, runner = made(source), CliRunner()
    passed = runner.invoke(main, ["verify", str(good), "--source", str(source)])
    assert passed.exit_code == 0
    assert passed.stdout.splitlines()[-1].endswith("verified")
    bad = made(source, flip_mask)
    failed = runner.invoke(main, ["verify", str(bad), "--json"])
    assert failed.exit_code == 1
    told = json.loads(failed.stdout)
    assert not told["passed"]
    assert set(told) == {"file", "source", "passed", "checks"}
    assert set(told["checks"][0]) == {"name", "passed", "detail", "figure", "tolerance"}
    rows = [
        "recorded facts",
        "standard operators",
        "forward unchanged",
        "attribution",
        "attribution reproduced",
        "runtime",
    ]
    assert [check["name"] for check in told["checks"]] == rows  # scripts rely on them
    assert "FAIL  attribution reproduced" in runner.invoke(main, ["verify", str(bad)]).stdout
    whole = json.loads(runner.invoke(main, ["verify", str(made(source)), "--source", str(source), "--json"]).stdout)
    assert [check["name"] for check in whole["checks"]][2:4] == ["source file", "forward structure"]


def narrow_step(model: onnx.ModelProto) -> None:
    """One step in the middle of the gradient is taken in bfloat16."""
    step = next(n for n in model.graph.node if n.op_type == "ConvTranspose" and n.name.startswith("gradient/"))
    name = step.output[0]
    step.output[0] = "exact"
    model.graph.node.extend(
        [
            onnx.helper.make_node("Cast", ["exact"], ["rounded"], to=onnx.TensorProto.BFLOAT16),
            onnx.helper.make_node("Cast", ["rounded"], [name], to=onnx.TensorProto.FLOAT),
        ]
    )


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (flip_mask, "attribution reproduced"),
        (swap_weight, "forward structure"),
        (change_output, "forward unchanged"),
        (round_map, "attribution reproduced"),
        (narrow_step, "attribution reproduced"),
    ],
)
def test_the_gate_names_the_row_of_each_planted_fault(
    source: Path, change: Callable[[onnx.ModelProto], None], row: str
) -> None:
    arguments = ["verify", str(made(source, change)), "--source", str(source), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert row in {check["name"] for check in told["checks"] if not check["passed"]}
    made(source)  # the same file without the fault
    assert CliRunner().invoke(main, arguments).exit_code == 0


def test_the_row_that_runs_the_file_says_where_and_to_what_tolerance(source: Path) -> None:
    out = made(source)
    (check,) = (c for c in verify_model(out, source, provider="auto", tolerance=1e-6).checks if c.name == "runtime")
    assert check.passed
    assert check.tolerance == 1e-6
    assert "onnxruntime on c" in check.detail  # cpu, or cuda where the machine has one
    assert "in float64 on the reference evaluator" in check.detail
    with pytest.raises(onnxgbp.OnnxgbpError, match="tolerance 2 is no bound"):
        verify_model(out, source, tolerance=2)


def test_cuda_is_cuda_or_a_failing_row(source: Path) -> None:
    check = row(verify_model(made(source), source, provider="cuda"), "runtime")
    assert check.passed == ("onnxruntime on cuda" in check.detail)
    assert check.passed or "CUDA" in check.detail


@pytest.mark.parametrize("what", ["source", "truncated", "text", "missing"])
def test_what_is_no_converted_file_is_refused_in_one_line(source: Path, what: str) -> None:
    out = made(source)
    if what == "source":
        out = source
    elif what == "truncated":
        out.write_bytes(out.read_bytes()[: out.stat().st_size // 2])
    elif what == "text":
        out.write_text("no model")
    else:
        out.unlink()
    result = CliRunner().invoke(main, ["verify", str(out)])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(out) in result.stderr


def test_float64_widens_every_float() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float16[N] x) => (float16[N] y) <float third = {0.5}>
        {
            c = Cast <to = 1> (x)
            k = Constant <value_float = 0.25> ()
            l = Constant <value_floats = [0.125]> ()
            s = Constant <value_ints = [1]> ()
            z = ConstantOfShape (s)
            a = Add (c, third)
            b = Mul (a, k)
            d = Add (b, l)
            e = Add (d, z)
            y = Cast <to = 10> (e)
        }
        """
    )
    wide = to_float64(model)
    x = np.array([1 / 3, -2.0])
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16  # the argument is not touched
    (y,) = evaluator(wide).run(None, {"x": x})
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, (x + 0.5) * 0.25 + 0.125, rtol=1e-15)
