"""From an importance score and a limit to a precision plan: which experts, or selections, go low.

"The bottom X % by score S" counts (layer, expert) pairs, ranked over the whole model, by static
scores; for selections it counts selections, and the threshold is the X-quantile of the calibration
text.
"""

from collections.abc import Sequence

import numpy as np

from hobbit_jax.experts.precision import (
    SELECTION_SCORES,
    PrecisionPlan,
    SelectionPlan,
    StaticPlan,
    importance_score,
)
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.scores import STATIC_SCORES, RoutingProfile, static_scores_LE

IMPORTANCE_SCORES = (*SELECTION_SCORES, *STATIC_SCORES)


def allocate(
    score: str,
    low_fraction: float,
    low_precision_file: int,
    profile: RoutingProfile,
    seed: int = 0,
    error_LE: np.ndarray | None = None,
) -> PrecisionPlan:
    """The plan that sends the least important `low_fraction` (0-1) to `low_precision_file`.

    Ties go low in order of layer and expert. `seed` matters to `random` only, the
    control that every other score must beat; `error_LE` to `sensitivity` only.

    Raises:
        ValueError: an unknown score or a fraction outside 0-1.
    """
    if not 0 <= low_fraction <= 1:
        raise ValueError(f"low_fraction is {low_fraction}; want 0 to 1")
    if score in SELECTION_SCORES:
        shares = (1 - low_fraction, low_fraction)
        return selection_plan(score, (NATIVE, low_precision_file), shares, profile)
    scores_LE = static_scores_LE(score, profile, error_LE, seed)
    order = np.argsort(scores_LE, axis=None, kind="stable")
    precision = np.zeros(scores_LE.size, np.int8)
    precision[order[: round(low_fraction * scores_LE.size)]] = low_precision_file
    return StaticPlan(precision.reshape(scores_LE.shape))


def selection_plan(
    score: str, precisions: tuple[int, ...], shares: Sequence[float], profile: RoutingProfile
) -> SelectionPlan:
    """Thresholds at which `shares` of the profile's selections, most important first, get
    `precisions`.

    HOBBIT's T1 and T2 are shares (.67, .30, .03) of (NATIVE, low, SKIPPED). Many selections share
    the score 0 of a token's heaviest expert; a threshold inside such a tie leaves all of it above,
    and `shares` of the plan says what came of it.

    Raises:
        ValueError: shares that do not sum to 1 or do not go with `precisions`.
    """
    if len(shares) != len(precisions) or min(shares) < 0 or not np.isclose(sum(shares), 1):
        raise ValueError(f"shares are {tuple(shares)} for precisions {precisions}; want a sum of 1")
    scores = np.sort(importance_score(score, profile.weights_TK), axis=None)
    ends = [round(end * len(scores)) for end in np.cumsum(shares)[:-1]]
    # A score above its threshold goes on to the next precision. At share 0 of the rest that
    # precision has no bank, so no score may ask for it; and at share 1 every one must.
    thresholds = tuple(
        -np.inf if end == 0 else np.inf if end == len(scores) else float(scores[end - 1])
        for end in ends
    )
    above = [int(np.count_nonzero(scores > threshold)) for threshold in thresholds]
    counts = -np.diff(np.array([len(scores), *above, 0]))
    return SelectionPlan(score, thresholds, precisions, tuple((counts / len(scores)).tolist()))


def fit_in_bytes(cost_NLE: np.ndarray, store: HostExperts, limit_bytes: float) -> StaticPlan:
    """The plan of least total cost whose experts take at most `limit_bytes` on the host.

    A multiple-choice knapsack by its usual greedy: start with every pair at its smallest precision
    and make the upgrades on each pair's lower convex hull of (bytes, cost) by gain per byte while
    they fit. That is optimal up to the one upgrade that does not fit (Sinha and Zoltners, 1979).

    Args:
        cost_NLE: what each pair costs at each precision of `store`, native first, at least 0.
        store: gives the bytes.
        limit_bytes: of all experts together.

    Raises:
        ValueError: costs of another shape, or a limit below all experts at their smallest.
    """
    config = store.config
    wanted = (len(store.precisions), config.n_layers, config.n_experts)
    if cost_NLE.shape != wanted:
        raise ValueError(f"got costs {cost_NLE.shape}; want {wanted}, [precisions, L, E]")
    bytes_NL = np.array(
        [[layer.expert_bytes for layer in precision] for precision in store.precisions]
    )
    least = int(bytes_NL.min(axis=0).sum()) * config.n_experts
    if limit_bytes < least:
        raise ValueError(
            f"{limit_bytes:.0f} bytes hold no plan of these precisions; want at least {least}"
        )
    precision_LE = np.repeat(bytes_NL.argmin(axis=0)[:, None], config.n_experts, axis=1)
    upgrades: list[tuple[float, int, int, int, int]] = []
    for layer, expert in np.ndindex(precision_LE.shape):
        bytes_N, cost_N = bytes_NL[:, layer], cost_NLE[:, layer, expert]
        at = int(precision_LE[layer, expert])
        while len(larger := np.flatnonzero(bytes_N > bytes_N[at])):
            # The steepest way down from here is the next corner of the hull.
            gains = (cost_N[at] - cost_N[larger]) / (bytes_N[larger] - bytes_N[at])
            if (gain := gains.max()) < 0:
                break
            corner = int(larger[gains == gain][-1])
            upgrades.append((-gain, layer, expert, at, corner))
            at = corner
    left = limit_bytes - least
    for _, layer, expert, before, after in sorted(upgrades):
        needed = bytes_NL[after, layer] - bytes_NL[before, layer]
        if precision_LE[layer, expert] == before and needed <= left:
            precision_LE[layer, expert] = after
            left -= needed
    return StaticPlan(precision_LE.astype(np.int8))
