"""Photos in, a folder of pictures, arrays and a manifest out: what `onnxgbp explain` does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxgbp.data import whole
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explainer import Explainer
from onnxgbp.explanation import Explanation
from onnxgbp.files import output_file, write
from onnxgbp.images import Preprocessing, in_type, photos_in, read
from onnxgbp.labels import labels_of
from onnxgbp.methods import sampling_text
from onnxgbp.model import METADATA
from onnxgbp.render import PERCENTILE, overlay, signed_picture
from onnxgbp.report import json_numbers

__all__ = [
    "DEFAULT_MODEL",
    "MANIFEST",
    "axes_of",
    "baseline_of",
    "explain_images",
    "make_folder",
    "options_of",
    "shown",
]


class _Say(Protocol):
    """Prints a line on stdout, or on stderr as an error."""

    def __call__(self, line: str, error: bool = False) -> None: ...


DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "models" / "squeezenet1_1.onnx"
MANIFEST = "manifest.json"
TOP = 5
_MANY = 5  # images from which on a progress bar is drawn


def explain_images(
    paths: Sequence[Path],
    out: Path,
    *,
    echo: Callable[[str], Any],
    target: int | str | None = None,
    method: str | None = None,
    output: str | None = None,
    unit: Any = None,
    seed: str | None = None,
    wrt: Sequence[str] = (),
    layer: str | None = None,
    rule: Sequence[str | tuple[str, str]] = (),
    activations: str | Sequence[str] | None = None,
    seed_scale: float | str = "auto",
    n_samples: int | None = None,
    stdevs: str | float | None = None,
    n_steps: int | None = None,
    baseline: str | float | None = None,
    random_seed: int | None = None,
    internal_batch_size: int | None = None,
    provider: str = "auto",
    **preprocessing: Any,
) -> list[Path]:
    """Explains each image and writes, for each, `<stem>.attribution.png`, `<stem>.overlay.png` and
    `<stem>.attribution.npy` (raw and signed, the shape of the model's input without the batch); last `manifest.json`,
    whose presence means that the folder is complete.

    Args:
        paths: the model, if the first ends in .onnx (else the bundled SqueezeNet); then images, or folders of them.
        out: the folder, made where it is missing.
        echo: called with each line for the user.
        target: the class to explain, by index or name; None for the strongest of each image.
        method: as for `Explainer`.
        output: as for `Explainer`.
        unit: as for `Explainer`; excludes a target.
        seed: as for `Explainer`.
        wrt: as for `Explainer`, but one tensor of the form [N, C, H, W].
        layer: as for `Explainer`.
        rule: as for `Explainer`.
        activations: as for `Explainer`.
        seed_scale: as for `Explainer`.
        n_samples: as for `Explainer`.
        stdevs: as for `Explainer`.
        n_steps: as for `Explainer`.
        baseline: a number, or where samples are read from as `data.batches` does: a photo, a folder of them, a .npy.
        random_seed: as for `Explainer`.
        internal_batch_size: as for `Explainer`.
        provider: as for `Explainer`.
        **preprocessing: size, crop, channels, scale, mean, std, layout, each overriding what the model's metadata says.

    Returns:
        The images that could not be explained: each was reported on stderr, the others are done.

    Raises:
        OnnxgbpError: no image, the model or an option cannot be used, or the folder cannot be written.
    """
    model, images = _model_and_images(paths)
    explainer = Explainer(
        model,
        method=method,
        provider=provider,
        output=output,
        unit=unit,
        seed=seed,
        wrt=wrt,
        layer=layer,
        rule=rule,
        activations=activations,
        seed_scale=seed_scale,
        n_samples=n_samples,
        stdevs=stdevs,
        n_steps=n_steps,
        baseline=baseline,
        random_seed=random_seed,
        internal_batch_size=internal_batch_size,
    )
    if len(explainer.inputs) != 1 or len(explainer.wrt) != 1:
        inputs = ", ".join(f"'{spec.name}'" for spec in explainer.inputs)
        raise OnnxgbpError(f"pictures are drawn for one image input; this one takes {inputs}: use onnxgbp.Explainer")
    prepared = Preprocessing.of(explainer.metadata, explainer.inputs[0], **preprocessing)
    explainer.check_target(target)
    start = baseline_of(explainer, **preprocessing)
    labels = labels_of(explainer.metadata)
    make_folder(out, images)

    echo(_headline(explainer))
    echo(f"input: {prepared}")
    sampled = sampling_text(explainer.options)
    if sampled:
        echo(", ".join(f"{name} {text}" for name, text in sampled.items()))
    if prepared.assumed:
        echo(f"the model does not say how to prepare an image; assumed {', '.join(prepared.assumed)}")
    entries: list[dict[str, Any]] = []
    failed: list[Path] = []
    with _progress(images, echo) as (steps, say):
        for path, stem in zip(steps, _stems(images), strict=True):
            try:
                photo = read(path)
                x = in_type(prepared.prepare(photo), explainer.inputs[0].dtype)[np.newaxis]
                result = explainer(x, target, baseline=start)
                entry, pictures, attribution = _explained(explainer, prepared, photo, x, result, labels)
            except OnnxgbpError as error:
                said = str(error)
                said = said if said.startswith(f"cannot read {path}") else f"{path}: {said}"
                say(f"Error: {said}", error=True)
                failed.append(path)
                entries.append({"file": str(path), "error": said})
                continue
            files = {kind: f"{stem}.{kind}.png" for kind in pictures} | {"array": f"{stem}.attribution.npy"}
            for kind, picture in pictures.items():
                with output_file(out / files[kind]) as aside:
                    picture.save(aside, "PNG")
            with output_file(out / files["array"]) as aside, aside.open("wb") as stream:
                np.save(stream, attribution, allow_pickle=False)
            entries.append({"file": str(path), **entry, "files": files, "error": None})
            for line in _lines(path, entries[-1]):
                say(line)
    manifest = {
        "onnxgbp": importlib.metadata.version("onnxgbp"),
        "model": str(model),
        "sha256": explainer.sha256,
        "provider": explainer.provider,
        "options": options_of(explainer),
        "preprocessing": prepared.to_dict(),
        "percentile": PERCENTILE,
        "images": entries,
    }
    text = json.dumps(json_numbers(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    write(out / MANIFEST, (text + "\n").encode())
    return failed


_NOT_OPTIONS = {METADATA + name for name in ("labels", "preprocessing", "sha256", "version")}


def options_of(explainer: Explainer) -> dict[str, str]:
    """What is explained, and by which rules, as the metadata has it."""
    return {
        key.removeprefix(METADATA): value
        for key, value in sorted(explainer.metadata.items())
        if key.startswith(METADATA) and key not in _NOT_OPTIONS
    }


def _model_and_images(paths: Sequence[Path]) -> tuple[Path, list[Path]]:
    given = bool(paths) and paths[0].suffix.lower() == ".onnx"
    model, *rest = paths if given else (DEFAULT_MODEL, *paths)
    images: list[Path] = []
    for path in rest:
        images += photos_in(path) if path.is_dir() else [path]
    if not images:
        raise OnnxgbpError("no image given: name at least one, or a folder of them")
    if not given and not model.is_file():
        script = Path(__file__).resolve().parent.parent / "tools" / "build_squeezenet.py"
        way_out = "build it with tools/build_squeezenet.py (tools/demo does so), or name a model"
        if not script.is_file():  # installed from a wheel
            way_out = "only a clone of the repository builds it; name a model"
        raise OnnxgbpError(
            f"the bundled network is not there: {way_out}: onnxgbp explain MODEL.onnx IMAGE... -o FOLDER"
        )
    return model, images


def baseline_of(explainer: Explainer, **preprocessing: Any) -> npt.NDArray[Any] | None:
    """The samples that a baseline names, prepared as the images are; None where it is a number or there is none."""
    given = explainer.options.get("baseline", 0)
    if given is None:
        raise OnnxgbpError(
            f"{explainer.methods[0]} needs baselines to draw from: name photos or a .npy with --baseline"
        )
    if not isinstance(given, str):
        return None
    return whole(given, explainer.inputs, explainer.metadata, **preprocessing)


def make_folder(out: Path, images: Sequence[Path]) -> None:
    """The folder, and nothing of an earlier run in it: its manifest would say that this one is complete.

    What that manifest lists goes with it, or pictures would stay that no manifest names; not so an image to explain.
    """
    kept = {path.resolve() for path in images}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in _listed_files(out / MANIFEST):
            if (out / name).resolve() not in kept:
                (out / name).unlink(missing_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise OnnxgbpError(f"cannot write {out}: {error.strerror or error}") from None
    with output_file(out / f"{MANIFEST}.tmp"):  # found out before the first image, not after it
        pass
    (out / f"{MANIFEST}.tmp").unlink(missing_ok=True)


def _listed_files(manifest: Path) -> list[str]:
    """The files of its folder that a manifest of ours lists; none where it is not ours."""
    try:
        said = json.loads(manifest.read_bytes())
        entries = said["channels" if "layer" in said else "images"]  # `neurons` writes the one, `explain` the other
        names = [str(name) for entry in entries for name in entry.get("files", {}).values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    return [name for name in names if Path(name).name == name]


def _stems(images: Sequence[Path]) -> list[str]:
    """A name for each image's files: its own stem, with a number where another image has it already."""
    taken: set[str] = set()
    own = {path.stem.casefold() for path in images}  # a number must not make another image's name
    stems = []
    for path in images:
        stem, count = path.stem, 1
        while stem.casefold() in taken or (count > 1 and stem.casefold() in own):
            count += 1
            stem = f"{path.stem}-{count}"
        taken.add(stem.casefold())  # some file systems hold Cat and cat to be one
        stems.append(stem)
    return stems


@contextlib.contextmanager
def _progress(images: list[Path], echo: Callable[[str], Any]) -> Iterator[tuple[Iterator[Path], _Say]]:
    """The images, and what to say lines with; where they are many and someone watches, with a bar.

    Lines are held back until the bar is done: they would break it.
    """

    def say(line: str, error: bool = False) -> None:
        if error:
            click.echo(line, err=True)
        else:
            echo(line)

    if len(images) < _MANY or not sys.stderr.isatty():
        yield iter(images), say
        return
    held: list[tuple[str, bool]] = []
    with click.progressbar(images, label="explaining", file=sys.stderr, show_pos=True) as bar:
        yield iter(bar), lambda line, error=False: held.append((line, error))
    for line, error in held:
        say(line, error)


def _explained(
    explainer: Explainer,
    prepared: Preprocessing,
    photo: Image.Image,
    x: npt.NDArray[Any],
    result: Explanation,
    labels: list[str],
) -> tuple[dict[str, Any], dict[str, Image.Image], npt.NDArray[Any]]:
    """What the manifest says of one image, its pictures, and the raw attribution without the batch axis."""
    attribution: npt.NDArray[Any] = result.attribution[0]
    layout, channels = axes_of(explainer, prepared, x.shape[1:], attribution.shape)
    signed = signed_picture(attribution, layout=layout, channels=channels)
    laid = overlay(attribution, prepared.cropped(photo), layout=layout)
    chosen = int(result.target[0])
    unit = explainer.metadata.get(METADATA + "unit")
    scores = result.scores[0] if result.scores.ndim > 1 else result.scores
    scores = np.ravel(scores) if scores.size == max(scores.shape, default=1) else np.empty(0)  # a map has no classes
    top = [
        {"class": int(index), "label": _label(labels, int(index)), "score": float(scores[index])}
        for index in np.argsort(-scores, kind="stable")[:TOP]
    ]
    entry = {
        "target": None if unit else chosen,
        "unit": unit,
        "label": None if unit else _label(labels, chosen),
        "score": None if unit or chosen >= len(scores) else float(scores[chosen]),
        "top": top,
        "clip": signed.clip,
        "overlay_clip": laid.clip,
        "warning": "; ".join(filter(None, (signed.warning, result.float16))) or None,
    }
    if result.completeness_gap is not None:
        entry["completeness_gap"] = float(result.completeness_gap[0])
    return entry, {"attribution": signed.image, "overlay": laid.image}, attribution


def axes_of(
    explainer: Explainer, prepared: Preprocessing, x: Sequence[int], attribution: Sequence[int]
) -> tuple[str, str]:
    """Layout and channels of a sample's attribution, from its shape and that of its input."""
    # A picture of integers is attributed to at its floats, which lie as its pixels do unless they were turned before.
    as_floats = METADATA + "attributed" in explainer.metadata and tuple(attribution) == tuple(x)
    own = explainer.wrt[0] == explainer.inputs[0].name or as_floats
    rows_columns = slice(-3, -1) if prepared.layout == "nhwc" else slice(-2, None)
    own = own and tuple(attribution[rows_columns]) == tuple(x[rows_columns])  # else it is the map of a layer
    return (prepared.layout, prepared.channels) if own else ("nchw", "")


def _label(labels: list[str], index: int) -> str | None:
    return labels[index] if 0 <= index < len(labels) else None


def _headline(explainer: Explainer) -> str:
    said = {key.removeprefix(METADATA): value for key, value in explainer.metadata.items()}
    unit = f" (unit {said['unit']})" if "unit" in said else ""
    layer = f" at '{said['layer']}'" if "layer" in said else ""
    behind = "".join(f"; {said[name]}" for name in ("stripped", "attributed") if name in said)
    rules = [rule for rule in json.loads(said["rules"]) if rule != f"*={said['method']}"]
    mixed = f", with {', '.join(rules)}" if rules else ""
    what = f"{said['method']}{mixed} of '{said['explained']}'{unit}{layer}"
    return f"{shown(explainer.name)}: {what} on {explainer.provider}{behind}"


def shown(name: str) -> str:
    """A path as short as it can be from here."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _lines(path: Path, entry: dict[str, Any]) -> Iterator[str]:
    yield str(path)
    for row in entry["top"]:
        yield f"  {row['score']:10.4g}  {row['class']} {row['label'] or ''}".rstrip()
    said = f"unit {entry['unit']}" if entry["unit"] else f"{entry['target']} {entry['label'] or ''}"
    yield f"  explained: {said}".rstrip()
    yield f"  clip: {entry['clip']:.4g} ({PERCENTILE:g}th percentile of |attribution|)"
    if "completeness_gap" in entry:
        yield f"  completeness gap: {entry['completeness_gap']:.4g}"
    if entry["warning"]:
        yield f"  warning: {entry['warning']}"
