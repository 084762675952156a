"""How long this process has spent compiling, so that a rate can be told without it.

JAX's events nest (a program within a program), so what counts is the time that any of them covers.
"""

import functools
from typing import Any

import jax

_SPANS: list[tuple[float, float]] = []


def _hear(event: str, start_time: float, end_time: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile/"):
        _SPANS.append((start_time, end_time))


@functools.lru_cache(maxsize=1)
def _covered_s(count: int) -> float:
    total, covered = 0.0, 0.0
    for start, end in sorted(_SPANS[:count]):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def compile_seconds() -> float:
    """Spent so far; never less than before."""
    return _covered_s(len(_SPANS))


jax.monitoring.register_event_time_span_listener(_hear)
