"""LSTM, GRU, RNN: against torch's own gradient, and every form of the node against differences in float64."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, check_vjp, cosine, forward_error, ort_run, reference_run, small_model
from onnx import ModelProto, TensorProto, helper

import onnxgbp
from onnxgbp.float64 import evaluator
from onnxgbp.verify import verify_model

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
LENGTH, BATCH, INPUTS, HIDDEN = 4, 2, 3, 5


@dataclasses.dataclass(frozen=True)
class Form:
    """One node, with what it declares; all tensors that it can take an attribution for are inputs of the model."""

    operator: str
    direction: str = "forward"
    attributes: tuple[tuple[str, Any], ...] = ()
    bias: bool = True
    states: bool = False
    peepholes: bool = False
    outputs: tuple[str, ...] = ("Y", "Y_h", "Y_c")
    length: int | str = LENGTH
    batch: int | str = "N"
    lengths: tuple[int, ...] | None = None
    opset: int = 17

    @property
    def made(self) -> tuple[str, ...]:
        count = 3 if self.operator == "LSTM" else 2
        return tuple(name if name in self.outputs else "" for name in ("Y", "Y_h", "Y_c")[:count])

    @property
    def layout(self) -> int:
        return int(dict(self.attributes).get("layout", 0))

    def shapes(self, length: Any, batch: Any) -> dict[str, tuple[Any, ...]]:
        directions = DIRECTIONS[self.direction]
        state = (batch, directions, HIDDEN) if self.layout else (directions, batch, HIDDEN)
        shapes = {"X": (batch, length, INPUTS) if self.layout else (length, batch, INPUTS)}
        if self.states:
            shapes["h"] = state
        if self.states and self.operator == "LSTM":
            shapes["c"] = state
        return shapes

    def model(self, dtype: int = TensorProto.DOUBLE) -> ModelProto:
        rng, directions = np.random.default_rng(0), DIRECTIONS[self.direction]
        gates = GATES[self.operator] * HIDDEN
        floats = {
            "W": rng.standard_normal((directions, gates, INPUTS)) * 0.7,
            "R": rng.standard_normal((directions, gates, HIDDEN)) * 0.7,
            "B": rng.standard_normal((directions, 2 * gates)) * 0.7,
            "P": rng.standard_normal((directions, 3 * HIDDEN)) * 0.7,
        }
        constants: dict[str, Array] = {
            name: array.astype(helper.tensor_dtype_to_np_dtype(dtype)) for name, array in floats.items()
        }
        names = ["X", "W", "R", "B" if self.bias else "", "", "h" if self.states else ""]
        if self.lengths is not None:
            names[4] = "lengths"
            constants["lengths"] = np.array(self.lengths, np.int32)
        if self.operator == "LSTM":
            names += ["c" if self.states else "", "P" if self.peepholes else ""]
        while not names[-1]:
            names.pop()
        attributes = {"hidden_size": HIDDEN, "direction": self.direction, **dict(self.attributes)}
        node = helper.make_node(self.operator, names, self.made, **attributes)
        used = {name: array for name, array in constants.items() if name in names}
        inputs = self.shapes(self.length, self.batch)
        return small_model([node], inputs, [n for n in self.made if n], used, opset=self.opset, dtype=dtype)

    def feeds(self) -> dict[str, Array]:
        rng = np.random.default_rng(1)
        return {name: rng.standard_normal(shape) for name, shape in self.shapes(LENGTH, BATCH).items()}

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in self.attributes]
        said += [name for name in ("states", "peepholes") if getattr(self, name)]
        said += [] if self.bias else ["no bias"]
        said += [] if self.lengths is None else [f"lengths {self.lengths}"]
        return " ".join([self.operator, self.direction, *said, f"{self.length}", f"opset {self.opset}", *self.made])


LINEAR_BEFORE = (("linear_before_reset", 1),)
FORMS = [
    *(Form(operator, direction) for operator in GATES for direction in DIRECTIONS),
    *(Form(operator, direction, states=True) for operator in GATES for direction in DIRECTIONS),
    *(Form(operator, "bidirectional", bias=False, outputs=("Y",)) for operator in GATES),
    *(Form(operator, "bidirectional", states=True, outputs=("Y_h",)) for operator in GATES),
    *(Form(operator, "bidirectional", (("layout", 1),), states=True) for operator in GATES),
    *(Form(operator, length="T") for operator in GATES),
    *(Form(operator, "reverse", length="T", states=True, outputs=("Y",)) for operator in GATES),
    *(Form(operator, states=True, opset=opset) for operator in GATES for opset in (9, 11, 13, 22)),
    *(Form(operator, batch=BATCH, lengths=(LENGTH,) * BATCH) for operator in GATES),
    *(Form("GRU", direction, LINEAR_BEFORE, states=True) for direction in DIRECTIONS),
    Form("GRU", "bidirectional", LINEAR_BEFORE, bias=False),
    *(Form("LSTM", direction, states=True, peepholes=True) for direction in DIRECTIONS),
    Form("LSTM", peepholes=True, bias=False),
    Form("LSTM", states=True, outputs=("Y_c",)),
    Form("LSTM", "bidirectional", (("activations", ["Sigmoid", "Tanh", "Tanh"] * 2),)),
    Form("RNN", attributes=(("activations", ["Relu"]),), states=True),
    Form("RNN", "bidirectional", (("activations", ["Tanh", "Relu"]),), states=True),
]
# onnx's reference evaluator knows no other activation than Tanh, and no lengths: these run in ONNX Runtime alone.
TANH_ONLY = [form for form in FORMS if form.operator != "RNN" or "activations" not in dict(form.attributes)]
FORMS += [
    *(Form(o, d, batch=BATCH, states=True, lengths=(3, 2)) for o in GATES for d in DIRECTIONS),
    *(Form(o, "bidirectional", length="T", lengths=(LENGTH, 1)) for o in GATES),
    *(Form(o, "bidirectional", batch=BATCH, lengths=(1, 3), outputs=("Y_h",)) for o in GATES),
    *(Form("GRU", d, LINEAR_BEFORE, batch=BATCH, states=True, lengths=(3, 2)) for d in DIRECTIONS),
    *(Form("LSTM", d, batch=BATCH, states=True, peepholes=True, lengths=(3, 2)) for d in DIRECTIONS),
]


@pytest.mark.parametrize("form", TANH_ONLY, ids=str)
def test_the_gradient_is_that_of_differences(form: Form) -> None:
    model, feeds = form.model(), form.feeds()
    profiles = ("ort", "portable") if isinstance(form.length, int) else ("ort",)
    for output in filter(None, form.made):
        wrt = list(feeds)
        for profile in profiles:
            figures = check_vjp(model, feeds, output=output, wrt=wrt, linear=False, profile=profile)
            assert all(figure.right for figure in figures), f"{profile}: {[f for f in figures if not f.right]}"


@pytest.mark.parametrize("form", [form for form in FORMS if not form.layout], ids=str)  # ONNX Runtime has no layout 1
def test_onnx_runtime_agrees_and_the_forward_pass_is_the_same(form: Form) -> None:
    single = form.model(TensorProto.FLOAT)
    feeds = {name: array.astype(np.float32) for name, array in form.feeds().items()}
    before = ort_run(single, feeds)
    for output in filter(None, form.made):
        seed = np.random.default_rng(2).standard_normal(before[output].shape).astype(np.float32)
        wanted = _differences(form, feeds, output, seed)
        for profile in ("ort", "portable") if isinstance(form.length, int) else ("ort",):
            options = {"method": "gradient", "target": "seed", "output": output, "wrt": "X", "profile": profile}
            converted = onnxgbp.convert(single, **options)  # type: ignore[arg-type]
            assert ("Scan" in {node.op_type for node in converted.graph.node}) == (profile == "ort")
            after = ort_run(converted, {**feeds, "seed": seed})
            assert all(np.array_equal(before[name], after[name]) for name in before)
            assert cosine(after["attribution"], wanted) > 0.9999999


@pytest.mark.parametrize("form", [form for form in FORMS if not form.layout], ids=str)  # as above
def test_the_kernels_that_verify_runs_are_those_of_onnx_runtime(form: Form) -> None:
    feeds = form.feeds()
    wanted = ort_run(form.model(TensorProto.FLOAT), {name: array.astype(np.float32) for name, array in feeds.items()})
    found = evaluator(form.model()).run(None, feeds)
    for name, array in zip(filter(None, form.made), found, strict=True):
        np.testing.assert_allclose(array, wanted[name], atol=1e-6)  # float32
        assert array.dtype == np.float64


WIDE = [form for form in FORMS if form.lengths and len(set(form.lengths)) > 1]


@pytest.mark.parametrize("form", WIDE, ids=str)
def test_the_gradient_with_lengths_is_that_of_differences_in_float64(form: Form) -> None:
    model, feeds = form.model(), form.feeds()
    output = next(filter(None, form.made))
    converted = onnxgbp.convert(model, method="gradient", target="seed", output=output, wrt=list(feeds))
    rng, forward = np.random.default_rng(3), evaluator(model)
    seed = rng.standard_normal(forward.run([output], feeds)[0].shape)
    gradients = dict(
        zip((o.name for o in converted.graph.output), evaluator(converted).run(None, feeds | {"seed": seed}))
    )
    for name in feeds:
        v = rng.standard_normal(feeds[name].shape)
        above, below = (forward.run([output], {**feeds, name: feeds[name] + s * 1e-6 * v})[0] for s in (1, -1))
        product = gradients["attribution" if len(feeds) == 1 else f"attribution_{name}"] * v
        assert abs(product.sum() - (seed * (above - below)).sum() / 2e-6) <= 2e-7 * np.linalg.norm(product)


@pytest.mark.parametrize(
    "form", [form for form in WIDE if form.batch == BATCH], ids=str
)  # others run at one batch alone
def test_verify_checks_a_model_with_lengths_in_float64(form: Form, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(form.model(TensorProto.FLOAT).SerializeToString())
    output = next(filter(None, form.made))
    onnxgbp.save(
        onnxgbp.convert(tmp_path / "net.onnx", method="gradient", target="seed", output=output), tmp_path / "out.onnx"
    )
    rows = {check.name: check for check in verify_model(tmp_path / "out.onnx", tmp_path / "net.onnx").checks}
    assert all(check.passed for check in rows.values()), rows
    assert "in float64" in rows["attribution"].detail
    assert "not run" not in rows["runtime"].detail


def _differences(form: Form, feeds: Mapping[str, Array], output: str, seed: Array) -> Array:
    """The gradient by torch, whose cells are written out here; float64."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(feeds["X"].astype(np.float64), requires_grad=True)
    given = {
        t.name: torch.tensor(onnx.numpy_helper.to_array(t).astype(np.float64)) for t in form.model().graph.initializer
    }
    directions = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}[form.direction]
    results = []
    for d, order in enumerate(directions):
        h = torch.tensor(feeds["h"][d].astype(np.float64)) if "h" in feeds else torch.zeros(BATCH, HIDDEN).double()
        c = torch.tensor(feeds["c"][d].astype(np.float64)) if "c" in feeds else torch.zeros(BATCH, HIDDEN).double()
        steps: list[Any] = [None] * LENGTH
        for t in range(LENGTH)[::order]:
            inside = torch.tensor([[t < length] for length in form.lengths or (LENGTH,) * BATCH])
            new_h, new_c = _cell(torch, form, d, given, x[t], h, c)
            h, c = torch.where(inside, new_h, h), torch.where(inside, new_c, c)
            steps[t] = torch.where(inside, h, 0)
        results.append({"Y": torch.stack(steps), "Y_h": h, "Y_c": c})
    y = torch.stack([result[output] for result in results], dim=1 if output == "Y" else 0)
    return np.asarray(torch.autograd.grad((y * torch.tensor(seed)).sum(), x)[0].numpy())


