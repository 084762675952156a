"""Eviction policies: what holds for all of them, and each against a slow model of its own rule."""

from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest

from hobbit_jax.cache.policies import (
    POLICIES,
    Belady,
    PinnedStatic,
    Step,
    next_use_memory,
    policy_factory,
)
from hobbit_jax.cache.policies.hobbit import Hobbit
from hobbit_jax.cache.policies.layered_lru import LayeredLRU
from hobbit_jax.cache.policies.next_use import NextUse
from hobbit_jax.cache.policies.slru import LRU, SLRU

N_LAYERS, N_EXPERTS, K = 3, 6, 2
KEYS = [(layer, expert) for layer in range(N_LAYERS) for expert in range(N_EXPERTS)]


def random_walk(rng: np.random.Generator, n_tokens: int):
    """Steps of a small model with changing hot experts, each with its (key, weight, native)."""
    position = 0
    for token in range(n_tokens):
        if token % 40 == 0:
            popularity_LE = rng.dirichlet(np.full(N_EXPERTS, 0.6), N_LAYERS) + 0.01
            popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
        position = 0 if rng.random() < 0.05 else position + 1
        for layer in range(N_LAYERS):
            experts = rng.choice(N_EXPERTS, K, replace=False, p=popularity_LE[layer])
            weights = rng.dirichlet(np.ones(K))
            uses = [
                ((layer, int(expert)), float(weight), bool(rng.random() < 0.7))
                for expert, weight in zip(experts, weights, strict=True)
            ]
            yield Step(token, layer, position), uses


def make(name: str, capacity: int, walk: list):
    if name == "belady":
        return Belady(capacity, [key for _, uses in walk for key, _, _ in uses])
    if name == "pinned_static":
        return PinnedStatic(capacity, {key: hash(key) % 7 for key in KEYS})
    return POLICIES[name](capacity)


EVERY_POLICY = [*POLICIES, "pinned_static", "belady"]


def play(name: str, capacity: int, seed: int) -> list:
    """Steps with loads ahead, pins and removals between them; checks what must hold throughout."""
    rng = np.random.default_rng(seed)
    walk = list(random_walk(rng, 60))
    policy, resident, pinned, log = make(name, capacity, walk), set(), set(), []

    def admit(key, keep):
        if len(resident) == capacity and resident <= pinned | set(keep):
            with pytest.raises(RuntimeError, match=f"all {capacity} slots"):
                policy.admit(key, keep)
            return
        victim = policy.admit(key, keep)
        log.append((key, victim))
        assert (victim is not None) == (len(resident) == capacity)
        if victim is not None:
            assert victim in resident and victim not in pinned and victim not in keep
            resident.remove(victim)
        resident.add(key)

    for step, uses in walk:
        policy.begin_step(step)
        keys = [key for key, _, _ in uses]
        hits = [policy.access(key, weight, native) for key, weight, native in uses]
        assert hits == [key in resident for key in keys]
        for key, hit in zip(keys, hits, strict=True):
            if not hit:
                admit(key, keys)
        other = KEYS[rng.integers(len(KEYS))]
        action = rng.choice(["none", "ahead", "pin", "unpin", "remove", "resize"])
        if action == "ahead" and other not in resident:
            admit(other, ())
        elif action == "pin" and other in resident and len(pinned) < capacity - K:
            policy.pin(other)
            pinned.add(other)
        elif action == "unpin":
            policy.unpin(other)
            pinned.discard(other)
        elif action == "remove" and other in resident - pinned:
            policy.remove(other)
            resident.remove(other)
        elif action == "resize":
            least = max(1, len(pinned))
            with pytest.raises(ValueError, match=f"want at least {least}"):
                policy.resize(least - 1)
            capacity = int(rng.integers(least, len(KEYS) + 1))
            evicted = policy.resize(capacity)
            assert policy.capacity == capacity and set(evicted) <= resident - pinned
            assert len(evicted) == max(0, len(resident) - capacity)
            resident -= set(evicted)
            log.append(evicted)
        elif action in ("pin", "remove") and other not in resident:
            with pytest.raises(KeyError):
                getattr(policy, str(action))(other)
        elif action == "remove":
            with pytest.raises(RuntimeError, match="is pinned"):
                policy.remove(other)
        assert len(policy) == len(resident) <= capacity
        assert {key for key in KEYS if key in policy} == resident
        assert policy.pinned == pinned
        if resident:
            with pytest.raises(RuntimeError, match="resident already"):
                policy.admit(next(iter(resident)))
    return log


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [2, 3, 7, 18])
@pytest.mark.parametrize("name", EVERY_POLICY)
def test_any_sequence_of_operations(name, capacity, seed):
    assert play(name, capacity, seed) == play(name, capacity, seed)


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_refusals(name):
    with pytest.raises(ValueError, match="capacity is 0"):
        make(name, 0, [])


