"""What overlap buys a prompt: streamed prefill against its copies and its computation alone.

Owns the comparison, on an emulated link (`cache/link.py`), since a CPU has none of its own.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from hobbit_jax.cache.link import DirectLink, Link, PacedLink
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import LoadedModel
from hobbit_jax.statistics import spread


def _prefill_ms(engine: Engine, ids_S: np.ndarray) -> float:
    engine.start(1, len(ids_S))
    engine.pool.reset_stats()
    began_s = time.perf_counter()
    jax.block_until_ready(engine.prefill([ids_S.tolist()]))
    return (time.perf_counter() - began_s) * 1e3


def prefill_overlap(
    model: LoadedModel,
    store: HostExperts,
    budget_bytes: int,
    ids_RS: np.ndarray,
    copy_to_compute: float,
    staged_experts: int,
) -> dict[str, Any]:
    """Prefill of each row of `ids_RS`, the first of which warms up, in turns: streamed at once,
    streamed one upload after the other, and streamed with uploads ahead of their use.

    The link is as fast as makes a prompt's copies last about `copy_to_compute` times its
    computation. All pools have equal bytes, what they stage taken off.

    Returns:
        Medians over rows in milliseconds: `compute_ms` (a direct link, which on a CPU costs next to
        nothing), `copy_ms` (bytes moved over the link's bandwidth), `serial_ms` and
        `overlapped_ms`, with all values; `dropped_share` of the last row's bytes, uploaded in vain;
        and, spread over rows, `hidden_share` (0-1 but for noise), the part of the shorter of copy
        and computation that overlap hid, and `speedup` over `serial_ms`.
    """
    staging_bytes = staged_experts * store.largest_expert_bytes

    def engine(link: Link, staging_bytes: int) -> Engine:
        budget = budget_bytes - staging_bytes
        return Engine(model, store, budget, link=link, staging_bytes=staging_bytes)

    computing = engine(DirectLink(), staging_bytes)
    compute_ms = [_prefill_ms(computing, ids_S) for ids_S in ids_RS][1:]
    moved_bytes = computing.pool.stats.bytes_moved
    gb_s = moved_bytes / (copy_to_compute * float(np.median(compute_ms)) * 1e-3) / 1e9
    engines = {
        "compute_ms": computing,
        "serial_ms": engine(PacedLink(gb_s), 0),
        "overlapped_ms": engine(PacedLink(gb_s), staging_bytes),
    }
    values: dict[str, list[float]] = {name: [] for name in (*engines, "copy_ms")}
    for row, ids_S in enumerate(ids_RS):
        spent_ms = {name: _prefill_ms(engine, ids_S) for name, engine in engines.items()}
        pool = engines["overlapped_ms"].pool
        spent_ms["copy_ms"] = pool.stats.bytes_moved / gb_s / 1e6
        for name, value in spent_ms.items() if row else ():
            values[name].append(value)
    pool = engines["overlapped_ms"].pool
    compute, serial, overlapped, copy = (np.asarray(of_name) for of_name in values.values())
    hidden = (copy + compute - overlapped) / np.minimum(copy, compute)
    return {
        "link": PacedLink(gb_s).describe(),
        "tokens": ids_RS.shape[1],
        "budget_bytes": budget_bytes,
        "staging_bytes": staging_bytes,
        "dropped_share": pool.stats.dropped_bytes / pool.stats.bytes_moved,
        **{name: float(np.median(of_name)) for name, of_name in values.items()},
        "hidden_share": spread(hidden),
        "speedup": spread(serial / overlapped),
        "values": values,
    }
