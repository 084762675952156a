"""An executor that counts: what a controller's decisions would move, wait for and read.

Owns the one walk over recorded routing, which makes the live engine's decisions in its order.
Decode steps only.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, uses_of
from hobbit_jax.cache.miss_modes import FETCH
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.selection import RouterOutput, Selections, select
from hobbit_jax.cache.trace import Trace
from hobbit_jax.cache.warm_start import Executor
from hobbit_jax.experts.precision import SKIPPED, StaticPlan
from hobbit_jax.experts.store import NATIVE, ExpertKey
from pallas_kernels.reference import Signature

_CHUNK_TOKENS = 256


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's cycle collector, which takes a fifth of a replay and finds no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Replay(Executor):
    """A controller that is played token by token, and the bytes that the slot pool would move.

    Of `cache` it takes plan, mode, policy, promotion and warm start; the rest describes an engine.

    Raises:
        ValueError: a profile of another shape, or pins that leave a bank too few slots.
    """

    def __init__(self, layout: BankLayout, slots: Mapping[Signature, int], cache: CacheConfig):
        super().__init__(cache.controller(layout, slots))
        self.plan = cache.plan or StaticPlan(np.full(layout.shape_pLE[1:], NATIVE, np.int8))
        self.resident_pLE = np.zeros(layout.shape_pLE, bool)
        self._key_pLE = np.empty(layout.shape_pLE, object)
        for index in np.ndindex(layout.shape_pLE):
            self._key_pLE[index] = ExpertKey(*index)
        cache.fill(self, self.plan.shares_pLE(layout.shape_pLE))

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
            self.resident_pLE[:] = False
            for key in self.controller.resident():
                self.resident_pLE[key] = True

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
            self.reserve(key)
        for routed in layers:
            for observer in controller.routing_observers():
                observer.after_routing(routed)
            selections = self._select(routed)
            controller.count_selections(selections.requested_TK, selections.served_TK)
            step = Step(self.counts.tokens, routed.layer, position)
            decision = controller.decide(step, *uses_of(routed.layer, selections))
            for batch in decision.batches:
                self.load(batch)
            self.counts.host_round_trips += decision.round_trips
        controller.end_tokens(1)
        self.promote()
        self.counts.tokens += 1

    def _select(self, routed: RouterOutput) -> Selections:
        """A layer's selections in the router's order, which in a trace need not be by weight."""
        order_TK = np.argsort(-routed.weights_TK, axis=1, kind="stable")
        back_TK = np.argsort(order_TK, axis=1)
        ids_TK, weights_TK = (
            np.take_along_axis(array, order_TK, axis=1)
            for array in (routed.ids_TK, routed.weights_TK)
        )
        resident_pE, mode = self.resident_pLE[:, routed.layer], self.controller.mode
        selections = select(
            self.plan, mode, resident_pE, routed.layer, (ids_TK, weights_TK), routed.valid_T
        )
        return Selections(*(np.take_along_axis(array, back_TK, axis=1) for array in selections))

    def _policies_decide(self) -> bool:
        """Whether each bank's policy alone decides, so that it may play its accesses in one go.

        That is so of demand misses that fit their banks, if no observer is told of them.
        """
        layout, controller = self.controller.layout, self.controller
        precisions_of = Counter(s for layers in layout.signature_pL for s in {*layers})
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
        """What `token` does of every token, where `_policies_decide`, over ten times as fast."""
        layout, counts = self.controller.layout, self.counts
        selected = [self._select(routed) for routed in trace.layers()]
        for selections in selected:
            self.controller.count_selections(selections.requested_TK, selections.served_TK)
        served_TLK = np.stack([selections.served_TK for selections in selected], axis=1)
        layer_L1 = np.arange(layout.n_layers)[:, None]
        steps = [
            Step(counts.tokens + token, layer, position)
            for token, position in enumerate(trace.position_T.tolist())
            for layer in range(layout.n_layers)
        ]
        missed_S = [False] * len(steps)
        for bank in self.controller.banks:
            of_bank_pL = np.array([[s == bank.signature for s in ss] for ss in layout.signature_pL])
            uses_TLK = of_bank_pL[served_TLK, layer_L1] & (served_TLK != SKIPPED)
            key_TLK = self._key_pLE[served_TLK, layer_L1, trace.ids_TLK]
            keys, weights = key_TLK[uses_TLK].tolist(), trace.weights_TLK[uses_TLK].tolist()
            policy, native, start, misses = bank.policy, bool(of_bank_pL[NATIVE].any()), 0, 0
            for index, n_uses in enumerate(uses_TLK.sum(axis=2).ravel().tolist()):
                used = keys[start : start + n_uses]
                policy.begin_step(steps[index])
                missing = policy.access_all(used, weights[start : start + n_uses], native)
                for key in missing:
                    policy.admit(key, used)
                    missed_S[index] = True
                misses += len(missing)
                start += n_uses
            counts.hits += len(keys) - misses
            counts.misses += misses
            counts.native_uses += native * len(keys)
            counts.bytes_read += len(keys) * bank.expert_bytes
            counts.bytes_moved += misses * bank.expert_bytes
        counts.host_round_trips += sum(missed_S)
        counts.tokens += len(trace.ids_TLK)

    def resident_share(self) -> float:
        """Share (0-1) of the (layer, expert) pairs that are resident, at any precision."""
        return float(self.resident_pLE.any(axis=0).mean())
