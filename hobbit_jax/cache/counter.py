"""An executor that counts: what a controller's decisions would move, wait for and read.

This module owns the counts and the walk over recorded routing. The decisions are the live
engine's own (`controller.py`, `promotion.py`, `warm_start.py`), made in its order, so a replayed
run has that run's decisions and counts. Decode steps only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import Bank, BankLayout, Controller, Decision, Observer, uses_of
from hobbit_jax.cache.miss_modes import LOW, miss_mode
from hobbit_jax.cache.policies import Step
from hobbit_jax.experts.precision import SKIPPED
from hobbit_jax.experts.store import ExpertKey
from pallas_kernels.reference import Signature


class RoutedStep(NamedTuple):
    """One layer's selections of one decoded token of T sequences, heaviest first."""

    position: int
    layer: int
    ids_TK: np.ndarray
    weights_TK: np.ndarray
    requested_TK: np.ndarray  # int32, `SKIPPED` for none


@dataclass
class Tally:
    """Counts of a replay, as the pool and the engine count."""

    tokens: int = 0
    selections: int = 0
    degraded: int = 0
    skipped: int = 0
    hits: int = 0
    misses: int = 0
    promotions: int = 0
    bytes_moved: int = 0
    bytes_used: int = 0  # of the copies that served on the device, as it reads them
    computed: int = 0  # misses that the CPU computed
    host_bytes: int = 0  # read by the CPU for them
    round_trips: int = 0  # of the decode program: device calls after a token's first

    def since(self, before: Tally) -> Tally:
        """What was added to `before`."""
        then = vars(before)
        return Tally(**{name: now - then[name] for name, now in vars(self).items()})


class Counter:
    """Keeps who is resident and counts bytes, where the slot pool would copy."""

    def __init__(self, controller: Controller):
        layout = controller.layout
        self.controller, self.tally = controller, Tally()
        shape = (len(layout.signature_pL), layout.n_layers, layout.n_experts)
        self.resident_pLE = np.zeros(shape, bool)
        self._reserved: list[ExpertKey] = []

    def begin(self, decision: Decision) -> None:
        """Counts a step's uses."""
        tally, sizes = self.tally, self.controller.layout.copy_bytes
        misses, host_bytes = decision.misses, sum(map(sizes, decision.computed))
        tally.hits += len(decision.uses) - len(misses)
        tally.misses += len(misses)
        tally.computed += len(decision.computed)
        tally.host_bytes += host_bytes
        tally.bytes_used += sum(sizes(use.key) for use in decision.uses) - host_bytes

    def load(self, keys: Iterable[ExpertKey], keep: Sequence[ExpertKey] | None = None) -> None:
        """Makes all of `keys` resident; none of `keep`, by default `keys`, is evicted for them."""
        keys = list(keys)
        for key in keys:
            if not self.resident_pLE[key]:
                self._load(key, keys if keep is None else keep)

    def _load(self, key: ExpertKey, keep: Sequence[ExpertKey]) -> None:
        victim = self.controller.admit(key, keep)
        if victim is not None:
            self.resident_pLE[victim] = False
        self.resident_pLE[key] = True
        self.tally.bytes_moved += self.controller.bank(key).expert_bytes

    def reserve(self, key: ExpertKey) -> None:
        """Begins the upload of a copy that no token waits for; `promote` gives it a slot."""
        self._reserved.append(key)

    def promote(self) -> None:
        """Gives every reserved copy a slot, one device after another, as their pools do."""
        for key in sorted(self._reserved, key=lambda key: self.controller.bank(key).device):
            if not self.resident_pLE[key] and self.controller.has_unpinned_slot(key):
                self._load(key, ())
                self.tally.promotions += 1
        self._reserved = []

    def pin(self, keys: Sequence[ExpertKey]) -> None:
        """Loads `keys` and protects them from eviction.

        Raises:
            ValueError: too few slots are left to stream the rest through.
        """
        self.controller.check_pins(keys)
        self.load(keys)
        for key in keys:
            self.controller.pin(key)

    def resize(self, slots: Mapping[Signature, int]) -> None:
        """Divides the slots of the same banks anew, as `SlotPool.resize` does."""
        self._reserved = []
        for bank in self.controller.banks:
            if slots[bank.signature] != bank.policy.capacity:
                for victim in bank.policy.resize(slots[bank.signature]):
                    self.resident_pLE[victim] = False
                self.tally.bytes_moved += len(bank.policy) * bank.expert_bytes


class Replay:
    """A controller with a counter, played token by token.

    Args:
        layout: which bank holds which copies.
        slots: per bank; a signature that is not there has no bank.
        cache: mode, policy and promotion; the rest describes an engine.
        observers: told of every decision, after promotion.
    """

    def __init__(
        self,
        layout: BankLayout,
        slots: Mapping[Signature, int],
        cache: CacheConfig,
        observers: Sequence[Observer] = (),
    ):
        self.mode = miss_mode(cache.mode)
        self.controller = cache.controller(layout, slots, observers)
        self.counter = Counter(self.controller)
        if self.mode.low_banks == "all":
            for layer, expert in np.ndindex(layout.n_layers, layout.n_experts):
                self.counter.load([ExpertKey(LOW, layer, expert)])

    @property
    def tally(self) -> Tally:
        """What it has come to so far."""
        return self.counter.tally

    @property
    def banks(self) -> list[Bank]:
        """Of the controller."""
        return self.controller.banks

    def token(self, number: int, steps: Sequence[RoutedStep]) -> None:
        """Replays one token, its layers in order; `number` never decreases."""
        for key in self.controller.take_wanted():
            self.counter.reserve(key)
        for step in steps:
            self._step(number, step)
        self.controller.end_tokens(1)
        self.counter.promote()
        self.tally.tokens += 1

    def _step(self, number: int, step: RoutedStep) -> None:
        tally, counter, requested_TK = self.tally, self.counter, step.requested_TK
        resident_pTK = counter.resident_pLE[:, step.layer][:, step.ids_TK]
        served_TK = self.mode.serve(requested_TK, step.weights_TK, resident_pTK)
        served_TK = np.where(requested_TK == SKIPPED, SKIPPED, served_TK)
        valid_TK = requested_TK != SKIPPED
        tally.selections += int(valid_TK.sum())
        tally.skipped += int((valid_TK & (served_TK == SKIPPED)).sum())
        tally.degraded += int((served_TK > requested_TK).sum())
        arrays = (step.ids_TK, step.weights_TK, requested_TK, served_TK)
        uses, unmet = uses_of(step.layer, *(array.ravel() for array in arrays))
        decision = self.controller.decide(Step(number, step.layer, step.position), uses, unmet)
        counter.begin(decision)
        for batch in decision.batches:
            counter.load(batch)
        tally.round_trips += decision.round_trips

    def copies(self) -> int:
        """How many are resident, of all precisions."""
        return int(self.counter.resident_pLE.sum())

    def resident_share(self) -> float:
        """Share (0-1) of the (layer, expert) pairs that are resident, at any precision."""
        return float(self.counter.resident_pLE.any(axis=0).mean())
