"""The precision plan: which tier each selected expert runs at.

Owns the decision per selection and what the slot pool must expect of it.
Called by the engine after each layer's routing (`assign`) and when a pool is
sized (`demands`). A static plan gives each (layer, expert) pair one tier for good; a
selection plan decides anew for each selection, as HOBBIT does (arXiv 2411.01433,
section 3.2), and so may need several copies of an expert. Plans are pytrees, and `assign`
runs on NumPy arrays and inside a compiled program alike.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from hobbit_jax.cache.budget import BankDemand
from hobbit_jax.store import NATIVE, HostExperts
from pallas_kernels.reference import Signature

SKIPPED = -1  # a selection that no expert serves: padding, or skipped by the plan

SELECTION_SCORES = ("router_weight", "cumulative_weight")
# A NumPy or a JAX array: the caller's choice decides where `assign` computes.
Array = Any


class PrecisionPlan(Protocol):
    """Who gets which tier."""

    def assign(self, layer: int | jax.Array, ids_TK: Array, weights_TK: Array) -> Array:
        """Tier of each selection, int8 [T, K]; selections of a token stand heaviest first."""
        ...

    def tier_shares_LE(self, store: HostExperts) -> list[np.ndarray]:
        """Per tier, the share (0-1) of each pair's selections it serves, float [L, E]."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StaticPlan:
    """Each (layer, expert) pair has one tier."""

    tier_LE: Array

    def assign(self, layer: int | jax.Array, ids_TK: Array, weights_TK: Array) -> Array:
        """See `PrecisionPlan.assign`."""
        return self.tier_LE[layer][ids_TK].astype(np.int8)

    def tier_shares_LE(self, store: HostExperts) -> list[np.ndarray]:
        """See `PrecisionPlan.tier_shares_LE`."""
        return [(self.tier_LE == tier).astype(np.float64) for tier in range(len(store.tiers))]


def importance_score(score: str, weights_TK: Array) -> Array:
    """How unimportant each selection is, float [T, K]; larger goes lower.

    "router_weight": minus the weight. "cumulative_weight": HOBBIT's, the sum of the weights
    of the token's heavier selections, as a share (0-1) of all K; 0 for the heaviest.

    Raises:
        ValueError: an unknown score.
    """
    if score not in SELECTION_SCORES:
        raise ValueError(f"score is {score!r}; want one of {', '.join(SELECTION_SCORES)}")
    if score == "router_weight":
        return -weights_TK
    xp = weights_TK.__array_namespace__()
    before_TK = xp.cumulative_sum(weights_TK, axis=-1) - weights_TK
    return before_TK / xp.sum(weights_TK, axis=-1, keepdims=True)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("thresholds",),
    meta_fields=("score", "tiers", "shares"),
)
@dataclass(frozen=True)
class SelectionPlan:
    """A selection runs at the tier between whose thresholds its score lies.

    HOBBIT's thresholds T1 and T2 are score "cumulative_weight", thresholds (T1, T2) and tiers
    (NATIVE, low, SKIPPED).

    Attributes:
        score: one of SELECTION_SCORES, see `importance_score`.
        thresholds: ascending; a score above the first n of them and no more runs at `tiers[n]`.
        tiers: one more than thresholds; `SKIPPED` leaves the selection out, its weight unused.
        shares: of the calibration text's selections, by entry of `tiers` (0-1).
    """

    score: str
    thresholds: tuple[float, ...]
    tiers: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self):
        if not len(self.tiers) == len(self.shares) == len(self.thresholds) + 1:
            raise ValueError(
                f"{len(self.thresholds)} thresholds with {len(self.tiers)} tiers and "
                f"{len(self.shares)} shares; want one more of each than thresholds"
            )

    def assign(self, layer: int | jax.Array, ids_TK: Array, weights_TK: Array) -> Array:
        """See `PrecisionPlan.assign`."""
        score_TK = importance_score(self.score, weights_TK)
        xp = weights_TK.__array_namespace__()
        tier_TK = xp.full(ids_TK.shape, self.tiers[0], dtype=np.int8)
        for threshold, tier in zip(self.thresholds, self.tiers[1:], strict=True):
            tier_TK = xp.where(score_TK > threshold, np.int8(tier), tier_TK)
        return tier_TK

    def tier_shares_LE(self, store: HostExperts) -> list[np.ndarray]:
        """See `PrecisionPlan.tier_shares_LE`."""
        shape = (store.config.n_layers, store.config.n_experts)
        shares = [np.zeros(shape) for _ in store.tiers]
        for tier, share in zip(self.tiers, self.shares, strict=True):
            if tier != SKIPPED:
                shares[tier] += share
        return shares


def uniform_plan(store: HostExperts, tier: int = NATIVE) -> StaticPlan:
    """Every expert at one tier."""
    return StaticPlan(np.full((store.config.n_layers, store.config.n_experts), tier, np.int8))


def demands(
    plan: PrecisionPlan, store: HostExperts, owner_LE: np.ndarray | None = None
) -> list[BankDemand]:
    """What each bank must be able to hold under `plan`, in order of first appearance.

    Args:
        plan: who asks for which tier.
        store: experts at every tier.
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
    shares = plan.tier_shares_LE(store)
    for layer in range(store.config.n_layers):
        in_layer_N: dict[Signature, np.ndarray] = defaultdict(nobody_N.copy)
        for tier, share_LE in enumerate(shares):
            owners = owner_LE[layer][share_LE[layer] > 0]
            if len(owners):
                experts = store.layer(tier, layer)
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
