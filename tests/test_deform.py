"""DeformConv, against differences of what ONNX Runtime computes in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from checking import Array, ort_run
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxgbp
from onnxgbp.float64 import evaluator
from onnxgbp.verify import verify_model


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: tuple[int, int] = (2, 3)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    offset_group: int = 1
    mask: bool = True
    bias: bool = False
    opset: int = 19
    free: bool = False

    def arrays(self) -> dict[str, Array]:
        rng, size, channels = np.random.default_rng(0), np.array((6, 5)), 4
        pads, kernel = np.array(self.pads), np.array(self.kernel)
        reach = (kernel - 1) * self.dilations + 1
        out = (size + pads[:2] + pads[2:] - reach) // self.strides + 1
        places = self.offset_group * kernel.prod()
        arrays = {
            "x": rng.standard_normal((2, channels, *size)),
            "w": rng.standard_normal((6, channels // self.group, *kernel)),
            "offset": rng.uniform(-2.5, 2.5, (2, 2 * places, *out)),  # beyond the border as well
        }
        if self.bias:
            arrays["b"] = rng.standard_normal(6)
        if self.mask:
            arrays["mask"] = rng.uniform(-1, 1, (2, places, *out))
        return arrays

    def model(self, dtype: int = TensorProto.DOUBLE) -> ModelProto:
        arrays = self.arrays()
        names = ["x", "w", "offset", "b" if self.bias else "", "mask" if self.mask else ""]
        attributes = {"strides": self.strides, "pads": self.pads, "dilations": self.dilations}
        node = helper.make_node(
            "DeformConv", names, ["y"], group=self.group, offset_group=self.offset_group, **attributes
        )
        shapes = {name: array.shape for name, array in arrays.items() if name not in ("w", "b")}
        if self.free:
            shapes = {name: ("N", shape[1], f"{name}H", f"{name}W") for name, shape in shapes.items()}
        narrow = np.float32 if dtype == TensorProto.FLOAT else np.float64
        graph = helper.make_graph(
            [node],
            "deformed",
            [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes.items()],
            [helper.make_tensor_value_info("y", dtype, None)],
            [numpy_helper.from_array(arrays[name].astype(narrow), name) for name in ("w", "b") if name in arrays],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)

    def feeds(self) -> dict[str, Array]:
        return {name: array for name, array in self.arrays().items() if name not in ("w", "b")}


CASES = [
    Case(),
    Case(mask=False),
    Case(bias=True, opset=22),
    Case(kernel=(1, 1)),
    Case(kernel=(3, 2), strides=(2, 1), pads=(1, 0, 2, 1)),
    Case(pads=(2, 1, 0, 3), dilations=(3, 2)),
    Case(group=2),
    Case(offset_group=2),
    Case(group=2, offset_group=4, mask=False, strides=(3, 2)),
    Case(free=True, pads=(1, 1, 1, 1), opset=22),
    Case(free=True, offset_group=2, group=2, mask=False),
]


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_deform_conv(case: Case, profile: str) -> None:
    source, feeds = case.model(), case.feeds()
    before = ort_run(source, feeds)["y"]
    rng = np.random.default_rng(1)
    seed = rng.standard_normal(before.shape)
    converted = onnxgbp.convert(source, method="gradient", target="seed", output="y", profile=profile, wrt=list(feeds))
    results = ort_run(converted, {**feeds, "seed": seed})
    for name, array in feeds.items():
        for _ in range(3):
            v = rng.standard_normal(array.shape)
            ends = [ort_run(source, {**feeds, name: array + sign * 1e-6 * v})["y"] for sign in (1, -1)]
            change = (seed * (ends[0] - ends[1])).sum() / 2e-6
            product = results[f"attribution_{name}"] * v
            assert abs(product.sum() - change) <= 1e-7 * np.linalg.norm(product) * np.sqrt(product.size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_that_verify_runs_is_that_of_onnx_runtime(case: Case) -> None:
    model, feeds = case.model(), case.feeds()
    np.testing.assert_allclose(evaluator(model).run(None, feeds)[0], ort_run(model, feeds)["y"], atol=1e-12)


def test_verify_checks_a_deformable_layer_in_float64(tmp_path) -> None:
    """The offsets and the mask of a layer are themselves convolutions of x, as in every net that has one."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "wo"], ["offset"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "wm"], ["open"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["open"], ["mask"]),
        helper.make_node("DeformConv", ["x", "w", "offset", "", "mask"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    shapes = {"wo": (18, 2, 3, 3), "wm": (9, 2, 3, 3), "w": (4, 2, 3, 3)}
    graph = helper.make_graph(
        nodes,
        "deformed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 8, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array((rng.standard_normal(s) * 0.3).astype(np.float32), n) for n, s in shapes.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    onnxgbp.save(onnxgbp.convert(tmp_path / "net.onnx", method="guided"), tmp_path / "out.onnx")
    rows = {check.name: check for check in verify_model(tmp_path / "out.onnx", tmp_path / "net.onnx").checks}
    assert all(check.passed for check in rows.values()), rows
