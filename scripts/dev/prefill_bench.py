"""What overlap buys a prompt: streamed prefill against its copies and its computation alone.

Owns the comparison, on an emulated link (`cache/link.py`), since a CPU has none of its own.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.link import DirectLink, Link, ThrottledLink
from hobbit_jax.cache.sharded_pool import make_pool
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.measure import Measurement, TimedRow, measure, timed_turn
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import LoadedModel
from hobbit_jax.statistics import spread


def prefill_overlap(
    model: LoadedModel,
    store: HostExperts,
    budget_bytes: int,
    ids_RS: np.ndarray,
    copy_to_compute: float,
    staged_experts: int,
) -> dict[str, Any]:
    """Prefill of each row of `ids_RS` (without its last token) in turns, the first to warm up:
    streamed at once, streamed one upload after the other, and with uploads ahead of their use.

    The link is as fast as makes a prompt's copies last about `copy_to_compute` times its
    computation. All pools have equal bytes, what they stage taken off.

    Returns:
        Medians over rows in milliseconds: `compute_ms` (a direct link, which on a CPU costs next to
        nothing), `copy_ms` (bytes moved over the link's bandwidth), `serial_ms` and
        `overlapped_ms`, with all values; `dropped_share` of the last row's bytes, uploaded in vain;
        and, spread over rows, `hidden_share` (0-1 but for noise), the part of the shorter of copy
        and computation that overlap hid, and `speedup` over `serial_ms`.
    """
    staging_bytes, prompt_tokens = staged_experts * store.largest_expert_bytes, ids_RS.shape[1] - 1

    def timed(link: Link, staging_bytes: int) -> TimedRow:
        budget = budget_bytes - staging_bytes
        engine = Engine(
            model,
            store,
            CacheConfig(budget, staging_bytes=staging_bytes),
            executor=partial(make_pool, link=link),
        )
        return functools.partial(timed_turn, EngineProgram(engine, ids_RS.shape[1]))

    computing = timed(DirectLink(), staging_bytes)
    (alone,) = measure({"compute": computing}, ids_RS, prompt_tokens).values()
    compute_s = float(np.median(alone.first_token_s))
    gb_s = _moved_bytes(alone)[-1] / (copy_to_compute * compute_s) / 1e9
    backends = {
        "compute_ms": computing,
        "serial_ms": timed(ThrottledLink(gb_s), 0),
        "overlapped_ms": timed(ThrottledLink(gb_s), staging_bytes),
    }
    found = measure(backends, ids_RS, prompt_tokens)
    values_R = {name: of_name.first_token_s * 1e3 for name, of_name in found.items()}
    values_R["copy_ms"] = _moved_bytes(found["overlapped_ms"]) / gb_s / 1e6
    compute_R, serial_R, overlapped_R, copy_R = values_R.values()
    hidden_R = (copy_R + compute_R - overlapped_R) / np.minimum(copy_R, compute_R)
    last = found["overlapped_ms"].turns[-1].prefill
    assert last is not None  # an engine counts
    return {
        "link": ThrottledLink(gb_s).describe(),
        "tokens": prompt_tokens,
        "budget_bytes": budget_bytes,
        "staging_bytes": staging_bytes,
        "dropped_share": last.bytes_dropped / last.bytes_moved,
        **{name: float(np.median(value_R)) for name, value_R in values_R.items()},
        "hidden_share": spread(hidden_R),
        "speedup": spread(serial_R / overlapped_R),
        "values": {name: value_R.tolist() for name, value_R in values_R.items()},
    }


def _moved_bytes(found: Measurement) -> np.ndarray:
    """Of each turn's prefill, [turns]."""
    return np.array([turn.prefill.bytes_moved for turn in found.turns if turn.prefill is not None])
