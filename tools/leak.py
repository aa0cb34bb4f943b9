"""The resident memory of this process, in MiB, while it does the same thing again and again.

tools/leak                         calls of an Explainer, conversions, and Explainers made and dropped
tools/leak --size 64 --calls 2000  less of it

A leak is a line that keeps rising: the first tenth of it shows what caches and the runtime's memory pools take, which
stays. The default network, whose last layer is averaged over the picture, takes pictures of any size once its own is
left free.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx

import onnxgbp

MODEL = Path(__file__).resolve().parent.parent / "models" / "squeezenet1_1.onnx"
POINTS = 10  # of a line, after the one at 0


def resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def line(what: str, count: int, once: Callable[[], object]) -> None:
    """Prints the memory at 0, a tenth, ... of the repetitions."""
    figures = []
    for i in range(count + 1):
        if i % max(count // POINTS, 1) == 0:
            gc.collect()
            figures.append(f"{i}: {resident():.1f}")
        if i < count:
            once()
    click.echo(f"{what}, MiB at {', '.join(figures)}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", default=224, show_default=True, help="Height and width of the picture, 32 at least.")
@click.option("--calls", default=10_000, show_default=True, help="How often an Explainer is called.")
@click.option("--conversions", default=200, show_default=True, help="How often the network is converted.")
@click.option("--explainers", default=200, show_default=True, help="How many Explainers are made and dropped.")
@click.option("--threads", default=None, type=int, help="Of ONNX Runtime.")
def main(size: int, calls: int, conversions: int, explainers: int, threads: int | None) -> None:
    """Prints how much memory is resident while the default network is explained again and again."""
    model = onnx.load(MODEL)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "HW"[axis - 2]
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    explainer = onnxgbp.Explainer(model, threads=threads)
    line(f"calls of an Explainer at {size} x {size}", calls, lambda: explainer(x))
    line("conversions", conversions, lambda: onnxgbp.convert(model))
    line("Explainers made, called and dropped", explainers, lambda: onnxgbp.Explainer(model, threads=threads)(x))


if __name__ == "__main__":
    main()
