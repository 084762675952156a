"""What a program must do to be compared, and the child process in which it does it.

Owns the interface and the child's end of the pipe; every program is timed by `evals/measure.py`.
Run as `python -m hobbit_jax.baselines.side` by `child.py`. A child of its own for each program
keeps their memory, threads and libraries apart. It ends when its input does, so none survives the
comparison.
"""

from __future__ import annotations

import os
import pickle
import pkgutil
import sys
import time
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np

from hobbit_jax.evals.measure import Program, timed_turn
from hobbit_jax.evals.process_memory import read_resident


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
    """Which program, with what.

    Attributes:
        factory: "module:callable", called in the child with `options`; returns a `Side`.
        options: keyword arguments.
        threads: processor cores that the child may use; libraries are told the same number.
    """

    factory: str
    options: dict[str, Any]
    threads: int


def restrict_threads(threads: int) -> None:
    """Binds this process to so many cores, before any library counts them.

    Raises:
        ValueError: this process may not use so many.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"threads is {threads}; want 1 to the {len(cores)} cores there are")
    os.sched_setaffinity(0, cores[:threads])


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Loads a program, says what its process took before the model, and answers till the end.

    The first request is a `SideSpec`, the others are names of methods with their arguments.
    """

    def reply(kind: str, value: Any) -> None:
        pickle.dump((kind, value), replies, protocol=5)
        replies.flush()

    try:
        spec: SideSpec = pickle.load(requests)
        restrict_threads(spec.threads)
        make = pkgutil.resolve_name(spec.factory)
        before, began = read_resident(os.getpid()), time.perf_counter()
        side: Side = make(threads=spec.threads, **spec.options)
        reply("answer", {"load_s": time.perf_counter() - began, "before_model": before})
        while True:
            try:
                name, arguments = pickle.load(requests)
            except EOFError:
                return
            if name == "turn":
                reply("answer", timed_turn(side, *arguments))
            else:
                reply("answer", getattr(side, name)(*arguments))
    except Exception as error:
        # Its name and text go to the parent, which raises the same; the rest is in the log.
        reply(type(error).__name__, str(error))
        raise


if __name__ == "__main__":
    # Whatever a library prints goes to the log, not between our answers.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, replies)
