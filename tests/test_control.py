"""If, Scan, Loop: known branches take the place of the choice, others have a gradient with the same control flow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import pytest
from checking import Array, check_vjp, cosine, evaluator, ort_run, reference_run
from onnx.backend.test.case.node import collect_testcases

import onnxgbp
from onnxgbp.convert import GradientGraph
from onnxgbp.model import load


def parse(text: str) -> onnx.ModelProto:
    model: onnx.ModelProto = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


# --- a branch that is known -----------------------------------------------------------------------

WHOLE = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3] x) => (float[N,3] y)
<bool which = {1}, float[3,3] w = {1, 2, -1, 0.5, -2, 1, 0, 1, 3}>
{
  [choice] y = If (which) <
    then_branch = train () => (float[N,3] z) <float[3] b = {0.1, -0.2, 0.3}> {
      h = MatMul(x, w)  p = Add(h, b)  [act] r = Relu(p)  z = MatMul(r, w) },
    else_branch = eval () => (float[N,3] z) <float[3] b = {5, 5, 5}> { h = Add(x, b)  z = Sigmoid(h) }>
}
"""
PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3] x) => (float[N,3] y)
<float[3,3] w = {1, 2, -1, 0.5, -2, 1, 0, 1, 3}, float[3] b = {0.1, -0.2, 0.3}>
{ h = MatMul(x, w)  p = Add(h, b)  [act] r = Relu(p)  y = MatMul(r, w) }
"""


@pytest.mark.parametrize("method", ["gradient", "deconvnet", "guided"])
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_a_whole_model_in_an_if_is_its_branch(method: str, profile: str) -> None:
    results = []
    for text in (WHOLE, PLAIN):
        converted = onnxgbp.convert(parse(text), method=method, profile=profile)
        assert "If" not in operators(converted)
        assert "act" in {node.name for node in converted.graph.node}
        results.append(ort_run(converted, {"x": normal(4, 3).astype(np.float32)}))
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[1])


def test_the_other_branch_leaves_nothing_behind() -> None:
    converted = onnxgbp.convert(parse(WHOLE.replace("which = {1}", "which = {0}")), target="seed")
    assert {"Relu", "MatMul"}.isdisjoint(operators(converted))
    x, seed = normal(4, 3), normal(4, 3, seed=1)
    results = ort_run(converted, {"x": x.astype(np.float32), "seed": seed.astype(np.float32)})
    assert cosine(results["attribution"], seed) > 0.9999999  # the Sigmoid behind is stripped: its input is explained


# A squeeze that torch guards, for the dim might not be 1: here the shape tells. The second copy has names in common.
GUARDED = """
<ir_version: %d, opset_import: ["" : 11]>
net (float[N,3,1] x) => (float[N,3] y, float[N,3] z)
{
  shape = Shape(x)
  two = Constant<value = int64 {2}>()
  dim = Gather(shape, two)
  one = Constant<value = int64 {1}>()
  is_one = Equal(dim, one)
  r = Relu(x)
  y = If (is_one) <then_branch = a () => (float[N,3] o) { m = Squeeze<axes = [2]>(r)  o = Neg(m) },
                   else_branch = b () => (float[N,3,1] o) { o = Identity(r) }>
  z = If (is_one) <then_branch = a () => (float[N,3] o) { m = Squeeze<axes = [2]>(r)  o = Identity(m) },
                   else_branch = b () => (float[N,3,1] o) { o = Identity(r) }>
}
"""


@pytest.mark.parametrize("ir_version", [3, 8])
def test_a_condition_that_the_shapes_tell(ir_version: int) -> None:
    model = onnx.parser.parse_model(GUARDED % ir_version)
    converted = onnxgbp.convert(model, method="gradient", output="y", target="seed")
    assert "If" not in operators(converted)
    assert [output.name for output in converted.graph.output][:2] == ["y", "z"]
    x, seed = normal(4, 3, 1).astype(np.float32), normal(4, 3, seed=1).astype(np.float32)
    before, after = ort_run(model, {"x": x}), ort_run(converted, {"x": x, "seed": seed})
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert np.array_equal(after["attribution"], np.where(x > 0, -seed[..., None], 0))


NESTED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3] x) => (float[N,3] y, float[N,3] z)
<bool yes = {1}>
{
  y, z = If (yes) <then_branch = a () => (float[N,3] o, float[N,3] p) {
      no = Constant<value = bool {0}>()
      q = If (no) <then_branch = b () => (float[N,3] t) { t = Exp(x) },
                   else_branch = c () => (float[N,3] t) { t = Mul(x, x) }>
      o = Relu(q)  p = Identity(o) },
    else_branch = d () => (float[N,3] o, float[N,3] p) { o = Exp(x)  p = Exp(x) }>
}
"""


