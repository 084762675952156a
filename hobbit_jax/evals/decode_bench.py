"""What each way of serving misses costs and buys at equal bytes, measured in one run.

Owns the comparison of decode settings: every setting decodes the same forced tokens, in turns, so
that a busy machine slows all of them alike, and the ratio to the native cache at the same budget is
taken turn by turn. Called by `scripts/bench_decode.py`. Also owns the engine's yardstick, decode
without any cache: the same layers with every expert resident and addressed directly.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.cache.promotion import DEFAULT_PROMOTION, PromotionRule
from hobbit_jax.engine import Engine
from hobbit_jax.loading import LoadedModel
from hobbit_jax.model import KVCache, attend
from hobbit_jax.pool_sizing import DEFAULT_LOW_SHARE, LowShare
from hobbit_jax.precision import PrecisionPlan
from hobbit_jax.store import HostExperts
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.reference import Work


@dataclass(frozen=True)
class Setting:
    """One way of decoding under one budget."""

    name: str
    mode: str
    budget_bytes: int | None
    low_share: LowShare = DEFAULT_LOW_SHARE
    promotion: PromotionRule = DEFAULT_PROMOTION
    plan: PrecisionPlan | None = None
    options: dict[str, Any] = field(default_factory=dict)  # further ones of `Engine`


@dataclass
class Measured:
    """One setting's counts and times; the first turn warms up and is in neither."""

    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of the whole process
    hits: int = 0
    uses: int = 0
    bytes_moved: int = 0
    exits: int = 0
    degraded: int = 0
    skipped: int = 0
    selections: int = 0
    kl_sum: float = 0.0
    agree: int = 0
    residents: int = 0
    device_bytes: int = 0

    def row(self, native: Measured) -> dict[str, Any]:
        """As figures per token; fractions are 0-1, `speedup` is over `native`, turn by turn."""
        rates = self.tokens / len(self.seconds) / np.asarray(self.seconds)
        speedups = np.asarray(native.seconds) / np.asarray(self.seconds)
        cpu_ms = np.asarray(self.cpu_seconds) * 1e3 * len(self.seconds) / self.tokens
        return {
            "resident_experts": self.residents,
            "resident_ratio": self.residents / native.residents,
            "pool_bytes": self.device_bytes,
            "hit_rate": self.hits / self.uses,
            "bytes_moved_per_token": self.bytes_moved / self.tokens,
            "exits_per_token": self.exits / self.tokens,
            "degraded_fraction": self.degraded / self.selections,
            "skipped_fraction": self.skipped / self.selections,
            "kl_nats": self.kl_sum / self.tokens,
            "top1_agreement": self.agree / self.tokens,
            "tokens_per_second": _spread(rates),
            "speedup": _spread(speedups),
            "cpu_ms_per_token": _spread(cpu_ms),
            "cpu_speedup": _spread(np.asarray(native.cpu_seconds) / np.asarray(self.cpu_seconds)),
        }


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "quartile_low": float(low), "quartile_high": float(high)}