def test_refusals_of_names_and_settings():
    with pytest.raises(ValueError, match="policy is 'belady'; want one of lru, slru"):
        policy_factory("belady")
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"protected_fraction is {fraction}"):
            SLRU(2, fraction)
    with pytest.raises(RuntimeError, match="access 1 to b was not foretold"):
        policy = Belady(2, ["a", "a"])
        policy.access("a")
        policy.access("b")


class TableOfAges:
    """SLRU said once more: every resident key has a rank and the time it was last moved."""

    def __init__(self, capacity: int, protected: int):
        self.capacity, self.protected = capacity, protected
        self.entries: dict = {}  # key → (is protected, last moved)
        self.now = 0

    def move(self, key, protect: bool):
        self.now += 1
        self.entries[key] = (protect, self.now)

    def access(self, key) -> bool:
        if key not in self.entries:
            return False
        self.move(key, protect=self.protected > 0)
        protected = [k for k, (is_protected, _) in self.entries.items() if is_protected]
        if len(protected) > self.protected:
            self.move(min(protected, key=self.entries.__getitem__), protect=False)
        return True

    def admit(self, key, keep):
        victim = None
        if len(self.entries) == self.capacity:
            victim = min(self.entries.keys() - set(keep), key=self.entries.__getitem__)
            del self.entries[victim]
        self.move(key, protect=False)
        return victim


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.34, 0.75, 0.99])
@pytest.mark.parametrize("capacity", [2, 5, 10])
def test_slru_and_lru_are_tables_of_ages(capacity, fraction, seed):
    policies = [SLRU(capacity, fraction)] + ([LRU(capacity)] if fraction == 0 else [])
    for policy in policies:
        model = TableOfAges(capacity, int(capacity * fraction))
        for _, uses in random_walk(np.random.default_rng(seed), 150):
            keys = [key for key, _, _ in uses]
            missing = [key for key in keys if not policy.access(key)]
            assert missing == [key for key in keys if not model.access(key)]
            for key in missing:
                assert policy.admit(key, keys) == model.admit(key, keys)


@pytest.mark.parametrize("capacity", [2, 5, 10])
def test_layered_lru_counts_turns(capacity):
    """Of every resident: how often its layer came since, then how far its next turn is."""
    policy, used, steps, victims = LayeredLRU(capacity), {}, [], 0

    def unused(key):
        next_layers = [(steps[-1] + n) % N_LAYERS for n in range(1, N_LAYERS + 1)]
        return steps[used[key] :].count(key[0]), next_layers.index(key[0])

    for step, uses in random_walk(np.random.default_rng(capacity), 150):
        policy.begin_step(step)
        steps.append(step.layer)
        keys = [key for key, _, _ in uses]
        missing = [key for key in keys if not policy.access(key)]
        assert missing == [key for key in keys if key not in used]
        used |= {key: len(steps) for key in keys if key in used}
        for key in missing:
            victim = policy.admit(key, keys)
            if len(used) == capacity:
                most = max(map(unused, used.keys() - set(keys)))
                assert victim not in keys and unused(victim) == most
                del used[victim]
                victims += 1
            used[key] = len(steps)
    assert victims > 50


@pytest.mark.parametrize("capacity", [3, 7, 12])
@pytest.mark.parametrize("name", EVERY_POLICY)
def test_a_step_at_once_is_key_by_key(name, capacity):
    walk = list(random_walk(np.random.default_rng(capacity), 200))
    at_once, by_key = make(name, capacity, walk), make(name, capacity, walk)
    for step, uses in walk:
        keys, weights = [key for key, _, _ in uses], [weight for _, weight, _ in uses]
        native = uses[0][2]
        at_once.begin_step(step)
        by_key.begin_step(step)
        missing = at_once.access_all(keys, weights, native)
        pairs = zip(keys, weights, strict=True)
        assert missing == [key for key, weight in pairs if not by_key.access(key, weight, native)]
        for key in missing:
            assert at_once.admit(key, keys) == by_key.admit(key, keys)


# What each policy says of a key, from the list of all uses so far. The lowest must go.
def decayed_lfu(uses, key, now, half_life=64.0):
    return sum(0.5 ** ((now.token - s.token) / half_life) for s, k, _, _ in uses if k == key)


def lfru(uses, key, now):
    of_key = [s.token for s, k, _, _ in uses if k == key]
    return len(of_key) / (1 + now.token - of_key[-1])


