"""The pool before the first token: the experts that a profile found most used, and pins of them.

Owns who is loaded in which order. `inference/adaptive_split.py` pins again when it has divided the
pool anew. A profile is `signals/calibration.py`'s (made by `scripts/routing_stats.py`), of
which only the counts matter here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hobbit_jax.cache.miss_modes import LOW, MissMode
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.experts.precision import PrecisionPlan
from hobbit_jax.experts.store import NATIVE, ExpertKey
from pallas_kernels.reference import Signature


@dataclass(frozen=True)
class WarmStart:
    """A profile, and what an engine makes of it.

    Attributes:
        uses_LE: how often each expert is chosen; only the order matters.
        pin_share: share (0 to below 1) of each bank's slots whose experts are never evicted: the
            most used. Banks that hold all their experts need no pins.
    """

    uses_LE: np.ndarray
    pin_share: float = 0.0

    def __post_init__(self):
        if not 0 <= self.pin_share < 1:
            raise ValueError(f"pin_share is {self.pin_share}; want 0 to below 1")

    def fill(self, pool: SlotPool, plan: PrecisionPlan, mode: MissMode) -> None:
        """Loads as many of each bank's most used experts as fit, the most used last, and pins.

        Raises:
            ValueError: a profile of another shape, or pins that leave a bank too few slots.
        """
        for signature, keys in self._ranked(pool, plan, mode).items():
            absent = [key for key in keys if key not in pool]
            free = pool.slots[signature] - len(pool.policies[signature])
            pool.load(absent[:free][::-1])
        self.pin(pool, plan, mode)

    def pin(self, pool: SlotPool, plan: PrecisionPlan, mode: MissMode) -> None:
        """Pins `pin_share` of each bank; loads whom it pins.

        Raises:
            ValueError: too few slots are left to stream the rest through.
        """
        for signature, keys in self._ranked(pool, plan, mode).items():
            if pool.slots[signature] < len(keys):
                pool.pin(keys[: int(self.pin_share * pool.slots[signature])])

    def _ranked(
        self, pool: SlotPool, plan: PrecisionPlan, mode: MissMode
    ) -> dict[Signature, list[ExpertKey]]:
        shares_tLE = np.stack(plan.tier_shares_LE(pool.store))
        bank_tL = [[layer.signature for layer in tier] for tier in pool.store.tiers]
        return rank(self.uses_LE, shares_tLE, bank_tL, pool.slots, mode)


def rank(
    uses_LE: np.ndarray,
    shares_tLE: np.ndarray,
    bank_tL: Sequence[Sequence[Signature]],
    slots: Mapping[Signature, int],
    mode: MissMode,
) -> dict[Signature, list[ExpertKey]]:
    """Who may ask for a slot of each bank, the most used first.

    Low copies that only serve misses are wanted of experts that are not among the most used of
    their native bank.

    Args:
        uses_LE: by a profile.
        shares_tLE: of each pair's selections, by tier: the plan's.
        bank_tL: which bank holds a tier's copies of a layer.
        slots: of each bank.
        mode: whether low copies serve misses.

    Raises:
        ValueError: a profile of another shape.
    """
    if uses_LE.shape != shares_tLE.shape[1:]:
        raise ValueError(
            f"the profile has layers and experts {list(uses_LE.shape)}; the model has "
            f"{list(shares_tLE.shape[1:])}"
        )

    def by_bank(heat_tLE: np.ndarray, wanted: np.ndarray) -> dict[Signature, list[ExpertKey]]:
        order = np.argsort(-heat_tLE[tuple(wanted.T)], kind="stable")
        ranked: dict[Signature, list[ExpertKey]] = {}
        for tier, layer, expert in wanted[order].tolist():
            if (bank := bank_tL[tier][layer]) in slots:
                ranked.setdefault(bank, []).append(ExpertKey(tier, layer, expert))
        return ranked

    heat_tLE = uses_LE * shares_tLE
    ranked = by_bank(heat_tLE, np.argwhere(shares_tLE > 0))
    if mode.low_banks == "none":
        return ranked
    heat_tLE[LOW] += heat_tLE[NATIVE]
    for bank, keys in ranked.items():
        for key in keys[: slots[bank]]:
            if key.tier == NATIVE:
                heat_tLE[LOW, key.layer, key.expert] -= heat_tLE[key]
    everyone = np.argwhere(np.ones(uses_LE.shape, bool))
    return {**ranked, **by_bank(heat_tLE, np.insert(everyone, 0, LOW, axis=1))}
