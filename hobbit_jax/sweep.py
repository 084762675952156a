"""A sweep: cells in, one row each out, resumable at any point.

Owns the life of a cell: build its plan and engine, measure quality, tasks and
cost, write its row. Called by `scripts/sweep.py`, which turns a config file
into cells. What all cells of a model share (dense part, tiers, calibration,
native logits) is made once and kept in the working directory where it is large.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hobbit_jax import reference
from hobbit_jax.allocation import SIGNALS, allocate
from hobbit_jax.cache.policies import SLRU
from hobbit_jax.engine import Engine
from hobbit_jax.evals import cost, quality, tasks
from hobbit_jax.gguf_file import GGUFFile
from hobbit_jax.importance import RoutingProfile, profile
from hobbit_jax.loading import LoadedModel, load_model
from hobbit_jax.precision import PrecisionPlan, uniform_plan
from hobbit_jax.rows import RowStore, machine, write_json
from hobbit_jax.store import NATIVE, HostExperts
from hobbit_jax.tiers import open_tier

LOW_TIER = 1


@dataclass(frozen=True)
class EvalSizes:
    """How much every cell measures."""

    windows: int
    context: int
    calibration_windows: int
    task_problems: int  # per task; 0 leaves the tasks out
    decode_prompt_tokens: int
    decode_tokens: int
    decode_repeats: int


@dataclass(frozen=True)
class Inputs:
    """What a sweep runs on. An empty `model` is the reference model, empty texts its held-out.

    An empty `implementation` takes the fastest matrix products that the device has.
    """

    model: str
    calibration_text: str
    evaluation_text: str
    implementation: str = ""


@dataclass(frozen=True)
class Cell:
    """One point: a plan under a budget. `signal` is "native", "uniform" or one of SIGNALS."""

    signal: str
    low_fraction: float
    low_format: str | None
    budget_mib: float
    protected_fraction: float
    seed: int
    inputs: Inputs
    sizes: EvalSizes

    def __post_init__(self):
        if self.signal not in ("native", "uniform", *SIGNALS):
            raise ValueError(
                f"signal is {self.signal!r}; want native, uniform, {', '.join(SIGNALS)}"
            )
        if (self.signal == "native") != (self.low_format is None):
            raise ValueError(f"signal {self.signal} with low_format {self.low_format}")
        if not 0 <= self.low_fraction <= 1:
            raise ValueError(f"low_fraction is {self.low_fraction}; want 0 to 1")

    @property
    def name(self) -> str:
        """Readable, and unique by a hash of the whole cell, so changed sizes are other cells."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        what = "native" if self.signal == "native" else f"{self.signal}-{self.low_format}"
        if self.signal in SIGNALS:
            what += f"-{self.low_fraction * 100:g}"
        return f"{what}-{self.budget_mib:g}mib-s{self.seed}-{digest[:8]}"


class Workbench:
    """What the cells of one model and one set of sizes share; made when first asked for."""

    def __init__(self, inputs: Inputs, sizes: EvalSizes, workdir: Path):
        self.inputs, self.sizes, self.workdir = inputs, sizes, workdir
        path = inputs.model or reference.model_path()
        self.model: LoadedModel = load_model(path, inputs.implementation or None)
        self.tokenizer = self.model.tokenizer()
        self._tiers: dict[str, GGUFFile] = {}
        # Quality and task scores by plan; see `_quality_and_tasks`.
        self.measured: dict[Cell, tuple[dict[str, Any], dict[str, Any] | None]] = {}

    def _texts(self, part) -> list[str]:
        path = getattr(self.inputs, f"{part}_text")
        if not path:
            return reference.held_out_texts(part)
        return [Path(path).read_text(encoding="utf-8")]

    @functools.cached_property
    def text_sha256(self) -> str:
        """Hash of calibration and evaluation text together."""
        texts = [*self._texts("calibration"), "\0", *self._texts("evaluation")]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    @functools.cached_property
    def windows(self) -> quality.Windows:
        """Evaluation windows."""
        sizes = self.sizes
        texts = self._texts("evaluation")
        return quality.cut_windows(self.tokenizer, texts, sizes.windows, sizes.context)

    @functools.cached_property
    def calibration_windows(self) -> quality.Windows:
        """Calibration windows, from other files than the evaluation's."""
        sizes = self.sizes
        texts = self._texts("calibration")
        return quality.cut_windows(self.tokenizer, texts, sizes.calibration_windows, sizes.context)

    @functools.cached_property
    def decode_ids_RS(self) -> np.ndarray:
        """Token rows for the decode measurement, the first a warm-up."""
        sizes = self.sizes
        length = sizes.decode_prompt_tokens + sizes.decode_tokens
        texts = self._texts("evaluation")
        windows = quality.cut_windows(
            self.tokenizer, texts, sizes.decode_repeats + 1, length - 1, seed=1
        )
        return windows.ids_WS

    def _key(self, windows: quality.Windows) -> str:
        what = self.model.file.sha256() + self.inputs.implementation
        ids = np.ascontiguousarray(windows.ids_WS).tobytes()
        return hashlib.sha256(what.encode() + ids).hexdigest()[:16]

    @functools.cached_property
    def native_store(self) -> HostExperts:
        """The native experts alone."""
        return HostExperts(self.model.config, self.model.file)

    @functools.cached_property
    def profile(self) -> RoutingProfile:
        """Routing of the native model on the calibration text."""
        path = self.workdir / "cache" / f"profile-{self._key(self.calibration_windows)}.npz"
        if not path.exists():
            native = Engine(self.model, self.native_store)
            profile(native, self.calibration_windows).save(path)
        return RoutingProfile.load(path)

    @functools.cached_property
    def native_logits_WTV(self) -> np.ndarray:
        """Logits of the native model on the evaluation windows."""
        path = self.workdir / "cache" / f"native-logits-{self._key(self.windows)}.npy"
        if not path.exists():
            native = Engine(self.model, self.native_store)
            quality.write_native_logits(native, self.windows, path)
        return np.load(path, mmap_mode="r")

    def tier(self, format: str) -> GGUFFile:
        """The low tier at `format`."""
        if format not in self._tiers:
            self._tiers[format] = open_tier(
                self.model.file, self.model.config, format, self.workdir / "tiers"
            )
        return self._tiers[format]

    def store(self, low_format: str | None) -> HostExperts:
        """Native experts, and the low tier where there is one."""
        if low_format is None:
            return self.native_store
        return HostExperts(self.model.config, self.model.file, [self.tier(low_format)])


