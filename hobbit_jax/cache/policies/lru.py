"""Least recently used: the baseline of every cache.

Owns one order of use. Called through `interface.Policy`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from hobbit_jax.cache.policies.interface import Key, TablePolicy


class LRU(TablePolicy[Key]):
    """Evicts what was used, or admitted, longest ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._resident: OrderedDict[Key, None] = OrderedDict()  # the oldest first

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`."""
        if key in self._resident:
            self._resident.move_to_end(key)
            return True
        return False

    def victim(self, keep: Collection[Key] = ()) -> Key:
        """See `Policy.victim`."""
        for key in self._resident:
            if key not in keep and key not in self._pinned:
                return key
        raise self._all_in_use()
