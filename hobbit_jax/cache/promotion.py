"""Which experts that were served low, or by the CPU, are worth loading, and when.

This module owns the choice (`Promoter`) and the observer that feeds it with a controller's
decisions (`Promotion`), in a live run and in a replay alike. A promotion moves as many bytes as the
miss that the low copy or the CPU spared, and evicts an expert that may have to be promoted again:
so a newcomer must have been used `after_uses` times, and `margin` times as often as the expert that
its arrival would evict. Uses are halved every `halving_tokens`, so that old ones fade.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hobbit_jax.cache.controller import Controller, Decision, Observer
from hobbit_jax.cache.miss_modes import LOW, MissMode
from hobbit_jax.experts.store import NATIVE, ExpertKey

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class PromotionRule:
    """How eager promotion is; uses are counted with age, as the module says.

    Attributes:
        after_uses: degraded uses that an expert needs.
        per_token: most promotions started after one token.
        halving_tokens: tokens after which a use counts half.
        margin: uses that an expert needs, over those of whom it would evict; 0 asks for none. At
            1.5 the reference model's floor promotes one expert in twenty to a hundred tokens
            instead of one in each, and degrades 4 to 6 points fewer selections.
    """

    after_uses: float = 2.0
    per_token: int = 1
    halving_tokens: int = 32
    margin: float = 1.5

    def __post_init__(self):
        if self.after_uses <= 0 or min(self.per_token, self.halving_tokens - 1, self.margin) < 0:
            raise ValueError(
                f"{self}; want after_uses > 0, per_token >= 0, halving_tokens >= 1, margin >= 0"
            )


DEFAULT_PROMOTION = PromotionRule()


def _nobody(key: Hashable) -> None:
    """A cache that always has room."""


class Promoter(Generic[Key]):
    """Counts uses and picks who is promoted.

    Args:
        rule: see there.
        evicted_for: whom the arrival of a key would evict; None if it takes a free slot.
    """

    def __init__(self, rule: PromotionRule, evicted_for: Callable[[Key], Key | None] = _nobody):
        self.rule, self._evicted_for = rule, evicted_for
        self._degraded: dict[Key, float] = {}  # uses served by another copy, of absent keys
        self._served: dict[Key, float] = {}  # uses that the key itself served
        self._tokens = 0

    def note(self, keys: Iterable[Key]) -> None:
        """Records one degraded use of each key."""
        for key in keys:
            self._degraded[key] = self._degraded.get(key, 0.0) + 1.0

    def note_served(self, keys: Iterable[Key]) -> None:
        """Records one use of each key that it served itself, as residents do."""
        for key in keys:
            self._served[key] = self._served.get(key, 0.0) + 1.0

    def pick(self, tokens: int, is_resident: Callable[[Key], bool]) -> list[Key]:
        """Ends `tokens` tokens; the most used keys that are due, the latest first among equals."""
        halvings = (self._tokens + tokens) // self.rule.halving_tokens
        halvings -= self._tokens // self.rule.halving_tokens
        self._tokens += tokens
        for _ in range(halvings):
            self._degraded = _halved(self._degraded)
            self._served = _halved(self._served)
        due = [key for key, uses in self._degraded.items() if uses >= self.rule.after_uses]
        due = [key for key in reversed(due) if not is_resident(key)]
        due.sort(key=lambda key: -self._degraded[key])
        picked = []
        for key in due:
            if len(picked) == self.rule.per_token * tokens:
                break
            if self._worth_it(key):
                picked.append(key)
        for key in picked:
            # From now on it stands for what it has earned.
            self._served[key] = self._served.get(key, 0.0) + self._degraded.pop(key)
        return picked

    def _worth_it(self, key: Key) -> bool:
        if not self.rule.margin:
            return True
        evicted = self._evicted_for(key)
        if evicted is None:
            return True
        return self._degraded[key] > self.rule.margin * self._served.get(evicted, 0.0)


def _halved(uses: dict[Key, float]) -> dict[Key, float]:
    return {key: count / 2 for key, count in uses.items() if count >= 0.5}


class Promotion(Observer):
    """Has the copies loaded in the background that a miss mode's rule asks for.

    Args:
        rule: how eager promotion is.
        mode: whether experts that tokens waited for earn a low copy too.
    """

    def __init__(self, rule: PromotionRule, mode: MissMode):
        self._rule, self._mode = rule, mode

    def attach(self, controller: Controller) -> None:
        """See `Observer.attach`."""
        self._controller = controller
        self._promoter = Promoter[ExpertKey](self._rule, controller.evicted_for)

    def after_step(self, decision: Decision) -> None:
        """See `Observer.after_step`."""
        promoter = self._promoter
        computed, waited_for = set(decision.computed), set(decision.fetched)
        promoter.note_served(use.key for use in decision.uses if use.key not in computed)
        promoter.note(use.key for use in decision.unmet)
        promoter.note(key for key in decision.computed if self._controller.find_bank(key))
        if self._mode.leaves_low and not decision.prefill:
            fetched = (key for batch in decision.batches for key in batch if key in waited_for)
            promoter.note(k._replace(precision=LOW) for k in fetched if k.precision == NATIVE)

    def after_tokens(self, count: int) -> list[ExpertKey]:
        """See `Observer.after_tokens`."""
        return self._promoter.pick(count, self._controller.__contains__)
