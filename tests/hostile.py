"""Model files that no honest exporter writes, and a process with little memory to try the commands on them."""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

HUGE = 1 << 40
WRAPS = [1 << 32, 1 << 32]  # a shape whose product is 0 in 64 bits

Shape = Sequence[int | str | None] | None


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, outputs, **attributes)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def model(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, Shape] | None = None,
    outputs: Mapping[str, Shape] | None = None,
    opset: int = 17,
    functions: Sequence[onnx.FunctionProto] = (),
    metadata: Mapping[str, str] | None = None,
) -> ModelProto:
    """A model as it is told, without a check: x [N, 4] to y [N, 4] unless other inputs and outputs are given."""
    graph = helper.make_graph(
        list(nodes),
        "hostile",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in (inputs or {"x": ["N", 4]}).items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in (outputs or {"y": ["N", 4]}).items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("local", 1)] if functions else [])]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))
    for key, value in (metadata or {}).items():
        made.metadata_props.add(key=key, value=value)
    return made


def relu() -> ModelProto:
    return model([node("Relu", ["x"], ["y"], name="act")])


def classifier(**metadata: str) -> ModelProto:
    """X [N, 3, 8, 8] -> Conv, Relu, mean -> y [N, 4]."""
    dice = np.random.default_rng(0)
    nodes = [
        node("Conv", ["x", "w"], ["h"], name="conv"),
        node("Relu", ["h"], ["r"], name="act"),
        node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        node("Flatten", ["p"], ["y"], name="flat"),
    ]
    weights = {"w": dice.standard_normal((4, 3, 3, 3)).astype(np.float32)}
    said = {f"onnxgbp.{name}": value for name, value in metadata.items()}
    return model(nodes, weights, inputs={"x": ["N", 3, 8, 8]}, metadata=said)


def between(
    *nodes: NodeProto, reduce: bool = True, x: Shape = ("N", 4), opset: int = 17, **constants: Any
) -> ModelProto:
    """`nodes` make m out of r, the Relu of x; its sum is added to the scores, so that the gradient passes them."""
    ends = (
        [node("ReduceSum", ["m"], ["total"], name="sum", keepdims=0)]
        if reduce
        else [node("Identity", ["m"], ["total"])]
    )
    first, last = node("Relu", ["x"], ["r"], name="act"), node("Add", ["scores", "total"], ["y"], name="add")
    flat = [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "w"], ["scores"])]
    width = math.prod(dim for dim in (x or ())[1:] if isinstance(dim, int) and dim > 0)
    weights = {"w": np.ones((width, 4), np.float32)} if width < 1 << 16 else {}
    return model([first, *nodes, *ends, *flat, last], {**weights, **constants}, inputs={"x": x}, opset=opset)


def with_initializer(**fields: Any) -> ModelProto:
    """X + w, where w is as told."""
    made = model([node("Add", ["x", "w"], ["h"], name="add"), node("Relu", ["h"], ["y"], name="act")])
    tensor = made.graph.initializer.add(name="w", data_type=TensorProto.FLOAT)
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    return made


def named(name: str) -> ModelProto:
    """Every name in it ends in this one, and an operator has no rule: so the error and the reports say it."""
    made = model(
        [
            node("Relu", ["x" + name], ["h" + name], name="act" + name),
            node("Custom" + name, ["h" + name], ["y" + name], name="custom" + name, domain="domain" + name),
        ],
        inputs={"x" + name: ["N" + name, 4]},
        outputs={"y" + name: ["N", 4]},
    )
    made.opset_import.add(domain="domain" + name, version=1)
    made.producer_name = name
    return made


def _chain(operator: str, count: int) -> ModelProto:
    nodes = [node(operator, [f"t{i}" if i else "x"], [f"t{i + 1}" if i + 1 < count else "y"]) for i in range(count)]
    return model(nodes)


def _double(name: str) -> GraphProto:
    twice = node("Add", [name, name], ["twice"])
    return helper.make_graph([twice], "double", [], [onnx.ValueInfoProto(name="twice")])


def _nested(depth: int) -> bytes:
    """An If in an If in an If; deeper than protobuf would write it, so put together from bytes."""
    body = helper.make_graph([node("Relu", ["x"], ["o"])], "b", [], [onnx.ValueInfoProto(name="o")])
    inner = body.SerializeToString()
    for _ in range(depth):
        empty = NodeProto(op_type="If", input=["c"], output=["o"]).SerializeToString()
        branches = b"".join(
            _field(5, AttributeProto(name=name, type=AttributeProto.GRAPH).SerializeToString() + _field(6, inner))
            for name in ("then_branch", "else_branch")[: 1 if depth > 40 else 2]
        )
        graph = GraphProto(name="b", output=[onnx.ValueInfoProto(name="o")]).SerializeToString()
        inner = graph + _field(1, empty + branches)
    whole = GraphProto()
    if depth <= 40:
        whole = GraphProto.FromString(inner)
        whole.node[0].output[0] = "y"
    made = model([], inputs={"x": ["N", 4]})
    made.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    made.graph.node.extend(whole.node)
    data = made.SerializeToString()
    return data if depth <= 40 else data + _field(7, inner)  # a second field of a message is merged into the first


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    head, size = bytearray([number << 3 | 2]), len(data)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + data


