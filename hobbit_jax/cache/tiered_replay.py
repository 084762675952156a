"""What a miss mode would have done on recorded routing, with other slots than it had.

Owns the host's side of a two-tier pool without the pool: which copy serves each selection, what is
loaded, promoted and evicted, by the live classes (`miss_modes.py`, `policies/`, `promotion.py`) in
the engine's own order, so that a replay of a run gives that run's counts (a test). Decode steps
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hobbit_jax.cache.miss_modes import LOW, MissMode
from hobbit_jax.cache.policies import Policy, PolicyFactory, Step
from hobbit_jax.cache.promotion import Promoter, PromotionRule
from hobbit_jax.experts.precision import SKIPPED
from hobbit_jax.experts.store import NATIVE, ExpertKey
from pallas_kernels.reference import Signature


class RoutedStep(NamedTuple):
    """One layer's selections of one decoded token of T sequences, heaviest first."""

    position: int
    layer: int
    ids_TK: np.ndarray
    weights_TK: np.ndarray
    asked_TK: np.ndarray  # int32, `SKIPPED` for none


@dataclass(frozen=True)
class BankShapes:
    """Which bank holds which copies, and what one of them weighs."""

    n_experts: int
    bank_tL: Sequence[Sequence[Signature]]  # by tier and layer
    expert_bytes: Mapping[Signature, int]


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
    bytes_used: int = 0  # of the copies that served, as the device reads them
    exits: int = 0  # of the decode program: entries after a token's first

    def since(self, before: Tally) -> Tally:
        """What was added to `before`."""
        then = vars(before)
        return Tally(**{name: now - then[name] for name, now in vars(self).items()})


