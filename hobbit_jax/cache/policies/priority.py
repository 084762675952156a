"""Policies whose every key has one number, and the lowest goes.

Owns the heap behind them. Outdated entries stay in it until they surface or outnumber the others.
"""

import heapq
from abc import abstractmethod
from collections.abc import Collection
from typing import Generic

from hobbit_jax.cache.policies.interface import Key, Policy


class PriorityTable(Generic[Key]):
    """Keys with a number each; among equals the one set longest ago is the lowest."""

    def __init__(self):
        self._entry: dict[Key, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = 0

    def set(self, key: Key, priority: float) -> None:
        """Enters a key, or gives it another number."""
        self._serial += 1
        self._entry[key] = (priority, self._serial)
        if len(self._heap) > 4 * len(self._entry) + 64:
            self._heap = [(p, serial, key) for key, (p, serial) in self._entry.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (priority, self._serial, key))

    def delete(self, key: Key) -> None:
        """Takes a key out."""
        del self._entry[key]

    def clear(self) -> list[Key]:
        """Takes all keys out and returns them, the one set longest ago first."""
        keys = sorted(self._entry, key=lambda key: self._entry[key][1])
        self._entry, self._heap = {}, []
        return keys

    def lowest(self, *spared: Collection[Key]) -> tuple[float, Key] | None:
        """The lowest number and its key among those that are in no collection of `spared`."""
        heap, entry, aside = self._heap, self._entry, []
        found = None
        while heap:
            priority, serial, key = heap[0]
            if entry.get(key) != (priority, serial):
                heapq.heappop(heap)
            elif any(key in keys for keys in spared):
                aside.append(heapq.heappop(heap))
            else:
                found = priority, key
                break
        for item in aside:
            heapq.heappush(heap, item)
        return found


class PriorityPolicy(Policy[Key]):
    """Evicts the key of the lowest priority."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._table: PriorityTable[Key] = PriorityTable()

    @abstractmethod
    def _priority(self, key: Key) -> float:
        """The number of a key that was just used, or admitted."""

    def victim(self, keep: Collection[Key] = ()) -> Key:
        lowest = self._table.lowest(keep, self._pinned)
        if lowest is None:
            raise self._all_in_use()
        return lowest[1]

    def _insert(self, key: Key) -> None:
        self._resident[key] = None
        self._table.set(key, self._priority(key))

    def _delete(self, key: Key) -> None:
        del self._resident[key]
        self._table.delete(key)
