"""A model, its maps and what the evaluations say of them, as one HTML file: what `onnxgbp report` does.

Everything is first made into plain values, part by part, and a part that is done is kept in a folder beside the file
until the file is there: so a run goes on where an earlier one ended. `page.py` makes the file of those values.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from onnxgbp.convert import GradientGraph
from onnxgbp.errors import OnnxgbpError
from onnxgbp.explain import axes_of
from onnxgbp.explainer import Explainer
from onnxgbp.explanation import Explanation
from onnxgbp.faithfulness import check_faithfulness
from onnxgbp.files import write
from onnxgbp.findings import json_numbers
from onnxgbp.health import model_health
from onnxgbp.images import Preprocessing, in_type, photos_in, read
from onnxgbp.inspection import inspect_model
from onnxgbp.installed import onnxruntime_module
from onnxgbp.labels import labels_of
from onnxgbp.metadata import refuse_converted
from onnxgbp.methods import find_method, parse_method, rule_of, sampling_options, split_methods
from onnxgbp.model import Source, load
from onnxgbp.render import PERCENTILE, diverging, signed_picture
from onnxgbp.sanity import check_sanity

try:
    from onnxgbp.page import render
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "jinja2":
        raise
    raise OnnxgbpError("a report is written with jinja2, which is missing: pip install 'onnxgbp[report]'") from None

__all__ = ["METHODS", "write_report"]

Array: TypeAlias = npt.NDArray[Any]

METHODS = (
    "gradient",
    "deconvnet",
    "guided",
    "input-x-gradient",
    "grad-cam",
    "guided-grad-cam",
    "smoothgrad",
    "integrated-gradients",
)
"""What is shown where nothing else is asked for, as far as the model admits it."""

_TOP = 5
_SIDE = 448  # pixels that a picture in the file has at most
_LEVELS = 31  # steps of colour on either side of zero: finer ones are not seen, and noise in them is most of the file
_PART = re.compile(r"\.?[0-9a-f]{64}\.json(\..*)?")  # and what a killed run left of one


def write_report(
    model: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    methods: str | Sequence[str] | None = None,
    target: int | str | None = None,
    output: str | None = None,
    limit: int = 100,
    evaluate: int = 5,
    random_seed: int = 0,
    provider: str = "auto",
    progress: Callable[[int, int, str], Any] | None = None,
    complain: Callable[[str], Any] | None = None,
    **preprocessing: Any,
) -> list[Path]:
    """Writes one HTML file that needs nothing else: the model and its audit, the maps of photos by several methods,
    the sanity checks, the faithfulness and the health. The same call gives the same bytes on the same machine.

    What is done is kept in the folder `<out>.parts` until the file is there, by a hash of the model, the options and
    the photos: the same call goes on where an earlier one ended, however it ended. A photo that cannot be explained is
    an entry with its error; an evaluation that the model does not admit says why.

    Args:
        model: a classifier of one image input, not yet converted.
        images: a folder of photos, or one photo.
        out: the file; one that is there is replaced when the new one is complete.
        methods: any that `explain` takes; None for those of METHODS that the model admits, the others named with the
            reason.
        target: the class whose maps are shown and whose gradient the health follows, by index or name; None for the
            strongest of each photo, which the other evaluations always take.
        output: the tensor to explain, as for `Explainer`.
        limit: show no more photos than this.
        evaluate: of so many photos the sanity and the faithfulness are measured; 0 leaves both out. The sanity checks
            leave out methods that run the model at many points.
        random_seed: of the evaluations, and of the noise of methods that draw some.
        provider: as for `Explainer`.
        progress: is told (steps done, of how many, what is done next).
        complain: is told in a line what could not be done.
        **preprocessing: size, crop, channels, scale, mean, std, layout, each overriding what the model's metadata says.

    Returns:
        The photos that could not be explained.

    Raises:
        OnnxgbpError: the model, the photos or an option cannot be used, none of the photos can be explained, the file
            cannot be written, or jinja2 is missing (the extra `report`).
    """
    if limit < 1 or evaluate < 0 or random_seed < 0:
        raise OnnxgbpError("limit must be 1 or more, evaluate and the random seed 0 or more")
    if not features.check("webp"):
        raise OnnxgbpError("the pictures of a report are WebP, which this Pillow was built without: install another")
    asked = METHODS if methods is None else tuple(parse_method(name) for name in split_methods(methods))
    source = load(model)
    refuse_converted(source)
    shown, unfit = _fitting(source, asked, output)
    if unfit and methods is not None:
        raise OnnxgbpError(next(iter(unfit.values())))
    photos = _photos(Path(images))
    maps = _Maps(model, shown, target, output, random_seed, provider, preprocessing)

    say = complain or _pass
    count = min(len(photos), limit)
    steps = _Steps(count + 1 + 2 * bool(evaluate), progress)
    parts = _Parts(Path(out), {"model": maps.sha256, "target": target, "output": output} | maps.facts)
    entries: list[dict[str, Any]] = []
    failed: list[Path] = []
    listed: list[list[str]] = []
    for path in photos[:count]:
        steps.next(path.name)
        try:
            data = _bytes(path)
            kept = parts.made({"photo": hashlib.sha256(data).hexdigest()}, functools.partial(maps.of, path, data))
            listed.append([path.name, hashlib.sha256(data).hexdigest()])
            entries.append({"file": path.name, "error": None} | kept)
        except _UnwrittenError:
            raise
        except OnnxgbpError as error:
            said = str(error).removeprefix(f"cannot read {path}: ")
            say(f"{path}: {said}")
            failed.append(path)
            entries.append({"file": path.name, "error": said})
    if not listed:
        parts.remove()
        raise OnnxgbpError(f"none of the photos of {images} can be explained: {failed[0].name}: {entries[0]['error']}")

    once = tuple(name for name in shown if find_method(name).sample is None)
    common: dict[str, Any] = {"output": output, **preprocessing}
    drawn: dict[str, Any] = {
        "limit": min(evaluate, len(listed)),
        "random_seed": random_seed,
        "provider": provider,
        **common,
    }
    drawn["on_error"] = _pass  # each was told above
    evaluations: dict[str, Callable[[], Any]] = {
        "health": functools.partial(model_health, model, images, target=target, limit=len(listed), **common)
    }
    if evaluate:
        evaluations["sanity"] = functools.partial(check_sanity, model, images, methods=once, **drawn)
        evaluations["faithfulness"] = functools.partial(
            check_faithfulness, model, images, methods=shown, noise_samples=0, **drawn
        )
    sections: dict[str, Any] = {"sanity": None, "faithfulness": None}
    for name, measure in evaluations.items():
        steps.next(name)
        facts: dict[str, Any] = {"evaluation": name, "of": [str(images), listed, list(map(str, failed))]}
        facts |= {} if name == "health" else {"evaluate": evaluate}
        try:
            if name == "sanity" and not once:
                raise OnnxgbpError("every method shown runs the model at many points; onnxgbp sanity measures them")
            sections[name] = parts.made(facts, functools.partial(_findings, measure))
        except _UnwrittenError:
            raise
        except OnnxgbpError as error:
            say(f"{name}: {error}")
            sections[name] = {"error": str(error)}
    steps.next("writing")
    page = render(
        {
            "onnxgbp": importlib.metadata.version("onnxgbp"),
            "images": str(images),
            "found": len(photos),
            "methods": _described(shown),
            "unfit": unfit,
            "sampled": [name for name in shown if name not in once],
            "target": target,
            "preprocessing": str(maps.prepared),
            "assumed": list(maps.prepared.assumed),
            "provider": maps.provider,
            "percentile": PERCENTILE,
            "scale": _encoded(diverging(np.linspace(-1, 1, 2 * _LEVELS + 1)[np.newaxis])),
            "audits": _audits(model, shown, output),
            "photos": entries,
            **sections,
        }
    )
    write(Path(out), page.encode("utf-8", "replace"))  # a file's name need not be text
    parts.remove()
    return failed


def _pass(_line: str) -> None:
    """For whom nothing is told."""


def _findings(measure: Callable[[], Any]) -> dict[str, Any]:
    found: dict[str, Any] = measure().to_dict()
    return found


class _Steps:
    """How far the work is."""

    def __init__(self, count: int, progress: Callable[[int, int, str], Any] | None) -> None:
        self._count, self._done, self._progress = count, 0, progress

    def next(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._count, what)
        self._done += 1


class _UnwrittenError(OnnxgbpError):
    """A part cannot be kept: the end of the run, not a fault of a photo."""


class _Parts:
    """What is done so far: a file of JSON for each part, named by all that it depends on."""

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        self._folder = out.with_name(f"{out.name}.parts")
        self._run = dict(run)
        try:
            if out.exists() and not out.is_file():
                raise OnnxgbpError(f"cannot write {out}: it is there already and no regular file")
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OnnxgbpError(f"cannot write {out}: {error.strerror or error}") from None

    def made(self, facts: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part, read where it is there already: either way as JSON gives it, so that both are the same."""
        text = json.dumps({**self._run, **facts}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError):
            kept: dict[str, Any] = json.loads(path.read_bytes())
            return kept
        text = json.dumps(json_numbers(make()), allow_nan=False)
        try:
            write(path, text.encode())
        except OnnxgbpError as error:
            raise _UnwrittenError(str(error)) from None
        made: dict[str, Any] = json.loads(text)
        return made

    def remove(self) -> None:
        """Of all runs of this file; whatever else was put there stays."""
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if _PART.fullmatch(path.name):
                    path.unlink()
            self._folder.rmdir()


