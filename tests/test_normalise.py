"""What optimisers fuse and what the standard defines by function bodies, written out: values and gradients stay."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checking import (
    Array,
    check_vjp,
    cosine,
    forward_error,
    optimised,
    ort_run,
    reference_run,
    small_model,
    to_float64,
    wheel_cases,
)
from onnx import TensorProto, helper, numpy_helper

import onnxgbp
from onnxgbp.model import load, to_proto

CORPUS = Path(__file__).parent / "data" / "corpus"
METHODS = ("gradient", "guided", "deconvnet")
LEVELS = onnxruntime.GraphOptimizationLevel


def values(*shape: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(shape).standard_normal(shape) * scale).astype(np.float32)


def ints(*rows: Sequence[int]) -> Array:
    return np.array(rows if len(rows) > 1 else rows[0], np.int32)


def one_node(
    operator: str,
    inputs: Mapping[str, Array | None],
    *,
    weights: str = "",
    outputs: str = "y",
    opset: int = 17,
    domain: str = "com.microsoft",
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node with a free batch, and what it is fed; the inputs in `weights` are initializers."""
    node = helper.make_node(
        operator,
        [name if array is not None else "" for name, array in inputs.items()],
        outputs.split(),
        name="node",
        domain=domain,
        **attributes,
    )
    fed = {name: array for name, array in inputs.items() if array is not None and name not in weights.split()}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), ["N", *a.shape[1:]])
            for name, a in fed.items()
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.INT32 if name == "counts" else TensorProto.FLOAT, None)
            for name in outputs.split()
        ],
        [numpy_helper.from_array(a, name) for name, a in inputs.items() if a is not None and name not in fed],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), fed


def written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    source = load(model)
    return to_proto(source.model, source)


X = values(2, 5, 8)
IMAGE = values(2, 3, 6, 6)
CONV = {"x": IMAGE, "w": values(4, 3, 3, 3), "b": values(4)}
GEMM = {"x": values(2, 5), "w": values(4, 5), "b": values(4)}
MASK = ints([1, 1, 1, 0, 0], [1, 1, 1, 1, 1])
TRIANGLES = np.stack([np.tril(np.ones((5, 5), np.int32))] * 2)
QKV = {"x": X, "w": values(8, 24, scale=0.3), "b": values(24)}
Q_K_V = {"q": X, "k": values(2, 6, 8), "v": values(2, 6, 12)}
SAME = {"q": X, "k": values(3, 5, 8)[:2], "v": values(4, 5, 8)[:2]}
WORDS = {"words": values(10, 8), "positions": values(7, 8)}
NORM = {"g": values(8), "beta": values(1, 8)[0]}
TURNS = np.array([[3, 1, 0, 8, 2], [4, 4, 5, 6, 7]])
IDS, SEGMENTS = ints([1, 2, 3, 4, 5], [6, 7, 8, 9, 0]), ints([0, 0, 1, 1, 1], [0, 1, 1, 1, 1])

