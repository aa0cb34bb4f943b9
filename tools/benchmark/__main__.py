"""The command behind `tools/bench`."""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import onnxruntime
from environments import NotInstalledError

from benchmark import networks
from benchmark.peers import PEERS, ROOT, Peer
from benchmark.worker import versions
from onnxgbp.errors import OnnxgbpError

RESULTS = ROOT / "tools" / "bench.json"
METHODS = ("guided", "deconvnet", "gradient")
PATIENCE = 300  # seconds for a file to be built or loaded, or for a turn
LEAST_ROUNDS = 3
PEER_CASES = frozenset(case for peer in PEERS.values() for case in peer.cases)

Row = dict[str, Any]


class Limits(NamedTuple):
    """How long is measured: rounds, calls in each turn, and the seconds for one network and batch.

    When they are spent no round is begun, but at least LEAST_ROUNDS; a turn ends after its share of them.
    """

    rounds: int
    runs: int
    seconds: float


class Process:
    """A worker: what it measures, and what it has measured so far. error: why it can measure no more, or nothing."""

    def __init__(self, task: dict[str, Any], python: str = sys.executable) -> None:
        self.name: str = task["kind"]
        self.error = ""
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 end() closes it
        command = [python, str(Path(__file__).with_name("worker.py")), json.dumps(task)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, **pipes)
        self.load_s, self.versions = 0.0, dict[str, str]()
        self.medians: list[float] = []
        self.least = self.least_cpu = float("inf")
        self.rss_mb = 0.0
        if ready := self._answer():
            self.load_s, self.versions = ready["load_s"], ready["versions"]

    def _answer(self) -> dict[str, Any] | None:
        """The next line; none where there is an error instead."""
        assert self._process.stdout is not None  # it is a pipe
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self._process.kill()
            self.error = f"no answer within {PATIENCE} s"
            return None
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self._process.wait()
        self._errors.seek(0)
        self.error = last_words(self._errors.read(), status)
        return None

    def run(self, times: int, seconds: float) -> None:
        """One turn; nothing where there was an error before."""
        if self.error:
            return
        assert self._process.stdin is not None  # it is a pipe
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer either
            self._process.stdin.write(f"{times} {seconds}\n")
            self._process.stdin.flush()
        if answer := self._answer():
            self.medians.append(statistics.median(answer["ms"]))
            self.least = min(self.least, *answer["ms"])
            self.least_cpu = min(self.least_cpu, *answer["cpu_ms"])
            self.rss_mb = answer["rss_mb"]

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


def last_words(errors: str, status: int) -> str:
    """Why a process ended, from its stderr and its status."""
    if status < 0:
        return f"it crashes ({signal.Signals(-status).name})"
    said = [line for line in errors.splitlines() if line.strip()]
    return said[-1].strip()[:200] if said else f"it ends with status {status}"


def measure(tasks: Sequence[tuple[dict[str, Any], str]], limits: Limits) -> list[Process]:
    """Runs the tasks in turn, round by round, so that what else the machine does meets each of them alike.

    tasks: each with the Python that runs it.
    """
    processes = list[Process]()
    try:
        for task, python in tasks:
            processes.append(Process(task, python))
        share = limits.seconds / limits.rounds / len(processes)
        end = time.perf_counter() + limits.seconds
        for done in range(limits.rounds):
            if done >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for process in processes:
                process.run(limits.runs, share)
    finally:
        for process in processes:
            process.end()
    return processes


def ratio(process: Process, forward: Process) -> float:
    """The median over the rounds of the time against the forward pass of the same round."""
    return statistics.median(a / b for a, b in zip(process.medians, forward.medians, strict=True))


def rows_of(processes: Sequence[Process], case: Row) -> Iterator[Row]:
    """A row for each process; the first is the forward pass. One of a peer may hold nothing but why there is none."""
    forward = processes[0]
    for process in processes:
        row = {**case, "versions": process.versions, "case": process.name}
        if process.error and process.name in PEER_CASES:
            yield row | {"error": process.error}
            continue
        if process.error:
            raise click.ClickException(f"the process for '{process.name}' ended: {process.error}")
        yield {
            **row,
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
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"provider": provider, "threads": threads, "cpu": cpu_name(), "date": today}


def task(kind: str, model: Path, name: str, batch: int, size: int, machine: Row) -> dict[str, Any]:
    """What a worker is told."""
    case = {"network": name, "batch": batch, "size": size, "memory_plan": kind == "forward"}
    return {"kind": kind, "model": str(model), **case, "provider": machine["provider"], "threads": machine["threads"]}


def build(peer: str, python: str, source: Path, target: Path, batch: str) -> str:
    """Lets a peer build its gradient file; returns why there is none, or nothing."""
    if target.exists():
        return ""
    command = [python, str(Path(__file__).with_name("build_gradient.py")), peer, str(source), str(target), batch]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"no file within {PATIENCE} s"
    return last_words(done.stderr, done.returncode) if done.returncode else ""


