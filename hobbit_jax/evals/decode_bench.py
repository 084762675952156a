"""What each way of serving misses costs and buys at equal bytes, measured in one run.

Owns the comparison of decode settings: every setting decodes the same forced tokens, in turns, so
that a busy machine slows all of them alike, and the ratio to the native cache at the same budget is
taken turn by turn. Also owns the engine's yardstick, decode without any cache: the same layers with
every expert resident and addressed directly.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.cache.link import PacedLink, ProcessorTime
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, LowShare
from hobbit_jax.cache.prefetch import PrefetchRule
from hobbit_jax.cache.promotion import DEFAULT_PROMOTION, PromotionRule
from hobbit_jax.experts.precision import PrecisionPlan, uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import LoadedModel
from hobbit_jax.model.modules import KVCache, attend
from hobbit_jax.statistics import spread
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.reference import Work

# Of a 12 GB card: Qwen3-30B-A3B at Q4_K_M reads 1.06 GB of active experts a token, 42 ms over a
# PCIe that carries 25 GB/s, beside some 5 ms of computation on an RTX 4070. Reckoned, not measured.
CARD_COPY_TO_COMPUTE = 8.0


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
    ahead_bytes: int = 0
    dropped_bytes: int = 0
    wait_s: float = 0.0

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
            "ahead_bytes_per_token": self.ahead_bytes / self.tokens,
            "ahead_used_share": (
                1 - self.dropped_bytes / self.ahead_bytes if self.ahead_bytes else None
            ),
            "link_wait_ms_per_token": self.wait_s * 1e3 / self.tokens,
            "tokens_per_second": spread(rates),
            "speedup": spread(speedups),
            "cpu_ms_per_token": spread(cpu_ms),
            "cpu_speedup": spread(np.asarray(native.cpu_seconds) / np.asarray(self.cpu_seconds)),
        }


def active_bytes(store: HostExperts) -> int:
    """Bytes of the native experts that one token uses."""
    return store.config.experts_per_token * sum(layer.expert_bytes for layer in store.tiers[0])


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
    turns = [_turn(engine, ids_S, prompt_tokens, ProcessorTime()) for ids_S in ids_RS]
    decoded = ids_RS.shape[1] - prompt_tokens
    resident_ms = float(np.median([seconds for seconds, *_ in turns[1:]])) * 1e3 / decoded
    gb_s = active_bytes(store) / (CARD_COPY_TO_COMPUTE * resident_ms * 1e-3) / 1e9
    return {"gb_s": gb_s, "resident_ms": resident_ms, "active_bytes": active_bytes(store)}


def mode_settings(
    store: HostExperts, budget_bytes: int, low_shares: Iterable[LowShare]
) -> list[Setting]:
    """Native first; then the uniform rival, and each mode at each split that differs."""
    listed, shares = [Setting("native", "wait", budget_bytes)], list(low_shares)
    listed.append(Setting("uniform low", "wait", budget_bytes, plan=uniform_plan(store, 1)))
    for name, mode in MISS_MODES.items():
        if mode.low_banks == "cache":
            listed += [
                Setting(f"{name} {share}", name, budget_bytes, low_share=share) for share in shares
            ]
    if store.tier_bytes(1) <= budget_bytes:
        listed.append(Setting("floor", "floor", budget_bytes))
    return listed


def prefetch_settings(store: HostExperts, budget_bytes: int) -> list[Setting]:
    """The native cache without prefetch, and with each predictor, at equal bytes.

    What is staged is taken off the pool: one expert, or as many as a token has in a layer.
    """
    k, expert_bytes = store.config.experts_per_token, store.largest_expert_bytes
    listed = [Setting("prefetch off", "wait", budget_bytes, options={"staging_bytes": 0})]
    tried = [
        (PrefetchRule("layer_ahead", 1), 1),
        (PrefetchRule("layer_ahead", 1), k),
        (PrefetchRule("layer_ahead", 2), k),
        (PrefetchRule("previous_token", 1), 1),
        (PrefetchRule("random", 1), 1),
    ]
    for rule, n_staged in tried:
        name = f"{rule.predictor}, distance {rule.distance}, {n_staged} staged"
        staging_bytes = n_staged * expert_bytes
        options = {"staging_bytes": staging_bytes, "prefetch": rule}
        listed.append(Setting(name, "wait", budget_bytes - staging_bytes, options=options))
    return listed


@jax.jit
def _compare(logits_V: jax.Array, native_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_q_V, log_p_V = jax.nn.log_softmax(logits_V), jax.nn.log_softmax(native_V)
    kl = jnp.sum(jnp.exp(log_p_V) * (log_p_V - log_q_V))
    return kl, jnp.argmax(logits_V) == jnp.argmax(native_V)


def _turn(
    engine: Engine, ids_S: np.ndarray, prompt_tokens: int, clock: Callable[[], float]
) -> tuple[float, float, list[jax.Array]]:
    """Seconds by `clock`, and of the processor, to decode a row after its prompt; its logits.

    On a CPU that others use too, processor time is the steadier of the two.
    """
    engine.start(1, len(ids_S))
    engine.prefill([ids_S[:prompt_tokens].tolist()])
    engine.pool.reset_stats()
    engine.reset_stats()
    began, cpu_began, logits = clock(), time.process_time(), []
    for token in ids_S[prompt_tokens:]:
        logits.append(engine.decode(np.asarray([token])))
    jax.block_until_ready(logits[-1])
    return clock() - began, time.process_time() - cpu_began, logits


def compare(
    model: LoadedModel,
    store: HostExperts,
    settings: Sequence[Setting],
    ids_RS: np.ndarray,
    prompt_tokens: int,
    link_gb_s: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[Measured]:
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
    engines += [
        Engine(
            model, store, s.budget_bytes, s.plan, mode=s.mode, low_share=s.low_share,
            promotion=s.promotion, **s.options,
            link=PacedLink(link_gb_s, clock=counted, sleep=counted.sleep) if link_gb_s else None,
        )
        for s in settings
    ]  # fmt: skip
    results = [Measured() for _ in engines]
    for row, ids_S in enumerate(ids_RS):
        native_logits: list[jax.Array] = []
        for engine, result in zip(engines, results, strict=True):
            seconds, cpu_seconds, logits = _turn(engine, ids_S, prompt_tokens, clock)
            native_logits = native_logits or logits
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
            result.ahead_bytes += pool.stats.ahead_bytes
            result.dropped_bytes += pool.stats.dropped_bytes
            result.wait_s += pool.stats.wait_s
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
        "cached_ms": spread(ours_ms),
        "uncached_ms": spread(theirs_ms),
        "ratio": spread(ratio),
        "ratio_of_medians": float(np.median(ours_ms) / np.median(theirs_ms)),
    }