@jax.jit
def _compare(logits_V: jax.Array, native_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_q_V, log_p_V = jax.nn.log_softmax(logits_V), jax.nn.log_softmax(native_V)
    kl = jnp.sum(jnp.exp(log_p_V) * (log_p_V - log_q_V))
    return kl, jnp.argmax(logits_V) == jnp.argmax(native_V)


def _turn(
    engine: Engine, ids_S: np.ndarray, prompt_tokens: int
) -> tuple[float, float, list[jax.Array]]:
    """Seconds and processor seconds to decode a row after its prompt; each token's logits.

    On a CPU that others use too, processor time is the steadier of the two.
    """
    engine.start(1, len(ids_S))
    engine.prefill([ids_S[:prompt_tokens].tolist()])
    engine.pool.reset_stats()
    engine.reset_stats()
    began, cpu_began, logits = time.perf_counter(), time.process_time(), []
    for token in ids_S[prompt_tokens:]:
        logits.append(engine.decode(np.asarray([token])))
    jax.block_until_ready(logits[-1])
    return time.perf_counter() - began, time.process_time() - cpu_began, logits


def compare(
    model: LoadedModel,
    store: HostExperts,
    settings: Sequence[Setting],
    ids_RS: np.ndarray,
    prompt_tokens: int,
    progress: Callable[[], object] = lambda: None,
) -> list[Measured]:
    """Decodes rows of `ids_RS` [repeats + 1, S] under every setting, row by row in turns.

    Quality is against all-resident native decode of the same tokens, so what a mode costs is
    measured where it acts: with the residents that decode itself left behind.
    """
    native = Engine(model, store)
    engines = [
        Engine(
            model, store, s.budget_bytes, s.plan, mode=s.mode, low_share=s.low_share,
            promotion=s.promotion, **s.options,
        )
        for s in settings
    ]  # fmt: skip
    results = [Measured() for _ in settings]
    for row, ids_S in enumerate(ids_RS):
        *_, native_logits = _turn(native, ids_S, prompt_tokens)
        for engine, result in zip(engines, results, strict=True):
            seconds, cpu_seconds, logits = _turn(engine, ids_S, prompt_tokens)
            progress()
            if row == 0:
                continue
            pool, stats = engine.pool, engine.stats
            result.seconds.append(seconds)
            result.cpu_seconds.append(cpu_seconds)
            result.tokens += len(logits)
            result.hits += int(pool.stats.hits.sum())
            result.uses += int(pool.stats.hits.sum() + pool.stats.misses.sum())
            result.bytes_moved += pool.stats.bytes_moved
            result.exits += stats.exits
            result.degraded += stats.degraded
            result.skipped += stats.skipped
            result.selections += stats.selections
            for ours_BV, native_BV in zip(logits, native_logits, strict=True):
                kl, agree = _compare(ours_BV[0], native_BV[0])
                result.kl_sum += float(kl)
                result.agree += int(agree)
            result.residents = len({key[1:] for key in pool.resident()})
            result.device_bytes = pool.device_bytes
    return results


def uncached_decode(engine: Engine) -> Callable[[KVCache, int, int], tuple[jax.Array, KVCache]]:
    """Decode of one token of one sequence with `engine`'s weights and resident experts.

    No slot table, no lookup, no log and no host: expert e of a layer lies in slot e past the
    layer's first, which an engine that loaded each bank in order of the layers guarantees.

    Raises:
        ValueError: the experts of `engine` do not lie so.
    """
    model, pool, config = engine.model, engine.pool, engine.config
    first_L = []
    for layer in range(config.n_layers):
        slots = [int(pool.table_UE[layer, e]) for e in range(config.n_experts)]
        if slots != list(range(slots[0], slots[0] + config.n_experts)) or slots[0] < 0:
            raise ValueError(f"layer {layer}'s experts are in slots {slots}; want them in order")
        first_L.append(slots[0])
    signature_L = [engine.store.layer(0, layer).signature for layer in range(config.n_layers)]
    signatures = list(dict.fromkeys(signature_L))
    ends_graph, ends_state = nnx.split(model.ends)
    kinds, k = model.layers.kinds, config.experts_per_token
    implementation = model.implementation or "xla"

    def step(states, ends_state, banks, caches: KVCache, token: jax.Array, position: jax.Array):
        ends = nnx.merge(ends_graph, ends_state)
        positions_11 = position.reshape(1, 1)

        def layer_step(layer: jax.Array, carry):
            x_BTD, caches = carry
            q, key, value = kinds.at(states, layer, lambda b, x: b.project(x, positions_11), x_BTD)
            caches = caches.append(layer, positions_11, key, value)
            mixed = attend(q, caches.k_LBCGd[layer], caches.v_LBCGd[layer], positions_11)

            def route(block, x_BTD, mixed):
                x_BTD, h_BTD = block.add_attention(x_BTD, mixed)
                return x_BTD, h_BTD[0], block.route(h_BTD[0])

            x_BTD, h_TD, routing = kinds.at(states, layer, route, x_BTD, mixed)
            slot_K = jnp.asarray(first_L, jnp.int32)[layer] + routing.ids[0]
            work = Work(slot_K, jnp.arange(k, dtype=jnp.int32)[:, None], jnp.int32(k))

            def run(signature):
                return lambda y_KD: expert_ffn(
                    h_TD, y_KD, routing.weights[0], banks[signature], signature, work,
                    implementation,
                )  # fmt: skip

            which = jnp.asarray([signatures.index(s) for s in signature_L], jnp.int32)[layer]
            y_KD = jnp.zeros((k, config.d_model))
            y_KD = jax.lax.switch(which, [run(signature) for signature in signatures], y_KD)
            return x_BTD + jnp.sum(y_KD, axis=0), caches

        x_BTD = ends.embed(token.reshape(1, 1))
        x_BTD, caches = jax.lax.fori_loop(0, config.n_layers, layer_step, (x_BTD, caches))
        return ends.logits(x_BTD[:, 0]), caches

    program = jax.jit(step, donate_argnums=3)
    fixed = functools.partial(program, model.layers.states, ends_state, pool.banks)
    return lambda caches, token, position: fixed(caches, np.int32(token), np.int32(position))


def cache_overhead(
    model: LoadedModel, store: HostExperts, ids_S: np.ndarray, repeats: int
) -> dict[str, Any]:
    """All-resident decode through the engine against decode without a cache, token by token.

    Returns:
        Milliseconds per token of both, and the median ratio with its quartiles.
    """
    engine = Engine(model, store)
    engine.pool.load_all(0)
    uncached = uncached_decode(engine)
    ours_ms, theirs_ms = [], []
    for repeat in range(repeats + 1):
        engine.start(1, len(ids_S))
        shape = (engine.config.n_layers, 1, len(ids_S))
        shape += (engine.config.n_kv_heads, engine.config.head_dim)
        caches = KVCache(jnp.zeros(shape), jnp.zeros(shape))
        for position, token in enumerate(ids_S):
            began = time.perf_counter()
            logits_BV = jax.block_until_ready(engine.decode(np.asarray([token])))
            between = time.perf_counter()
            wanted_BV, caches = jax.block_until_ready(uncached(caches, token, position))
            ended = time.perf_counter()
            if repeat == 0:
                np.testing.assert_allclose(logits_BV, wanted_BV, atol=1e-4)
            else:
                ours_ms.append((between - began) * 1e3)
                theirs_ms.append((ended - between) * 1e3)
    ratio = np.asarray(ours_ms) / np.asarray(theirs_ms)
    return {
        "tokens": len(ours_ms),
        "cached_ms": _spread(np.asarray(ours_ms)),
        "uncached_ms": _spread(np.asarray(theirs_ms)),
        "ratio": _spread(ratio),
        "ratio_of_medians": float(np.median(ours_ms) / np.median(theirs_ms)),
    }
