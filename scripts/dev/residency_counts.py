"""What promotion, the pool's division and a warm start come to, in counts that no other load moves.

Owns which settings are compared and how their tables read; decoding is `decode_bench.py`'s. Every
comparison is at equal pool bytes and decodes the same forced tokens. A warm start is judged on cold
engines, since the cache soon forgets how it began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hobbit_jax import markdown
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool_sizing import ADAPTIVE, CANDIDATE_SHARES, LowShare
from hobbit_jax.cache.promotion import PromotionRule
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.evals.decode_bench import Decoded
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.measure import Counts
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import LoadedModel

MARGINS = (0.0, 1.0, 1.5, 2.0, 4.0)
SHARES: tuple[LowShare, ...] = (*CANDIDATE_SHARES[1::2], ADAPTIVE)
PIN_SHARES = (0.0, 0.5)
FIRST_TOKENS = (1, 16)


def promotion_settings(store: HostExperts, budget_bytes: int) -> Iterator[tuple[str, CacheConfig]]:
    """Each mode that promotes and fits, with the newcomer's margin over whom it would evict."""
    for name, mode in MISS_MODES.items():
        if mode.promotes and (mode.low_banks != "all" or store.precision_bytes(1) < budget_bytes):
            for margin in MARGINS:
                yield (
                    f"{name}, margin {margin:g}",
                    CacheConfig(
                        budget_bytes,
                        mode=name,
                        low_share=0.8,
                        promotion=PromotionRule(margin=margin),
                    ),
                )


def split_settings(budget_bytes: int) -> Iterator[tuple[str, CacheConfig]]:
    """Each mode whose low copies share the pool, under fixed shares and the adaptive one."""
    for name, mode in MISS_MODES.items():
        if mode.low_banks == "cache":
            for share in SHARES:
                yield f"{name}, {share}", CacheConfig(budget_bytes, mode=name, low_share=share)


def counts(decoded: Decoded) -> dict[str, Any]:
    """One setting's figures per token, without any that depends on the machine's speed."""
    found = decoded.measurement.counted_figures()
    return {
        "resident_experts": decoded.residents,
        "hit_rate": found["hit_rate"],
        "bytes_moved_per_token": found["bytes_moved_per_token"],
        "exits_per_token": found["host_round_trips_per_token"],
        "degraded_fraction": found["demoted_selection_share"],
        "skipped_fraction": found["skipped_share"],
        "kl_nats": decoded.kl_nats,
    }


def warm_starts(
    profiles: Mapping[str, np.ndarray], seeds: Sequence[int]
) -> Iterator[tuple[str, WarmStart | None]]:
    """A cold start, one by each profile with and without pins, and as many by random profiles.

    Args:
        profiles: uses [L, E] by the name of their text.
        seeds: of the random control, which orders all (layer, expert) pairs by lot.
    """
    yield "cold", None
    drawn = dict(profiles)
    for seed in seeds:
        shape = next(iter(profiles.values())).shape
        drawn[f"random, seed {seed}"] = np.random.default_rng(seed).random(shape)
    for name, uses_LE in drawn.items():
        for pin_share in PIN_SHARES:
            pinned = f", {pin_share:.0%} of the slots pinned" if pin_share else ""
            yield f"{name}{pinned}", WarmStart(uses_LE, pin_share)


def first_misses(
    model: LoadedModel,
    store: HostExperts,
    budget_bytes: int,
    warm: WarmStart | None,
    ids_RS: np.ndarray,
) -> dict[str, Any]:
    """Misses of a text's first tokens, decoded one by one on an engine that has just started.

    Args:
        model, store: the model and its native experts.
        budget_bytes: of the pool.
        warm: what is resident before the first token.
        ids_RS: int32 rows, each on an engine of its own; of the first token, of the first sixteen,
            and of all S.

    Returns:
        Mean misses over rows by number of tokens, and the hit rate over all.
    """
    missed_RS = np.zeros(ids_RS.shape)
    total = Counts()
    for row, ids_S in enumerate(ids_RS):
        engine = Engine(model, store, CacheConfig(budget_bytes, warm=warm))
        engine.start(1, len(ids_S))
        program, done = EngineProgram(engine, len(ids_S)), Counts()
        before = program.counts()
        for position, token in enumerate(ids_S):
            program.decode(int(token))
            done = program.counts() - before
            missed_RS[row, position] = done.misses
        total += done
    first = {f"misses_of_first_{n}": float(missed_RS[:, n - 1].mean()) for n in FIRST_TOKENS}
    return {**first, "hit_rate": 1 - total.misses / total.uses}


def counts_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown for rows of `counts` with `text`, `budget_mib` and `setting`."""
    head = ["text", "MiB", "setting", "residents", "hit rate", "MB a token", "round trips a token"]
    lines = [
        [
            row["text"],
            f"{row['budget_mib']:g}",
            row["setting"],
            row["resident_experts"],
            f"{row['hit_rate']:.3f}",
            f"{row['bytes_moved_per_token'] / 1e6:.3f}",
            f"{row['exits_per_token']:.2f}",
            f"{row['degraded_fraction']:.3f}",
            f"{row['kl_nats']:.4f}",
        ]
        for row in rows
    ]
    return markdown.table([*head, "degraded", "KL"], lines)


def warm_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown for rows of `first_misses` with `text`, `budget_mib` and `setting`."""
    head = ["text", "MiB", "profile of", *(f"misses of the first {n}" for n in FIRST_TOKENS)]
    lines = [
        [
            row["text"],
            f"{row['budget_mib']:g}",
            row["setting"],
            *(f"{row[f'misses_of_first_{n}']:.1f}" for n in FIRST_TOKENS),
            f"{row['hit_rate']:.3f}",
        ]
        for row in rows
    ]
    return markdown.table([*head, "hit rate"], lines)
