"""What a recorded trace comes to under the settings of a cache, without a model.

Owns the step from a trace and settings to a row of figures; `counter.py` decides.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hobbit_jax.cache.adaptive_split import DEFAULT_SPLIT, AdaptiveSplit, SplitRule, candidates
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.counter import Replay
from hobbit_jax.cache.miss_modes import LOW, miss_mode
from hobbit_jax.cache.policies import POLICIES, Belady, PinnedStatic, PolicyFactory
from hobbit_jax.cache.pool_sizing import ADAPTIVE, pool_slots
from hobbit_jax.cache.trace import Trace
from hobbit_jax.experts.precision import PrecisionPlan, StaticPlan
from hobbit_jax.experts.store import NATIVE, ExpertKey
from pallas_kernels.reference import Signature

# Besides the live engine's: one needs a profile, the other the future.
REPLAY_POLICIES = (*POLICIES, "pinned_static", "belady")
_BANKS = (Signature("native", "", ""), Signature("low", "", ""))


def replay_policy(
    name: str, trace: Trace, plan: PrecisionPlan | None = None, profile: Trace | None = None
) -> PolicyFactory:
    """A policy by its name, with the future or a profile where it needs one.

    Args:
        name: of `REPLAY_POLICIES`.
        trace: what will be replayed, in the mode `fetch` if the policy is Belady's.
        plan: who gets which precision; None is native throughout.
        profile: says how often each expert is used; the trace itself if None.

    Raises:
        ValueError: no policy of that name; lists those there are.
    """
    if name == "belady":
        requested_TLK = _requested_TLK(trace, plan)
        layer_TLK = np.broadcast_to(np.arange(trace.ids_TLK.shape[1])[:, None], trace.ids_TLK.shape)
        uses_3A = (a.ravel().tolist() for a in (requested_TLK, layer_TLK, trace.ids_TLK))
        future = list(map(ExpertKey, *uses_3A))
        return lambda capacity: Belady(capacity, future)
    if name == "pinned_static":
        uses_LE = (profile or trace).uses_LE
        uses = {
            ExpertKey(precision, *index): float(count)
            for precision in (NATIVE, LOW)
            for index, count in np.ndenumerate(uses_LE)
        }
        return lambda capacity: PinnedStatic(capacity, uses)
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; want all, or of {', '.join(REPLAY_POLICIES)}")
    return POLICIES[name]


def _requested_TLK(trace: Trace, plan: PrecisionPlan | None) -> np.ndarray:
    if plan is None:
        return np.full(trace.ids_TLK.shape, NATIVE)
    parts = [plan.assign(r.layer, r.ids_TK, r.weights_TK) for r in trace.layers()]
    return np.stack(parts, axis=1)


def replay(
    trace: Trace, cache: CacheConfig, expert_bytes_p: Sequence[int], rule: SplitRule = DEFAULT_SPLIT
) -> dict[str, Any]:
    """Replays a trace; the figures, ready for JSON.

    `hit_rate` is of all uses at the precision that served; `low_share` are the selections served
    below native and `degraded_share` those served below the precision that the plan asked for.
    `residents` are the experts that the device holds at the end, at either precision or both. The
    speed leaves out reading the file, and does not depend on what else the machine does.

    Args:
        trace: of one sequence after the other, each decoded token by token.
        cache: budget, plan, policy, mode and so on; not what describes an engine.
        expert_bytes_p: of one expert, natively and, if there is one, at the low precision.
        rule: of the adaptive split, which decides where a sequence begins.

    Raises:
        ValueError: too small a budget, pins that leave no room for a step, or a bad argument.
    """
    _, n_layers, k = trace.ids_TLK.shape
    banks = _BANKS[: len(expert_bytes_p)]
    layout = BankLayout(
        trace.n_experts,
        k,
        [[bank] * n_layers for bank in banks],
        dict(zip(banks, expert_bytes_p, strict=True)),
    )
    shares_pLE = _expected_uses_pLE(trace, cache.plan, layout.shape_pLE)
    mode = miss_mode(cache.mode)
    slots, _ = pool_slots(shares_pLE, mode, layout, cache.budget_bytes, cache.low_share)
    replayed, split = Replay(layout, slots, cache), None
    if cache.low_share == ADAPTIVE and mode.low_banks == "cache":
        divisions = candidates(replayed, cache, shares_pLE)
        split = AdaptiveSplit(replayed, divisions, cache, shares_pLE, rule)
        replayed.controller.observers.append(split)
    replayed.counts.take()  # what a warm start moved
    began_s = time.thread_time()
    replayed.play(trace, "replay")
    seconds, counts = time.thread_time() - began_s, replayed.counts
    selections = max(1, counts.selections)
    return {
        "hit_rate": counts.hit_rate,
        "hits": counts.hits,
        "misses": counts.misses,
        "bytes_moved": counts.bytes_moved,
        "bytes_moved_per_token": counts.bytes_moved / counts.tokens,
        "promotions_per_token": counts.promotions / counts.tokens,
        "round_trips_per_token": counts.host_round_trips / counts.tokens,
        "low_share": counts.low / selections,
        "degraded_share": counts.demoted / selections,
        "skipped_share": counts.skipped / selections,
        "slots": {bank.signature.gate: bank.policy.capacity for bank in replayed.controller.banks},
        "residents": round(replayed.resident_share() * trace.uses_LE.size),
        "repartitions": [list(change) for change in split.history] if split else [],
        "accesses_per_cpu_s": counts.uses / max(seconds, 1e-9),
        "trace": trace.name,
    }


def _expected_uses_pLE(
    trace: Trace, plan: PrecisionPlan | None, shape_pLE: tuple[int, int, int]
) -> np.ndarray:
    """Uses of each pair at each precision, the same for all that a plan gives a precision.

    By them the budget is divided: what the plan expects of each bank.
    """
    plan = plan or StaticPlan(np.full(shape_pLE[1:], NATIVE, np.int8))
    wanted_pLE = plan.shares_pLE(shape_pLE) > 0
    requested_TLK = _requested_TLK(trace, plan)
    uses_p = np.array([(requested_TLK == precision).sum() for precision in range(shape_pLE[0])])
    pairs_p = wanted_pLE.sum(axis=(1, 2))
    return wanted_pLE * (uses_p / np.maximum(pairs_p, 1))[:, None, None]
