"""Models raised to a newer opset compute what they did, where onnx's converter alone changes them too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from checking import ort_run, written_model

from onnxgbp.errors import OnnxgbpError
from onnxgbp.opset import raise_opset

# What makes y of x [1, 2, 7, 9], in the textual syntax of ONNX, with the opset.
MODELS = {
    "Upsample linear": ('y = Upsample <mode="linear"> (x, larger)', 9),
    "Upsample nearest": ('y = Upsample <mode="nearest"> (x, larger)', 9),
    "Upsample of opset 7": ('y = Upsample <mode="linear", scales=[1.0, 1.0, 1.3, 2.6]> (x)', 7),
    "Resize linear": ('y = Resize <mode="linear"> (x, mixed)', 10),
    "Resize to more": ("y = Resize (x, larger)", 10),
    "Resize to less": ("y = Resize (x, smaller)", 10),
    "Resize by a Constant": (
        'less = Constant <value = float[4] {1.0, 1.0, 0.7, 0.4}> ()  y = Resize <mode="nearest"> (x, less)',
        10,
    ),
    "Resize in a branch": (
        "five = Constant <value = int64 {5}> ()  rank = Size (x)  more = Greater (rank, five)"
        "  y = If (more) <then_branch = a () => (float[1, 2, H, W] b)"
        ' { b = Resize <mode="linear"> (x, larger) }, else_branch = c () => (float[1, 2, H, W] d)'
        " { d = Resize (x, larger) }>",
        10,
    ),
    "Softmax": ("y = Softmax (x)", 11),
    "LogSoftmax of the last two": ("y = LogSoftmax <axis=2> (x)", 9),
    "RoiAlign": (
        "rois = Constant <value = float[1, 4] {0.0, 1.0, 5.0, 6.0}> ()  batch = Constant <value = int64[1] {0}> ()"
        "  y = RoiAlign <output_height=3, output_width=3, sampling_ratio=2> (x, rois, batch)",
        10,
    ),
    "Pad": ('y = Pad <pads=[0, 0, 1, 2, 0, 0, 0, 1], mode="reflect"> (x)', 9),
    "Clip": ("y = Clip <max=0.5> (x)", 9),
    "Slice": ("y = Slice <starts=[1, -3], ends=[5, 9], axes=[2, 3]> (x)", 9),
}
CHANGED = {
    "Hardmax": ("y = Hardmax (x)", 9, 13, r"Hardmax \(node ''\) means something else since opset 13"),
    "Resize, some of both": ("y = Resize (x, mixed)", 10, 13, "means something else since opset 11"),
    "Resize, computed": (
        "shape = Shape (x)  wide = Cast <to=1> (shape)  ratio = Div (wide, larger)  y = Resize (x, ratio)",
        10,
        13,
        "means something else since opset 11",
    ),
    "GroupNormalization": (
        "ones = Constant <value = float[1] {1.0}> ()  y = GroupNormalization <num_groups=1> (x, ones, ones)",
        18,
        22,
        "means something else since opset 21",
    ),
}


def model_of(text: str, opset: int) -> onnx.ModelProto:
    scales = {"larger": [1, 1, 1.3, 2.6], "smaller": [1, 1, 0.7, 0.4], "mixed": [1, 1, 0.7, 2.6]}
    constants = {name: np.array(factors, np.float32) for name, factors in scales.items()}
    return written_model(text, {"x": [1, 2, 7, 9]}, constants, opset=opset)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("name", MODELS)
def test_a_raised_model_computes_the_same(name: str, opset: int) -> None:
    model = model_of(*MODELS[name])
    x = np.random.default_rng(0).standard_normal((1, 2, 7, 9)).astype(np.float32)
    raised = raise_opset(model, opset)
    assert raised.opset_import[0].version == opset
    np.testing.assert_allclose(ort_run(raised, {"x": x})["y"], ort_run(model, {"x": x})["y"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CHANGED)
def test_what_would_change_is_refused(name: str) -> None:
    text, before, opset, why = CHANGED[name]
    with pytest.raises(OnnxgbpError, match=why):
        raise_opset(model_of(text, before), opset)
