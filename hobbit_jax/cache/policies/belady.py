"""Belady's algorithm: evict what is used again last. The bound, as it needs the future.

Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
Journal 5(2), 1966. With a whole step resident at once it still makes the fewest misses.
"""

from collections.abc import Sequence

from hobbit_jax.cache.policies.interface import Key
from hobbit_jax.cache.policies.priority import PriorityPolicy


class Belady(PriorityPolicy[Key]):
    """Evicts the key whose next use is farthest away.

    `future` is every access there will be, in order, also those of other banks.
    """

    def __init__(self, capacity: int, future: Sequence[Key]):
        super().__init__(capacity)
        self._never, self._n_seen = len(future), 0
        self._uses: dict[Key, list[int]] = {}  # those to come of each key, the next one last
        for place in range(len(future) - 1, -1, -1):
            self._uses.setdefault(future[place], []).append(place)

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`. RuntimeError if the access was not foretold."""
        if not self._uses.get(key):
            raise RuntimeError(f"access {self._n_seen} to {key} was not foretold")
        self._uses[key].pop()
        self._n_seen += 1
        if key not in self._resident:
            return False
        self._insert(key)
        return True

    def _priority(self, key: Key) -> float:
        uses = self._uses.get(key)
        return -(uses[-1] if uses else self._never)
