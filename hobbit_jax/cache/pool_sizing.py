"""How many slots each bank gets under a plan, a miss mode and a budget.

Owns what each bank must hold, and the division of the bytes: between banks of one precision by
expected use, between native and low banks by a share.
"""

import contextlib
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.miss_modes import LOW, MissMode
from hobbit_jax.experts.store import NATIVE
from hobbit_jax.models.sharding import owners_LE
from pallas_kernels.reference import Signature

DEFAULT_LOW_SHARE = 0.5
# `low_share` may be this: it begins at the default and follows what is used (`AdaptiveSplit`).
ADAPTIVE = "adaptive"
CANDIDATE_SHARES = (0.1, 0.2, 0.35, DEFAULT_LOW_SHARE, 0.65, 0.8, 0.9)

LowShare = float | Literal["adaptive"]


def low_share(text: str) -> LowShare:
    """A share as scripts and configs give it: "adaptive", or a number from 0 to 1."""
    if text == ADAPTIVE:
        return ADAPTIVE
    with contextlib.suppress(ValueError):
        if 0 <= (share := float(text)) <= 1:
            return share
    raise ValueError(f"low_share is {text!r}; want {ADAPTIVE} or 0 to 1")


@dataclass(frozen=True)
class BankDemand:
    """What one bank is asked to hold, in experts and in share of use."""

    signature: Signature
    expert_bytes: int
    n_experts: int  # distinct experts that may ask for a slot
    min_slots: int  # experts that one token's step may need at once
    weight: float = 1.0  # expected uses per expert, relative to the other banks

    @property
    def min_bytes(self) -> int:
        """Of `min_slots`."""
        return self.expert_bytes * self.min_slots


def _check_budget(demands: Iterable[BankDemand], budget_bytes: int) -> None:
    needed = sum(demand.min_bytes for demand in demands)
    if needed > budget_bytes:
        needed_mib = math.ceil(needed / 2**20 * 1000) / 1000  # rounded up: it must be enough
        raise ValueError(
            f"the expert pool's budget of {budget_bytes} bytes cannot hold one step's experts; "
            f"it needs at least {needed} bytes (--budget_mib={needed_mib})"
        )


def divide_budget(demands: Sequence[BankDemand], budget_bytes: int) -> list[int]:
    """Slots per bank within `budget_bytes`: the minima first, then the bank least filled.

    Raises:
        ValueError: the minima alone do not fit; says how many bytes are needed.
    """
    _check_budget(demands, budget_bytes)
    slots = [demand.min_slots for demand in demands]
    left = budget_bytes - sum(demand.min_bytes for demand in demands)

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
    native: Sequence[BankDemand], low: Sequence[BankDemand], budget_bytes: int, low_share: float
) -> dict[Signature, int]:
    """Slots per bank with `low_share` (0-1) of the budget for the low banks, as near as it goes.

    The low banks get no less than their minima and no more than their experts; what they leave is
    the native banks'. A native bank without a minimum may come out with no slot and is left out.

    Raises:
        ValueError: a share outside 0-1, or a budget below the minima (says what it needs).
    """
    if not 0 <= low_share <= 1:
        raise ValueError(f"low_share is {low_share}; want 0 to 1")
    _check_budget([*native, *low], budget_bytes)
    needed_native, needed_low = (sum(d.min_bytes for d in banks) for banks in (native, low))
    low_bytes = max(needed_low, min(int(low_share * budget_bytes), budget_bytes - needed_native))
    low_slots = divide_budget(low, low_bytes)
    left = budget_bytes - sum(d.expert_bytes * n for d, n in zip(low, low_slots, strict=True))
    slots = [*divide_budget(native, left), *low_slots]
    return {d.signature: n for d, n in zip([*native, *low], slots, strict=True) if n}


