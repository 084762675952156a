"""Miss modes: what serves a missing expert, and that each is a function of its inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
from pool_invariants import check_invariants, promotion_of

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES, miss_mode
from hobbit_jax.cache.pool_sizing import BankDemand, divide_precisions
from hobbit_jax.cache.promotion import PromotionRule
from hobbit_jax.experts.precision import SKIPPED
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.inference.engine import Engine
from pallas_kernels.reference import Signature

PROMPTS, CONTEXT, CHUNK = [[5, 200, 17, 17, 99], [3], [101, 42, 7, 250, 11]], 24, 15
STEPS = 12


def test_what_serves_a_selection():
    """Every mode's rule, written out: residency (native, low) against weights .5 .3 .15 .05."""
    weights_TK = jnp.asarray([[0.5, 0.3, 0.15, 0.05]])  # heavier ones sum to 0 .5 .8 .95
    absent = {
        "fetch": [NATIVE] * 4,
        "use_low_if_resident": [NATIVE] * 4,
        "fetch_low": [LOW] * 4,
        "hobbit": [NATIVE, NATIVE, LOW, SKIPPED],
        "floor": [LOW] * 4,
        "host": [NATIVE] * 4,
        "host_low": [LOW] * 4,
        "hobbit_host": [NATIVE, NATIVE, LOW, SKIPPED],
        "hybrid": [NATIVE] * 4,
    }
    low_only = {**absent, "use_low_if_resident": [LOW] * 4}
    assert absent.keys() == MISS_MODES.keys()
    native_TK = jnp.full((1, 4), NATIVE, jnp.int32)
    for name, mode in MISS_MODES.items():
        for wanted, native, low in [
            (absent[name], False, False),
            (low_only[name], False, True),
            ([NATIVE] * 4, True, False),
            ([NATIVE] * 4, True, True),
        ]:
            resident_pTK = jnp.stack([jnp.full((1, 4), native), jnp.full((1, 4), low)])
            served_TK = mode.serve(native_TK, weights_TK, resident_pTK)
            assert served_TK.tolist() == [wanted], (name, native, low)
            # What the plan itself sends low, or nowhere, is no miss of native.
            for asked in (LOW, SKIPPED):
                requested_TK = jnp.full((1, 4), asked, jnp.int32)
                served_TK = mode.serve(requested_TK, weights_TK, resident_pTK)
                assert served_TK.tolist() == [[asked] * 4], (name, asked)
    with pytest.raises(ValueError, match="want one of fetch, use_low_if_resident"):
        miss_mode("fast")


def decode(engine) -> np.ndarray:
    """Logits [steps, B, V] of forced tokens after prompts of different lengths."""
    engine.start(len(PROMPTS), CONTEXT)
    parts = [np.asarray(engine.prefill(PROMPTS))]
    forced_SB = np.random.default_rng(2).integers(0, engine.config.vocab_size, (STEPS, 3))
    for ids_B in forced_SB:
        parts.append(np.asarray(engine.decode(ids_B)))
        check_invariants(engine.pool, engine.store)
    return np.stack(parts)


@pytest.fixture(scope="module")
def native(model, store):
    return decode(Engine(model, store, CacheConfig(chunk_tokens=CHUNK)))


def engine_of(model, store, mode: str, share: float, **options) -> Engine:
    """A budget of `share` of the native experts beyond the low precision, if that is all
    resident.
    """
    budget = int(share * store.precision_bytes(NATIVE))
    if MISS_MODES[mode].low_banks == "all":
        budget += store.precision_bytes(LOW)
    options = {"promotion": PromotionRule(after_uses=2, per_token=2), **options}
    return Engine(model, store, CacheConfig(budget, mode=mode, chunk_tokens=CHUNK, **options))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("use_low_if_resident", marks=pytest.mark.slow),
        pytest.param("fetch_low", marks=pytest.mark.slow),
        "hobbit",
        pytest.param("floor", marks=pytest.mark.slow),
    ],
)
def test_a_mode_is_deterministic_and_counted(model, store, native, mode):
    """Twice the same bits and the same counts; the pool is whole after every token."""
    runs = []
    for _ in range(2):
        engine = engine_of(model, store, mode, 0.5)
        logits = decode(engine)
        runs.append((logits, engine.counts, engine.pool.resident(), engine.counts.bytes_moved))
    assert np.array_equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    stats, resident = runs[0][1], runs[0][2]
    assert 0 < stats.demoted < stats.selections
    assert (stats.skipped > 0) == (mode == "hobbit")
    difference = np.abs(runs[0][0] - native).max(axis=(1, 2))
    assert difference.max() > 0.01  # degraded it is
    if mode == "floor":
        assert stats.host_round_trips == 0 and engine.counts.misses == 0
        assert all(key._replace(precision=LOW) in resident for key in resident)
        assert any(key.precision == NATIVE for key in resident)  # promoted
    else:
        assert stats.host_round_trips > 0