def hobbit(uses, key, now):
    starts = [s.token for s, _, _, _ in uses if s.position == 0 and s.token <= now.token]
    began = max(starts, default=0)
    of_key = [(s, native) for s, k, _, native in uses if k == key and s.token >= began]
    tokens = now.token - began + 1
    recency = max((s.token - began + 1 for s, _ in of_key), default=0) / tokens
    high = sum(native for _, native in of_key) / tokens
    near = 1 - ((key[0] - now.layer) % N_LAYERS) / N_LAYERS
    return 0.7 * recency + 0.1 * (len(of_key) / tokens + high + near)


def pinned_static(uses, key, now):
    return hash(key) % 7


@pytest.mark.parametrize("capacity", [4, 9])
@pytest.mark.parametrize("rule", [decayed_lfu, lfru, hobbit, pinned_static])
def test_the_victim_is_the_lowest_by_the_rule(rule, capacity):
    walk = list(random_walk(np.random.default_rng(capacity), 120))
    policy, uses_so_far, resident, evictions = make(rule.__name__, capacity, walk), [], set(), 0
    for step, uses in walk:
        policy.begin_step(step)
        keys = [key for key, _, _ in uses]
        missing = [key for key, weight, native in uses if not policy.access(key, weight, native)]
        uses_so_far += [(step, *use) for use in uses]
        for key in missing:
            scores = {k: rule(uses_so_far, k, step) for k in resident if k not in keys}
            victim = policy.admit(key, keys)
            if victim is not None:
                evictions += 1
                assert scores[victim] == pytest.approx(min(scores.values()), rel=1e-6)
                resident.remove(victim)
            resident.add(key)
    assert evictions > 50


def test_a_use_at_high_precision_counts_for_hobbit():
    policy = Hobbit(2)
    policy.begin_step(Step(0, 0, 0))
    for key, native in (("low", False), ("high", True)):
        policy.access(key, 1.0, native)
        policy.admit(key)
    assert policy.admit("new") == "low"


def fewest_misses(steps: list[set], capacity: int) -> int:
    """Tries every choice of victims."""
    states = {frozenset(): 0}
    for needed in steps:
        after: dict = defaultdict(lambda: 10**9)
        for resident, misses in states.items():
            total = misses + len(needed - resident)
            spare = resident - needed
            room = min(len(spare), capacity - len(needed))
            for kept in combinations(sorted(spare), room):
                state = frozenset(kept) | needed
                after[state] = min(after[state], total)
        states = after
    return min(states.values())


@pytest.mark.parametrize("seed", range(40))
def test_belady_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    k, capacity = int(rng.integers(1, 4)), int(rng.integers(3, 6))
    steps = [rng.permutation(7)[:k].tolist() for _ in range(14)]
    policy, misses = Belady(capacity, [key for step in steps for key in step]), 0
    for keys in steps:
        missing = [key for key in keys if not policy.access(key)]
        misses += len(missing)
        for key in missing:
            policy.admit(key, keys)
    assert misses == fewest_misses([set(step) for step in steps], capacity)


def misses_of(policy, walk) -> int:
    misses = 0
    for step, keys in walk:
        policy.begin_step(step)
        missing = [key for key in keys if not policy.access(key)]
        misses += len(missing)
        for key in missing:
            policy.admit(key, keys)
    return misses


def test_random_gives_everyone_the_same_chance():
    policy = POLICIES["random"](10)
    for key in range(10):
        policy.admit(key)
    counts = defaultdict(int)
    for _ in range(8000):
        victim = policy.admit(99, keep=(3,))
        counts[victim] += 1
        policy.remove(99)
        policy.admit(victim)
    assert counts.keys() == set(range(10)) - {3}
    spread = np.sqrt(8000 * (1 / 9) * (8 / 9))
    assert all(abs(count - 8000 / 9) < 5 * spread for count in counts.values())


def phrases(rng: np.random.Generator, n_phrases: int):
    """Twelve-token phrases in random order, with half of the experts' choices their own."""
    table = rng.permuted(np.tile(np.arange(32), (20, 12, 4, 1)), axis=-1)[..., :4]
    token = 0
    for phrase in rng.integers(0, 20, n_phrases):
        for place in range(12):
            for layer in range(4):
                keys = [(layer, int(e)) for e in table[phrase, place, layer]]
                yield Step(token, layer, place), keys
            token += 1


def test_next_use_remembers_phrases():
    walk = list(phrases(np.random.default_rng(0), 150))
    misses = {name: misses_of(POLICIES[name](48), walk) for name in ("lru", "lfru", "next_use")}
    bound = misses_of(Belady(48, [key for _, keys in walk for key in keys]), walk)
    others = min(misses["lru"], misses["lfru"])
    assert others - misses["next_use"] > 0.5 * (others - bound)