def _function(name: str, calls: Sequence[str], domain: str = "local") -> onnx.FunctionProto:
    """A -> calls, one behind the other -> b."""
    names = ["a", *(f"t{i}" for i in range(len(calls) - 1)), "b"]
    nodes = [
        node(called, [names[i]], [names[i + 1]], domain="" if called in ("Relu", "Neg") else "local")
        for i, called in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function(domain, name, ["a"], ["b"], nodes, opsets)


def _large_tables() -> ModelProto:
    """Each just small enough."""
    nodes, name = list[NodeProto](), "x"
    for i in range(1, 9):
        sizes = helper.make_tensor(f"s{i}", TensorProto.INT64, [4], [1, 1, 1, 4000 + i])
        nodes += [node("Constant", [], [f"s{i}"], value=sizes)]
        nodes += [node("Resize", [name, "", "", f"s{i}"], [f"r{i}"], mode="linear")]
        name = f"r{i}"
    nodes += [node("Flatten", [name], ["y"])]
    return model(nodes, inputs={"x": [1, 1, 1, 4000]}, outputs={"y": [1, 4008]})


def _of_another_version() -> ModelProto:
    """The inliner leaves the function where it is; its body reads a tensor that it does not have."""
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Relu", ["x"], ["o"])], "b", [], [output])
    body = [node("If", ["a"], ["b"], then_branch=branch, else_branch=branch)]
    function = helper.make_function(
        "local", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    )
    made = _calling([function], "F")
    made.opset_import[-1].version = 11
    return made


def _reading_itself() -> ModelProto:
    """In a body of a function's node, which onnx's checker does not look into."""
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    body = helper.make_graph([node("Relu", ["o"], ["o"])], "b", [], [output])
    nodes = [node("If", ["a"], ["b"], then_branch=body, else_branch=body)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return _calling([helper.make_function("local", "F", ["a"], ["b"], nodes, opsets)], "F")


def _calling(functions: Sequence[onnx.FunctionProto], first: str) -> ModelProto:
    return model([node(first, ["x"], ["y"], domain="local")], functions=functions)


def laughs(levels: int, width: int) -> ModelProto:
    """Each function calls the one below it `width` times."""
    functions = [_function("F0", ["Relu"])]
    functions += [_function(f"F{level}", [f"F{level - 1}"] * width) for level in range(1, levels + 1)]
    return _calling(functions, f"F{levels}")


def _loop(trips: int | None, going: bool = True) -> ModelProto:
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Relu", ["v"], ["v_out"], name="inner")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, None),
        ],
    )
    inputs = ["trips" if trips is not None else "", "going", "x"]
    constants = {"going": np.array(going)} | ({"trips": np.array(trips)} if trips is not None else {})
    return model([node("Loop", inputs, ["y"], name="loop", body=body)], constants)


def _scan() -> ModelProto:
    body = helper.make_graph(
        [node("Relu", ["v"], ["v_out"], name="inner")],
        "body",
        [helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("v_out", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("Expand", ["x", "shape"], ["e"]),
        node("Scan", ["e"], ["sc"], name="scan", body=body, num_scan_inputs=1),
        node("ReduceSum", ["sc", "axis"], ["y"], keepdims=0),
    ]
    return model(nodes, {"shape": ints(HUGE, 2, 4), "axis": ints(0)}, inputs={"x": [2, 4]}, outputs={"y": [2, 4]})


def _folded(count: int, size: int) -> ModelProto:
    """Constants that a few bytes of file each make; folding all of them would take gigabytes."""
    nodes = [node("ConstantOfShape", ["size"], [f"c{i}"]) for i in range(count)]
    nodes += [node("Add", [f"c{i}", f"s{i - 1}" if i else "c0"], [f"s{i}"]) for i in range(count)]
    nodes += [node("ReduceSum", [f"s{count - 1}"], ["m"], keepdims=0)]
    return between(*nodes, size=ints(size), reduce=False)


def _doubled(count: int) -> ModelProto:
    """A dim that doubles with each node until 64 bits do not hold it."""
    names = ["r", *(f"d{i}" for i in range(count - 1)), "m"]
    return between(*(node("Concat", [names[i]] * 2, [names[i + 1]], axis=1) for i in range(count)))


def _repeated(made: ModelProto, field: str) -> ModelProto:
    getattr(made.graph, field).append(getattr(made.graph, field)[0])
    return made


def _opset(version: int, domain: str = "") -> ModelProto:
    made = relu()
    if domain:
        made.opset_import.add(domain=domain, version=version)
    else:
        made.opset_import[0].version = version
    return made


def _changed(change: Callable[[ModelProto], Any], made: ModelProto | None = None) -> bytes:
    made = relu() if made is None else made
    change(made)
    return made.SerializeToString()


def _no_utf8() -> bytes:
    return named("ABCD").SerializeToString().replace(b"ABCD", b"\xff\xfe\x80A")


def _sparse() -> ModelProto:
    made = with_initializer()
    del made.graph.initializer[:]
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(ints(0, HUGE), "i")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [HUGE, HUGE]))
    return made


