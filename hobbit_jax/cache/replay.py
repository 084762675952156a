"""Replays recorded routing through a policy: what the cache would have done, without a model.

Owns the walk over a trace, the two-precision plans at equal bytes, and the figures. The policies
are the live engine's own classes, called as the engine calls them: a cold start, demand misses
only, one token's experts of a layer resident at once.

Low-precision plans share the bytes of `capacity` native slots between a native bank and a low one:

- `native`: one bank.
- `router_weight`: the `low_share` of selections with the least router weight run low (HOBBIT).
- `frequency`: the `low_share` of (layer, expert) pairs least used in the profile run low; with a
  share of 1 that is a uniformly smaller quant.
- `random`: as many pairs, drawn by a seed: the control.
- `floor`: every expert is resident at the low precision, the rest of the bytes hold hot experts
  natively; nobody waits, a native miss runs low while its promotion is under way.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from hobbit_jax.cache.budget import BankDemand, divide_budget
from hobbit_jax.cache.policies import POLICIES, Belady, PinnedStatic, Policy, Step
from hobbit_jax.cache.trace import Trace
from pallas_kernels.reference import Signature

PLANS = ("native", "router_weight", "frequency", "random", "floor")
# Besides the live engine's: one needs a profile, the other the future.
REPLAY_POLICIES = (*POLICIES, "pinned_static", "belady")
_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Bank:
    """Slots of one precision, and the selections that it serves."""

    precision: str
    slots: int
    expert_bytes: int
    served_TLK: np.ndarray  # bool
    waits: bool = True  # False: a miss runs on another copy meanwhile


@dataclass(frozen=True)
class Layout:
    """A plan made concrete for one trace and budget."""

    plan: str
    banks: list[Bank]
    low_experts: int  # held at the low precision for good, outside the banks
    degraded_share: float | None  # of selections run below native; None if the replay decides
    threshold: float | None = None  # router weight below which a selection runs low


def lay_out(
    trace: Trace,
    capacity: int,
    expert_bytes: int,
    plan: str = "native",
    low_bytes: int | None = None,
    low_share: float = 0.5,
    profile: Trace | None = None,
    seed: int = 0,
) -> Layout:
    """Banks for `capacity` native slots' worth of bytes.

    Args:
        trace: what will be replayed.
        capacity: native slots that the budget would hold.
        expert_bytes: of a native expert.
        plan: see the module.
        low_bytes: of a low expert; for every plan but `native`.
        low_share: of the selections, or of the pairs, that run low, 0-1.
        profile: says which pairs are seldom used; the trace itself if None.
        seed: of the plan `random`.

    Raises:
        ValueError: the bytes cannot hold what one step needs at once, or a bad argument.
    """
    n_tokens, n_layers, k = trace.ids_TLK.shape
    everyone = np.ones(trace.ids_TLK.shape, bool)
    if capacity < k:
        raise ValueError(f"capacity is {capacity}; one step needs {k} experts at once")
    if expert_bytes < 1:
        raise ValueError(f"expert_bytes is {expert_bytes}; want at least 1")
    if plan == "native":
        bank = Bank("native", capacity, expert_bytes, everyone)
        return Layout(plan, [bank], 0, 0.0)
    if low_bytes is None or not 0 < low_bytes < expert_bytes:
        raise ValueError(f"low_bytes is {low_bytes}; want 1 to {expert_bytes - 1}")
    if not 0.0 <= low_share <= 1.0:
        raise ValueError(f"low_share is {low_share}; want 0 to 1")
    n_pairs, budget = n_layers * trace.n_experts, capacity * expert_bytes
    if plan == "floor":
        slots = (budget - n_pairs * low_bytes) // expert_bytes
        if slots < k:
            needed = -(-(n_pairs * low_bytes + k * expert_bytes) // expert_bytes)
            raise ValueError(
                f"capacity is {capacity}; the floor of {n_pairs} low experts and one native step "
                f"need {needed}"
            )
        slots = min(slots, n_pairs)
        native = Bank("native", slots, expert_bytes, everyone, waits=False)
        return Layout(plan, [native], n_pairs, None)
    threshold = None
    if plan == "router_weight":
        threshold = float(np.quantile(trace.weights_TLK, low_share))
        low_TLK = trace.weights_TLK < threshold if low_share < 1.0 else everyone
        n_native = n_low = n_pairs
    elif plan in ("frequency", "random"):
        low_P, order_P = np.zeros(n_pairs, bool), np.random.default_rng(seed).permutation(n_pairs)
        if plan == "frequency":
            order_P = np.argsort((profile or trace).uses_LE.ravel(), kind="stable")
        low_P[order_P[: round(low_share * n_pairs)]] = True
        low_TLK = low_P[trace.keys_TLK]
        n_low = int(low_P.sum())
        n_native = n_pairs - n_low
    else:
        raise ValueError(f"plan is {plan!r}; want one of {', '.join(PLANS)}")
    degraded = float(low_TLK.mean())
    precisions = [
        ("native", ~low_TLK, n_native, expert_bytes, 1 - degraded),
        ("low", low_TLK, n_low, low_bytes, degraded),
    ]
    precisions = [precision for precision in precisions if precision[1].any()]
    # The live pool's own rule, from what the plan expects of each bank.
    demands = [
        BankDemand(
            Signature(precision, precision, precision), size, n, min(k, n), share * n_tokens / n
        )
        for precision, _, n, size, share in precisions
    ]
    if sum(d.expert_bytes * d.min_slots for d in demands) > budget:
        needed = -(-sum(d.expert_bytes * d.min_slots for d in demands) // expert_bytes)
        raise ValueError(f"capacity is {capacity}; one step at both precisions needs {needed}")
    slots_per_bank = divide_budget(demands, budget)
    banks = [
        Bank(precision, slots, size, served_TLK)
        for (precision, served_TLK, _, size, _), slots in zip(
            precisions, slots_per_bank, strict=True
        )
    ]
    return Layout(plan, banks, 0, degraded, threshold)


_Steps = list[tuple[Step, list[int], list[float]]]  # with the keys used and their weights


def _steps(trace: Trace, served_TLK: np.ndarray) -> Iterator[_Steps]:
    """Chunks of tokens: the steps in which `served_TLK` has any selections, with those."""
    # One Python object per key, however often it is used: dictionaries compare those by identity.
    key_P = np.arange(trace.uses_LE.size).astype(object)
    keys_TLK, (n_tokens, n_layers, _) = trace.keys_TLK, trace.ids_TLK.shape
    for start in range(0, n_tokens, _CHUNK_TOKENS):
        part = slice(start, start + _CHUNK_TOKENS)
        served, positions = served_TLK[part], trace.position_T[part].tolist()
        keys = key_P[keys_TLK[part][served]].tolist()
        weights = trace.weights_TLK[part][served].tolist()
        ends = np.cumsum(served.sum(axis=2)).tolist()
        steps = (
            Step(start + i, layer, position)
            for i, position in enumerate(positions)
            for layer in range(n_layers)
        )
        yield [
            (step, keys[begin:end], weights[begin:end])
            for step, begin, end in zip(steps, [0, *ends[:-1]], ends, strict=True)
            if end > begin
        ]


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's cycle collector: a replay makes no cycles, and it would cost a third."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class Walk:
    """What one bank's replay came to; the times are those of the policy, without reading."""

    misses_L: np.ndarray
    seconds: float
    cpu_seconds: float


