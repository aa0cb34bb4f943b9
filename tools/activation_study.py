"""How other activation functions change guided backpropagation: docs/activations.md, its tables, numbers and figures.

python tools/activation_study.py            trains, measures, writes docs/activations.* (minutes on two cores)
python tools/activation_study.py --tables   the page's tables and numbers, and the chart, from docs/activations.json
python tools/activation_study.py --check    exit 1 where the page is stale, and changes nothing

One convolutional network is trained on the handwritten digits that scikit-learn carries, with each activation and each
seed, and exported to ONNX. From there on every figure is onnxgbp's. Needs the extras cpu, plots and reference.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from activation_report import ACTIVATIONS, RESULTS, RULES, draw_chart, draw_maps, refresh
from sklearn.datasets import load_digits
from torch import Tensor, nn

from onnxgbp import Explainer
from onnxgbp.faithfulness import check_faithfulness
from onnxgbp.files import write
from onnxgbp.health import model_health
from onnxgbp.inspection import inspect_model
from onnxgbp.maps import likeness, without_channels
from onnxgbp.sanity import check_sanity

Array: TypeAlias = npt.NDArray[Any]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
}
SIDE = 16  # pixels: each 8 x 8 digit is interpolated to twice its size
WIDTH = 16  # channels of the first convolutions
BATCH = 32
RATE = 3e-3  # the largest learning rate of the cycle
TESTED = 500  # of the 1797 digits, the same in every run
PICTURED = (2, 5, 8)  # the digits of the picture: the first of each that is tested


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done. epochs: of training; digits: how many tested ones are explained; noise: the standard deviation
    of what is added to pixels that go from 0 to 1.
    """

    epochs: int = 16
    digits: int = 50
    noise: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Pixels float32 [N, 1, SIDE, SIDE] from 0 to 1, and classes int64 [N]."""

    x: Tensor
    y: Tensor
    tested_x: Tensor
    tested_y: Tensor


def digits() -> Digits:
    found = load_digits()
    small = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    x, y = F.interpolate(small, size=SIDE, mode="bilinear"), torch.tensor(found.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    return Digits(x[order[TESTED:]], y[order[TESTED:]], x[order[:TESTED]], y[order[:TESTED]])


# --- the networks ---------------------------------------------------------------------------------


def network(activation: str, *, scaled: bool) -> nn.Sequential:
    """Four convolutions in two blocks and a hidden layer: five activations; its weights from torch's generator.

    Torch's own first weights, or `scaled` ones: normal, with the standard deviation g / sqrt(inputs) where
    1 / g^2 = E f'(z)^2 for a standard normal z, which keeps the gradient's size from layer to layer at the start (He et
    al. 2015, arXiv:1502.01852, for any f: g is their sqrt(2) for a ReLU). Biases take off what f(0) adds, which is
    nothing but for a sigmoid.
    """
    act, wide = MODULES[activation], 2 * WIDTH
    net = nn.Sequential(
        *(nn.Conv2d(1, WIDTH, 3, padding=1), act(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(WIDTH, wide, 3, padding=1), act(), nn.Conv2d(wide, wide, 3, padding=1), act(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(wide * (SIDE // 4) ** 2, 64), act(), nn.Linear(64, 10)),
    )
    layers = [layer for layer in net if isinstance(layer, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        rest = act()(torch.zeros(()))
        for layer in layers if scaled else []:
            gain = 1.0 if layer is layers[-1] else _gain(act())
            layer.weight.normal_(0, gain / layer.weight[0].numel() ** 0.5)
            assert layer.bias is not None
            layer.bias.copy_(-rest * layer.weight.flatten(1).sum(1) * (layer is not layers[0]))
    return net


def _gain(act: nn.Module) -> float:
    with torch.enable_grad():
        z = torch.linspace(-8, 8, 4001, requires_grad=True)
        (slope,) = torch.autograd.grad(act(z).sum(), z)
    density = torch.exp(-(z.detach() ** 2) / 2)
    return float(torch.sqrt(density.sum() / (density * slope**2).sum()))


def train(net: nn.Sequential, data: Digits, epochs: int) -> None:
    """Adam, with one cycle of the learning rate; torch's generator shuffles."""
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    steps = epochs * -(-len(data.x) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(data.x))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            optimiser.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(data.x[chosen]), data.y[chosen]))
            optimiser.step()
            cycle.step()


