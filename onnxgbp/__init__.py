"""Attribution for trained networks, straight from their ONNX file."""

from onnxgbp.convert import GradientGraph, convert
from onnxgbp.errors import OnnxgbpError
from onnxgbp.model import load, save
from onnxgbp.rules import RULES
from onnxgbp.runtime import Explainer, Explanation

__all__ = ["RULES", "Explainer", "Explanation", "GradientGraph", "OnnxgbpError", "convert", "load", "save"]