def peer_tasks(
    peers: Sequence[str], base: Row, files: Mapping[str, Path], folder: Path
) -> Iterator[tuple[str, Row, str, str]]:
    """Each peer's cases: name, task, Python, and why it cannot be measured, or nothing.

    base: a task, of the source; files: `source` and `portable`.
    """
    for name in peers:
        peer: Peer = PEERS[name]
        python = error = ""
        built = folder / f"{base['network']}.{name}.{base['batch'] if peer.fixed_batch else 'free'}.onnx"
        try:
            python = peer.python(name)
        except NotInstalledError as reason:
            error = f"not installed: {reason}"
        if not error and "built" in peer.cases.values():
            error = build(name, python, files["source"], built, str(base["batch"]) if peer.fixed_batch else "")
        for case, model in peer.cases.items():
            yield case, base | {"kind": case, "model": str(built if model == "built" else files[model])}, python, error


def compare(
    name: str, batches: Sequence[int], peers: Sequence[str], folder: Path, machine: Row, limits: Limits
) -> Iterator[Row]:
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
        forward = task("forward", source, name, batch, size, machine)
        tasks = [(forward, sys.executable)]
        tasks += [(task(method, file, name, batch, size, machine), sys.executable) for method, file in files.items()]
        case = {"network": name, "batch": batch, "size": size, **machine}
        for kind, given, python, error in peer_tasks(peers, forward, {"source": source, "portable": portable}, folder):
            if error:
                yield {**case, "versions": {}, "case": kind, "error": error}
            else:
                tasks.append((given, python))
        for row in rows_of(measure(tasks, limits), case):
            yield row | facts.get(row["case"], {})
        for file in folder.glob(f"{name}.*.{batch}.onnx"):  # a peer's, of this batch alone
            file.unlink()


def converting(name: str, folder: Path, machine: Row, rounds: int) -> Iterator[Row]:
    """What `convert` itself takes: the least of the rounds."""
    source, target = folder / f"{name}.onnx", folder / f"{name}.guided.onnx"
    networks.export(name, str(source))
    spent = [convert(source, target) for _ in range(rounds)]
    size = source.stat().st_size
    row = {
        "network": name,
        "batch": 1,
        "size": networks.NETWORKS[name].size,
        "case": "convert",
        **machine,
        "versions": versions(),
    }
    yield row | {
        "convert_s": round(min(one.seconds for one in spent), 2),
        "convert_cpu_s": round(min(one.cpu_seconds for one in spent), 2),
        "convert_mb": round(min(one.rss_mb for one in spent)),
        "convert_rss_ratio": round(min(one.rss_mb for one in spent) / (size / 2**20), 2),
        "file_ratio": round(target.stat().st_size / size, 4),
        "source_mb": round(size / 2**20, 1),
    }


def growth(name: str, folder: Path, machine: Row, limits: Limits) -> Iterator[Row]:
    """Guided against the forward pass, for batches of 1 to 32 and for images of 224 to 896 pixels."""
    for size, batches in ((224, (1, 2, 4, 8, 16, 32)), (448, (1,)), (672, (1,)), (896, (1,))):
        source, converted = folder / f"{name}.{size}.onnx", folder / f"{name}.{size}.guided.onnx"
        networks.export(name, str(source), size)
        convert(source, converted)
        for batch in batches:
            tasks = [task("forward", source, name, batch, size, machine)]
            tasks += [task("guided", converted, name, batch, size, machine)]
            case = {"network": name, "batch": batch, "size": size, "growth": True, **machine}
            yield from rows_of(measure([(given, sys.executable) for given in tasks], limits), case)


def many_targets(name: str, folder: Path, machine: Row, limits: Limits) -> Iterator[Row]:
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
    tasks = [(given, sys.executable) for given in (forward, shared, together, alone)]
    yield from rows_of(measure(tasks, limits), case)


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
    what = f"{row['network']:<16} batch {row['batch']:<3} {row['size']:>4}px  {row['case']:<30}"
    if "error" in row:
        print(what + row["error"], flush=True)
        return
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
@click.option("--seconds", type=float, default=30, show_default=True, help="For each network and batch, about.")
@click.option(
    *("--peer", "--peers", "peers"),
    multiple=True,
    type=click.Choice([*PEERS, "all", "none"]),
    default=["captum", "torch"],
    show_default=True,
    help="What to measure against; but for the first two each is installed in .peers/ at its first use.",
)
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
    seconds: float,
    peers: Sequence[str],
    profiling: bool,
    growing: bool,
    targets: bool,
    converts: bool,
    output: Path,
) -> None:
    """Measures converted files against the forward pass of their source, and against other tools.

    Each runs in a process of its own with the same number of threads; the processes take turns. A row of the result
    replaces the one of the same case in the output file.
    """
    if provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise click.ClickException("no CUDA here: the installed ONNX Runtime has none; see the extra gpu")
    machine = about(provider, threads)
    names = names or list(networks.NETWORKS)
    batches = batches or ([1, 8, 64] if provider == "cuda" else [1, 8])
    limits = Limits(rounds, runs, seconds)
    chosen = [name for name, peer in PEERS.items() if name in peers or "all" in peers]
    if provider == "cuda":
        chosen = [name for name in chosen if not PEERS[name].requirements]  # the others are measured on the CPU
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
                measured = growth(name, folder, machine, limits)
            elif converts:
                measured = converting(name, folder, machine, rounds)
            elif targets:
                measured = many_targets(name, folder, machine, limits)
            else:
                measured = compare(name, batches, chosen, folder, machine, limits)
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
