"""The comparison's end of a child process: its requests, its errors, its peak memory.

Owns the process of a `Side` from start to end, and the environment that both programs get unless
the user's says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hobbit_jax.baselines.side import SideSpec
from hobbit_jax.evals.measure import Turn
from hobbit_jax.evals.process_memory import PeakWatch, ResidentBytes

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
        # Closed by `_end`: it lives as long as the process.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hobbit_jax.baselines.side"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
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

    def finish(self) -> ResidentBytes | None:
        """Peak memory of the whole run; the process is over then."""
        peak = self._watch.stop()
        self._end()
        return peak

    def _send(self, request: Any) -> None:
        assert self._process.stdin is not None
        # A child that has ended breaks the pipe; what it said last tells why.
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(request, self._process.stdin, protocol=5)
            self._process.stdin.flush()

    def _ask(self, method: str, *arguments: Any) -> Any:
        _ = self.loaded
        self._send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        try:
            kind, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
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

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdout:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._watch.stop()
        if not self._log.closed:
            self._end()
