"""The cost of being wrong: how much router weight an eviction would make wait.

Owns a decayed sum of router weights, kept for absent keys too. Called through `interface.Policy`.
It is the cost that APEX-style caches minimise (the chance of a use, times what a miss costs) for
experts that all take equally long to load: what is left of the cost is how much the token's output
depends on the expert, which is its router weight. Our reading; no code of others was followed.
"""

from __future__ import annotations

from math import log2

from hobbit_jax.cache.policies.interface import Key, Step
from hobbit_jax.cache.policies.priority import PriorityPolicy

DEFAULT_HALF_LIFE = 64.0  # tokens
_LEAST_WEIGHT = 1e-6  # a logarithm is taken


class Apex(PriorityPolicy[Key]):
    """Evicts the key with the least decayed router weight per token.

    Held as a logarithm on a moving scale, as in `decayed_lfu`; with weights of 1 it is that policy.
    """

    def __init__(self, capacity: int, half_life: float = DEFAULT_HALF_LIFE):
        super().__init__(capacity)
        if half_life <= 0:
            raise ValueError(f"half_life is {half_life}; want more than 0 tokens")
        self.half_life = half_life
        self._log_weight: dict[Key, float] = {}
        self._now = 0.0  # in half-lives

    def begin_step(self, step: Step) -> None:
        """See `Policy.begin_step`."""
        self._now = step.token / self.half_life

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`."""
        before = self._log_weight.get(key)
        total = max(weight, _LEAST_WEIGHT)
        if before is not None:
            total += 2.0 ** (before - self._now)
        self._log_weight[key] = self._now + log2(total)
        if key not in self._resident:
            return False
        self._table.set(key, self._priority(key))
        return True

    def _priority(self, key: Key) -> float:
        # One that was admitted without a use counts as if it were used now, with all the weight.
        return self._log_weight.get(key, self._now)
