"""Many photos through `onnxgbp batch`: the rate beside bare inference, the memory, and runs killed on the way.

    python tools/bench_batch.py --images 20000          undisturbed; then killed three times and gone on with
    python tools/bench_batch.py --images 20000 --ray    the same, and then once more on Ray with a worker killed

Run `python tools/build_squeezenet.py` first. The photos are resized cuts of those that models/README.md names, which
pip fetches. Writes tools/batch.json: images per second of the command and of ONNX Runtime alone on the same file (the
same batch and threads, arrays that are ready, nothing written; before and after), the memory in megabytes after each
tenth of the undisturbed run, and whether the disturbed runs ended in the same bytes. Takes a disk of 0.7 MB an image.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from readme_neurons import save_photos

import onnxgbp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "batch.json"
BATCH, PART = 16, 500
BARE = 50  # batches in a measurement of bare inference
KILLS = 3

BARE_INFERENCE = """
import sys, time
import numpy, onnxruntime
path, threads, size, count = sys.argv[1], *map(int, sys.argv[2:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feeds = {session.get_inputs()[0].name: numpy.random.default_rng(0).normal(0, 60, (size, 3, 224, 224)).astype("float32")}
session.run(None, feeds)
begin = time.perf_counter()
for _ in range(count):
    session.run(None, feeds)
print(count * size / (time.perf_counter() - begin))
"""


def make_photos(count: int, folder: Path) -> None:
    """`count` different photos of 256 to 400 pixels: random cuts of real ones, resized, some mirrored."""
    save_photos(folder / "whole")
    whole = [Image.open(path).convert("RGB") for path in sorted((folder / "whole").iterdir())]
    chance = random.Random(0)  # noqa: S311 - which cut of a photo is no secret
    for i in range(count):
        photo = chance.choice(whole)
        side = chance.randint(min(photo.size) // 2, min(photo.size))
        left, top = (chance.randint(0, length - side) for length in photo.size)
        size = chance.randint(256, 400)
        cut = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        if chance.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / "photos" / f"{i // 1000:03}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut.save(path, quality=90)


def bare_rate(model: Path, threads: int) -> float:
    """Images a second of ONNX Runtime alone."""
    command = [sys.executable, "-c", BARE_INFERENCE, model, threads, BATCH, BARE]
    return float(subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout)


def start(model: Path, photos: Path, out: Path, engine: list[str]) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    command = [sys.executable, "-m", "onnxgbp", "batch", model, photos, "-o", out, "--part-size", PART]
    command += ["--batch-size", BATCH, *engine]
    return subprocess.Popen([*map(str, command)], start_new_session=True)


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts(out)}


def actors(process: subprocess.Popen[bytes]) -> list[int]:
    """Ray's workers below the command that are mapping now."""
    ps = shutil.which("ps") or "ps"
    listed = subprocess.run([ps, "-eo", "pid=,ppid=,args="], check=True, capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, *_ in rows}

    def below(pid: int) -> bool:
        return pid == process.pid or (pid in parents and below(parents[pid]))

    return [int(pid) for pid, _, *what in rows if what and what[0].startswith("ray::MapWorker") and below(int(pid))]


def resident(group: int) -> float:
    """Megabytes that the processes of a group hold now, what they share counted for each."""
    ps = shutil.which("ps") or "ps"
    listed = subprocess.run([ps, "-o", "rss=", "-g", str(group)], check=True, capture_output=True, text=True).stdout
    return sum(map(int, listed.split())) * 1024 / 1e6


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"onnxgbp batch ended with status {process.returncode}")


def undisturbed(model: Path, photos: Path, out: Path, total: int, local: list[str]) -> tuple[float, list[float]]:
    """Seconds from the first part to the last for each image, and the memory after each tenth."""
    process, memory, times = start(model, photos, out, local), list[float](), list[float]()
    while process.poll() is None:
        done = len(parts(out)) if out.exists() else 0
        if done > len(times):
            times += [time.monotonic()] * (done - len(times))
        if total > done >= len(memory) * total / 10 and done:
            memory.append(resident(process.pid))
        time.sleep(0.05)
    finish(process)
    return (times[-1] - times[0]) / (len(times) - 1) / PART, memory


def killed(model: Path, photos: Path, out: Path, total: int, local: list[str]) -> int:
    """Kills the command with all its processes at each quarter, goes on each time; how many were killed."""
    kills = 0
    for quarter in range(1, KILLS + 1):
        process = start(model, photos, out, local)
        while len(parts(out)) < quarter * total // (KILLS + 1):
            if process.poll() is not None:
                raise SystemExit("the command ended before it was killed")
            time.sleep(0.05)
        time.sleep(random.Random(quarter).random())  # noqa: S311 - in the middle of a part
        os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    finish(start(model, photos, out, local))
    return kills


def on_ray(model: Path, photos: Path, out: Path, total: int, _: list[str]) -> int:
    """On Ray with two actors, of which one is killed half-way; how many were killed."""
    process, kills = start(model, photos, out, ["--engine", "ray", "--workers", "2", "--threads", "1"]), 0
    while process.poll() is None:
        if not kills and out.exists() and len(parts(out)) >= total // 2:
            os.kill(actors(process)[0], signal.SIGKILL)
            kills += 1
        time.sleep(0.2)
    finish(process)
    return kills


def measure(count: int, workers: int, ray: bool, folder: Path) -> dict[str, Any]:
    """The figures."""
    total, threads, photos = -(-count // PART), len(os.sched_getaffinity(0)), folder / "photos"
    local = ["--workers", str(workers)]
    model = folder / "squeezenet.guided.onnx"
    onnxgbp.save(onnxgbp.convert(ROOT / "models" / "squeezenet1_1.onnx", method="guided"), model)
    make_photos(count, folder)
    before = bare_rate(model, threads)
    seconds, memory = undisturbed(model, photos, folder / "whole.maps", total, local)
    after = bare_rate(model, threads)
    bare, whole, disturbed = float(np.mean([before, after])), digests(folder / "whole.maps"), folder / "disturbed.maps"
    figures = {
        "images": count,
        "workers": workers,
        "images per second": round(1 / seconds, 2),
        "bare inference, before and after": [round(before, 2), round(after, 2)],
        "ratio": round(1 / seconds / bare, 3),
        "memory in MB": [round(value) for value in memory],
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
    }
    for name, disturb in {"killed": killed, "worker of Ray killed": on_ray}.items():
        if disturb is killed or ray:
            figures[name] = {
                "times": disturb(model, photos, disturbed, total, local),
                "same bytes": digests(disturbed) == whole,
            }
            shutil.rmtree(disturbed)
    return figures


def main() -> None:
    """Measures, and puts the figures in the place of those for as many images and workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="all cores by default")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--folder", type=Path, help="where photos and data sets lie meanwhile")
    options = parser.parse_args()
    if options.images < 4 * PART:
        parser.error(f"at least {4 * PART} images: parts hold {PART}, and the runs are ended between them")
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        figures = measure(options.images, options.workers, options.ray, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures, indent=1))
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [old for old in rows if _key(old) != _key(figures)] + [figures]
    RESULTS.write_text(json.dumps(sorted(rows, key=_key), indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[int, int]:
    return row["images"], row["workers"]


if __name__ == "__main__":
    main()
