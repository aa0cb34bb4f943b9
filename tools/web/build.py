"""Fills `models/` next to the page: a classifier converted with each method, and the list that the page reads.

python tools/web/build.py [MODEL]      the bundled SqueezeNet by default; 0.4 s

Class names and preprocessing travel in the files themselves (`onnxgbp.labels`, `onnxgbp.preprocessing`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

import onnxgbp
from onnxgbp.convert import GradientGraph
from onnxgbp.explain import DEFAULT_MODEL
from onnxgbp.model import load

HERE = Path(__file__).resolve().parent
METHODS = ("gradient", "deconvnet", "guided")
SAMPLE = DEFAULT_MODEL.parent / "photos" / "chelsea.png"


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path), default=DEFAULT_MODEL)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "models", help="The folder to fill.")
def main(model: Path, out: Path) -> None:
    """Converts the model once for each method; models.json is written last."""
    try:
        graph = GradientGraph.build(load(model), target="input")
        out.mkdir(parents=True, exist_ok=True)
        entries = []
        for method in METHODS:
            file = f"{model.stem}.{method}.onnx"
            graph.save(out / file, method=method, profile="portable")
            entries.append({"file": file, "method": method})
    except onnxgbp.OnnxgbpError as error:
        raise click.ClickException(str(error)) from None
    shutil.copyfile(SAMPLE, out / SAMPLE.name)
    (out / "models.json").write_text(json.dumps({"models": entries, "sample": SAMPLE.name}, indent=2) + "\n")
    click.echo(f"{len(entries)} models in {click.format_filename(out)}")


if __name__ == "__main__":
    main()
