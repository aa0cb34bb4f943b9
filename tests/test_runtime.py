"""`Explainer`: what it gives, what it refuses, and that it travels, repeats itself and is safe among threads."""

from __future__ import annotations

import importlib.metadata
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnxgbp
from onnxgbp import Explainer, OnnxgbpError, convert, save

RNG = np.random.default_rng(7)
W1 = RNG.standard_normal((5, 6)).astype(np.float32)
W2 = RNG.standard_normal((6, 4)).astype(np.float32)
X = RNG.standard_normal((3, 5)).astype(np.float32)


def model_of(text: str, **weights: npt.NDArray[Any]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


@pytest.fixture
def mlp() -> onnx.ModelProto:
    return model_of(
        """<ir_version: 8, opset_import: ["": 17]> mlp (float[N,5] x) => (float[N,4] probabilities) {
            h = MatMul(x, W1)  r = Relu(h)  logits = MatMul(r, W2)  probabilities = Softmax(logits)
        }""",
        W1=W1,
        W2=W2,
    )


@pytest.fixture
def two_inputs() -> onnx.ModelProto:
    return model_of(
        """<ir_version: 8, opset_import: ["": 17]> two (float[N,5] a, float[N,5] b) => (float[N,6] scores) {
            s = Add(a, b)  h = MatMul(s, W1)  scores = Relu(h)
        }""",
        W1=W1,
    )


def gradient(x: npt.NDArray[Any], target: npt.NDArray[Any], guided: bool) -> npt.NDArray[Any]:
    h = x @ W1
    dy = W2.T[target]
    gate = (h > 0) & (dy > 0) if guided else h > 0
    return np.asarray(np.where(gate, dy, 0) @ W1.T)


@pytest.mark.parametrize("method", ["gradient", "guided"])
def test_attribution_scores_and_target(mlp: onnx.ModelProto, method: str) -> None:
    result = Explainer(mlp, method=method)(X)
    logits = np.maximum(X @ W1, 0) @ W2
    strongest = logits.argmax(axis=1)
    assert result.target.dtype == np.int64
    np.testing.assert_array_equal(result.target, strongest)
    assert isinstance(result.attribution, np.ndarray)
    np.testing.assert_allclose(result.attribution, gradient(X, strongest, method == "guided"), rtol=1e-4, atol=1e-5)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(result.outputs["probabilities"], result.scores)


@pytest.mark.parametrize("target", [2, [2, 2, 2], (2, 2, 2), np.int32(2), np.array([2, 2, 2])])
def test_target_for_all_or_one_per_sample(mlp: onnx.ModelProto, target: Any) -> None:
    result = Explainer(mlp)(X, target=target)
    np.testing.assert_array_equal(result.target, [2, 2, 2])
    np.testing.assert_allclose(result.attribution, gradient(X, np.array([2, 2, 2]), True), rtol=1e-4, atol=1e-5)


def test_targets_differ_by_sample(mlp: onnx.ModelProto) -> None:
    result = Explainer(mlp)(X, target=[3, 0, 1])
    np.testing.assert_array_equal(result.target, [3, 0, 1])
    np.testing.assert_allclose(result.attribution, gradient(X, np.array([3, 0, 1]), True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (4, r"target 4 is out of range: the model has 4 classes, 0 to 3"),
        (-1, r"target -1 is out of range"),
        ([0, 1, 9], r"target 9 is out of range"),
        ([0], r"1 class, but there are 3 samples"),
        ([0, 1], r"2 classes, but there are 3 samples"),
        ([[0, 1, 2]], r"shape \[1, 3\]: give \[3, 3\], 3 per sample"),
        ([[0, 1, 2, 3, 0]] * 3, r"target input5 is out of range: tensor '.*' has 4 classes"),
        (1.0, r"neither a class \(index or name\) nor a list"),
        (True, r"neither a class \(index or name\) nor a list"),
        ("cat", r"target 'cat' is no class index, and the model's metadata names no classes"),
        ([0, None, 1], r"neither a class \(index or name\) nor a list"),
    ],
)
def test_targets_refused(mlp: onnx.ModelProto, target: Any, message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message):
        Explainer(mlp)(X, target=target)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"input 'x' has shape \[N, 5\], got \[5\] \(is the batch axis missing\?\)"),
        (X[:, :4], r"input 'x' has shape \[N, 5\], got \[3, 4\]"),
        (X[:0], r"input 'x' is empty"),
        (X.astype(np.uint8), r"input 'x' is float32, got uint8; scale it .*astype\(np.float32\)"),
        (X.astype(complex), r"input 'x' is float32, got complex128"),
        (X.astype(np.float64) * 1e300, r"cannot hold the values of the float64 array"),
        ([[1, 2], [3]], r"input 'x'"),
        (None, r"input 'x' is float32, got an object"),
        ({"y": X}, r"no input 'y': it takes 'x'"),
        ({}, r"input 'x' is missing"),
    ],
)
def test_inputs_refused(mlp: onnx.ModelProto, x: Any, message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message) as caught:
        Explainer(mlp)(x)
    assert "\n" not in str(caught.value)


