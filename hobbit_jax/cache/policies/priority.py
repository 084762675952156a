"""Policies whose every key has one number, and the lowest goes.

Owns the heap behind them. Outdated entries stay in it until they surface or outnumber the others.
"""

import heapq
from abc import abstractmethod
from collections.abc import Collection

from hobbit_jax.cache.policies.interface import Key, Policy


class PriorityPolicy(Policy[Key]):
    """Evicts the key of the lowest priority; among equals the one that was set longest ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._resident: dict[Key, tuple[float, int]] = {}  # priority, and when it was set
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = 0

    @abstractmethod
    def _priority(self, key: Key) -> float:
        """The number of a key that was just used, or admitted."""

    def _insert(self, key: Key) -> None:
        """Enters a key, or gives it another number."""
        self._serial += 1
        entry = self._resident[key] = (self._priority(key), self._serial)
        if len(self._heap) > 4 * len(self._resident) + 64:
            self._heap = [(*entry, key) for key, entry in self._resident.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (*entry, key))

    def victim(self, keep: Collection[Key] = ()) -> Key:
        heap, aside, found = self._heap, [], None
        while heap and found is None:
            priority, serial, key = heap[0]
            if self._resident.get(key) != (priority, serial):
                heapq.heappop(heap)
            elif key in keep or key in self._pinned:
                aside.append(heapq.heappop(heap))
            else:
                found = key
        for item in aside:
            heapq.heappush(heap, item)
        if found is None:
            raise self._all_in_use()
        return found