def test_nested_branches() -> None:
    converted = onnxgbp.convert(parse(NESTED), method="gradient", output="z", target="seed")
    assert {"If", "Exp"}.isdisjoint(operators(converted))
    x, seed = normal(4, 3).astype(np.float32), normal(4, 3, seed=1).astype(np.float32)
    results = ort_run(converted, {"x": x, "seed": seed})
    np.testing.assert_allclose(results["attribution"], 2 * x * seed, rtol=1e-6)
    assert np.array_equal(results["y"], results["z"])


# --- control flow that stays ----------------------------------------------------------------------

CHOICE = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[N,4] x, bool which) => (double[N,4] y, double[N,4] other)
{
  a = Tanh(x)
  b, other = If (which) <
    then_branch = f () => (double[N,4] o, double[N,4] p)
      <double[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}> {
      h = Mul(a, x)  e = Exp(h)  o = MatMul(e, w)  p = Neg(o) },
    else_branch = g () => (double[N,4] o, double[N,4] p) {
      s = Sin(a)  q = Constant<value = int64[2] {-1, 4}>()  t = Reshape(s, q)  o = Mul(t, t)  p = Exp(o) }>
  y = Mul(b, x)
}
"""
UNREAD = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[N,4] x, bool which) => (double[N,4] y)
<double[1,4] k = {1, 2, 3, 4}>
{
  b = If (which) <then_branch = f () => (double[N,4] o) { e = Exp(x)  o = Mul(e, k) },
                  else_branch = g () => (double[1,4] o) { o = Neg(k) }>
  y = Mul(b, x)
}
"""
DEEP = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[N,4] x, bool which, bool inner) => (double[N,4] y)
{
  a = Tanh(x)
  y = If (which) <
    then_branch = f () => (double[N,4] o) {
      h = Exp(x)
      i = If (inner) <then_branch = k () => (double[N,4] m) { m = Mul(h, a) },
                      else_branch = l () => (double[N,4] m) { m = Mul(x, a) }>
      o = Sin(i) },
    else_branch = g () => (double[N,4] o) { o = Neg(a) }>
}
"""
SCAN = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[%s,N,3] x, double[N,3] first, double[N,3] k) => (double[N,3] last, double[T,N,3] all)
{
  e = Exp(k)
  last, all = Scan <num_scan_inputs = 1, body = b (double[N,3] s, double[N,3] xt) => (double[N,3] so, double[N,3] yt) {
    p = Mul(s, e)  q = Add(p, xt)  so = Tanh(q)  m = Mul(so, xt)  yt = Sin(m) }> (first, x)
}
"""
COUNTED = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[T,N,3] x, int64 count) => (double[N,3] last)
{
  shape = Shape<start = 1>(x)
  first = ConstantOfShape<value = double[1] {0.5}>(shape)
  none, last = Scan <num_scan_inputs = 1, body =
    b (int64 i, double[N,3] s, double[N,3] xt) => (int64 io, double[N,3] so) {
      one = Constant<value = int64 {1}>()  io = Add(i, one)
      d = Cast<to = 11>(io)  q = Mul(s, d)  r = Add(q, xt)  so = Tanh(r)
  }> (count, first, x)
}
"""
LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[N,3] x, double[N,3] k, int64 times) => (double[N,3] y)
<bool go = {1}>
{
  y = Loop <body = b (int64 i, bool c, double[N,3] s) => (bool co, double[N,3] so) {
    co = Identity(c)  d = Cast<to = 11>(i)  p = Mul(s, k)  q = Add(p, d)  so = Sin(q) }> (times, go, x)
}
"""
WHILE = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[N,3] x) => (double[N,3] y)
{
  most = Constant<value = int64 {9}>()
  go = Constant<value = bool {1}>()
  y = Loop <body = b (int64 i, bool c, double[N,3] s) => (bool co, double[N,3] so) {
    half = Constant<value = double {0.7}>()  so = Mul(s, half)  a = Abs(so)  m = ReduceMax<keepdims = 0>(a)
    limit = Constant<value = double {0.5}>()  co = Greater(m, limit) }> (most, go, x)
}
"""
STEPS = {"x": normal(5, 2, 3), "first": normal(2, 3, seed=1), "k": normal(2, 3, seed=2)}
PAIR = {"x": normal(2, 3), "k": normal(2, 3, seed=2)}
CASES: dict[str, tuple[str, Mapping[str, Array], Sequence[str], str]] = {
    "If, then": (CHOICE, {"x": normal(3, 4), "which": np.array(True)}, ["x"], "y"),
    "If, else": (CHOICE, {"x": normal(3, 4), "which": np.array(False)}, ["x"], "y"),
    "If, another output, then": (CHOICE, {"x": normal(3, 4), "which": np.array(True)}, ["x"], "other"),
    "If, another output, else": (CHOICE, {"x": normal(3, 4), "which": np.array(False)}, ["x"], "other"),
    "If, unread, then": (UNREAD, {"x": normal(3, 4), "which": np.array(True)}, ["x"], "y"),
    "If, unread, else": (UNREAD, {"x": normal(3, 4), "which": np.array(False)}, ["x"], "y"),
    "If, nested": (DEEP, {"x": normal(3, 4), "which": np.array(True), "inner": np.array(False)}, ["x"], "y"),
    "Scan, last": (SCAN % "T", STEPS, ["x", "first", "k"], "last"),
    "Scan, all": (SCAN % "T", STEPS, ["x", "first", "k"], "all"),
    "Scan, an integer state": (COUNTED, {"x": normal(5, 2, 3), "count": np.array(0)}, ["x"], "last"),
    "Loop": (LOOP, {**PAIR, "times": np.array(4)}, ["x", "k"], "y"),
    "Loop that stops itself": (WHILE, {"x": normal(2, 3)}, ["x"], "y"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_differences(name: str) -> None:
    text, feeds, wrt, output = CASES[name]
    figures = check_vjp(parse(text), feeds, output=output, wrt=wrt, linear=False)
    assert all(figure.right for figure in figures), [figure for figure in figures if not figure.right]


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_agrees_with_the_reference(name: str) -> None:
    text, feeds, wrt, output = CASES[name]
    converted = onnxgbp.convert(parse(text), method="gradient", output=output, wrt=wrt, target="seed")
    given = {**feeds, "seed": normal(*evaluator(parse(text)).run([output], dict(feeds))[0].shape, seed=5)}
    ours, wanted = ort_run(converted, given), reference_run(converted, given)
    before = ort_run(parse(text), feeds)
    assert all(np.array_equal(before[n], ours[n]) for n in before)
    for key in (key for key in ours if key.startswith("attribution") and key != "attribution_target"):
        assert cosine(ours[key], wanted[key]) > 1 - 1e-12


def test_a_loop_that_does_not_run() -> None:
    converted = onnxgbp.convert(parse(LOOP), method="gradient", wrt=["x", "k"], target="seed")
    seed = normal(2, 3, seed=5)
    results = ort_run(converted, {**PAIR, "times": np.array(0), "seed": seed})
    assert np.array_equal(results["attribution_x"], seed)
    assert not results["attribution_k"].any()


def test_the_portable_profile_unrolls_a_scan_of_known_length() -> None:
    for output in ("last", "all"):
        figures = check_vjp(
            parse(SCAN % "5"), STEPS, output=output, wrt=["x", "first", "k"], linear=False, profile="portable"
        )
        assert all(figure.right for figure in figures)


@pytest.mark.parametrize("text", [CHOICE, SCAN % "T", LOOP], ids=["If", "Scan", "Loop"])
def test_the_portable_profile_refuses_other_control_flow(text: str) -> None:
    output = parse(text).graph.output[0].name
    with pytest.raises(onnxgbp.OnnxgbpError, match=r"the portable profile has no .* profile ort$"):
        onnxgbp.convert(parse(text), output=output, wrt="x", target="seed", profile="portable")


# Axes and directions other than the first: the reference evaluator has none, ONNX Runtime does.
TURNED = """
<ir_version: 8, opset_import: ["" : 17]>
net (double[N,T,3] x, double[N,3] first) => (double[N,3] last, double[N,3,T] all)
{
  last, all = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [%d], scan_output_axes = [-1],
    scan_output_directions = [%d], body = b (double[N,3] s, double[N,3] xt) => (double[N,3] so, double[N,3] yt) {
    q = Add(s, xt)  so = Tanh(q)  m = Mul(so, xt)  yt = Sin(m) }> (first, x)
}
"""


@pytest.mark.parametrize(("length", "profile"), [("T", "ort"), ("5", "portable")])
@pytest.mark.parametrize("output", ["last", "all"])
@pytest.mark.parametrize("directions", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_axes_and_directions(directions: tuple[int, int], output: str, length: str, profile: str) -> None:
    model = onnx.parser.parse_model((TURNED % directions).replace("T]", f"{length}]").replace("T,", f"{length},"))
    feeds = {"x": normal(2, 5, 3), "first": normal(2, 3, seed=1)}
    seed = normal(*ort_run(model, feeds)[output].shape, seed=5)
    options = {"method": "gradient", "output": output, "wrt": ["x", "first"], "profile": profile}
    converted = onnxgbp.convert(model, target="seed", **options)  # type: ignore[arg-type]
    results = ort_run(converted, {**feeds, "seed": seed})
    for name, value in feeds.items():
        v = normal(*value.shape, seed=7)
        above, below = (ort_run(model, {**feeds, name: value + sign * 1e-6 * v})[output] for sign in (1, -1))
        difference = ((above - below) * seed).sum() / 2e-6
        assert abs((results[f"attribution_{name}"] * v).sum() - difference) < 1e-8


RULED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,4] x, bool which) => (float[N,4] y)
<float[4,4] w = {1, 2, -3, 4, -5, 6, 7, -8, 9, 1, -2, 3, -4, 5, 6, 7}>
{
  y = If (which) <
    then_branch = f () => (float[N,4] o) { h = MatMul(x, w)  [then_relu] r = Relu(h)  o = MatMul(r, w) },
    else_branch = g () => (float[N,4] o) { h = Neg(x)  [else_relu] r = Relu(h)  o = MatMul(r, w) }>
}
"""


