"""Random edits of a model's protobuf: what no exporter writes, and what someone who means harm might."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain})
DOMAINS = ["", "com.microsoft", "ai.onnx", "ai.onnx.ml", "nowhere"]
SIZES = [-(1 << 63), -9, -7, -1, 0, 1, 2, 3, 5, 7, 99, 1 << 16, (1 << 31) - 1, 1 << 33, 1 << 40, (1 << 63) - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-30, 3e38]
NAMES = ["", "x", "attribution", "target", "seed", "a\nb", "\x1b[31m", "<script>", "../../x", "n" * 5000, "\u202e"]
METADATA = [f"onnxgbp.{name}" for name in "method rules wrt audit explained target labels preprocessing unit".split()]
TEXTS = ["", "{", "[]", "{}", "5", "null", '["x"]', '[{"node": 3}]', "[" * 2000, "9" * 5000, '{"size": 1000000000}']
LARGEST = 1 << 18  # bytes of an edited model: the file grows, and time with it

Edit = Callable[[GraphProto, random.Random], None]


def graphs(graph: GraphProto) -> list[GraphProto]:
    """A graph and the bodies of its control flow."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                found += graphs(inner)
    return found


def mutate(model: ModelProto, dice: random.Random) -> None:
    """One edit, of the graph, of a body in it, or of what stands around it."""
    if dice.random() < 0.12:
        dice.choice(OUTSIDE)(model, dice)
        return
    graph = model.graph if dice.random() < 0.7 else dice.choice(graphs(model.graph))
    if graph.node and graph.output:
        dice.choice(EDITS)(graph, dice)


def cross(model: ModelProto, other: ModelProto, dice: random.Random) -> None:
    """A node of another model, between tensors of this one."""
    if not other.graph.node or not model.graph.node:
        return
    node = model.graph.node.add()
    node.CopyFrom(dice.choice(other.graph.node))
    weights = {tensor.name: tensor for tensor in other.graph.initializer}
    names = _tensors(model.graph)
    for place, name in enumerate(node.input):
        if name in weights and name not in names:
            model.graph.initializer.add().CopyFrom(weights[name])
        elif name not in names:
            node.input[place] = dice.choice(names)
    made = [f"{name}_{dice.randrange(1000)}" for name in node.output]
    node.output[:] = made
    user = dice.choice(model.graph.node)
    if user.input and made:
        user.input[dice.randrange(len(user.input))] = made[0]


def _tensors(graph: GraphProto) -> list[str]:
    made = [name for node in graph.node for name in node.output]
    return [*made, *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer), ""]


def _drop_node(graph: GraphProto, dice: random.Random) -> None:
    del graph.node[dice.randrange(len(graph.node))]


def _repeat_node(graph: GraphProto, dice: random.Random) -> None:
    node = graph.node.add()
    node.CopyFrom(dice.choice(graph.node))
    node.output[:] = [f"{name}_{dice.randrange(1000)}" if name else "" for name in node.output]
    user = dice.choice(graph.node)
    if user.input and node.output:
        user.input[dice.randrange(len(user.input))] = node.output[0]


def _rename_operator(graph: GraphProto, dice: random.Random) -> None:
    dice.choice(graph.node).op_type = dice.choice([*OPERATORS, "Nonsense"])


def _rename_domain(graph: GraphProto, dice: random.Random) -> None:
    dice.choice(graph.node).domain = dice.choice(DOMAINS)


