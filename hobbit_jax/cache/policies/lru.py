"""Least recently used: the baseline of every cache.

Owns one order of use. Called through `interface.Policy`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from hobbit_jax.cache.policies.interface import Key, TablePolicy


class LRU(TablePolicy[Key]):
    """Evicts what was used, or admitted, longest ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._resident: OrderedDict[Key, None] = OrderedDict()  # the oldest first

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`."""
        return not self.access_all((key,), (weight,), native)

    def access_all(
        self, keys: Sequence[Key], weights: Sequence[float], native: bool = True
    ) -> list[Key]:
        """See `Policy.access_all`."""
        resident, missing = self._resident, []
        move_to_end = resident.move_to_end
        for key in keys:
            if key in resident:
                move_to_end(key)
            else:
                missing.append(key)
        return missing

    def admit(self, key: Key, keep: Collection[Key] = ()) -> Key | None:
        """See `Policy.admit`; written out, for it is called as often as a cache misses."""
        resident = self._resident
        if key in resident:
            raise self._resident_already(key)
        if len(resident) < self.capacity:
            resident[key] = None
            return None
        victim = self.victim(keep)
        del resident[victim]
        resident[key] = None
        return victim

    def victim(self, keep: Collection[Key] = ()) -> Key:
        """See `Policy.victim`."""
        for key in self._resident:
            if key not in keep and key not in self._pinned:
                return key
        raise self._all_in_use()