def export(net: nn.Module, path: Path) -> Path:
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["scores"], "dynamic_axes": {"x": {0: "N"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter takes seconds a file
        torch.onnx.export(net, (torch.zeros(2, 1, SIDE, SIDE),), path, dynamo=False, opset_version=20, **options)
    return path


def build(activation: str, seed: int, data: Digits, epochs: int, path: Path, *, scaled: bool = True) -> Path:
    """A network as an ONNX file; trained where there are epochs."""
    torch.set_num_threads(1)  # the runs share the cores
    torch.manual_seed(seed)
    net = network(activation, scaled=scaled)
    if epochs:
        train(net, data, epochs)
    return export(net.eval(), path)


# --- what is measured -----------------------------------------------------------------------------


def study(activation: str, seed: int, plan: Plan, folder: Path) -> dict[str, Any]:
    """One network with every figure of it, in plain values; leaves `{activation}-{seed}.onnx` in the folder."""
    data = digits()
    tested = data.tested_x.numpy()
    everything, few = folder / f"{activation}-{seed}.all.npy", folder / f"{activation}-{seed}.npy"
    np.save(everything, tested)
    np.save(few, tested[: plan.digits])

    def made(name: str, epochs: int, *, scaled: bool) -> Path:
        return build(activation, seed, data, epochs, folder / f"{activation}-{seed}{name}.onnx", scaled=scaled)

    model, plain = made("", plan.epochs, scaled=True), made(".plain", plan.epochs, scaled=False)
    before = {"torch": made(".0.plain", 0, scaled=False), "scaled": made(".0", 0, scaled=True)}
    right = data.tested_y.numpy()
    accuracy = {"torch": _accuracy(plain, tested, right), "scaled": _accuracy(model, tested, right)}
    health = model_health(model, everything).to_dict()
    places = sum(row["values"] for row in health["activations"])
    faith = check_faithfulness(model, few, methods=RULES, baseline="mean", noise_samples=0, provider="cpu")
    areas = {
        row["method"]: {name: row[name]["mean"] for name in ("deletion", "insertion")}
        for row in faith.to_dict()["methods"]
    }
    maps = _map_figures(model, tested[: plan.digits], plan.noise)
    for row in check_sanity(model, few, methods=RULES, provider="cpu").to_dict()["methods"]:
        cascade = row["cascading"]
        maps[row["method"]] |= areas[row["method"]] | {
            "runner_up": row["class_swap"]["rank_absolute"],
            "upper_half": cascade[(len(cascade) + 1) // 2 - 1]["rank_absolute"],
        }
    found: dict[str, Any] = _rounded(
        {
            "activation": activation,
            "seed": seed,
            "kinds": sorted({row["kind"] for row in health["activations"]}),
            "accuracy": accuracy,
            "before": {name: _vanishing(model_health(path, everything).to_dict()) for name, path in before.items()},
            "trained": _vanishing(health),
            "dead": sum(row["dead"]["count"] for row in health["activations"])
            / sum(row["units"] for row in health["activations"]),
            "saturated": sum(row["saturated"] * row["values"] for row in health["activations"]) / places,
            "gates": _gates(model, everything),
            "maps": maps,
            "baselines": {name: areas[name] for name in ("random", "sobel")},
        }
    )
    return found


def _accuracy(model: Path, x: Array, y: Array) -> float:
    scores = Explainer(model, method="gradient", provider="cpu")(x).scores
    return float((scores.argmax(axis=1) == y).mean())


def _vanishing(health: dict[str, Any]) -> list[float]:
    """The gradient's root mean square at each depth, the first in front, as a share of that at the last."""
    return [level["to_last"] for level in health["depths"]]


def _gates(model: Path, data: Path) -> dict[str, float]:
    """The mean over the activations of what f' takes away of the energy that arrives, and of what guiding takes away of
    the energy that f' leaves.
    """
    found = inspect_model(model, method="guided", data=data, limit=TESTED).to_dict()["activations"]
    energies = [row["energy"] for row in found]
    return {
        "slope": float(np.mean([row["x_gate"] for row in energies])),
        "guiding": float(np.mean([row["dy_gate"] / (1 - row["x_gate"]) for row in energies])),
    }


def _map_figures(model: Path, x: Array, noise: float) -> dict[str, dict[str, Any]]:
    """By rule, each the mean over the digits. Every map is of the class that the network sees in the digit."""
    explainers = {rule: Explainer(model, method=rule, provider="cpu", threads=1) for rule in (*RULES, "as-relu")}
    target = explainers["gradient"](x).target
    own = {rule: explainer(x, target).attribution for rule, explainer in explainers.items()}
    noisy = x + np.random.default_rng(0).normal(0, noise, x.shape).astype(np.float32)
    others = _others(target)
    figures: dict[str, dict[str, Any]] = {}
    for rule, explainer in explainers.items():
        maps = own[rule]
        near, elsewhere = explainer(noisy, target).attribution, explainer(x[others], target).attribution
        figures[rule] = {
            "size": float(np.mean(np.linalg.norm(maps.reshape(len(maps), -1), axis=1))),
            "area": float(np.mean([_area(one) for one in maps])),
            "noise_cosine": _mean(_cosine, maps, near),
            "noise_rank": _mean(_rank, maps, near),
            "other_digit": _mean(_rank, maps, elsewhere),
            "digit": _mean(_cosine, maps, x),
            "cosine": {other: _mean(_cosine, maps, array) for other, array in own.items() if other != rule},
            "rank": {other: _mean(_rank, maps, array) for other, array in own.items() if other != rule},
        }
    return figures


def _others(target: Array) -> list[int]:
    """For each digit the next one, round the circle, that the network takes for another class."""
    count = len(target)
    return [
        next((j % count for j in range(i + 1, i + count) if target[j % count] != target[i]), (i + 1) % count)
        for i in range(count)
    ]


def _mean(measure: Callable[[Array, Array], float | None], a: Array, b: Array) -> float | None:
    """Over the pairs that have the figure; None without any."""
    known = [value for one, two in zip(a, b, strict=True) if (value := measure(one, two)) is not None]
    return float(np.mean(known)) if known else None


def _rank(a: Array, b: Array) -> float | None:
    """Spearman's correlation of the magnitudes."""
    return likeness(a, b, 0).rank_absolute


def _cosine(a: Array, b: Array) -> float | None:
    one, two = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    sizes = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / sizes if sizes else None


def _area(attribution: Array) -> float:
    """The smallest share of the pixels that holds nine tenths of the magnitude: 0.9 of an even map."""
    strongest = np.sort(without_channels(attribution, 0)[1].ravel())[::-1]
    sums = np.cumsum(strongest)
    return float((np.searchsorted(sums, 0.9 * sums[-1]) + 1) / sums.size)


def _rounded(value: Any) -> Any:
    """Floats in five digits: more of them would only tell one machine from another."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- all of it ------------------------------------------------------------------------------------


def studies(plan: Plan, folder: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Every activation with every seed, in order, `jobs` at once."""
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        pending = [pool.submit(study, name, seed, plan, folder) for name in ACTIVATIONS for seed in plan.seeds]
        for future in pending:
            yield future.result()


def pictured(folder: Path) -> tuple[Array, dict[str, dict[str, Array]]]:
    """Digits [3, SIDE, SIDE], and their maps by activation and rule, of the networks of the first seed."""
    data = digits()
    x = np.stack([data.tested_x[data.tested_y == digit][0].numpy() for digit in PICTURED])
    maps = {
        name: {
            rule: Explainer(folder / f"{name}-0.onnx", method=rule, provider="cpu")(x, list(PICTURED)).attribution
            for rule in RULES
        }
        for name in ACTIVATIONS
    }
    return x[:, 0], maps


def main(arguments: list[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="networks at once; all cores by default")
    options = parser.parse_args(arguments)
    if options.check:
        return refresh(write=False)
    if not options.tables:
        plan = Plan()
        with tempfile.TemporaryDirectory() as folder:
            runs = []
            for run in studies(plan, Path(folder), options.jobs):
                runs.append(run)
                print(f"{run['activation']}, seed {run['seed']}: accuracy {run['accuracy']['scaled']:.3f}", flush=True)
            draw_maps(*pictured(Path(folder)))
        versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "scikit-learn", "torch")}
        said = {"plan": dataclasses.asdict(plan), "versions": versions}
        lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)  # a line each, so that a change is one in a diff
        write(RESULTS, f'{json.dumps(said)[:-1]}, "runs": [\n{lines}\n]}}\n'.encode())
    draw_chart()
    return refresh(write=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
