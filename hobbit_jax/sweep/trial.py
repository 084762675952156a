"""Cells of a sweep: one record each.

Owns how a cell of any kind becomes its record, and the kind that asks what a plan costs under a
pool budget; `frontier.py` has the one that asks what it loses. Configs make the cells. What cells
of a model share is `artifact_cache.py`, and which of it is made first `artifacts.py`.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.policies import SLRU
from hobbit_jax.evals import quality, tasks
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.measure import measure, timed_turn
from hobbit_jax.experts.low_precision import LowPrecisionSpec
from hobbit_jax.experts.precision import PrecisionPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.allocation import IMPORTANCE_SCORES, allocate
from hobbit_jax.inference.engine import Engine
from hobbit_jax.quantize.methods import METHODS
from hobbit_jax.record import (
    Asked,
    CacheTrial,
    EvalSizes,
    Inputs,
    Measured,
    MissModeTrial,
    Mixed,
    Native,
    Record,
    Uniform,
    combined,
    machine,
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

LOW = 1

# Of a cell that cannot be measured; another exception is a bug, and shows its traceback.
_EXPECTED = (ValueError, NotImplementedError, RuntimeError, MemoryError, OSError)


class Trial(Protocol):
    """What a sweep wants of a trial; a frozen dataclass that can be pickled."""

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

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What it shares with other trials, and is worth making before any of them runs."""
        ...

    @property
    def asked(self) -> Asked:
        """What identifies its record."""
        ...

    @property
    def study(self) -> str:
        """The study that its record belongs to."""
        ...

    def run(self, bench: ArtifactCache) -> Measured:
        """Measures, and returns everything of the record that is the trial's own.

        Long steps go through `bench.part`: a process may be killed or preempted at any time, and
        the next one takes finished parts from there.
        """
        ...


@dataclass(frozen=True)
class Cell:
    """One point of a sweep of the cache: a plan under a budget.

    Raises:
        ValueError: a plan that does not exist.
    """

    asked: CacheTrial
    study: str = "reference"

    def __post_init__(self):
        plan = self.asked.plan
        check_encoder(plan)
        if isinstance(plan, Mixed):
            if plan.score not in IMPORTANCE_SCORES:
                raise ValueError(
                    f"importance score is {plan.score!r}; want one of "
                    f"{', '.join(IMPORTANCE_SCORES)}"
                )
            if not 0 <= plan.share <= 1:
                raise ValueError(f"the demoted share is {plan.share}; want 0 to 1")
        if isinstance(plan, MissModeTrial):
            serving = [name for name, mode in MISS_MODES.items() if mode.low_banks != "none"]
            if plan.mode not in serving:
                raise ValueError(f"miss mode is {plan.mode!r}; want one of {', '.join(serving)}")

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

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """See `Trial`."""
        on = (self.inputs, self.sizes)
        found: list[Artifact] = [NativeLogits(*on), CalibrationRun(*on)]
        plan = self.asked.plan
        if not isinstance(plan, Native):
            found.append(LowPrecisionFile(*on, plan.format, plan.encoder))
            if isinstance(plan, Mixed) and plan.score == "sensitivity":
                found.append(ExpertErrors(*on, (plan.format,), plan.encoder))
        return tuple(found)

    def specs(self, bench: ArtifactCache) -> list[LowPrecisionSpec]:
        """The low precision, if there is one."""
        plan = self.asked.plan
        return [] if isinstance(plan, Native) else bench.specs([plan.format], plan.encoder)

    def run(self, bench: ArtifactCache) -> Measured:
        """Measures cost at the budget, and quality and tasks once per plan.

        Raises:
            ValueError: the budget cannot hold one step's experts, or too little text.
        """
        asked, specs = self.asked, self.specs(bench)
        store = bench.store(specs)
        plan = make_plan(asked, store, specs, bench)
        policy = functools.partial(SLRU, protected_fraction=asked.protected_fraction)
        by_miss = asked.plan if isinstance(asked.plan, MissModeTrial) else None
        engine = Engine(
            bench.model,
            store,
            CacheConfig(
                int(asked.budget_mib * 2**20),
                plan=plan,
                policy=policy,
                mode=by_miss.mode if by_miss else "fetch",
                low_share=by_miss.share if by_miss else 0.0,
            ),
        )

        def decode() -> Measured:
            ids_RS = bench.decode_ids_RS
            ours = functools.partial(timed_turn, EngineProgram(engine, ids_RS.shape[1]))
            found = measure({self.name: ours}, ids_RS, asked.sizes.decode_prompt_tokens)
            return measured({**found[self.name].figures(), **_pool_figures(engine)})

        # Logits of a plan are the same bits at every budget (tests/test_engine.py), so cells that
        # differ in the pool alone share quality and scores. What serves misses depends on the pool
        # and on what was decoded before.
        shared = asked if by_miss else replace(asked, budget_mib=0.0, protected_fraction=0.0)
        name = record_name(shared)
        routing_LE = bench.calibration().selections_LE.tolist()
        return combined(
            kept_part(bench, f"quality-{name}", lambda: self._quality(bench, engine)),
            kept_part(bench, f"tasks-{name}", lambda: self._scores(bench, engine, shared)),
            measured(store_figures(store, plan, engine.mode.low_banks != "none")),
            kept_part(bench, f"decode-{self.name}", decode),
            measured({"selections_LE": routing_LE} if isinstance(asked.plan, Native) else {}),
            hashes(bench, specs),
        )

    def _quality(self, bench: ArtifactCache, engine: Engine) -> Measured:
        """Of many tokens at once; with a miss mode of decoding them, one sequence at a time."""
        if not isinstance(self.asked.plan, MissModeTrial):
            found = quality.evaluate(engine, bench.windows, bench.native_logits_WTV)
        else:
            windows = bench.windows.first(self.sizes.decoded_windows)
            found = quality.evaluate_decoding(engine, windows, bench.native_logits_WTV)
        return found.measured()

    def _scores(self, bench: ArtifactCache, engine: Engine, shared: CacheTrial) -> Measured:
        """The miniature tasks' and lm-eval's."""
        batch = 1 if isinstance(self.asked.plan, MissModeTrial) else None
        found = scores(bench, engine, self.sizes.task_problems, batch)
        if not self.sizes.benchmarks:
            return found
        precisions = [bench.precision(spec).sha256() for spec in self.specs(bench)]
        asked = {**asdict(shared), "low_precision_sha256": precisions}
        benchmarks = bench.benchmark_scores(engine, asked, batch)
        return combined(found, measured(benchmarks, "task"))


