"""What a converted file promises: its inputs, outputs, metadata, and that it is one plain ONNX model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, ort_run, small_model
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

import onnxgbp

CORPUS = Path(__file__).parent / "data" / "corpus"
METHODS = ("gradient", "deconvnet", "guided")
PROFILES = ("ort", "portable")


def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, **attributes)


def net(batch: int | str | None = "N", *, opset: int = 17) -> ModelProto:
    """x [N, 3, 8, 8] -> Conv, Relu, MaxPool, Conv, LeakyRelu, Flatten, Gemm, Softmax -> probabilities [N, 5]."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:]) / 2))

    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["a1"], name="relu1"),
        node("MaxPool", ["a1"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w2"], ["c2"], name="conv2"),
        node("LeakyRelu", ["c2"], ["a2"], name="leaky2", alpha=0.1),
        node("Flatten", ["a2"], ["f"], name="flat"),
        node("Gemm", ["f", "w3", "b3"], ["logits"], name="fc", transB=1),
        node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
    ]
    constants = {
        "w1": weight(4, 3, 3, 3),
        "b1": weight(4, 1).ravel(),
        "w2": weight(6, 4, 3, 3),
        "w3": weight(5, 24),
        "b3": weight(5, 1).ravel(),
    }
    return small_model(nodes, {"x": [batch, 3, 8, 8]}, ("probabilities",), constants, opset=opset)


def photos(count: int = 3) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)}


