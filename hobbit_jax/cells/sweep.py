"""Cells of a sweep: one row each.

Owns how a cell of any kind becomes its row, and the kind that asks what a plan costs under a pool
budget; `frontier.py` has the one that asks what it loses. Configs make the cells. What cells of a
model share is `workbench.py`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.policies import SLRU
from hobbit_jax.cells.workbench import EvalSizes, Inputs, Workbench
from hobbit_jax.evals import cost, quality, tasks
from hobbit_jax.experts.precision import PrecisionPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.experts.tiers import TierSpec
from hobbit_jax.inference.engine import Engine
from hobbit_jax.quantize.methods import METHODS
from hobbit_jax.rows import machine
from hobbit_jax.signals.allocation import SIGNALS, allocate

LOW_TIER = 1
# Not a plan but a moment: an expert goes low when it is wanted and its native copy is not there.
RESIDENCY = "residency"
Row = dict[str, Any]

# Of a cell that cannot be measured; another exception is a bug, and shows its traceback.
_EXPECTED = (ValueError, NotImplementedError, RuntimeError, MemoryError, OSError)


class SweepCell(Protocol):
    """What a sweep wants of a cell; a frozen dataclass that can be pickled.

    One that runs as several processes (hosts) together has an integer `processes`; they have a
    `jax.distributed` among them, `run` is called in each, and the first one's row is kept. Such a
    cell fails in all of them or in none, or those that wait for each other would wait for ever.
    """

    @property
    def inputs(self) -> Inputs:
        """What it runs on."""
        ...

    @property
    def sizes(self) -> EvalSizes:
        """How much it measures."""
        ...

    @property
    def name(self) -> str:
        """Unique among all cells, and a file name."""
        ...

    def run(self, bench: Workbench) -> dict[str, Any]:
        """Measures, and returns everything of the row that is the cell's own.

        Long steps go through `bench.part`: a worker may be killed or preempted at any time, and
        the next one takes finished parts from there.
        """
        ...


def processes(cell: SweepCell) -> int:
    """How many processes run `cell` together."""
    return getattr(cell, "processes", 1)


def cell_digest(cell: Any) -> str:
    """Hash of a whole cell, so that one of changed sizes is another cell."""
    text = json.dumps(asdict(cell), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Cell:
    """One point: who goes low, under a budget.

    Attributes:
        signal: "native", "uniform", "residency", or one of `SIGNALS`.
        low_fraction: of pairs or selections, for `SIGNALS`.
        low_format: of the low tier; None natively.
        budget_mib: device bytes of the expert pool.
        protected_fraction: of the SLRU policy.
        seed: of the random control.
        inputs: model and texts.
        sizes: how much is measured.
        method: how the low tier is encoded (`quantize/methods.py`).
        mode: for residency, the miss mode that decides; the others wait.
        low_share: for residency, of the pool (0-1) for low copies.
    """

    signal: str
    low_fraction: float
    low_format: str | None
    budget_mib: float
    protected_fraction: float
    seed: int
    inputs: Inputs
    sizes: EvalSizes
    method: str = "rtn"
    mode: str = "wait"
    low_share: float = 0.0

    def __post_init__(self):
        known = ("native", "uniform", RESIDENCY, *SIGNALS)
        if self.signal not in known:
            raise ValueError(f"signal is {self.signal!r}; want {', '.join(known)}")
        if (self.signal == "native") != (self.low_format is None):
            raise ValueError(f"signal {self.signal} with low_format {self.low_format}")
        if not 0 <= self.low_fraction <= 1:
            raise ValueError(f"low_fraction is {self.low_fraction}; want 0 to 1")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; want one of {', '.join(METHODS)}")
        serving = [name for name, mode in MISS_MODES.items() if mode.low_banks != "none"]
        if (self.signal == RESIDENCY) != (self.mode in serving):
            raise ValueError(
                f"signal {self.signal} with mode {self.mode!r}; residency wants one of "
                f"{', '.join(serving)}, and the others wait"
            )

    @property
    def name(self) -> str:
        """Readable, and unique by a hash of the whole cell."""
        parts = [self.signal]
        if self.signal == RESIDENCY:
            parts = [self.mode, f"{self.low_share * 100:g}"]
        if self.low_format is not None:
            parts += [self.low_format, self.method]
        if self.signal in SIGNALS:
            parts.append(f"{self.low_fraction * 100:g}")
        return "-".join([*parts, f"{self.budget_mib:g}mib", f"s{self.seed}", cell_digest(self)])

    def specs(self, bench: Workbench) -> list[TierSpec]:
        """The low tier, if there is one."""
        return bench.specs([self.low_format], self.method) if self.low_format else []

    def run(self, bench: Workbench) -> dict[str, Any]:
        """Measures cost at the budget, and quality and tasks once per plan.

        Raises:
            ValueError: the budget cannot hold one step's experts, or too little text.
        """
        specs = self.specs(bench)
        store = bench.store(specs)
        plan = make_plan(self, store, specs, bench)
        policy = functools.partial(SLRU, protected_fraction=self.protected_fraction)
        engine = Engine(
            bench.model, store, int(self.budget_mib * 2**20), plan, policy, self.mode,
            self.low_share,
        )  # fmt: skip

        def decode() -> dict[str, Any]:
            measured = cost.measure(engine, bench.decode_ids_RS, self.sizes.decode_prompt_tokens)
            return {"decode": asdict(measured), "pool": _pool_figures(engine)}

        # Logits of a plan are the same bits at every budget (tests/test_engine.py), so cells that
        # differ in the pool alone share quality and scores. What serves misses depends on the pool
        # and on what was decoded before.
        asked = self
        if self.signal != RESIDENCY:
            asked = replace(self, budget_mib=0.0, protected_fraction=0.0)
        digest = cell_digest(asked)
        measured = bench.part(f"decode-{self.name}", decode)
        selections_LE = bench.calibration().selections_LE
        return {
            "quality": bench.part(f"quality-{digest}", lambda: self._quality(bench, engine)),
            "tasks": bench.part(f"tasks-{digest}", lambda: asked._scores(bench, engine)),
            "store": store_figures(store, plan, engine.mode.low_banks != "none"),
            **measured,
            "routing": (
                {"selections_LE": selections_LE.tolist()} if self.signal == "native" else None
            ),
            "provenance": {
                "tier_sha256": {spec.format: bench.tier(spec).sha256() for spec in specs},
                "calibration_sha256": bench.calibration().sha256,
            },
        }

    def _quality(self, bench: Workbench, engine: Engine) -> dict[str, Any]:
        """Of many tokens at once; under residency of decoding them, one sequence at a time."""
        if self.signal != RESIDENCY:
            return asdict(quality.evaluate(engine, bench.windows, bench.native_logits_WTV))
        windows = bench.windows.first(self.sizes.decoded_windows)
        return asdict(quality.evaluate_decoding(engine, windows, bench.native_logits_WTV))

    def _scores(self, bench: Workbench, engine: Engine) -> dict[str, Any] | None:
        """The miniature tasks' and lm-eval's; None where the sizes ask for none."""
        batch = 1 if self.signal == RESIDENCY else None
        problems = self.sizes.task_problems
        scores = tasks.evaluate_all(engine, bench.tokenizer, problems, batch) or {}
        if self.sizes.benchmarks:
            tiers = [bench.tier(spec).sha256() for spec in self.specs(bench)]
            asked = {**asdict(self), "tier_sha256": tiers}
            scores |= bench.benchmark_scores(engine, asked, batch)
        return scores or None


def make_plan(
    cell: Cell, store: HostExperts, specs: Sequence[TierSpec], bench: Workbench
) -> PrecisionPlan:
    """The precision plan that `cell` describes; `specs` are the store's low tiers."""
    if cell.signal in ("native", RESIDENCY):
        return uniform_plan(store, NATIVE)
    if cell.signal == "uniform":
        return uniform_plan(store, LOW_TIER)
    error_LE = None
    if cell.signal == "sensitivity":
        error_LE = bench.errors(specs).error_NLE[LOW_TIER]
    profile = bench.calibration().routing
    return allocate(cell.signal, cell.low_fraction, LOW_TIER, profile, cell.seed, error_LE)


