"""onnxruntime-training as a second opinion on gradient, deconvnet and guided backpropagation.

    tools/test --training

Makes `.exporters/training/` with the packages pinned below and lets native.py build that package's own gradient graph
of each net there, with our rules in the place of its `ReluGrad`, run by its own kernels. Compares with the maps of our
converted files in stock ONNX Runtime, sample by sample, and so the files that `convert --builder ort-training` makes
there. Writes `tests/training.json`, one row per net, and its graphs of the small nets for tests/test_training.py.

A row's status is `ok`, `wrong: ...` (the only one that fails the suite), `not taken: ...` with its error (it has no
gradient for many operators), or `its own fault: ...` where it is known to be silently wrong (KNOWN). `builder` says the
same of the converted file, in which such faults are none: its private operators are spelled by our tables.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from checking import Array, cosine, ort_run
from environments import NotInstalledError, python_environment
from light import LIGHT, light
from small import SMALL, small

import onnxgbp
from onnxgbp.compare import extract
from onnxgbp.model import raised, to_proto

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE.parent / "training.json"
CORPUS, RECORDED = (HERE.parent / "data" / folder for folder in ("corpus", "training"))
METHODS = ("gradient", "deconvnet", "guided")
LOWEST_COSINE = 0.999
LARGEST_SCALE_ERROR = 1e-2  # a cosine does not see a factor
OLDEST_OPSET = 13  # below, it writes operators that the opset has not
NEWEST_IR = 10  # that onnxruntime-training 1.19.2 reads

PYTHONS = ("3.10", "3.11", "3.12")
REQUIREMENTS = (
    "-e",
    f"{ROOT}[training-cpu]",
    "onnxruntime-training-cpu==1.19.2",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "numpy==1.26.4",
)

# What the other side gets wrong without a word. Ours is held against finite differences by `onnxgbp verify`.
KNOWN = {
    "small_auto_pad": "its ConvGrad does not know auto_pad",
    "small_dropout": "its DropoutGrad scales as if it trained",
    "small_average_3d": "its AveragePoolGrad does not know a third axis",
}


def without_lrn(name: str) -> onnx.ModelProto:
    """One of the wheel's, with its normalisation left out: the other side has no gradient for it."""
    model = light(name, dynamic=True)
    for node in model.graph.node:
        if node.op_type == "LRN":
            node.op_type = "Identity"
            node.ClearField("attribute")
    return model


def nets() -> Iterator[tuple[str, Callable[[], onnx.ModelProto], dict[str, Array] | None]]:
    """Name, model, and what to feed where it is given."""
    rows = {row["onnx"]: row for row in json.loads((CORPUS / "manifest.json").read_text())}
    for name in SMALL:
        yield name, lambda name=name: small(name), None
    for file, row in sorted(rows.items()):
        arrays = np.load(CORPUS / row["npz"])
        feeds = {name: arrays[key] for name, (key, _) in row["feeds"].items()}
        yield Path(file).stem, lambda file=file: onnx.load(CORPUS / file), feeds
    yield "squeezenet1_1", lambda: onnx.load(ROOT / "models" / "squeezenet1_1.onnx"), None
    for name in LIGHT:
        yield name, lambda name=name: light(name, dynamic=True), None
    for name in ("bvlc_alexnet", "inception_v1", "zfnet512"):
        yield f"{name}_without_lrn", lambda name=name: without_lrn(name), None


def prepare(folder: Path, name: str, source: onnx.ModelProto, feeds: dict[str, Array] | None) -> dict[str, Array]:
    """Writes what native.py reads, and gives our own maps, by method."""
    read = onnxgbp.load(source)
    opset = read.model.graph.opset_imports[""]
    graph = onnxgbp.GradientGraph.build(read if opset >= OLDEST_OPSET else raised(read, OLDEST_OPSET), target="input")
    (wrt,) = json.loads(graph.options["wrt"])
    explained = graph.explained.tensor
    proto = to_proto(graph.source.model, graph.source)
    dims = [dim.dim_value for dim in next(v for v in proto.graph.input if v.name == wrt).type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal([dim or 2 for dim in dims]).astype(np.float32)
    feeds = feeds or {wrt: x}
    plain = all(activation.spelled == "Relu" for activation in graph.found)
    methods = METHODS if plain else METHODS[:1]  # its other activations are no ReluGrad that a rule could replace
    target = np.arange(len(feeds[wrt]), dtype=np.int64) % 3
    results = {
        method: ort_run(graph.render(method=method), {**feeds, "target": target})["attribution"] for method in methods
    }
    types = {explained.name or "": int(explained.dtype or 1)}
    cut = extract(proto, types, [explained.name or ""])
    cut.ir_version = min(cut.ir_version, NEWEST_IR)
    for i, node in enumerate(cut.graph.node):
        node.name = f"n{i}"
        if node.op_type == "Dropout" and name not in KNOWN:  # small_dropout shows what it makes of one
            node.op_type = "Identity"
            node.ClearField("attribute")
            del node.input[1:], node.output[1:]
    for value in cut.graph.input:  # its AveragePoolGrad knows no other shape than a static one
        if value.name in feeds:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, feeds[value.name].shape))
    scores = ort_run(cut, feeds)[explained.name or ""]
    for value in cut.graph.output:
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, types[value.name], scores.shape))
    seed = np.zeros_like(scores).reshape(len(scores), -1)
    seed[np.arange(len(seed)), target] = 1
    onnx.save(cut, folder / f"{name}.onnx")
    given = {f"x_{key}": array for key, array in feeds.items()}
    np.savez(folder / f"{name}.npz", seed=seed.reshape(scores.shape), target=target, methods=np.array(methods), **given)
    return results


