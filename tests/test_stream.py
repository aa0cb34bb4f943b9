"""Large weights stay in the bytes that were read, and every way of writing gives the bytes that protobuf would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxgbp import GradientGraph, OnnxgbpError, convert, load, save
from onnxgbp.stream import LARGE, detach

HIDDEN = 200_001  # times 3 halves more than LARGE


def net(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """x [N, 4] -> MatMul, Relu, MatMul, of two large weights, the same at every call."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((4, HIDDEN)), rng.standard_normal((HIDDEN, 3))
    weights = [
        numpy_helper.from_array(w.astype(helper.tensor_dtype_to_np_dtype(dtype)), n) for w, n in ((w1, "a"), (w2, "b"))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    x, y = helper.make_tensor_value_info("x", dtype, ["N", 4]), helper.make_tensor_value_info("y", dtype, ["N", 3])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_weights_are_taken_out_and_come_back(dtype: int, tmp_path: Path) -> None:
    model = net(dtype)
    skeleton, detached = detach(model.SerializeToString())
    assert sorted(detached) == [0, 1]
    assert len(skeleton) < 1000
    for place, raw in detached.items():
        assert bytes(raw) == model.graph.initializer[place].raw_data
    onnx.save(model, tmp_path / "net.onnx")
    held = load(tmp_path / "net.onnx").model.graph.initializers
    for tensor in model.graph.initializer:
        const = held[tensor.name].const_value
        assert const is not None
        np.testing.assert_array_equal(const.numpy(), numpy_helper.to_array(tensor))


def test_both_ways_of_writing_give_the_same_bytes(tmp_path: Path) -> None:
    model = net()
    model.graph.initializer[0].doc_string = "of the first layer"
    onnx.save(model, tmp_path / "net.onnx")
    GradientGraph.build(load(tmp_path / "net.onnx"), methods=["guided"]).save(tmp_path / "streamed.onnx")
    save(convert(tmp_path / "net.onnx"), tmp_path / "whole.onnx")
    assert (tmp_path / "streamed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    written = {tensor.name: tensor for tensor in onnx.load(tmp_path / "streamed.onnx").graph.initializer}
    for tensor in model.graph.initializer:
        assert written[tensor.name] == tensor


def as_float_data(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    numbers = numpy_helper.to_array(tensor)
    tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, numbers.shape, numbers.ravel()))


def with_metadata(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].metadata_props.add(key="made by", value="hand")


def with_a_function(model: onnx.ModelProto) -> None:
    made = helper.make_function(
        "local", "Rectify", ["v"], ["w"], [helper.make_node("Relu", ["v"], ["w"])], model.opset_import
    )
    model.functions.append(made)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node[1].CopyFrom(helper.make_node("Rectify", ["h"], ["r"], domain="local"))


def of_an_old_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 8


def with_a_namesake_in_a_constant(model: onnx.ModelProto) -> None:
    """The tensor of an attribute has a name of its own, which may be a weight's."""
    one = helper.make_node("Constant", [], ["one"], value=helper.make_tensor("a", TensorProto.FLOAT, [1], [1.0]))
    model.graph.node.insert(0, one)
    model.graph.node[2].CopyFrom(helper.make_node("Mul", ["h", "one"], ["s"]))
    model.graph.node.insert(3, helper.make_node("Relu", ["s"], ["r"]))


@pytest.mark.parametrize(
    "change", [as_float_data, with_metadata, with_a_function, of_an_old_opset, with_a_namesake_in_a_constant]
)
def test_what_is_stored_otherwise_is_converted_alike(change: Any, tmp_path: Path) -> None:
    x = {"x": np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)}
    wanted = run(convert(net()), x)
    model = net()
    change(model)
    onnx.save(model, tmp_path / "net.onnx")
    for found in (run(convert(tmp_path / "net.onnx"), x), run(convert(model), x)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["attribution"], feeds)[0]


@pytest.mark.parametrize("change", [1, -1])
def test_a_weight_that_is_not_of_its_shape_is_refused(change: int, tmp_path: Path) -> None:
    model = net()
    model.graph.initializer[1].dims[0] += change
    onnx.save(model, tmp_path / "net.onnx")
    for given in (model, tmp_path / "net.onnx"):
        with pytest.raises(OnnxgbpError, match="tensor 'b' does not hold the numbers of its shape"):
            load(given)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data, file = net().SerializeToString(), tmp_path / "net.onnx"
    for end in (1, 40, 200, LARGE // 2, LARGE + 500, len(data) - 100, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises(OnnxgbpError) as caught:
            load(file)
        assert "\n" not in str(caught.value)


def test_bytes_that_are_no_message_come_back() -> None:
    whole = net().SerializeToString()
    for data in (b"", b"\x08", b"\xff" * 40, b"\x3a\xff\xff\xff\xff\x0f", b"\x0b" + whole, whole + whole):
        assert detach(data) == (data, {})
