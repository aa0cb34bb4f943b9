"""Attribution for trained networks, straight from their ONNX file."""

from onnxgbp.convert import GradientGraph, convert
from onnxgbp.errors import OnnxgbpError
from onnxgbp.model import load, save

__all__ = ["GradientGraph", "OnnxgbpError", "convert", "load", "save"]