FUSED: dict[str, tuple[onnx.ModelProto, dict[str, Array]]] = {
    **{
        f"FusedConv {name}": one_node(
            "FusedConv", CONV, weights="w b", activation=name, activation_params=given, pads=[1, 1, 1, 1]
        )
        for name, given in {
            "Relu": None,
            "Sigmoid": None,
            "Tanh": None,
            "LeakyRelu": [0.1],
            "Clip": [0.0, 0.6],
            "HardSigmoid": [0.2, 0.5],
        }.items()
    },
    "FusedConv with a sum": one_node(
        "FusedConv", CONV | {"z": values(2, 4, 6, 6)}, weights="w b", activation="Relu", pads=[1, 1, 1, 1]
    ),
    "FusedGemm": one_node("FusedGemm", GEMM, weights="w b", activation="Relu", transB=1, alpha=0.5, beta=2.0),
    "FusedGemm LeakyRelu": one_node(
        "FusedGemm", GEMM, weights="w b", activation="LeakyRelu", activation_alpha=0.2, transB=1
    ),
    "FusedMatMul": one_node("FusedMatMul", {"a": values(3, 2, 4, 5), "b": values(3, 2, 6, 5)}, transB=1, alpha=0.3),
    "FusedMatMul batches": one_node(
        "FusedMatMul", {"a": values(2, 3, 5, 4), "b": values(3, 5, 2, 6)}, transBatchA=1, transA=1
    ),
    "Gelu": one_node("Gelu", {"x": X}),
    "BiasGelu": one_node("BiasGelu", {"x": X, "b": values(8)}, weights="b", opset=12),
    "FastGelu": one_node("FastGelu", {"x": X}),
    "FastGelu bias": one_node("FastGelu", {"x": X, "b": values(8)}, weights="b"),
    **{
        f"RotaryEmbedding {name}": one_node(
            "RotaryEmbedding",
            {"x": x, "p": places, "cos": values(9, half), "sin": values(half, 9).T.copy()},
            weights="p cos sin",
            **given,
        )
        for name, (x, places, half, given) in {
            "of rows": (X, TURNS, 2, {}),
            "of heads": (values(2, 2, 5, 4), TURNS, 2, {}),
            "interleaved": (X, TURNS, 2, {"interleaved": 1}),
            "from a position": (X, TURNS[0, :1], 2, {}),
            "from a position, of heads": (values(2, 2, 5, 4), TURNS[0, :1], 2, {"interleaved": 1}),
            "in part": (X, TURNS, 1, {"rotary_embedding_dim": 2, "num_heads": 2}),
        }.items()
    },
    "QuickGelu": one_node("QuickGelu", {"x": X}),
    "QuickGelu alpha": one_node("QuickGelu", {"x": X}, alpha=1.5),
    "LayerNormalization before opset 17": one_node(
        "LayerNormalization", {"x": X} | NORM, weights="g beta", domain="", opset=12, epsilon=1e-3, axis=-1
    ),
    "LayerNormalization of two axes": one_node(
        "LayerNormalization", {"x": X, "g": values(5, 8)}, weights="g", domain="", opset=12, axis=1
    ),
    "SimplifiedLayerNormalization": one_node(
        "SimplifiedLayerNormalization", {"x": X, "g": values(8)}, weights="g", domain="", axis=-1, epsilon=1e-3
    ),
    **{
        f"SkipLayerNormalization {opset}": one_node(
            "SkipLayerNormalization",
            {"x": X, "skip": values(3, 5, 8)[:2]} | NORM | {"bias": values(2, 8)[0]},
            weights="g beta bias",
            opset=opset,
            epsilon=1e-3,
        )
        for opset in (12, 17)
    },
    "SkipSimplifiedLayerNormalization": one_node(
        "SkipSimplifiedLayerNormalization", {"x": X, "skip": values(3, 5, 8)[:2], "g": values(8)}, weights="g"
    ),
    "EmbedLayerNormalization": one_node(
        "EmbedLayerNormalization",
        {"ids": IDS, "segments": SEGMENTS} | WORDS | {"types": values(2, 8)} | NORM | {"mask": MASK},
        weights="words positions types g beta",
        outputs="y counts",
    ),
    "EmbedLayerNormalization without segments": one_node(
        "EmbedLayerNormalization",
        {"ids": IDS, "segments": None} | WORDS | {"types": None} | NORM,
        weights="words positions g beta",
        outputs="y counts",
    ),
    "Attention": one_node("Attention", QKV, weights="w b", num_heads=2),
    "Attention causal": one_node("Attention", QKV, weights="w b", num_heads=2, unidirectional=1, scale=0.3),
    "Attention lengths": one_node("Attention", QKV | {"mask": ints([3, 5])}, weights="w b", num_heads=2),
    "Attention mask": one_node("Attention", QKV | {"mask": MASK}, weights="w b", num_heads=2),
    "Attention causal mask": one_node("Attention", QKV | {"mask": MASK}, weights="w b", num_heads=2, unidirectional=1),
    "Attention mask of pairs": one_node("Attention", QKV | {"mask": TRIANGLES}, weights="w b", num_heads=2),
    "Attention bias": one_node(
        "Attention", QKV | {"mask": None, "past": None, "bias": values(2, 2, 5, 5)}, weights="w b", num_heads=2
    ),
    "Attention sizes": one_node(
        "Attention",
        {"x": X, "w": values(8, 28), "b": values(28)},
        weights="w b",
        num_heads=2,
        qkv_hidden_sizes=[8, 8, 12],
    ),
    "MultiHeadAttention": one_node("MultiHeadAttention", Q_K_V | {"b": values(28)}, weights="b", num_heads=2),
    "MultiHeadAttention mask": one_node("MultiHeadAttention", SAME | {"b": None, "mask": MASK}, num_heads=2),
    "MultiHeadAttention lengths": one_node(
        "MultiHeadAttention", SAME | {"b": None, "mask": ints([3, 5])}, num_heads=2, mask_filter_value=-500.0
    ),
    "MultiHeadAttention bias": one_node(
        "MultiHeadAttention", SAME | {"b": None, "mask": None, "bias": values(2, 2, 5, 5)}, num_heads=2, scale=0.5
    ),
    "MultiHeadAttention causal": one_node("MultiHeadAttention", SAME, num_heads=2, unidirectional=1),
    "MultiHeadAttention of heads": one_node(
        "MultiHeadAttention", {"q": X, "k": values(2, 2, 6, 4), "v": values(3, 2, 6, 4)[:2]}, num_heads=2
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_operator_computes_the_same(name: str) -> None:
    model, fed = FUSED[name]
    plain = written_out(model)
    onnx.checker.check_model(plain, full_check=True)
    assert not any(node.domain for node in plain.graph.node)
    assert [entry.domain for entry in plain.opset_import] == [""]
    assert all(node.name.startswith("node/") for node in plain.graph.node)
    wanted, got = ort_run(model, fed), ort_run(plain, fed)
    assert list(got) == list(wanted)
    assert forward_error(wanted, got) <= 1e-6
    for output, array in wanted.items():
        assert got[output].dtype == array.dtype


@pytest.mark.parametrize("name", [name for name in FUSED if name.startswith(("MultiHead", "Attention", "FusedMatMul"))])
def test_its_gradient_is_that_of_its_values(name: str) -> None:
    model, fed = FUSED[name]
    wide = to_float64(written_out(model))
    feeds = {key: array.astype(np.float64) if array.dtype.kind == "f" else array for key, array in fed.items()}
    floats = [key for key, array in feeds.items() if array.dtype.kind == "f"]
    for figure in check_vjp(wide, feeds, output="y", wrt=floats, linear=False, directions=1):
        assert figure.right, figure


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (one_node("Attention", QKV | {"mask": ints([3, 5, 0, 1])}, weights="w b mask", num_heads=2), "two axes"),
        (
            one_node("Attention", QKV | {"mask": None, "past": values(2, 2, 2, 3, 4)}, weights="w b", num_heads=2),
            "cache",
        ),
        (one_node("Attention", QKV, weights="w b", num_heads=2, outputs="y present"), "without a cache"),
        (one_node("FusedConv", CONV, weights="w b", activation="Cubic"), "'Cubic'"),
        (one_node("Conv", {"x": IMAGE, "w": values(4, 3, 3, 3)}, weights="w", domain="com.microsoft.nchwc"), "before"),
    ],
)
def test_what_cannot_be_written_out_is_refused(model: tuple[onnx.ModelProto, Any], reason: str) -> None:
    with pytest.raises(onnxgbp.OnnxgbpError, match=reason) as caught:
        onnxgbp.load(model[0])
    assert "\n" not in str(caught.value)
    assert "node" in str(caught.value)


