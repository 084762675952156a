"""What a plan costs under a pool budget, and what it loses there."""

import functools
import gc
from collections.abc import Sequence
from dataclasses import replace

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import Host, miss_mode
from hobbit_jax.cache.policies import SLRU, policy_factory
from hobbit_jax.evals import quality
from hobbit_jax.evals.engine_program import measure_engine, pool_figures
from hobbit_jax.experts.low_precision import LowPrecisionSpec
from hobbit_jax.experts.precision import PrecisionPlan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.record import (
    CacheTrial,
    Measured,
    MissModeTrial,
    Native,
    combined,
    measured,
    record_name,
)
from hobbit_jax.sweep.artifact_cache import ArtifactCache


def of_quality(asked: CacheTrial) -> CacheTrial:
    """A trial with all reset that cannot change quality or scores; equal ones share both.

    Logits of a plan are the same bits at every budget (tests/test_engine.py), so trials that differ
    in the pool alone share them, unless the pool decides who serves. What the CPU computes beside
    another device has other roundings.
    """
    if asked.by_decoding:
        return asked
    same = CacheTrial(asked.plan, 0.0, asked.inputs, asked.sizes, 0.0, asked.seed)
    return replace(same, misses=asked.misses)


def measure_trial(
    asked: CacheTrial,
    bench: ArtifactCache,
    store: HostExperts,
    plan: PrecisionPlan,
    specs: Sequence[LowPrecisionSpec],
) -> Measured:
    """Cost at the budget, and quality and tasks once per plan.

    Where what is resident decides, quality is that of decoding, one sequence at a time, and tasks
    are answered one by one: what is resident depends on what was decoded before.
    """
    policy = policy_factory(asked.policy)
    if policy is SLRU:
        policy = functools.partial(SLRU, protected_fraction=asked.protected_fraction)
    by_miss = asked.plan if isinstance(asked.plan, MissModeTrial) else None
    mode = miss_mode(by_miss.mode if by_miss else asked.misses)
    if isinstance(mode, Host) and not by_miss:
        mode = replace(mode, link_to_host=asked.link_to_host)
    config = CacheConfig(
        int(asked.budget_mib * 2**20),
        plan=plan,
        policy=policy,
        mode=mode,
        low_share=by_miss.share if by_miss else 0.0,
        resident_lift=asked.resident_lift,
    )
    shared = of_quality(asked)
    name, batch = record_name(shared), 1 if asked.by_decoding else None
    sizes, native_WTV = asked.sizes, bench.native_logits()

    def make_engine() -> Engine:
        """For each part anew: what is resident must not depend on the parts made before, here or
        in another process."""
        gc.collect()  # the pool of the part before, if anything refers to itself
        return Engine(bench.model, store, config)

    def losses() -> Measured:
        if not asked.by_decoding:
            return measured(quality.evaluate(make_engine(), bench.windows, native_WTV))
        windows = bench.windows.first(sizes.decoded_windows)
        return measured(quality.evaluate_decoding(make_engine(), windows, native_WTV))

    def scores() -> Measured:
        if getattr(asked.plan, "score", None) == "random":
            return Measured()  # the control is compared by KL
        return bench.task_scores(make_engine(), shared, specs, batch)

    def decode() -> Measured:
        engine = make_engine()
        found, _ = measure_engine(engine, bench.decode_ids_RS, sizes.decode_prompt_tokens)
        return measured({**found.figures(), **pool_figures(engine)})

    routing_LE = bench.calibration().selections_LE.tolist()
    return combined(
        bench.part(f"quality-{name}", losses),
        bench.part(f"tasks-{name}", scores),
        bench.part(f"decode-{record_name(asked)}", decode),
        measured({"selections_LE": routing_LE} if isinstance(asked.plan, Native) else {}),
    )
