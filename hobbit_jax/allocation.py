"""From a signal and a share to a precision plan: which experts, or selections, go low.

Owns the meaning of "the bottom X % by signal S". Called by `sweep.py`. For the
static signals X counts (layer, expert) pairs, ranked over the whole model; for
the router weight it counts selections, and the threshold is the X-quantile of
the calibration text.
"""

from __future__ import annotations

import numpy as np

from hobbit_jax.importance import RoutingProfile
from hobbit_jax.precision import PrecisionPlan, SelectionPlan, StaticPlan
from hobbit_jax.store import NATIVE

SIGNALS = ("router_weight", "frequency", "accumulated_weight", "random")


def allocate(
    signal: str, low_fraction: float, low_tier: int, profile: RoutingProfile, seed: int
) -> PrecisionPlan:
    """The plan that sends the least important `low_fraction` (0-1) to `low_tier`.

    Ties go low in order of layer and expert. `seed` matters to `random` only, the
    control that every other signal must beat.

    Raises:
        ValueError: an unknown signal or a fraction outside 0-1.
    """
    if signal not in SIGNALS:
        raise ValueError(f"signal is {signal!r}; want one of {', '.join(SIGNALS)}")
    if not 0 <= low_fraction <= 1:
        raise ValueError(f"low_fraction is {low_fraction}; want 0 to 1")
    if signal == "router_weight":
        weights = profile.selection_weights
        count = round(low_fraction * len(weights))
        # At 0 and 1 one tier has no bank, so no weight, however small or large, may ask for it.
        sorted_or_end = np.concatenate([weights, [np.inf]])
        threshold = float(sorted_or_end[count]) if count else 0.0
        share = count / len(weights)
        return SelectionPlan("router_weight", (-threshold,), (NATIVE, low_tier), (1 - share, share))
    shape = profile.selections_LE.shape
    scores_LE = {
        "frequency": profile.selections_LE.astype(np.float64),
        "accumulated_weight": profile.weight_LE,
        "random": np.random.default_rng(seed).random(shape),
    }[signal]
    order = np.argsort(scores_LE, axis=None, kind="stable")
    tier = np.zeros(scores_LE.size, np.int8)
    tier[order[: round(low_fraction * scores_LE.size)]] = low_tier
    return StaticPlan(tier.reshape(shape))