def make_plan(cell: Cell, store: HostExperts, bench: Workbench) -> PrecisionPlan:
    """The precision plan that `cell` describes."""
    if cell.signal == "native":
        return uniform_plan(store, NATIVE)
    if cell.signal == "uniform":
        return uniform_plan(store, LOW_TIER)
    return allocate(cell.signal, cell.low_fraction, LOW_TIER, bench.profile, cell.seed)


def _store_figures(store: HostExperts, plan: PrecisionPlan) -> dict[str, Any]:
    """Bytes of all experts, natively and under the plan; a pair that needs two copies has both."""
    pairs = store.config.n_layers * store.config.n_experts
    plan_bytes = sum(
        layer.expert_bytes * int(np.count_nonzero(share_LE[index]))
        for tier, share_LE in zip(store.tiers, plan.tier_shares_LE(store), strict=True)
        for index, layer in enumerate(tier)
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
    """Quality and task scores of the cell's plan, measured once per plan in a process.

    Logits are the same bits at every budget (tests/test_engine.py), so cells that
    differ in the pool alone share them.
    """
    plan_only = replace(cell, budget_mib=0.0, protected_fraction=0.0)
    if plan_only not in bench.measured:
        measured = asdict(quality.evaluate(engine, bench.windows, bench.native_logits_WTV))
        scores: dict[str, Any] | None = None
        if cell.sizes.task_problems:
            names: tuple[tasks.TaskName, ...] = ("arithmetic", "functions")
            problems = cell.sizes.task_problems
            scores = {
                task: asdict(tasks.evaluate(engine, bench.tokenizer, task, problems))
                for task in names
            }
        bench.measured[plan_only] = (measured, scores)
    return bench.measured[plan_only]


def run_cell(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Measures one cell and returns its row.

    Raises:
        ValueError: the budget cannot hold one step's experts, or too little text.
    """
    began = time.monotonic()
    store = bench.store(cell.low_format)
    plan = make_plan(cell, store, bench)
    policy = functools.partial(SLRU, protected_fraction=cell.protected_fraction)
    engine = Engine(bench.model, store, int(cell.budget_mib * 2**20), plan, policy)
    decode = cost.measure(engine, bench.decode_ids_RS, cell.sizes.decode_prompt_tokens)
    pool = _pool_figures(engine)
    measured, scores = _quality_and_tasks(cell, bench, engine)
    return {
        "cell": cell.name,
        "status": "ok",
        "error": None,
        "config": asdict(cell),
        "quality": measured,
        "tasks": scores,
        "store": _store_figures(store, plan),
        "pool": pool,
        "decode": asdict(decode),
        "routing": (
            {"selections_LE": bench.profile.selections_LE.tolist()}
            if cell.signal == "native"
            else None
        ),
        "provenance": {
            **machine(),
            "model_sha256": bench.model.file.sha256(),
            "tier_sha256": (
                {cell.low_format: bench.tier(cell.low_format).sha256()} if cell.low_format else {}
            ),
            "text_sha256": bench.text_sha256,
            "seconds": round(time.monotonic() - began, 2),
        },
    }


def run_sweep(
    cells: Sequence[Cell], description: dict[str, Any], workdir: Path
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
                row = run_cell(cell, benches[shared])
            except (ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
                failed += 1
                message = f"{type(error).__name__}: {error}"
                progress.write(f"failed: {cell.name}: {message}")
                row = {
                    "cell": cell.name,
                    "status": "failed",
                    "error": message,
                    "config": asdict(cell),
                    "provenance": machine(),
                }
            rows.write(row)
            progress.update()
    return len(pending), len(cells) - len(pending), failed