def walk(trace: Trace, policy: Policy[int], bank: Bank, label: str = "") -> Walk:
    """Plays a bank's selections through its policy, as the engine would."""
    misses_L = [0] * trace.ids_TLK.shape[1]
    begin_step, access_all, admit = policy.begin_step, policy.access_all, policy.admit
    native, seconds, cpu_seconds = bank.precision == "native", 0.0, 0.0
    chunks, n_chunks = _steps(trace, bank.served_TLK), -(-len(trace.ids_TLK) // _CHUNK_TOKENS)
    with _no_collector():
        for steps in tqdm(chunks, total=n_chunks, desc=label, unit="chunk", disable=None):
            began, cpu_began = time.perf_counter(), time.thread_time()
            for step, keys, weights in steps:
                begin_step(step)
                missing = access_all(keys, weights, native)
                if missing:
                    misses_L[step.layer] += len(missing)
                    for key in missing:
                        admit(key, keys)
            seconds += time.perf_counter() - began
            cpu_seconds += time.thread_time() - cpu_began
    return Walk(np.asarray(misses_L), seconds, cpu_seconds)


def make_policy(name: str, trace: Trace, bank: Bank, profile: Trace | None) -> Policy[int]:
    """A policy by its name, with the future or the profile where it needs one.

    Raises:
        ValueError: no policy of that name; lists those there are.
    """
    if name == "belady":
        return Belady(bank.slots, trace.keys_TLK[bank.served_TLK].tolist())
    if name == "pinned_static":
        uses = (profile or trace).uses_LE.ravel().tolist()
        return PinnedStatic(bank.slots, dict(enumerate(uses)))
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; want all, or of {', '.join(REPLAY_POLICIES)}")
    return POLICIES[name](bank.slots)


def replay(
    trace: Trace, name: str, layout: Layout, capacity: int, profile: Trace | None = None
) -> dict[str, Any]:
    """Replays a trace through one policy per bank; the figures, ready for JSON.

    `hit_rate` is of all selections, at the precision that the plan asked for; `wait_rate` is the
    share of selections for which a token would have waited; `residents` are the experts that the
    device holds at the end, at either precision or both. Speeds leave out reading the file; that
    per second of CPU time does not depend on what else the machine does.
    """
    accesses_L = np.zeros(trace.ids_TLK.shape[1], np.int64)
    misses_L, waits, moved, precisions = np.zeros_like(accesses_L), 0, 0, []
    seconds = cpu_seconds = 0.0
    resident_P = np.full(trace.uses_LE.size, layout.low_experts > 0)
    for bank in layout.banks:
        label = name if len(layout.banks) == 1 else f"{name}, {bank.precision}"
        policy = make_policy(name, trace, bank, profile)
        walked = walk(trace, policy, bank, label)
        resident_P |= [key in policy for key in range(len(resident_P))]
        misses, accesses = int(walked.misses_L.sum()), int(bank.served_TLK.sum())
        precisions.append(
            {
                "precision": bank.precision,
                "slots": bank.slots,
                "expert_bytes": bank.expert_bytes,
                "hits": accesses - misses,
                "misses": misses,
                "bytes_moved": misses * bank.expert_bytes,
            }
        )
        accesses_L += bank.served_TLK.sum(axis=(0, 2))
        misses_L += walked.misses_L
        waits += misses if bank.waits else 0
        seconds += walked.seconds
        cpu_seconds += walked.cpu_seconds
        moved += misses * bank.expert_bytes
    accesses, misses = int(accesses_L.sum()), int(misses_L.sum())
    degraded = misses / accesses if layout.degraded_share is None else layout.degraded_share
    return {
        "policy": name,
        "capacity": capacity,
        "hit_rate": 1 - misses / accesses,
        "hits": accesses - misses,
        "misses": misses,
        "accesses": accesses,
        "wait_rate": waits / accesses,
        "bytes_moved": moved,
        "bytes_moved_per_token": moved / len(trace.ids_TLK),
        "plan": layout.plan,
        "slots": sum(bank.slots for bank in layout.banks) + layout.low_experts,
        "residents": int(resident_P.sum()),
        "degraded_share": degraded,
        "threshold": layout.threshold,
        "precisions": precisions,
        "hit_rate_L": (1 - misses_L / np.maximum(accesses_L, 1)).tolist(),
        "accesses_per_s": accesses / max(seconds, 1e-9),
        "accesses_per_cpu_s": accesses / max(cpu_seconds, 1e-9),
        "trace": trace.name,
        "profile": None if profile is None else profile.name,
    }
