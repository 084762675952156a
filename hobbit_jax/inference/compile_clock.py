"""How long this process has spent compiling, so that a rate can be told without it.

JAX's events nest (a program within a program), so what counts is the time that any of them covers.
"""

from __future__ import annotations

from typing import Any

import jax

_PREFIX = "/jax/core/compile/"


class CompileClock:
    """The seconds that the events heard so far cover."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []
        self._summed, self._seconds = 0, 0.0

    def hear(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        """Listens to JAX's time spans; takes those of compilation."""
        if event.startswith(_PREFIX):
            self._spans.append((start_time, end_time))

    @property
    def seconds(self) -> float:
        """Spent so far; never less than before."""
        if self._summed < len(self._spans):
            total, covered = 0.0, 0.0
            for start, end in sorted(self._spans):
                total += max(0.0, end - max(start, covered))
                covered = max(covered, end)
            self._summed, self._seconds = len(self._spans), total
        return self._seconds


# Of the process, as JAX's caches of compiled programs are.
COMPILE_CLOCK = CompileClock()
jax.monitoring.register_event_time_span_listener(COMPILE_CLOCK.hear)
