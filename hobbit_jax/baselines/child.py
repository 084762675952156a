"""The comparison's end of a child process: its requests, its errors, its peak memory.

Owns the process of a `Side` from start to end, and the environment that both programs get unless
the user's says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
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
    """A running `Side`; a context manager that ends it."""

    def __init__(self, spec: SideSpec, name: str):
        self.name = name
        # Closed by `_end`: it lives as long as the process.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hobbit_jax.baselines.side", spec.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
        )
        self._watch = PeakWatch(self._process.pid)
        self._loaded: dict[str, Any] | None = None

    def loaded(self) -> dict[str, Any]:
        """Waits for the model: seconds of loading, and the process's memory before it.

        Raises:
            ValueError, NotImplementedError, OSError: as the program raised it.
            ChildProcessError: it raised something else, or ended.
        """
        if self._loaded is None:
            self._loaded = self._receive()
        return self._loaded

    def score(self, ids_T: np.ndarray, out: Path) -> np.ndarray:
        """float32 logits [T, V]; `out` is a file to pass them in."""
        shape = self._ask({"do": "score", "ids": ids_T.tolist(), "out": str(out)})
        return np.fromfile(out, np.float32).reshape(shape)

    def turn(self, ids_S: np.ndarray, prompt_tokens: int) -> Turn:
        """See `measure.timed_turn`."""
        request = {"do": "turn", "ids": ids_S.tolist(), "prompt_tokens": prompt_tokens}
        return Turn.from_json(self._ask(request))

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        return self._ask({"do": "facts"})

    def finish(self) -> ResidentBytes | None:
        """Peak memory of the whole run; the process is over then."""
        peak = self._watch.stop()
        self._end()
        return peak

    def _ask(self, request: dict[str, Any]) -> Any:
        self.loaded()
        assert self._process.stdin is not None
        # A child that has ended breaks the pipe; what it said last tells why.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._receive()["answer"]

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            raise ChildProcessError(f"{self.name} ended {how}: {self._log_tail()}")
        reply = json.loads(line)
        if "error" not in reply:
            return reply
        kind, text = _KEPT_ERRORS.get(reply["error"]), f"{self.name}: {reply['text']}"
        if kind is None:
            self._process.wait()
            raise ChildProcessError(f"{text} ({reply['error']}; {self._log_tail()})")
        raise kind(text)

    def _log_tail(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return "; ".join(lines[-_LOG_LINES:]) or "it printed nothing"

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._process.stdin, self._process.stdout:
            pass
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
