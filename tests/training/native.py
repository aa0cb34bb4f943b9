"""Runs in the environment of onnxruntime-training: its own gradient of each net, for second_opinion.py to compare with.

    python native.py FOLDER

For each NAME.onnx with NAME.npz in FOLDER (`seed`, `methods`, and the inputs as `x_<name>`; the file's only output is
the explained tensor): builds the gradient graph of the training build, puts our rule at each of its `ReluGrad` nodes,
runs it with the kernels of the training build, and writes NAME.out.npz, one array `<method>`; or NAME.txt, the error.
Before that it converts the net by `--builder ort-training`, see `build`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from small import SMALL

import onnxgbp
from onnxgbp.activations import Activation
from onnxgbp.emit import Emit
from onnxgbp.rules import Choice, install
from onnxgbp.training import NAME, native_gradient


def with_rule(proto: onnx.ModelProto, method: str) -> onnx.ModelProto:
    """Our rule at every ReLU: the plain graph with its ReluGrad nodes replaced, and nothing else."""
    model = ir.from_proto(proto)
    model.graph.meta["ir_version"] = model.ir_version
    op = Emit(model.graph)
    choices = {}
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("com.microsoft", "ReluGrad"):
            continue
        dy, y = node.inputs  # x or y: for a ReLU the same gate
        dy.type = y.type = node.outputs[0].type or ir.TensorType(ir.DataType.FLOAT)
        activation = Activation("Relu", y.producer() or node, y, y, {}, "ReluGrad")
        choices[y.name] = Choice(activation, method, "", 1)
        call = op.private("Activation", y, y, dy, like=y, activation=activation)
        model.graph.insert_before(node, op.take())
        node.outputs[0].replace_all_uses_with(call, replace_graph_outputs=True)
        name = node.outputs[0].name
        model.graph.remove(node, safe=True)
        call.name = name
    install(op, [choices])
    return ir.to_proto(model)


def gradients(path: Path) -> dict[str, np.ndarray]:
    arrays = np.load(path.with_suffix(".npz"))
    model = onnx.load(path)
    (output,) = (value.name for value in model.graph.output)
    feeds = {name[2:]: arrays[name] for name in arrays if name.startswith("x_")}
    made = native_gradient(model, output, list(feeds))
    if path.stem in SMALL:
        onnx.save(made, path.with_suffix(".native"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    results = {}
    for method in arrays["methods"]:
        ruled = with_rule(made, str(method))
        session = onnxruntime.InferenceSession(ruled.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (name,) = feeds
        (results[str(method)],) = session.run([f"{name}_grad"], {**feeds, "onnxgbp_seed": arrays["seed"]})
    return results


def build(path: Path) -> None:
    """The same by `convert --builder ort-training`, as NAME.built; NAME.built.txt says why not."""
    model = onnx.load(path)
    methods = [str(method) for method in np.load(path.with_suffix(".npz"))["methods"]]
    options = {"target": "input", "output": model.graph.output[0].name, "builder": NAME}
    try:
        made = onnxgbp.convert(model, methods=methods, **options)
    except onnxgbp.OnnxgbpError as error:
        path.with_suffix(".built.txt").write_text(str(error))
    else:
        path.with_suffix(".built").write_bytes(made.SerializeToString(deterministic=True))


def answer(given: Path) -> None:
    try:
        np.savez(given.with_suffix(".out.npz"), **gradients(given))
    except Exception as error:  # noqa: BLE001 whatever stops it is this net's result
        given.with_suffix(".txt").write_text((str(error).strip().splitlines() or [type(error).__name__])[0])


for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    build(path)
    answer(path)
