"""The onnx wheel's `_expanded` twins: the gradient of an operator equals that of the body the standard gives it."""

from __future__ import annotations

import functools
import re
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
from checking import FLOATS, Array, ort_run, small_model, with_constants

import onnxgbp
from onnxgbp.activations import ACTIVATIONS
from onnxgbp.vjps import VJPS

# Data inputs; the others (scales, biases, bounds) are held fixed, as weights are.
DATA = {"Attention": (0, 1, 2)}

# Its gradient is compared with torch's in test_sampling.py.
NO_TWIN = {
    "AffineGrid": "its body gives vectors to Range, which wants scalars: onnx infers no shape behind it",
    "Range": "its body is a Loop whose number of trips is computed",
}


@functools.cache
def twins() -> dict[str, tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Array]]]:
    """Name -> the operator's model, its expansion, its inputs."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators overflow and deprecate on their own account
        cases = {case.name: case for case in collect_testcases(None)}
    found = {}
    for name, twin in cases.items():
        plain = cases.get(re.sub(r"_expanded(_ver\d+)?$", "", name))
        if "_expanded" not in name or plain is None or plain.model is None or twin.model is None:
            continue
        nodes, values = plain.model.graph.node, plain.model.graph.input
        if len(nodes) != 1 or not (nodes[0].op_type in VJPS or nodes[0].op_type in ACTIVATIONS) or not values:
            continue
        ends = (values[0], plain.model.graph.output[0])
        if any(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for value in ends):
            continue
        given = plain.data_sets[0][0]
        if all(isinstance(array, np.ndarray | np.generic) for array in given):
            found[name] = (plain.model, twin.model, {v.name: np.asarray(a) for v, a in zip(values, given, strict=True)})
    return found


@functools.cache
def newest_opset() -> int:
    """The newest opset that the installed ONNX Runtime loads."""
    identity = [onnx.helper.make_node("Identity", ["x"], ["y"])]
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        try:
            ort_run(small_model(identity, {"x": [1]}, opset=opset), {"x": np.zeros(1, np.float32)})
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
            continue
        return opset
    raise AssertionError("ONNX Runtime loads no model at all")


def _gradient(model: onnx.ModelProto, feeds: dict[str, Array], wrt: list[str], seed: Array) -> list[Array]:
    fixed = with_constants(model, {name: array for name, array in feeds.items() if name not in wrt})
    output = model.graph.output[0].name
    converted = onnxgbp.convert(fixed, method="gradient", target="seed", output=output, wrt=wrt)
    got = ort_run(converted, {**{name: feeds[name] for name in wrt}, "seed": seed})
    return [array for name, array in got.items() if name.startswith("attribution") and name != "attribution_target"]


@pytest.mark.parametrize("name", sorted(twins()))
def test_gradient_of_operator_and_expansion(name: str) -> None:
    plain, twin, feeds = twins()[name]
    node, inputs = plain.graph.node[0], plain.graph.input
    floats = [v.name for v in inputs if v.type.tensor_type.elem_type in FLOATS]
    places = DATA.get(node.op_type, (0,))
    wrt = [n for n in floats if list(node.input).index(n) in places]
    # Off the kinks at round numbers; a sum of two scalars is none that ONNX Runtime takes.
    feeds = {n: np.asarray(feeds[n] + np.float32(0.0137)) if n in wrt else feeds[n] for n in feeds}
    if node.op_type in NO_TWIN:
        pytest.skip(NO_TWIN[node.op_type])
    if any(feeds[n].size == 0 for n in wrt):
        pytest.skip("an empty tensor has no gradient")
    if plain.opset_import[0].version > newest_opset():
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} takes no opset above {newest_opset()}")
    y = ort_run(twin, feeds)[plain.graph.output[0].name]
    seed = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
    for mine, other in zip(_gradient(plain, feeds, wrt, seed), _gradient(twin, feeds, wrt, seed), strict=True):
        # float32 on both sides, by different formulas
        scale = np.abs(other).max() + 1e-6
        np.testing.assert_allclose(mine, other, atol=2e-5 * scale)