def compare(name: str, ours: dict[str, Array], folder: Path) -> dict[str, Any]:
    """The figures of one net, and its status."""
    if (folder / f"{name}.txt").exists():
        return {"status": f"not taken: {(folder / f'{name}.txt').read_text()}"}
    theirs = np.load(folder / f"{name}.out.npz")
    row = {f"{method}_cosine": round(_lowest(have, theirs[method]), 6) for method, have in ours.items()}
    faults = _faults(ours, theirs)
    if name in KNOWN:
        return row | {"status": f"its own fault: {KNOWN[name]}" if faults else "wrong: it is right here after all"}
    return row | {"status": f"wrong: {'; '.join(faults)}" if faults else "ok"}


def built(name: str, ours: dict[str, Array], folder: Path) -> str:
    """The status of the file that `convert --builder ort-training` made, run in stock ONNX Runtime."""
    if (folder / f"{name}.built.txt").exists():
        return f"not taken: {(folder / f'{name}.built.txt').read_text()}"
    if not (folder / f"{name}.built").exists():
        return "not taken: the training build crashed before"
    model, arrays = onnx.load(folder / f"{name}.built"), np.load(folder / f"{name}.npz")
    feeds = {key[2:]: arrays[key] for key in arrays if key.startswith("x_")}
    found = ort_run(model, {**feeds, "target": arrays["target"]})
    single = len(ours) == 1
    faults = _faults(ours, {method: found["attribution" if single else f"attribution_{method}"] for method in ours})
    return f"wrong: {'; '.join(faults)}" if faults else "ok"


def _lowest(have: Array, want: Array) -> float:
    return min(cosine(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(have, want, strict=True))


def _faults(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> list[str]:
    faults = []
    for method, have in ours.items():
        norms = [[max(float(np.linalg.norm(a)), 1e-30) for a in maps] for maps in (have, theirs[method])]
        lowest = _lowest(have, theirs[method])
        off = max(abs(a / b - 1) for a, b in zip(*norms, strict=True))
        if not (lowest >= LOWEST_COSINE and off <= LARGEST_SCALE_ERROR):
            faults.append(f"the {method} has cosine {lowest:.4f} and is off by {off:.1%} in size")
    return faults


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Compares each net (or those named), prints a table, and writes tests/training.json."""
    try:
        python = python_environment(ROOT / ".exporters" / "training", REQUIREMENTS, PYTHONS)
    except NotInstalledError as reason:
        raise click.ClickException(f"not installed: {reason}") from None
    rows = {row["net"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    failed, every = False, list(nets())
    for name, make, feeds in every:
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            ours = prepare(folder, name, make(), feeds)
            done = subprocess.run([str(python), str(HERE / "native.py"), str(folder)], capture_output=True, text=True)
            if done.returncode < 0:
                (folder / f"{name}.txt").write_text(f"the training build crashes (signal {-done.returncode})")
            elif done.returncode:
                raise click.ClickException((done.stderr.strip().splitlines() or ["native.py failed"])[-1])
            row = {"net": name} | compare(name, ours, folder) | {"builder": built(name, ours, folder)}
            if (folder / f"{name}.native").exists():
                RECORDED.mkdir(exist_ok=True)
                shutil.copy(folder / f"{name}.native", RECORDED / f"{name}.onnx")
        rows[name] = row
        failed |= row["status"].startswith("wrong") or row["builder"].startswith("wrong")
        figures = [f"{row.get(f'{method}_cosine', ''):<9}" for method in METHODS]
        click.echo("  ".join((f"{name:<40}", *figures, row["status"], f"builder {row['builder']}")))
        written = [json.dumps(rows[known]) for known, *_ in every if known in rows]  # each is as it was last compared
        RESULTS.write_text("[\n" + ",\n".join(written) + "\n]\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
