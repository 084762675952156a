"""Misses computed on the CPU: the device's own bits, who goes where, and what fails on the way."""

import itertools
import os
import shutil

import numpy as np
import pytest
from pool_invariants import check_invariants

import hobbit_jax.inference.host_compute as host_compute
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import LOW, Action, Host, Hybrid, Use
from hobbit_jax.cache.promotion import PromotionRule
from hobbit_jax.cache.warm_start import load_all
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, ExpertKey, HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.loading import load_model

PROMPTS, CONTEXT, CHUNK = [[5, 200, 17, 17, 99], [3], [101, 42, 7, 250, 11]], 24, 15
RULE = PromotionRule(after_uses=2, per_token=1)
STEPS = 5


def engine_of(model, store, mode, share: float, devices: int = 1) -> Engine:
    """A pool for a share of the native experts, of all devices together."""
    budget_bytes = int(share * store.precision_bytes(NATIVE)) // devices
    cache = CacheConfig(
        budget_bytes, mode=mode, promotion=RULE, chunk_tokens=CHUNK, devices=devices
    )
    return Engine(model, store, cache)


def decode(engine) -> np.ndarray:
    """Logits of prompts of different lengths and of forced tokens after them, [steps, B, V]."""
    engine.start(len(PROMPTS), CONTEXT)
    parts = [np.asarray(engine.prefill(PROMPTS))]
    forced_SB = np.random.default_rng(2).integers(0, engine.config.vocab_size, (STEPS, 3))
    parts += [np.asarray(engine.decode(ids_B)) for ids_B in forced_SB]
    return np.stack(parts)


@pytest.fixture(scope="module")
def resident(model, store):
    return decode(Engine(model, store, CacheConfig(chunk_tokens=CHUNK)))


@pytest.mark.parametrize(
    ("mode", "share"),
    [
        ("host", 0.0),
        pytest.param("hybrid", 0.5, marks=pytest.mark.slow),
        pytest.param("host", 0.3, marks=pytest.mark.slow),
    ],
)
def test_the_cpu_computes_the_bits_of_the_device(model, store, resident, mode, share):
    """Without any slot too; what many tokens of a prompt share is fetched where it has a slot."""
    engine = engine_of(model, store, mode, share)
    engine.start(len(PROMPTS), CONTEXT)
    engine.prefill(PROMPTS)
    prompt = engine.counts.take()
    assert prompt.computed > 0 and (prompt.bytes_moved > 0) == (share > 0)
    np.testing.assert_array_equal(decode(engine), resident)
    assert engine.counts.bytes_computed > 0
    check_invariants(engine.pool, store)


@pytest.mark.slow
def test_four_devices_share_one_cpu(model, store, resident):
    engine = engine_of(model, store, "hybrid", 0.5, devices=4)
    np.testing.assert_array_equal(decode(engine), resident)
    assert engine.counts.computed > 0 and engine.counts.bytes_moved > 0
    check_invariants(engine.pool, store)


def test_ggml_reads_the_map_for_both(two_banks_path, store):
    model = load_model(two_banks_path, "ggml")
    wanted = decode(Engine(model, store, CacheConfig(chunk_tokens=CHUNK)))
    for share in (0.0, 0.3):
        np.testing.assert_array_equal(decode(engine_of(model, store, "host", share)), wanted)


@pytest.mark.slow
def test_low_copies_on_the_cpu_are_the_low_precision(model, store):
    """With no slot all is served low, bit for bit; with some, hot experts become native."""
    low = CacheConfig(plan=uniform_plan(store, LOW), chunk_tokens=CHUNK)
    wanted = decode(Engine(model, store, low))
    np.testing.assert_array_equal(decode(engine_of(model, store, "host_low", 0.0)), wanted)
    engine = engine_of(model, store, "host_low", 0.5)
    decode(engine)
    assert 0 < engine.counts.demoted < engine.counts.selections
    assert {key.precision for key in engine.pool.resident()} == {NATIVE}


def test_only_promotion_gives_a_slot_in_decode(model, store):
    """Whatever misses, at most one upload a token: the budget of the promotion rule."""
    engine = engine_of(model, store, "host", 0.3)
    engine.start(1, CONTEXT)
    for number, token in enumerate(np.random.default_rng(3).integers(0, 256, 16), 1):
        engine.decode(np.asarray([token]))
        assert engine.counts.bytes_moved <= number * store.largest_expert_bytes
    stats = engine.counts
    assert stats.bytes_moved > 0 and stats.computed == stats.misses > 16


