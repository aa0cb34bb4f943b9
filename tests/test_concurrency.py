"""Threads, processes and repetition give the same bits; a forked process neither hangs nor guesses."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_explain import picture, tiny

from onnxgbp import Explainer

METHODS = ("gradient", "deconvnet", "guided", "input-x-gradient", "smoothgrad:guided")
BATCHES = [np.random.default_rng(i).standard_normal((i % 4 + 1, 3, 8, 8)).astype(np.float32) for i in range(32)]


def explained(explainer: Explainer, x: np.ndarray) -> bytes:
    result = explainer(x)
    return b"".join(array.tobytes() for array in (result.attribution, result.scores, result.target))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return tiny(tmp_path / "net.onnx")


def test_many_explainers_in_many_threads(net: Path) -> None:
    """Of a path and of a model in memory, each used by all threads."""
    models = (net, onnx.load(net))
    alone = [[explained(Explainer(net, method=method), x) for x in BATCHES] for method in METHODS]
    explainers = [
        Explainer(model, method=method, threads=2) for method in METHODS for model in models for _ in range(2)
    ]
    jobs = [(i, j) for j in range(len(BATCHES)) for i in range(len(explainers))]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda job: explained(explainers[job[0]], BATCHES[job[1]]), jobs))
    for (i, j), result in zip(jobs, results):
        assert result == alone[i // 4][j], (METHODS[i // 4], j)


def test_sixteen_threads_ask_for_several_classes_first(net: Path) -> None:
    """The session for K classes is made by whoever asks first, once."""
    explainer = Explainer(net)
    with ThreadPoolExecutor(16) as pool:
        maps = list(pool.map(lambda _: explainer(BATCHES[3], [[0, 2]] * 4).attribution.tobytes(), range(16)))
    assert len(set(maps)) == 1
    assert len(explainer._of_several) == 1


@pytest.mark.parametrize("method", ["guided", "smoothgrad"])
def test_pickled_into_spawned_workers(method: str, net: Path) -> None:
    explainer = Explainer(net, method=method)
    wanted = [explained(explainer, x) for x in BATCHES]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        assert pool.starmap(explained, [(explainer, x) for x in BATCHES]) == wanted
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(explained, [explainer] * len(BATCHES), BATCHES)) == wanted


# Forks while eight threads are inside the runtime, so that its locks are held by threads that the child has not. Each
# child uses what it has inherited, takes a copy by pickle, drops both, and ends as any program does, by its exit
# handlers. The alarm is what a hang looks like.
FORKS = """
import multiprocessing, os, pickle, signal, sys, threading, warnings
from concurrent.futures import ProcessPoolExecutor
import numpy as np
from onnxgbp import Explainer
from test_concurrency import BATCHES, explained

warnings.simplefilter("ignore")  # newer Pythons tell that forking among threads is risky: that is the point
explainer, idle, bystander = (Explainer(sys.argv[1], method="guided", threads=4) for _ in range(3))
several = explainer(BATCHES[3], [[0, 2]] * 4).attribution.tobytes()
wanted = [explained(explainer, x) for x in BATCHES]
done = threading.Event()

def work():
    while not done.is_set():
        explained(explainer, BATCHES[3])

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for _ in range(2):
    if not (child := os.fork()):
        signal.alarm(200)
        done.set()
        assert [explained(explainer, x) for x in BATCHES] == wanted
        assert [explained(idle, x) for x in BATCHES] == wanted
        assert explainer(BATCHES[3], [[0, 2]] * 4).attribution.tobytes() == several
        copy = pickle.loads(pickle.dumps(explainer))
        assert [explained(copy, x) for x in BATCHES] == wanted
        if not (grandchild := os.fork()):
            assert explained(explainer, BATCHES[0]) == wanted[0]
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 7
        del bystander, explainer, idle, copy
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
done.set()
for thread in threads:
    thread.join()

context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    assert pool.starmap(explained, [(explainer, x) for x in BATCHES]) == wanted
with ProcessPoolExecutor(2, mp_context=context) as pool:
    assert list(pool.map(explained, [explainer] * len(BATCHES), BATCHES)) == wanted
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_across_forks(net: Path) -> None:
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", FORKS, net],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


IN_A_CHILD = """
import os, sys, traceback
import numpy as np
from onnxgbp import Explainer, OnnxgbpError
explainer = Explainer(sys.argv[1])
explainer.provider = sys.argv[2]
if sys.argv[3] == "changed":
    open(sys.argv[1], "ab").write(b"\\x72\\x00")  # metadata, empty: the same net, but are other bytes
if not os.fork():
    try:
        explainer(np.zeros((1, 3, 8, 8), np.float32))
    except OnnxgbpError as error:
        print(error, flush=True)
    sys.exit()
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(
    ("provider", "state", "message"),
    [("cuda", "same", "CUDA does not survive"), ("cpu", "changed", "was changed after it was opened")],
)
def test_what_a_fork_cannot_take_along_is_said(provider: str, state: str, message: str, net: Path) -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_CHILD, net, provider, state], capture_output=True, text=True)
    assert message in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("said", ["0", "1", None])
def test_the_runtime_sends_nothing_unless_asked(said: str | None, net: Path) -> None:
    code = "import os, sys, onnxgbp; onnxgbp.Explainer(sys.argv[1]); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
    done = subprocess.run([sys.executable, "-c", code, net], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == (said or "1"), done.stderr


COMMANDS = {
    "convert": ["convert", "net.onnx", "-o", "out/net.onnx", "--methods", "gradient,guided", "--target", "top2"],
    "explain": ["explain", "net.onnx", "photos/0.png", "photos/1.png", "-o", "out/explain", "--method", "smoothgrad"],
    "neurons": ["neurons", "net.onnx", "--layer", "r", "--channel", "strongest:3", "--images", "photos", "-o", "out/n"],
    "sanity": ["sanity", "net.onnx", "--images", "photos", "-o", "out/sanity"],
    "faithfulness": ["faithfulness", "net.onnx", "--images", "photos", "-o", "out/faith"],
    "batch": ["batch", "net.onnx", "photos", "-o", "out/batch", "--part-size", "3"],
}
EXTRA = {"sanity": "matplotlib", "faithfulness": "matplotlib", "batch": "pyarrow"}

RUNS = """
import json, sys
from click.testing import CliRunner
from onnxgbp.cli import main
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (arguments, result.output)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_two_runs_write_the_same_bytes(command: str, tmp_path: Path) -> None:
    """Each by a process of its own, with other hashes, in a folder of its own."""
    if command in EXTRA:
        pytest.importorskip(EXTRA[command], reason=f"{command} writes with it")
    trees = []
    tiny(tmp_path / "net.onnx")
    for seed in ("0", "4242"):
        folder = tmp_path / seed
        for i in range(5):
            picture(folder / "photos" / f"{i}.png", (32, 32), seed=i)
            os.utime(folder / "photos" / f"{i}.png", (1, 1))  # of the samples `batch` keeps the time
        (folder / "net.onnx").write_bytes((tmp_path / "net.onnx").read_bytes())
        (folder / "out").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", RUNS, json.dumps([COMMANDS[command]])],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        trees.append(tree(folder / "out"))
    assert trees[0]
    assert trees[0] == trees[1]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