def assert_same_maps(
    source: onnx.ModelProto, fused: onnx.ModelProto, feeds: Mapping[str, Array], wrt: tuple[str, str] | None = None
) -> None:
    for method in METHODS:
        wanted, got = (
            ort_run(onnxgbp.convert(model, method=method, wrt=wrt[i] if wrt else ()), feeds)
            for i, model in enumerate((source, fused))
        )
        outputs = {output.name: wanted[output.name] for output in source.graph.output}
        assert forward_error(outputs, got) <= 1e-5
        assert cosine(got["attribution"], wanted["attribution"]) >= 0.999999


# What the optimiser fused in each file of the corpus; the others it leaves as they are.
CORPUS_FUSIONS = {
    "torch_mnist_relu.ts17": {"FusedConv", "FusedGemm"},
    "torch_mnist_relu6.ts17": {"FusedConv"},
    "torch_mnist_gelu.ts17": {"Gelu"},
    "torch_mnist_silu.ts17": {"QuickGelu"},
    "torch_mnist_tanh.dyn": {"FusedConv", "FusedGemm"},
    "keras_tensorflow_mobile.tf2onnx15": {"FusedConv"},
    "paddle_relu.p2o11": {"FusedConv", "FusedGemm"},
    "hf_vit.optimum": {"FusedMatMul", "BiasGelu"},
}


