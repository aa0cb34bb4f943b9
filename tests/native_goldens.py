"""Writes what the native program is compared with by ctest: python tests/native_goldens.py FOLDER.

FOLDER/model.onnx is the default network, converted with --target input. Each folder beside it is one photo and what the
Python package makes of it: photo.png or photo.ppm, target.txt (the class asked for, -1 for the strongest, and the class
explained), input.npy, attribution.npy and scores.npy (float32), picture.ppm.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import onnxgbp
from onnxgbp.explain import DEFAULT_MODEL
from onnxgbp.images import Preprocessing, read
from onnxgbp.render import signed_picture

PHOTO = DEFAULT_MODEL.parent / "photos" / "chelsea.png"


def photos() -> dict[str, tuple[str, Image.Image, int]]:
    """By name: the file's suffix, the photo, and the class to explain."""
    cat = read(PHOTO)
    clear = cat.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(cat.size))
    return {
        "strongest": (".png", cat, -1),
        "tabby": (".ppm", cat, 281),
        "enlarged": (".ppm", cat.resize((97, 61)), -1),
        "upright": (".ppm", cat.crop((100, 20, 231, 300)), -1),
        "sliver": (".ppm", cat.crop((0, 100, 451, 120)), -1),
        "transparent": (".png", clear, -1),
        "palette": (".png", cat.quantize(64), 285),
        "grey": (".ppm", cat.convert("L"), -1),
    }


def write_goldens(folder: Path) -> None:
    """Fills the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    onnxgbp.save(onnxgbp.convert(DEFAULT_MODEL, target="input"), folder / "model.onnx")
    explainer = onnxgbp.Explainer(folder / "model.onnx", provider="cpu")
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
    for name, (suffix, image, asked) in photos().items():
        case = folder / name
        case.mkdir(exist_ok=True)
        photo = case / f"photo{suffix}"
        image.save(photo)
        x = prepared.prepare(read(photo))
        result = explainer(x[np.newaxis], None if asked < 0 else asked)
        (case / "target.txt").write_text(f"{asked} {result.target[0]}\n")
        for kind, array in (("input", x), ("attribution", result.attribution[0]), ("scores", result.scores[0])):
            np.save(case / f"{kind}.npy", array)
        picture = signed_picture(result.attribution[0], layout=prepared.layout, channels=prepared.channels)
        picture.image.save(case / "picture.ppm")


if __name__ == "__main__":
    write_goldens(Path(sys.argv[1]))
