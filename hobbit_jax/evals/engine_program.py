"""Our engine as a program that `measure.py` can time: what its counters and its pool say.

Settings are compared one after the other, so that one pool is on the device at a time. Logits are
the same bits at every budget, so native decode at any budget is the reference.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from hobbit_jax import reference
from hobbit_jax.cache.counts import Counts
from hobbit_jax.evals.logit_comparison import compare_logits, summarize
from hobbit_jax.evals.measure import Clock, Measurement, Turn, measure, timed_turn
from hobbit_jax.evals.process_memory import PeakWatch
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.inference.compile_clock import compile_seconds
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel
from hobbit_jax.statistics import spread


class EngineProgram:
    """Our engine as a `Program`; a sequence has room for `context` tokens."""

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
    """`measure` of an engine alone; its pool stays as the last row leaves it.

    Returns:
        The measurement, and the logits of each row that counts, float32 [tokens, V].
    """
    program = EngineProgram(engine, ids_RS.shape[1])
    logits: list[np.ndarray] = []

    def turn(ids_S: np.ndarray, prompt_tokens: int) -> Turn:
        timed = timed_turn(program, ids_S, prompt_tokens, clock)
        logits.append(np.concatenate([np.asarray(token_BV) for token_BV in program.logits_BV]))
        return timed

    (found,) = measure({"ours": turn}, ids_RS, prompt_tokens).values()
    return found, logits[1:]


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


@dataclass(frozen=True)
class Decoded:
    """What a setting came to."""

    measurement: Measurement  # its turns
    logits: list[np.ndarray]  # of each row that counts, float32 [tokens, V]
    figures: dict[str, Any]  # of a record, but for those that compare

    def beside(self, native: "Decoded") -> dict[str, Any]:
        """The comparing figures: `speedup` row by row, and KL in nats a token to native logits."""
        any_token_1T = np.zeros((1, len(self.logits[0])), np.int32)  # likelihoods are not asked for
        lost = summarize(
            [
                compare_logits(ours_TV[None], native_TV[None], any_token_1T)
                for ours_TV, native_TV in zip(self.logits, native.logits, strict=True)
            ]
        )
        return {
            "kl_mean_nats": lost.kl_mean_nats,
            "top1_agreement": lost.top1_agreement,
            "speedup": spread(native.measurement.decode_s / self.measurement.decode_s),
        }


def decode(
    make_engine: Callable[[], Engine], ids_RS: np.ndarray, prompt_tokens: int, clock: Clock
) -> Decoded:
    """`measure` of an engine that is made for it.

    `own_memory_peak_bytes` is the process's anonymous memory (the pool, the dense part and what
    programs allocate on a CPU, without the pages of the mapped file), None where it is not told.
    """
    gc.collect()  # the pool of the setting before, if anything refers to itself
    memory, compiled_s = PeakWatch(os.getpid()), compile_seconds()
    try:
        engine = make_engine()
        measurement, logits = measure_engine(engine, ids_RS, prompt_tokens, clock)
    finally:
        peak = memory.stop()
    figures = {
        **measurement.figures(),
        **pool_figures(engine),
        "compile_s": compile_seconds() - compiled_s,
        "own_memory_peak_bytes": peak and peak.anonymous,
    }
    return Decoded(measurement, logits, figures)


def token_rows(model: LoadedModel, rows: int, tokens: int, made_up: bool) -> np.ndarray:
    """Rows of token ids, int32 [rows, tokens]: of the held-out text, or random ones.

    Raises:
        ValueError: the text is too short for so many.
    """
    if made_up:
        rng = np.random.default_rng(0)
        return rng.integers(0, model.config.vocab_size, (rows, tokens), np.int32)
    texts = reference.held_out_texts("evaluation")
    return cut_windows(model.tokenizer(), texts, rows, tokens - 1, seed=1).ids_WS
