"""The one measurement: of a program whose times and counts are known, and of the engine."""

import functools

import numpy as np
import pytest

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.measure import Counts, Measurement, measure, timed_turn
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import load_model


class Clock:
    """Stands still but when a program takes its time."""

    now = 0.0

    def __call__(self):
        return self.now


class Program:
    """A prompt takes 1 s a token, a decoded token `step_s`; the first sequence is slow."""

    def __init__(self, clock, step_s, log=None, name=""):
        self.clock, self.step_s, self.log, self.name = clock, step_s, log, name
        self.slow, self.done = 10.0, Counts()

    def prefill(self, ids_T):
        if self.log is not None:
            self.log.append(self.name)
        self.clock.now += self.slow + len(ids_T)
        self.slow = 0.0
        self.done += Counts(misses=100, bytes_moved=7)
        return int(ids_T[-1]) + 1

    def decode(self, token):
        self.clock.now += self.step_s
        self.done += Counts(
            hits=3, misses=1, native_uses=2, bytes_read=40, bytes_computed=7, bytes_moved=10,
            bytes_ahead=4, bytes_dropped=1, host_round_trips=2, selections=5, demoted=2, skipped=1,
        )  # fmt: skip
        return token + 1

    def counts(self):
        self.clock.now += 1000.0  # counting is not timed
        return self.done


ROWS_RS = np.arange(4 * 8).reshape(4, 8)


def test_times_and_counts_by_hand():
    """The row that warms up is slow and counts in nothing."""
    clock = Clock()
    program = Program(clock, 0.5)
    ours = functools.partial(timed_turn, program, clock=clock)
    (found,) = measure({"ours": ours}, ROWS_RS, 3).values()
    assert found.first_token_s.tolist() == [3.0] * 3 and found.tokens == 15
    assert found.decode_s.tolist() == [2.5] * 3
    assert found.turns[0].chosen == tuple(range(11, 17))
    figures = found.figures()
    assert figures["decode_tokens_per_s"]["median"] == 2.0
    assert figures["prefill_tokens_per_s"]["low"] == 1.0
    assert figures["repeat_s"] == [2.5] * 3
    assert found.counted_figures() == {
        "hit_rate": 0.75, "demoted_share": 0.5, "demoted_selection_share": 0.4,
        "skipped_share": 0.2, "host_round_trips_per_token": 2.0, "bytes_moved_per_token": 10.0,
        "bytes_read_per_token": 40.0, "bytes_computed_per_token": 7.0,
        "bytes_ahead_per_token": 4.0, "bytes_ahead_used_share": 0.75,
    }  # fmt: skip


def test_turns_go_round_and_a_program_may_count_nothing():
    clock, log = Clock(), []
    programs = {name: Program(clock, 1.0, log, name) for name in "abc"}
    programs["b"].counts = lambda: None
    backends = {n: functools.partial(timed_turn, p, clock=clock) for n, p in programs.items()}
    found = measure(backends, ROWS_RS, 3)
    assert "".join(log) == "abccbaabccba"
    assert list(found) == list("abc") and len(found["a"].turns) == 3
    assert found["b"].counts is None and found["b"].counted_figures() == {}
    assert found["b"].turns[0].tokens == ()


@pytest.mark.parametrize(("rows", "prompt"), [(1, 3), (4, 8), (4, 0)])
def test_nothing_to_measure_is_refused(rows, prompt):
    with pytest.raises(ValueError, match=r"want at least 2 rows, longer than a prompt"):
        measure({}, ROWS_RS[:rows], prompt)


def test_the_engines_counters(two_banks_path):
    """Token by token they add up to what the pool and the engine counted over the whole run."""
    model = load_model(two_banks_path, "xla")
    store = HostExperts(model.config, model.file)
    engine = Engine(model, store, CacheConfig(store.precision_bytes(0) // 2))
    ids_RS = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12), np.int32)
    prompts = []

    class Watched(EngineProgram):
        def prefill(self, ids_T):
            before = self.counts()
            token = super().prefill(ids_T)
            prompts.append(self.counts() - before)
            return token

    program = Watched(engine, 12)
    turns = [timed_turn(program, ids_S, 4) for ids_S in ids_RS]
    found = Measurement(4, tuple(turns))
    total = sum(prompts, found.counts)
    assert total == program.counts()
    assert total.link_wait_s == pytest.approx(program.counts().link_wait_s) and total.uses > 0
    stats = engine.counts
    assert total.hits == stats.hits > 0 and total.misses == stats.misses > 0
    assert total.bytes_moved == stats.bytes_moved and total.native_uses == total.uses
    k, layers = model.config.experts_per_token, model.config.n_layers
    assert found.counts.uses == found.counts.selections == found.tokens * k * layers
    size = sum(layer.expert_bytes for layer in store.precisions[0])
    assert found.counts.bytes_read == found.tokens * k * size
    # What it says is most probable is what the logits say.
    assert [int(np.argmax(x)) for x in program.logits_BV] == list(turns[-1].chosen[1:])
