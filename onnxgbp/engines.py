"""Who makes the parts of a batch: this process, processes of this machine, or actors of a Ray cluster.

Each yields the counts of rows as they become known, and leaves what was in flight undone when it is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from onnxgbp.errors import OnnxgbpError
from onnxgbp.parts import Counts, Job

__all__ = ["in_process", "in_processes", "on_ray"]

_DEATHS = 3  # of workers, without a part between them that was finished


def in_process(job: Job, parts: Sequence[int]) -> Generator[Counts]:
    """One part after the other, here."""
    for part in parts:
        yield from job.write(part)


def in_processes(job: Job, parts: Sequence[int], workers: int) -> Generator[Counts]:
    """As many parts at once as there are workers; where one is killed, what was in flight is made again.

    Raises:
        OnnxgbpError: of a part, or the workers die again and again.
    """
    context, left, deaths = get_context("spawn"), deque(parts), 0  # a fork would copy the threads' locks as they are
    while left:
        running: dict[Future[Counts], int] = {}
        # Workers leave when this end of the pipe is closed: so they do when this process is killed.
        alive, life = context.Pipe(duplex=False)
        with life, alive, ProcessPoolExecutor(workers, context, _start, (job, alive)) as pool:
            try:
                while left or running:
                    while left and len(running) < workers:
                        with _deaf():  # the pool starts its workers when it is given something to do
                            running[pool.submit(_write, left[0])] = left[0]
                        left.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        counts = future.result()
                        del running[future]
                        deaths = 0
                        yield counts
            except BrokenProcessPool:
                deaths += 1
                left.extendleft(sorted(running.values(), reverse=True))
                if deaths == _DEATHS:
                    raise OnnxgbpError(
                        f"workers were killed {deaths} times without finishing a part: is there memory for so many?"
                    ) from None
            except BaseException:
                life.close()
                raise


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C waits until the block ends, and processes that begin in it do not hear it: what they import would show."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_job: Job | None = None  # of a worker


def _start(job: Job, alive: Connection) -> None:
    global _job  # a pool's initializer has no other way to leave something for the calls
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told too, and closes the pipe

    def leave() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _write(part: int) -> Counts:
    assert _job is not None
    return sum(_job.write(part), Counts())


def on_ray(job: Job, parts: Sequence[int], workers: int, address: str | None, gpus: float | None) -> Generator[Counts]:
    """Ray Data maps the parts over a pool of actors; Ray starts actors anew that die, and gives their parts to others.

    Raises:
        OnnxgbpError: Ray is missing or its cluster not there, or of a part.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise OnnxgbpError(f"the engine ray needs Ray Data ({error}): pip install 'onnxgbp[ray]'") from None

    started = not ray.is_initialized()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plan and its end are no news on top of ours
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="error")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is ours
        pool = ray.data.ActorPoolStrategy(size=min(workers, len(parts)), max_tasks_in_flight_per_actor=1)
        made = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
            _Actor, batch_size=1, compute=pool, fn_constructor_args=(job,), num_cpus=job.threads, num_gpus=gpus
        )
        for row in made.iter_rows():
            if row["error"]:
                raise OnnxgbpError(str(row["error"]))
            yield Counts(int(row["rows"]), int(row["errors"]), int(row["blank"]))
    except OnnxgbpError:
        raise
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]  # the last of a traceback is why
        raise OnnxgbpError(f"Ray: {said[-1] if said else type(error).__name__}") from None
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """A worker with a session of its own, which the job makes when it is unpickled here."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        counts, said = Counts(), ""
        try:
            for part in batch["part"]:
                counts += sum(self._job.write(int(part)), Counts())
        except OnnxgbpError as error:  # as a row: Ray would wrap it, with a traceback, in errors of its own
            said = str(error)
        return {"rows": [counts.rows], "errors": [counts.errors], "blank": [counts.blank], "error": [said]}
