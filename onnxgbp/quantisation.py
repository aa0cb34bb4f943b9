"""Quantised tensors: what a QuantizeLinear does to its input, as far as a gradient must know.

A pair of QuantizeLinear and DequantizeLinear is the identity, rounded to steps of `scale` and clipped to the range of
the integers. The straight-through estimator takes the rounding for the identity and keeps the clip.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.constants import constant_value
from onnxgbp.emit import is_float
from onnxgbp.step import Step

__all__ = [
    "REFUSED",
    "Quantiser",
    "carries_integers",
    "hidden_relu",
    "quantiser",
    "quantiser_behind",
    "readable",
    "scale_of",
]

Array = npt.NDArray[np.float64]

_INTEGERS = {
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT16: 16,
    ir.DataType.UINT16: 16,
}
_FLOAT8 = {
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
}

_QOPERATOR = "it computes in integers; use the QDQ format (QuantFormat.QDQ), in a file from before any optimisation"
_DYNAMIC = (
    "its range is computed while the model runs; quantise the model statically in the QDQ format (quantize_static)"
)
_OWN_DOMAIN = (
    "it is ONNX Runtime's own form for 16 bits; quantise a model of opset 21 or newer, which writes the standard's"
)

# Operators of quantised models without a gradient: why, and the way out.
REFUSED = {
    "ConvInteger": _DYNAMIC,
    "DynamicQuantizeLinear": _DYNAMIC,
    "MatMulInteger": _DYNAMIC,
    "QLinearConv": _QOPERATOR,
    "QLinearMatMul": _QOPERATOR,
    "com.microsoft::DequantizeLinear": _OWN_DOMAIN,
    "com.microsoft::DynamicQuantizeLSTM": _DYNAMIC,
    "com.microsoft::DynamicQuantizeMatMul": _DYNAMIC,
    "com.microsoft::MatMulIntegerToFloat": _DYNAMIC,
    "com.microsoft::NhwcMaxPool": _QOPERATOR,
    "com.microsoft::QAttention": _DYNAMIC,
    "com.microsoft::QEmbedLayerNormalization": _QOPERATOR,
    "com.microsoft::QGemm": _QOPERATOR,
    "com.microsoft::QuantizeLinear": _OWN_DOMAIN,
} | {
    f"com.microsoft::QLinear{name}": _QOPERATOR
    for name in (
        "Add",
        "AveragePool",
        "Concat",
        "GlobalAveragePool",
        "LeakyRelu",
        "Mul",
        "ReduceMean",
        "Sigmoid",
        "Softmax",
        "Where",
    )
}


# Their result lies within the range of their input.
_KEEPS_RANGE = frozenset(
    "Expand Flatten GlobalMaxPool Identity MaxPool Reshape Slice Squeeze Tile Transpose Unsqueeze".split()
)


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """What a QuantizeLinear rounds and clips to: real numbers, scalars or of a shape that broadcasts to x.

    scale: the distance of two neighbours; low, high: the ends of the range.
    """

    scale: Array
    low: Array
    high: Array

    def holds(self, value: ir.Value) -> bool:
        """Whether a tensor lies within the range for sure: it was quantised to it before, and only moved since."""
        node = value.producer()
        while node is not None and not node.domain and node.op_type in _KEEPS_RANGE and node.inputs[0] is not None:
            value = node.inputs[0]
            node = value.producer()
        maker = quantiser_behind(value)
        before = readable(maker) if maker is not None else None
        if before is None or self.scale.size > 1 or before.scale.size > 1:  # an axis of its own may have been moved
            return False
        return bool(self.low <= before.low and before.high <= self.high)


def quantiser(node: ir.Node) -> Quantiser:
    """Reads the parameters of a QuantizeLinear.

    Raises:
        OnnxgbpError: they are computed while the model runs, one for each block, or of a float type.
    """
    step = Step(node)
    kind = step.y.dtype
    if kind not in _INTEGERS:
        raise step.refuse(f"it quantises to {kind.name if kind else 'an unknown type'}; quantise to integers instead")
    bits = _INTEGERS[kind]
    smallest = -(2 ** (bits - 1)) if kind.name.startswith("INT") else 0
    lowest, highest = _narrowed(step.y, smallest, smallest + 2**bits - 1)
    scale, zero = scale_of(step), _parameter(step, 2) if step.has(2) else np.zeros(())
    return Quantiser(scale, (lowest - zero) * scale, (highest - zero) * scale)


def _narrowed(integers: ir.Value, lowest: int, highest: int) -> tuple[int, int]:
    """The range of a quantiser whose integers go through a Clip: so torch exports 7 bits, and symmetric ranges."""
    users = list(dict.fromkeys(integers.consumers()))
    if len(users) != 1 or users[0].op_type != "Clip" or users[0].domain:
        return lowest, highest
    low, high = (Step(users[0]).argument(name) for name in ("min", "max"))
    if any(bound is not None and not math.isfinite(bound) for bound in (low, high)):
        return lowest, highest
    lowest = lowest if low is None else max(lowest, int(low))
    return lowest, highest if high is None else min(highest, int(high))


def readable(node: ir.Node) -> Quantiser | None:
    """As `quantiser`, with None in the place of an error."""
    if node.outputs[0].dtype not in _INTEGERS or "block_size" in node.attributes:
        return None
    if any(constant_value(value) is None for value in node.inputs[1:] if value is not None):
        return None
    return quantiser(node)


def quantiser_behind(value: ir.Value) -> ir.Node | None:
    """The QuantizeLinear whose integers a tensor stands for, where a DequantizeLinear made it from such."""
    maker = value.producer()
    if maker is None or maker.domain or maker.op_type != "DequantizeLinear" or maker.inputs[0] is None:
        return None
    source = maker.inputs[0].producer()
    if source is not None and source.op_type == "Clip" and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    return source if source is not None and not source.domain and source.op_type == "QuantizeLinear" else None


def scale_of(step: Step) -> Array:
    """The scale of a QuantizeLinear or a DequantizeLinear, ready to broadcast to its input."""
    if step.argument("block_size"):
        raise step.refuse("it quantises in blocks; quantise activations per tensor or per axis instead")
    return _parameter(step, 1)


def _parameter(step: Step, index: int) -> Array:
    array = constant_value(step.input(index))
    if array is None:
        raise step.refuse(_DYNAMIC)
    wide = np.asarray(array, np.float64)
    if wide.size == 1:
        return wide.reshape(())
    axis = int(step.argument("axis"))
    if not step.rank():
        raise step.refuse(f"it has {wide.size} scales for a single number")
    return wide.reshape([-1] + [1] * (step.rank() - 1 - axis % step.rank()))


# Their result cannot be negative, whatever they read.
_NON_NEGATIVE = frozenset("Abs Exp HardSigmoid Relu ReduceL1 ReduceL2 Sigmoid Softmax Softplus Sqrt".split())
# Their result is not negative where none of their inputs is.
_KEEPS_SIGN = frozenset(
    "Add AveragePool Cast Concat DepthToSpace Div Dropout Erf Expand Flatten Gather GatherND Gelu GlobalAveragePool "
    "GlobalMaxPool HardSwish Identity LRN LeakyRelu MaxPool Mean Min Mul Pad ReduceMax ReduceMean ReduceSum Reshape "
    "Slice Softsign SpaceToDepth Split Squeeze Sum Swish Tanh Tile Transpose Unsqueeze Where".split()
)


def hidden_relu(node: ir.Node) -> Quantiser | None:
    """The quantiser of a QuantizeLinear that is a ReLU as well, or None.

    A range that starts at 0 clips what is negative: so quantisers write the ReLU behind a layer, and delete the
    operator. Where x cannot be negative anyway there was none: it comes out of a ReLU, or is the model's own input, of
    which the quantiser saw no negative value.
    """
    found = readable(node) if node.op_type == "QuantizeLinear" and not node.domain else None
    if found is None or np.any(found.low != 0) or _non_negative(node.inputs[0], {}):
        return None
    return found


def _non_negative(value: ir.Value | None, known: dict[ir.Value, bool]) -> bool:
    """Whether a tensor holds no negative number, as far as the operators behind it tell."""
    if value is None:
        return True  # an optional input that is left out
    if value not in known:
        known[value] = False
        known[value] = _holds_no_negative(value, known)
    return known[value]


def _holds_no_negative(value: ir.Value, known: dict[ir.Value, bool]) -> bool:
    constant = constant_value(value)
    if constant is not None:
        return bool(np.all(constant >= 0))
    node = value.producer()
    if node is None:
        return value.is_graph_input()
    if node.domain:
        return False
    if node.op_type in _KEEPS_SIGN:
        return all(_non_negative(source, known) for source in node.inputs if source is None or is_float(source))
    if node.op_type in ("Resize", "Upsample"):
        return Step(node).argument("mode") != "cubic" and _non_negative(node.inputs[0], known)
    if node.op_type == "Max":
        return any(_non_negative(source, known) for source in node.inputs)
    if node.op_type == "Clip":
        low = constant_value(Step(node).tensor("min"))
        return low is not None and bool(np.all(low >= 0))
    if node.op_type == "DequantizeLinear":
        source = quantiser_behind(value)
        found = readable(source) if source is not None else None
        return found is not None and bool(np.all(found.low >= 0))
    return node.op_type in _NON_NEGATIVE


def carries_integers(node: ir.Node, value: ir.Value) -> bool:
    """Whether an output holds integers that stand for real numbers: made by a quantiser, or computed from such."""
    if node.op_type in ("Cast", "CastLike"):
        return False
    return value.dtype in _INTEGERS or value.dtype in _FLOAT8 or node.op_type in ("ConvInteger", "MatMulInteger")