def store_figures(
    store: HostExperts, plan: PrecisionPlan, all_tiers: bool = False
) -> dict[str, Any]:
    """Bytes of all experts, natively and under the plan; a pair that needs two copies has both.

    `all_tiers`: any expert may be wanted at any tier, whatever the plan says.
    """
    pairs = store.config.n_layers * store.config.n_experts
    plan_bytes = sum(
        layer.expert_bytes * (share_LE.shape[1] if all_tiers else int(np.count_nonzero(share_E)))
        for tier, share_LE in zip(store.tiers, plan.tier_shares_LE(store), strict=True)
        for layer, share_E in zip(tier, share_LE, strict=True)
    )
    return {
        "experts": pairs,
        "native_bytes": store.tier_bytes(NATIVE),
        "plan_bytes": plan_bytes,
        "expert_bytes_mean": plan_bytes / pairs,
    }


def _pool_figures(engine: Engine) -> dict[str, Any]:
    pool = engine.pool
    return {
        "budget_bytes": pool.budget_bytes,
        "device_bytes": pool.device_bytes,
        "slots": {str(signature): n for signature, n in pool.slots.items()},
        "slots_total": sum(pool.slots.values()),
        "resident_pairs": len({(key.layer, key.expert) for key in pool.resident()}),
        "dense_device_bytes": engine.model.dense_device_bytes,
        "kv_cache_bytes": engine.kv_cache_bytes,
    }


def run_cell(cell: SweepCell, bench: Workbench) -> Row:
    """The whole row of a cell; one that cannot be measured has a row too, with the reason."""
    began = time.monotonic()
    try:
        found = cell.run(bench)
    except Exception as error:
        if not isinstance(error, _EXPECTED):
            traceback.print_exc()
        return failed_row(cell, f"{type(error).__name__}: {error}")
    provenance = {
        **machine(),
        "model_sha256": bench.model.file.sha256(),
        "text_sha256": bench.text_sha256,
        **found.pop("provenance"),
        "seconds": round(time.monotonic() - began, 2),
    }
    return {
        "cell": cell.name,
        "status": "ok",
        "error": None,
        "config": asdict(cell),  # pyright: ignore[reportArgumentType]
        **found,
        "provenance": provenance,
    }


def failed_row(cell: SweepCell, error: str) -> Row:
    """The row of a cell that failed for `error`."""
    return {
        "cell": cell.name,
        "status": "failed",
        "error": error,
        "config": asdict(cell),  # pyright: ignore[reportArgumentType]
        "provenance": machine(),
    }
