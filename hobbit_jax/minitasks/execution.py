"""Runs completions of `functions` and decides which are right.

Owns the cut of a completion, the child processes and the verdict. Called by `hobbit_jax.evals`.
The manner follows HumanEval's `check_correctness` (Chen et al. 2021), with one difference: the
child is told the arguments but not the expected values, and the comparison happens here. So there
is nothing a candidate could print, raise or exit with that passes for a right answer. Each has a
process of its own (`worker.py`, about 15 ms), so it cannot affect the verdict on another.

This confines accidents of a language model. It is not a sandbox for hostile code.
"""

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hobbit_jax.minitasks.functions import Problem

_WORKER = Path(__file__).with_name("worker.py")


def candidate_source(problem: Problem, completion: str) -> str:
    """Prompt and completion, cut at the first line of it that starts at column 0."""
    body = []
    for line in completion.split("\n"):
        if line and not line[0].isspace():
            break
        body.append(line)
    return problem.prompt + "\n".join(body) + "\n"


def score(problem: Problem, completion: str) -> bool:
    """Whether the completed function gives the expected value on every test of the problem."""
    return run_candidates([problem], [completion])[0]


def run_candidates(
    problems: Sequence[Problem],
    completions: Sequence[str],
    timeout_s: float = 2.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[bool]:
    """The verdict on each completion: right on every test, by value and type.

    Endless loops (after `timeout_s` seconds each), exceptions, exits, more than 512 MiB and wrong
    values are all False. `progress(done, total)` is called after each candidate.

    Raises:
      ValueError: not one completion per problem.
    """
    if len(problems) != len(completions):
        raise ValueError(f"got {len(completions)} completions for {len(problems)} problems")
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        for problem, completion in zip(problems, completions, strict=True):
            source = candidate_source(problem, completion)
            calls = [args for args, _ in problem.tests]
            expected = repr([value for _, value in problem.tests]).encode()
            job = ascii((source, problem.name, calls, math.ceil(timeout_s) + 1))
            answer = _answer(job.encode(), len(expected), timeout_s, folder)
            verdicts.append(answer == expected)
            if progress is not None:
                progress(len(verdicts), len(problems))
    return verdicts


def _answer(job: bytes, expected_bytes: int, timeout_s: float, folder: str) -> bytes | None:
    """What the worker wrote before it closed its end; None when too late or longer than expected"""
    deadline = time.monotonic() + timeout_s
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        bufsize=0,
        start_new_session=True,
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            # A worker that died at once has no answer, which the read below finds out.
            with contextlib.suppress(BrokenPipeError), worker.stdin as stdin:
                stdin.write(job)
            return _read(worker.stdout, expected_bytes, deadline)
        finally:
            # The worker is not reaped yet, so its group exists, whatever it did meanwhile.
            os.killpg(worker.pid, signal.SIGKILL)


def _read(stream, most_bytes: int, deadline: float) -> bytes | None:
    """The stream up to its end; None after the deadline or beyond `most_bytes`."""
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while len(received) <= most_bytes:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return None
            chunk = stream.read(most_bytes + 1)
            if not chunk:
                return received
            received += chunk
    return None
