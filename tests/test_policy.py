"""SLRU against a table of ages that is obviously right, and on real routing traces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hobbit_jax.cache.policy import DEFAULT_PROTECTED_FRACTION, SLRU

# Hit rates of a cold start over the first 2,000 tokens of real DeepSeek-V2-Lite routing, 416 of
# its 1,664 experts resident. Recorded from this code; a plain dictionary gives the two of LRU too.
TRACE_CAPACITY, TRACE_TOKENS = 416, 2000
TRACE_HIT_RATES = {
    ("intent", "lru"): 0.483038,
    ("intent", "slru"): 0.480471,
    ("law", "lru"): 0.474487,
    ("law", "slru"): 0.478006,
}


class TableOfAges:
    """SLRU said once more: every resident key has a rank and the time it was last moved."""

    def __init__(self, capacity: int, protected: int):
        self.capacity, self.protected = capacity, protected
        self.entries: dict[int, tuple[bool, int]] = {}  # key → (is protected, last moved)
        self.pinned: set[int] = set()
        self.now = 0

    def move(self, key: int, protect: bool):
        self.now += 1
        self.entries[key] = (protect, self.now)

    def access(self, key: int) -> bool:
        if key not in self.entries:
            return False
        self.move(key, protect=self.protected > 0)
        protected = [k for k, (is_protected, _) in self.entries.items() if is_protected]
        if len(protected) > self.protected:
            self.move(min(protected, key=self.entries.__getitem__), protect=False)
        return True

    def admit(self, key: int, keep: set[int]) -> int | None:
        victim = None
        if len(self.entries) == self.capacity:
            victim = min(self.entries.keys() - self.pinned - keep, key=self.entries.__getitem__)
            del self.entries[victim]
        self.move(key, protect=False)
        return victim


keys = st.integers(0, 11)
operations = st.lists(
    st.tuples(st.sampled_from(["use", "use", "use", "pin", "unpin"]), keys, st.sets(keys)),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.34, 0.5, 0.75, 0.99]), operations)
def test_slru_is_a_table_of_ages(capacity, fraction, operations):
    policy = SLRU(capacity, fraction)
    model = TableOfAges(capacity, protected=int(capacity * fraction))
    for operation, key, keep in operations:
        before = set(model.entries)
        if operation == "use":
            hit = policy.access(key)
            assert hit == model.access(key)
            if not hit and len(before) == capacity and before <= model.pinned | keep:
                with pytest.raises(RuntimeError, match=f"all {capacity} slots"):
                    policy.admit(key, keep)
            elif not hit:
                victim = policy.admit(key, keep)
                assert victim == model.admit(key, keep)
                assert victim is None or victim not in model.pinned | keep
        elif operation == "pin" and key in before:
            policy.pin(key)
            model.pinned.add(key)
        elif operation == "pin":
            with pytest.raises(KeyError):
                policy.pin(key)
        else:
            policy.unpin(key)
            model.pinned.discard(key)
        assert {k for k in range(12) if k in policy} == model.entries.keys()
        assert len(policy) == len(model.entries) <= capacity
        assert policy.pinned == model.pinned <= model.entries.keys()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.lists(keys, max_size=120))
def test_without_protection_it_is_lru(capacity, uses):
    policy, oldest_first = SLRU(capacity, protected_fraction=0), []
    for key in uses:
        assert policy.access(key) == (key in oldest_first)
        if key in oldest_first:
            oldest_first.remove(key)
        else:
            full = len(oldest_first) == capacity
            assert policy.admit(key) == (oldest_first.pop(0) if full else None)
        oldest_first.append(key)


def test_refusals():
    policy = SLRU(2)
    policy.admit("a")
    with pytest.raises(RuntimeError, match="a is resident already"):
        policy.admit("a")
    with pytest.raises(ValueError, match="capacity is 0"):
        SLRU(0)
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"protected_fraction is {fraction}"):
            SLRU(2, fraction)


@pytest.mark.parametrize("trace", ["intent", "law"])
@pytest.mark.parametrize("kind", ["lru", "slru"])
def test_hit_rate_on_real_routing(data_dir, trace, kind):
    path = data_dir / "traces" / f"deepseek_v2_lite_{trace}.npz"
    if not path.is_file():
        pytest.skip(f"no trace at {path}")
    with np.load(path) as arrays:
        ids_TLK = arrays["expert_ids"][:TRACE_TOKENS].astype(int)
    keys_TLK = ids_TLK + 64 * np.arange(ids_TLK.shape[1])[:, None]
    policy = SLRU(TRACE_CAPACITY, 0.0 if kind == "lru" else DEFAULT_PROTECTED_FRACTION)
    hits = 0
    for keys_K in keys_TLK.reshape(-1, ids_TLK.shape[2]).tolist():
        missing = [key for key in keys_K if not policy.access(key)]
        hits += len(keys_K) - len(missing)
        for key in missing:
            policy.admit(key, keep=keys_K)
    assert hits / keys_TLK.size == pytest.approx(TRACE_HIT_RATES[trace, kind], abs=1e-6)