def _rewire_input(graph: GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    if node.input:
        node.input[dice.randrange(len(node.input))] = dice.choice(_tensors(graph))


def _drop_or_add_input(graph: GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    if node.input and dice.random() < 0.5:
        node.input.pop()
    else:
        node.input.append(dice.choice([t.name for t in graph.initializer] or [""]))


def _attributes(graph: GraphProto) -> list[onnx.AttributeProto]:
    return [attribute for node in graph.node for attribute in node.attribute]


def _change_attribute(graph: GraphProto, dice: random.Random) -> None:
    attributes = _attributes(graph)
    if not attributes:
        return
    attribute = dice.choice(attributes)
    if attribute.ints and dice.random() < 0.7:
        attribute.ints[dice.randrange(len(attribute.ints))] = dice.choice(SIZES)
    elif attribute.floats and dice.random() < 0.7:
        attribute.floats[dice.randrange(len(attribute.floats))] = dice.choice(FLOATS)
    else:
        attribute.i, attribute.f, attribute.s = dice.choice(SIZES), dice.choice(FLOATS), dice.choice(NAMES).encode()
    if dice.random() < 0.2:
        attribute.name = dice.choice(["axis", "pads", "kernel_shape", "to", "nonsense"])
    if dice.random() < 0.2:
        attribute.type = dice.choice(list(onnx.AttributeProto.AttributeType.values()))
    if dice.random() < 0.2:
        attribute.ints.extend(dice.choices(SIZES, k=dice.randrange(1, 4)))


def _add_attribute(graph: GraphProto, dice: random.Random) -> None:
    """One that the operator has, of any value."""
    node = dice.choice(graph.node)
    if not onnx.defs.has(node.op_type, node.domain):
        return
    known = onnx.defs.get_schema(node.op_type, domain=node.domain).attributes
    free = sorted(set(known) - {attribute.name for attribute in node.attribute})
    if not free:
        return
    name = dice.choice(free)
    kind = known[name].type.name
    value = {
        "INT": dice.choice(SIZES),
        "INTS": dice.choices(SIZES, k=dice.randrange(1, 5)),
        "FLOAT": dice.choice(FLOATS),
        "FLOATS": dice.choices(FLOATS, k=dice.randrange(1, 5)),
        "STRING": dice.choice(["SAME_UPPER", "linear", "constant", "sum", *NAMES]),
    }.get(kind)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def _drop_attribute(graph: GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    if node.attribute:
        node.attribute.pop()


def _change_type(graph: GraphProto, dice: random.Random) -> None:
    value = dice.choice([*graph.input, *graph.output])
    value.type.tensor_type.elem_type = dice.choice([*onnx.TensorProto.DataType.values(), 999])


def _change_shape(graph: GraphProto, dice: random.Random) -> None:
    value = dice.choice([*graph.input, *graph.output])
    dims = value.type.tensor_type.shape.dim
    if dims and dice.random() < 0.7:
        dice.choice(dims).dim_value = dice.choice(SIZES)
    elif dims and dice.random() < 0.5:
        dice.choice(dims).dim_param = dice.choice([*NAMES, "N"])
    elif dice.random() < 0.5:
        value.type.tensor_type.ClearField("shape")
    else:
        value.ClearField("type")


def _constants(graph: GraphProto) -> list[TensorProto]:
    return [*graph.initializer, *(attribute.t for attribute in _attributes(graph) if attribute.HasField("t"))]


def _change_weight(graph: GraphProto, dice: random.Random) -> None:
    tensors = _constants(graph)
    if not tensors:
        return
    tensor = dice.choice(tensors)
    edit = dice.randrange(5)
    if edit == 0:
        tensor.dims.append(dice.choice(SIZES))
    elif edit == 1 and tensor.dims:
        tensor.dims[dice.randrange(len(tensor.dims))] = dice.choice(SIZES)
    elif edit == 2:
        tensor.data_type = dice.choice([*onnx.TensorProto.DataType.values(), 999])
    elif edit == 3:
        tensor.raw_data = tensor.raw_data[: dice.randrange(1 + len(tensor.raw_data))] or b"\0"
    else:
        shape = [dice.choice([1, 2, 3]) for _ in range(dice.randrange(4))]
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), tensor.name))


