"""Belady's algorithm: evict what is used again last. The bound, as it needs the future.

Owns the order of next uses. Only a replay can make one; no live engine can. Source: Belady, "A
study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
With a whole step resident at once it still makes the fewest misses (a test tries every choice).
"""

from __future__ import annotations

from collections.abc import Sequence

from hobbit_jax.cache.policies.interface import Key
from hobbit_jax.cache.policies.priority import PriorityPolicy


class Belady(PriorityPolicy[Key]):
    """Evicts the key whose next use is farthest away.

    Args:
        capacity: slots.
        future: every access there will be, in order.
    """

    def __init__(self, capacity: int, future: Sequence[Key]):
        super().__init__(capacity)
        self._future, self._n_seen = future, 0
        self._next_use: dict[Key, int] = {}  # of each key, from now on
        self._use_after = [len(future)] * len(future)  # of the key accessed then
        for i in range(len(future) - 1, -1, -1):
            self._use_after[i] = self._next_use.get(future[i], len(future))
            self._next_use[future[i]] = i

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`.

        Raises:
            RuntimeError: the access is not the one that was foretold.
        """
        if self._n_seen == len(self._future) or self._future[self._n_seen] != key:
            raise RuntimeError(f"access {self._n_seen} to {key} was not foretold")
        self._next_use[key] = self._use_after[self._n_seen]
        self._n_seen += 1
        if key not in self._resident:
            return False
        self._table.set(key, self._priority(key))
        return True

    def _priority(self, key: Key) -> float:
        return -self._next_use.get(key, len(self._future))
