"""Our engine as a side of the comparison.

Owns nothing but the adapter. Made in a child process (`side.py`).
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.record import machine
from pallas_kernels.backends import Implementation


class Ours:
    """The engine in native precision, with all experts resident or under a budget."""

    def __init__(
        self,
        model: str,
        threads: int,
        context: int,
        budget_bytes: int | None,
        implementation: Implementation,
    ):
        del threads  # XLA takes the cores that this process may use
        loaded = load_model(model, implementation)
        self._engine = Engine(loaded, HostExperts(loaded.config, loaded.file), budget_bytes)
        self._context = context
        self._decode_hits = self._decode_uses = 0

    def score(self, ids_T: np.ndarray) -> np.ndarray:
        """See `Side.score`."""
        logits_TV = np.asarray(self._engine.score(ids_T[None])[0])
        self._engine.pool.reset_stats()
        return logits_TV

    def prefill(self, ids_T: np.ndarray) -> int:
        """See `Side.prefill`."""
        self._count_decode()
        self._engine.start(1, self._context)
        token = int(np.asarray(self._engine.prefill([ids_T.tolist()])).argmax())
        self._engine.pool.reset_stats()
        return token

    def decode(self, token: int) -> int:
        """See `Side.decode`."""
        return int(np.asarray(self._engine.decode(np.asarray([token]))).argmax())

    def _count_decode(self) -> None:
        stats = self._engine.pool.reset_stats()
        self._decode_hits += int(stats.hits.sum())
        self._decode_uses += int(stats.hits.sum() + stats.misses.sum())

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        self._count_decode()
        pool, model = self._engine.pool, self._engine.model
        device = jax.devices()[0]
        memory = device.memory_stats() if device.platform != "cpu" else None
        return {
            "program": "hobbit_jax",
            "machine": machine(),
            "device": device.platform,
            "threads": len(os.sched_getaffinity(0)) if device.platform == "cpu" else None,
            "precision": "the file's blocks; float32 elsewhere",
            "implementation": model.implementation,
            "budget_bytes": pool.budget_bytes,
            "pool_bytes": pool.device_bytes,
            "dense_bytes": model.dense_device_bytes,
            "kv_cache_bytes": self._engine.kv_cache_bytes,
            "slots": sum(pool.slots.values()),
            "decode_hit_rate": self._decode_hits / self._decode_uses if self._decode_uses else None,
            "device_peak_bytes": memory["peak_bytes_in_use"] if memory else None,
        }
