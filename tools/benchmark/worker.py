"""One thing to measure in a process of its own: makes it ready, then runs it as often as each line of stdin says.

A line is the number of calls and the seconds after which none is begun; one is made in any case. What it prints is
JSON, a line when it is ready and a line for each line read. It runs in the environments of the peers as well, which
have numpy and what they need themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Call = Callable[[], object]
Array = npt.NDArray[np.float32]

WARM_UP = 1  # calls before the first turn, each of which begins with one that does not count
PACKAGES = (
    *("onnxgbp", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-training-cpu", "onnx-ad", "openvino"),
    *("torch", "captum"),
)


def _image(batch: int, size: int) -> Array:
    return np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)


def _onnxruntime(task: dict[str, Any]) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["threads"]
    options.log_severity_level = 3
    options.enable_mem_pattern = task.get("memory_plan", True)  # our files run as `Explainer` runs them: without
    wanted = "CUDAExecutionProvider" if task["provider"] == "cuda" else "CPUExecutionProvider"
    providers: list[Any] = [(wanted, {"use_tf32": "0"})] if task["provider"] == "cuda" else [wanted]
    session = onnxruntime.InferenceSession(task["model"], options, providers=providers)
    assert session.get_providers()[0] == wanted, "the session fell back to the CPU"
    feeds: dict[str, npt.NDArray[Any]] = {"x": _image(task["batch"], task["size"])}
    if task.get("targets"):
        feeds["target"] = np.array(task["targets"], np.int64)
    for value in session.get_inputs():
        if value.name not in feeds:  # a peer's seed, onnx-ad's with a dim more for several of them
            feeds[value.name] = np.zeros([task["batch"], value.shape[1], *[1] * (len(value.shape) - 2)], np.float32)
            feeds[value.name][:, 0] = 1
    return lambda: session.run(None, feeds)


def _openvino(task: dict[str, Any]) -> Call:
    core = importlib.import_module("openvino").Core()
    # It takes bfloat16 by default where the processor has it, which moves a map by most of its range.
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": task["threads"]}
    model, image = core.read_model(task["model"]), _image(task["batch"], task["size"])
    model.reshape(list(image.shape))  # a free batch costs it up to a quarter
    compiled = core.compile_model(model, "CPU", config)
    return lambda: compiled([image])


def _torch(task: dict[str, Any]) -> Call:
    """Plain autograd, or Captum's guided backpropagation, of the same network."""
    import torch

    from benchmark.networks import build

    torch.set_num_threads(task["threads"])
    device = "cuda" if task["provider"] == "cuda" else "cpu"
    layout = torch.channels_last if task["kind"].endswith("channels_last") else torch.contiguous_format
    net: Any = build(task["network"])
    net = net.to(device, memory_format=layout)
    image = torch.from_numpy(_image(task["batch"], task["size"])).to(device).contiguous(memory_format=layout)
    with torch.no_grad():
        target = net(image).argmax(1)

    def finished() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if task["kind"] == "torch gradient":

        def gradient() -> None:
            leaf = image.detach().requires_grad_()
            torch.autograd.grad(net(leaf).gather(1, target[:, None]).sum(), leaf)
            finished()

        return gradient

    warnings.simplefilter("ignore")  # of the hooks that it sets
    method = importlib.import_module("captum.attr").GuidedBackprop(net)

    def guided() -> None:
        method.attribute(image.detach().requires_grad_(), target=target)
        finished()

    return guided


def _make(task: dict[str, Any]) -> Call:
    if task["kind"].startswith(("torch", "captum")):
        return _torch(task)
    return _openvino(task) if task["kind"].startswith("openvino") else _onnxruntime(task)


def peak_mb() -> float:
    """The largest this process has been; getrusage would count what its parent was before."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions() -> dict[str, str]:
    """Of the packages that matter here, those that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    task = json.loads(sys.argv[1])
    start = time.perf_counter()
    call = _make(task)
    ready = time.perf_counter() - start
    for _ in range(WARM_UP):
        call()
    print(json.dumps({"load_s": ready, "versions": versions()}), flush=True)
    for line in sys.stdin:
        calls, seconds = (float(part) for part in line.split())
        times, spent = list[float](), list[float]()
        call()  # the processes take turns: the caches are cold
        end = time.perf_counter() + seconds
        while not times or (len(times) < calls and time.perf_counter() < end):
            start, used = time.perf_counter(), time.process_time()
            call()
            times.append(1000 * (time.perf_counter() - start))
            spent.append(1000 * (time.process_time() - used))
        print(json.dumps({"ms": times, "cpu_ms": spent, "rss_mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