def _deep_type() -> bytes:
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1]).SerializeToString()
    for _ in range(1000):
        kind = _field(4, _field(1, kind))  # a sequence of it
    value = _field(1, b"deep") + _field(2, kind)
    return relu().SerializeToString() + _field(7, _field(11, value))


CONV = {"x": ["N", 3, 8, 8]}


def _conv(**attributes: Any) -> ModelProto:
    made = classifier()
    for name, value in attributes.items():
        made.graph.node[0].attribute.append(helper.make_attribute(name, value))
    return made


def _pool(operator: str, **attributes: Any) -> ModelProto:
    return between(node(operator, ["r"], ["m"], name="pool", **attributes), x=("N", 3, 8, 8))


def _one(operator: str, *inputs: str, x: Shape = ("N", 4), opset: int = 17, **given: Any) -> ModelProto:
    """One operator on r, with constants (arrays) and attributes (anything else)."""
    arrays = {name: value for name, value in given.items() if isinstance(value, (np.ndarray, np.generic))}
    attributes = {name: value for name, value in given.items() if name not in arrays}
    return between(node(operator, ["r", *inputs], ["m"], name="odd", **attributes), x=x, opset=opset, **arrays)


def _attribute(**fields: Any) -> bytes:
    """A LeakyRelu whose attribute is as told."""
    made = model([node("LeakyRelu", ["x"], ["y"], name="act")])
    made.graph.node[0].attribute.add(**fields)
    return made.SerializeToString()


