"""The study of activations in miniature, and whether docs/activations.md says what its JSON holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import activation_report as report
import numpy as np
import pytest

from onnxgbp import Explainer

RELU_AND_KIN = {"ReLU": "Relu", "SiLU": "Swish"}


@pytest.fixture(scope="module")
def study() -> ModuleType:
    torch = pytest.importorskip("torch", reason="it trains the networks")
    pytest.importorskip("sklearn", reason="it carries the digits")
    import activation_study

    torch.set_num_threads(1)  # test workers share the cores
    return activation_study


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", RELU_AND_KIN)
def test_study_in_miniature(study: ModuleType, tmp_path: Path, activation: str) -> None:
    run = study.study(activation, 0, study.Plan(epochs=1, digits=3), tmp_path)
    assert run["kinds"] == [RELU_AND_KIN[activation]]
    assert run["accuracy"]["scaled"] > 0.6  # of ten classes
    assert [len(run["before"][first]) for first in ("torch", "scaled")] == [len(run["trained"]), 5]
    assert run["before"]["torch"][0] < 0.1 * run["before"]["scaled"][0]
    assert run["trained"][-1] == 1
    assert 0 < run["gates"]["guiding"] < 1
    assert sorted(run["maps"]) == sorted([*report.RULES, "as-relu"])
    alike = run["maps"]["guided"]["cosine"]
    assert alike["as-relu"] == pytest.approx(1) if activation == "ReLU" else 0.5 < alike["as-relu"] < 0.9999
    assert alike["gradient"] < 0.9999
    assert alike["gradient"] == run["maps"]["gradient"]["cosine"]["guided"]
    figures = dict(report._figures(run))
    assert all(np.isfinite(value) for value in figures.values())
    shown = {figure for columns in report.TABLES.values() for _, figure, _ in columns}
    assert shown | {name for _, panel, _ in report._PANELS for name in panel.values()} <= set(figures)


def test_export_is_the_trained_network(study: ModuleType, tmp_path: Path) -> None:
    import torch

    data = study.digits()
    torch.manual_seed(1)
    net = study.network("GELU", scaled=True)
    study.train(net, data, 1)
    path = study.export(net.eval(), tmp_path / "net.onnx")
    x = data.tested_x[:6].clone().requires_grad_()
    scores = net(x)
    (gradient,) = torch.autograd.grad(scores.amax(1).sum(), x)
    result = Explainer(path, method="gradient", provider="cpu")(x.detach().numpy())
    np.testing.assert_allclose(result.scores, scores.detach().numpy(), rtol=1e-4, atol=1e-4)
    scale = float(gradient.abs().max())
    np.testing.assert_allclose(result.attribution, gradient.numpy(), rtol=0, atol=1e-4 * scale)
    again = study.build("GELU", 1, data, 1, tmp_path / "again.onnx")
    assert again.read_bytes() == path.read_bytes()


def test_first_weights_keep_the_gradient(study: ModuleType) -> None:
    from torch import nn

    assert study._gain(nn.ReLU()) == pytest.approx(2**0.5, rel=1e-3)
    assert study._gain(nn.Identity()) == pytest.approx(1, rel=1e-6)
    layer = study.network("Sigmoid", scaled=True)[2].requires_grad_(False)
    assert float(layer.weight.std()) == pytest.approx(study._gain(nn.Sigmoid()) / (16 * 9) ** 0.5, rel=0.1)
    np.testing.assert_allclose(layer.bias.tolist(), (-layer.weight.flatten(1).sum(1) / 2).tolist(), rtol=1e-5)


def test_digits_are_split_once(study: ModuleType) -> None:
    data = study.digits()
    assert data.x.shape == (1297, 1, 16, 16)
    assert data.tested_x.shape == (500, 1, 16, 16)
    assert set(data.tested_y.tolist()) == set(range(10))
    assert float(data.x.min()) == 0
    assert float(data.x.max()) == 1
    both = np.concatenate([data.x.numpy(), data.tested_x.numpy()]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797  # none of the tested ones is trained on


def test_figures_of_maps(study: ModuleType) -> None:
    assert study._area(np.ones((1, 10, 10))) == pytest.approx(0.9, abs=0.011)
    one = np.zeros((1, 10, 10))
    one[0, 3, 4] = -2
    assert study._area(one) == 0.01
    assert study._cosine(one, -one) == -1
    assert study._cosine(one, np.zeros_like(one)) is None
    assert study._others(np.array([3, 3, 5, 3])) == [2, 2, 3, 2]


# --- the page -------------------------------------------------------------------------------------


def test_page_says_what_the_json_holds() -> None:
    assert report.refresh(write=False) == 0
    runs = json.loads(report.RESULTS.read_text())["runs"]
    assert [(run["activation"], run["seed"]) for run in runs] == [(n, s) for n in report.ACTIVATIONS for s in range(3)]
    text = report.PAGE.read_text()
    for picture in (report.CHART, report.MAPS):
        assert f"]({picture.name})" in text
        assert picture.stat().st_size > 10_000


def test_stale_page_is_told_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = report.PAGE.read_text()
    number = re.search(r"(\d)(?: %)?<!--\w", right)
    assert number is not None
    other = str(9 - int(number[1]))
    for wrong in (
        right[: number.start(1)] + other + right[number.end(1) :],  # in the prose
        re.sub(r"(\| Tanh \| .*?)\d(?= )", rf"\g<1>{other}", right, count=1),  # in a table
    ):
        assert wrong != right
        page = tmp_path / "activations.md"
        page.write_text(wrong)
        monkeypatch.setattr(report, "PAGE", page)
        assert report.refresh(write=False) == 1
        assert "is stale" in capsys.readouterr().err
        assert page.read_text() == wrong
        assert report.refresh(write=True) == 0
        assert page.read_text() == right


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("1.0<!--ReLU maps/guided/beauty-->", "no figure maps/guided/beauty of ReLU"),
        ("1.0<!--Softplus dead-->", "no figure dead of Softplus"),
        ("much<!--ReLU dead-->", "without a number"),
        (None, "holds no table between <!-- guiding:begin -->"),
    ],
)
def test_broken_page_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], added: str | None, said: str
) -> None:
    right = report.PAGE.read_text()
    wrong = right + added if added else right.replace("<!-- guiding:begin -->", "")
    page = tmp_path / "activations.md"
    page.write_text(wrong)
    monkeypatch.setattr(report, "PAGE", page)
    assert report.refresh(write=True) == 1
    assert said in capsys.readouterr().err
    assert page.read_text() == wrong


def test_numbers_are_means_over_the_seeds() -> None:
    runs = json.loads(report.RESULTS.read_text())["runs"]

    def mean(activation: str) -> Any:
        return np.mean([run["maps"]["guided"]["deletion"] for run in runs if run["activation"] == activation])

    seeds = report.read_seeds()
    figure = "maps/guided/deletion"
    for written, name, wanted in (
        ("9.999", "ELU", f"{mean('ELU'):.3f}"),
        ("9 %", "ELU", f"{100 * mean('ELU'):.0f} %"),
        ("9e-05", "ELU", f"{mean('ELU'):.0e}"),
        ("9.99", "lowest", f"{min(mean(one) for one in report.ACTIVATIONS):.2f}"),
    ):
        match = report._NUMBER.fullmatch(f"{written}<!--{name} {figure}-->")
        assert match is not None
        assert report._number(seeds, match) == f"{wanted}<!--{name} {figure}-->"


def test_what_lies_within_the_spread_is_not_told_apart() -> None:
    assert not report.apart([0.90, 0.92, 0.94], [0.93, 0.95, 0.97])
    assert report.apart([0.90, 0.91, 0.92], [0.95, 0.96, 0.97])
    assert not report.apart([1.0], [2.0])  # one seed has no spread
