"""One function per Python runtime. Runs in the runtime's own environment, where onnxgbp is not installed.

    python adapters.py RUNTIME FOLDER OUT

RUNTIME is a function below: it loads a file and returns what runs it, from arrays by name to arrays by name. Reads
FOLDER/cases.json (see cases.py); for each case writes its outputs as raw little-endian numbers into OUT, and last
OUT/results.json: the runtime's version, and of each case the outputs' files, types and shapes, or the error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
Run = Callable[[Arrays], Arrays]


def onnxruntime(path: str, outputs: list[str]) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: dict(zip(outputs, session.run(outputs, inputs)))


def onnx(path: str, outputs: list[str]) -> Run:
    """The reference evaluator as it comes, in float32."""
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(path)
    return lambda inputs: dict(zip(outputs, session.run(outputs, inputs)))


def openvino(path: str, outputs: list[str], precision: str | None = "f32") -> Run:
    """In float32, for which one has to ask: where the CPU has bfloat16, OpenVINO computes in it by default."""
    import openvino as ov

    core = ov.Core()
    config = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(path), "CPU", config)
    return lambda inputs: {name: compiled(inputs)[name] for name in outputs}


def openvino_default(path: str, outputs: list[str]) -> Run:
    return openvino(path, outputs, precision=None)


def opencv(path: str, outputs: list[str]) -> Run:
    import cv2

    net = cv2.dnn.readNetFromONNX(path)

    def run(inputs: Arrays) -> Arrays:
        for name, x in inputs.items():
            net.setInput(x, name)
        return dict(zip(outputs, net.forward(outputs)))

    return run


def tract(path: str, outputs: list[str]) -> Run:
    """Outputs come by position: the cases name all of them, in the file's order."""
    import tract as runtime

    model = runtime.onnx().load(path)
    names = [model.input_name(i) for i in range(model.input_count())]

    def run(inputs: Arrays) -> Arrays:
        for i, name in enumerate(names):
            kind = {"float32": "f32", "int64": "i64"}[str(inputs[name].dtype)]
            model.set_input_fact(i, ",".join([*map(str, inputs[name].shape), kind]))
        results = model.into_model().into_runnable().run([inputs[name] for name in names])
        return dict(zip(outputs, (result.to_numpy() for result in results), strict=True))

    return run


def tinygrad(path: str, outputs: list[str]) -> Run:
    # Compiled by clang. On one thread: with several, release 0.14 was seen to wait for itself for ever.
    os.environ |= {"DEV": "CPU", "NUM_CPU_THREADS": "1", "PARALLEL": "0"}
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    session = OnnxRunner(path)

    def run(inputs: Arrays) -> Arrays:
        results = session({name: Tensor(x) for name, x in inputs.items()})
        return {name: results[name].numpy() for name in outputs}

    return run


def tvm(path: str, outputs: list[str]) -> Run:
    """Compiled for the shapes of the case."""
    import onnx as protobuf
    import tvm as runtime
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model = protobuf.load(path)

    def run(inputs: Arrays) -> Arrays:
        module = from_onnx(model, {name: list(x.shape) for name, x in inputs.items()}, keep_params_in_input=False)
        compiled = relax.VirtualMachine(runtime.compile(module, target="llvm"), runtime.cpu())
        results = compiled["main"](*(runtime.runtime.tensor(x) for x in inputs.values()))
        return dict(zip(outputs, (result.numpy() for result in results)))

    return run


PACKAGES = {"tvm": "apache-tvm", "opencv": "opencv-python-headless", "openvino_default": "openvino"}


def outcome(runtime: str, case: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """What results.json says of one case."""
    try:
        inputs = {}
        for name, told in case["inputs"].items():
            x = np.frombuffer((folder / told["file"]).read_bytes(), np.dtype(told["dtype"]).newbyteorder("<"))
            inputs[name] = x.reshape(told["shape"]).astype(told["dtype"])
        values = globals()[runtime](str(folder / case["model"]), case["outputs"])(inputs)
        outputs = {}
        for name in case["outputs"]:
            value = np.ascontiguousarray(values[name])
            file = f"{case['name']}.{name}.out"
            (out / file).write_bytes(value.astype(value.dtype.newbyteorder("<")).tobytes())
            outputs[name] = {"file": file, "dtype": str(value.dtype), "shape": list(value.shape)}
    except Exception as error:  # noqa: BLE001 whatever a runtime raises is this case's result
        return {"error": f"{type(error).__name__}: {error}"}
    return {"outputs": outputs}


def main(runtime: str, folder: Path, out: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    results = {case["name"]: outcome(runtime, case, folder, out) for case in cases}
    version = importlib.metadata.version(PACKAGES.get(runtime, runtime))
    (out / "results.json").write_text(json.dumps({"version": version, "cases": results}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
