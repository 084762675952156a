"""SLRU against a table of ages that is obviously right, and on real routing traces."""

import numpy as np
import pytest

from hobbit_jax.cache.policies.slru import DEFAULT_PROTECTED_FRACTION, SLRU

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


def operations(rng: np.random.Generator, count: int):
    """Uses, pins and unpins of 12 keys, some more popular; `keep` is what a step needs besides."""
    popularity = rng.dirichlet(np.full(12, 0.7))
    for operation in rng.choice(["use", "pin", "unpin"], count, p=[0.9, 0.05, 0.05]):
        keep = set(rng.integers(0, 12, rng.integers(0, 4)).tolist())
        yield str(operation), int(rng.choice(12, p=popularity)), keep


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.34, 0.75, 0.99])
@pytest.mark.parametrize("capacity", [1, 3, 5, 10])
def test_slru_is_a_table_of_ages(capacity, fraction, seed):
    policy = SLRU(capacity, fraction)
    model = TableOfAges(capacity, protected=int(capacity * fraction))
    rng = np.random.default_rng(seed)
    for operation, key, keep in operations(rng, 300):
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


@pytest.mark.parametrize("capacity", [1, 4, 9])
def test_without_protection_it_is_lru(capacity):
    policy, oldest_first = SLRU(capacity, protected_fraction=0), []
    uses = [key for _, key, _ in operations(np.random.default_rng(capacity), 1000)]
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