def _change_numbers(graph: GraphProto, dice: random.Random) -> None:
    """Shapes, pads, axes and bounds are mostly constants of whole numbers; their own size stays right."""
    whole = [tensor for tensor in _constants(graph) if tensor.data_type in (TensorProto.INT64, TensorProto.INT32)]
    if not whole:
        return
    tensor = dice.choice(whole)
    try:
        array = numpy_helper.to_array(tensor).copy()
    except Exception:  # noqa: BLE001 - it was broken before
        return
    if array.size:
        limits = np.iinfo(array.dtype)
        array.reshape(-1)[dice.randrange(array.size)] = min(max(dice.choice(SIZES), limits.min), limits.max)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _outside_file(graph: GraphProto, dice: random.Random) -> None:
    """A weight in another file; `weights.bin` may lie beside the model."""
    if not graph.initializer:
        return
    tensor = dice.choice(graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    places = ["weights.bin", "weights.bin", "../weights.bin", "/etc/hostname", "gone", ".", "link", "a\0b", *NAMES]
    tensor.external_data.add(key="location", value=dice.choice(places))
    for key in ("offset", "length"):
        if dice.random() < 0.4:
            tensor.external_data.add(key=key, value=dice.choice(["abc", "", *map(str, SIZES)]))


def _rename_tensor(graph: GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    if node.output:
        node.output[dice.randrange(len(node.output))] = dice.choice([*NAMES, graph.output[0].name])


def _rename_everywhere(graph: GraphProto, dice: random.Random) -> None:
    """A tensor under another name, so that the graph holds together."""
    old, new = dice.choice(_tensors(graph)), dice.choice(NAMES)
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        node.name = new if dice.random() < 0.1 else node.name
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = new if value.name == old else value.name


def _drop_output(graph: GraphProto, dice: random.Random) -> None:
    del graph.output[dice.randrange(len(graph.output))]


def _add_output(graph: GraphProto, dice: random.Random) -> None:
    graph.output.add(name=dice.choice(_tensors(graph)))


def _wrap(graph: GraphProto, dice: random.Random) -> None:
    """A node moved into a branch, as deep as it was before or one more."""
    node = dice.choice(graph.node)
    body = helper.make_graph([node], "body", [], [onnx.ValueInfoProto(name=name) for name in node.output if name])
    given = dice.choice(_tensors(graph))
    made = [name for name in node.output if name]
    node.CopyFrom(helper.make_node("If", [given], made, then_branch=body, else_branch=body))


def _change_opset(model: ModelProto, dice: random.Random) -> None:
    entry = dice.choice(model.opset_import) if model.opset_import else model.opset_import.add()
    entry.version = dice.choice([0, 6, 7, 8, 9, 11, 12, 13, 17, 19, 22, 99, *SIZES])
    if dice.random() < 0.2:
        model.opset_import.add(domain=dice.choice(DOMAINS), version=dice.choice([1, 3, *SIZES]))
    if dice.random() < 0.2:
        model.ir_version = dice.choice([0, 3, 4, 10, *SIZES])


def _change_metadata(model: ModelProto, dice: random.Random) -> None:
    key = dice.choice([*METADATA, *METADATA, "labels", *NAMES])
    model.metadata_props.add(key=key, value=dice.choice(TEXTS))


def _make_function(model: ModelProto, dice: random.Random) -> None:
    """A node becomes the body of a function, which may call itself or an older one."""
    node = model.graph.node[dice.randrange(len(model.graph.node))] if model.graph.node else NodeProto()
    name = f"F{len(model.functions) if dice.random() < 0.8 else 0}"
    inputs, body = [f"i{place}" for place in range(len(node.input))], NodeProto()
    body.CopyFrom(node)
    body.input[:] = inputs
    if model.functions and dice.random() < 0.5:
        body.op_type, body.domain = dice.choice(model.functions).name, "local"
    elif dice.random() < 0.1:
        body.op_type, body.domain = name, "local"
    if all(node.output):
        opsets = [*model.opset_import, helper.make_opsetid("local", 1)]
        model.functions.append(
            helper.make_function("local", name, inputs, list(node.output), [body] * dice.choice([1, 1, 2]), opsets)
        )
        node.op_type, node.domain = name, "local"
        model.opset_import.add(domain="local", version=1)


EDITS: Sequence[Edit] = [
    _add_attribute,
    _add_output,
    _change_attribute,
    _change_attribute,
    _change_numbers,
    _change_numbers,
    _change_shape,
    _change_type,
    _change_weight,
    _drop_attribute,
    _drop_node,
    _drop_or_add_input,
    _drop_output,
    _outside_file,
    _rename_domain,
    _rename_everywhere,
    _rename_operator,
    _rename_tensor,
    _repeat_node,
    _rewire_input,
    _wrap,
]
OUTSIDE: Sequence[Callable[[ModelProto, random.Random], None]] = [_change_metadata, _change_opset, _make_function]