def demands(shares_pLE: np.ndarray, layout: BankLayout) -> list[BankDemand]:
    """What each bank must be able to hold, in order of first appearance.

    A bank's slots are the same on every device, so its demand is that of the device that has most
    to hold. `shares_pLE` are each pair's selections by precision: the plan's, or expected uses.
    """
    _, n_layers, n_experts = layout.shape_pLE
    owner_LE, n_devices = owners_LE(n_layers, n_experts, layout.n_devices), layout.n_devices
    experts_LN = defaultdict[Signature, np.ndarray](lambda: np.zeros((n_layers, n_devices), int))
    use = defaultdict[Signature, float](float)
    for layer, precision in np.argwhere((shares_pLE > 0).any(axis=2).T).tolist():
        signature, share_E = layout.signature_pL[precision][layer], shares_pLE[precision, layer]
        owner_E = owner_LE[layer][share_E > 0]
        experts_LN[signature][layer] += np.bincount(owner_E, minlength=n_devices)
        use[signature] += float(share_E.sum())
    return [
        BankDemand(
            signature=signature,
            expert_bytes=layout.expert_bytes[signature],
            n_experts=int(wanted_LN.sum(axis=0).max()),
            min_slots=min(layout.experts_per_token, int(wanted_LN.max())),
            weight=use[signature] / int(wanted_LN.sum()),
        )
        for signature, wanted_LN in experts_LN.items()
    ]


def pool_slots(
    shares_pLE: np.ndarray,
    mode: MissMode,
    layout: BankLayout,
    budget_bytes: int | None,
    low_share: LowShare,
) -> tuple[dict[Signature, int], int]:
    """Slots per bank on each device, and its bytes for every copy that may be asked for.

    Args:
        shares_pLE: of each pair's selections, by precision: who asks for which precision.
        mode: whether low copies serve misses.
        layout: which bank holds which copies.
        budget_bytes: of each device's pool; None holds everything.
        low_share: of the budget for low copies (0-1), where the mode keeps some; a mode that keeps
            all of them takes what they need. "adaptive" begins at the default.

    Raises:
        ValueError: the budget is too small (says what it needs), or the mode needs a low precision
            that there is not.
        NotImplementedError: native and low experts of the same formats, which would share a bank.
    """
    native, low = _wanted(shares_pLE, mode, layout)
    total = sum(demand.expert_bytes * demand.n_experts for demand in (*native, *low))
    share = DEFAULT_LOW_SHARE if low_share == ADAPTIVE else low_share
    slots = divide_precisions(native, low, total if budget_bytes is None else budget_bytes, share)
    return slots, total


def least_bytes(shares_pLE: np.ndarray, mode: MissMode, layout: BankLayout) -> int:
    """The smallest budget that `pool_slots` accepts on one device; raises what that does."""
    native, low = _wanted(shares_pLE, mode, layout)
    return sum(demand.min_bytes for demand in (*native, *low))


def _wanted(
    shares_pLE: np.ndarray, mode: MissMode, layout: BankLayout
) -> tuple[list[BankDemand], list[BankDemand]]:
    """What the banks of the plan must hold, and those that a miss mode keeps low copies in."""
    wanted = demands(shares_pLE, layout)
    if not mode.native_waits:
        wanted = [replace(demand, min_slots=0) for demand in wanted]
    if mode.low_banks == "none":
        return wanted, []
    if len(shares_pLE) <= LOW:
        raise ValueError(f"miss mode {type(mode).__name__} needs a store with a low precision")
    if mode.low_banks == "host":
        return wanted, []
    natives, lows = (set(layout.signature_pL[precision]) for precision in (NATIVE, LOW))
    if shared := natives & lows:
        raise NotImplementedError(
            f"native and low experts both have formats {', '.join(map(str, shared))}; miss mode "
            f"{type(mode).__name__} needs a low precision of other formats"
        )
    native = [demand for demand in wanted if demand.signature in natives]
    all_low_pLE = np.zeros_like(shares_pLE)
    all_low_pLE[LOW] = 1
    low = demands(all_low_pLE, layout)
    if mode.low_banks == "all":
        low = [replace(demand, min_slots=demand.n_experts) for demand in low]
    return native, low
