"""What a plan loses, against all bytes of its experts. No pool, no timing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.evals import quality
from hobbit_jax.experts.low_precision import LowPrecisionSpec
from hobbit_jax.experts.precision import SKIPPED, PrecisionPlan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.record import Measured, QualityTrial, combined, measured, record_name
from hobbit_jax.sweep.artifact_cache import ArtifactCache


def measure_trial(
    asked: QualityTrial,
    bench: ArtifactCache,
    store: HostExperts,
    plan: PrecisionPlan,
    specs: Sequence[LowPrecisionSpec],
) -> Measured:
    """Quality on windows where any are asked for, tasks, and the bytes that selections use."""
    config, window_tokens = CacheConfig(plan=plan), asked.sizes.windows * asked.sizes.context
    if window_tokens:
        config = replace(config, chunk_tokens=window_tokens)
    engine = Engine(bench.model, store, config)

    def quality_and_uses() -> Measured:
        uses = UseCounter(store, plan)
        with engine.observed_by(uses):
            found = quality.evaluate(engine, bench.windows, bench.native_logits())
        return combined(measured(found), measured(uses.figures()))

    name = record_name(asked)
    precision_LE = getattr(plan, "precision_LE", np.zeros(0, np.int8))
    return combined(
        bench.part(f"quality-{name}", quality_and_uses) if window_tokens else Measured(),
        bench.part(f"tasks-{name}", lambda: bench.task_scores(engine, asked, specs)),
        measured({"precision_LE": precision_LE.tolist()}),
    )


class UseCounter(Observer):
    """Counts which precision serves its selections, and the bytes of that."""

    def __init__(self, store: HostExperts, plan: PrecisionPlan):
        self.plan = plan
        self.bytes_NL = np.array(
            [[layer.expert_bytes for layer in precision] for precision in store.precisions]
        )
        self.count_NL = np.zeros(self.bytes_NL.shape, np.int64)
        self.skipped = 0

    def after_routing(self, routed: RouterOutput) -> None:
        """Counts one layer of one step."""
        precision_TK = self.plan.assign(routed.layer, routed.ids_TK, routed.weights_TK)
        precisions = precision_TK[routed.valid_T].reshape(-1)
        self.skipped += int(np.count_nonzero(precisions == SKIPPED))
        self.count_NL[:, routed.layer] += np.bincount(
            precisions[precisions != SKIPPED], minlength=len(self.count_NL)
        )

    def figures(self) -> dict[str, Any]:
        """Shares (0-1) of selections, and the mean bytes of an expert that one reads."""
        total = int(self.count_NL.sum()) + self.skipped
        return {
            "selections": total,
            "precision_shares": (self.count_NL.sum(axis=1) / total).tolist(),
            "skipped_share": self.skipped / total,
            "bytes_read_per_selection": float((self.count_NL * self.bytes_NL).sum()) / total,
        }
