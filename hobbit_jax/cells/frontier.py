"""The frontier: what a plan loses, against all bytes of its experts. No pool, no timing.

Owns the cell that asks for quality alone: how tiers are encoded, by which calibration, and which
signal shares them out under a limit of bytes. Called through `sweep.py` with the cells of
`configs/frontier.py` and `configs/compounding.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hobbit_jax.cells.sweep import cell_digest, store_figures
from hobbit_jax.cells.workbench import EvalSizes, Inputs, Workbench
from hobbit_jax.evals import quality, tasks
from hobbit_jax.experts.precision import SELECTION_SCORES, SKIPPED, PrecisionPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.experts.tiers import TierSpec, dequantize
from hobbit_jax.inference.engine import Engine
from hobbit_jax.inference.prefill import RoutedLayer
from hobbit_jax.quantize.methods import METHODS
from hobbit_jax.signals.allocation import fit_in_bytes, selection_plan
from hobbit_jax.signals.importance import STATIC_SIGNALS, static_scores_LE


@dataclass(frozen=True)
class FrontierCell:
    """One plan.

    Attributes:
        signal: "native", "uniform" (the first of `formats`), a static signal, or one of selections.
        formats: of the low tiers.
        method: how they are encoded.
        bytes_fraction: for static signals, the limit: all experts' bytes over native's.
        shares: for selection signals, of selections by tier: native, then `formats`, then, if it
            is one longer, those skipped.
        through: formats that the weights pass through first, each encoded plainly.
        seed: of the calibration windows, and of the random control.
        calibration_text: that the *signal* is measured on; "" is the one that tiers are encoded by.
        inputs: model and texts.
        sizes: how much is measured.
    """

    signal: str
    formats: tuple[str, ...]
    method: str
    bytes_fraction: float | None
    shares: tuple[float, ...] | None
    through: tuple[str, ...]
    seed: int
    calibration_text: str
    inputs: Inputs
    sizes: EvalSizes

    def __post_init__(self):
        known = ("native", "uniform", *SELECTION_SCORES, *STATIC_SIGNALS)
        if self.signal not in known:
            raise ValueError(f"signal is {self.signal!r}; want one of {', '.join(known)}")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; want one of {', '.join(METHODS)}")
        if (self.bytes_fraction is not None) != (self.signal in STATIC_SIGNALS):
            raise ValueError(f"signal {self.signal} with bytes_fraction {self.bytes_fraction}")
        if (self.shares is not None) != (self.signal in SELECTION_SCORES):
            raise ValueError(f"signal {self.signal} with shares {self.shares}")
        if (self.signal == "native") != (not self.formats):
            raise ValueError(f"signal {self.signal} with formats {self.formats}")
        if self.shares is not None and len(self.shares) - len(self.formats) not in (1, 2):
            raise ValueError(f"{len(self.formats)} formats with shares {self.shares}")

    @property
    def name(self) -> str:
        """Readable, and unique by a hash of the whole cell."""
        parts = [self.signal, *self.through, "-".join(self.formats)]
        if self.formats:
            parts.append(self.method)
        if self.bytes_fraction is not None:
            parts.append(f"{100 * self.bytes_fraction:g}")
        if self.shares is not None:
            parts.append("_".join(f"{100 * share:g}" for share in self.shares))
        return "-".join([*filter(None, parts), f"s{self.seed}", cell_digest(self)])

    def specs(self, bench: Workbench) -> list[TierSpec]:
        """The low tiers."""
        specs = bench.specs(self.formats, self.method, self.seed)
        return [replace(spec, through=self.through) for spec in specs]

    def plan(self, store: HostExperts, specs: list[TierSpec], bench: Workbench) -> PrecisionPlan:
        """Who gets which tier."""
        if self.signal in ("native", "uniform"):
            return uniform_plan(store, NATIVE if self.signal == "native" else 1)
        profile = bench.calibration("routing", self.seed, self.calibration_text).routing
        if self.shares is not None:
            tiers = (NATIVE, *range(1, len(self.formats) + 1), SKIPPED)[: len(self.shares)]
            return selection_plan(self.signal, tiers, self.shares, profile)
        assert self.bytes_fraction is not None
        error_NLE = bench.errors(specs, self.seed, self.calibration_text).error_NLE
        if self.signal == "sensitivity":
            cost_NLE = error_NLE
        else:
            # What a format costs is the same number for every signal, so that signals differ in
            # nothing but who goes low.
            score_LE = static_scores_LE(self.signal, profile, seed=self.seed)
            cost_NLE = error_NLE.mean(axis=(1, 2), keepdims=True) * score_LE[None]
        limit_bytes = self.bytes_fraction * store.tier_bytes(NATIVE)
        return fit_in_bytes(cost_NLE, store, limit_bytes)

    def run(self, bench: Workbench) -> dict[str, Any]:
        """Measures quality, tasks, and the bytes that selections use.

        Raises:
            ValueError: a limit that no plan of these tiers keeps, or too little text.
            NotImplementedError: a method without an encoder for a format.
        """
        specs = self.specs(bench)
        store = bench.store(specs)
        plan = self.plan(store, specs, bench)
        chunk_tokens = self.sizes.windows * self.sizes.context
        engine = Engine(bench.model, store, plan=plan, chunk_tokens=chunk_tokens)

        def quality_and_uses() -> dict[str, Any]:
            uses = UseCounter(store, plan)
            with engine.watched_by(uses):
                measured = quality.evaluate(engine, bench.windows, bench.native_logits_WTV)
            return {"quality": asdict(measured), "uses": uses.figures()}

        def scores() -> dict[str, Any] | None:
            return tasks.evaluate_all(engine, bench.tokenizer, self.sizes.task_problems)

        def tiers() -> list[dict[str, Any]]:
            return [tier_figures(bench, s, self.seed) for s in specs if self.signal == "uniform"]

        return {
            **bench.part(f"quality-{self.name}", quality_and_uses),
            "tasks": bench.part(f"tasks-{self.name}", scores),
            "store": store_figures(store, plan),
            "tiers": bench.part(f"tiers-{self.name}", tiers),
            "tier_LE": getattr(plan, "tier_LE", np.zeros(0, np.int8)).tolist(),
            "provenance": {
                "tier_sha256": {spec.format: bench.tier(spec).sha256() for spec in specs},
                "calibration_sha256": bench.calibration("routing", self.seed).sha256,
            },
        }


class UseCounter:
    """Watches an engine and counts which tier serves its selections, and the bytes of that."""

    def __init__(self, store: HostExperts, plan: PrecisionPlan):
        self.plan = plan
        self.bytes_NL = np.array([[layer.expert_bytes for layer in tier] for tier in store.tiers])
        self.count_NL = np.zeros(self.bytes_NL.shape, np.int64)
        self.skipped = 0

    def __call__(self, routed: RoutedLayer) -> None:
        """Counts one layer of one step."""
        tier_TK = self.plan.assign(routed.layer, routed.ids_TK, routed.weights_TK)
        tiers = tier_TK[routed.valid_T].reshape(-1)
        self.skipped += int(np.count_nonzero(tiers == SKIPPED))
        self.count_NL[:, routed.layer] += np.bincount(
            tiers[tiers != SKIPPED], minlength=len(self.count_NL)
        )

    def figures(self) -> dict[str, Any]:
        """Shares (0-1) of selections, and the mean bytes of an expert that one reads."""
        total = int(self.count_NL.sum()) + self.skipped
        return {
            "selections": total,
            "tier_shares": (self.count_NL.sum(axis=1) / total).tolist(),
            "skipped_share": self.skipped / total,
            "bytes_per_selection": float((self.count_NL * self.bytes_NL).sum()) / total,
        }


def _relative_weight_error(bench: Workbench, spec: TierSpec) -> float:
    store = bench.store([spec])
    missed = total = 0.0
    for layer in range(store.config.n_layers):
        native, low = store.layer(NATIVE, layer), store.layer(1, layer)
        for name in ("gate", "up", "down"):
            weights = dequantize(getattr(native, name)).astype(np.float64)
            missed += float(((weights - dequantize(getattr(low, name))) ** 2).sum())
            total += float((weights**2).sum())
    return (missed / total) ** 0.5


def tier_figures(bench: Workbench, spec: TierSpec, seed: int) -> dict[str, Any]:
    """Errors of one whole tier, as root of the share of energy lost: of weights, and of outputs."""
    errors = bench.errors([spec], seed)
    return {
        "format": spec.format,
        "method": spec.method,
        "through": list(spec.through),
        "weight_error": _relative_weight_error(bench, spec),
        "output_error": float((errors.error_NLE[1].sum() / errors.energy_LE.sum()) ** 0.5),
    }
