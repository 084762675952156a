"""Which experts that were served low are worth loading natively, and when.

Owns the choice; pure Python, so that a replay can run it. Called by the engine after each token.
A promotion moves as many bytes as the miss that the low copy spared, so an expert must be used
`after_uses` times before it pays; uses are halved every `halving_tokens`, so that old ones fade.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class PromotionRule:
    """How eager promotion is.

    Attributes:
        after_uses: degraded uses, halved with age, that an expert needs.
        per_token: most promotions started after one token.
        halving_tokens: tokens after which a use counts half.
    """

    after_uses: float = 2.0
    per_token: int = 1
    halving_tokens: int = 32

    def __post_init__(self):
        if self.after_uses <= 0 or self.per_token < 0 or self.halving_tokens < 1:
            raise ValueError(f"{self}; want after_uses > 0, per_token >= 0, halving_tokens >= 1")


DEFAULT_PROMOTION = PromotionRule()


class Promoter(Generic[Key]):
    """Counts degraded uses and picks who is promoted."""

    def __init__(self, rule: PromotionRule):
        self.rule = rule
        self._uses: dict[Key, float] = {}
        self._tokens = 0

    def note(self, keys: Iterable[Key]) -> None:
        """Records one degraded use of each key."""
        for key in keys:
            self._uses[key] = self._uses.get(key, 0.0) + 1.0

    def pick(self, tokens: int, is_resident: Callable[[Key], bool]) -> list[Key]:
        """Ends `tokens` tokens; the most used keys that are due, the latest first among equals."""
        halvings = (self._tokens + tokens) // self.rule.halving_tokens
        halvings -= self._tokens // self.rule.halving_tokens
        self._tokens += tokens
        for _ in range(halvings):
            self._uses = {key: uses / 2 for key, uses in self._uses.items() if uses >= 0.5}
        due = [key for key, uses in self._uses.items() if uses >= self.rule.after_uses]
        due = [key for key in reversed(due) if not is_resident(key)]
        due.sort(key=lambda key: -self._uses[key])
        picked = due[: self.rule.per_token * tokens]
        for key in picked:
            del self._uses[key]
        return picked
