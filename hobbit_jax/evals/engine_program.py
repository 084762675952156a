"""Our engine as a program that `measure.py` can time: what its counters say, and its logits."""

from __future__ import annotations

import jax
import numpy as np

from hobbit_jax.evals.measure import Counts
from hobbit_jax.experts.store import NATIVE
from hobbit_jax.inference.engine import Engine


class EngineProgram:
    """Our engine as a `Program`.

    Args:
        engine: what decodes.
        context: tokens that a sequence has room for.
    """

    def __init__(self, engine: Engine, context: int):
        self.engine, self.context = engine, context
        self.logits_BV: list[jax.Array] = []  # of each token since the last prefill, B = 1
        self._expert_bytes_TL = np.array(
            [[layer.expert_bytes for layer in precision] for precision in engine.store.precisions]
        )

    def prefill(self, ids_T: np.ndarray) -> int:
        """See `Program.prefill`."""
        self.logits_BV = []
        self.engine.start(1, self.context)
        return int(np.asarray(self.engine.prefill([ids_T.tolist()])).argmax())

    def decode(self, token: int) -> int:
        """See `Program.decode`."""
        logits_BV = self.engine.decode(np.asarray([token]))
        self.logits_BV.append(logits_BV)
        return int(np.asarray(logits_BV).argmax())

    def counts(self) -> Counts:
        """See `Program.counts`."""
        pool, engine = self.engine.pool.stats, self.engine.stats
        uses_TL = (pool.hits + pool.misses).sum(axis=2)
        return Counts(
            hits=int(pool.hits.sum()),
            misses=int(pool.misses.sum()),
            native_uses=int(uses_TL[NATIVE].sum()),
            bytes_read=int((uses_TL * self._expert_bytes_TL).sum()),
            bytes_computed=pool.host_bytes,
            bytes_moved=pool.bytes_moved,
            bytes_ahead=pool.ahead_bytes,
            bytes_dropped=pool.dropped_bytes,
            link_wait_s=pool.wait_s,
            host_round_trips=engine.host_round_trips,
            selections=engine.selections,
            demoted=engine.degraded,
            skipped=engine.skipped,
        )