def check_encoder(plan: Any) -> None:
    """Refuses an encoder that does not exist.

    Raises:
        ValueError: names it and those that do.
    """
    encoder = getattr(plan, "encoder", METHODS[0])
    if encoder not in METHODS:
        raise ValueError(f"method is {encoder!r}; want one of {', '.join(METHODS)}")


def scores(bench: ArtifactCache, engine: Engine, problems: int, batch: int | None) -> Measured:
    """The miniature tasks' scores; nothing where no problem is asked for."""
    return measured(tasks.evaluate_all(engine, bench.tokenizer, problems, batch) or {}, "task")


def hashes(bench: ArtifactCache, specs: Sequence[LowPrecisionSpec], seed: int = 0) -> Measured:
    """Of the low-precision files, and of the calibration that scores were measured by."""
    low = {f"low_{spec.format}": bench.precision(spec).sha256() for spec in specs}
    return Measured(file_sha256={**low, "calibration": bench.calibration("routing", seed).sha256})


def kept_part(bench: ArtifactCache, name: str, measure: Callable[[], Measured]) -> Measured:
    """A part of a measurement that is kept until the whole is finished."""
    return Measured(**bench.part(name, lambda: asdict(measure())))


def make_plan(
    asked: CacheTrial, store: HostExperts, specs: Sequence[LowPrecisionSpec], bench: ArtifactCache
) -> PrecisionPlan:
    """The precision plan that is asked for; `specs` are the store's low precisions."""
    plan = asked.plan
    if isinstance(plan, Native | MissModeTrial):
        return uniform_plan(store, NATIVE)
    if isinstance(plan, Uniform):
        return uniform_plan(store, LOW)
    error_LE = None
    if plan.score == "sensitivity":
        error_LE = bench.errors(specs).error_NLE[LOW]
    profile = bench.calibration().routing
    return allocate(plan.score, plan.share, LOW, profile, asked.seed, error_LE)


def store_figures(
    store: HostExperts, plan: PrecisionPlan, all_precisions: bool = False
) -> dict[str, Any]:
    """Bytes of all experts, natively and under the plan; a pair that needs two copies has both.

    `all_precisions`: any expert may be wanted at any precision, whatever the plan says.
    """
    pairs = store.config.n_layers * store.config.n_experts
    stored_bytes = sum(
        layer.expert_bytes
        * (share_LE.shape[1] if all_precisions else int(np.count_nonzero(share_E)))
        for precision, share_LE in zip(
            store.precisions, plan.precision_shares_LE(store), strict=True
        )
        for layer, share_E in zip(precision, share_LE, strict=True)
    )
    return {
        "experts": pairs,
        "native_bytes": store.precision_bytes(NATIVE),
        "stored_bytes": stored_bytes,
        "expert_bytes_mean": stored_bytes / pairs,
    }


def _pool_figures(engine: Engine) -> dict[str, Any]:
    pool = engine.pool
    return {
        "pool_budget_bytes": pool.budget_bytes,
        "pool_device_bytes": pool.device_bytes,
        "slots": {str(signature): n for signature, n in pool.slots.items()},
        "slots_total": sum(pool.slots.values()),
        "resident_experts": len({(key.layer, key.expert) for key in pool.resident()}),
        "dense_device_bytes": engine.model.dense_device_bytes,
        "kv_cache_bytes": engine.kv_cache_bytes,
    }


def run_cell(cell: Trial, bench: ArtifactCache) -> Record:
    """The record of a cell; one that cannot be measured has a record too, with the reason."""
    began = time.monotonic()
    try:
        found = cell.run(bench)
    except Exception as error:
        if not isinstance(error, _EXPECTED):
            traceback.print_exc()
        return failed_record(cell, f"{type(error).__name__}: {error}")
    inputs = {"model": bench.model.file.sha256(), "text": bench.text_sha256}
    bos = "yes" if quality.begin_with_bos(bench.tokenizer) else "no"
    made = Measured(file_sha256=inputs, notes={"windows_begin_with_bos": bos})
    found = combined(made, found)
    seconds = round(time.monotonic() - began, 2)
    return Record(cell.study, cell.asked, **vars(found), **machine(), seconds=seconds)


def failed_record(cell: Trial, error: str) -> Record:
    """The record of a cell that failed for `error`."""
    return Record(cell.study, cell.asked, **machine(), status="failed", error=error)
