"""A program in a child process of its own, so that memory, threads and libraries are apart.

Owns what a program must do to be compared, both ends of the pipe, and the environment that every
program gets unless the user's says otherwise. The child is `python -m hobbit_jax.baselines.child`;
it ends when the parent's end of the pipe does, so none survives the comparison.
"""

import contextlib
import functools
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from hobbit_jax.evals.measure import Program, Turn, timed_turn
from hobbit_jax.evals.process_memory import PeakWatch, ResidentBytes, read_resident

_DEFAULTS = {
    # JAX would take most of a GPU at once, and the other program runs beside it.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Threads of OpenMP that spin at a barrier made PyTorch six times slower on two busy cores.
    "OMP_WAIT_POLICY": "passive",
}
_ROOT = Path(__file__).resolve().parents[2]
_LOG_LINES = 5
# What a user can do something about keeps its kind; anything else says what the log ends with.
_KEPT_ERRORS = {
    kind.__name__: kind
    for kind in (ValueError, NotImplementedError, FileNotFoundError, PermissionError, OSError)
}


class Side(Program, Protocol):
    """One program with one model loaded; one sequence at a time."""

    def score(self, ids_T: np.ndarray) -> np.ndarray:
        """Teacher-forced float32 logits [T, V] of a fresh sequence, int32 ids."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a reader must know of it: versions, precision, device, threads, settings."""
        ...


@dataclass(frozen=True)
class SideSpec:
    """Which program, with what."""

    factory: str  # "module:callable", called in the child with `options`; returns a `Side`
    options: dict[str, Any]  # keyword arguments
    threads: int  # processor cores that the child may use; libraries are told the same number


def environment() -> dict[str, str]:
    """What both programs run in; the user's own settings stand."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**_DEFAULTS, **os.environ, "PYTHONPATH": path}


class Child:
    """A running `Side`; a context manager that ends it.

    Every method waits for the model first, and raises the program's own ValueError,
    NotImplementedError or OSError after its name, or a ChildProcessError with the end of its log.
    """

    def __init__(self, spec: SideSpec, name: str):
        self.name = name
        # Closed by `__exit__`: it lives as long as the process.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hobbit_jax.baselines.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env=environment(),
            )
        self._watch = PeakWatch(self._process.pid)
        self._send(spec)

    @functools.cached_property
    def loaded(self) -> dict[str, Any]:
        """Seconds of loading, and the process's memory before it."""
        return self._receive()

    def score(self, ids_T: np.ndarray) -> np.ndarray:
        """See `Side.score`."""
        return self._ask("score", ids_T)

    def turn(self, ids_S: np.ndarray, prompt_tokens: int) -> Turn:
        """See `measure.timed_turn`."""
        return self._ask("turn", ids_S, prompt_tokens)

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        return self._ask("facts")

    def peak(self) -> ResidentBytes | None:
        """Peak memory until now; no more is measured."""
        return self._watch.stop()

    def _send(self, request: Any) -> None:
        # A child that has ended breaks the pipe; what it said last tells why.
        with contextlib.suppress(ConnectionError):
            self._pipe.send(request)

    def _ask(self, method: str, *arguments: Any) -> Any:
        _ = self.loaded
        self._send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            raise ChildProcessError(f"{self.name} ended {how}: {self._log_tail()}") from None
        if kind == "answer":
            return value
        text = f"{self.name}: {value}"
        if kind in _KEPT_ERRORS:
            raise _KEPT_ERRORS[kind](text)
        self._process.wait()
        raise ChildProcessError(f"{text} ({kind}; {self._log_tail()})")

    def _log_tail(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return "; ".join(lines[-_LOG_LINES:]) or "it printed nothing"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._watch.stop()
        self._pipe.close()
        self._log.close()


def _restrict_threads(threads: int) -> None:
    """Binds this process to so many cores, before any library counts them."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"threads is {threads}; want 1 to the {len(cores)} cores there are")
    os.sched_setaffinity(0, cores[:threads])


def _serve(pipe: Connection) -> None:
    """Loads a program, says what its process took before the model, and answers till the end.

    The first request is a `SideSpec`, the others are names of methods with their arguments.
    """
    try:
        spec: SideSpec = pipe.recv()
        _restrict_threads(spec.threads)
        make = pkgutil.resolve_name(spec.factory)
        before, began = read_resident(os.getpid()), time.perf_counter()
        side: Side = make(threads=spec.threads, **spec.options)
        load_s = time.perf_counter() - began
        pipe.send(("answer", {"load_s": load_s, "before_model": before}))
        while True:
            try:
                name, arguments = pipe.recv()
            except EOFError:
                return
            method = functools.partial(timed_turn, side) if name == "turn" else getattr(side, name)
            pipe.send(("answer", method(*arguments)))
    except Exception as error:
        # Its name and text go to the parent, which raises the same; the rest is in the log.
        pipe.send((type(error).__name__, str(error)))
        raise


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
