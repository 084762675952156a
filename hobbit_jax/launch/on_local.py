"""Tasks in processes of this machine, each with a GPU of its own where there are any.

Owns a `concurrent.futures` pool of one process for each worker, so that the death of a process is
the death of one task, and the end of all processes when the sweep ends or is killed.
"""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hobbit_jax.launch.sweeping import Engine, Graph, Outcomes, map_tasks
from hobbit_jax.launch.tasks import MAX_ATTEMPTS, Outcome, run_task
from pallas_kernels.ggml.ops import default_threads, set_threads


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that JAX would use here, as CUDA_VISIBLE_DEVICES names them."""
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [] if chosen in ("", "-1", "NoDevFiles") else chosen.split(",")
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []


def connect(resources: Mapping[str, object]) -> tuple[Engine, int]:
    """See `launch.connect`."""
    if resources:
        raise ValueError(
            "the local launcher takes no resources; CUDA_VISIBLE_DEVICES says which GPUs"
        )
    gpus = visible_gpus()
    return functools.partial(run, gpus=gpus), max(1, len(gpus))


def run(
    graph: Graph,
    workdir: Path,
    workers: int,
    gpus: Sequence[str] = (),
    attempts: int = MAX_ATTEMPTS,
) -> Outcomes:
    """An `Engine` of processes.

    Raises:
        ValueError: there are more workers than GPUs.
    """
    if gpus and workers > len(gpus):
        raise ValueError(f"--workers={workers} on {len(gpus)} GPUs; want one GPU for each")
    return map_tasks(ProcessPool(workers, gpus, attempts), graph, workdir, workers)


class ProcessPool:
    """One process for each worker, started anew when it dies; see `sweeping.Pool`."""

    died: tuple[type[Exception], ...] = (BrokenProcessPool,)

    def __init__(self, workers: int, gpus: Sequence[str], attempts: int):
        self.attempts = attempts
        # Processes read from it until it closes: when this process says so, or is no more.
        self._life, self._own_end = multiprocessing.Pipe(duplex=False)
        self._gpus = gpus
        self._threads = max(1, default_threads() // workers)
        self._executors = [self._executor(place) for place in range(workers)]
        self._futures: list[Future | None] = [None] * workers

    def _executor(self, place: int) -> ProcessPoolExecutor:
        gpu = self._gpus[place] if self._gpus else None
        return ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _begin, (self._life, gpu, self._threads)
        )

    def submit(self, *arguments: Any) -> Future[Outcome]:
        """See `sweeping.Pool`."""
        idle = (p for p, future in enumerate(self._futures) if future is None or future.done())
        place = next(idle)
        # The process that may be started now takes over this environment. tqdm reads it there, so
        # that the bars of several processes stand below each other and below this one's.
        os.environ["TQDM_POSITION"] = str(place + 1)
        try:
            future = self._executors[place].submit(run_task, *arguments)
        except BrokenProcessPool:
            self._executors[place] = self._executor(place)
            future = self._executors[place].submit(run_task, *arguments)
        self._futures[place] = future
        return future

    def stop(self) -> None:
        """See `sweeping.Pool`."""
        if all(future is None or future.done() for future in self._futures):
            for executor in self._executors:  # they clean up behind themselves
                executor.shutdown()
        self._own_end.close()
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)
        self._life.close()


def _begin(life: Connection, gpu: str | None, threads: int) -> None:
    """Prepares a process of the pool, which shares the processors with the others."""
    os.setsid()  # ctrl-C is for the process that runs the sweep
    set_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()


def _end_with(life: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os.killpg(0, signal.SIGKILL)
