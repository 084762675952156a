"""A sweep: cells in, one row each out, resumable at any point.

Owns the running of cells of any kind, and the kind that asks what a plan costs under a pool
budget; `frontier.py` has the one that asks what it loses. Called by `scripts/sweep.py`, which
turns a config file into cells. What cells of a model share is `workbench.py`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from hobbit_jax.allocation import SIGNALS, allocate
from hobbit_jax.cache.policies import SLRU
from hobbit_jax.engine import Engine
from hobbit_jax.evals import cost, quality, tasks
from hobbit_jax.miss_modes import MISS_MODES
from hobbit_jax.precision import PrecisionPlan, uniform_plan
from hobbit_jax.quantize.methods import METHODS
from hobbit_jax.rows import RowStore, machine, write_json
from hobbit_jax.store import NATIVE, HostExperts
from hobbit_jax.tiers import TierSpec
from hobbit_jax.workbench import EvalSizes, Inputs, Workbench

LOW_TIER = 1
# Not a plan but a moment: an expert goes low when it is wanted and its native copy is not there.
RESIDENCY = "residency"


class SweepCell(Protocol):
    """What `run_sweep` wants of a cell; a frozen dataclass."""

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
        """Measures, and returns everything of the row that is the cell's own."""
        ...


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
        decode = cost.measure(engine, bench.decode_ids_RS, self.sizes.decode_prompt_tokens)
        pool = _pool_figures(engine)
        measured, scores = _quality_and_tasks(self, bench, engine)
        selections_LE = bench.calibration().selections_LE
        return {
            "quality": measured,
            "tasks": scores,
            "store": store_figures(store, plan, engine.mode.low_banks != "none"),
            "pool": pool,
            "decode": asdict(decode),
            "routing": (
                {"selections_LE": selections_LE.tolist()} if self.signal == "native" else None
            ),
            "provenance": {
                "tier_sha256": {spec.format: bench.tier(spec).sha256() for spec in specs},
                "calibration_sha256": bench.calibration().sha256,
            },
        }


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


def _quality_and_tasks(
    cell: Cell, bench: Workbench, engine: Engine
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Quality and task scores, measured once per plan in a process.

    A plan's logits are the same bits at every budget (tests/test_engine.py), so cells that differ
    in the pool alone share them. What serves misses depends on the pool and on what was decoded
    before: there quality is of decoding, one sequence at a time, at the cell's own budget.
    """
    sizes = cell.sizes
    if cell.signal == RESIDENCY:
        windows = bench.windows.first(sizes.decoded_windows)
        measured = quality.evaluate_decoding(engine, windows, bench.native_logits_WTV)
        return asdict(measured), _task_scores(cell, bench, engine, batch=1)
    plan_only = replace(cell, budget_mib=0.0, protected_fraction=0.0)
    if plan_only not in bench.measured:
        measured = asdict(quality.evaluate(engine, bench.windows, bench.native_logits_WTV))
        bench.measured[plan_only] = (measured, _task_scores(plan_only, bench, engine))
    return bench.measured[plan_only]


def _task_scores(
    cell: Cell, bench: Workbench, engine: Engine, batch: int | None = None
) -> dict[str, Any] | None:
    """The miniature tasks' and lm-eval's scores; None where the sizes ask for none."""
    sizes = cell.sizes
    scores = tasks.evaluate_all(engine, bench.tokenizer, sizes.task_problems, batch) or {}
    if sizes.benchmarks:
        tiers = [bench.tier(spec).sha256() for spec in cell.specs(bench)]
        asked = {**asdict(cell), "tier_sha256": tiers}
        scores |= bench.benchmark_scores(engine, asked, batch)
    return scores or None


def _run(cell: SweepCell, bench: Workbench) -> dict[str, Any]:
    """One finished row."""
    began = time.monotonic()
    found = cell.run(bench)
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


def run_sweep(
    cells: Sequence[SweepCell], description: dict[str, Any], workdir: Path
) -> tuple[int, int, int]:
    """Runs every cell that has no finished row; a failing cell is recorded and the rest go on.

    Args:
        cells: in the order in which they run.
        description: title, question, command, config and rule, kept as `sweep.json` for the
            report.

    Returns:
        How many cells ran, were skipped as finished, and failed.

    Raises:
        ValueError, NotImplementedError, OSError: the model or the workdir cannot be used at all.
    """
    rows = RowStore(workdir)
    rows.create()
    names = [cell.name for cell in cells]
    if len(set(names)) != len(names):
        raise ValueError("two cells of the sweep are the same; check its axes for repetitions")
    write_json(workdir / "sweep.json", {**description, "cells": names})
    pending = [cell for cell in cells if not rows.finished(cell.name)]
    failed = 0
    benches: dict[tuple[Inputs, EvalSizes], Workbench] = {}
    with tqdm(total=len(cells), initial=len(cells) - len(pending), unit="cell") as progress:
        for cell in pending:
            progress.set_description(cell.name.rsplit("-", 1)[0])
            shared = (cell.inputs, cell.sizes)
            if shared not in benches:
                # Outside the cell's try: a model that does not open fails the sweep, not a cell.
                benches[shared] = Workbench(*shared, workdir)
            try:
                row = _run(cell, benches[shared])
            except (ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
                failed += 1
                message = f"{type(error).__name__}: {error}"
                progress.write(f"failed: {cell.name}: {message}")
                row = {
                    "cell": cell.name,
                    "status": "failed",
                    "error": message,
                    "config": asdict(cell),  # pyright: ignore[reportArgumentType]
                    "provenance": machine(),
                }
            rows.write(row)
            progress.update()
    return len(pending), len(cells) - len(pending), failed
