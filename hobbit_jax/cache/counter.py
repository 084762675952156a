"""An executor that counts: what a controller's decisions would move, wait for and read.

Owns the one walk over recorded routing, which makes the live engine's decisions in its order.
Decode steps only.
"""

from __future__ import annotations

import gc
from collections import Counter as Multiset
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, Controller, Observer, uses_of
from hobbit_jax.cache.counts import Counts
from hobbit_jax.cache.miss_modes import FETCH
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.selection import RouterOutput, Selections, select
from hobbit_jax.cache.trace import Trace
from hobbit_jax.cache.warm_start import Executor
from hobbit_jax.experts.precision import SKIPPED, StaticPlan
from hobbit_jax.experts.store import NATIVE, ExpertKey
from pallas_kernels.reference import Signature

_CHUNK_TOKENS = 256


class Counter(Executor):
    """Keeps who is resident and counts the bytes that the slot pool would move."""

    def __init__(self, controller: Controller):
        super().__init__(controller)
        self.resident_pLE = np.zeros(controller.layout.shape_pLE, bool)

    def load(self, keys: Sequence[ExpertKey]) -> None:
        """See `Executor.load`."""
        for key in keys:
            if not self.resident_pLE[key]:
                bank = self.controller.bank(key)
                victim = bank.policy.admit(key, keys)
                if victim is not None:
                    self.resident_pLE[victim] = False
                self.resident_pLE[key] = True
                self.counts.bytes_moved += bank.expert_bytes

    def _begin_upload(self, key: ExpertKey) -> None:
        """Whatever `load` gives a slot is counted there."""

    def resize(self, slots: Mapping[Signature, int]) -> None:
        """See `Executor.resize`."""
        self.reserved.clear()
        for bank in self.controller.banks:
            if slots[bank.signature] != bank.policy.capacity:
                for victim in bank.policy.resize(slots[bank.signature]):
                    self.resident_pLE[victim] = False
                self.counts.bytes_moved += len(bank.policy) * bank.expert_bytes


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's cycle collector, which would double the time of a replay without cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Replay:
    """A controller with a counter, played token by token.

    Of `cache` it takes plan, mode, policy, promotion and warm start; the rest describes an engine.

    Raises:
        ValueError: a profile of another shape, or pins that leave a bank too few slots.
    """

    def __init__(
        self,
        layout: BankLayout,
        slots: Mapping[Signature, int],
        cache: CacheConfig,
        observers: Sequence[Observer] = (),
    ):
        self.plan = cache.plan or StaticPlan(np.full(layout.shape_pLE[1:], NATIVE, np.int8))
        self.controller = cache.controller(layout, slots, observers)
        self.counter = Counter(self.controller)
        self._key_pLE = np.empty(layout.shape_pLE, object)
        for index in np.ndindex(layout.shape_pLE):
            self._key_pLE[index] = ExpertKey(*index)
        cache.fill(self.counter, self.plan.shares_pLE(layout.shape_pLE))

    @property
    def counts(self) -> Counts:
        """What it has come to so far."""
        return self.controller.counts

    def play(self, trace: Trace, label: str = "") -> None:
        """Replays every token of a trace; with a progress bar if it has a label."""
        alone = self._policies_decide()
        starts = range(0, len(trace.ids_TLK), _CHUNK_TOKENS)
        for start in tqdm(starts, desc=label, unit="chunk", disable=None if label else True):
            part = trace.part(start, start + _CHUNK_TOKENS)
            if alone:
                with _no_collector():
                    self._play_banks(part)
                continue
            for position, layers in zip(part.position_T.tolist(), part.routed(), strict=True):
                self.token(layers, position)
        if alone:
            self.counter.resident_pLE[:] = False
            for key in self.controller.resident():
                self.counter.resident_pLE[key] = True

    def token(self, layers: Iterable[RouterOutput], position: int) -> None:
        """Replays one token of each sequence.

        Args:
            layers: what their routers chose, in order.
            position: of the token in the longest sequence; 0 begins new ones.
        """
        controller = self.controller
        if position == 0:
            controller.begin_sequences()
        for key in controller.take_wanted():
            self.counter.reserve(key)
        for routed in layers:
            for observer in controller.routing_observers():
                observer.after_routing(routed)
            self._layer(Step(self.counts.tokens, routed.layer, position), routed)
        controller.end_tokens(1)
        self.counter.promote()
        self.counts.tokens += 1

    def _layer(self, step: Step, routed: RouterOutput) -> None:
        selections = self._select(routed)
        self.controller.count_selections(selections.requested_TK, selections.served_TK)
        uses, unmet = uses_of(step.layer, selections)
        decision = self.controller.decide(step, uses, unmet)
        for batch in decision.batches:
            self.counter.load(batch)
        self.counts.host_round_trips += decision.round_trips

    def _select(self, routed: RouterOutput) -> Selections:
        """A layer's selections in the router's order, which in a trace need not be by weight."""
        order_TK = np.argsort(-routed.weights_TK, axis=1, kind="stable")
        back_TK = np.argsort(order_TK, axis=1)
        ids_TK, weights_TK = (
            np.take_along_axis(array, order_TK, axis=1)
            for array in (routed.ids_TK, routed.weights_TK)
        )
        resident_pE, mode = self.counter.resident_pLE[:, routed.layer], self.controller.mode
        selections = select(
            self.plan, mode, resident_pE, routed.layer, (ids_TK, weights_TK), routed.valid_T
        )
        return Selections(*(np.take_along_axis(array, back_TK, axis=1) for array in selections))

    def _policies_decide(self) -> bool:
        """Whether each bank's policy alone decides, so that it may play its accesses in one go.

        That is so of demand misses that fit their banks, if no observer is told of them.
        """
        layout, controller = self.controller.layout, self.controller
        precisions_of = Multiset(s for layers in layout.signature_pL for s in {*layers})
        return (
            controller.mode == FETCH
            and not controller.observers
            and layout.n_devices == 1
            and set(precisions_of.values()) == {1}
            and all(
                bank.policy.capacity - len(bank.policy.pinned) >= layout.experts_per_token
                for bank in self.controller.banks
            )
        )

    def _play_banks(self, trace: Trace) -> None:
        """What `token` does of every token, where `_policies_decide`."""
        layout, counts = self.controller.layout, self.counts
        selected = [self._select(routed) for routed in trace.layers()]
        for selections in selected:
            self.controller.count_selections(selections.requested_TK, selections.served_TK)
        served_TLK = np.stack([selections.served_TK for selections in selected], axis=1)
        key_TLK = self._key_pLE[served_TLK, np.arange(layout.n_layers)[:, None], trace.ids_TLK]
        positions = trace.position_T.tolist()
        missed_S = np.zeros(len(positions) * layout.n_layers, bool)
        for bank in self.controller.banks:
            of_bank_pL = np.array([[s == bank.signature for s in ss] for ss in layout.signature_pL])
            uses_TLK = of_bank_pL[served_TLK, np.arange(layout.n_layers)[:, None]]
            uses_TLK &= served_TLK != SKIPPED
            keys, weights = key_TLK[uses_TLK].tolist(), trace.weights_TLK[uses_TLK].tolist()
            ends = np.cumsum(uses_TLK.sum(axis=2)).tolist()
            steps = (
                Step(counts.tokens + token, layer, position)
                for token, position in enumerate(positions)
                for layer in range(layout.n_layers)
            )
            native = bool(of_bank_pL[NATIVE].any())
            misses_S = bank.policy.access_many(
                (
                    (step, keys[start:end], weights[start:end])
                    for step, start, end in zip(steps, [0, *ends[:-1]], ends, strict=True)
                ),
                native,
            )
            missed_S |= np.array(misses_S) > 0
            misses = sum(misses_S)
            counts.hits += len(keys) - misses
            counts.misses += misses
            counts.native_uses += native * len(keys)
            counts.bytes_read += len(keys) * bank.expert_bytes
            counts.bytes_moved += misses * bank.expert_bytes
        counts.host_round_trips += int(missed_S.sum())
        counts.tokens += len(trace.ids_TLK)

    def copies(self) -> int:
        """How many are resident, of all precisions."""
        return int(self.counter.resident_pLE.sum())

    def resident_share(self) -> float:
        """Share (0-1) of the (layer, expert) pairs that are resident, at any precision."""
        return float(self.counter.resident_pLE.any(axis=0).mean())