def test_floats_and_lists_are_cast(mlp: onnx.ModelProto) -> None:
    explainer = Explainer(mlp)
    expected = explainer(X)
    for x in (X.astype(np.float64), X.tolist(), {"x": X}):
        np.testing.assert_array_equal(explainer(x).attribution, expected.attribution)
    assert explainer([[1, 2, 3, 4, 5]]).scores.shape == (1, 4)


def test_several_inputs(two_inputs: onnx.ModelProto) -> None:
    explainer = Explainer(two_inputs, method="gradient")
    result = explainer({"a": X, "b": X})
    assert isinstance(result.attribution, dict)
    assert list(result.attribution) == ["a", "b"]
    np.testing.assert_array_equal(result.attribution["a"], result.attribution["b"])
    with pytest.raises(OnnxgbpError, match=r"2 inputs: give a dict of arrays for 'a', 'b'"):
        explainer(X)
    with pytest.raises(OnnxgbpError, match=r"dimension 'N' is 3 in input 'a' but 2 in input 'b'"):
        explainer({"a": X, "b": X[:2]})
    one = Explainer(two_inputs, method="gradient", wrt="b")({"a": X, "b": X})
    assert isinstance(one.attribution, np.ndarray)
    np.testing.assert_array_equal(one.attribution, result.attribution["b"])


def test_unit_of_an_inner_tensor(mlp: onnx.ModelProto) -> None:
    explainer = Explainer(mlp, method="gradient", output="h", unit=2)
    result = explainer(X)
    np.testing.assert_allclose(result.attribution, np.tile(W1[:, 2], (3, 1)), rtol=1e-6)
    np.testing.assert_array_equal(result.target, [2, 2, 2])
    assert result.scores.shape == (3, 4)  # the first float output
    with pytest.raises(OnnxgbpError, match="leave the target out"):
        explainer(X, target=1)


