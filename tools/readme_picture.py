"""Makes docs/chelsea.png, the picture of the README: the photo, then each method's attribution of its class.

Run `python tools/build_squeezenet.py` first. Prints the class, its score and the clip of each picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import onnxgbp
from onnxgbp.images import Preprocessing, read
from onnxgbp.render import signed_picture

ROOT = Path(__file__).resolve().parent.parent
GAP, CAPTION = 12, 26  # pixels


def main() -> None:
    photo = read(ROOT / "models/photos/chelsea.png")
    tiles: list[tuple[str, Image.Image]] = []
    for method in ("gradient", "deconvnet", "guided"):
        explainer = onnxgbp.Explainer(ROOT / "models/squeezenet1_1.onnx", method=method)
        prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0])
        result = explainer(prepared.prepare(photo)[np.newaxis])
        name = json.loads(explainer.metadata["onnxgbp.labels"])[result.target[0]]
        if not tiles:
            tiles.append((f"{name}, {result.scores[0].max():.2f}", prepared.cropped(photo)))
        assert not isinstance(result.attribution, dict)  # the network has one input
        picture = signed_picture(result.attribution[0], channels=prepared.channels, layout=prepared.layout)
        tiles.append((method, picture.image))
        print(f"{method}: {name}, clip {picture.clip:.4g}")
    side = tiles[0][1].width
    sheet = Image.new("RGB", (len(tiles) * (side + GAP) - GAP, side + CAPTION), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for position, (caption, tile) in enumerate(tiles):
        sheet.paste(tile, (position * (side + GAP), CAPTION))
        draw.text((position * (side + GAP), 2), caption, fill="black", font=font)
    (ROOT / "docs").mkdir(exist_ok=True)
    sheet.save(ROOT / "docs/chelsea.png", optimize=True)


if __name__ == "__main__":
    main()
