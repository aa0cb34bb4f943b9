"""Photos or arrays in, a folder of pictures, arrays and a manifest out: what `onnxgbp explain` does."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxgbp.curves import require_plots
from onnxgbp.data import batches, checked_arrays, whole
from onnxgbp.drawing import Drawn, Form, Origin, draw_numbers, draw_picture
from onnxgbp.errors import OnnxgbpError, printable
from onnxgbp.explainer import Explainer
from onnxgbp.explanation import Explanation
from onnxgbp.files import MANIFEST, listed_files, output_file, write
from onnxgbp.findings import json_numbers
from onnxgbp.given import InputSpec
from onnxgbp.images import Preprocessing, in_type, photos_in, read
from onnxgbp.labels import labels_of
from onnxgbp.methods import find_method, sampling_options, sampling_text
from onnxgbp.model import METADATA
from onnxgbp.render import PERCENTILE

__all__ = [
    "DEFAULT_MODEL",
    "GRID",
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
GRID = "grid.png"
TOP = 5
_GRID_ROWS = 50  # images of a grid: more would be a picture that few programs open
_ARRAYS = frozenset({".npy", ".npz"})
_MANY = 5  # images from which on a progress bar is drawn


def explain_images(
    paths: Sequence[Path],
    out: Path,
    *,
    echo: Callable[[str], Any],
    target: int | str | None = None,
    method: str | None = None,
    methods: Sequence[str] = (),
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
    draw: str | None = None,
    vocab: Path | None = None,
    features: Path | None = None,
    reduce: str | None = None,
    **preprocessing: Any,
) -> list[str]:
    """Explains each image, or each sample of an array, and writes, for each, `<stem>.attribution.png`,
    `<stem>.overlay.png` of a photo, `<stem>.attribution.html` of a text, and `<stem>.attribution.npy` (raw and signed,
    the shape of the model's input without the batch); last `manifest.json`, whose presence means that the folder is
    complete. The stem of a sample is that of its file and its index.

    Of several methods each has its own, `<stem>.<method>.attribution.png` and so on, and pictures of all of them stand
    side by side in `grid.png`.

    Args:
        paths: the model, if the first ends in .onnx (else the bundled SqueezeNet); then images, folders of them, or
            .npy and .npz files laid out as for `data.batches`.
        out: the folder, made where it is missing.
        echo: called with each line for the user.
        target: the class to explain, by index or name; None for the strongest of each image.
        method: as for `Explainer`.
        methods: several, in the place of the one.
        output: as for `Explainer`.
        unit: as for `Explainer`; excludes a target.
        seed: as for `Explainer`.
        wrt: as for `Explainer`, but one tensor; of photos, one of the form [N, C, H, W].
        layer: as for `Explainer`.
        rule: as for `Explainer`.
        activations: as for `Explainer`.
        seed_scale: as for `Explainer`.
        n_samples: as for `Explainer`; of several methods those have it that take it, like the four below.
        stdevs: as for `Explainer`.
        n_steps: as for `Explainer`.
        baseline: a number, or where samples are read from as `data.batches` does: a photo, a folder of them, a .npy.
        random_seed: as for `Explainer`.
        internal_batch_size: as for `Explainer`.
        provider: as for `Explainer`.
        draw: how rows of numbers are drawn: signal or table; see `drawing.Form`.
        vocab: the file of the tokens; see `tokens.Vocabulary`.
        features: the file with the names of features or channels; see `labels.feature_names`.
        reduce: what a token's attribution is, over its embedding: sum or l2.
        **preprocessing: size, crop, channels, scale, mean, std, layout, each overriding what the model's metadata says.

    Returns:
        The images and samples that could not be explained: each was reported on stderr, the others are done.

    Raises:
        OnnxgbpError: no image, the model, an array or an option cannot be used, or the folder cannot be written.
    """
    model, given = _model_and_inputs(paths)
    if method is not None and methods:
        raise OnnxgbpError(f"method {method} and methods {','.join(methods)} are both given: leave one out")
    sampling = {"n_samples": n_samples, "stdevs": stdevs, "n_steps": n_steps, "baseline": baseline}
    sampling |= {"random_seed": random_seed, "internal_batch_size": internal_batch_size}
    explainers = _explainers(
        model,
        method,
        methods,
        layer,
        sampling,
        provider=provider,
        output=output,
        unit=unit,
        seed=seed,
        wrt=wrt,
        rule=rule,
        activations=activations,
        seed_scale=seed_scale,
    )
    explainer = explainers[0]
    names = tuple(methods) or explainer.methods
    several = bool(methods) or len(names) > 1
    photos, arrays = _told_apart(given)
    of_arrays: dict[str, Any] = {"draw": draw, "vocab": vocab, "features": features, "reduce": reduce}
    if foreign := [name for name, value in of_arrays.items() if value is not None and not arrays]:
        raise OnnxgbpError(f"--{foreign[0]} is for samples in a .npy or .npz, and only photos are given")
    if several or arrays:
        require_plots("pictures of arrays, and of several methods side by side,", "")
    forms = {path: _form(explainer, model, path, preprocessing, **of_arrays) for path in arrays}
    prepared = _prepared(explainer, photos, preprocessing)
    explainer.check_target(target)
    starts = [baseline_of(one, **preprocessing) for one in explainers]
    labels = labels_of(explainer.metadata)
    make_folder(out, given)

    for one in explainers:
        echo(_headline(one))
        sampled = sampling_text(one.options)
        if sampled:
            echo(", ".join(f"{name} {text}" for name, text in sampled.items()))
    for path, (form, count, _) in forms.items():
        echo(f"input: {path}, samples: {count}, each drawn as {form}")
    if photos and prepared is not None:
        echo(f"input: {prepared}")
        if prepared.assumed:
            echo(f"the model does not say how to prepare an image; assumed {', '.join(prepared.assumed)}")
    entries: list[dict[str, Any]] = []
    failed: list[str] = []
    rows: list[tuple[str, Image.Image | None, list[npt.NDArray[Any]]]] = []
    run = _Run(explainers, names, starts, target)
    samples = _samples(given, explainer, prepared, forms)
    with _progress(samples, len(photos) + sum(count for _, count, _ in forms.values()), echo) as (steps, say):
        for sample in steps:
            try:
                feeds, photo = sample.read()
                results = run(feeds)
                entry = _entry(explainer, next(iter(results.values()))[0], sample.row, labels)
                drawn = {
                    name: _drawn(explainer, prepared, sample, feeds, photo, attribution, _title(entry, name))
                    for name, (_, attribution) in results.items()
                }
            except OnnxgbpError as error:
                said = str(error)
                said = said if said.startswith(f"cannot read {sample.name}") else f"{sample.name}: {said}"
                say(f"Error: {said}", error=True)
                failed.append(sample.name)
                entries.append({"file": sample.name, "error": said})
                continue
            files: dict[str, str] = {}
            for name, (_, attribution) in results.items():
                part = f".{name.replace(':', '-')}" if several else ""
                files |= _written(out, sample, part, drawn[name], attribution)
            facts = {name: _facts(drawn[name], results[name][0], sample.row) for name in results}
            entry |= {"methods": facts} if several else next(iter(facts.values()))
            entries.append({"file": sample.name, **entry, "files": files, "error": None})
            maps = [one.map for one in drawn.values() if one.map is not None]
            if several and maps and len(rows) < _GRID_ROWS:
                rows.append((_row_label(entry), photo, maps))
            for line in _lines(sample.name, entry):
                say(line)
    manifest = {
        "onnxgbp": importlib.metadata.version("onnxgbp"),
        "model": str(model),
        "sha256": explainer.sha256,
        "provider": explainer.provider,
        "options": {key: value for one in reversed(explainers) for key, value in options_of(one).items()}
        | {"method": ",".join(names)},
        "preprocessing": prepared.to_dict() if prepared is not None else None,
        "percentile": PERCENTILE,
        "images": entries,
    }
    if rows:
        _write_grid(out / GRID, rows, names)
        manifest["files"] = {"grid": GRID}
        more = f", the first {len(rows)} of {len(entries)}" if len(rows) == _GRID_ROWS < len(entries) else ""
        echo(f"side by side: {out / GRID}{more}")
    text = json.dumps(json_numbers(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    write(out / MANIFEST, (text + "\n").encode())
    return failed


# --- what is explained ----------------------------------------------------------------------------

_Feeds: TypeAlias = "dict[str, npt.NDArray[Any]]"


@dataclasses.dataclass(frozen=True)
class _Sample:
    """name: for the user; stem: of its files; row: of the feeds; read: what gives those, and the photo where it is one,
    as the model sees it; form: how it is drawn, with the input that is; None of a photo.
    """

    name: str
    stem: str
    row: int
    read: Callable[[], tuple[_Feeds, Image.Image | None]]
    form: tuple[Form, InputSpec] | None


def _told_apart(given: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Photos, and arrays."""
    arrays = [path for path in given if path.suffix.lower() in _ARRAYS]
    return [path for path in given if path.suffix.lower() not in _ARRAYS], list(dict.fromkeys(arrays))


def _form(
    explainer: Explainer, model: Path, path: Path, preprocessing: Mapping[str, Any], **options: Any
) -> tuple[Form, int, InputSpec]:
    """How the samples of an array are drawn, how many there are, and of which input."""
    arrays, count = checked_arrays(path, explainer.inputs)
    if not count:
        raise OnnxgbpError(f"{path} holds no sample")
    origin = Origin.of(explainer, model)
    layout = preprocessing.get("layout")
    form = Form.of(origin, arrays[origin.input.name].shape[1:], explainer.metadata, layout=layout, **options)
    return form, count, origin.input


def _prepared(explainer: Explainer, photos: Sequence[Path], preprocessing: Mapping[str, Any]) -> Preprocessing | None:
    """How photos are prepared; None for arrays that are laid out as no photo is."""
    if photos and (len(explainer.inputs) != 1 or len(explainer.wrt) != 1):
        inputs = ", ".join(f"'{spec.name}'" for spec in explainer.inputs)
        raise OnnxgbpError(
            f"photos are for a model of one image input; this one takes {inputs}: give them as arrays in a .npz"
        )
    try:
        return Preprocessing.of(explainer.metadata, explainer.inputs[0], **preprocessing)
    except OnnxgbpError:
        if photos:
            raise
        return None


def _samples(
    given: Sequence[Path],
    explainer: Explainer,
    prepared: Preprocessing | None,
    forms: Mapping[Path, tuple[Form, int, InputSpec]],
) -> Iterator[_Sample]:
    """In the order in which they are given."""
    wanted = []
    for path in given:
        count = forms[path][1] if path in forms else 1
        digits = len(str(count - 1))
        wanted += [f"{path.stem}-{i:0{digits}d}" for i in range(count)] if path in forms else [path.stem]
    stems = iter(_stems(wanted))
    for path in given:
        if path not in forms:
            assert prepared is not None
            yield _Sample(str(path), next(stems), 0, partial(_photo, path, explainer.inputs[0], prepared), None)
            continue
        form, _, spec = forms[path]
        for batch in batches(path, explainer.inputs, explainer.metadata, batch=1):
            for row, name in enumerate(batch.names):
                yield _Sample(f"{path}[{name}]", next(stems), row, partial(_without_photo, batch.feeds), (form, spec))


def _photo(path: Path, spec: InputSpec, prepared: Preprocessing) -> tuple[_Feeds, Image.Image]:
    photo = read(path)
    return {spec.name: in_type(prepared.prepare(photo), spec.dtype)[np.newaxis]}, prepared.cropped(photo)


def _without_photo(feeds: _Feeds) -> tuple[_Feeds, None]:
    return feeds, None


# --- how it is explained --------------------------------------------------------------------------


def _explainers(
    model: Path,
    method: str | None,
    methods: Sequence[str],
    layer: str | None,
    sampling: Mapping[str, Any],
    **options: Any,
) -> list[Explainer]:
    """One for all methods that are a graph, and one for each that runs it at many points."""
    if not methods:
        return [Explainer(model, method=method, layer=layer, **sampling, **options)]
    if len(set(methods)) < len(methods):
        raise OnnxgbpError(f"a method is named twice: {', '.join(methods)}")
    graphs = [name for name in methods if find_method(name).sample is None]
    sampled = [name for name in methods if name not in graphs]
    taken = {name: sampling_options(name, {}).keys() for name in sampled}
    if foreign := [
        key for key, value in sampling.items() if value is not None and not any(key in own for own in taken.values())
    ]:
        sampling_options(methods[0], {foreign[0]: sampling[foreign[0]]})  # says what is wrong
    made = [Explainer(model, methods=graphs, layer=layer, **options)] if graphs else []
    layer = None if made else layer
    for name in sampled:
        own = {key: value for key, value in sampling.items() if key in taken[name]}
        made.append(Explainer(model, method=name, layer=layer, **own, **options))
    return made


class _Run:
    """Runs the explainers: for each method, in the order asked for, its explanation and its attribution [N, ...].

    A batch that the model fixes holds several samples, and is run once for all of them.
    """

    def __init__(
        self, explainers: Sequence[Explainer], names: Sequence[str], starts: Sequence[Any], target: int | str | None
    ) -> None:
        self._explainers, self._names, self._starts, self._target = explainers, names, starts, target
        self._last: tuple[_Feeds, dict[str, tuple[Explanation, npt.NDArray[Any]]]] | None = None

    def __call__(self, feeds: _Feeds) -> dict[str, tuple[Explanation, npt.NDArray[Any]]]:
        if self._last is None or self._last[0] is not feeds:
            found: dict[str, tuple[Explanation, npt.NDArray[Any]]] = {}
            for explainer, start in zip(self._explainers, self._starts, strict=True):
                result = explainer(feeds, self._target, baseline=start)
                maps = result.attribution if len(explainer.methods) > 1 else {explainer.methods[0]: result.attribution}
                found |= {name: (result, attribution) for name, attribution in maps.items()}
            self._last = feeds, {name: found[name] for name in self._names}
        return self._last[1]


_NOT_OPTIONS = {METADATA + name for name in ("labels", "preprocessing", "sha256", "version")}


def options_of(explainer: Explainer) -> dict[str, str]:
    """What is explained, and by which rules, as the metadata has it."""
    return {
        key.removeprefix(METADATA): value
        for key, value in sorted(explainer.metadata.items())
        if key.startswith(METADATA) and key not in _NOT_OPTIONS
    }


def _model_and_inputs(paths: Sequence[Path]) -> tuple[Path, list[Path]]:
    given = bool(paths) and paths[0].suffix.lower() == ".onnx"
    model, *rest = paths if given else (DEFAULT_MODEL, *paths)
    images: list[Path] = []
    for path in rest:
        images += photos_in(path) if path.is_dir() else [path]
    if not images:
        raise OnnxgbpError("no image given: name at least one, a folder of them, or a .npy or .npz")
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
    return whole(given, explainer.inputs, explainer.metadata, explainer.wrt[0], **preprocessing)


def make_folder(out: Path, images: Sequence[Path]) -> None:
    """The folder, and nothing of an earlier run in it: its manifest would say that this one is complete.

    What that manifest lists goes with it, or pictures would stay that no manifest names; not so an image to explain.
    """
    kept = {path.resolve() for path in images}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in listed_files(out):
            if (out / name).resolve() not in kept:
                (out / name).unlink(missing_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise OnnxgbpError(f"cannot write {out}: {error.strerror or error}") from None
    with output_file(out / f"{MANIFEST}.tmp"):  # found out before the first image, not after it
        pass
    (out / f"{MANIFEST}.tmp").unlink(missing_ok=True)


def _stems(wanted: Sequence[str]) -> list[str]:
    """A name for the files of each: the one it wants, with a number where another has it already."""
    taken: set[str] = set()
    own = {stem.casefold() for stem in wanted}  # a number must not make another one's name
    stems = []
    for name in wanted:
        stem, count = name, 1
        while stem.casefold() in taken or (count > 1 and stem.casefold() in own):
            count += 1
            stem = f"{name}-{count}"
        taken.add(stem.casefold())  # some file systems hold Cat and cat to be one
        stems.append(stem)
    return stems


@contextlib.contextmanager
def _progress(
    samples: Iterator[_Sample], count: int, echo: Callable[[str], Any]
) -> Iterator[tuple[Iterator[_Sample], _Say]]:
    """The samples, and what to say lines with; where they are many and someone watches, with a bar.

    Lines are held back until the bar is done: they would break it.
    """

    def say(line: str, error: bool = False) -> None:
        if error:
            click.echo(printable(line), err=True)
        else:
            echo(line)

    if count < _MANY or not sys.stderr.isatty():
        yield samples, say
        return
    held: list[tuple[str, bool]] = []
    with click.progressbar(samples, count, label="explaining", file=sys.stderr, show_pos=True) as bar:
        yield iter(bar), lambda line, error=False: held.append((line, error))
    for line, error in held:
        say(line, error)


# --- what is written ------------------------------------------------------------------------------


def _entry(explainer: Explainer, result: Explanation, row: int, labels: list[str]) -> dict[str, Any]:
    """What the manifest says of one sample, whatever the method."""
    chosen = int(result.target[row])
    unit = explainer.metadata.get(METADATA + "unit")
    scores = result.scores[row] if result.scores.ndim > 1 else result.scores
    scores = np.ravel(scores) if scores.size == max(scores.shape, default=1) else np.empty(0)  # a map has no classes
    top = [
        {"class": int(index), "label": _label(labels, int(index)), "score": float(scores[index])}
        for index in np.argsort(-scores, kind="stable")[:TOP]
    ]
    return {
        "target": None if unit else chosen,
        "unit": unit,
        "label": None if unit else _label(labels, chosen),
        "score": None if unit or chosen >= len(scores) else float(scores[chosen]),
        "top": top,
    }


def _drawn(
    explainer: Explainer,
    prepared: Preprocessing | None,
    sample: _Sample,
    feeds: _Feeds,
    photo: Image.Image | None,
    attributions: npt.NDArray[Any],
    title: str,
) -> Drawn:
    attribution = attributions[sample.row]
    if sample.form is not None and sample.form[0].kind != "picture":
        form, spec = sample.form
        return draw_numbers(attribution, feeds[spec.name][sample.row], form, title)
    spec = explainer.inputs[0] if sample.form is None else sample.form[1]
    layout, channels = "nchw", ""
    if prepared is not None:
        layout, channels = axes_of(explainer, prepared, feeds[spec.name].shape[1:], attribution.shape)
    return draw_picture(attribution, photo, layout, channels)


def _facts(drawn: Drawn, result: Explanation, row: int) -> dict[str, Any]:
    """What the manifest says of one map."""
    facts = {
        "clip": drawn.clip,
        "overlay_clip": drawn.overlay_clip,
        "warning": "; ".join(filter(None, (drawn.warning, result.float16))) or None,
    }
    if result.completeness_gap is not None:
        facts["completeness_gap"] = float(result.completeness_gap[row])
    return facts


def _written(out: Path, sample: _Sample, part: str, drawn: Drawn, attributions: npt.NDArray[Any]) -> dict[str, str]:
    """Writes what was drawn and the array; gives their names by kind, with the method's where it is part of them."""
    kind = f"{part[1:]}." if part else ""
    files = {kind + key: f"{sample.stem}{part}{suffix}" for key, (suffix, _) in drawn.files.items()}
    for key, (_, data) in drawn.files.items():
        write(out / files[kind + key], data)
    files[f"{kind}array"] = f"{sample.stem}{part}.attribution.npy"
    with output_file(out / files[f"{kind}array"]) as aside, aside.open("wb") as stream:
        np.save(stream, attributions[sample.row], allow_pickle=False)
    return files


def _write_grid(
    path: Path, rows: Sequence[tuple[str, Image.Image | None, list[npt.NDArray[Any]]]], names: Sequence[str]
) -> None:
    from onnxgbp.figures import Row, grid_figure  # matplotlib: only here

    plot = grid_figure([Row(*row) for row in rows], names)
    with output_file(path) as aside:
        plot.figure.savefig(aside, format="png", metadata={"Software": None})


def _called(entry: Mapping[str, Any]) -> str:
    if entry["unit"]:
        return f"unit {entry['unit']}"
    return f"{entry['label']} ({entry['target']})" if entry["label"] else f"class {entry['target']}"


def _title(entry: Mapping[str, Any], method: str) -> str:
    score = f", score {entry['score']:.3g}" if entry["score"] is not None else ""
    return f"{_called(entry)}{score}, {method}"


def _row_label(entry: Mapping[str, Any]) -> str:
    return _called(entry) + (f"\n{entry['score']:.3g}" if entry["score"] is not None else "")


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


def _lines(name: str, entry: dict[str, Any]) -> Iterator[str]:
    yield name
    for row in entry["top"]:
        yield f"  {row['score']:10.4g}  {row['class']} {row['label'] or ''}".rstrip()
    said = f"unit {entry['unit']}" if entry["unit"] else f"{entry['target']} {entry['label'] or ''}"
    yield f"  explained: {said}".rstrip()
    for method, facts in entry.get("methods", {"": entry}).items():
        before = f"{method}: " if method else ""
        yield f"  {before}clip: {facts['clip']:.4g} ({PERCENTILE:g}th percentile of |attribution|)"
        if "completeness_gap" in facts:
            yield f"  {before}completeness gap: {facts['completeness_gap']:.4g}"
        if facts["warning"]:
            yield f"  {before}warning: {facts['warning']}"