class TieredReplay:
    """One division of the slots, and what it has come to so far.

    Args:
        shapes: of the pool that is replayed.
        slots: per bank; a bank that is not there has none.
        mode: what serves a miss.
        policy: of each bank.
        promotion: for modes that promote.
    """

    def __init__(
        self,
        shapes: BankShapes,
        slots: Mapping[Signature, int],
        mode: MissMode,
        policy: PolicyFactory,
        promotion: PromotionRule,
    ):
        self.shapes, self.mode = shapes, mode
        self.policies: dict[Signature, Policy[ExpertKey]] = {b: policy(n) for b, n in slots.items()}
        self.tally = Tally()
        self._promoter = Promoter(promotion, self._evicted_for) if mode.promotes else None
        self._ahead: list[ExpertKey] = []
        self._staged: list[ExpertKey] = []
        n_tiers, n_layers = len(shapes.bank_tL), len(shapes.bank_tL[0])
        self._resident_tLE = np.zeros((n_tiers, n_layers, shapes.n_experts), bool)
        if mode.low_banks == "all":
            for layer, expert in np.ndindex(n_layers, shapes.n_experts):
                self._load(ExpertKey(LOW, layer, expert), ())

    def _bank(self, key: ExpertKey) -> Signature:
        return self.shapes.bank_tL[key.tier][key.layer]

    def _evicted_for(self, key: ExpertKey) -> ExpertKey | None:
        policy = self.policies.get(self._bank(key))
        return None if policy is None or len(policy) < policy.capacity else policy.victim()

    def _load(self, key: ExpertKey, keep: Sequence[ExpertKey]) -> None:
        bank = self._bank(key)
        victim = self.policies[bank].admit(key, keep)
        if victim is not None:
            self._resident_tLE[victim] = False
        self._resident_tLE[key] = True
        self.tally.bytes_moved += self.shapes.expert_bytes[bank]

    def resize(self, slots: Mapping[Signature, int]) -> None:
        """Divides the slots of the same banks anew, as `SlotPool.resize` does."""
        self._staged = []
        for bank, policy in self.policies.items():
            if slots[bank] != policy.capacity:
                for victim in policy.resize(slots[bank]):
                    self._resident_tLE[victim] = False
                self.tally.bytes_moved += len(policy) * self.shapes.expert_bytes[bank]

    def warm_up(self, ranked: Mapping[Signature, Sequence[ExpertKey]], pin_share: float) -> None:
        """Loads each bank's first keys and pins `pin_share` of its slots, as a warm start does."""
        for bank, keys in ranked.items():
            policy = self.policies[bank]
            absent = [key for key in keys if not self._resident_tLE[key]]
            for key in absent[: policy.capacity - len(policy)][::-1]:
                self._load(key, ())
            if policy.capacity < len(keys):
                for key in keys[: int(pin_share * policy.capacity)]:
                    policy.pin(key)

    def token(self, number: int, steps: Sequence[RoutedStep]) -> None:
        """Replays one token, its layers in order; `number` never decreases."""
        self._staged = [
            key
            for key in dict.fromkeys(self._ahead)
            if not self._resident_tLE[key] and self._bank(key) in self.policies
        ]
        for step in steps:
            self._step(number, step)
        if self._promoter is not None:
            self._ahead = self._promoter.pick(1, self._is_resident)
        for key in self._staged:
            policy = self.policies[self._bank(key)]
            if not self._resident_tLE[key] and len(policy.pinned) < policy.capacity:
                self._load(key, ())
                self.tally.promotions += 1
        self.tally.tokens += 1

    def copies(self) -> int:
        """How many there are, of all tiers."""
        return int(self._resident_tLE.sum())

    def resident_share(self) -> float:
        """Share (0-1) of the (layer, expert) pairs that are there, at any tier."""
        return float(self._resident_tLE.any(axis=0).mean())

    def _is_resident(self, key: ExpertKey) -> bool:
        return bool(self._resident_tLE[key])

    def _step(self, number: int, step: RoutedStep) -> None:
        tally, layer = self.tally, step.layer
        resident_tTK = self._resident_tLE[:, layer][:, step.ids_TK]
        served_TK = self.mode.serve(step.asked_TK, step.weights_TK, resident_tTK)
        uses: dict[ExpertKey, tuple[float, bool]] = {}
        wished: dict[ExpertKey, float] = {}
        for expert, weight, asked, tier in zip(
            step.ids_TK.ravel().tolist(), step.weights_TK.ravel().tolist(),
            step.asked_TK.ravel().tolist(), served_TK.ravel().tolist(), strict=True,
        ):  # fmt: skip
            if asked == SKIPPED:
                continue
            tally.selections += 1
            if tier == SKIPPED:
                tally.skipped += 1
                continue
            key = ExpertKey(tier, layer, expert)
            most, native = uses.get(key, (0.0, False))
            uses[key] = max(weight, most), native or asked == NATIVE
            if tier > asked:
                tally.degraded += 1
                wished[key._replace(tier=asked)] = uses[key][0]
        at = Step(number, layer, step.position)
        for policy in self.policies.values():
            policy.begin_step(at)
        by_bank: dict[Signature, list[ExpertKey]] = {}
        missing: list[ExpertKey] = []
        for key, (weight, native) in uses.items():
            bank = self._bank(key)
            by_bank.setdefault(bank, []).append(key)
            if not self.policies[bank].access(key, weight, native):
                missing.append(key)
        for key, weight in wished.items():
            if (policy := self.policies.get(self._bank(key))) is not None:
                policy.access(key, weight, True)
        tally.hits += len(uses) - len(missing)
        tally.misses += len(missing)
        sizes = self.shapes.expert_bytes
        tally.bytes_used += sum(sizes[bank] * len(keys) for bank, keys in by_bank.items())
        if self._promoter is not None:
            self._promoter.note_served(uses)
            self._promoter.note(wished)
        if missing:
            self._fetch(by_bank)

    def _fetch(self, by_bank: Mapping[Signature, list[ExpertKey]]) -> None:
        """Loads a step's experts, in as many rounds as a bank needs."""
        rounds = 0
        for bank, keys in by_bank.items():
            policy = self.policies[bank]
            keys = sorted(keys, key=lambda key: (not self._resident_tLE[key], key))
            first = policy.capacity - len(policy.pinned - set(keys))
            size = max(1, policy.capacity - len(policy.pinned))
            parts = [
                keys[:first],
                *(keys[i : i + size] for i in range(first, len(keys), size)),
            ]
            rounds = max(rounds, len(parts))
            for part in parts:
                fetched = [key for key in part if not self._resident_tLE[key]]
                if self.mode.leaves_low and self._promoter is not None:
                    lows = (k._replace(tier=LOW) for k in fetched if k.tier == NATIVE)
                    self._promoter.note(lows)
                for key in fetched:
                    self._load(key, part)
        self.tally.exits += rounds