def test_who_is_fetched_and_who_is_computed():
    """By hand, and against every division of up to seven misses."""

    def miss(rows: int, expert: int = 0) -> Use:
        return Use(ExpertKey(NATIVE, 0, expert), rows=rows)

    host = Host(link_to_host=0.25)  # a fetch takes as long as four reads, or eight rows
    assert host.act([miss(1), miss(8), miss(9)]) == [Action.HOST, Action.HOST, Action.FETCH]
    even = Hybrid(link_to_host=1.0)
    assert even.act([miss(1, e) for e in range(4)]).count(Action.FETCH) == 2
    slow = Hybrid(link_to_host=0.41)
    assert slow.act([miss(1, e) for e in range(100)]).count(Action.FETCH) == 29  # 0.41 / 1.41
    rng = np.random.default_rng(0)
    for _ in range(50):
        mode = Hybrid(link_to_host=float(rng.uniform(0.1, 3)))
        rows = rng.integers(1, 20, rng.integers(1, 8)).tolist()

        def makespan(fetched, mode=mode, rows=rows) -> float:
            link = sum(1 / mode.link_to_host for f in fetched if f)
            cpu = sum(max(1, r / 2) for r, f in zip(rows, fetched, strict=True) if not f)
            return max(link, cpu)

        found = makespan([a is Action.FETCH for a in mode.act([miss(r) for r in rows])])
        all_ways = [makespan(way) for way in itertools.product((False, True), repeat=len(rows))]
        assert found <= min(makespan([True] * len(rows)), makespan([False] * len(rows))) + 1e-9
        assert found <= 1.5 * min(all_ways)  # the bound of list scheduling on two machines


@pytest.mark.slow
def test_the_router_prefers_what_is_resident(two_banks_path, model, store, resident):
    """By NumPy on one router; and in decode the same bits where all are resident."""
    router = load_model(two_banks_path, "xla").layers.kinds.block(model.layers.states, 0, 0).router
    rng = np.random.default_rng(4)
    h_TD = rng.normal(size=(64, model.config.d_model)).astype(np.float32)
    resident_E = np.arange(model.config.n_experts) % 3 == 0
    scores_TE, k = np.asarray(router.scores(h_TD), np.float64), model.config.experts_per_token
    for lift in (0.0, 0.7, 50.0):
        found = router(h_TD, np.where(resident_E, np.float32(lift), np.float32(0)))
        for scores_E, ids_K, weights_K in zip(scores_TE, *map(np.asarray, found), strict=True):
            first = int(scores_E.argmax())
            by_E = np.log(scores_E) + lift * resident_E
            others = [e for e in np.argsort(-by_E) if e != first][: k - 1]
            assert set(ids_K.tolist()) == {first, *others}
            wanted_K = np.sort(scores_E[[first, *others]])[::-1]
            wanted_K = wanted_K / (wanted_K.sum() if router.settings.renormalise else 1)
            np.testing.assert_allclose(weights_K, wanted_K, rtol=1e-5)
    everyone = CacheConfig(resident_lift=3.0, chunk_tokens=CHUNK)
    engine = Engine(model, store, everyone)
    load_all(engine.pool, NATIVE)
    np.testing.assert_array_equal(decode(engine), resident)
    misses = []
    for lift in (0.0, 50.0):
        cache = CacheConfig(
            store.precision_bytes(NATIVE) // 2, resident_lift=lift, chunk_tokens=CHUNK
        )
        engine = Engine(model, store, cache)
        decode(engine)
        misses.append(int(engine.counts.misses))
    assert misses[1] < misses[0]
    with pytest.raises(ValueError, match=r"resident_lift is -1; want 0 to 50"):
        CacheConfig(resident_lift=-1)


def test_the_cpu_fails(model, store, monkeypatch):
    """In prefill and in decode: one clear line, a whole pool, and the same tokens afterwards."""
    engine = engine_of(model, store, "host", 0.3)

    def tokens() -> list[int]:
        return [int(ids_B[0]) for ids_B, _ in engine.generate([PROMPTS[0]], 4)]

    wanted, calls = tokens(), [0]
    run = host_compute._expert_ffn
    for last in (1, 8):
        calls[0] = 0

        def failing(*args, last=last):
            calls[0] += 1
            if calls[0] == last:
                raise RuntimeError("RESOURCE_EXHAUSTED")
            return run(*args)

        with monkeypatch.context() as patch:
            patch.setattr(host_compute, "_expert_ffn", failing)
            with pytest.raises(RuntimeError, match=r"computing \d experts of layer \d on the CPU"):
                tokens()
        check_invariants(engine.pool, store)
        with pytest.raises(RuntimeError, match="call start first"):
            engine.decode(np.asarray([7]))
        assert tokens() == wanted


@pytest.mark.parametrize("implementation", ["xla", "ggml"])
@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 4096)])
def test_a_file_that_goes_while_the_cpu_reads_it(two_banks_path, tmp_path, implementation, damage):
    """Refused before a byte is read: past a file's new end a read would end the process."""
    path = tmp_path / "model.gguf"
    shutil.copy2(two_banks_path, path)
    model = load_model(two_banks_path, implementation)
    engine = engine_of(model, HostExperts(model.config, open_gguf(path)), "host", 0.0)
    steps = engine.generate([PROMPTS[0]], 8)
    next(steps)
    damage(path)
    with pytest.raises(OSError, match=f"{path}: "):
        list(steps)
