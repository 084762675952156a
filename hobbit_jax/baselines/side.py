"""What a program must do to be compared, and the child process in which it does it.

Owns the interface and the line protocol between the comparison and its children; every program is
timed by `evals/measure.py`. Run as `python -m hobbit_jax.baselines.side SPEC` by
`child.py`. A child of its own for each program keeps their memory, threads and libraries apart.
The child ends when its input does, so none survives the comparison.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

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
        options: keyword arguments, as JSON.
        threads: processor cores that the child may use; libraries are told the same number.
    """

    factory: str
    options: dict[str, Any]
    threads: int

    def to_json(self) -> str:
        """For the child's command line."""
        return json.dumps(dataclasses.asdict(self))


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


def _answer(side: Side, request: dict[str, Any]) -> Any:
    match request:
        case {"do": "score", "ids": ids, "out": out}:
            logits_TV = np.ascontiguousarray(side.score(np.asarray(ids, np.int32)), np.float32)
            # Written, not mapped: pages of the result would count as the program's memory.
            with Path(out).open("wb") as file:
                file.write(logits_TV.data)
            return list(logits_TV.shape)
        case {"do": "turn", "ids": ids, "prompt_tokens": prompt_tokens}:
            return timed_turn(side, np.asarray(ids, np.int32), prompt_tokens).to_json()
        case {"do": "facts"}:
            return side.facts()
    raise RuntimeError(f"the comparison asked for {request!r}")


def serve(spec: SideSpec, requests: IO[str], replies: IO[str]) -> None:
    """Loads a program, says what its process took before the model, and answers till the end."""

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        restrict_threads(spec.threads)
        module, _, name = spec.factory.partition(":")
        make = getattr(importlib.import_module(module), name)
        before = read_resident(os.getpid())
        began = time.perf_counter()
        side: Side = make(threads=spec.threads, **spec.options)
        reply(
            {
                "load_s": time.perf_counter() - began,
                "before_model": None if before is None else dataclasses.asdict(before),
            }
        )
        for line in requests:
            reply({"answer": _answer(side, json.loads(line))})
    except Exception as error:
        # Its name and text go to the parent, which raises the same; the rest is in the log.
        reply({"error": type(error).__name__, "text": str(error)})
        raise


def main(argv: list[str]) -> None:
    """The child: `argv[1]` is a `SideSpec` in JSON."""
    # Whatever a library prints goes to the log, not between our lines.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(SideSpec(**json.loads(argv[1])), sys.stdin, replies)


if __name__ == "__main__":
    main(sys.argv)
