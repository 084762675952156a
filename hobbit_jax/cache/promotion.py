"""Which experts that were served low, or by the CPU, are worth loading in the background.

A promotion moves as many bytes as the miss that the low copy or the CPU spared, and evicts an
expert that may have to be promoted again: so a newcomer must have been used `after_uses` times, and
`margin` times as often as the expert that its arrival would evict. Uses are halved every
`halving_tokens`, so that old ones fade.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hobbit_jax.cache.controller import Controller, Decision, Observer
from hobbit_jax.cache.miss_modes import LOW
from hobbit_jax.experts.store import NATIVE, ExpertKey


@dataclass(frozen=True)
class PromotionRule:
    """How eager promotion is; uses are counted with age, as the module says."""

    after_uses: float = 2.0  # that an absent copy would have served, after which it is loaded
    per_token: int = 1  # most promotions started after one token
    halving_tokens: int = 32  # tokens after which a use counts half
    # Its uses must be more than this many times those of the expert that it would evict; 0 leaves
    # that out. At 1.5 the reference model's floor promotes one expert in twenty to a hundred tokens
    # instead of one in each, and demotes 4 to 6 points fewer selections.
    margin: float = 1.5

    def __post_init__(self):
        if self.after_uses <= 0 or min(self.per_token, self.halving_tokens - 1, self.margin) < 0:
            raise ValueError(
                f"{self}; want after_uses > 0, per_token >= 0, halving_tokens >= 1, margin >= 0"
            )


DEFAULT_PROMOTION = PromotionRule()


def _halved(uses: Counter[ExpertKey]) -> Counter[ExpertKey]:
    """Counts that fade, and so are no integers."""
    return Counter({key: count / 2 for key, count in uses.items() if count >= 0.5})  # pyright: ignore


class Promotion(Observer):
    """Counts uses, and has copies loaded in the background, the most used first."""

    def __init__(self, rule: PromotionRule, controller: Controller):
        self.rule, self._controller = rule, controller
        self._missed = Counter[ExpertKey]()  # uses that an absent copy would have served
        self._served = Counter[ExpertKey]()  # uses that the key itself served
        self._tokens = 0

    def after_step(self, decision: Decision) -> None:
        """See `Observer.after_step`."""
        computed, waited_for = set(decision.computed), set(decision.fetched)
        self.note_served(use.key for use in decision.uses if use.key not in computed)
        self.note(use.key for use in decision.unmet)
        self.note(key for key in decision.computed if self._controller.find_bank(key))
        if self._controller.mode.leaves_low and not decision.prefill:
            fetched = (key for batch in decision.batches for key in batch if key in waited_for)
            self.note(k._replace(precision=LOW) for k in fetched if k.precision == NATIVE)

    def note(self, keys: Iterable[ExpertKey]) -> None:
        """Records for each absent copy one use that it would have served."""
        self._missed.update(keys)

    def note_served(self, keys: Iterable[ExpertKey]) -> None:
        """Records one use of each key that it served itself, as residents do."""
        self._served.update(keys)

    def after_tokens(self, count: int) -> list[ExpertKey]:
        """See `Observer.after_tokens`: the latest first among those used alike."""
        halvings = (self._tokens + count) // self.rule.halving_tokens
        halvings -= self._tokens // self.rule.halving_tokens
        self._tokens += count
        for _ in range(halvings):
            self._missed, self._served = _halved(self._missed), _halved(self._served)
        due = [key for key, uses in self._missed.items() if uses >= self.rule.after_uses]
        due = [key for key in reversed(due) if key not in self._controller]
        due.sort(key=lambda key: -self._missed[key])
        worth_it = filter(self._worth_it, due)
        picked = list(itertools.islice(worth_it, self.rule.per_token * count))
        for key in picked:
            # From now on it stands for what it has earned.
            self._served[key] += self._missed.pop(key)
        return picked

    def _worth_it(self, key: ExpertKey) -> bool:
        if not self.rule.margin or (evicted := self._controller.evicted_for(key)) is None:
            return True
        return self._missed[key] > self.rule.margin * self._served[evicted]
