"""Values that stay where the session runs. The CPU takes the same way as CUDA here, under another name."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxgbp import Explainer, OnnxgbpError, convert
from onnxgbp.binding import Fixed
from onnxgbp.values import from_device, is_held, shape_of

ort = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 5)).astype(np.float32)


def net(batch: int | str = "N") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> m (float[{batch},5] x) => (float[{batch},4] p) {{
            h = MatMul(x, W1)  r = Relu(h)  y = MatMul(r, W2)  p = Softmax(y)
        }}"""
    )
    rng = np.random.default_rng(1)
    for name, shape in (("W1", (5, 6)), ("W2", (6, 4))):
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    return model


def held(array: Any) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


class Elsewhere:
    """An array that says it lies on a device, as another library's does: numpy is not to touch it."""

    def __init__(self, array: Any) -> None:
        self._array, self.dtype, self.shape = array, array.dtype, array.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.__dlpack__()

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("it lies on a device")


@pytest.mark.parametrize("target", [None, 2, [3, 0, 1], [[3, 0], [1, 2], [2, 1]]])
@pytest.mark.parametrize("given", [held, lambda x: {"x": held(x)}, Elsewhere])
def test_values_are_read_where_they_lie(given: Any, target: Any) -> None:
    explainer = Explainer(net(), provider="cpu")
    wanted, found = explainer(X, target), explainer(given(X), target)
    for name in ("attribution", "scores", "target"):
        assert isinstance(getattr(found, name), np.ndarray)
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert found.warning == wanted.warning


def test_outputs_stay() -> None:
    explainer, plain = Explainer(net(), provider="cpu", device_outputs=True), Explainer(net(), provider="cpu")
    for given in (X, held(X)):
        found, wanted = explainer(given, 1), plain(X, 1)
        assert is_held(found.attribution)
        assert found.attribution.device_name() == "cpu"
        np.testing.assert_array_equal(found.attribution.numpy(), wanted.attribution)
        np.testing.assert_array_equal(found.outputs["p"].numpy(), wanted.scores)
        for name in ("scores", "target"):
            assert isinstance(getattr(found, name), np.ndarray)
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    several = explainer(X, [[3, 0], [1, 2], [2, 1]])
    assert shape_of(several.attribution) == (3, 2, 5)
    np.testing.assert_array_equal(explainer(several.attribution.numpy()[:, 0]).target.shape, (3,))


def test_what_stays_outlives_the_explainer() -> None:
    found = Explainer(net(), provider="cpu", device_outputs=True)(X, 1).attribution
    np.testing.assert_array_equal(found.numpy(), Explainer(net(), provider="cpu")(X, 1).attribution)


def test_a_map_is_fed_to_the_next_model() -> None:
    first, second = Explainer(net(), provider="cpu", device_outputs=True), Explainer(net(), provider="cpu")
    wanted = second(second(X).attribution)
    np.testing.assert_array_equal(second(first(X).attribution).attribution, wanted.attribution)


def test_a_sampled_method_takes_a_value_too() -> None:
    explainer = Explainer(net(), method="integrated-gradients", n_steps=4, provider="cpu")
    np.testing.assert_array_equal(explainer(held(X), 1).attribution, explainer(X, 1).attribution)


def test_a_blank_map_of_a_value_is_said() -> None:
    explainer = Explainer(net(), output="r", unit=(0,), provider="cpu")
    silent = np.zeros((2, 5), np.float32)
    assert explainer(held(silent)).warning == explainer(silent).warning != ""


def test_threads_give_the_same_bits() -> None:
    explainer, plain = Explainer(net(), provider="cpu", device_outputs=True), Explainer(net(), provider="cpu")
    batches = [RNG.standard_normal((n % 5 + 1, 5)).astype(np.float32) for n in range(48)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: explainer(held(batch), 1).attribution.numpy(), batches))
    for one, batch in zip(found, batches):
        np.testing.assert_array_equal(one, plain(batch, 1).attribution)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (held(X.astype(np.float64)), r"input 'x' is float32, got an OrtValue of tensor\(double\)"),
        (held(X[:, :4]), r"input 'x' has shape \[N, 5\], got \[3, 4\]"),
        (held(X[0]), r"is the batch axis missing"),
        (held(X[:0]), r"input 'x' is empty"),
        (Elsewhere(X.astype(np.float64)), r"got an OrtValue of tensor\(double\)"),
        (Elsewhere(np.zeros((5, 3), np.float32).T), r"input 'x' cannot be read as an array: .*contiguous"),
    ],
)
def test_values_refused(given: Any, message: str) -> None:
    with pytest.raises(OnnxgbpError, match=message) as caught:
        Explainer(net(), provider="cpu")(given)
    assert "\n" not in str(caught.value)


