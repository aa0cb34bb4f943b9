"""Coverage-guided fuzzing of model files: load, inspect, convert with both profiles; see target.py for what is judged.

    tools/test --fuzz-files MINUTES

Makes `.fuzz/env` with atheris, and in `.fuzz/seeds` the models to start from: the cases of the onnx wheel, each with
its result made one row of scores; exporters' files; the malformed ones of `tests/hostile.py`. What reaches new code is
kept in `.fuzz/corpus`, from which the next run goes on. Exit status 1 if there are findings, in `.fuzz/findings`: a
traceback and the model for each place where an exception came from, and the inputs of hangs and crashes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import hostile
import onnx
from environments import python_environment
from onnx import TensorProto, helper

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FUZZ = ROOT / ".fuzz"
CORPUS = ROOT / "tests" / "data" / "corpus"
CASES = 2  # of each operator: every process begins by running all seeds
SLOW_SEEDS = ("1,100", "500 folded", "Einsum")  # seconds each, and so are what is made of them
LARGEST_SEED = 1 << 16  # bytes: with larger ones it tries few
SLOW = 30  # seconds, of instrumented code, after which an input counts as a hang
MEMORY = 2048  # MB of resident memory, after which an input counts as a finding


def seeds() -> Iterator[bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow on purpose
        from onnx.backend.test.case.node import collect_testcases

        kinds: Counter[tuple[str, ...]] = Counter()
        for case in collect_testcases(None):
            kind = tuple(node.op_type for node in case.model.graph.node)
            kinds[kind] += 1
            if kinds[kind] <= CASES:
                yield _with_scores(case.model).SerializeToString()
    for path in sorted(CORPUS.glob("*.onnx")):
        yield path.read_bytes()
    for name, build in hostile.FILES.items():
        if not name.startswith(SLOW_SEEDS):
            yield build()


def _with_scores(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model whose first output is one row of scores, without which there is no class to explain."""
    kind = model.graph.output[0].type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.initializer.append(helper.make_tensor("one_row", TensorProto.INT64, [2], [1, -1]))
    changed.graph.node.append(helper.make_node("Reshape", [model.graph.output[0].name, "one_row"], ["scores"]))
    changed.graph.output.insert(0, helper.make_tensor_value_info("scores", kind, None))
    return changed


def write_seeds(folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for data in seeds():
        if len(data) <= LARGEST_SEED:
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return len(list(folder.iterdir()))


@click.command()
@click.argument("minutes", type=click.FloatRange(min=0, min_open=True))
def main(minutes: float) -> None:
    """Fuzzes for so many minutes, in one process; one that ends in a crash or a hang is followed by another."""
    python = python_environment(FUZZ / "env", ["atheris>=3,<4", "-e", str(ROOT)], ["3.13", "3.12", "3.11"])
    findings, corpus = FUZZ / "findings", FUZZ / "corpus"
    for folder in (findings, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    known = {path.name for path in findings.iterdir()}
    click.echo(f"{write_seeds(FUZZ / 'seeds')} seeds, {len(list(corpus.iterdir()))} inputs of earlier runs")
    end = time.monotonic() + 60 * minutes
    total, started = 0, 0
    while (left := end - time.monotonic()) > 0:
        started += 1
        options = [f"-max_total_time={int(left) + 1}", f"-timeout={SLOW}", f"-rss_limit_mb={MEMORY}"]
        options += [f"-artifact_prefix={findings}/", "-max_len=262144", "-print_final_stats=1", "-report_slow_units=10"]
        command = [str(python), str(HERE / "target.py"), str(findings), *options, str(corpus), str(FUZZ / "seeds")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=_environ()) as process:
            assert process.stderr is not None
            last, count = "", 0
            for line in process.stderr:
                if found := re.match(r"#(\d+)\s", line):
                    last, count = line.strip(), int(found[1])
                if re.match(r"#\d+\s+(INITED|pulse|DONE)|finding|==\d+==|SUMMARY|Traceback|\w*Error", line):
                    click.echo(line.rstrip())
        total += count
        click.echo(f"process {started}, exit {process.returncode}: {last}")
        if process.returncode and not count:
            raise click.ClickException("the fuzzer does not start")
    new = sorted(path.name for path in findings.iterdir() if path.name not in known)
    click.echo(f"{total} inputs, {len(list(corpus.iterdir()))} of them kept, {len(new)} findings: {', '.join(new)}")
    sys.exit(bool(new))


def _environ() -> dict[str, str]:
    """One thread each for numpy and onnx: address space is limited, and the machine may have other work."""
    ours = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ours


if __name__ == "__main__":
    main()