def test_scores_are_the_output_that_is_explained() -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[N,5] x) => (float[N,6] features, int64[N] label, float[N,4] p) {
            h = MatMul(x, W1)  features = Relu(h)  logits = MatMul(features, W2)
            label = ArgMax <axis = 1, keepdims = 0> (logits)  s = Softmax(logits)  p = Identity(s)
        }""",
        W1=W1,
        W2=W2,
    )
    result = Explainer(model, output="logits")(X)
    assert result.scores.shape == (3, 4)
    assert list(result.outputs) == ["features", "label", "p"]


def test_converted_file_is_run_as_it_is(mlp: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(convert(mlp, method="gradient", target="input"), path)
    for explainer in (Explainer(path), Explainer(path, method="gradient"), Explainer(onnx.load(path))):
        result = explainer(X, target=1)
        np.testing.assert_allclose(result.attribution, gradient(X, np.array([1, 1, 1]), False), rtol=1e-4, atol=1e-5)
        with pytest.raises(OnnxgbpError, match="4 classes"):
            explainer(X, target=4)
    with pytest.raises(OnnxgbpError, match="already converted with method gradient, not guided"):
        Explainer(path, method="guided")
    with pytest.raises(OnnxgbpError, match="already converted with rule"):
        Explainer(path, rule=["*=guided"])
    with pytest.raises(OnnxgbpError, match="already converted with unit"):
        Explainer(path, unit=3)


def test_converted_file_with_a_fixed_target(mlp: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(convert(mlp, target=2), path)
    np.testing.assert_array_equal(Explainer(path)(X).target, [2, 2, 2])
    np.testing.assert_array_equal(Explainer(path)(X, target=2).target, [2, 2, 2])
    with pytest.raises(OnnxgbpError, match="converted with --target 2"):
        Explainer(path)(X, target=1)
    save(convert(mlp), path)
    with pytest.raises(OnnxgbpError, match="converted with --target argmax"):
        Explainer(path)(X, target=1)


def test_converted_file_with_a_seed(mlp: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(convert(mlp, method="gradient", target="seed"), path)
    seed = np.eye(4, dtype=np.float32)[[1, 1, 1]]
    result = Explainer(path)({"x": X, "seed": seed})
    np.testing.assert_allclose(result.attribution, gradient(X, np.array([1, 1, 1]), False), rtol=1e-4, atol=1e-5)


def test_open_number_of_classes() -> None:
    model = model_of("""<ir_version: 8, opset_import: ["": 17]> m (float[N,C] x) => (float[N,C] y) { y = Relu(x) }""")
    explainer = Explainer(model)
    np.testing.assert_array_equal(explainer(X, target=4).target, [4, 4, 4])
    with pytest.raises(OnnxgbpError, match="is the target in range") as caught:
        explainer(X, target=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dims", [("T", "N"), (None, None)])
def test_the_batch_need_not_come_first(dims: tuple[str | None, ...]) -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["": 17]> m (float[T,N,5] x) => (float[N,4] y) {
            last = Gather <axis = 0> (x, i)  h = MatMul(last, W1)  r = Relu(h)  y = MatMul(r, W2)
        }""",
        W1=W1,
        W2=W2,
        i=np.array(-1),
    )
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim, dims, strict=False):
        dim.ClearField("value")
        if name is not None:
            dim.dim_param = name
    if dims[0] is None:
        model.graph.output[0].type.tensor_type.shape.dim[0].ClearField("value")
    explainer = Explainer(model, method="gradient")
    x = RNG.standard_normal((2, 3, 5)).astype(np.float32)
    assert explainer(x).target.shape == (3,)
    for target in (1, [1, 0, 2]):
        expected = gradient(x[1], np.broadcast_to(target, 3), False)
        result = explainer(x, target)
        np.testing.assert_array_equal(result.target, np.broadcast_to(target, 3))
        np.testing.assert_allclose(result.attribution[1], expected, rtol=1e-4, atol=1e-5)
    for wrong in ([1, 0], [1], [1, 0, 2, 3]):
        with pytest.raises(OnnxgbpError, match="per sample"):
            explainer(x, wrong)
    with pytest.raises(OnnxgbpError, match="per sample"):
        explainer(x[:, :1], [1, 0])


