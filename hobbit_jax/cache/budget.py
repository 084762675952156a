"""How the pool's bytes are divided into slots of its banks.

Owns the division: between banks of one precision by expected use, and between the native banks and
the low ones by a share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pallas_kernels.reference import Signature


@dataclass(frozen=True)
class BankDemand:
    """What one bank is asked to hold, in experts and in share of use."""

    signature: Signature
    expert_bytes: int
    n_experts: int  # distinct experts that may ask for a slot
    min_slots: int  # experts that one token's step may need at once
    weight: float = 1.0  # expected uses per expert, relative to the other banks


def divide_budget(demands: Sequence[BankDemand], budget_bytes: int) -> list[int]:
    """Slots per bank within `budget_bytes`: the minima first, then the bank least filled.

    Raises:
        ValueError: the minima alone do not fit; says how many bytes are needed.
    """
    slots = [demand.min_slots for demand in demands]
    needed = sum(d.expert_bytes * s for d, s in zip(demands, slots, strict=True))
    if needed > budget_bytes:
        needed_mib = math.ceil(needed / 2**20 * 1000) / 1000  # rounded up: it must be enough
        raise ValueError(
            f"the expert pool's budget of {budget_bytes} bytes cannot hold one step's experts; "
            f"it needs at least {needed} bytes (--budget_mib={needed_mib})"
        )
    left = budget_bytes - needed

    def fill(i: int) -> float:
        return slots[i] / (demands[i].n_experts * max(demands[i].weight, 1e-9))

    queue = [(fill(i), i) for i in range(len(demands))]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        if slots[i] < demands[i].n_experts and demands[i].expert_bytes <= left:
            slots[i] += 1
            left -= demands[i].expert_bytes
            heapq.heappush(queue, (fill(i), i))
    return slots


def divide_precisions(
    native: Sequence[BankDemand],
    low: Sequence[BankDemand],
    budget_bytes: int,
    low_share: float,
) -> dict[Signature, int]:
    """Slots per bank with `low_share` (0-1) of the budget for the low banks, as near as it goes.

    The low banks get no less than their minima and no more than their experts; what they leave is
    the native banks'. A native bank without a minimum may come out with no slot and is left out.

    Raises:
        ValueError: a share outside 0-1, or a budget below the minima (says what it needs).
    """
    if not 0 <= low_share <= 1:
        raise ValueError(f"low_share is {low_share}; want 0 to 1")
    least = [replace(d, n_experts=d.min_slots) for d in (*native, *low) if d.min_slots]
    divide_budget(least, budget_bytes)  # refuses a budget that is too small for both
    needed_native = sum(d.expert_bytes * d.min_slots for d in native)
    needed_low = sum(d.expert_bytes * d.min_slots for d in low)
    low_bytes = max(needed_low, min(int(low_share * budget_bytes), budget_bytes - needed_native))
    slots = dict(zip((d.signature for d in low), divide_budget(low, low_bytes), strict=True))
    left = budget_bytes - sum(d.expert_bytes * slots[d.signature] for d in low)
    native_slots = divide_budget(native, left)
    banks = dict(zip((d.signature for d in native), native_slots, strict=True))
    return {signature: n for signature, n in {**banks, **slots}.items() if n}
