"""Least frequently used, where old uses count less.

Source: Lee et al., "LRFU: a spectrum of policies that subsumes the LRU and LFU policies", IEEE
Transactions on Computers 50(12), 2001, with time in tokens.
"""

from math import log2

from hobbit_jax.cache.policies.interface import Key, Step
from hobbit_jax.cache.policies.priority import PriorityPolicy

# Tokens. Texts differ: of 8 to 512, real routing at 416 slots is best
# served by 8 on the law trace (.478; .449 with 64) and by 512 on the intent trace (.525; .514).
HALF_LIFE = 64.0


class DecayedLFU(PriorityPolicy[Key]):
    """Evicts the key with the lowest count; a use counts half after 64 tokens.

    A count is held as a logarithm on a scale that moves with time, so that the order of two keys
    changes only when one of them is used.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._log_count: dict[Key, float] = {}
        self._now = 0.0  # in half-lives

    def begin_step(self, step: Step) -> None:
        self._now = step.token / HALF_LIFE

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        before = self._log_count.get(key)
        count = 1.0 if before is None else 1.0 + 2.0 ** (before - self._now)
        self._log_count[key] = self._now + log2(count)
        if key not in self._resident:
            return False
        self._insert(key)
        return True

    def _priority(self, key: Key) -> float:
        # One that was admitted without a use counts as if it were used now.
        return self._log_count.get(key, self._now)
