"""What the engine counts: per run, and per step of a generation."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hobbit_jax.inference.compile_clock import COMPILE_CLOCK


@dataclass
class EngineStats:
    """Counts since the last `reset_stats`; selections are those of real tokens, not padding."""

    decoded_tokens: int = 0
    host_round_trips: int = 0  # times that decode left the device because an expert was missing
    selections: int = 0
    degraded: int = 0  # served below the precision that the plan asked for
    skipped: int = 0  # asked for and not served at all


@dataclass(frozen=True)
class StepStats:
    """Cost of one decode or prefill step; of a token whose cost stands at another, nothing."""

    seconds: float = 0.0
    compile_seconds: float = 0.0  # of them
    tokens: int = 0


class Meter:
    """What the process did since the meter was made."""

    def __init__(self):
        self._compiled, self._began = COMPILE_CLOCK.seconds, time.perf_counter()

    def lap(self, tokens: int) -> StepStats:
        """The cost of `tokens` that were fed."""
        seconds = time.perf_counter() - self._began
        return StepStats(seconds, COMPILE_CLOCK.seconds - self._compiled, tokens)
