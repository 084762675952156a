"""Who goes low: the knapsack against every plan there is, thresholds by counting, the signals."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from hobbit_jax.experts.precision import SKIPPED, importance_score
from hobbit_jax.importance.allocation import fit_in_bytes, selection_plan
from hobbit_jax.importance.scores import RoutingProfile, static_scores_LE

# Three precisions of two layers that differ in size, as Q4_K_M's do.
BYTES_NL = np.array([[150, 170], [110, 110], [84, 84]])


def store(n_experts: int):
    precisions = [
        [SimpleNamespace(expert_bytes=int(size)) for size in precision] for precision in BYTES_NL
    ]
    return SimpleNamespace(
        precisions=precisions, config=SimpleNamespace(n_layers=2, n_experts=n_experts)
    )


def total_bytes(precision_LE: np.ndarray) -> int:
    return int(BYTES_NL[precision_LE, np.arange(2)[:, None]].sum())


def total_cost(cost_NLE: np.ndarray, precision_LE: np.ndarray) -> float:
    layer, expert = np.indices(precision_LE.shape)
    return float(cost_NLE[precision_LE, layer, expert].sum())


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_against_every_plan(seed):
    """Within the limit, and short of the optimum by less than its last unfitting upgrade."""
    rng = np.random.default_rng(seed)
    cost_NLE = np.sort(rng.exponential(size=(3, 2, 3)) * [[[0.0]], [[1.0]], [[4.0]]], axis=0)
    plans = [np.array(p).reshape(2, 3) for p in itertools.product(range(3), repeat=6)]
    sizes = np.array([total_bytes(plan) for plan in plans])
    costs = np.array([total_cost(cost_NLE, plan) for plan in plans])
    last = np.inf
    exact = 0
    for limit in range(sizes.min(), sizes.max() + 1, 13):
        found = fit_in_bytes(cost_NLE, store(3), limit).precision_LE
        size, cost = total_bytes(found), total_cost(cost_NLE, found)
        best = costs[sizes <= limit].min()
        assert size <= limit
        # No plan of these very bytes or fewer is far better: one upgrade of one expert at most.
        assert cost <= best + (cost_NLE[2] - cost_NLE[0]).max() + 1e-12
        exact += cost <= best * (1 + 1e-9) + 1e-12
        assert cost <= last + cost_NLE[2].max()
        last = cost
    assert exact >= 8
    everything = fit_in_bytes(cost_NLE, store(3), sizes.max()).precision_LE
    assert not everything.any()


def test_knapsack_leaves_out_what_costs_more_and_is_larger():
    """A middle precision above the line between its neighbours is never a resting place."""
    cost_NLE = np.array([0.0, 9.9, 10.0])[:, None, None] * np.ones((3, 2, 4))
    found = fit_in_bytes(cost_NLE, store(4), 900).precision_LE
    assert set(found.reshape(-1).tolist()) <= {0, 2}


def test_knapsack_refuses():
    cost_NLE = np.ones((3, 2, 3))
    with pytest.raises(ValueError, match=r"503 bytes hold no plan .*; want at least 504"):
        fit_in_bytes(cost_NLE, store(3), 503)
    with pytest.raises(ValueError, match=r"got costs \(3, 2, 4\)"):
        fit_in_bytes(np.ones((3, 2, 4)), store(3), 900)


def profile() -> RoutingProfile:
    rng = np.random.default_rng(0)
    weights_TK = -np.sort(-rng.dirichlet(np.ones(4), 500)).astype(np.float32)
    selections_LE = rng.integers(1, 200, (3, 8))
    return RoutingProfile(selections_LE, selections_LE * rng.random((3, 8)), weights_TK)


@pytest.mark.parametrize("score", ["router_weight", "cumulative_weight"])
def test_hobbits_shares(score):
    """67 % high, 30 % low and 3 % skipped, counted on the text they were derived from."""
    found = profile()
    plan = selection_plan(score, (0, 1, SKIPPED), (0.67, 0.30, 0.03), found)
    precision_TK = plan.assign(0, np.zeros((500, 4), np.int32), found.weights_TK)
    for precision, share, kept in zip(
        (0, 1, SKIPPED), (0.67, 0.30, 0.03), plan.shares, strict=True
    ):
        assert (precision_TK == precision).mean() == pytest.approx(share, abs=1e-3)
        assert kept == pytest.approx((precision_TK == precision).mean(), abs=1e-9)
    scores_TK = importance_score(score, found.weights_TK)
    assert scores_TK[precision_TK == 0].max() <= scores_TK[precision_TK == 1].min()
    assert scores_TK[precision_TK == 1].max() <= scores_TK[precision_TK == SKIPPED].min()
    with pytest.raises(ValueError, match="want a sum of 1"):
        selection_plan(score, (0, 1), (0.5, 0.4), found)


def test_a_tie_stays_together():
    """The heaviest of four has score 0 in every token, so a tenth cannot be split off."""
    plan = selection_plan("cumulative_weight", (0, 1), (0.1, 0.9), profile())
    assert plan.shares == (0.25, 0.75)


def test_signals():
    found = profile()
    frequency = static_scores_LE("frequency", found)
    random = [static_scores_LE("random", found, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(random[0], random[1])
    assert (random[0] != random[2]).any()
    np.testing.assert_allclose(np.sort(random[0], axis=None), np.sort(frequency, axis=None), atol=1)
    mean_LE = found.weight_LE / found.selections_LE
    np.testing.assert_allclose(
        static_scores_LE("hybrid", found), found.selections_LE * mean_LE**2, rtol=1e-12
    )
    with pytest.raises(ValueError, match="needs the measured errors"):
        static_scores_LE("sensitivity", found)
    with pytest.raises(ValueError, match=r"'loudest'; want one of frequency, "):
        static_scores_LE("loudest", found)
