"""The slot pool: how a budget is divided, and what holds after any sequence of requests."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_invariants import all_keys, check_invariants

from hobbit_jax.architecture import read_config
from hobbit_jax.cache.budget import BankDemand, divide_budget
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.policies.slru import DEFAULT_PROTECTED_FRACTION, SLRU
from hobbit_jax.cache.pool import SlotPool, Use
from hobbit_jax.gguf_file import open_gguf
from hobbit_jax.precision import demands, uniform_plan
from hobbit_jax.store import NATIVE, ExpertKey, HostExperts
from pallas_kernels.reference import Signature


def demand(expert_bytes, n_experts, min_slots, weight):
    signature = Signature("Q4_K", "Q4_K", "Q4_K")  # divide_budget does not look at it
    return BankDemand(signature, expert_bytes, n_experts, min(min_slots, n_experts), weight)


some_demands = st.lists(
    st.builds(
        demand,
        st.integers(1, 1000),
        st.integers(1, 40),
        st.integers(0, 8),
        st.sampled_from([0.0, 0.01, 1.0, 7.0]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(some_demands, st.integers(0, 60_000))
def test_divide_budget(banks, extra):
    needed = sum(d.expert_bytes * d.min_slots for d in banks)
    if needed:
        with pytest.raises(ValueError, match=rf"needs at least {needed} bytes") as refusal:
            divide_budget(banks, needed - 1)
        advice_mib = float(str(refusal.value).split("--budget_mib=")[1].split(")")[0])
        divide_budget(banks, int(advice_mib * 2**20))
    slots = divide_budget(banks, needed + extra)
    for d, n in zip(banks, slots, strict=True):
        assert d.min_slots <= n <= d.n_experts
    left = needed + extra - sum(d.expert_bytes * n for d, n in zip(banks, slots, strict=True))
    unfilled = [d.expert_bytes for d, n in zip(banks, slots, strict=True) if n < d.n_experts]
    assert 0 <= left < min(unfilled, default=np.inf)


def test_divide_budget_goes_where_the_uses_are():
    banks = [demand(10, 100, 2, 1.0), demand(10, 100, 2, 3.0)]
    assert divide_budget(banks, 800) == [20, 60]


@pytest.fixture(scope="module")
def store(two_banks_path):
    file = open_gguf(two_banks_path)
    return HostExperts(read_config(file), file)


def make_pool(store, slots, protected_fraction=DEFAULT_PROTECTED_FRACTION):
    """A pool whose two banks get `slots`; the budget has a few bytes too many."""
    wanted = demands(uniform_plan(store), store)
    expert_bytes = [d.expert_bytes for d in wanted]
    budget = sum(b * n for b, n in zip(expert_bytes, slots, strict=True)) + 100
    signatures = [d.signature for d in wanted]
    banks = dict(zip(signatures, divide_budget(wanted, budget), strict=True))
    pool = SlotPool(store, banks, budget, partial(SLRU, protected_fraction=protected_fraction))
    assert tuple(pool.slots.values()) == slots
    return pool


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slots", [(2, 2), (8, 4)])
def test_invariants_after_any_requests(store, slots, seed):
    rng = np.random.default_rng(seed)
    pool = make_pool(store, slots, protected_fraction=0.5 if seed % 2 else 0.0)
    accesses = misses = moved = 0
    pinned: set[ExpertKey] = set()
    operations = ["use", "pin", "unpin", "stage", "commit"]
    for operation in rng.choice(operations, 50, p=[0.4, 0.15, 0.15, 0.2, 0.1]):
        layer, count = rng.integers(3), rng.integers(1, 4 if operation == "pin" else 9)
        keys = [ExpertKey(NATIVE, int(layer), int(n)) for n in rng.permutation(8)[:count]]
        signature = store.signature(keys[0])
        of_bank = {key for key in pinned if store.signature(key) == signature}
        if operation == "use":
            rounds = pool.rounds(keys)
            pool.access(Step(0, int(layer), 0), [Use(key) for key in keys])
            assert sorted(key for part in rounds for key in part) == sorted(keys)
            residency = [key in pool.resident() for part in rounds for key in part]
            assert residency == sorted(residency, reverse=True)
            misses += residency.count(False)
            for part in rounds:
                missing = set(part) - pool.resident()
                moved += sum(store.expert_bytes(key) for key in missing)
                pool.load(part)
                assert set(part) <= pool.resident()
            accesses += len(keys)
        elif operation == "stage":
            before = pool.resident()
            for key in keys:
                pool.stage(key)
            assert pool.resident() == before  # nothing shows before `commit`
        elif operation == "commit":
            before, bytes_before = pool.resident(), pool.stats.bytes_moved
            pool.commit()
            arrived = sum(store.expert_bytes(key) for key in pool.resident() - before)
            moved += pool.stats.bytes_moved - bytes_before
            assert pool.stats.bytes_moved - bytes_before >= arrived
            after = pool.resident()
            pool.commit()
            assert pool.resident() == after and pool.stats.bytes_moved == moved
        elif operation == "pin" and len(of_bank | set(keys)) > pool.slots[signature] - 2:
            before = pool.resident()
            with pytest.raises(ValueError, match=r"fewer than 2 of its \d slots"):
                pool.pin(keys)
            assert pool.resident() == before
        elif operation == "pin":
            moved += sum(store.expert_bytes(key) for key in set(keys) - pool.resident())
            pool.pin(keys)
            pinned |= set(keys)
        else:
            pool.unpin(keys)
            pinned -= set(keys)
        assert pinned <= pool.resident()
        check_invariants(pool, store)
    stats = pool.reset_stats()
    assert stats.misses.sum() == misses and stats.bytes_moved == moved
    assert stats.hits.sum() == accesses - misses
    assert stats.hit_rate == ((accesses - misses) / accesses if accesses else None)
    assert pool.stats.hit_rate is None and pool.stats.bytes_moved == 0


def test_stats_say_which_expert(store):
    pool = make_pool(store, (2, 2))
    first, second = ExpertKey(0, 1, 3), ExpertKey(0, 1, 5)
    pool.access(Step(0, 1, 0), [Use(first), Use(second)])
    pool.load([first, second])
    pool.access(Step(1, 1, 1), [Use(second)])
    assert np.argwhere(pool.stats.misses).tolist() == [[0, 1, 3], [0, 1, 5]]
    assert np.argwhere(pool.stats.hits).tolist() == [[0, 1, 5]]
    assert pool.stats.hit_rate == pytest.approx(1 / 3)


def test_store_hands_out_views_of_the_file(store):
    """No expert is copied on the host, and nobody can write into the file."""
    for key in all_keys(store, NATIVE):
        layer = store.layer(NATIVE, key.layer)
        for raw, tensor in zip(store.raw(key), (layer.gate, layer.up, layer.down), strict=True):
            assert np.shares_memory(raw, tensor.raw) and not raw.flags.writeable
            base = raw
            while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
                base = base.base
            assert isinstance(base, np.memmap)
