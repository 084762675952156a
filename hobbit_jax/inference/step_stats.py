"""What the engine counts: per run, and per step of a generation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from hobbit_jax.cache.sharded_pool import ExpertPool
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
    """Cost of one decode or prefill step."""

    seconds: float
    compile_seconds: float  # of them
    tokens: int
    hits: int
    misses: int
    bytes_moved: int
    host_round_trips: int

    @classmethod
    def nothing(cls) -> StepStats:
        """Of a token whose cost stands at another."""
        return cls(0.0, 0.0, 0, 0, 0, 0, 0)


class Counted(Protocol):
    """What a meter reads: an engine."""

    pool: ExpertPool
    stats: EngineStats


class Meter:
    """What the engine did since the meter was made."""

    def __init__(self, engine: Counted):
        self._engine, self._before = engine, self._counts(engine)
        self._compiled, self._began = COMPILE_CLOCK.seconds, time.perf_counter()

    @staticmethod
    def _counts(engine: Counted) -> tuple[int, int, int, int]:
        stats = engine.pool.stats
        counts = int(stats.hits.sum()), int(stats.misses.sum()), stats.bytes_moved
        return *counts, engine.stats.host_round_trips

    def lap(self, tokens: int) -> StepStats:
        """The cost of `tokens` that were fed."""
        seconds, after = time.perf_counter() - self._began, self._counts(self._engine)
        return StepStats(
            seconds,
            COMPILE_CLOCK.seconds - self._compiled,
            tokens,
            *(b - a for a, b in zip(self._before, after, strict=True)),
        )
