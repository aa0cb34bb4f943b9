"""Attribution for trained networks, straight from their ONNX file."""

from onnxgbp.convert import GradientGraph, convert
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explainer import Explainer
from onnxgbp.explanation import Explanation
from onnxgbp.model import load, save
from onnxgbp.rules import RULES

__all__ = ["RULES", "Explainer", "Explanation", "GradientGraph", "OnnxgbpError", "convert", "load", "save"]


def __getattr__(name: str) -> str:
    """`__version__`, read from the installed metadata when it is asked for."""
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("onnxgbp")
    raise AttributeError(f"module 'onnxgbp' has no attribute '{name}'")