@pytest.mark.parametrize("method", ["gradient", "deconvnet", "guided"])
def test_rules_apply_to_activations_in_a_branch(method: str) -> None:
    model, w = parse(RULED), np.array([1, 2, -3, 4, -5, 6, 7, -8, 9, 1, -2, 3, -4, 5, 6, 7.0]).reshape(4, 4)
    converted = onnxgbp.convert(model, method=method, target="seed")
    x, seed = normal(3, 4), normal(3, 4, seed=1)
    for which in (True, False):
        feeds: dict[str, Any] = {"x": x.astype(np.float32), "which": np.array(which), "seed": seed.astype(np.float32)}
        h, dy = (x @ w if which else -x), seed @ w.T
        dr = {"gradient": dy * (h > 0), "deconvnet": np.maximum(dy, 0), "guided": np.maximum(dy, 0) * (h > 0)}[method]
        np.testing.assert_allclose(
            ort_run(converted, feeds)["attribution"], dr @ w.T if which else -dr, rtol=1e-4, atol=1e-4
        )


def test_activations_in_a_branch_are_in_the_audit() -> None:
    graph = GradientGraph.build(load(parse(RULED)), target="seed")
    choices = graph.choices(method="guided", rule=["then*=gradient"])
    assert {choice.name: choice.rule for choice in choices.values()} == {"then_relu": "gradient", "else_relu": "guided"}