def test_what_lies_on_no_single_device_is_left_to_numpy() -> None:
    class Spread(Elsewhere):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise ValueError("on several devices")

        def __array__(self, *_: Any, **__: Any) -> Any:
            return self._array

    explainer = Explainer(net(), provider="cpu")
    np.testing.assert_array_equal(explainer(Spread(X), 1).attribution, explainer(X, 1).attribution)


def test_a_value_of_another_device_is_refused() -> None:
    class Cuda(ort.OrtValue):  # type: ignore[misc, name-defined]
        def device_name(self) -> str:
            return "cuda"

    value = Cuda(held(X)._get_c_value(), X)
    with pytest.raises(OnnxgbpError, match="input 'x' lies on cuda, and the session runs on cpu: copy it"):
        Explainer(net(), provider="cpu")(value)


def test_an_older_runtime_takes_no_arrays_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_held(from_device(Elsewhere(X)))
    assert from_device(X) is X
    monkeypatch.delattr(ort.OrtValue, "from_dlpack")
    with pytest.raises(OnnxgbpError, match=r"give an onnxruntime\.OrtValue, or update it"):
        Explainer(net(), provider="cpu")(Elsewhere(X))


def test_fixed_places_give_what_a_call_gives() -> None:
    """What a CUDA graph plays back; the values given back are the caller's own."""
    model = convert(net(3), target="input")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    fixed = Fixed(session, "cpu", outputs)
    batches = [{"x": RNG.standard_normal((3, 5)).astype(np.float32), "target": np.full(3, n % 4)} for n in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda feeds: fixed.run(feeds, ["attribution"]), batches))
    for values, feeds in zip(found, batches):
        for name, value, wanted in zip(outputs, values, session.run(outputs, feeds)):
            assert is_held(value) == (name == "attribution")
            np.testing.assert_array_equal(value.numpy() if is_held(value) else value, wanted)
    (p, *_) = fixed.run({name: held(value) for name, value in batches[0].items()}, [])
    np.testing.assert_array_equal(p, found[0][0])


def test_fixed_places_need_fixed_shapes() -> None:
    session = ort.InferenceSession(convert(net()).SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(OnnxgbpError, match="cuda_graph needs fixed shapes, and input 'x' has a free size 'N'"):
        Fixed(session, "cpu", ["attribution"])


@pytest.mark.parametrize("provider", ["cpu", "auto"])
def test_what_is_of_cuda_alone_is_refused_elsewhere(provider: str) -> None:
    if provider == "auto" and "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("CUDA may be there")
    with pytest.raises(OnnxgbpError, match="cuda_graph is of CUDA alone"):
        Explainer(net(3), provider=provider, cuda_graph=True)


def test_outputs_that_cannot_stay_are_refused() -> None:
    with pytest.raises(OnnxgbpError, match="smoothgrad puts maps together on the CPU"):
        Explainer(net(), method="smoothgrad", provider="cpu", device_outputs=True)
    with pytest.raises(OnnxgbpError, match="the seed's scale is divided out on the CPU"):
        Explainer(net(), seed_scale=4, provider="cpu", device_outputs=True)


def test_options_travel_and_change_no_number() -> None:
    explainer = Explainer(net(), provider="cpu", spinning=False, tf32=True, device_outputs=True, threads=2)
    again = pickle.loads(pickle.dumps(explainer))
    assert repr(again) == repr(explainer)
    assert "spinning=False, tf32=True, device_outputs=True" in repr(again)
    np.testing.assert_array_equal(again(X).attribution.numpy(), Explainer(net(), provider="cpu")(X).attribution)
