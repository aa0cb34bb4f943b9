"""Runs in a peer's environment: the gradient file that it makes of a model for `scores` with respect to `x`.

python build_gradient.py PEER SOURCE TARGET [BATCH]    BATCH: written into the file in place of the free one
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import onnx


def main(peer: str, source: str, target: str, batch: str = "") -> None:
    model = onnx.load(source)
    if batch:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = int(batch)
    if peer == "onnx-ad":
        onnx.save(importlib.import_module("onnx_ad").reverse(model, inputs=["x"], layout="onnx"), target)
        return
    # How onnxgbp asks onnxruntime-training for its own graph, whose private operators are left in here.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    onnx.save(importlib.import_module("onnxgbp.training").native_gradient(model, "scores", ["x"]), target)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # noqa: BLE001 whatever stops it is this model's result
        sys.exit((str(error).strip().splitlines() or [type(error).__name__])[0])
