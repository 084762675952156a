"""Copies beside computation: the emulated link, guesses at later layers, streamed prefill, faults.

In virtual time, so that no machine's load decides.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize
from links import Clock, Recorded, ThrottledLink, throttled
from pool_invariants import check_invariants, prefetched_bytes

import hobbit_jax.inference.moe as moe_module
import hobbit_jax.inference.prefill as prefill_module
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import Decision, OnRouting, Use
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.prefetch import Prefetcher, PrefetchRule
from hobbit_jax.experts.store import NATIVE, ExpertKey, HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.config import layer_tensors

PROMPT, NEW_TOKENS, CHUNK = [5, 200, 17, 17, 99, 3, 250, 11], 8, 8
LAYERS_AHEAD = 2


@pytest.fixture(scope="module")
def store(model):
    return HostExperts(model.config, model.file)


def engine_of(model, store, link=None, observers=(), **options) -> Engine:
    """Slots for half of each layer's experts, so that every token misses."""
    return Engine(
        model,
        store,
        CacheConfig(store.precision_bytes(NATIVE) // 2, chunk_tokens=CHUNK, **options),
        partial(SlotPool, link=link),
        observers,
    )


def run(engine) -> tuple[list[int], np.ndarray]:
    tokens = [int(ids_B[0]) for ids_B, _ in engine.generate([PROMPT], NEW_TOKENS)]
    return tokens, np.asarray(engine.decode(np.asarray([7])))


def test_paced_link_takes_its_time():
    """Each upload after the one before, whoever waits; computation meanwhile costs nothing."""
    clock = Clock()
    link = ThrottledLink(gb_s=1e-3, latency_us=500.0, clock=clock)  # 1 byte a us
    raw = tuple(np.zeros((1, n), np.uint8) for n in (100, 200, 1200))  # 1.5 ms and 0.5 of latency
    first, second = link.send(raw, None), link.send(raw, None)
    second()
    assert clock() == pytest.approx(4e-3)
    first()  # long there
    assert clock() == pytest.approx(4e-3)
    clock.now_s = 10.0
    third = link.send(raw, None)  # the link was idle: from now on, not from 4 ms on
    clock.now_s += 0.5e-3  # computing
    np.testing.assert_array_equal(third()[2], raw[2])
    assert clock() == pytest.approx(10.002)


@pytest.fixture(scope="module")
def reference(model, store):
    engine = engine_of(model, store, staging_bytes=0)
    return run(engine), engine.pool.resident(), engine.counts


@pytest.mark.parametrize(
    ("predictor", "distance"),
    [(None, 0), ("layer_ahead", LAYERS_AHEAD), ("random", LAYERS_AHEAD), ("previous_token", 1)],
)
def test_guesses_and_links_change_no_bit(model, store, reference, predictor, distance):
    """Nor what is resident, nor how often decode leaves; what is staged stays within its bound."""
    (tokens, logits_BV), resident, stats = reference
    rule = PrefetchRule(predictor, distance) if predictor else None
    sent = dict.fromkeys(("bytes_moved", "bytes_ahead", "bytes_dropped"), 0)
    for link in (Recorded(store), throttled(store, 1e-3)[0]):
        engine = engine_of(model, store, link=link, prefetch=rule)
        sizes, send = [], link.send

        def measured_send(raw, device, engine=engine, sizes=sizes, send=send):
            sizes.append(prefetched_bytes(engine.pool))
            return send(raw, device)

        link.send = measured_send
        got_tokens, got_BV = run(engine)
        assert got_tokens == tokens and np.array_equal(got_BV, logits_BV)
        assert engine.pool.resident() == resident
        assert replace(engine.counts, **sent) == replace(stats, **sent)
        check_invariants(engine.pool, store)
        assert engine.pool.staging_bytes == 2 * store.largest_expert_bytes  # a token's in a layer
        assert 0 < max(sizes) <= engine.pool.staging_bytes
        pool_stats = engine.counts
        assert pool_stats.bytes_moved == link.sent_bytes
        assert 0 <= pool_stats.bytes_dropped < pool_stats.bytes_ahead <= link.sent_bytes


def test_layer_ahead_asks_the_layers_own_routers(model, store, monkeypatch):
    """Against NumPy on dequantised tensors: norm and router of layer l + d on layer l's stream."""
    streams, asked = {}, []

    def keep(routed):
        if routed.x_TD is not None:
            streams[routed.layer] = np.asarray(routed.x_TD)

    engine = engine_of(model, store, observers=[OnRouting(keep)])
    engine.start(1, len(PROMPT))
    engine.prefill([PROMPT])
    guess = Prefetcher.guess

    def spy(self, layer, routed, is_resident):
        asked.append((layer, routed))
        return guess(self, layer, routed, is_resident)

    monkeypatch.setattr(Prefetcher, "guess", spy)
    tight = engine_of(model, store, prefetch=PrefetchRule("layer_ahead", LAYERS_AHEAD))
    tight.start(1, len(PROMPT))
    tight.prefill([PROMPT[:-1]])
    tight.decode(np.asarray(PROMPT[-1:]))

    def tensor(layer: int, role: str) -> np.ndarray:
        info = model.file.tensors[layer_tensors(model.config, layer)[role]]
        type = GGMLQuantizationType[info.format]
        return dequantize(info.raw, type).reshape(info.shape).astype(np.float64)

    assert len({layer for layer, _ in asked}) > 1
    assert asked.pop(0) == (-1, [])  # before the token
    for layer, routed in asked:
        x_D, wanted = streams[layer][len(PROMPT) - 1].astype(np.float64), []
        for ahead in range(layer + 1, min(layer + 1 + LAYERS_AHEAD, model.config.n_layers)):
            h_D = x_D / np.sqrt(np.mean(x_D**2) + model.config.rms_eps)
            scores_E = tensor(ahead, "router") @ (h_D * tensor(ahead, "ffn_norm"))
            chosen = np.argsort(-scores_E)[: model.config.experts_per_token].tolist()
            wanted += [ExpertKey(NATIVE, ahead, expert) for expert in chosen]
        assert routed == wanted


def test_each_predictor_names_what_it_says():
    resident = {ExpertKey(0, 1, 0)}
    routed = [ExpertKey(0, 1, 0), ExpertKey(0, 1, 3), ExpertKey(0, 2, 5)]
    ahead = Prefetcher(PrefetchRule("layer_ahead", 2), 4, 8)
    assert ahead.guess(-1, [], resident.__contains__) == []
    assert ahead.guess(0, routed, resident.__contains__) == routed[1:]

    chance = Prefetcher(PrefetchRule("random", 2), 4, 8)
    drawn = [chance.guess(0, routed, resident.__contains__) for _ in range(400)]
    assert all([key[:2] for key in keys] == [(0, 1), (0, 2)] for keys in drawn)
    counts_E = np.bincount([keys[0].expert for keys in drawn], minlength=8)
    assert counts_E[0] == 0 and counts_E[1:].min() > 400 / 7 / 2  # all that are missing, alike

    before = Prefetcher(PrefetchRule("previous_token", 2), 4, 8)
    for keys in ([ExpertKey(0, 0, 6)], routed[:2], routed[2:]):
        uses = [Use(key) for key in keys]
        before.after_step(Decision(Step(0, keys[0].layer, 0), uses, [], [], [], []))
        ignored = [Use(ExpertKey(0, keys[0].layer, 5))]
        before.after_step(
            Decision(Step(0, keys[0].layer, 0), ignored, [], [], [], [], prefill=True)
        )
    assert before.guess(-1, [], resident.__contains__) == [ExpertKey(0, 0, 6), routed[1]]
    assert before.guess(0, [], resident.__contains__) == routed[1:]
    assert before.guess(3, [], resident.__contains__) == []
    with pytest.raises(ValueError, match="want a predictor of layer_ahead, previous_token, random"):
        PrefetchRule("oracle")  # type: ignore[arg-type]


def test_a_demand_waits_for_the_rest_of_its_upload(model, store):
    """What was guessed is not sent again, and stands behind what is waited for."""
    link, clock = throttled(store, 1e-3)
    pool = engine_of(model, store, link=link).pool
    wanted, guess = ExpertKey(0, 0, 1), ExpertKey(0, 2, 4)
    seconds = store.expert_bytes(wanted) / 1e6 + 10e-6
    pool.load([wanted], upcoming=[guess])
    assert clock() == pytest.approx(seconds)  # not for the guess behind it
    clock.now_s += 0.75 * seconds  # computing
    pool.load([guess])
    assert clock() == pytest.approx(2 * seconds)
    assert [e for e in link.events if e[0] == "send"] == [("send", wanted), ("send", guess)]


def virtual_prefill(model, store, monkeypatch, run_s: float, **options):
    """Seconds of a prefill whose device takes `run_s` for each call of an item runner.

    The device computes beside the link; the host waits for it where it reads the routing.
    """
    link, clock = throttled(store, 1e-3)
    busy_s, ran, device_get = [0.0], [0], jax.device_get

    def run_items(*args, run_items=moe_module._expert_ffn):
        items = int(args[4].count)
        busy_s[0] = max(busy_s[0], clock()) + run_s * items
        ran[0] += items
        link.events.append(("run", None))
        return run_items(*args)

    def read(arrays):
        clock.now_s = max(clock(), busy_s[0])
        link.events.append(("read", None))
        return device_get(arrays)

    engine = engine_of(model, store, link=link, **options)
    with monkeypatch.context() as patch:
        patch.setattr(moe_module, "_expert_ffn", run_items)
        patch.setattr(prefill_module.jax, "device_get", read)
        engine.start(1, len(PROMPT))
        logits_BV = np.asarray(engine.prefill([PROMPT]))
    total_s = max(clock(), busy_s[0])
    sends = sum(what == "send" for what, _ in link.events)
    copy_s = link.sent_bytes / 1e6 + sends * 10e-6
    return total_s, copy_s, ran[0] * run_s, link.events, logits_BV


def test_prefill_takes_its_copies_or_its_computation(model, store, monkeypatch):
    """Not their sum, which it takes without staging."""
    run_s = store.largest_expert_bytes / 1e6  # an expert computes as long as it is copied
    serial_s, copy_s, compute_s, _, wanted_BV = virtual_prefill(
        model, store, monkeypatch, run_s, staging_bytes=0
    )
    assert serial_s > 0.9 * (copy_s + compute_s)
    total_s, copy_s, compute_s, events, got_BV = virtual_prefill(
        model, store, monkeypatch, run_s, staging_bytes=4 * store.largest_expert_bytes
    )
    np.testing.assert_array_equal(got_BV, wanted_BV)
    longer_s, shorter_s = max(copy_s, compute_s), min(copy_s, compute_s)
    assert longer_s <= total_s < longer_s + 0.25 * shorter_s
    assert total_s < 0.75 * serial_s
    # The next layer's experts go up before the layer is known to have ended.
    reads = [index for index, (what, _) in enumerate(events) if what == "read"]
    for layer, (start, end) in enumerate(pairwise(reads)):
        sent = [expert[1] for what, expert in events[start:end] if what == "send"]
        assert layer + 1 in sent and sent == sorted(sent)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("what", ["send", "fetch"])
def test_an_upload_that_fails_on_its_way(model, store, reference, what, share):
    """Guessed, waited for, or between two rounds: one clear error, a whole pool, the same bits."""
    link = Recorded(store)
    rule = PrefetchRule("layer_ahead", LAYERS_AHEAD)
    engine = engine_of(model, store, link=link, prefetch=rule)
    assert run(engine)[0] == reference[0][0]
    count = sum(event == what for event, _ in link.events)
    engine = engine_of(model, store, link=link, prefetch=rule)
    link.fails = (what, int(share * count))
    with pytest.raises(RuntimeError, match=r"upload of expert \d of layer \d, .*the bus is down"):
        run(engine)
    check_invariants(engine.pool, store)
    with pytest.raises(RuntimeError, match="call start first"):
        engine.decode(np.asarray([7]))
    assert run(engine)[0] == reference[0][0]
    assert prefetched_bytes(engine.pool) <= engine.pool.staging_bytes
