"""The usual architectures, exported by both of torch's exporters with a free batch, against torch's own gradients.

Weights are random, the networks of `nets.py` small. Each is exported at one batch and judged at another, in the order
of CASES, so that the tests of one exported file follow each other and share it.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, forward_error, ort_run, torch_reference

import onnxgbp

torch = pytest.importorskip("torch", reason="the exporters and the gradients to compare with are torch's")

from nets import NETS, VOCABULARY, build  # noqa: E402 - builds on torch

EXPORTED_BATCH, BATCH = 2, 3

# The default opset of each exporter for every net; for a few also the oldest that people still ask for, and newer ones.
OPSETS = {"torchscript": 17, "dynamo": 18}
CASES = [(name, exporter, opset) for name in NETS for exporter, opset in OPSETS.items()]
CASES += [(name, "torchscript", 11) for name in ("ResNet-18", "MobileNetV2", "Swin")]
CASES += [(name, "torchscript", 13) for name in ("MobileNetV3", "ShuffleNetV2", "BERT")]
CASES += [(name, "dynamo", 20) for name in ("GoogLeNet", "ConvNeXt", "Mixer")]
CASES += [(name, "dynamo", 23) for name in ("ResNet-18", "EfficientNet-B0", "DeiT")]

# Every ReLU of these is a module, used once: all that Captum's hooks can see.
FOR_CAPTUM = ("AlexNet", "VGG-16", "ResNet-18", "ResNet-50")


@dataclass(frozen=True)
class Exported:
    name: str
    net: Any
    model: onnx.ModelProto
    feeds: dict[str, Array]
    wrt: str | None  # an inner tensor, where the inputs are integers