def metadata(model: ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def dims(value: ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


# --- inputs and outputs ---------------------------------------------------------------------------


def test_inputs_and_outputs() -> None:
    source, converted = net(), onnxgbp.convert(net())
    assert list(converted.graph.input) == list(source.graph.input)
    assert list(converted.graph.output[:1]) == list(source.graph.output)
    attribution, target = converted.graph.output[1:]
    assert attribution.name == "attribution"
    assert attribution.type == source.graph.input[0].type
    assert target.name == "attribution_target"
    assert target.type.tensor_type.elem_type == TensorProto.INT64
    assert dims(target) == ["N"]


def test_target_input() -> None:
    converted = onnxgbp.convert(net(), target="input")
    source_input, target = converted.graph.input
    assert source_input == net().graph.input[0]
    assert (target.name, target.type.tensor_type.elem_type, dims(target)) == ("target", TensorProto.INT64, ["N"])


def test_seed_input() -> None:
    converted = onnxgbp.convert(net(), target="seed")
    _, seed = converted.graph.input
    assert (seed.name, seed.type.tensor_type.elem_type, dims(seed)) == ("seed", TensorProto.FLOAT, ["N", 5])


def test_several_wrt() -> None:
    converted = onnxgbp.convert(net(), wrt=["x", "a1"])
    names = [value.name for value in converted.graph.output]
    assert names == ["probabilities", "attribution_x", "attribution_a1", "attribution_target"]
    results = ort_run(converted, photos())
    alone = ort_run(onnxgbp.convert(net(), wrt="x"), photos())
    assert np.array_equal(results["attribution_x"], alone["attribution"])
    assert results["attribution_a1"].shape == (3, 4, 8, 8)


def test_the_order_of_wrt_is_kept() -> None:
    names = [value.name for value in onnxgbp.convert(net(), wrt=["a1", "x"]).graph.output]
    assert names[1:3] == ["attribution_a1", "attribution_x"]


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(net().SerializeToString())
    source = onnx.load(path)
    source.metadata_props.add(key="author", value="someone")
    path.write_bytes(source.SerializeToString())
    said = metadata(onnxgbp.convert(path, method="deconvnet", rule=["relu1=guided"], profile="portable"))
    assert said["author"] == "someone"
    ours = {key.removeprefix("onnxgbp."): value for key, value in said.items() if key.startswith("onnxgbp.")}
    assert ours["version"] == importlib.metadata.version("onnxgbp")
    assert ours["method"] == "deconvnet"
    assert json.loads(ours["rules"]) == ["relu1=guided", "*=deconvnet"]
    assert ours["explained"] == "logits"
    assert json.loads(ours["wrt"]) == ["x"]
    assert ours["profile"] == "portable"
    assert ours["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_softmax_is_walked_back_over_and_said() -> None:
    assert "softmax" in metadata(onnxgbp.convert(net()))["onnxgbp.stripped"]
    assert metadata(onnxgbp.convert(net(), output="probabilities"))["onnxgbp.explained"] == "probabilities"


# --- one plain model ------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 20])
def test_a_plain_model(opset: int, method: str, profile: str) -> None:
    source = net(opset=opset)
    if opset == 7:  # the oldest: it is raised
        source.ir_version = 3
        for tensor in source.graph.initializer:
            source.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    converted = onnxgbp.convert(source, method=method, profile=profile)
    onnx.checker.check_model(converted, full_check=True)
    assert {entry.domain for entry in converted.opset_import} <= {"", "ai.onnx"}
    assert {n.domain for n in converted.graph.node} == {""}
    assert not converted.functions
    assert converted.opset_import[0].version == max(opset, 9)
    assert converted.ir_version == source.ir_version
    before, after = ort_run(source, photos()), ort_run(converted, photos())
    assert np.array_equal(before["probabilities"], after["probabilities"])
    assert after["attribution"].shape == (3, 3, 8, 8)


def test_no_dead_node() -> None:
    graph = onnxgbp.convert(net()).graph
    read = {name for n in graph.node for name in n.input} | {value.name for value in graph.output}
    assert all(any(output in read for output in n.output) for n in graph.node)
    assert {tensor.name for tensor in graph.initializer} <= read


def test_no_gradients_of_weights() -> None:
    """No new node makes a tensor of a weight's shape: what leaves is no larger than what a forward tensor is."""
    converted = onnxgbp.convert(net(batch=2), method="gradient")
    weights = {tuple(tensor.dims) for tensor in net().graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(converted, strict_mode=True, data_prop=True)
    made = {value.name: tuple(dims(value)) for value in inferred.graph.value_info}
    forward = {name for n in net().graph.node for name in n.output}
    assert not {
        name: shape for name, shape in made.items() if shape in weights and name not in forward and len(shape) > 1
    }


def test_the_forward_nodes_stand_unchanged() -> None:
    source, converted = net(), onnxgbp.convert(net())
    kept = [n for n in converted.graph.node if n.name in {m.name for m in source.graph.node}]
    assert [(n.op_type, list(n.input), list(n.output)) for n in kept] == [
        (n.op_type, list(n.input), list(n.output)) for n in source.graph.node
    ]
    for mine, theirs in zip(kept, source.graph.node, strict=True):
        assert sorted(mine.attribute, key=lambda a: a.name) == sorted(theirs.attribute, key=lambda a: a.name)


def test_the_weights_are_stored_once() -> None:
    source, converted = net(), onnxgbp.convert(net())
    assert converted.ByteSize() < source.ByteSize() + 8000


def test_names_are_unique() -> None:
    graph = onnxgbp.convert(net()).graph
    made = [output for n in graph.node for output in n.output if output]
    assert len(made) == len(set(made))
    names = [n.name for n in graph.node]
    assert len(names) == len(set(names))


def test_the_same_bytes_each_time() -> None:
    one, two = (onnxgbp.convert(net(), method="guided") for _ in range(2))
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)


def test_a_path_and_a_proto_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(net().SerializeToString())
    assert onnxgbp.convert(path).graph == onnxgbp.convert(onnx.load(path)).graph


def test_the_source_proto_is_left_alone() -> None:
    source = net()
    before = source.SerializeToString(deterministic=True)
    onnxgbp.convert(source)
    assert source.SerializeToString(deterministic=True) == before


# --- batch and target -----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", METHODS)
def test_any_batch(method: str, profile: str) -> None:
    converted = onnxgbp.convert(net(), method=method, profile=profile)
    together = ort_run(converted, photos(5))
    for sample in range(5):
        alone = ort_run(converted, {"x": photos(5)["x"][sample : sample + 1]})
        assert np.allclose(alone["attribution"][0], together["attribution"][sample], rtol=1e-4, atol=1e-6)
        assert alone["attribution_target"][0] == together["attribution_target"][sample]


def test_a_fixed_batch_stays_fixed() -> None:
    converted = onnxgbp.convert(net(batch=2), target="input")
    assert dims(converted.graph.output[1]) == [2, 3, 8, 8]
    assert dims(converted.graph.input[1]) == [2]
    assert dims(converted.graph.output[2]) == [2]


def test_argmax_is_the_default_and_minus_one() -> None:
    given, default = onnxgbp.convert(net(), target="input"), ort_run(onnxgbp.convert(net()), photos())
    best = default["probabilities"].argmax(1)
    assert np.array_equal(default["attribution_target"], best)
    results = ort_run(given, {**photos(), "target": np.array([-1, int(best[1]), -1])})
    assert np.array_equal(results["attribution"], default["attribution"])
    assert np.array_equal(results["attribution_target"], best)


@pytest.mark.parametrize("target", range(5))
def test_each_class(target: int) -> None:
    fixed = ort_run(onnxgbp.convert(net(), target=target), photos())
    fed = ort_run(onnxgbp.convert(net(), target="input"), {**photos(), "target": np.full(3, target)})
    assert np.array_equal(fixed["attribution"], fed["attribution"])
    assert fixed["attribution_target"].tolist() == [target] * 3
    assert fed["attribution_target"].tolist() == [target] * 3


@pytest.mark.parametrize("wrong", [5, 1000, -2, -5, -6, -(2**40)])
def test_a_class_out_of_range_fails_in_the_file(wrong: int) -> None:
    converted = onnxgbp.convert(net(), target="input")
    with pytest.raises(Exception, match=r"(?i)ind"):
        ort_run(converted, {**photos(), "target": np.array([0, wrong, 1])})


def test_any_weighting_is_linear_for_the_gradient() -> None:
    weighed = onnxgbp.convert(net(), method="gradient", target="seed")
    single = onnxgbp.convert(net(), method="gradient", target="input")
    weights = np.random.default_rng(4).standard_normal((3, 5)).astype(np.float32)
    combined = ort_run(weighed, {**photos(), "seed": weights})["attribution"]
    total = np.zeros_like(combined, np.float64)
    for c in range(5):
        gradient = ort_run(single, {**photos(), "target": np.full(3, c)})["attribution"]
        total += weights[:, c].reshape(-1, 1, 1, 1).astype(np.float64) * gradient
    assert np.allclose(combined, total, rtol=1e-4, atol=1e-5)


# --- inner tensors --------------------------------------------------------------------------------


def test_unit_is_a_channel() -> None:
    channel = ort_run(onnxgbp.convert(net(), output="c1", unit=2, method="gradient"), photos())
    seed = np.zeros((3, 4, 8, 8), np.float32)
    seed[:, 2] = 1
    weighed = ort_run(onnxgbp.convert(net(), output="c1", target="seed", method="gradient"), {**photos(), "seed": seed})
    assert np.array_equal(channel["attribution"], weighed["attribution"])
    assert channel["attribution_target"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("unit", ["2,5,6", (2, 5, 6), [2, 5, 6]])
def test_unit_is_a_channel_and_a_position(unit: Any) -> None:
    results = ort_run(onnxgbp.convert(net(), output="c1", unit=unit, method="gradient"), photos())
    weight = next(onnx.numpy_helper.to_array(t) for t in net().graph.initializer if t.name == "w1")
    want = np.zeros((3, 3, 10, 10), np.float32)
    want[:, :, 5:8, 6:9] = weight[2]  # padded by one
    assert np.allclose(results["attribution"], want[:, :, 1:-1, 1:-1])


def test_an_inner_output_needs_a_unit_or_a_seed() -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match="--unit"):
        onnxgbp.convert(net(), output="c1")


def test_an_inner_output_with_a_class_axis() -> None:
    converted = onnxgbp.convert(net(), output="f", target=7)
    assert metadata(converted)["onnxgbp.explained"] == "f"
    assert ort_run(converted, photos())["attribution_target"].tolist() == [7, 7, 7]


def test_wrt_is_an_inner_tensor() -> None:
    converted = onnxgbp.convert(net(), wrt="f", method="gradient", target=3)
    weight = next(onnx.numpy_helper.to_array(t) for t in net().graph.initializer if t.name == "w3")
    assert np.allclose(ort_run(converted, photos())["attribution"], np.tile(weight[3], (3, 1)))


def test_a_softmax_at_the_end_changes_the_gradient() -> None:
    before = ort_run(onnxgbp.convert(net(), method="gradient"), photos())
    behind = ort_run(onnxgbp.convert(net(), method="gradient", output="probabilities"), photos())
    assert not np.allclose(before["attribution"], behind["attribution"])


# --- one graph, many rules ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"target": "input"}, {"output": "c2", "unit": 1}, {"wrt": ["x", "a1"]}])
def test_one_graph_under_several_rules(options: dict[str, Any]) -> None:
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(net()), **options)
    for method in METHODS:
        for profile in PROFILES:
            once = graph.render(method=method, profile=profile)
            again = onnxgbp.convert(net(), method=method, profile=profile, **options)
            assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_profiles_agree(method: str) -> None:
    results = [ort_run(onnxgbp.convert(net(), method=method, profile=profile), photos()) for profile in PROFILES]
    assert np.allclose(results[0]["attribution"], results[1]["attribution"], rtol=1e-4, atol=1e-6)


# --- writing --------------------------------------------------------------------------------------


def test_save(tmp_path: Path) -> None:
    converted = onnxgbp.convert(net())
    onnxgbp.save(converted, tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == converted
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_save_replaces(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"old")
    onnxgbp.save(onnxgbp.convert(net()), str(tmp_path / "out.onnx"))
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "nowhere" / "out.onnx"):
        with pytest.raises(onnxgbp.OnnxgbpError, match="cannot write"):
            onnxgbp.save(onnxgbp.convert(net()), path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# --- sources as exporters write them --------------------------------------------------------------


def _renamed(model: ModelProto) -> ModelProto:
    for n in model.graph.node:
        n.name = ""
    return model


def _weights_are_inputs(model: ModelProto) -> ModelProto:
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def _weights_are_constants(model: ModelProto) -> ModelProto:
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, node("Constant", [], [tensor.name], value=tensor))
    model.graph.ClearField("initializer")
    return model


def _wrong_shapes(model: ModelProto) -> ModelProto:
    model.graph.value_info.append(helper.make_tensor_value_info("a1", TensorProto.FLOAT, [1, 99, 7]))
    return model


def _shuffled(model: ModelProto) -> ModelProto:
    nodes = list(model.graph.node)[::-1]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("change", [_renamed, _weights_are_inputs, _weights_are_constants, _wrong_shapes, _shuffled])
def test_habits_of_exporters(change: Any) -> None:
    converted = onnxgbp.convert(change(net()))
    onnx.checker.check_model(converted)
    got, want = ort_run(converted, photos()), ort_run(onnxgbp.convert(net()), photos())
    assert np.allclose(got["attribution"], want["attribution"], rtol=1e-5, atol=1e-7)


def test_an_output_that_says_the_exported_batch() -> None:
    """Exporters say it where they lose the symbol; ONNX Runtime believes it, and the seed's shape with it."""
    source = net()
    assert source.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    source.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    converted = onnxgbp.convert(source, target=1)
    assert converted.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"
    got, want = ort_run(converted, photos(3)), ort_run(onnxgbp.convert(net(), target=1), photos(3))
    assert np.allclose(got["attribution"], want["attribution"], rtol=1e-5, atol=1e-7)


def test_dims_of_unknown_size() -> None:
    source = net()
    for dim in source.graph.input[0].type.tensor_type.shape.dim:
        dim.Clear()
    source.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    converted = onnxgbp.convert(source)
    got, want = ort_run(converted, photos()), ort_run(onnxgbp.convert(net()), photos())
    assert np.allclose(got["attribution"], want["attribution"], rtol=1e-5, atol=1e-7)


def test_a_local_function_is_inlined() -> None:
    source = net()
    body = [node("Relu", ["a"], ["b"])]
    function = helper.make_function("local", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    source.functions.append(function)
    source.opset_import.append(helper.make_opsetid("local", 1))
    source.graph.node[1].op_type, source.graph.node[1].domain = "Act", "local"
    converted = onnxgbp.convert(source)
    assert {n.domain for n in converted.graph.node} == {""}
    got, want = ort_run(converted, photos()), ort_run(onnxgbp.convert(net()), photos())
    assert np.allclose(got["attribution"], want["attribution"], rtol=1e-5, atol=1e-7)