def test_external_data(mlp: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    expected = Explainer(mlp)(X).attribution
    onnx.save(mlp, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    np.testing.assert_array_equal(Explainer(path)(X).attribution, expected)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(Explainer("m.onnx")(X).attribution, expected)


def test_pickles_by_path_and_options(mlp: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(mlp, path)
    monkeypatch.chdir(tmp_path)
    explainer = Explainer("m.onnx", method="gradient", provider="cpu", threads=1)
    data = pickle.dumps(explainer)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    np.testing.assert_array_equal(again(X, 1).attribution, explainer(X, 1).attribution)
    assert "method='gradient', provider='cpu', threads=1" in repr(again)
    held = pickle.loads(pickle.dumps(Explainer(mlp, method="gradient")))
    np.testing.assert_array_equal(held(X, 1).attribution, explainer(X, 1).attribution)


def test_warm_up(mlp: onnx.ModelProto) -> None:
    warm, cold = Explainer(mlp, provider="cpu", warm_up=True), Explainer(mlp, provider="cpu")
    assert np.array_equal(warm(X).attribution, cold(X).attribution)
    assert "warm_up=True" in repr(pickle.loads(pickle.dumps(warm)))
    free = model_of(
        """<ir_version: 8, opset_import: ["": 17]> free (float[N,L] x) => (float[N,L] y) { y = Relu(x) }""",
    )
    with pytest.raises(OnnxgbpError, match="free size 'L'"):
        Explainer(free, provider="cpu", warm_up=True)
    for shape in ((2, 7), {"x": [2, 7]}):
        assert Explainer(free, provider="cpu", warm_up=shape)(X).scores.shape == (3, 5)
    for wrong in (3, (2, -7), "ab"):
        with pytest.raises(OnnxgbpError, match="give True, a shape"):
            Explainer(free, provider="cpu", warm_up=wrong)
    with pytest.raises(OnnxgbpError, match=r"input 'x' has shape \[N, 5\], got \[2, 7\]"):
        Explainer(mlp, provider="cpu", warm_up=(2, 7))


def test_threads_give_the_same_bits(mlp: onnx.ModelProto) -> None:
    explainer = Explainer(mlp)
    batches = [RNG.standard_normal((n % 5 + 1, 5)).astype(np.float32) for n in range(64)]
    expected = [explainer(batch, n % 4) for n, batch in enumerate(batches)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda pair: explainer(pair[1], pair[0] % 4), enumerate(batches)))
    for result, alone in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.attribution, alone.attribution)
        np.testing.assert_array_equal(result.target, alone.target)


def test_provider(mlp: onnx.ModelProto) -> None:
    ort = pytest.importorskip("onnxruntime")
    assert Explainer(mlp, provider="cpu").provider == "cpu"
    with pytest.raises(OnnxgbpError, match="no provider is called 'tpu'"):
        Explainer(mlp, provider="tpu")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        assert Explainer(mlp).provider == "cpu"
        with pytest.raises(OnnxgbpError, match="onnxruntime-gpu"):
            Explainer(mlp, provider="cuda")


def test_cuda_that_falls_back_is_refused(mlp: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("CUDA may be there")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert Explainer(mlp).provider == "cpu"
    with pytest.raises(OnnxgbpError, match="CUDA does not work here"):
        Explainer(mlp, provider="cuda")


def test_two_runtimes_or_none(mlp: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = importlib.metadata.distribution

    def both(name: str) -> Any:
        return distribution("numpy" if name in ("onnxruntime", "onnxruntime-gpu") else name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "distribution", both)
        with pytest.raises(OnnxgbpError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
            Explainer(mlp)

    def none(name: str) -> Any:
        if name.startswith("onnxruntime"):
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OnnxgbpError, match=r"pip install 'onnxgbp\[cpu\]'"):
        Explainer(mlp)


def test_options_are_checked(mlp: onnx.ModelProto) -> None:
    with pytest.raises(OnnxgbpError, match="threads is 0"):
        Explainer(mlp, threads=0)
    with pytest.raises(OnnxgbpError, match="no method is called 'lime'"):
        Explainer(mlp, method="lime")
    with pytest.raises(OnnxgbpError, match="cannot read"):
        Explainer("nowhere.onnx")


def test_a_runtime_fault_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["": 17]> m (float[N,M] x) => (float[N,4] y) {
            r = Relu(x)  y = MatMul(r, W)
        }""",
        W=W2,
    )
    with pytest.raises(OnnxgbpError, match="ONNX Runtime could not run the model") as caught:
        Explainer(model)(X)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, onnxgbp; print([m for m in ('onnxruntime', 'PIL', 'matplotlib', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert {"Explainer", "Explanation"} <= set(onnxgbp.__all__)


def test_a_blank_map_is_said(mlp: onnx.ModelProto) -> None:
    explainer = Explainer(mlp, output="r", unit=(0,))
    x = np.stack([W1[:, 0], -W1[:, 0]]).astype(np.float32)  # the unit's own weights, so that it is active, then not
    result = explainer(x)
    assert result.attribution[0].any()
    assert not result.attribution[1].any()
    assert "zeros for samples [1]" in result.warning
    assert explainer(x[:1]).warning == ""
