"""Our engine as a program that `measure.py` can time: what its counters and its pool say."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from hobbit_jax.cache.counts import Counts
from hobbit_jax.evals.measure import Clock, Measurement, measure, timed_turn
from hobbit_jax.inference.engine import Engine


class EngineProgram:
    """Our engine as a `Program`.

    Args:
        engine: what decodes.
        context: tokens that a sequence has room for.
    """

    def __init__(self, engine: Engine, context: int):
        self.engine, self.context = engine, context
        self.logits_BV: list[jax.Array] = []  # of each token since the last prefill, B = 1

    def prefill(self, ids_T: np.ndarray) -> int:
        """See `Program.prefill`."""
        self.logits_BV = []
        self.engine.start(1, self.context)
        return int(np.asarray(self.engine.prefill([ids_T.tolist()])).argmax())

    def decode(self, token: int) -> int:
        """See `Program.decode`."""
        logits_BV = self.engine.decode(np.asarray([token]))
        self.logits_BV.append(logits_BV)
        return int(np.asarray(logits_BV).argmax())

    def counts(self) -> Counts:
        """See `Program.counts`."""
        return replace(self.engine.counts)


def measure_engine(
    engine: Engine, ids_RS: np.ndarray, prompt_tokens: int, clock: Clock = time.perf_counter
) -> tuple[Measurement, list[np.ndarray]]:
    """Decodes rows with an engine alone; the first warms up.

    Args:
        engine: its pool stays as the last row leaves it.
        ids_RS: int32 [repeats + 1, prompt and decoded tokens].
        prompt_tokens: of each row, prefilled.
        clock: of the turns.

    Returns:
        The measurement, and the logits of each row that counts, float32 [tokens, V].
    """
    program = EngineProgram(engine, ids_RS.shape[1])
    logits: list[np.ndarray] = []

    def keep(row: int, _name: str, _turn: object) -> None:
        if row:
            logits.append(np.concatenate([np.asarray(token_BV) for token_BV in program.logits_BV]))

    turn = functools.partial(timed_turn, program, clock=clock)
    (found,) = measure({"ours": turn}, ids_RS, prompt_tokens, after=keep).values()
    return found, logits


def pool_figures(engine: Engine) -> dict[str, Any]:
    """What an engine has on each device, for its record; bytes, slots by bank, and pairs of
    layer and expert with any copy there."""
    pool = engine.pool
    return {
        "pool_budget_bytes": pool.budget_bytes,
        "pool_device_bytes": pool.device_bytes,
        "slots": {str(signature): n for signature, n in pool.slots.items()},
        "slots_total": sum(pool.slots.values()),
        "resident_experts": len({(key.layer, key.expert) for key in pool.resident()}),
        "dense_device_bytes": engine.model.dense_device_bytes,
        "kv_cache_bytes": engine.kv_cache_bytes,
    }
