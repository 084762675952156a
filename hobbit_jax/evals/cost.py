"""What decode costs under a plan and a budget: hits, bytes moved, tokens per second.

Owns the decode measurement. Tokens are forced to real held-out text, so every plan meets the same
text and routing differs only through the plan itself. The first window warms pool and compiled
programs and is not counted; each further window is one repeat.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import numpy as np

from hobbit_jax.experts.store import NATIVE
from hobbit_jax.inference.engine import Engine
from hobbit_jax.statistics import Interval


@dataclass(frozen=True)
class DecodeCost:
    """Counts over all repeats; tokens per second as the median repeat with its range.

    `hit_rate`, `degraded_fraction` are 0-1 over expert uses, `skipped_fraction` over selections;
    bytes and exits are per decoded token. `first_token_s` is the median time of a warm prefill.
    """

    tokens: int
    hit_rate: float
    degraded_fraction: float
    skipped_fraction: float
    exits_per_token: float
    bytes_moved_per_token: float
    bytes_used_per_token: float
    tokens_per_second: Interval
    repeat_seconds: list[float]
    first_token_s: float


def measure(engine: Engine, ids_RS: np.ndarray, prompt_tokens: int) -> DecodeCost:
    """Decodes rows of `ids_RS` [repeats + 1, T] token by token after a prompt of the same row."""
    repeats = len(ids_RS) - 1
    if repeats < 1 or ids_RS.shape[1] <= prompt_tokens:
        raise ValueError(
            f"got rows {ids_RS.shape} and a prompt of {prompt_tokens}; want two rows or more, "
            "longer than the prompt"
        )
    seconds, first_token_s, used_bytes, moved_bytes = [], [], 0, 0
    exits = skipped = selections = 0
    hits = np.zeros_like(engine.pool.stats.hits)
    misses = np.zeros_like(hits)
    expert_bytes_TL = np.array(
        [[layer.expert_bytes for layer in tier] for tier in engine.store.tiers]
    )
    for repeat, ids_S in enumerate(ids_RS):
        engine.start(1, len(ids_S))
        began = time.perf_counter()
        jax.block_until_ready(engine.prefill([ids_S[:prompt_tokens].tolist()]))
        prefilled = time.perf_counter()
        engine.pool.reset_stats()
        engine.reset_stats()
        logits_BV = None
        for token in ids_S[prompt_tokens:]:
            logits_BV = engine.decode(np.asarray([token]))
        jax.block_until_ready(logits_BV)
        ended = time.perf_counter()
        stats = engine.pool.reset_stats()
        if repeat == 0:
            continue
        first_token_s.append(prefilled - began)
        seconds.append(ended - prefilled)
        hits, misses = hits + stats.hits, misses + stats.misses
        exits += engine.stats.exits
        skipped += engine.stats.skipped
        selections += engine.stats.selections
        moved_bytes += stats.bytes_moved
        used_bytes += int(((stats.hits + stats.misses).sum(axis=2) * expert_bytes_TL).sum())
    tokens = ids_RS.shape[1] - prompt_tokens
    uses = int(hits.sum() + misses.sum())
    rates = tokens / np.asarray(seconds)
    return DecodeCost(
        tokens=tokens * repeats,
        hit_rate=int(hits.sum()) / uses,
        degraded_fraction=1 - int(hits[NATIVE].sum() + misses[NATIVE].sum()) / uses,
        skipped_fraction=skipped / selections,
        exits_per_token=exits / (tokens * repeats),
        bytes_moved_per_token=moved_bytes / (tokens * repeats),
        bytes_used_per_token=used_bytes / (tokens * repeats),
        tokens_per_second=Interval(float(np.median(rates)), float(rates.min()), float(rates.max())),
        repeat_seconds=[round(s, 6) for s in seconds],
        first_token_s=float(np.median(first_token_s)),
    )