# name -> what makes the file's bytes
FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello\n" * 20,
    "picture": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "no graph": lambda: ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)]).SerializeToString(),
    "no outputs": lambda: _changed(lambda m: m.graph.ClearField("output")),
    "weight of 0 x 2^62": lambda: with_initializer(dims=[0, 1 << 62]).SerializeToString(),
    "output without a name": lambda: _changed(lambda m: m.graph.output.add()),
    "input without a name": lambda: _changed(lambda m: m.graph.input.add()),
    "no nodes": lambda: _changed(lambda m: m.graph.ClearField("node")),
    "Constant without a value": lambda: between(
        node("Constant", [], ["c"]), node("Add", ["r", "c"], ["m"])
    ).SerializeToString(),
    "If with a number for a branch": lambda: between(
        node("If", ["yes"], ["m"], then_branch=_double("r"), else_branch=1), yes=np.array(True)
    ).SerializeToString(),
    "If without a branch": lambda: between(
        node("ReduceMax", ["r"], ["most"], keepdims=0),
        node("Cast", ["most"], ["yes"], to=TensorProto.BOOL),
        node("If", ["yes"], ["m"], then_branch=_double("r")),
    ).SerializeToString(),
    "If with an empty branch": lambda: between(
        node("If", ["yes"], ["m"], then_branch=_double("r"), else_branch=helper.make_graph([], "none", [], [])),
        yes=np.array(True),
    ).SerializeToString(),
    "no inputs": lambda: _changed(lambda m: m.graph.ClearField("input")),
    "no opset": lambda: _changed(lambda m: m.ClearField("opset_import")),
    "opset 0": lambda: _opset(0).SerializeToString(),
    "opset 2^31": lambda: _opset(1 << 31).SerializeToString(),
    "opset -2^63": lambda: _opset(-(1 << 63)).SerializeToString(),
    "opset 2^40 of another domain": lambda: _opset(HUGE, "com.example").SerializeToString(),
    "opset 2^40 of ai.onnx.ml": lambda: _opset(HUGE, "ai.onnx.ml").SerializeToString(),
    "two opsets": lambda: _changed(lambda m: m.opset_import.add(domain="", version=3)),
    "IR version 2^40": lambda: _changed(lambda m: setattr(m, "ir_version", HUGE)),
    "IR version -1": lambda: _changed(lambda m: setattr(m, "ir_version", -1)),
    "cycle": lambda: model([node("Add", ["x", "b"], ["y"]), node("Neg", ["y"], ["b"])]).SerializeToString(),
    "cycle of one": lambda: model([node("Add", ["x", "y"], ["y"])]).SerializeToString(),
    "value made twice": lambda: _repeated(relu(), "node").SerializeToString(),
    "initializer twice": lambda: _repeated(classifier(), "initializer").SerializeToString(),
    "input twice": lambda: _repeated(relu(), "input").SerializeToString(),
    "output twice": lambda: _repeated(relu(), "output").SerializeToString(),
    "nodes of one name": lambda: _changed(lambda m: [setattr(n, "name", "same") for n in m.graph.node], classifier()),
    "input that a node makes": lambda: model([node("Relu", ["x"], ["x"])], outputs={"x": None}).SerializeToString(),
    "initializer that a node makes": lambda: model(
        [node("Relu", ["x"], ["y"])], {"y": np.ones(4, np.float32)}
    ).SerializeToString(),
    # --- tensors
    "2^40 elements without data": lambda: with_initializer(dims=[HUGE]).SerializeToString(),
    "2^64 elements without data": lambda: with_initializer(dims=WRAPS).SerializeToString(),
    "dims of 0 and 2^62": lambda: with_initializer(dims=[0, 1 << 62], raw_data=b"").SerializeToString(),
    "10,000 dims": lambda: with_initializer(dims=[1] * 10_000, raw_data=bytes(4)).SerializeToString(),
    "100 dims": lambda: with_initializer(dims=[1] * 100, raw_data=bytes(4)).SerializeToString(),
    "negative dims": lambda: with_initializer(dims=[-1, -4], raw_data=bytes(16)).SerializeToString(),
    "data too short": lambda: with_initializer(dims=[4], raw_data=bytes(15)).SerializeToString(),
    "data too long": lambda: with_initializer(dims=[4], raw_data=bytes(17)).SerializeToString(),
    "numbers too few": lambda: with_initializer(dims=[4], float_data=[1.0]).SerializeToString(),
    "type 999": lambda: with_initializer(dims=[4], raw_data=bytes(16), data_type=999).SerializeToString(),
    "type 999 of the input": lambda: _changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 999)),
    "type 999 of the output": lambda: _changed(lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 999)),
    "type 999 of a Cast": lambda: _one("Cast", to=999).SerializeToString(),
    "strings": lambda: with_initializer(
        dims=[2], data_type=TensorProto.STRING, string_data=[b"a", b"\xff"]
    ).SerializeToString(),
    "raw strings": lambda: with_initializer(dims=[2], data_type=TensorProto.STRING, raw_data=b"ab").SerializeToString(),
    "sparse": lambda: _sparse().SerializeToString(),
    "external without a file": lambda: with_initializer(
        dims=[4], data_location=TensorProto.EXTERNAL
    ).SerializeToString(),
    # --- shapes
    "input of 2^186 elements": lambda: model(
        [node("Relu", ["x"], ["y"])], inputs={"x": [1 << 62, 1 << 62, 1 << 62]}, outputs={"y": None}
    ).SerializeToString(),
    "input with negative dims": lambda: model(
        [node("Relu", ["x"], ["y"])], inputs={"x": [-5, -(1 << 40)]}, outputs={"y": None}
    ).SerializeToString(),
    "input of rank 5000": lambda: model(
        [node("Relu", ["x"], ["y"])], inputs={"x": [1] * 5000}, outputs={"y": None}
    ).SerializeToString(),
    "ConstantOfShape 2^40": lambda: between(node("ConstantOfShape", ["n"], ["m"]), n=ints(HUGE)).SerializeToString(),
    "ConstantOfShape 2^64": lambda: between(node("ConstantOfShape", ["n"], ["m"]), n=ints(*WRAPS)).SerializeToString(),
    "ConstantOfShape -5": lambda: between(node("ConstantOfShape", ["n"], ["m"]), n=ints(-5)).SerializeToString(),
    "500 folded constants": lambda: _folded(500, 1 << 16).SerializeToString(),
    "Expand 2^40": lambda: _one("Expand", "n", n=ints(HUGE, 1, 4)).SerializeToString(),
    "Expand 2^64": lambda: _one("Expand", "n", n=ints(*WRAPS, 1, 4)).SerializeToString(),
    "Tile 2^40": lambda: _one("Tile", "n", n=ints(HUGE, HUGE)).SerializeToString(),
    "Tile -1": lambda: _one("Tile", "n", n=ints(-1, 1)).SerializeToString(),
    "Range 2^40": lambda: between(
        node("Range", ["a", "b", "c"], ["q"]),
        node("Cast", ["q"], ["m"], to=1),
        a=np.int64(0),
        b=np.int64(HUGE),
        c=np.int64(1),
    ).SerializeToString(),
    "Range by 0": lambda: between(
        node("Range", ["a", "b", "c"], ["m"]), a=np.float32(0), b=np.float32(9), c=np.float32(0)
    ).SerializeToString(),
    "Range by NaN": lambda: between(
        node("Range", ["a", "b", "c"], ["m"]), a=np.float32(0), b=np.float32(np.inf), c=np.float32(np.nan)
    ).SerializeToString(),
    "Resize by 1e30": lambda: _one(
        "Resize", "", "s", x=("N", 3, 8, 8), s=np.array([1, 1, 1e30, 1e30], np.float32)
    ).SerializeToString(),
    "Resize to 2^40": lambda: _one("Resize", "", "", "s", x=(1, 3, 8, 8), s=ints(1, 3, HUGE, HUGE)).SerializeToString(),
    "linear Resize to 2^20": lambda: _one(
        "Resize", "", "", "s", x=(1, 3, 8, 8), s=ints(1, 3, 1 << 20, 1 << 20), mode="linear"
    ).SerializeToString(),
    "Pad 2^40": lambda: _one("Pad", "p", p=ints(0, HUGE, 0, HUGE)).SerializeToString(),
    "Pad -2^40": lambda: _one("Pad", "p", p=ints(0, -HUGE, 0, -HUGE)).SerializeToString(),
    "Reshape 2^40": lambda: _one("Reshape", "s", s=ints(HUGE, -1)).SerializeToString(),
    "Reshape -7": lambda: _one("Reshape", "s", s=ints(-7, -7)).SerializeToString(),
    "dim doubled 70 times": lambda: _doubled(70).SerializeToString(),
    "OneHot 2^40": lambda: between(
        node("Cast", ["r"], ["i"], to=7),
        node("OneHot", ["i", "d", "v"], ["m"]),
        d=np.int64(HUGE),
        v=np.array([0, 1], np.float32),
    ).SerializeToString(),
    "TopK 2^40": lambda: between(node("TopK", ["r", "k"], ["m", "i"], name="odd"), k=ints(HUGE)).SerializeToString(),
    "Gather 2^40": lambda: _one("Gather", "i", i=ints(HUGE), axis=1).SerializeToString(),
    "Slice 2^63": lambda: _one(
        "Slice", "a", "b", "c", "d", a=ints(-(1 << 63)), b=ints((1 << 63) - 1), c=ints(1), d=ints(-(1 << 63))
    ).SerializeToString(),
    # --- attributes
    "Split in 2^31": lambda: between(
        node("Split", ["r"], ["m"], name="odd", num_outputs=(1 << 31), axis=1), opset=18
    ).SerializeToString(),
    "Conv of 2^20": lambda: _conv(kernel_shape=[1 << 20, 1 << 20]).SerializeToString(),
    "Conv with pads 2^40": lambda: _conv(pads=[HUGE] * 4).SerializeToString(),
    "Conv with pads -2^40": lambda: _conv(pads=[-HUGE] * 4).SerializeToString(),
    "Conv with strides 0": lambda: _conv(strides=[0, 0]).SerializeToString(),
    "Conv with strides 2^62": lambda: _conv(strides=[1 << 62] * 2).SerializeToString(),
    "Conv with dilations 2^40": lambda: _conv(dilations=[HUGE] * 2).SerializeToString(),
    "Conv with group 0": lambda: _conv(group=0).SerializeToString(),
    "Conv with group 2^40": lambda: _conv(group=HUGE).SerializeToString(),
    "AveragePool of 2^20": lambda: _pool(
        "AveragePool", kernel_shape=[1 << 20] * 2, pads=[1 << 19] * 4
    ).SerializeToString(),
    "AveragePool of more than there is": lambda: _pool("AveragePool", kernel_shape=[9, 9]).SerializeToString(),
    "MaxPool of 2^20": lambda: _pool("MaxPool", kernel_shape=[1 << 20] * 2, pads=[1 << 19] * 4).SerializeToString(),
    "MaxPool with strides 0": lambda: _pool("MaxPool", kernel_shape=[2, 2], strides=[0, 0]).SerializeToString(),
    "LpPool to the 2^40": lambda: _pool("LpPool", kernel_shape=[2, 2], p=HUGE).SerializeToString(),
    "LRN of 2^40": lambda: _pool("LRN", size=HUGE).SerializeToString(),
    "DepthToSpace 0": lambda: _pool("DepthToSpace", blocksize=0).SerializeToString(),
    "DepthToSpace 2^40": lambda: _pool("DepthToSpace", blocksize=HUGE).SerializeToString(),
    "SpaceToDepth 2^40": lambda: _pool("SpaceToDepth", blocksize=HUGE).SerializeToString(),
    "Transpose by 99": lambda: _one("Transpose", perm=[99, -1]).SerializeToString(),
    "Flatten at -2^63": lambda: _one("Flatten", axis=-(1 << 63)).SerializeToString(),
    "Softmax at 2^62": lambda: _one("Softmax", axis=1 << 62).SerializeToString(),
    "Unsqueeze at 2^40": lambda: _one("Unsqueeze", "a", a=ints(HUGE)).SerializeToString(),
    "Unsqueeze at 100 axes": lambda: _one("Unsqueeze", "a", a=np.arange(2, 102)).SerializeToString(),
    "Trilu at 2^62": lambda: _one("Trilu", "k", k=np.int64(1 << 62)).SerializeToString(),
    "CumSum at 2^62": lambda: _one("CumSum", "k", k=np.int64(1 << 62)).SerializeToString(),
    "Slice of dim -1": lambda: between(
        node("BiasGelu", ["r", "four"], ["g"], domain="com.microsoft"),
        node("Slice", ["x", "from", "to", "axis"], ["s"]),
        node("Add", ["g", "s"], ["m"]),
        x=(2, -1),
        four=np.ones(4, np.float32),
        w=np.ones((4, 4), np.float32),
        **{"from": ints(0), "to": ints(4), "axis": ints(1)},
    ).SerializeToString(),
    "Slice of what a kernel left of nothing": lambda: between(
        node("MaxPool", ["r"], ["p"], kernel_shape=[9]),
        node("Slice", ["p", "a", "b", "a"], ["m"]),
        x=(1, 4, 5),
        a=ints(2),
        b=ints(3),
    ).SerializeToString(),
    "QuantizeLinear with a Clip to NaN": lambda: between(
        node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
        node("Clip", ["q", "low"], ["c"]),
        node("DequantizeLinear", ["c", "scale", "zero"], ["m"]),
        scale=np.array(0.1, np.float32),
        zero=np.array(0, np.uint8),
        low=np.array(np.nan, np.float32),
    ).SerializeToString(),
    "Conv with a computed weight of one axis": lambda: between(
        node("Flatten", ["r"], ["row"], axis=0),
        node("Squeeze", ["row"], ["v"]),
        node("Conv", ["r", "v"], ["m"], kernel_shape=[3]),
        x=(1, 2, 8),
    ).SerializeToString(),
    "Slice by 2^40 computed starts": lambda: between(
        node("Shape", ["r"], ["shape"]),
        node("Expand", ["shape", "huge"], ["starts"]),
        node("Slice", ["r", "starts", "starts"], ["m"]),
        huge=ints(HUGE, 1),
    ).SerializeToString(),
    "Tile by more computed repeats than axes": lambda: between(
        node("Shape", ["r"], ["shape"]),
        node("Concat", ["shape", "shape"], ["repeats"], axis=0),
        node("Tile", ["r", "repeats"], ["m"]),
    ).SerializeToString(),
    "Pad by -2^63": lambda: _one("Pad", "p", p=ints(0, HUGE, -(1 << 63), HUGE), opset=17).SerializeToString(),
    "Transpose by 2^40": lambda: _one("Transpose", perm=[HUGE]).SerializeToString(),
    "Pad without pads, with a body": lambda: _one(
        "Pad", body=helper.make_graph([], "body", [], []), opset=13
    ).SerializeToString(),
    "DFT of 2^30": lambda: _one("DFT", "n", x=("N", 4, 1), n=np.int64(1 << 30), axis=1, opset=17).SerializeToString(),
    "DFT of 2^17": lambda: _one("DFT", "n", x=("N", 4, 1), n=np.int64(1 << 17), axis=1, opset=17).SerializeToString(),
    "LSTM of 2^40": lambda: between(
        node("LSTM", ["r", "wi", "wr"], ["m"], name="odd", hidden_size=HUGE),
        x=(1, "N", 4),
        wi=np.ones((1, 8, 4), np.float32),
        wr=np.ones((1, 8, 2), np.float32),
    ).SerializeToString(),
    "Einsum of 2,000 letters": lambda: _one("Einsum", equation="ij->" + "ij" * 1000).SerializeToString(),
    "GroupNormalization of 0": lambda: _one(
        "GroupNormalization",
        "g",
        "b",
        x=("N", 4, 2),
        opset=21,
        g=np.ones(4, np.float32),
        b=np.ones(4, np.float32),
        num_groups=0,
    ).SerializeToString(),
    "NaN and inf": lambda: _changed(
        lambda m: m.graph.node[0].attribute.extend(
            [helper.make_attribute("alpha", float("nan")), helper.make_attribute("gamma", float("inf"))]
        ),
        model([node("Selu", ["x"], ["y"], name="act")]),
    ),
    "Clip from NaN": lambda: _one("Clip", "a", "b", a=np.float32("nan"), b=np.float32("inf")).SerializeToString(),
    "string of 10 MB": lambda: _attribute(name="alpha", type=AttributeProto.STRING, s=b"a" * 10_000_000),
    "attribute of no type": lambda: _attribute(name="alpha", f=0.5),
    "attribute of type 99": lambda: _changed(lambda m: None, relu()) + _field(7, _field(1, b"\x2a\x03\xa0\x01\x63")),
    "attribute of another type": lambda: _attribute(name="alpha", type=AttributeProto.INT, i=3),
    "attribute that refers to nothing": lambda: _attribute(
        name="alpha", type=AttributeProto.FLOAT, ref_attr_name="outer"
    ),
    "attribute twice": lambda: _changed(
        lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("alpha", 0.5)] * 2),
        model([node("LeakyRelu", ["x"], ["y"], name="act")]),
    ),
    # --- nesting, functions, control flow
    "If in If 3 times": lambda: _nested(3),
    "If in If 10 times": lambda: _nested(10),
    "If in If 1,000 times": lambda: _nested(1000),
    "type of 1,000 sequences": _deep_type,
    "functions that double 40 times": lambda: laughs(40, 2).SerializeToString(),
    "functions that multiply by 50, 12 times": lambda: laughs(12, 50).SerializeToString(),
    "function that calls itself": lambda: _calling([_function("F", ["Relu", "F"])], "F").SerializeToString(),
    "functions that call each other": lambda: _calling(
        [_function("F", ["G"]), _function("G", ["F"])], "F"
    ).SerializeToString(),
    "functions 300 deep": lambda: laughs(300, 1).SerializeToString(),
    "functions 3,000 deep": lambda: laughs(3000, 1).SerializeToString(),
    "axes in rows": lambda: _one("ReduceSum", "a", a=np.ones((2, 1), np.int64)).SerializeToString(),
    "scales for a single number": lambda: _one(
        "QuantizeLinear", "s", "z", x=(), s=np.ones(2, np.float32), z=np.zeros(2, np.uint8)
    ).SerializeToString(),
    "function whose body reads what it makes": lambda: _reading_itself().SerializeToString(),
    "several large tables": lambda: _large_tables().SerializeToString(),
    "function of another version of its domain": lambda: _of_another_version().SerializeToString(),
    "function twice": lambda: _calling([_function("F", ["Relu"]), _function("F", ["Neg"])], "F").SerializeToString(),
    "function that is missing": lambda: _calling([_function("F", ["Gone"])], "F").SerializeToString(),
    "Loop without end": lambda: _loop(None).SerializeToString(),
    "Loop of 2^62": lambda: _loop(1 << 62).SerializeToString(),
    "Scan over 2^40": lambda: _scan().SerializeToString(),
    # --- much of it
    "100,001 nodes": lambda: _chain("Relu", 100_001).SerializeToString(),
    "1,100 nodes in a row": lambda: _chain("Neg", 1100).SerializeToString(),
    "1,100 Identity nodes": lambda: _chain("Identity", 1100).SerializeToString(),
    # --- names
    "name with a line break": lambda: named("a\nok    all is well\r").SerializeToString(),
    "name with an escape sequence": lambda: named("\x1b[2J\x1b]0;title\x07\x9b31m").SerializeToString(),
    "name that is turned round": lambda: named("\u202egpj.exe\u2028").SerializeToString(),
    "name of HTML": lambda: named("<script>alert(1)</script>|`x`").SerializeToString(),
    "name of a path": lambda: named("/../../../etc/passwd").SerializeToString(),
    "name of 1 MB": lambda: named("n" * 1_000_000).SerializeToString(),
    "name that is no UTF-8": _no_utf8,
    "name with a NUL": lambda: named("\0").SerializeToString(),
    "no names": lambda: model([node("Relu", [""], ["y"])]).SerializeToString(),
}

