"""One decode at a real model's size: what it takes in time, in memory and in bytes moved.

Owns the run (open, load, prefill, decode token by token) and its record. The model is synthetic
(`synthetic/synthesize.py`): its routing is skewed and repeats itself as real routing does, its text
means nothing. *Own memory* is anonymous memory (`process_memory.py`): the pool, the dense part and
what programs allocate, without the pages of the mapped file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.measure import Measurement, Turn, timed_turn
from hobbit_jax.evals.process_memory import PeakWatch, read_resident
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.inference.compile_clock import COMPILE_CLOCK
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import load_model
from hobbit_jax.record import Benchmark, Record, machine, measured
from hobbit_jax.statistics import spread

STUDY = "scale"
SETTINGS = ("native", "uniform", *(name for name in MISS_MODES if name != "fetch"))


@dataclass(frozen=True)
class Run:
    """What is decoded. The second half of the tokens repeats one token, so misses become rare.

    Attributes:
        model: GGUF file; its low precision is made in the cache folder, once.
        budget_bytes: of the pool; None holds all that anyone may ask for.
        prompt_tokens: random ones.
        tokens: decoded after them.
        policy: of eviction.
        setting: "native", "uniform" (every expert at `low_format`), or a miss mode.
        low_format: of the low precision, for settings that have one.
        seed: of the tokens.
    """

    model: Path
    budget_bytes: int | None
    prompt_tokens: int
    tokens: int
    policy: str = "slru"
    setting: str = "native"
    low_format: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.tokens < 3:
            raise ValueError(f"tokens is {self.tokens}; want at least 3, as the first compiles")
        if self.setting not in SETTINGS:
            raise ValueError(f"setting is {self.setting!r}; want one of {', '.join(SETTINGS)}")
        mode = MISS_MODES.get(self.setting)
        needs_low = mode.low_banks != "none" if mode else self.setting == "uniform"
        if needs_low == (self.low_format is None):
            raise ValueError(f"setting {self.setting} with low_format {self.low_format}")

    @property
    def asked(self) -> Benchmark:
        """What identifies its record."""
        return Benchmark(STUDY, {**vars(self), "model": self.model.stem})


def decode_figures(turn: Turn) -> dict[str, Any]:
    """Figures over all tokens but the first, which compiles, and what a miss costs.

    CPU seconds are of all processors of the process; `cpu_ms_per_miss` and `cpu_ms_without_miss`
    are their least-squares line over misses, None where every token had as many.
    """
    warm = replace(
        turn, token_s=turn.token_s[1:], token_cpu_s=turn.token_cpu_s[1:], tokens=turn.tokens[1:]
    )
    seconds, cpu = np.array(warm.token_s), np.array(warm.token_cpu_s)
    misses = np.array([counts.misses for counts in warm.tokens])
    per_miss = without = None
    if np.ptp(misses):
        per_miss, without = (np.polyfit(misses, cpu, 1) * 1e3).tolist()
    return {
        **Measurement(1, (), (warm,)).counted_figures(),
        "decode_tokens_per_s": spread(1 / seconds),
        "decode_cpu_s_per_token": spread(cpu),
        "misses_per_token": spread(misses),
        "cpu_ms_without_miss": without,
        "cpu_ms_per_miss": per_miss,
        "token_s": turn.token_s,
        "token_cpu_s": turn.token_cpu_s,
        "token_counts": [vars(counts) for counts in turn.tokens],
    }


def measure(run: Run, progress: Callable[[str], object] = lambda stage: None) -> Record:
    """Opens, loads, prefills and decodes.

    Args:
        run: what.
        progress: called with the name of each stage, and for every token.

    Raises:
        ValueError: a budget that is too small.
        NotImplementedError: not on Linux.
    """
    if read_resident(os.getpid()) is None:
        raise NotImplementedError("own memory is read from /proc, which Linux has")
    here = machine()  # now: the checkout may be another by the end
    began, compiled_s, memory = time.monotonic(), COMPILE_CLOCK.seconds, PeakWatch(os.getpid())
    progress("load")
    model = load_model(run.model)
    load_s = time.monotonic() - began
    low = []
    if run.low_format is not None:
        progress("low precision")
        spec = LowPrecisionSpec(run.low_format)
        low.append(open_low_precision(model.file, model.config, spec, low_precision_folder()))
    store = HostExperts(model.config, model.file, low)
    plan = uniform_plan(store, LOW if run.setting == "uniform" else NATIVE)
    mode = run.setting if run.setting in MISS_MODES else "fetch"
    progress("pool")
    engine = Engine(model, store, CacheConfig(run.budget_bytes, plan, run.policy, mode))
    jax.block_until_ready(engine.pool.banks)
    rng = np.random.default_rng(run.seed)
    ids_S = rng.integers(0, model.config.vocab_size, run.prompt_tokens + run.tokens)
    ids_S[run.prompt_tokens + run.tokens // 2 :] = ids_S[-1]
    program = EngineProgram(engine, len(ids_S))
    turn = timed_turn(program, ids_S, run.prompt_tokens, progress=lambda: progress("decode"))
    progress("prefill again")  # a second sequence of the same prompt: nothing is left to compile
    again = timed_turn(program, ids_S[: run.prompt_tokens], run.prompt_tokens)
    peak = memory.stop()
    assert peak is not None  # it could be read before
    figures = {
        "model_bytes": model.file.file_bytes,
        "model_expert_bytes": store.precision_bytes(NATIVE),
        "dense_device_bytes": model.dense_device_bytes,
        "pool_device_bytes": engine.pool.device_bytes,
        "slots": {str(signature): n for signature, n in engine.pool.slots.items()},
        "slots_total": sum(engine.pool.slots.values()),
        "load_s": load_s,
        "compile_s": COMPILE_CLOCK.seconds - compiled_s,
        "first_token_s": turn.first_token_s,
        "prefill_tokens_per_s": run.prompt_tokens / again.first_token_s,
        **decode_figures(turn),
        "own_memory_peak_bytes": peak.anonymous,
        "own_memory_beyond_budget_bytes": peak.anonymous - engine.pool.budget_bytes,
        "load_average": os.getloadavg(),
    }
    return Record(
        STUDY, run.asked, **vars(measured(figures)), **here, seconds=time.monotonic() - began
    )