def _fitting(source: Source, methods: Sequence[str], output: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The methods that the model admits; why it does not admit the others, which look for a layer and find none."""
    unfit = dict[str, str]()
    for name in methods:
        if find_method(name).layer:
            try:
                GradientGraph.build(source, target="input", output=output, methods=(name,))
            except OnnxgbpError as error:
                unfit[name] = f"{name}: {error}"
    return tuple(name for name in methods if name not in unfit), unfit


def _photos(images: Path) -> list[Path]:
    if images.suffix.lower() in (".npy", ".npz"):
        raise OnnxgbpError(f"a report shows photos, and {images} holds arrays: give a folder of photos")
    if not images.exists():
        raise OnnxgbpError(f"cannot read {images}: no such file or folder")
    return photos_in(images) if images.is_dir() else [images]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OnnxgbpError(f"cannot read {path}: {error.strerror or error}") from None


class _Maps:
    """The sessions, and the maps of a photo: the methods that one graph holds share a session and its forward pass."""

    def __init__(
        self,
        model: str | Path,
        methods: Sequence[str],
        target: int | str | None,
        output: str | None,
        random_seed: int,
        provider: str,
        preprocessing: Mapping[str, Any],
    ) -> None:
        together = tuple(name for name in methods if find_method(name).sample is None)
        groups = [together] * bool(together) + [(name,) for name in methods if name not in together]
        self._methods, self._target = methods, target
        self._explainers: list[Explainer] = []
        for group in groups:
            options = sampling_options(group[0], {})
            if options.get("baseline", 0) is None:
                raise OnnxgbpError(f"{group[0]} needs photos as baselines, which a report does not take: leave it out")
            given: dict[str, Any] = {"methods": group} if len(group) > 1 else {"method": group[0]}
            given |= {"random_seed": random_seed} if "random_seed" in options else {}
            explainer = Explainer(model, output=output, provider=provider, **given)
            self._explainers.append(explainer)
        first = self._explainers[0]
        if len(first.inputs) != 1 or len(first.wrt) != 1:
            inputs = ", ".join(f"'{spec.name}'" for spec in first.inputs)
            raise OnnxgbpError(f"a report shows maps of one image input; this model takes {inputs}")
        self._spec = first.inputs[0]
        self.prepared = Preprocessing.of(first.metadata, self._spec, **preprocessing)
        first.check_target(target)
        self._labels = labels_of(first.metadata)
        self.sha256, self.provider = first.sha256, first.provider
        self.facts = {
            "methods": list(methods),
            "preprocessing": self.prepared.to_dict(),
            "provider": self.provider,
            "random seed": random_seed,
            **{name: importlib.metadata.version(name) for name in ("onnxgbp", "numpy", "Pillow")},
            "onnxruntime": onnxruntime_module().__version__,
        }
        """All that a part depends on but the photos."""

    def of(self, path: Path, data: bytes) -> dict[str, Any]:
        """What the page shows of a photo."""
        photo = read(path, data)
        x = in_type(self.prepared.prepare(photo), self._spec.dtype)[np.newaxis]
        size = self._spec.shape[0] if self._spec.shape else 1
        x = np.repeat(x, size if isinstance(size, int) and size > 0 else 1, axis=0)
        maps = dict[str, dict[str, Any]]()
        first: Explanation | None = None
        for explainer in self._explainers:
            result = explainer(x, self._target if first is None else first.target)
            first = result if first is None else first
            several = len(explainer.methods) > 1
            for name in explainer.methods:
                attribution = (result.attribution[name] if several else result.attribution)[0]
                layout, _ = axes_of(explainer, self.prepared, x.shape[1:], attribution.shape)
                maps[name] = {"method": name} | _drawn(attribution, layout, result.float16)
        assert first is not None
        chosen = int(first.target[0])
        cropped = self.prepared.cropped(photo)
        cropped.thumbnail((_SIDE, _SIDE))
        return {
            "picture": _encoded(cropped, quality=88),
            "size": cropped.size,
            "target": chosen,
            "label": self._label(chosen),
            "top": list(self._top(first.scores)),
            "maps": [maps[name] for name in self._methods],
        }

    def _top(self, scores: Array) -> Iterator[dict[str, Any]]:
        row = scores[0] if scores.ndim > 1 else scores
        row = np.ravel(row) if row.size == max(row.shape, default=1) else np.empty(0)  # a map has no classes
        share = bool(row.size and row.min() >= 0 and row.max() <= 1)
        for index in np.argsort(-row, kind="stable")[:_TOP]:
            yield {"class": int(index), "label": self._label(int(index)), "score": float(row[index]), "share": share}

    def _label(self, index: int) -> str | None:
        return self._labels[index] if 0 <= index < len(self._labels) else None


def _drawn(attribution: Array, layout: str, warning: str) -> dict[str, Any]:
    """The sum over the channels in blue, white and red, on a scale that is symmetric about zero."""
    with np.errstate(invalid="ignore"):
        total = np.asarray(attribution, np.float64).sum(axis=2 if layout == "nhwc" else 0)
    if max(total.shape) > _SIDE:  # means of blocks
        share = _SIDE / max(total.shape)
        size = [max(1, round(side * share)) for side in total.shape[::-1]]
        total = np.asarray(Image.fromarray(total.astype(np.float32)).resize((size[0], size[1]), Image.Resampling.BOX))
    picture = signed_picture(total[np.newaxis], channels="")
    values = np.clip(np.nan_to_num(total, posinf=0, neginf=0) / (picture.clip or 1), -1, 1)
    image = diverging(np.rint(values * _LEVELS) / _LEVELS)
    said = "; ".join(filter(None, (picture.warning, warning)))
    return {"picture": _encoded(image), "size": image.size, "clip": picture.clip, "warning": said or None}


def _encoded(image: Image.Image, quality: int | None = None) -> str:
    """As a data URI; without a quality every pixel is kept."""
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    image.save(stream, "WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _described(methods: Sequence[str]) -> list[dict[str, str]]:
    """Each method with the rule that it is over."""
    return [{"name": name, "rule": rule_of(name)} for name in methods]


def _audits(model: str | Path, methods: Sequence[str], output: str | None) -> dict[str, dict[str, Any]]:
    """What `inspect` says under each rule."""
    rules = dict.fromkeys(rule_of(name) for name in methods)
    return {rule: json_numbers(inspect_model(model, method=rule, output=output).to_dict()) for rule in rules}
