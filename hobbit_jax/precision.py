"""The precision plan: which tier each selected expert runs at.

Owns the decision per selection and what the slot pool must expect of it.
Called by the engine after each layer's routing (`assign`) and when a pool is
sized (`demands`). Static plans give each (layer, expert) pair one tier for good;
the router-weight plan decides anew for each selection, as HOBBIT does
(arXiv 2411.01433, section 3.2), and so may need both copies of an expert.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hobbit_jax.cache.pool import BankDemand
from hobbit_jax.store import NATIVE, HostExperts
from pallas_kernels.reference import Signature

SKIPPED = -1  # a selection that no expert serves: padding


class PrecisionPlan(Protocol):
    """Who gets which tier."""

    def assign(self, layer: int, ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
        """Tier of each selection, int8 [T, K]."""
        ...

    def tier_shares_LE(self, store: HostExperts) -> list[np.ndarray]:
        """Per tier, the share (0-1) of each pair's selections it serves, float [L, E]."""
        ...


@dataclass(frozen=True)
class StaticPlan:
    """Each (layer, expert) pair has one tier."""

    tier_LE: np.ndarray

    def assign(self, layer: int, ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
        """See `PrecisionPlan.assign`."""
        return self.tier_LE[layer][ids_TK].astype(np.int8)

    def tier_shares_LE(self, store: HostExperts) -> list[np.ndarray]:
        """See `PrecisionPlan.tier_shares_LE`."""
        return [(self.tier_LE == tier).astype(np.float64) for tier in range(len(store.tiers))]


@dataclass(frozen=True)
class RouterWeightPlan:
    """A selection whose router weight is below `threshold` runs at `low_tier`."""

    threshold: float
    low_tier: int
    low_share: float  # of selections on the calibration text, 0-1

    def assign(self, layer: int, ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
        """See `PrecisionPlan.assign`."""
        return np.where(weights_TK < self.threshold, self.low_tier, NATIVE).astype(np.int8)

    def tier_shares_LE(self, store: HostExperts) -> list[np.ndarray]:
        """See `PrecisionPlan.tier_shares_LE`."""
        shape = (store.config.n_layers, store.config.n_experts)
        shares = [np.zeros(shape) for _ in store.tiers]
        shares[NATIVE] += 1.0 - self.low_share
        shares[self.low_tier] += self.low_share
        return shares


def uniform_plan(store: HostExperts, tier: int = NATIVE) -> StaticPlan:
    """Every expert at one tier."""
    return StaticPlan(np.full((store.config.n_layers, store.config.n_experts), tier, np.int8))


def demands(plan: PrecisionPlan, store: HostExperts) -> list[BankDemand]:
    """What each bank must be able to hold under `plan`, in order of first appearance."""
    k = store.config.experts_per_token
    expert_bytes: dict[Signature, int] = {}
    n_experts: dict[Signature, int] = defaultdict(int)
    widest: dict[Signature, int] = defaultdict(int)
    use: dict[Signature, float] = defaultdict(float)
    shares = plan.tier_shares_LE(store)
    for layer in range(store.config.n_layers):
        in_layer: dict[Signature, int] = defaultdict(int)
        for tier, share_LE in enumerate(shares):
            wanted = int(np.count_nonzero(share_LE[layer]))
            if wanted:
                experts = store.layer(tier, layer)
                expert_bytes[experts.signature] = experts.expert_bytes
                in_layer[experts.signature] += wanted
                use[experts.signature] += float(share_LE[layer].sum())
        for signature, wanted in in_layer.items():
            n_experts[signature] += wanted
            widest[signature] = max(widest[signature], wanted)
    return [
        BankDemand(
            signature=signature,
            expert_bytes=expert_bytes[signature],
            n_experts=n_experts[signature],
            min_slots=min(k, widest[signature]),
            weight=use[signature] / n_experts[signature],
        )
        for signature in expert_bytes
    ]