@pytest.mark.parametrize("name", CORPUS_FUSIONS)
def test_an_optimised_file_has_the_maps_of_its_source(name: str, tmp_path: Path) -> None:
    row = next(row for row in json.loads((CORPUS / "manifest.json").read_text()) if row["id"] == name)
    fused = optimised(CORPUS / row["onnx"], tmp_path)
    found = {node.op_type for node in fused.graph.node if node.domain == "com.microsoft"}
    if found != CORPUS_FUSIONS[name]:
        pytest.skip(f"this ONNX Runtime fuses {found}")
    arrays = np.load(CORPUS / row["npz"])
    feeds = {key: arrays[entry[0]] for key, entry in row["feeds"].items()}
    assert_same_maps(onnx.load(CORPUS / row["onnx"]), fused, feeds)


def test_a_fused_activation_is_seen_by_the_rules(tmp_path: Path) -> None:
    fused = optimised(CORPUS / "torch_mnist_relu.ts17.onnx", tmp_path)
    found = onnxgbp.GradientGraph.build(onnxgbp.load(fused)).found
    assert [activation.kind for activation in found] == ["Relu"] * 3


def test_a_fully_optimised_file_is_refused_with_advice(tmp_path: Path) -> None:
    full = optimised(CORPUS / "torch_mnist_relu.ts17.onnx", tmp_path, LEVELS.ORT_ENABLE_ALL)
    if not any(node.domain == "com.microsoft.nchwc" for node in full.graph.node):
        pytest.skip("ONNX Runtime has no blocked layout on this processor")
    with pytest.raises(onnxgbp.OnnxgbpError, match="before the optimisation"):
        onnxgbp.convert(full)