# Entries of the metadata under `onnxgbp.`, each forged in a classifier; those with `method` pass for a converted file.
_CONVERTED = {
    "method": "guided",
    "rules": '["*=guided"]',
    "audit": "[]",
    "wrt": '["x"]',
    "explained": "y",
    "target": "argmax",
    "seed": "one",
    "activations": "all",
    "profile": "ort",
    "sha256": "0",
    "version": "0",
}
DEEP = "[" * 100_000
FORGED: dict[str, dict[str, str]] = {
    "labels: garbage": {"labels": "\0\x1b[31m{"},
    "labels: a number": {"labels": "5"},
    "labels: nested": {"labels": DEEP},
    "labels: to 10^12": {"labels": json.dumps({str(10**12): "x"})},
    "labels: of 5,000 digits": {"labels": "9" * 5000},
    "labels: a million": {"labels": json.dumps(["x"] * 1_000_000)},
    "labels: of all kinds": {"labels": '[1, null, {"a": "\\u001b[31m"}, "a\\nb"]'},
    "preprocessing: garbage": {"preprocessing": "\xff{"},
    "preprocessing: a list": {"preprocessing": "[1]"},
    "preprocessing: nested": {"preprocessing": DEEP},
    "preprocessing: of 5,000 digits": {"preprocessing": '{"size": ' + "9" * 5000 + "}"},
    "preprocessing: size 0": {"preprocessing": '{"size": 0}'},
    "preprocessing: size 10^9": {"preprocessing": '{"size": 1000000000}'},
    "preprocessing: crop 10^9": {"preprocessing": '{"size": 1000000000, "crop": 1000000000}'},
    "preprocessing: size 10^400": {"preprocessing": '{"size": 1' + "0" * 400 + "}"},
    "preprocessing: size true": {"preprocessing": '{"size": true}'},
    "preprocessing: size text": {"preprocessing": '{"size": "\\u001b[31m"}'},
    "preprocessing: scale 10^400": {"preprocessing": '{"scale": 1' + "0" * 400 + "}"},
    "preprocessing: scale NaN": {"preprocessing": '{"scale": NaN}'},
    "preprocessing: mean null": {"preprocessing": '{"mean": [null, {}, []]}'},
    "preprocessing: mean of a million": {"preprocessing": json.dumps({"mean": [0] * 1_000_000})},
    "preprocessing: channels a list": {"preprocessing": '{"channels": ["rgb"]}'},
    "preprocessing: layout a list": {"preprocessing": '{"layout": ["nchw"]}'},
    "method alone": {"method": "guided"},
    "converted": _CONVERTED,
    **{
        f"{name}: {text[:20]}": _CONVERTED | {name: text}
        for name, texts in {
            "wrt": ["5", "null", "{}", '{"x": 1}', "[3]", '["nothing"]', '["x", "x"]', "[]", "{", DEEP, '["\\u001b"]'],
            "rules": ["5", "null", "[3]", '[["a"]]', "[]", "{", DEEP],
            "audit": ["5", "null", "[3]", '[{"node": [1]}]', '[{"kind": 1}]', "{", DEEP],
            "method": ["nothing", "", ",", "guided,guided", "a\nb\x1b[31m"],
            "target": ["nothing", "top0", "top999999999", "99999999999", "-5", "input", "seed", "\x1b[31m", ""],
            "explained": ["nothing", "", "x"],
            "seed": ["nothing"],
            "unit": ["nothing", "9,9,9,9", "99999999999999999999", "max", ""],
            "seed_scale": ["nan", "nothing", "1e999", "0", "input"],
            "layer": ["nothing"],
            "profile": ["nothing"],
            "activations": ["nothing"],
            "view": ["nothing"],
            "heatmap": ["nothing", "uint8"],
            "sha256": ["a\nb"],
        }.items()
        for text in texts
    },
}


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit status, what it printed, what it raised instead (a traceback, or '')."""

    status: int
    stdout: str
    stderr: str
    raised: str
    seconds: float
    megabytes: int  # resident, at most, above those that the process held before
    opened: tuple[str, ...]  # the files that Python opened


class Worker:
    """A process of its own that runs commands one after the other, with little memory."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._memory), daemon=True)
        self._process.start()
        there.close()

    def run(self, arguments: Sequence[str], timeout: float) -> Outcome:
        """Raises TimeoutError where the command takes longer, EOFError where the process dies of it."""
        self._here.send(list(arguments))
        if not self._here.poll(timeout):
            self.stop()
            self._start()
            raise TimeoutError(f"no end after {timeout:g} s")
        try:
            outcome: Outcome = self._here.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            self._start()
            raise EOFError(f"the process died: {status}") from None
        return outcome

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._here.close()


def _serve(pipe: Connection, memory: int) -> None:
    import traceback
    import warnings

    from click.testing import CliRunner

    import onnxgbp
    from onnxgbp.cli import main

    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    CliRunner().invoke(main, ["ops"])
    onnxgbp.convert(relu())  # everything is loaded before the first figure is taken
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    warnings.simplefilter("ignore")
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        opened.clear()
        before, begun = _peak(reset=True), time.monotonic()
        result = CliRunner().invoke(main, arguments)
        seconds, peak = time.monotonic() - begun, _peak()
        raised = ""
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raised = "".join(traceback.format_exception(*(result.exc_info or (None, None, None))))
        pipe.send(
            Outcome(result.exit_code, result.stdout, result.stderr, raised, seconds, peak - before, tuple(opened))
        )


def _peak(reset: bool = False) -> int:
    """The most resident memory since the last reset, in MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    said = Path("/proc/self/status").read_text()
    return int(next(line for line in said.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


def forged(entries: Mapping[str, str]) -> bytes:
    return classifier(**entries).SerializeToString()