def test_low_copies_that_no_plan_asks_for_change_nothing(model, store, native):
    """A store with a low precision, without a plan, is the native cache: bits, residents and
    bytes.
    """
    plain = Engine(
        model,
        HostExperts(model.config, model.file),
        CacheConfig(store.precision_bytes(0) // 2, chunk_tokens=CHUNK),
    )
    both = engine_of(model, store, "fetch", 0.5)
    np.testing.assert_array_equal(decode(plain), native)
    np.testing.assert_array_equal(decode(both), native)
    assert both.pool.resident() == plain.pool.resident() and both.pool.slots == plain.pool.slots
    assert both.counts.bytes_moved == plain.counts.bytes_moved
    assert both.counts == plain.counts and both.counts.demoted == 0


def test_a_mode_under_an_unlimited_budget_degrades_only_until_it_has_promoted(model, store, native):
    """With room for everything, use_low_if_resident never serves low: native came first."""
    engine = Engine(model, store, CacheConfig(mode="use_low_if_resident", chunk_tokens=CHUNK))
    np.testing.assert_array_equal(decode(engine), native)
    assert engine.counts.demoted == 0


def test_a_mode_says_what_it_needs(model, store):
    with pytest.raises(ValueError, match="needs at least"):
        Engine(model, store, CacheConfig(store.precision_bytes(LOW) - 1, mode="floor"))
    with pytest.raises(ValueError, match="low precision"):
        Engine(model, HostExperts(model.config, model.file), CacheConfig(mode="floor"))
    with pytest.raises(NotImplementedError, match="other formats"):
        Engine(
            model, HostExperts(model.config, model.file, [model.file]), CacheConfig(mode="floor")
        )


def test_divide_tiers_keeps_the_budget_and_the_share():
    rng = np.random.default_rng(0)
    for _ in range(300):
        demands = [
            BankDemand(
                Signature(str(bank), "", ""),
                int(rng.integers(1, 1000)),
                n := int(rng.integers(1, 40)),
                min(n, int(rng.integers(0, 8))),
                float(rng.choice([0.1, 1.0, 7.0])),
            )
            for bank in range(rng.integers(2, 5))
        ]
        cut = int(rng.integers(1, len(demands)))
        native, low = demands[:cut], demands[cut:]
        needed = sum(d.expert_bytes * d.min_slots for d in demands)
        share, budget = float(rng.random()), needed + int(rng.integers(0, 40_000))
        slots = divide_precisions(native, low, budget, share)
        taken = {d.signature: slots.get(d.signature, 0) for d in demands}
        assert sum(d.expert_bytes * taken[d.signature] for d in demands) <= budget
        assert all(d.min_slots <= taken[d.signature] <= d.n_experts for d in demands)
        low_bytes = sum(d.expert_bytes * taken[d.signature] for d in low)
        low_least = sum(d.expert_bytes * d.min_slots for d in low)
        assert low_bytes <= max(low_least, share * budget)
        unfilled = [d.expert_bytes for d in low if taken[d.signature] < d.n_experts]
        native_least = sum(d.expert_bytes * d.min_slots for d in native)
        room = min(share * budget, budget - native_least) - low_bytes
        assert not unfilled or room < min(unfilled)
        if needed:
            with pytest.raises(ValueError, match=f"needs at least {needed} bytes"):
                divide_precisions(native, low, needed - 1, share)


def test_promotion_takes_the_most_used_and_forgets():
    resident = {"c"}
    promotion = promotion_of(PromotionRule(after_uses=2, per_token=1, halving_tokens=4), resident)
    promotion.note(["a", "b", "b", "c", "c", "c"])
    assert promotion.after_tokens(1) == ["b"]  # c is resident, a was used once
    resident.clear()
    assert promotion.after_tokens(1) == ["c"]
    promotion.note(["a"])
    assert promotion.after_tokens(1) == ["a"]
    promotion.note(["d", "d", "e"])
    assert promotion.after_tokens(1) == []  # halved before it was looked at
    promotion.note(["d"])
    assert promotion.after_tokens(1) == ["d"]
    promotion.note(["e", "f", "f", "e"])
    assert promotion.after_tokens(2) == ["e", "f"]  # as many as tokens allow
