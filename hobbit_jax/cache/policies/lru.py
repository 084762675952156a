"""Least recently used: the baseline of every cache.

Owns one order of use. Called through `interface.Policy`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from hobbit_jax.cache.policies.interface import Key, Policy


class LRU(Policy[Key]):
    """Evicts what was used, or admitted, longest ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._resident: OrderedDict[Key, None] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`."""
        if key not in self._resident:
            return False
        self._resident.move_to_end(key)
        return True

    def _victim(self, keep: Collection[Key]) -> Key:
        for key in self._resident:
            if key not in self._pinned and key not in keep:
                return key
        raise self._all_in_use()

    def _insert(self, key: Key) -> None:
        self._resident[key] = None

    def _delete(self, key: Key) -> None:
        del self._resident[key]