def test_an_operator_without_a_rule_in_a_branch_is_named() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,3] x, bool which) => (float[N] y)
    { y = If (which) <then_branch = f () => (float[N] o)
                          { [inner] b = Bernoulli(x) o = ReduceMax<axes = [1, 2], keepdims = 0>(b) },
                      else_branch = g () => (float[N] o) { o = ReduceMax<axes = [1, 2], keepdims = 0>(x) }> }
    """
    with pytest.raises(onnxgbp.OnnxgbpError, match=r"operator Bernoulli \(node 'inner'\)"):
        onnxgbp.convert(parse(text), target="seed")


def test_copies_of_a_body_share_its_weights_and_leave_it_as_it_was() -> None:
    model = parse(CHOICE)
    converted = onnxgbp.convert(model, output="y", target="seed")
    weights = [tensor.name for tensor in converted.graph.initializer if list(tensor.dims) == [4, 4]]
    assert weights == ["w"]
    before, after = (next(n for n in m.graph.node if n.op_type == "If") for m in (model, converted))
    for name in ("then_branch", "else_branch"):
        bodies = [next(a.g for a in node.attribute if a.name == name) for node in (before, after)]
        assert [onnx.printer.to_text(node) for node in bodies[0].node] == [
            onnx.printer.to_text(node) for node in bodies[1].node
        ]


@pytest.mark.parametrize("case", ["linear", "gated", "delta", "gated_delta_gqa"])
def test_a_scan_in_the_standard_s_own_functions(case: str) -> None:
    name = f"test_linear_attention_{case}_expanded"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators of all cases run, and some overflow
        found = next(test for test in collect_testcases(None) if test.name == name)
    model, rng = found.model, np.random.default_rng(0)
    feeds = {value.name: np.asarray(a) for value, a in zip(model.graph.input, found.data_sets[0][0], strict=True)}
    for output in (value.name for value in model.graph.output):
        seed = rng.standard_normal(reference_run(model, feeds)[output].shape).astype(np.float32)
        for wrt in (name for name in feeds if output == "output" or name != "query"):  # no query in the state
            converted = onnxgbp.convert(model, method="gradient", target="seed", output=output, wrt=wrt)
            product = reference_run(converted, {**feeds, "seed": seed})["attribution"]
            v = rng.standard_normal(feeds[wrt].shape).astype(np.float32)
            ends = [reference_run(model, {**feeds, wrt: feeds[wrt] + step * v})[output] for step in (0.01, -0.01)]
            difference = ((ends[0] - ends[1]).astype(np.float64) * seed).sum() / 0.02
            # The functions compute in float32 whatever they are given, so a difference has three digits.
            assert abs((product * v).sum() - difference) < 2e-3 * max(1, np.linalg.norm(product * v))
