"""The slot pool: how a budget is divided, and what holds after any sequence of requests."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from links import Recorded
from pool_invariants import UsesByExpert, all_keys, check_invariants, prefetched_bytes

from hobbit_jax.cache.controller import BankLayout, Controller, Use
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.policies.slru import DEFAULT_PROTECTED_FRACTION, SLRU
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.pool_sizing import BankDemand, demands, divide_budget
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, ExpertKey, HostExperts
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.registry import read_config
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


def make_pool(store, slots, protected_fraction=DEFAULT_PROTECTED_FRACTION, link=None, staged=0):
    """A pool whose two banks get `slots`; the budget has a few bytes too many."""
    shares_pLE = uniform_plan(store).shares_pLE(store.shape_pLE)
    wanted = demands(shares_pLE, BankLayout.of_store(store))
    expert_bytes = [d.expert_bytes for d in wanted]
    budget = sum(b * n for b, n in zip(expert_bytes, slots, strict=True)) + 100
    signatures = [d.signature for d in wanted]
    banks = dict(zip(signatures, divide_budget(wanted, budget), strict=True))
    policy = partial(SLRU, protected_fraction=protected_fraction)
    controller = Controller(BankLayout.of_store(store), banks, policy)
    pool = SlotPool(store, controller, budget, link, staged * store.largest_expert_bytes)
    assert tuple(pool.slots.values()) == slots
    return pool


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slots", [(2, 2), (8, 4)])
def test_invariants_after_any_requests(store, slots, seed):
    """Of a pool that uploads ahead of use; and a twin that does not has the same residents."""
    rng = np.random.default_rng(seed)
    protected, link = 0.5 if seed % 2 else 0.0, Recorded(store)
    pool = make_pool(store, slots, protected, link, staged=seed % 4)
    twin = make_pool(store, slots, protected)
    accesses = misses = dropped = 0
    pinned: set[ExpertKey] = set()
    operations = ["use", "pin", "unpin", "reserve", "promote", "prefetch"]
    for operation in rng.choice(operations, 50, p=[0.3, 0.15, 0.15, 0.15, 0.1, 0.15]):
        layer, count = rng.integers(3), rng.integers(1, 4 if operation == "pin" else 9)
        keys = [ExpertKey(NATIVE, int(layer), int(n)) for n in rng.permutation(8)[:count]]
        signature = store.signature(keys[0])
        of_bank = {key for key in pinned if store.signature(key) == signature}
        sent, before = len(link.events), pool.resident()
        if operation == "use":
            upcoming = [ExpertKey(NATIVE, *rng.integers((3, 8)).tolist()) for _ in range(4)]
            uses, step = [Use(key) for key in keys], Step(0, int(layer), 0)
            batches = pool.controller.batches(keys)
            assert batches == twin.controller.batches(keys)
            wrong = {key for key in pool.prefetched if key.layer == layer and key not in keys}
            still = pool.prefetched.keys() - wrong
            pool.begin(pool.controller.decide(step, uses))
            twin.begin(twin.controller.decide(step, uses))
            assert pool.prefetched.keys() == still
            dropped += sum(map(store.expert_bytes, wrong))
            assert sorted(key for part in batches for key in part) == sorted(keys)
            residency = [key in pool.resident() for part in batches for key in part]
            assert residency == sorted(residency, reverse=True)
            misses += residency.count(False)
            for part in batches:
                twin.load(part)
                for piece in (part[:1], part[1:]):  # of one batch: nobody goes for another
                    pool.load(piece, keep=part, upcoming=upcoming)
                assert set(part) <= pool.resident()
            accesses += len(keys)
        elif operation == "reserve":
            for key in keys:
                pool.reserve(key)
                twin.reserve(key)
            assert pool.resident() == before  # nothing shows before `promote`
        elif operation == "prefetch":
            pool.prefetch(keys)
            assert pool.resident() == before  # nor these before they are needed
        elif operation == "promote":
            pool.promote()
            twin.promote()
            after = pool.resident()
            pool.promote()
            assert pool.resident() == after
        elif operation == "pin" and len(of_bank | set(keys)) > pool.slots[signature] - 2:
            with pytest.raises(ValueError, match=r"fewer than 2 of its \d slots"):
                pool.pin(keys)
            assert pool.resident() == before
        elif operation == "pin":
            pool.pin(keys)
            twin.pin(keys)
            pinned |= set(keys)
        else:
            pool.unpin(keys)
            twin.unpin(keys)
            pinned -= set(keys)
        assert pinned <= pool.resident()
        assert pool.resident() == twin.resident()
        assert all(pool.slot(key) == twin.slot(key) for key in pool.resident())

        new = [ExpertKey(*expert) for what, expert in link.events[sent:] if what == "send"]
        assert operation == "use" or not before & set(new)  # nothing that is there goes again
        check_invariants(pool, store)
    dropped += prefetched_bytes(pool)
    pool.drop_prefetched()
    stats = pool.counts.take()
    assert stats.misses == misses and stats.hits == accesses - misses
    assert stats.bytes_moved == link.sent_bytes and stats.bytes_dropped == dropped
    assert (stats.bytes_ahead > 0) == (pool.staging_bytes > 0)
    # Each upload is waited for once, or given up, or was reserved for a slot that it did not get.
    waits = [expert for what, expert in link.events if what == "fetch"]
    sends = [expert for what, expert in link.events if what == "send"]
    assert not Counter(waits) - Counter(sends)
    assert stats.hit_rate == ((accesses - misses) / accesses if accesses else None)
    assert pool.counts.hit_rate is None and pool.counts.bytes_moved == 0


def test_stats_say_which_expert(store):
    pool = make_pool(store, (2, 2))
    first, second = ExpertKey(0, 1, 3), ExpertKey(0, 1, 5)
    pool.controller.observers.append(counted := UsesByExpert(store.shape_pLE))
    pool.begin(pool.controller.decide(Step(0, 1, 0), [Use(first), Use(second)]))
    pool.load([first, second])
    pool.begin(pool.controller.decide(Step(1, 1, 1), [Use(second)]))
    assert np.argwhere(counted.misses).tolist() == [[0, 1, 3], [0, 1, 5]]
    assert np.argwhere(counted.hits).tolist() == [[0, 1, 5]]
    assert pool.counts.hit_rate == pytest.approx(1 / 3)


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
