"""What overlap buys a prompt: streamed prefill against its copies and its computation alone.

Owns the comparison, on an emulated link (`cache/link.py`), since a CPU has none of its own. Called
by `scripts/bench_decode.py`.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from hobbit_jax.cache.link import PacedLink
from hobbit_jax.engine import Engine
from hobbit_jax.loading import LoadedModel
from hobbit_jax.store import HostExperts


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
    """Prefill of each row of `ids_RS`, the first of which warms up, in turns: all resident,
    streamed one after the other, and streamed with uploads ahead of their use.

    The link is as fast as makes a prompt's copies last `copy_to_compute` times its computation
    alone. The pool of the run that stages is smaller by what it stages.

    Returns:
        Medians over rows in milliseconds: `compute_ms` (all resident), `copy_ms` (bytes moved over
        the link's bandwidth, of the run with overlap), `serial_ms` and `overlapped_ms` with all
        their values; and `hidden_share` (0-1), the part of the shorter of copy and computation
        that the overlapped run hid.
    """
    staging_bytes = staged_experts * store.largest_expert_bytes
    resident = Engine(model, store)
    resident.pool.load_all(0)
    _prefill_ms(resident, ids_RS[0])
    compute_ms = float(np.median([_prefill_ms(resident, ids_S) for ids_S in ids_RS]))
    gb_s = store.tier_bytes(0) / (copy_to_compute * compute_ms * 1e-3) / 1e9
    engines = {
        "compute_ms": resident,
        "serial_ms": Engine(model, store, budget_bytes, link=PacedLink(gb_s), staging_bytes=0),
        "overlapped_ms": Engine(
            model, store, budget_bytes - staging_bytes, link=PacedLink(gb_s),
            staging_bytes=staging_bytes,
        ),
    }  # fmt: skip
    values: dict[str, list[float]] = {name: [] for name in (*engines, "copy_ms")}
    for row, ids_S in enumerate(ids_RS):
        for name, engine in engines.items():
            spent_ms = _prefill_ms(engine, ids_S)
            if row:
                values[name].append(spent_ms)
        if row:
            moved = engines["overlapped_ms"].pool.stats.bytes_moved
            values["copy_ms"].append(moved / gb_s / 1e6)
    medians = {name: float(np.median(of_name)) for name, of_name in values.items()}
    copy_ms, compute_ms = medians["copy_ms"], medians["compute_ms"]
    hidden_ms = copy_ms + compute_ms - medians["overlapped_ms"]
    return {
        "link": PacedLink(gb_s).describe(),
        "tokens": ids_RS.shape[1],
        "budget_bytes": budget_bytes,
        "staging_bytes": staging_bytes,
        **medians,
        "hidden_share": hidden_ms / min(copy_ms, compute_ms),
        "values": values,
    }
