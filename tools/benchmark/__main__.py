"""The command behind `tools/bench`."""

from __future__ import annotations

import collections
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import onnxruntime

from benchmark import networks
from onnxgbp.errors import OnnxgbpError

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "tools" / "bench.json"
METHODS = ("guided", "deconvnet", "gradient")
PEERS = ("captum guided", "captum guided channels_last", "torch gradient")
PACKAGES = ("onnxgbp", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "captum", "openvino")

Row = dict[str, Any]


class Process:
    """A worker: what it measures, and what it has measured so far."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.name: str = task["kind"]
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(task)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes)
        self.load_s: float = self._answer()["load_s"]
        self.medians: list[float] = []
        self.least = self.least_cpu = float("inf")
        self.rss_mb = 0.0

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # it is a pipe
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"the process for '{self.name}' ended; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, times: int) -> None:
        assert self._process.stdin is not None  # it is a pipe
        self._process.stdin.write(f"{times}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.medians.append(statistics.median(answer["ms"]))
        self.least = min(self.least, *answer["ms"])
        self.least_cpu = min(self.least_cpu, *answer["cpu_ms"])
        self.rss_mb = answer["rss_mb"]

    def end(self) -> None:
        self._process.communicate()


def measure(tasks: Iterable[dict[str, Any]], rounds: int, runs: int) -> list[Process]:
    """Runs the tasks in turn, round by round, so that what else the machine does meets each of them alike."""
    processes = [Process(task) for task in tasks]
    try:
        for _ in range(rounds):
            for process in processes:
                process.run(runs)
    finally:
        for process in processes:
            process.end()
    return processes


def ratio(process: Process, forward: Process) -> float:
    """The median over the rounds of the time against the forward pass of the same round."""
    return statistics.median(a / b for a, b in zip(process.medians, forward.medians, strict=True))


def rows_of(processes: Sequence[Process], case: Row) -> Iterator[Row]:
    """A row for each process; the first is the forward pass."""
    forward = processes[0]
    for process in processes:
        yield {
            **case,
            "case": process.name,
            "median_ms": round(statistics.median(process.medians), 2),
            "least_ms": round(process.least, 2),
            "ratio": round(ratio(process, forward), 3),
            "least_ratio": round(process.least / forward.least, 3),
            "least_cpu_ms": round(process.least_cpu, 2),
            "cpu_ratio": round(process.least_cpu / forward.least_cpu, 3),
            "rss_mb": round(process.rss_mb),
            "rss_ratio": round(process.rss_mb / forward.rss_mb, 2),
            "load_s": round(process.load_s, 2),
        }


class Converted(NamedTuple):
    """What `onnxgbp convert` took: seconds, those of the processor, and its largest size in MB, all with its start."""

    seconds: float
    cpu_seconds: float
    rss_mb: float


def convert(source: Path, target: Path, *options: str) -> Converted:
    """Runs `onnxgbp convert` in a process of its own."""
    code = "import sys, time; from onnxgbp.cli import main; main(sys.argv[1:], standalone_mode=False); "
    code += "from benchmark.worker import peak_mb; print(time.process_time(), peak_mb())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    start = time.perf_counter()
    command = [sys.executable, "-c", code, "convert", str(source), "-o", str(target), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise click.ClickException(f"onnxgbp convert {source} failed")
    return Converted(time.perf_counter() - start, *map(float, done.stdout.splitlines()[-1].split()))


def agreement(files: Sequence[Path], size: int) -> float:
    """The cosine between the maps of two converted files, of one image."""
    image = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
    maps = []
    for file in files:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        maps.append(session.run(["attribution"], {"x": image})[0].ravel().astype(np.float64))
    return float(maps[0] @ maps[1] / np.sqrt((maps[0] @ maps[0]) * (maps[1] @ maps[1])))


def cpu_name() -> str:
    """As the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def about(provider: str, threads: int) -> Row:
    """What every row says of the machine."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"provider": provider, "threads": threads, "cpu": cpu_name(), "versions": versions, "date": today}


def task(kind: str, model: Path, name: str, batch: int, size: int, machine: Row) -> dict[str, Any]:
    """What a worker is told."""
    case = {"network": name, "batch": batch, "size": size}
    return {"kind": kind, "model": str(model), **case, "provider": machine["provider"], "threads": machine["threads"]}


def compare(name: str, batches: Sequence[int], folder: Path, machine: Row, rounds: int, runs: int) -> Iterator[Row]:
    """One network against every peer."""
    size, source = networks.NETWORKS[name].size, folder / f"{name}.onnx"
    networks.export(name, str(source))
    files = {method: folder / f"{name}.{method}.onnx" for method in METHODS}
    spent = {method: convert(source, file, "--method", method) for method, file in files.items()}
    portable = folder / f"{name}.portable.onnx"
    convert(source, portable, "--profile", "portable")
    facts: dict[str, Row] = {
        method: {
            "convert_s": round(spent[method].seconds, 2),
            "convert_mb": round(spent[method].rss_mb),
            "file_ratio": round(file.stat().st_size / source.stat().st_size, 4),
            "source_mb": round(source.stat().st_size / 2**20, 1),
        }
        for method, file in files.items()
    }
    facts["guided"]["cosine_of_profiles"] = agreement([files["guided"], portable], size)
    for batch in batches:
        tasks = [task("forward", source, name, batch, size, machine)]
        tasks += [task(method, file, name, batch, size, machine) for method, file in files.items()]
        tasks += [task(peer, source, name, batch, size, machine) for peer in PEERS]
        if machine["provider"] == "cpu" and importlib.util.find_spec("openvino"):
            tasks += [task("openvino forward", source, name, batch, size, machine)]
            tasks += [task("openvino guided", files["guided"], name, batch, size, machine)]
        case = {"network": name, "batch": batch, "size": size, **machine}
        for row in rows_of(measure(tasks, rounds, runs), case):
            yield row | facts.get(row["case"], {})


def converting(name: str, folder: Path, machine: Row, rounds: int) -> Iterator[Row]:
    """What `convert` itself takes: the least of the rounds."""
    source, target = folder / f"{name}.onnx", folder / f"{name}.guided.onnx"
    networks.export(name, str(source))
    spent = [convert(source, target) for _ in range(rounds)]
    size = source.stat().st_size
    row = {"network": name, "batch": 1, "size": networks.NETWORKS[name].size, "case": "convert", **machine}
    yield row | {
        "convert_s": round(min(one.seconds for one in spent), 2),
        "convert_cpu_s": round(min(one.cpu_seconds for one in spent), 2),
        "convert_mb": round(min(one.rss_mb for one in spent)),
        "convert_rss_ratio": round(min(one.rss_mb for one in spent) / (size / 2**20), 2),
        "file_ratio": round(target.stat().st_size / size, 4),
        "source_mb": round(size / 2**20, 1),
    }


def growth(name: str, folder: Path, machine: Row, rounds: int, runs: int) -> Iterator[Row]:
    """Guided against the forward pass, for batches of 1 to 32 and for images of 224 to 896 pixels."""
    for size, batches in ((224, (1, 2, 4, 8, 16, 32)), (448, (1,)), (672, (1,)), (896, (1,))):
        source, converted = folder / f"{name}.{size}.onnx", folder / f"{name}.{size}.guided.onnx"
        networks.export(name, str(source), size)
        convert(source, converted)
        for batch in batches:
            tasks = [task("forward", source, name, batch, size, machine)]
            tasks += [task("guided", converted, name, batch, size, machine)]
            case = {"network": name, "batch": batch, "size": size, "growth": True, **machine}
            yield from rows_of(measure(tasks, rounds, runs), case)


def many_targets(name: str, folder: Path, machine: Row, rounds: int, runs: int) -> Iterator[Row]:
    """Five classes of one image: over one forward pass, as a batch of five copies, and in five calls."""
    size, source, converted = networks.NETWORKS[name].size, folder / f"{name}.onnx", folder / f"{name}.input.onnx"
    networks.export(name, str(source))
    convert(source, converted, "--target", "input")
    several = folder / f"{name}.input5.onnx"
    convert(source, several, "--target", "input5")
    shared = task("5 targets over one forward pass", several, name, 1, size, machine) | {"targets": [[1, 2, 3, 4, 5]]}
    together = task("5 targets at once", converted, name, 5, size, machine) | {"targets": [1, 2, 3, 4, 5]}
    alone = task("1 target", converted, name, 1, size, machine) | {"targets": [1]}
    forward = task("forward", source, name, 1, size, machine)
    case = {"network": name, "batch": 1, "size": size, "targets": 5, **machine}
    yield from rows_of(measure([forward, shared, together, alone], rounds, runs), case)


def profile(model: Path, batch: int, size: int, threads: int, folder: Path) -> list[str]:
    """The time by operator, forward and gradient apart: the least of ten runs for each node."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)
    for _ in range(10):
        session.run(None, {"x": image})
    nodes: dict[str, tuple[str, float]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            side = "gradient" if event["name"].startswith("gradient") else "forward"
            operator = f"{event['args']['op_name']:<18}{side}"
            nodes[event["name"]] = (operator, min(event["dur"], nodes.get(event["name"], ("", 1e12))[1]))
    spent: collections.Counter[str] = collections.Counter()
    for operator, microseconds in nodes.values():
        spent[operator] += int(microseconds)
    counts = collections.Counter(operator for operator, _ in nodes.values())
    lines = [f"{microseconds / 1000:9.2f} ms {counts[o]:5d}  {o}" for o, microseconds in spent.most_common()]
    return [f"{sum(spent.values()) / 1000:9.2f} ms {len(nodes):5d}  all nodes", *lines]


def show(row: Row) -> None:
    if row["case"] == "convert":
        took = f"{row['convert_s']:6.2f} s, CPU {row['convert_cpu_s']:6.2f} s, {row['convert_mb']:5d} MB"
        print(f"{row['network']:<16} {took}, x the file {row['convert_rss_ratio']:5.2f}", flush=True)
        return
    what = f"{row['network']:<16} batch {row['batch']:<3} {row['size']:>4}px  {row['case']:<28}"
    wall = f"{row['median_ms']:9.1f} ms x {row['ratio']:5.2f}, least {row['least_ms']:9.1f} x {row['least_ratio']:5.2f}"
    print(f"{what}{wall}, CPU x {row['cpu_ratio']:5.2f}, {row['rss_mb']:5d} MB", flush=True)


def write(rows: list[Row], path: Path) -> None:
    """One row a line, so that a change is a diff of its line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


@click.command()
@click.option("--network", "names", multiple=True, type=click.Choice(list(networks.NETWORKS)), help="All by default.")
@click.option("--batch", "batches", multiple=True, type=int, help="1 and 8 by default, with CUDA 64 as well.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=int, default=os.cpu_count() or 1, show_default=True, help="The same for every process.")
@click.option("--rounds", type=int, default=7, show_default=True, help="How often each process has its turn.")
@click.option("--runs", type=int, default=5, show_default=True, help="Calls in each turn.")
@click.option("--profile", "profiling", is_flag=True, help="The time by operator instead, on the CPU.")
@click.option("--growth", "growing", is_flag=True, help="Batches of 1 to 32 and images of 224 to 896 pixels instead.")
@click.option("--targets", is_flag=True, help="Five targets of one image instead.")
@click.option("--convert", "converts", is_flag=True, help="The time and the memory of `onnxgbp convert` instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    names: Sequence[str],
    batches: Sequence[int],
    provider: str,
    threads: int,
    rounds: int,
    runs: int,
    profiling: bool,
    growing: bool,
    targets: bool,
    converts: bool,
    output: Path,
) -> None:
    """Measures converted files against the forward pass of their source, and against torch and Captum.

    Each runs in a process of its own with the same number of threads; the processes take turns. A row of the result
    replaces the one of the same case in the output file.
    """
    if provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise click.ClickException("no CUDA here: the installed ONNX Runtime has none; see the extra gpu")
    machine = about(provider, threads)
    names = names or list(networks.NETWORKS)
    batches = batches or ([1, 8, 64] if provider == "cuda" else [1, 8])
    rows: list[Row] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names:
            if profiling:
                source, converted = folder / f"{name}.onnx", folder / f"{name}.guided.onnx"
                networks.export(name, str(source))
                convert(source, converted)
                for batch in batches:
                    print(f"{name}, batch {batch}", flush=True)
                    print("\n".join(profile(converted, batch, networks.NETWORKS[name].size, threads, folder)))
                continue
            if growing:
                measured = growth(name, folder, machine, rounds, runs)
            elif converts:
                measured = converting(name, folder, machine, rounds)
            elif targets:
                measured = many_targets(name, folder, machine, rounds, runs)
            else:
                measured = compare(name, batches, folder, machine, rounds, runs)
            for row in measured:
                show(row)
                rows = [old for old in rows if _key(old) != _key(row)] + [row]
                write(sorted(rows, key=_key), output)
            for file in folder.iterdir():
                file.unlink()


def _key(row: Row) -> tuple[Any, ...]:
    kind = "growth" if row.get("growth") else "targets" if row.get("targets") else ""
    return row["provider"], kind, row["network"], row["size"], row["batch"], row["case"]


if __name__ == "__main__":
    try:
        main()
    except OnnxgbpError as error:
        sys.exit(str(error))
