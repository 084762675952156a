"""First in, first out: what a cache loses that never looks at uses."""

from __future__ import annotations

from collections.abc import Collection

from hobbit_jax.cache.policies.interface import Key, TablePolicy


class FIFO(TablePolicy[Key]):
    """Evicts what was admitted first."""

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        return key in self._resident

    def victim(self, keep: Collection[Key] = ()) -> Key:
        for key in self._resident:  # in the order of admission
            if key not in keep and key not in self._pinned:
                return key
        raise self._all_in_use()
