"""Plans: HOBBIT's rule by its own definition, the same on the host and inside a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hobbit_jax.experts.precision import SKIPPED, SelectionPlan, StaticPlan

T1, T2 = 0.6, 0.9  # HOBBIT's thresholds for Mixtral


def routing(tokens: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct experts of 16, weights descending and, as olmoe leaves them, below 1 in sum."""
    rng = np.random.default_rng(0)
    ids_TK = np.argsort(rng.random((tokens, 16)), axis=1)[:, :k].astype(np.int32)
    weights_TK = -np.sort(-rng.dirichlet(np.ones(k + 2), tokens)[:, :k])
    return ids_TK, weights_TK.astype(np.float32)


def hobbit_tier(weights_K: list[float], index: int) -> int:
    """Section 3.2 of arXiv 2411.01433 said one selection at a time."""
    score = sum(weights_K[:index]) / sum(weights_K)
    return 0 if score <= T1 else 1 if score <= T2 else SKIPPED


@pytest.mark.parametrize("k", (2, 8))
def test_hobbit_thresholds(k):
    ids_TK, weights_TK = routing(200, k)
    plan = SelectionPlan("cumulative_weight", (T1, T2), (0, 1, SKIPPED), (0.5, 0.4, 0.1))
    precision_TK = plan.assign(0, ids_TK, weights_TK)
    wanted = [[hobbit_tier(row, i) for i in range(k)] for row in weights_TK.astype(float).tolist()]
    np.testing.assert_array_equal(precision_TK, wanted)
    assert {0, 1, SKIPPED} == set(precision_TK.reshape(-1).tolist())
    assert (precision_TK[:, 0] == 0).all()


@pytest.mark.parametrize(
    "plan",
    [
        StaticPlan(np.random.default_rng(1).integers(0, 3, (4, 16)).astype(np.int8)),
        SelectionPlan("router_weight", (-0.4, -0.1), (0, 2, 1), (0.2, 0.3, 0.5)),
        SelectionPlan("cumulative_weight", (0.3,), (0, SKIPPED), (0.5, 0.5)),
    ],
    ids=["static", "router_weight", "cumulative_weight"],
)
def test_a_program_assigns_what_the_host_does(plan):
    ids_TK, weights_TK = routing(100, 4)
    compiled = jax.jit(lambda plan, layer, ids, weights: plan.assign(layer, ids, weights))
    for layer in range(4):
        on_host = plan.assign(layer, ids_TK, weights_TK)
        on_device = compiled(plan, jnp.int32(layer), jnp.asarray(ids_TK), jnp.asarray(weights_TK))
        assert isinstance(on_host, np.ndarray) and on_host.dtype == np.int8
        assert on_device.dtype == jnp.int8
        np.testing.assert_array_equal(on_device, on_host)


def test_refuses_thresholds_that_do_not_fit_their_precisions():
    with pytest.raises(ValueError, match="2 thresholds with 2 precisions"):
        SelectionPlan("router_weight", (0.1, 0.2), (0, 1), (0.5, 0.5))
