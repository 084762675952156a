"""One cache controller: a replayed run makes the run's own decisions, one by one."""

import numpy as np
import pytest

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, Controller, Observer, OnRouting
from hobbit_jax.cache.counter import Replay
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES, Hybrid, Use
from hobbit_jax.cache.policies import POLICIES, Step, policy_factory
from hobbit_jax.cache.promotion import PromotionRule
from hobbit_jax.cache.trace import RoutingRecorder, read_trace
from hobbit_jax.experts.store import NATIVE, ExpertKey
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import load_model

RULE = PromotionRule(after_uses=2, per_token=2)
TOKENS = 24
# A link as fast as the CPU, so that a token's two misses go both ways.
MODES = {**MISS_MODES, "hybrid": Hybrid(link_to_host=1.0)}


@pytest.fixture(scope="module")
def model(two_banks_path):
    return load_model(two_banks_path)


class Recorder(Observer):
    """Every decision and every copy that got a slot, with the copy that it displaced."""

    def __init__(self, controller: Controller):
        self.events: list = []
        controller.observers.append(self)
        for bank in controller.banks:
            self._record_admissions(bank.policy)

    def _record_admissions(self, policy) -> None:
        admit = policy.admit

        def recorded(key, keep=()):
            self.events.append((key, victim := admit(key, keep)))
            return victim

        policy.admit = recorded

    def after_step(self, decision) -> None:
        self.events.append(decision)


def run_live(model, store, mode: str, policy: str, devices: int):
    """Forced tokens on an engine: what was routed, what was decided, the slots of each device."""
    all_low = store.precision_bytes(LOW) if MISS_MODES[mode].low_banks == "all" else 0
    share = 0.6 if devices == 1 else 0.9  # a device's pool holds a whole step of its experts
    budget_bytes = (all_low + int(share * store.precision_bytes(NATIVE))) // devices
    engine = Engine(
        model,
        store,
        CacheConfig(budget_bytes, mode=MODES[mode], policy=policy, promotion=RULE, devices=devices),
    )
    recorder, routed = Recorder(engine.controller), []
    engine.controller.observers.append(OnRouting(routed.append))
    engine.start(1, TOKENS)
    for token in np.random.default_rng(0).integers(0, model.config.vocab_size, TOKENS):
        engine.decode(np.asarray([token]))
    slots = {s: n // devices for s, n in engine.pool.slots.items()}
    return routed, recorder.events, slots, engine


def replay(store, routed, slots, mode: str, policy: str, devices: int):
    layout = BankLayout.of_store(store, devices)
    replayed = Replay(layout, slots, CacheConfig(mode=MODES[mode], policy=policy, promotion=RULE))
    recorder, n_layers = Recorder(replayed.controller), layout.n_layers
    for token in range(TOKENS):
        replayed.token(routed[n_layers * token : n_layers * (token + 1)], token)
    return recorder.events, replayed


@pytest.mark.parametrize(
    ("mode", "devices"),
    [
        *((mode, 1) for mode in MISS_MODES),
        ("fetch_low", 4),
        *(pytest.param(m, 4, marks=pytest.mark.slow) for m in MISS_MODES if m != "fetch_low"),
    ],
)
def test_a_replay_makes_the_decisions_of_the_run(model, store, mode, devices):
    for policy in POLICIES:
        routed, events, slots, engine = run_live(model, store, mode, policy, devices)
        replayed_events, replayed = replay(store, routed, slots, mode, policy, devices)
        assert len(replayed_events) == len(events) > TOKENS
        for live, counted in zip(events, replayed_events, strict=True):
            assert live == counted, policy
        counted, stats = replayed.counts, engine.counts
        assert (counted.bytes_moved, counted.computed, counted.bytes_computed) == (
            stats.bytes_moved, stats.computed, stats.bytes_computed,
        )  # fmt: skip
        assert (counted.computed > 0) == MODES[mode].computes
        assert counted.host_round_trips == stats.host_round_trips
        assert set(replayed.controller.resident()) == engine.pool.resident()


def test_a_planted_difference_is_seen(model, store):
    """The comparison above can fail: a policy that forgets one access decides otherwise."""
    routed, events, slots, _ = run_live(model, store, "fetch_low", "lru", 1)
    first = routed[0]
    routed[0] = type(first)(first.layer, first.ids_TK[:, ::-1], first.weights_TK, first.valid_T)
    replayed_events, _ = replay(store, routed, slots, "fetch_low", "lru", 1)
    assert replayed_events != events


def test_a_recorded_trace_is_what_replays_read(model, store, tmp_path):
    """A prompt in chunks and decoded tokens: all that were fed, by the router's own choices."""
    engine = Engine(model, store, CacheConfig(chunk_tokens=4))
    recorder, seen = RoutingRecorder(model.config.n_layers), []
    with engine.observed_by(recorder), engine.observed_by(OnRouting(seen.append)):
        tokens = list(engine.generate([[5, 200, 17, 17, 99, 3]], 5))
    n_tokens = recorder.write(tmp_path / "trace.npz")
    assert n_tokens == 6 + len(tokens) - 1  # the last one drawn is fed to nobody
    trace = read_trace(tmp_path / "trace.npz", model.config.n_experts)
    assert trace.position_T.tolist() == list(range(n_tokens))
    for layer in range(model.config.n_layers):
        chosen = [r.ids_TK[r.valid_T] for r in seen if r.layer == layer]
        np.testing.assert_array_equal(trace.ids_TLK[:, layer], np.concatenate(chosen))
    with pytest.raises(ValueError, match=r"layers routed \[0\] tokens"):
        RoutingRecorder(3).write(tmp_path / "none.npz")


def test_observers_are_all_told_in_their_order(store):
    told: list[str] = []

    class Named(Observer):
        def __init__(self, name):
            self.name = name

        def after_step(self, decision):
            told.append(self.name)

        def after_tokens(self, count):
            return [key] if self.name == "second" else []

    layout = BankLayout.of_store(store)
    slots = dict.fromkeys(layout.expert_bytes, 4)
    controller = Controller(layout, slots, policy_factory("lru"))
    controller.observers += [Named("first"), Named("second")]
    key = ExpertKey(LOW, 1, 3)
    decision = controller.decide(Step(0, 1, 0), [Use(ExpertKey(NATIVE, 1, 3))])
    assert told == ["first", "second"]
    assert decision.fetched == [ExpertKey(NATIVE, 1, 3)] and decision.batches == [decision.fetched]
    controller.end_tokens(1)
    assert controller.take_wanted() == [key] and controller.take_wanted() == []
