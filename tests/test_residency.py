"""Who is resident: warm starts and pins, the adaptive split, promotion, and replays of them."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import REPOSITORY, TWO_BANKS
from pool_invariants import check_invariants, promotion_of
from tiny_models import write_model

from hobbit_jax.cache.adaptive_split import AdaptiveSplit, SplitRule
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, Controller, OnRouting
from hobbit_jax.cache.counter import Replay
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache.policies import LRU
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.pool_sizing import low_share, pool_slots
from hobbit_jax.cache.promotion import PromotionRule
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, ExpertKey
from hobbit_jax.importance.calibration import Calibration
from hobbit_jax.inference.engine import Engine
from pallas_kernels.reference import Signature

RULE = PromotionRule(after_uses=2, per_token=2)


@pytest.fixture(scope="module")
def uses_LE(store):
    """Every count another, so that there is one order."""
    shape = (store.config.n_layers, store.config.n_experts)
    return 1 + np.random.default_rng(4).permutation(shape[0] * shape[1]).reshape(shape)


def budget(store, mode: str, share: float) -> int:
    floor = store.precision_bytes(LOW) if MISS_MODES[mode].low_banks == "all" else 0
    return floor + int(share * store.precision_bytes(NATIVE))


def decode(engine, tokens: int, seed: int = 0) -> np.ndarray:
    """Logits of forced tokens from the first on, without a prompt."""
    engine.start(1, tokens)
    ids_S = np.random.default_rng(seed).integers(0, engine.config.vocab_size, tokens)
    return np.stack([np.asarray(engine.decode(ids_S[[at]])) for at in range(tokens)])


def division(store, mode: str, budget_bytes: int, share: float) -> dict:
    """Slots of each bank, where every expert is asked for natively."""
    layout, shares_pLE = BankLayout.of_store(store), uniform_plan(store).shares_pLE(store.shape_pLE)
    return pool_slots(shares_pLE, MISS_MODES[mode], layout, budget_bytes, share)[0]


def cache_of(mode, promotion) -> CacheConfig:
    """Settings of a replay."""
    return CacheConfig(mode=mode, policy=LRU, promotion=promotion)


def make_pool(store, slots, budget_bytes: int, policy=LRU) -> SlotPool:
    controller = Controller(BankLayout.of_store(store), slots, policy)
    return SlotPool(store, controller, budget_bytes)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("use_low_if_resident", marks=pytest.mark.slow),
        "fetch_low",
        pytest.param("hobbit", marks=pytest.mark.slow),
        pytest.param("floor", marks=pytest.mark.slow),
    ],
)
def test_a_replay_gives_the_counts_of_the_run(model, store, mode):
    """What was watched of a live engine, replayed: every count, and who is resident at the end.

    Half-way the pool is divided anew, which both must survive alike.
    """
    seen: list[RouterOutput] = []
    size = budget(store, mode, 0.5)
    engine = Engine(
        model,
        store,
        CacheConfig(size, mode=mode, promotion=RULE),
        observers=[OnRouting(seen.append)],
    )
    layout = BankLayout.of_store(store)
    replay = Replay(layout, engine.pool.slots, CacheConfig(mode=mode, promotion=RULE))
    number = 0
    for part in range(2):
        decode(engine, 20, seed=part)
        while seen[3 * number : 3 * number + 3]:
            replay.token(seen[3 * number : 3 * number + 3], number)
            number += 1
        stats, pool = engine.counts, engine.pool
        assert replay.counts.bytes_moved == pool.counts.bytes_moved
        assert replay.counts.hits == pool.counts.hits
        assert replay.counts.misses == pool.counts.misses
        assert replay.counts.selections == stats.selections == (part + 1) * 20 * 3 * 2
        assert replay.counts.demoted == stats.demoted > 0
        assert replay.counts.skipped == stats.skipped
        assert set(replay.controller.resident()) == pool.resident()
        check_invariants(pool, store)
        if mode == "floor":
            assert replay.counts.promotions > 0
        if mode == "floor" or part == 1:
            break
        slots = division(store, mode, size, 0.2)
        assert slots != pool.slots
        pool.resize(slots)
        replay.resize(slots)
        check_invariants(pool, store)


def test_a_pool_divided_anew_keeps_whom_it_can(store):
    """After any divisions: within the budget, agreeing with the store, nobody lost for nothing."""
    size = store.precision_bytes(NATIVE) // 2
    divisions = [division(store, "fetch_low", size, share) for share in (0.2, 0.5, 0.8)]
    pool = make_pool(store, divisions[0], size)
    rng = np.random.default_rng(0)
    for round_ in range(9):
        for _ in range(12):
            precision, layer, expert = rng.integers((2, 3, 8)).tolist()
            pool.load([ExpertKey(precision, layer, expert)])
        slots = divisions[rng.integers(3)]
        before, moved = pool.resident(), pool.counts.bytes_moved
        same = {s for s in slots if slots[s] == pool.slots[s]}
        pool.resize(slots)
        check_invariants(pool, store)
        assert pool.slots == slots and pool.resident() <= before
        for bank in pool.controller.banks:
            signature, policy = bank.signature, bank.policy
            had = sum(store.signature(key) == signature for key in before)
            assert len(policy) == min(had, slots[signature]), round_
        uploaded = [key for key in pool.resident() if store.signature(key) not in same]
        assert pool.counts.bytes_moved - moved == sum(map(store.expert_bytes, uploaded))
    with pytest.raises(ValueError, match=f"the budget is {size}"):
        pool.resize(dict.fromkeys(slots, 24))
    with pytest.raises(ValueError, match="want at least"):
        pool.resize(dict.fromkeys(slots, 0))
    with pytest.raises(ValueError, match="want"):
        pool.resize(dict(list(slots.items())[1:]))
    check_invariants(pool, store)


def test_an_upload_that_fails_while_the_pool_is_divided_leaves_it_whole(store, monkeypatch):
    size = store.precision_bytes(NATIVE) // 2
    first, second = (division(store, "fetch_low", size, share) for share in (0.2, 0.5))
    pool = make_pool(store, first, size)
    keys = [
        ExpertKey(precision, layer, expert)
        for precision in (0, 1)
        for layer in (0, 1)
        for expert in (2, 5)
    ]
    for key in keys:
        pool.load([key])
    uploads, send = [], pool.link.send

    def failing(raw, device):
        uploads.append(raw)
        if len(uploads) == 3:
            raise RuntimeError("the bus is down")
        return send(raw, device)

    monkeypatch.setattr(pool.link, "send", failing)
    with pytest.raises(RuntimeError, match="the bus is down"):
        pool.resize(second)
    check_invariants(pool, store)
    for key in keys:
        pool.load([key])
    assert pool.slots == second and set(keys) <= pool.resident()
    check_invariants(pool, store)


def hottest(store, uses_LE, precision: int, signature, leave_out=()) -> list[ExpertKey]:
    """By hand: keys of a bank, the most used first."""
    keys = [
        ExpertKey(precision, layer, expert)
        for layer, expert in np.ndindex(uses_LE.shape)
        if store.layer(precision, layer).signature == signature
        and ExpertKey(NATIVE, layer, expert) not in leave_out
    ]
    return sorted(keys, key=lambda key: -uses_LE[key.layer, key.expert])


def test_a_warm_pool_holds_the_most_used(model, store, uses_LE):
    engine = Engine(
        model,
        store,
        CacheConfig(
            budget(store, "fetch_low", 0.5),
            mode="fetch_low",
            warm=WarmStart(uses_LE, 0.25),
        ),
    )
    pool, native = engine.pool, set()
    for precision in (NATIVE, LOW):
        for signature in {layer.signature for layer in store.precisions[precision]}:
            n_slots = pool.slots[signature]
            ranked = hottest(
                store, uses_LE, precision, signature, native if precision == LOW else ()
            )
            wanted = ranked[:n_slots]
            assert {key for key in pool.resident() if store.signature(key) == signature} == set(
                wanted
            )
            (policy,) = [b.policy for b in pool.controller.banks if b.signature == signature]
            assert policy.pinned == set(ranked[: int(0.25 * n_slots)])
            assert policy.victim() == wanted[-1]  # the least used goes first
        native |= {key for key in pool.resident() if key.precision == NATIVE}
    check_invariants(pool, store)


def test_a_warm_start_changes_no_bit(model, store, uses_LE):
    size = store.precision_bytes(NATIVE) // 2
    cold = Engine(model, store, CacheConfig(size, mode="fetch"))
    logits = decode(cold, 12)
    for warm in (WarmStart(uses_LE), WarmStart(uses_LE, 0.5), WarmStart(uses_LE.max() - uses_LE)):
        engine = Engine(model, store, CacheConfig(size, mode="fetch", warm=warm))
        pinned = {key for bank in engine.controller.banks for key in bank.policy.pinned}
        assert bool(pinned) == bool(warm.pin_share)
        engine.counts.take()
        np.testing.assert_array_equal(decode(engine, 12), logits)
        assert pinned <= engine.pool.resident()
        assert engine.counts.demoted == 0 and engine.counts.misses > 0
        check_invariants(engine.pool, store)


def test_what_a_warm_start_refuses(model, store, uses_LE):
    size = store.precision_bytes(NATIVE) // 2
    with pytest.raises(ValueError, match=r"fewer than 2 of its \d+ slots to stream through"):
        Engine(model, store, CacheConfig(size, warm=WarmStart(uses_LE, 0.9)))
    with pytest.raises(ValueError, match="pin_share is 1; want 0 to below 1"):
        WarmStart(uses_LE, 1)
    with pytest.raises(ValueError, match=r"\[3, 7\]; the model has \[3, 8\]"):
        Engine(model, store, CacheConfig(size, warm=WarmStart(uses_LE[:, :7])))
    # Where everything fits nothing needs a pin.
    full = Engine(model, store, CacheConfig(warm=WarmStart(uses_LE, 0.9)))
    assert not any(bank.policy.pinned for bank in full.controller.banks)
    assert len(full.pool.resident()) == uses_LE.size


def test_the_engine_divides_its_pool_anew_and_goes_on(model, store, uses_LE):
    """Uniform routing: more and smaller copies move fewer bytes. Twice the same bits and counts."""
    runs = []
    for _ in range(2):
        engine = Engine(
            model,
            store,
            CacheConfig(
                budget(store, "use_low_if_resident", 0.7),
                mode="use_low_if_resident",
                low_share="adaptive",
                promotion=RULE,
                warm=WarmStart(uses_LE, 0.25),
            ),
        )
        assert engine.split is not None and engine.split.share == 0.5
        logits = [decode(engine, 35, seed=0), decode(engine, 35, seed=1)]
        assert not engine.split.history  # it had 35 tokens to go by
        slots, before = dict(engine.pool.slots), engine.pool.resident()
        engine.start(1, 8)
        ((tokens_before, share),) = engine.split.history
        assert tokens_before == 70 and share == engine.split.share > 0.5
        assert engine.pool.slots != slots
        wanted = division(store, "use_low_if_resident", engine.pool.budget_bytes, share)
        assert engine.pool.slots == wanted
        for bank in engine.controller.banks:
            signature, policy = bank.signature, bank.policy
            assert len(policy.pinned) == int(0.25 * wanted[signature])
            kept = sum(store.signature(key) == signature for key in before & engine.pool.resident())
            assert kept >= min(wanted[signature], slots[signature]) - len(policy.pinned)
        check_invariants(engine.pool, store)
        logits.append(decode(engine, 35, seed=2))
        check_invariants(engine.pool, store)
        runs.append((np.concatenate(logits), engine.counts, engine.pool.resident()))
    assert np.array_equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    fixed = Engine(model, store, CacheConfig(mode="fetch", low_share="adaptive"))
    assert fixed.split is None


LAYERS, EXPERTS = 2, 16
HIGH_BANK, LOW_BANK = Signature("native", "", ""), Signature("low", "", "")
LAYOUT = BankLayout(
    EXPERTS, 2, [[HIGH_BANK] * LAYERS, [LOW_BANK] * LAYERS], {HIGH_BANK: 30, LOW_BANK: 10}
)
DIVISIONS = {
    0.2: {HIGH_BANK: 12, LOW_BANK: 9},
    0.5: {HIGH_BANK: 7, LOW_BANK: 24},
    0.8: {HIGH_BANK: 3, LOW_BANK: 36},
}


def tokens(count: int, hot_experts: int, seed: int) -> list[list[RouterOutput]]:
    """Two experts a layer; nine in ten selections among the hot_experts."""
    rng, valid_T = np.random.default_rng(seed), np.ones(1, bool)
    popularity = np.full(EXPERTS, 0.1 / EXPERTS)
    popularity[:hot_experts] += 0.9 / hot_experts
    return [
        [
            RouterOutput(
                layer, rng.choice(EXPERTS, (1, 2), False, popularity),
                np.asarray([[0.7, 0.3]]), valid_T,
            )
            for layer in range(LAYERS)
        ]
        for _ in range(count)
    ]  # fmt: skip


def split_of(share: float, mode, promotion, rule: SplitRule) -> AdaptiveSplit:
    """One that begins with the division of `share`."""
    cache = cache_of(mode, promotion)
    executor, everyone_pLE = Replay(LAYOUT, DIVISIONS[share], cache), np.ones(LAYOUT.shape_pLE)
    return AdaptiveSplit(executor, DIVISIONS, cache, everyone_pLE, rule)


def moved(division: dict, part: list, mode: str, rule: PromotionRule = RULE) -> int:
    """Bytes of the second half of `part`."""
    replay = Replay(LAYOUT, division, cache_of(mode, rule))
    tallies = []
    for number, layers in enumerate(part):
        tallies.append(replace(replay.counts))
        replay.token(layers, number)
    return (replay.counts - tallies[len(part) // 2]).bytes_moved


@pytest.mark.parametrize("mode", ["use_low_if_resident", "fetch_low", "hobbit"])
@pytest.mark.parametrize("hot_experts", [4, 16])
def test_the_split_comes_to_the_best_fixed_one(mode, hot_experts):
    """From the worst, judged by every division replayed alone; nothing before its time."""
    rule = SplitRule(margin=0.05, window_tokens=80, first_tokens=60, most_tokens=120)
    routed = tokens(600, hot_experts, 1)
    bytes_of = {share: moved(division, routed, mode) for share, division in DIVISIONS.items()}
    worst = max(bytes_of, key=bytes_of.__getitem__)
    chooser = split_of(worst, mode, RULE, rule)
    for number, layers in enumerate(routed, 1):
        for layer in layers:
            chooser.after_routing(layer)
        if number in (60, 180, 300, 420, 540):  # after 60 tokens, then 120 more at most
            chooser.decide()
        elif number % 7 == 0:
            assert chooser.decide() is None
    best = min(bytes_of.values())
    assert bytes_of[chooser.share] - best <= 0.1 * (bytes_of[worst] - best) > 0, bytes_of


@pytest.mark.parametrize(("margin", "wanted"), [(0.05, 0.8), (1.0, 0.5)])
def test_of_divisions_within_the_margin_the_least_degrading_is_taken(margin, wanted):
    """fetch_low with few hot_experts: 0.8 moves fewest bytes, 0.5 hardly more and degrades less."""
    rule = SplitRule(margin=margin, window_tokens=160, first_tokens=160)
    mode = MISS_MODES["fetch_low"]
    chooser = split_of(0.2, mode, RULE, rule)
    for layers in tokens(160, 4, 1):
        for layer in layers:
            chooser.after_routing(layer)
    assert chooser.decide() == chooser.share == wanted


def test_no_division_is_judged_while_it_fills():
    """Low copies that come one a token make their share look bad until they are there."""
    mode, slow = "use_low_if_resident", PromotionRule(after_uses=2, per_token=1, halving_tokens=64)
    routed = tokens(800, 16, 2)
    begun = {
        share: moved(division, routed[:24], mode, slow) for share, division in DIVISIONS.items()
    }
    later = {share: moved(division, routed, mode, slow) for share, division in DIVISIONS.items()}
    best = min(later, key=later.__getitem__)
    assert min(begun, key=begun.__getitem__) != best
    for most_growth, wanted in ((np.inf, [0.2, best]), (0.1, [])):
        rule = SplitRule(most_growth=most_growth, first_tokens=24, window_tokens=64)
        chooser = split_of(best, mode, slow, rule)
        changes = []
        for layers in routed:
            for layer in layers:
                chooser.after_routing(layer)
            if (new := chooser.decide()) is not None:
                changes.append(new)
        assert changes == wanted


def test_a_newcomer_must_be_used_more_than_whom_it_evicts():
    residents_uses = 4
    for margin, wanted in ((0.0, True), (0.7, True), (1.5, False)):
        promotion = promotion_of(PromotionRule(2, 1, 100, margin), {"old"}, {"new": "old"})
        promotion.note_served(["old"] * residents_uses)
        promotion.note(["new"] * 3)
        assert (promotion.after_tokens(1) == ["new"]) == wanted
    # It goes on counting, and what has been promoted defends itself with what it has earned.
    promotion = promotion_of(PromotionRule(2, 1, 100, 1.5), {"old"}, {"new": "old"})
    promotion.note_served(["old"] * residents_uses)
    promotion.note(["new"] * 7)
    assert promotion.after_tokens(1) == ["new"]
    resident = {"old"}
    promotion = promotion_of(promotion.rule, resident, {"old": "new"})
    promotion.note(["new"] * 7)
    assert promotion.after_tokens(1) == ["new"]  # into a free slot
    resident.symmetric_difference_update({"old", "new"})
    promotion.note(["old"] * 10)
    assert promotion.after_tokens(1) == []
    promotion.note(["old"])
    assert promotion.after_tokens(1) == ["old"]
    with pytest.raises(ValueError, match="margin >= 0"):
        PromotionRule(margin=-1)


def test_two_experts_used_alike_do_not_take_turns():
    """One native slot, two experts: without a margin each promotion undoes the other."""
    ids = [np.asarray([[at % 2]]) for at in range(60)]
    weight_TK, valid_T = np.ones((1, 1)), np.ones(1, bool)
    counts = {}
    for margin in (0.0, 1.5):
        rule = PromotionRule(2, 1, 32, margin)
        layout = BankLayout(2, 1, [[HIGH_BANK], [LOW_BANK]], {HIGH_BANK: 3, LOW_BANK: 2})
        slots = {HIGH_BANK: 1, LOW_BANK: 2}
        replay = Replay(layout, slots, cache_of("floor", rule))
        for at, ids_TK in enumerate(ids):
            replay.token([RouterOutput(0, ids_TK, weight_TK, valid_T)], at)
        counts[margin] = replay.counts
    # Two at the start: the second was picked before the first had a slot.
    assert counts[0.0].promotions > 10 and counts[1.5].promotions == 2


def test_a_share_as_scripts_give_it():
    assert low_share("adaptive") == "adaptive" and low_share("0.25") == 0.25
    for text in ("half", "1.5", "nan"):
        with pytest.raises(ValueError, match=f"low_share is '{text}'; want adaptive or 0 to 1"):
            low_share(text)


def run_script(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


@pytest.mark.slow
def test_a_profile_is_written_read_and_refused(model, two_banks_path, tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "profile"
    text.write_text("the same words, over and over; " * 40, encoding="utf-8")
    done = run_script(
        "calibrate.py", "--model", two_banks_path, "--text", text, "--out", path,
        "--statistics", "routing",
        "--windows", 4, "--context", 20, "--budget_mib", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    profile = Calibration.load(path, model.file)
    assert profile.statistics == "routing" and profile.tokens == 80
    assert (profile.selections_LE.sum(axis=1) == 80 * 2).all()
    lines = done.stdout.splitlines()
    assert len(lines) == 3 + 3 + 1 and lines[0].startswith("80 tokens; ")
    for line, uses_E in zip(lines[3:6], profile.selections_LE, strict=True):
        share_E = uses_E[uses_E > 0] / 160
        _, entropy, quarter, hits = map(float, line.split())
        assert entropy == pytest.approx(-(share_E * np.log2(share_E)).sum(), abs=0.006)
        assert quarter == pytest.approx(np.sort(uses_E)[-2:].sum() / 160, abs=6e-4)
        assert quarter <= hits <= 1
    other = tmp_path / "other.gguf"
    write_model(replace(TWO_BANKS, seed=6), other)
    refused = run_script("generate.py", "--model", other, "--prompt", "he", "--profile", path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "was made for another model" in refused.stderr
    biggest = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    with pytest.raises(ValueError, match="holds no calibration that can be read"):
        Calibration.load(path, model.file)