def bert(torch: Any, gelu: str) -> Any:
    """A small BERT in the words that the optimiser's patterns know."""
    nn = torch.nn

    class Layer(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
            self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
            self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)

        def heads(self, x: Any) -> Any:
            return x.view(x.size(0), x.size(1), 4, 8).permute(0, 2, 1, 3)

        def forward(self, x: Any, mask: Any) -> Any:
            q, k, v = (self.heads(part(x)) for part in (self.q, self.k, self.v))
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8) + mask
            mixed = torch.matmul(torch.softmax(scores, -1), v).permute(0, 2, 1, 3).contiguous()
            x = self.first(self.out(mixed.view(mixed.size(0), mixed.size(1), 32)) + x)
            return self.second(self.narrow(nn.functional.gelu(self.wide(x), approximate=gelu)) + x)

    class Bert(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.types = (nn.Embedding(n, 32) for n in (50, 512, 2))
            self.norm, self.last = nn.LayerNorm(32), nn.Linear(32, 5)
            self.layers = nn.ModuleList(Layer() for _ in range(2))
            self.register_buffer("order", torch.arange(512)[None])

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            x = self.words(ids) + self.types(types) + self.places(self.order[:, : ids.size(1)])
            x = self.norm(x)
            for layer in self.layers:
                x = layer(x, (1.0 - mask[:, None, None, :].to(torch.float32)) * -10000.0)
            return self.last(x[:, 0])

    torch.manual_seed(0)
    return Bert().eval()


BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module", params=["none", "tanh"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    ids = torch.randint(0, 50, (2, 8))
    free = {name: {0: "batch", 1: "sequence"} for name in BERT_INPUTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            bert(torch, request.param),
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            str(path),
            opset_version=14,
            dynamo=False,
            input_names=list(BERT_INPUTS),
            output_names=["y"],
            dynamic_axes=free,
        )
    return path


def embedded(model: onnx.ModelProto) -> str:
    """The tensor that the first layer reads."""
    readers = ("Attention", "MatMul")
    return str(next(node.input[0] for node in model.graph.node if node.op_type in readers))


def bert_feeds(model: onnx.ModelProto) -> dict[str, Array]:
    """The optimiser may want int32 instead of int64."""
    rng = np.random.default_rng(0)
    mask = (np.arange(8) < np.array([[5], [8], [7]])).astype(np.int64)
    fed = dict(zip(BERT_INPUTS, (rng.integers(0, 50, (3, 8)), mask, rng.integers(0, 2, (3, 8))), strict=True))
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    return {name: fed[name].astype(helper.tensor_dtype_to_np_dtype(kind)) for name, kind in kinds.items()}


def test_bert_optimised_by_the_session(exported: Path, tmp_path: Path) -> None:
    source, fused = onnx.load(exported), optimised(exported, tmp_path)
    found = {node.op_type for node in fused.graph.node if node.domain == "com.microsoft"}
    assert found  # which, depends on the release
    assert_same_maps(source, fused, bert_feeds(source), (embedded(source), embedded(fused)))


@pytest.mark.parametrize("multi_head", [False, True])
def test_bert_optimised_for_transformers(exported: Path, tmp_path: Path, multi_head: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
        options = optimizer.FusionOptions("bert")
        options.use_multi_head_attention = multi_head
        options.use_raw_attention_mask(multi_head)
        made = optimizer.optimize_model(
            str(exported), "bert", num_heads=4, hidden_size=32, opt_level=0, optimization_options=options
        )
        made.save_model_to_file(str(tmp_path / "t.onnx"))
    source, fused = onnx.load(exported), onnx.load(tmp_path / "t.onnx")
    found = {node.op_type for node in fused.graph.node if node.domain == "com.microsoft"}
    assert found >= {"EmbedLayerNormalization", "SkipLayerNormalization"}
    assert found & {"MultiHeadAttention", "Attention"} == {"MultiHeadAttention" if multi_head else "Attention"}
    feeds = bert_feeds(source)
    for name, array in bert_feeds(fused).items():
        assert np.array_equal(feeds[name], array)
    for method, where in [(method, embedded) for method in METHODS] + [("guided", lambda _model: ())]:
        wanted, got = (
            ort_run(onnxgbp.convert(model, method=method, wrt=where(model)), bert_feeds(model))
            for model in (source, fused)
        )
        assert forward_error({"y": wanted["y"]}, got) <= 1e-5
        assert cosine(got["attribution"], wanted["attribution"]) >= 0.999999


# Cases of the operators that the standard defines by a body: for each a few of what it can be given.
BODIES = [
    "test_attention_3d",
    "test_attention_3d_causal",
    "test_attention_3d_gqa",
    "test_attention_3d_with_past_and_present",
    "test_attention_4d_attn_mask_bool_4d",
    "test_attention_4d_diff_heads_sizes_scaled",
    "test_attention_4d_gqa_with_past_and_present",
    "test_attention_4d_softcap",
    "test_nllloss_NCd1d2_with_weight",
    "test_rotary_embedding",
    "test_rotary_embedding_3d_input",
    "test_rotary_embedding_interleaved",
    "test_sce_mean",
]


@pytest.mark.parametrize("name", BODIES)
def test_a_function_body_in_the_place_of_its_operator(name: str) -> None:
    if name not in wheel_cases():
        pytest.skip("the installed onnx has no such case")
    case = wheel_cases()[name]
    model, feeds = to_float64(case.model), {}
    for key, array in case.feeds.items():
        feeds[key] = array.astype(np.float64) if array.dtype.kind == "f" else array
    plain = written_out(model)
    assert case.operator not in {node.op_type for node in plain.graph.node}
    output = model.graph.output[0].name
    wanted, got = reference_run(model, feeds)[output], reference_run(plain, feeds)[output]
    assert np.allclose(got, wanted, rtol=1e-6, atol=1e-6)
    floats = [key for key, array in feeds.items() if array.dtype.kind == "f"][:3]
    for figure in check_vjp(plain, feeds, output=output, wrt=floats, linear=False, directions=1):
        assert figure.error <= 2e-6, figure  # the bodies hold constants in float32


@pytest.mark.parametrize("attributes", [{}, {"periodic": 0}])
@pytest.mark.parametrize("window", ["HannWindow", "HammingWindow", "BlackmanWindow"])
def test_the_window_of_a_signal_stays_as_it_is(window: str, attributes: dict[str, int]) -> None:
    nodes = [helper.make_node(window, ["n"], ["w"], **attributes), helper.make_node("Mul", ["x", "w"], ["y"])]
    model = small_model(nodes, {"x": ["N", 8]}, constants={"n": np.array(8)})
    got = ort_run(
        onnxgbp.convert(model, method="gradient", target="input"), {"x": values(2, 8), "target": np.array([3, 5])}
    )
    expected = np.zeros((2, 8), np.float32)
    expected[[0, 1], [3, 5]] = (got["y"] / values(2, 8))[[0, 1], [3, 5]]
    np.testing.assert_array_equal(got["y"], ort_run(model, {"x": values(2, 8)})["y"])
    np.testing.assert_allclose(got["attribution"], expected, rtol=1e-5)


def test_a_spectrum_with_a_computed_window() -> None:
    nodes = [
        helper.make_node("HannWindow", ["n"], ["w"]),
        helper.make_node("STFT", ["x", "step", "w", "n"], ["s"], onesided=1),
        helper.make_node("ReduceSumSquare", ["s"], ["y"], axes=[1, 2], keepdims=0),
    ]
    model = small_model(nodes, {"x": [2, 32, 1]}, constants={"n": np.array(8), "step": np.array(4)})
    x, target = values(2, 32, 1), np.array([0, 1])
    got = ort_run(onnxgbp.convert(model, method="gradient", target="input"), {"x": x, "target": target})
    v = values(2, 32, 1, scale=1e-2)
    above, below = (ort_run(model, {"x": x + sign * v})["y"][[0, 1], target].sum() for sign in (1, -1))
    assert (got["attribution"] * v).sum() == pytest.approx((above - below) / 2, rel=1e-4)
    del nodes[1].attribute[:]
    unsaid = small_model(nodes, {"x": [2, 32, 1]}, constants={"n": np.array(8), "step": np.array(4)})
    with pytest.raises(onnxgbp.OnnxgbpError, match="does not say whether it is onesided"):
        onnxgbp.convert(unsaid, target="input")