@pytest.mark.parametrize("seed", range(3))
def test_next_use_evicts_whom_it_expects_last(seed):
    policy, evictions = NextUse(9), 0
    for step, uses in random_walk(np.random.default_rng(seed), 100):
        policy.begin_step(step)
        keys = [key for key, _, _ in uses]
        missing = [key for key, weight, _ in uses if not policy.access(key, weight)]
        policy.begin_step(step)  # the uses are taken in; what it expects is up to date
        for key in missing:
            next_use = {k: policy.expected(k) for k in policy._resident if k not in keys}
            victim = policy.admit(key, keys)
            if victim is not None:
                evictions += 1
                assert next_use[victim] == max(next_use.values())
    assert evictions > 100


def test_next_use_learns_from_steps_of_any_shape():
    """Steps without order: tokens that skip layers, unions of many keys, repeated rounds."""
    rng = np.random.default_rng(1)
    policy, token = NextUse(80), 0
    for _ in range(400):
        token += int(rng.integers(0, 3)) * int(rng.choice([1, 1, 1, 50, 5000]))
        keys = [(int(rng.integers(3)), int(e)) for e in rng.permutation(150)[: rng.integers(1, 60)]]
        policy.begin_step(Step(token, int(rng.integers(3)), 0))
        for key in [key for key in keys if not policy.access(key, float(rng.random()))]:
            policy.admit(key, keys)
    assert len(policy) == 80


def take_in_all(memory, choices, n_experts):
    """Lets one layer take in (token, ranked experts), and yields what it recalls at each."""
    for token, ranked in choices:
        yield next_use_memory.remember(memory, 0, token, np.array(ranked))
        memory.last_use_LE[0, ranked] = token
    assert n_experts <= memory.last_use_LE.shape[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_memory_knows_what_came_after(seed):
    """Also after it has grown, and of two experts in different words of a bit set."""
    rng = np.random.default_rng(seed)
    memory, chosen_at, token = next_use_memory.empty(1, 64), {}, 0
    for n_experts in (64, 100):
        choices = []
        for _ in range(150):
            token += int(rng.choice([1, 1, 1, 2, 9, 40]))
            choices.append((token, rng.permutation(n_experts)[:4].tolist()))
        recalled = list(take_in_all(memory, choices, n_experts))
        for (now, ranked), found_2p in zip(choices, recalled, strict=True):
            for place, likeness in found_2p[found_2p[:, 0] > 0].tolist():
                assert place - 1 in chosen_at and place - 1 < now and likeness >= 1
                assert likeness < next_use_memory.LIKENESSES
                assert set(chosen_at[place - 1][:2]) == set(ranked[:2])
            chosen_at[now] = ranked
        if n_experts == 64:
            memory = next_use_memory.grown(memory, 2, 128)
    for place in chosen_at:
        for expert in range(100):
            after = [t - place for t, ids in chosen_at.items() if t > place and expert in ids]
            soonest = min(after, default=0)
            wanted = soonest if soonest <= next_use_memory.HORIZON else 0
            assert memory.soon_LME[0, place % next_use_memory.MEMORY, expert] == wanted


def test_the_memory_prefers_the_more_alike():
    histories = [([7, 8, 9], [0, 1, 2]), ([4, 5, 6], [0, 1, 3]), ([7, 8, 9], [1, 0, 2])]
    choices = [(10 * i + j, r) for i, pair in enumerate(histories) for j, r in enumerate(pair)]
    *_, found_2p = take_in_all(next_use_memory.empty(1, 64), choices, 64)
    assert found_2p[:, 0].tolist() == [1 + 1, 11 + 1]
    assert found_2p[0, 1] > found_2p[1, 1]


def test_a_step_spares_what_it_uses_while_others_are_resident():
    policy = NextUse(3)
    for token, key in enumerate("abc"):
        policy.begin_step(Step(token, 0, token))
        policy.access(key)
        policy.admit(key)
    assert policy.victim() in "ab"
    assert policy.victim(keep="ab") == "c"


def test_next_use_forgets_an_evicted_key_while_its_arrays_grow():
    policy = NextUse(66)
    for layer, key in enumerate("ab"):
        policy.begin_step(Step(layer, layer, layer))
        policy.access(key)
        policy.admit(key)
    for number in range(64):
        policy.admit(number)
    assert policy.admit(64) == "a"
    assert {policy.admit(number) for number in range(65, 100)} <= {"b", *range(100)}
