"""The precision plan: which precision each selected expert runs at.

Owns the decision per selection, and what share of an expert's selections each precision may expect.
Plans are pytrees, and `assign` runs on NumPy arrays and inside a compiled program alike.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from hobbit_jax.experts.store import NATIVE, HostExperts

SKIPPED = -1  # a selection that no expert serves: padding, or skipped by the plan

SELECTION_SCORES = ("router_weight", "cumulative_weight")
# A NumPy or a JAX array: the caller's choice decides where `assign` computes.
Array = Any
Shape = tuple[int, int, int]  # precisions, layers, experts of a layer


class PrecisionPlan(Protocol):
    """Who gets which precision."""

    def assign(self, layer: int | jax.Array, ids_TK: Array, weights_TK: Array) -> Array:
        """Precision of each selection, int8 [T, K]; selections of a token stand heaviest first."""
        ...

    def shares_pLE(self, shape_pLE: Shape) -> np.ndarray:
        """Share (0-1) of each pair's selections that request each precision, float [p, L, E]."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StaticPlan:
    """Each (layer, expert) pair has one precision."""

    precision_LE: Array

    def assign(self, layer: int | jax.Array, ids_TK: Array, weights_TK: Array) -> Array:
        """See `PrecisionPlan.assign`."""
        return self.precision_LE[layer][ids_TK].astype(np.int8)

    def shares_pLE(self, shape_pLE: Shape) -> np.ndarray:
        """See `PrecisionPlan.shares_pLE`."""
        precision_p11 = np.arange(shape_pLE[0])[:, None, None]
        return (self.precision_LE == precision_p11).astype(np.float64)


def importance_score(score: str, weights_TK: Array) -> Array:
    """How unimportant each selection is, float [T, K]; the largest are demoted first.

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
    meta_fields=("score", "precisions", "shares"),
)
@dataclass(frozen=True)
class SelectionPlan:
    """A selection runs at the precision between whose thresholds its score lies, as in HOBBIT.

    So an expert may need several copies (arXiv 2411.01433, section 3.2).
    A score above the first n thresholds and no more runs at `precisions[n]`. HOBBIT's thresholds T1
    and T2 are score "cumulative_weight", thresholds (T1, T2) and precisions (NATIVE, low, SKIPPED).
    """

    score: str  # one of SELECTION_SCORES, see `importance_score`
    thresholds: tuple[float, ...]  # ascending
    precisions: tuple[int, ...]  # one more; `SKIPPED` leaves the selection out, its weight unused
    shares: tuple[float, ...]  # of the calibration text's selections (0-1), by entry of precisions

    def __post_init__(self):
        if not len(self.precisions) == len(self.shares) == len(self.thresholds) + 1:
            raise ValueError(
                f"{len(self.thresholds)} thresholds with {len(self.precisions)} precisions and "
                f"{len(self.shares)} shares; want one more of each than thresholds"
            )

    def assign(self, layer: int | jax.Array, ids_TK: Array, weights_TK: Array) -> Array:
        """See `PrecisionPlan.assign`."""
        score_TK = importance_score(self.score, weights_TK)
        xp = weights_TK.__array_namespace__()
        precision_TK = xp.full(ids_TK.shape, self.precisions[0], dtype=np.int8)
        for threshold, precision in zip(self.thresholds, self.precisions[1:], strict=True):
            precision_TK = xp.where(score_TK > threshold, np.int8(precision), precision_TK)
        return precision_TK

    def shares_pLE(self, shape_pLE: Shape) -> np.ndarray:
        """See `PrecisionPlan.shares_pLE`."""
        shares_pLE = np.zeros(shape_pLE)
        for precision, share in zip(self.precisions, self.shares, strict=True):
            if precision != SKIPPED:
                shares_pLE[precision] += share
        return shares_pLE


def uniform_plan(store: HostExperts, precision: int = NATIVE) -> StaticPlan:
    """Every expert at one precision."""
    return StaticPlan(np.full((store.config.n_layers, store.config.n_experts), precision, np.int8))
