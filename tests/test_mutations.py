"""No model makes it crash: random edits of real models are converted, or refused in one line.

`MUTATIONS` in the environment sets the number of seeds; `tools/test` runs 200, a change of the loader deserves 1000.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxgbp

CORPUS = Path(__file__).parent / "data" / "corpus"
MODELS = sorted({row["onnx"] for row in json.loads((CORPUS / "manifest.json").read_text())})
SEEDS = int(os.environ.get("MUTATIONS", "200"))
OPERATORS = [
    *"Add AveragePool BatchNormalization Cast Clip Concat Conv Flatten Gather Gemm Identity If Loop LSTM".split(),
    *"Max MaxPool Mul Nonsense Pad ReduceMean Relu Reshape Resize Slice Softmax Split Squeeze Where".split(),
]


def _drop_node(graph: onnx.GraphProto, dice: random.Random) -> None:
    del graph.node[dice.randrange(len(graph.node))]


def _rename_operator(graph: onnx.GraphProto, dice: random.Random) -> None:
    dice.choice(graph.node).op_type = dice.choice(OPERATORS)


def _rename_domain(graph: onnx.GraphProto, dice: random.Random) -> None:
    dice.choice(graph.node).domain = dice.choice(["com.microsoft", "ai.onnx.ml", "nowhere"])


def _rewire_input(graph: onnx.GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    names = [name for other in graph.node for name in other.output] + [t.name for t in graph.initializer] + [""]
    if node.input:
        node.input[dice.randrange(len(node.input))] = dice.choice(names)


def _drop_or_add_input(graph: onnx.GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    if node.input and dice.random() < 0.5:
        node.input.pop()
    else:
        node.input.append(dice.choice([t.name for t in graph.initializer] or [""]))


def _change_attribute(graph: onnx.GraphProto, dice: random.Random) -> None:
    node = dice.choice([node for node in graph.node if node.attribute] or list(graph.node))
    if not node.attribute:
        return
    attribute = dice.choice(node.attribute)
    attribute.i = dice.choice([-7, -1, 0, 1, 2, 99, 1 << 40])
    attribute.f = dice.choice([float("nan"), float("inf"), -1.0, 0.0])
    if attribute.ints:
        attribute.ints[dice.randrange(len(attribute.ints))] = dice.choice([-9, -1, 0, 3, 1 << 33])
    if dice.random() < 0.3:
        attribute.name = dice.choice(["axis", "pads", "kernel_shape", "to", "nonsense"])
    if dice.random() < 0.3:
        attribute.type = dice.choice(list(onnx.AttributeProto.AttributeType.values()))


def _drop_attribute(graph: onnx.GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    if node.attribute:
        node.attribute.pop()


def _change_type(graph: onnx.GraphProto, dice: random.Random) -> None:
    value = dice.choice([*graph.input, *graph.output])
    value.type.tensor_type.elem_type = dice.choice(list(onnx.TensorProto.DataType.values()))


def _change_shape(graph: onnx.GraphProto, dice: random.Random) -> None:
    value = dice.choice([*graph.input, *graph.output])
    dims = value.type.tensor_type.shape.dim
    if dims and dice.random() < 0.7:
        dice.choice(dims).dim_value = dice.choice([-1, 0, 1, 5, 1 << 40])
    elif dice.random() < 0.5:
        value.type.tensor_type.ClearField("shape")
    else:
        value.ClearField("type")


def _change_weight(graph: onnx.GraphProto, dice: random.Random) -> None:
    if not graph.initializer:
        return
    tensor = dice.choice(graph.initializer)
    edit = dice.randrange(3)
    if edit == 0:
        tensor.dims.append(dice.choice([0, 1, 3]))
    elif edit == 1:
        tensor.data_type = dice.choice(list(onnx.TensorProto.DataType.values()))
    else:
        shape = [dice.choice([1, 2, 3]) for _ in range(dice.randrange(4))]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, np.float32), tensor.name))


def _rename_tensor(graph: onnx.GraphProto, dice: random.Random) -> None:
    node = dice.choice(graph.node)
    if node.output:
        names = ["", "x", "attribution", "target", graph.output[0].name]
        node.output[dice.randrange(len(node.output))] = dice.choice(names)


def _drop_output(graph: onnx.GraphProto, dice: random.Random) -> None:
    del graph.output[dice.randrange(len(graph.output))]


EDITS = [
    _change_attribute,
    _change_shape,
    _change_type,
    _change_weight,
    _drop_attribute,
    _drop_node,
    _drop_or_add_input,
    _drop_output,
    _rename_domain,
    _rename_operator,
    _rename_tensor,
    _rewire_input,
]


@pytest.mark.parametrize("chunk", range(8))
def test_converted_or_refused(chunk: int) -> None:
    outcomes = {"converted": 0, "refused": 0}
    for seed in range(chunk, SEEDS, 8):
        dice = random.Random(seed)
        model = onnx.load(CORPUS / dice.choice(MODELS))
        for _ in range(dice.randrange(1, 4)):
            if model.graph.node and model.graph.output:
                dice.choice(EDITS)(model.graph, dice)
        if dice.random() < 0.1:
            model.opset_import[0].version = dice.choice([0, 6, 8, 12, 19, 99])
        try:
            onnxgbp.convert(model, method=dice.choice(["gradient", "guided"]), profile=dice.choice(["ort", "portable"]))
            outcomes["converted"] += 1
        except onnxgbp.OnnxgbpError as error:
            assert str(error).strip(), f"seed {seed}"
            assert "\n" not in str(error), f"seed {seed}"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} ends in {type(error).__name__}: {error}") from error
    assert min(outcomes.values()) > 0, outcomes  # the edits are neither harmless nor all fatal
