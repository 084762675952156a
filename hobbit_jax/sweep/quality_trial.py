"""The frontier: what a plan loses, against all bytes of its experts. No pool, no timing.

Owns the cell that asks for quality alone: how precisions are encoded, by which calibration, and
which signal shares them out under a limit of bytes. Called through `sweep.py` with the cells of
`configs/frontier.py` and `configs/compounding.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.router_output import RouterOutput
from hobbit_jax.evals import quality
from hobbit_jax.experts.low_precision import LowPrecisionSpec, dequantize
from hobbit_jax.experts.precision import SELECTION_SCORES, SKIPPED, PrecisionPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.allocation import fit_in_bytes, selection_plan
from hobbit_jax.importance.scores import STATIC_SCORES, static_scores_LE
from hobbit_jax.inference.engine import Engine
from hobbit_jax.record import (
    EvalSizes,
    Inputs,
    Measured,
    MixedInBytes,
    Native,
    PerSelection,
    QualityTrial,
    Uniform,
    combined,
    measured,
    record_name,
)
from hobbit_jax.sweep.artifact_cache import ArtifactCache
from hobbit_jax.sweep.artifacts import (
    Artifact,
    CalibrationRun,
    ExpertErrors,
    LowPrecisionFile,
    NativeLogits,
)
from hobbit_jax.sweep.trial import check_encoder, hashes, kept_part, scores, store_figures


@dataclass(frozen=True)
class QualityRun:
    """One plan, for its quality alone.

    Raises:
        ValueError: a plan that does not exist.
    """

    asked: QualityTrial
    study: str = "frontier"

    def __post_init__(self):
        plan = self.asked.plan
        check_encoder(plan)
        known = {MixedInBytes: tuple(STATIC_SCORES), PerSelection: tuple(SELECTION_SCORES)}
        if isinstance(plan, MixedInBytes | PerSelection) and plan.score not in known[type(plan)]:
            raise ValueError(
                f"importance score is {plan.score!r}; want one of {', '.join(known[type(plan)])}"
            )
        if isinstance(plan, PerSelection) and len(plan.shares) - len(plan.formats) not in (1, 2):
            raise ValueError(f"{len(plan.formats)} formats with shares {plan.shares}")

    @property
    def inputs(self) -> Inputs:
        """What it runs on."""
        return self.asked.inputs

    @property
    def sizes(self) -> EvalSizes:
        """How much it measures."""
        return self.asked.sizes

    @property
    def name(self) -> str:
        """Of its record."""
        return record_name(self.asked)

    def specs(self, bench: ArtifactCache) -> list[LowPrecisionSpec]:
        """The low precisions."""
        plan = self.asked.plan
        if isinstance(plan, Native):
            return []
        formats, through = _formats(plan)
        return bench.specs(formats, plan.encoder, self.asked.seed, through)

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """See `sweep.Trial`."""
        plan, seed, on = self.asked.plan, self.asked.seed, (self.inputs, self.sizes)
        found: list[Artifact] = [NativeLogits(*on), CalibrationRun(*on, "routing", seed)]
        if isinstance(plan, Native):
            return tuple(found)
        (formats, through), how = _formats(plan), (plan.encoder, seed)
        found += [LowPrecisionFile(*on, name, *how, through) for name in formats]
        if isinstance(plan, Uniform):
            found += [ExpertErrors(*on, (name,), *how, "", through) for name in formats]
        if isinstance(plan, MixedInBytes):
            found.append(CalibrationRun(*on, "routing", seed, plan.score_text))
            found.append(ExpertErrors(*on, formats, *how, plan.score_text, through))
        return tuple(found)

    def plan(
        self, store: HostExperts, specs: list[LowPrecisionSpec], bench: ArtifactCache
    ) -> PrecisionPlan:
        """Who gets which precision."""
        plan, seed = self.asked.plan, self.asked.seed
        if isinstance(plan, Native | Uniform):
            return uniform_plan(store, NATIVE if isinstance(plan, Native) else 1)
        if isinstance(plan, PerSelection):
            profile = bench.calibration("routing", seed).routing
            precisions = (NATIVE, *range(1, len(plan.formats) + 1), SKIPPED)[: len(plan.shares)]
            return selection_plan(plan.score, precisions, plan.shares, profile)
        profile = bench.calibration("routing", seed, plan.score_text).routing
        error_NLE = bench.errors(specs, seed, plan.score_text).error_NLE
        if plan.score == "sensitivity":
            cost_NLE = error_NLE
        else:
            # What a format costs is the same number for every signal, so that signals differ in
            # nothing but who goes low.
            score_LE = static_scores_LE(plan.score, profile, seed=seed)
            cost_NLE = error_NLE.mean(axis=(1, 2), keepdims=True) * score_LE[None]
        return fit_in_bytes(cost_NLE, store, plan.bytes_fraction * store.precision_bytes(NATIVE))

    def run(self, bench: ArtifactCache) -> Measured:
        """Measures quality, tasks, and the bytes that selections use.

        Raises:
            ValueError: a limit that no plan of these precisions keeps, or too little text.
            NotImplementedError: a method without an encoder for a format.
        """
        specs = self.specs(bench)
        store = bench.store(specs)
        plan = self.plan(store, specs, bench)
        chunk_tokens = self.sizes.windows * self.sizes.context
        engine = Engine(bench.model, store, CacheConfig(plan=plan, chunk_tokens=chunk_tokens))

        def quality_and_uses() -> Measured:
            uses = UseCounter(store, plan)
            with engine.observed_by(uses):
                found = quality.evaluate(engine, bench.windows, bench.native_logits_WTV)
            return combined(found.measured(), measured(uses.figures()))

        def errors() -> Measured:
            uniform = isinstance(self.asked.plan, Uniform)
            return measured(
                low_precision_errors(bench, specs[0], self.asked.seed) if uniform else {}
            )

        problems = self.sizes.task_problems
        return combined(
            kept_part(bench, f"quality-{self.name}", quality_and_uses),
            kept_part(bench, f"tasks-{self.name}", lambda: scores(bench, engine, problems, None)),
            kept_part(bench, f"errors-{self.name}", errors),
            measured(store_figures(store, plan)),
            measured(
                {"precision_LE": getattr(plan, "precision_LE", np.zeros(0, np.int8)).tolist()}
            ),
            hashes(bench, specs, self.asked.seed),
        )


def _formats(
    plan: Uniform | MixedInBytes | PerSelection,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The plan's low formats, and those that weights pass through on the way to them."""
    if isinstance(plan, Uniform):
        return (plan.format,), plan.through
    return tuple(plan.formats), ()


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


def _relative_weight_error(bench: ArtifactCache, spec: LowPrecisionSpec) -> float:
    store = bench.store([spec])
    missed = total = 0.0
    for layer in range(store.config.n_layers):
        native, low = store.layer(NATIVE, layer), store.layer(1, layer)
        for name in ("gate", "up", "down"):
            weights = dequantize(getattr(native, name)).astype(np.float64)
            again = dequantize(getattr(low, name))[..., : weights.shape[-1]]
            missed += float(((weights - again) ** 2).sum())
            total += float((weights**2).sum())
    return (missed / total) ** 0.5


def low_precision_errors(
    bench: ArtifactCache, spec: LowPrecisionSpec, seed: int
) -> dict[str, float]:
    """Errors of one whole precision, as root of the share of energy lost: of weights, and of
    outputs.
    """
    errors = bench.errors([spec], seed)
    return {
        "weight_error": _relative_weight_error(bench, spec),
        "output_error": float((errors.error_NLE[1].sum() / errors.energy_LE.sum()) ** 0.5),
    }
