"""What each way of serving misses costs and buys at equal bytes, measured in one run.

Owns the comparison of decode settings: every setting decodes the same forced tokens, in turns, so
that a busy machine slows all of them alike, and the ratio to the native cache at the same budget is
taken turn by turn.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.link import ProcessorTime, ThrottledLink
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool_sizing import LowShare
from hobbit_jax.cache.prefetch import PrefetchRule
from hobbit_jax.cache.sharded_pool import make_pool
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.logit_comparison import compare_logits
from hobbit_jax.evals.measure import Measurement, Turn, measure, timed_turn
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel
from hobbit_jax.statistics import spread

# Of a 12 GB card: Qwen3-30B-A3B at Q4_K_M reads 1.06 GB of active experts a token, 42 ms over a
# PCIe that carries 25 GB/s, beside some 5 ms of computation on an RTX 4070. Reckoned, not measured.
CARD_COPY_TO_COMPUTE = 8.0
# Of the logarithms of resident experts' scores (`CacheConfig`); the last substitutes what it can.
LIFTS = (0.5, 1.0, 2.0, 50.0)


@dataclass
class Decoded:
    """What one setting came to: its turns, its loss against native decode, and its pool."""

    measurement: Measurement
    kl_nats: float  # mean of the tokens that count
    top1_agreement: float
    residents: int  # (layer, expert) pairs with any copy on the device at the end
    pool_bytes: int

    def figures(self, native: Decoded) -> dict[str, Any]:
        """Per token; shares are 0-1, `speedup` is over `native`, turn by turn."""
        ours, theirs = self.measurement, native.measurement
        found = ours.counts
        assert found is not None  # every setting is an engine
        return {
            "resident_experts": self.residents,
            "resident_ratio": self.residents / native.residents,
            "pool_bytes": self.pool_bytes,
            **ours.counted_figures(),
            "kl_mean_nats": self.kl_nats,
            "top1_agreement": self.top1_agreement,
            "link_wait_ms_per_token": found.link_wait_s * 1e3 / ours.tokens,
            "decode_tokens_per_s": spread(ours.decode_tokens_per_s),
            "first_token_s": spread(ours.first_token_s),
            "speedup": spread(theirs.decode_s / ours.decode_s),
            "cpu_ms_per_token": spread(ours.decode_cpu_s * 1e3 * len(ours.turns) / ours.tokens),
            "cpu_speedup": spread(theirs.decode_cpu_s / ours.decode_cpu_s),
        }


def active_bytes(store: HostExperts) -> int:
    """Bytes of the native experts that one token uses."""
    return store.config.experts_per_token * sum(layer.expert_bytes for layer in store.precisions[0])


def card_link(
    model: LoadedModel, store: HostExperts, ids_RS: np.ndarray, prompt_tokens: int
) -> dict[str, float]:
    """A link that takes `CARD_COPY_TO_COMPUTE` times a token's computation for its experts.

    Args:
        model, store: the model, and its native experts.
        ids_RS: rows to decode with every expert resident, in processor time; the first warms up.
        prompt_tokens: of each row; prefilled, and not timed.

    Returns:
        `gb_s`, and what it is derived from: `resident_ms` of a token, `active_bytes`.
    """
    engine = Engine(model, store)
    engine.pool.load_all(0)
    program = EngineProgram(engine, ids_RS.shape[1])
    resident = functools.partial(timed_turn, program, clock=ProcessorTime())
    (found,) = measure({"resident": resident}, ids_RS, prompt_tokens).values()
    resident_ms = float(np.median(found.decode_s)) * 1e3 * len(found.turns) / found.tokens
    gb_s = active_bytes(store) / (CARD_COPY_TO_COMPUTE * resident_ms * 1e-3) / 1e9
    return {"gb_s": gb_s, "resident_ms": resident_ms, "active_bytes": active_bytes(store)}


def mode_settings(
    store: HostExperts, budget_bytes: int, low_shares: Iterable[LowShare]
) -> dict[str, CacheConfig]:
    """Native first; then the uniform rival, each mode at each split that differs, and the
    router raised toward what is resident."""
    listed = {
        "native": CacheConfig(budget_bytes),
        "uniform low": CacheConfig(budget_bytes, uniform_plan(store, 1)),
    }
    shares = list(low_shares)
    for name, mode in MISS_MODES.items():
        if mode.low_banks == "cache":
            for share in shares:
                listed[f"{name} {share}"] = CacheConfig(budget_bytes, mode=name, low_share=share)
        if mode.computes:
            listed[name] = CacheConfig(budget_bytes, mode=name)
    for lift in LIFTS:
        listed[f"residents first by {lift:g}"] = CacheConfig(budget_bytes, resident_lift=lift)
    if store.precision_bytes(1) <= budget_bytes:
        listed["floor"] = CacheConfig(budget_bytes, mode="floor")
    return listed


def prefetch_settings(store: HostExperts, budget_bytes: int) -> dict[str, CacheConfig]:
    """The native cache without prefetch, and with each predictor, at equal bytes.

    What is staged is taken off the pool: one expert, or as many as a token has in a layer.
    """
    k, expert_bytes = store.config.experts_per_token, store.largest_expert_bytes
    listed = {"prefetch off": CacheConfig(budget_bytes, staging_bytes=0)}
    tried = [
        (PrefetchRule("layer_ahead", 1), 1),
        (PrefetchRule("layer_ahead", 1), k),
        (PrefetchRule("layer_ahead", 2), k),
        (PrefetchRule("previous_token", 1), 1),
        (PrefetchRule("random", 1), 1),
    ]
    for rule, n_staged in tried:
        staging_bytes = n_staged * expert_bytes
        listed[f"{rule.predictor}, distance {rule.distance}, {n_staged} staged"] = CacheConfig(
            budget_bytes - staging_bytes, prefetch=rule, staging_bytes=staging_bytes
        )
    return listed


def compare(
    model: LoadedModel,
    store: HostExperts,
    settings: Iterable[CacheConfig],
    ids_RS: np.ndarray,
    prompt_tokens: int,
    link_gb_s: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[Decoded]:
    """Decodes rows of `ids_RS` [repeats + 1, S] under every setting, row by row in turns.

    Quality is against all-resident native decode of the same tokens, so what a mode costs is
    measured where it acts: with the residents that decode itself left behind.

    Args:
        model, store: what decodes, and its experts.
        settings: those to compare.
        ids_RS: int32.
        prompt_tokens: of each row; prefilled, and not timed.
        link_gb_s: of an emulated link, each setting's own, on which waits and processor time are
            counted; None copies as fast as can be and times by the wall clock.
        progress: called after each row of each setting.

    Returns:
        All-resident native decode first, then one of each setting.
    """
    counted = ProcessorTime()
    clock = time.perf_counter if link_gb_s is None else counted
    engines = [Engine(model, store)]
    engines[0].pool.load_all(0)
    for setting in settings:
        link = ThrottledLink(link_gb_s, clock=counted, sleep=counted.sleep) if link_gb_s else None
        engines.append(Engine(model, store, setting, functools.partial(make_pool, link=link)))
    programs = [EngineProgram(engine, ids_RS.shape[1]) for engine in engines]
    any_token_BT = np.zeros((1, 1), np.int32)  # its likelihood is not asked for
    kl_sums, agreed, waiting = [0.0] * len(programs), [0] * len(programs), len(programs)

    def after(row: int, _name: str, _turn: Turn) -> None:
        """When all have decoded a row, its logits are compared with native decode's."""
        nonlocal waiting
        progress()
        waiting -= 1
        if waiting:
            return
        waiting = len(programs)
        for i, program in enumerate(programs if row else ()):
            for ours_BV, native_BV in zip(program.logits_BV, programs[0].logits_BV, strict=True):
                compared = compare_logits(ours_BV[None], native_BV[None], any_token_BT)
                kl_sums[i] += float(compared.kl_BT[0, 0])
                agreed[i] += int(compared.agree_BT[0, 0])

    backends = {
        str(i): functools.partial(timed_turn, program, clock=clock)
        for i, program in enumerate(programs)
    }
    found = measure(backends, ids_RS, prompt_tokens, after=after).values()
    return [
        Decoded(
            measurement, kl_sum / measurement.tokens, agree / measurement.tokens,
            len({key[1:] for key in engine.pool.resident()}), engine.pool.device_bytes,
        )
        for measurement, kl_sum, agree, engine in zip(found, kl_sums, agreed, engines, strict=True)
    ]  # fmt: skip
