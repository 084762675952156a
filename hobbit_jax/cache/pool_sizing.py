"""How many slots each bank gets under a plan, a miss mode and a budget.

Owns the step from who may ask for which copy (`experts/precision.py`, `miss_modes.py`) to slots per
bank; the division itself is `cache/budget.py`'s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from hobbit_jax.cache.budget import BankDemand, divide_budget, divide_precisions
from hobbit_jax.cache.miss_modes import LOW, MissMode
from hobbit_jax.experts.precision import PrecisionPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.models.sharding import owners_LE
from pallas_kernels.reference import Signature

DEFAULT_LOW_SHARE = 0.5
# `low_share` may be this: it begins at the default and follows what is used (`AdaptiveSplit`).
ADAPTIVE = "adaptive"
CANDIDATE_SHARES = (0.1, 0.2, 0.35, DEFAULT_LOW_SHARE, 0.65, 0.8, 0.9)

LowShare = float | Literal["adaptive"]


def low_share(text: str) -> LowShare:
    """A share as scripts and configs give it: "adaptive", or a number from 0 to 1.

    Raises:
        ValueError: neither of them.
    """
    if text == ADAPTIVE:
        return ADAPTIVE
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(f"low_share is {text!r}; want {ADAPTIVE} or 0 to 1")
    return share


def _total_bytes(wanted: Sequence[BankDemand]) -> int:
    return sum(demand.expert_bytes * demand.n_experts for demand in wanted)


def _signatures(store: HostExperts, precision: int) -> set[Signature]:
    return {layer.signature for layer in store.precisions[precision]}


def demands(
    plan: PrecisionPlan, store: HostExperts, owner_LE: np.ndarray | None = None
) -> list[BankDemand]:
    """What each bank must be able to hold under `plan`, in order of first appearance.

    Args:
        plan: who asks for which precision.
        store: experts at every precision.
        owner_LE: the device of each expert, from 0. A bank's slots are the same on every device, so
            its demand is that of the device which has most to hold. None is one device.
    """
    k, shape_LE = store.config.experts_per_token, (store.config.n_layers, store.config.n_experts)
    owner_LE = np.zeros(shape_LE, int) if owner_LE is None else owner_LE
    nobody_N = np.zeros(int(owner_LE.max()) + 1, int)
    expert_bytes: dict[Signature, int] = {}
    n_experts_N: dict[Signature, np.ndarray] = defaultdict(nobody_N.copy)
    widest: dict[Signature, int] = defaultdict(int)
    use: dict[Signature, float] = defaultdict(float)
    shares = plan.precision_shares_LE(store)
    for layer in range(store.config.n_layers):
        in_layer_N: dict[Signature, np.ndarray] = defaultdict(nobody_N.copy)
        for precision, share_LE in enumerate(shares):
            owners = owner_LE[layer][share_LE[layer] > 0]
            if len(owners):
                experts = store.layer(precision, layer)
                expert_bytes[experts.signature] = experts.expert_bytes
                in_layer_N[experts.signature] += np.bincount(owners, minlength=len(nobody_N))
                use[experts.signature] += float(share_LE[layer].sum())
        for signature, wanted_N in in_layer_N.items():
            n_experts_N[signature] += wanted_N
            widest[signature] = max(widest[signature], int(wanted_N.max()))
    return [
        BankDemand(
            signature=signature,
            expert_bytes=expert_bytes[signature],
            n_experts=int(n_experts_N[signature].max()),
            min_slots=min(k, widest[signature]),
            weight=use[signature] / int(n_experts_N[signature].sum()),
        )
        for signature in expert_bytes
    ]


def pool_slots(
    plan: PrecisionPlan,
    mode: MissMode,
    store: HostExperts,
    budget_bytes: int | None,
    low_share: LowShare,
    n_devices: int = 1,
) -> tuple[dict[Signature, int], int]:
    """Slots per bank of each device, and its bytes that would hold all that anyone may ask for.

    Args:
        plan: who asks for which precision.
        mode: whether low copies serve misses.
        store: experts at every precision.
        budget_bytes: of each device's pool; None holds everything.
        low_share: of the budget for low copies (0-1), where the mode keeps some; a mode that keeps
            all of them takes what they need. "adaptive" begins at the default.
        n_devices: that divide the experts; their pools have equal slots (`demands`).

    Raises:
        ValueError: the budget is too small (says what it needs), or the mode needs a low precision
            that the store does not have.
        NotImplementedError: native and low experts of the same formats, which would share a bank.
    """
    native, low = _wanted(plan, mode, store, n_devices)
    if not low:
        total = _total_bytes(native)
        slots = divide_budget(native, total if budget_bytes is None else budget_bytes)
        return {d.signature: n for d, n in zip(native, slots, strict=True) if n}, total
    total = _total_bytes([*native, *low])
    share = DEFAULT_LOW_SHARE if low_share == ADAPTIVE else low_share
    slots = divide_precisions(native, low, total if budget_bytes is None else budget_bytes, share)
    return slots, total


def least_bytes(plan: PrecisionPlan, mode: MissMode, store: HostExperts) -> int:
    """The smallest budget that `pool_slots` accepts on one device.

    Raises:
        ValueError, NotImplementedError: see `pool_slots`.
    """
    native, low = _wanted(plan, mode, store, n_devices=1)
    return sum(demand.expert_bytes * demand.min_slots for demand in (*native, *low))


def _wanted(
    plan: PrecisionPlan, mode: MissMode, store: HostExperts, n_devices: int
) -> tuple[list[BankDemand], list[BankDemand]]:
    """What the banks of the plan must hold, and those that a miss mode keeps low copies in."""
    owner_LE = owners_LE(store.config.n_layers, store.config.n_experts, n_devices)
    wanted = demands(plan, store, owner_LE)
    if not mode.native_waits:
        wanted = [replace(demand, min_slots=0) for demand in wanted]
    if mode.low_banks == "none":
        return wanted, []
    if len(store.precisions) <= LOW:
        raise ValueError(f"miss mode {type(mode).__name__} needs a store with a low precision")
    if mode.low_banks == "host":
        return wanted, []
    shared = _signatures(store, NATIVE) & _signatures(store, LOW)
    if shared:
        raise NotImplementedError(
            f"native and low experts both have formats {', '.join(map(str, shared))}; miss mode "
            f"{type(mode).__name__} needs a low precision of other formats"
        )
    native = [d for d in wanted if d.signature in _signatures(store, NATIVE)]
    low = demands(uniform_plan(store, LOW), store, owner_LE)
    if mode.low_banks == "all":
        low = [replace(demand, min_slots=demand.n_experts) for demand in low]
    return native, low
