"""Small trained classifiers from seven exporters, against what the framework itself computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checking import Array, cosine, forward_error, ort_run, torch_reference

import onnxgbp

CORPUS = Path(__file__).parent / "data" / "corpus"
METHODS = {"grad": "gradient", "gbp": "guided", "deconv": "deconvnet"}

ROWS: dict[str, dict[str, Any]] = {row["id"]: row for row in json.loads((CORPUS / "manifest.json").read_text())}

# The row of the file whose last output is a list of maps has no references of its own: its twin's serve.
ZIPMAP = {"grad_logit": "grad_logit", "gbp_logit": "gbp_logit", "deconv_logit": "deconv_logit"}

# Lowest cosine with the stored references, where it is not 0.999.
LOOSER = {
    # float16 weights of its own flip 4 ReLU and 3 MaxPool decisions; see also test_every_rule_on_every_file.
    "torch_mnist_relu.fp16_keepio": 0.997,
    # Rounding its weights alone leaves 0.9946 against the float net's gradient; its activations are rounded as well.
    "torch_mnist_relu.qdq": 0.99,
}


def _references(row: Mapping[str, Any]) -> dict[str, str]:
    return row.get("refs") or ZIPMAP


def _feeds(row: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: arrays[key] for name, (key, _) in row["feeds"].items()}


def _options(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """grad_output explains the model's own last output, a softmax maybe; Captum's rules change nothing but ReLU."""
    options: dict[str, Any] = {"method": METHODS[kind.partition("_")[0]], "target": "input"}
    if kind == "grad_output":
        options["output"] = row["output"]
    if "captum" in kind:
        options["activations"] = "relu"
    return options


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in ROWS for kind in _references(ROWS[name])])
def test_stored_reference(name: str, kind: str) -> None:
    row = ROWS[name]
    arrays = np.load(CORPUS / row["npz"])
    feeds = _feeds(row, arrays)
    before = ort_run(onnx.load(CORPUS / row["onnx"]), feeds)
    converted = onnxgbp.convert(CORPUS / row["onnx"], **_options(row, kind))
    target = arrays[row.get("target_key") or "target"].astype(np.int64)
    after = ort_run(converted, {**feeds, "target": target})
    assert list(after)[: len(before)] == list(before)
    assert forward_error(before, after) <= 1e-5
    assert np.array_equal(after["attribution_target"], target)
    want = arrays[_references(row)[kind]]
    assert after["attribution"].size == want.size
    assert cosine(after["attribution"], want.reshape(after["attribution"].shape)) >= LOOSER.get(name, 0.999)


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("name", [name for name in ROWS if not name.endswith(".qdq")])  # the reference reads no QDQ
def test_every_rule_on_every_file(name: str, method: str) -> None:
    """Most exporters left nothing but a gradient to compare with: the other rules are the float64 reference's.

    It has the file's own weights, so that the float16 file meets the same bound as the others.
    """
    row = ROWS[name]
    source = onnx.load(CORPUS / row["onnx"])
    feeds = _feeds(row, np.load(CORPUS / row["npz"]))
    graph = onnxgbp.GradientGraph.build(onnxgbp.load(source))
    after = ort_run(graph.render(method=method), feeds)
    explained = graph.explained.tensor.name
    wanted, _ = torch_reference().attribution(source, feeds, explained, None, list(feeds), method)
    (want,) = wanted.values()
    assert after["attribution"].shape == want.shape
    assert cosine(after["attribution"], want) >= 0.9999
    assert np.linalg.norm(after["attribution"]) == pytest.approx(np.linalg.norm(want), rel=1e-2)


# The other exports of a net, with the same weights and inputs, beside its first.
FIRST = {row["npz"]: name for name, row in reversed(ROWS.items())}
TWINS = [(FIRST[row["npz"]], name) for name, row in ROWS.items() if name != FIRST[row["npz"]]]


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_the_exporter_makes_no_difference(name: str, twin: str, method: str) -> None:
    maps = []
    for row in (ROWS[name], ROWS[twin]):
        arrays = np.load(CORPUS / row["npz"])
        converted = onnxgbp.convert(CORPUS / row["onnx"], method=method, target="input")
        target = arrays[row.get("target_key") or "target"].astype(np.int64)
        maps.append(ort_run(converted, {**_feeds(row, arrays), "target": target})["attribution"])
    assert cosine(*maps) >= min(LOOSER.get(name, 0.9999), LOOSER.get(twin, 0.9999))


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("name", list(ROWS))
def test_the_profiles_agree(name: str, method: str) -> None:
    row = ROWS[name]
    source = CORPUS / row["onnx"]
    feeds = _feeds(row, np.load(CORPUS / row["npz"]))
    fast, portable = (
        ort_run(onnxgbp.convert(source, method=method, profile=profile), feeds) for profile in ("ort", "portable")
    )
    assert np.array_equal(fast["attribution_target"], portable["attribution_target"])
    assert cosine(fast["attribution"], portable["attribution"]) >= 0.999999


@pytest.mark.parametrize("name", list(ROWS))
def test_batch_of_one(name: str) -> None:
    """Where the batch is free, the first sample alone gives what it gives among others."""
    row = ROWS[name]
    source = onnx.load(CORPUS / row["onnx"])
    feeds = _feeds(row, np.load(CORPUS / row["npz"]))
    weights = {tensor.name for tensor in source.graph.initializer}
    batches = [v.type.tensor_type.shape.dim[0].dim_value for v in source.graph.input if v.name not in weights]
    if any(batches):
        pytest.skip("its batch is fixed")
    converted = onnxgbp.convert(source)
    together, alone = (ort_run(converted, {n: a[:size] for n, a in feeds.items()}) for size in (None, 1))
    assert cosine(together["attribution"][:1], alone["attribution"]) >= 0.9999  # float16 rounds with the batch
