"""Our engine as a side of the comparison."""

import os
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from hobbit_jax.engine_flags import EngineOptions
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.record import machine


class Ours(EngineProgram):
    """The engine, with all experts resident or under a budget."""

    def __init__(self, options: EngineOptions, threads: int, context: int):
        # XLA takes the cores that this process may use, and ggml as many threads.
        made = replace(options, threads=threads)
        super().__init__(made.make_engine(made.load_model()), context)

    def score(self, ids_T: np.ndarray) -> np.ndarray:
        """See `Side.score`."""
        return np.asarray(self.engine.score(ids_T[None])[0])

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        pool, model = self.engine.pool, self.engine.model
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
            "kv_cache_bytes": self.engine.kv_cache_bytes,
            "slots": sum(pool.slots.values()),
            "device_peak_bytes": memory["peak_bytes_in_use"] if memory else None,
        }