def _cell(torch: Any, form: Form, d: int, given: Mapping[str, Any], x: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """One step, literally as the standard writes it."""
    w, r, gates = given["W"][d], given["R"][d], GATES[form.operator]
    b = given["B"][d] if "B" in given else torch.zeros(2 * gates * HIDDEN).double()
    of_w, of_r = b[: gates * HIDDEN], b[gates * HIDDEN :]
    if form.operator == "RNN":
        names = dict(form.attributes).get("activations", ["Tanh"] * 2)
        return getattr(torch, names[d].lower())(x @ w.T + h @ r.T + of_w + of_r), c
    if form.operator == "LSTM":
        p_i, p_o, p_f = given["P"][d].split(HIDDEN) if "P" in given else [torch.zeros(HIDDEN).double()] * 3
        i, o, f, n = (x @ w.T + h @ r.T + of_w + of_r).split(HIDDEN, dim=1)
        new = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(n)
        return torch.sigmoid(o + p_o * new) * torch.tanh(new), new
    w_z, w_r, w_n = (x @ w.T + of_w).split(HIDDEN, dim=1)
    r_z, r_r, r_n = r.split(HIDDEN)
    b_z, b_r, b_n = of_r.split(HIDDEN)
    z, reset = torch.sigmoid(w_z + h @ r_z.T + b_z), torch.sigmoid(w_r + h @ r_r.T + b_r)
    if dict(form.attributes).get("linear_before_reset"):
        n = torch.tanh(w_n + reset * (h @ r_n.T + b_n))
    else:
        n = torch.tanh(w_n + (reset * h) @ r_n.T + b_n)
    return (1 - z) * n + z * h, c


REFUSED = [
    (Form("LSTM", attributes=(("clip", 1.0),)), "clip is set"),
    (Form("LSTM", attributes=(("input_forget", 1),)), "input_forget is set"),
    (Form("LSTM", attributes=(("activations", ["Sigmoid", "Tanh", "Relu"]),)), "sigmoid, tanh, relu are not the usual"),
    (Form("GRU", attributes=(("activations", ["HardSigmoid", "Tanh"]),)), "hardsigmoid, tanh are not the usual"),
    (Form("RNN", attributes=(("activations", ["Elu"]),)), "elu are not the usual"),
]


@pytest.mark.parametrize(("form", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_refused_says_why(form: Form, reason: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=reason) as caught:
        onnxgbp.convert(form.model(), target="seed", output="Y", wrt="X")
    assert "\n" not in str(caught.value)


def test_a_weight_that_depends_on_the_input_is_refused() -> None:
    model = Form("RNN").model()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "W")
    model.graph.initializer.remove(weight)
    model.graph.input.append(helper.make_tensor_value_info("W", TensorProto.DOUBLE, weight.dims))
    with pytest.raises(onnxgbp.OnnxgbpError, match=r"input 1 \('W'\), a weight, depends on the explained input"):
        onnxgbp.convert(model, target="seed", output="Y", wrt="W")


@pytest.mark.parametrize("operator", GATES)
def test_portable_needs_the_length(operator: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=r"the portable profile has no loops.*use profile ort"):
        onnxgbp.convert(Form(operator, length="T").model(), target="seed", output="Y", wrt="X", profile="portable")


@pytest.mark.parametrize("operator", GATES)
def test_no_rule_applies_inside_a_cell(operator: str) -> None:
    form = Form(operator, "bidirectional")
    feeds = {**form.feeds(), "seed": np.random.default_rng(3).standard_normal((LENGTH, 2, BATCH, HIDDEN))}
    results = [
        reference_run(onnxgbp.convert(form.model(), method=method, target="seed", output="Y"), feeds)["attribution"]
        for method in ("gradient", "guided", "deconvnet")
    ]
    assert all(np.array_equal(results[0], result) for result in results)


# --- exports by torch -----------------------------------------------------------------------------


def _classifier(kind: str, reads: str, **options: Any) -> Any:
    torch = pytest.importorskip("torch")

    class Classifier(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(torch.nn, kind)(INPUTS, HIDDEN, **options)
            self.head = torch.nn.Linear(HIDDEN * (2 if options.get("bidirectional") else 1), 4)

        def forward(self, x: Any) -> Any:
            y, states = self.cell(x)
            last = states[-1] if kind == "LSTM" and reads == "cell" else states[0] if kind == "LSTM" else states
            time = 1 if options.get("batch_first") else 0
            if reads != "all":  # of the last layer, both directions
                return self.head(torch.cat(list(last[-2:] if options.get("bidirectional") else last[-1:]), dim=1))
            return self.head(torch.tanh(y).mean(dim=time))

    torch.manual_seed(0)
    return Classifier().eval()


def _export(net: Any, x: Any, free: dict[int, str], opset: int) -> ModelProto:
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is on its way out, and says so
        torch.onnx.export(
            net, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": free}, opset_version=opset
        )
    return onnx.load_from_string(file.getvalue())


PLAIN: dict[str, Any] = {}
TWICE: dict[str, Any] = {"num_layers": 2, "batch_first": True, "bidirectional": True}
EXPORTS = [
    *((kind, reads, options, 17) for kind in GATES for reads in ("all", "last") for options in (PLAIN, TWICE)),
    *(
        (kind, "all", options, 17)
        for kind in GATES
        for options in ({"bias": False, "num_layers": 2}, {"bidirectional": True})
    ),
    *((kind, "all", TWICE, 11) for kind in GATES),
    ("LSTM", "cell", TWICE, 17),
]


@pytest.mark.parametrize(("kind", "reads", "options", "opset"), EXPORTS)
def test_torch_exports(kind: str, reads: str, options: dict[str, Any], opset: int) -> None:
    torch = pytest.importorskip("torch")
    first = bool(options.get("batch_first"))
    net = _classifier(kind, reads, **options)
    for free, profile in (({0, 1}, "ort"), ({0} if first else {1}, "portable")):
        names = {axis: ("N" if (axis == 0) == first else "T") for axis in free}
        model = _export(net, torch.randn(*((2, 6) if first else (6, 2)), INPUTS), names, opset)
        length = 6 if profile == "portable" else 9
        x = torch.randn(*((3, length) if first else (length, 3)), INPUTS, requires_grad=True)
        scores = net(x)
        wanted = torch.autograd.grad(scores.max(dim=1).values.sum(), x)[0].numpy()
        feeds = {"x": x.detach().numpy()}
        converted = onnxgbp.convert(model, method="gradient", profile=profile)
        onnx.checker.check_model(converted, full_check=True)
        results, before = ort_run(converted, feeds), ort_run(model, feeds)
        assert forward_error(before, results) < 1e-6  # ONNX Runtime moves a Transpose where Y is read twice
        assert cosine(results["attribution"], wanted) > 0.999999
        assert np.abs(results["attribution"] - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", GATES)
def test_torch_exports_packed_sequences(kind: str) -> None:
    torch = pytest.importorskip("torch")

    class Packed(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(torch.nn, kind)(INPUTS, HIDDEN, bidirectional=True)
            self.head = torch.nn.Linear(2 * HIDDEN, 4)

        def forward(self, x: Any, lengths: Any) -> Any:
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0])
            return self.head(y.sum(dim=0))

    torch.manual_seed(0)
    net, file = Packed().eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _export
        torch.onnx.export(
            net,
            (torch.randn(5, 2, INPUTS), torch.tensor([5, 4])),
            file,
            dynamo=False,
            input_names=["x", "lengths"],
            dynamic_axes={"x": {0: "T", 1: "N"}, "lengths": {0: "N"}},
            opset_version=17,
        )
    lengths = torch.tensor([7, 4, 1])
    x = torch.randn(7, 3, INPUTS, requires_grad=True)
    wanted = torch.autograd.grad(net(x, lengths).max(dim=1).values.sum(), x)[0].numpy()
    converted = onnxgbp.convert(onnx.load_from_string(file.getvalue()), method="gradient")
    results = ort_run(converted, {"x": x.detach().numpy(), "lengths": lengths.numpy()})
    assert cosine(results["attribution"], wanted) > 0.999999
    assert not results["attribution"][4:, 1].any()
