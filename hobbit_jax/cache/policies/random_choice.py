"""Any resident, at random: what a policy must beat."""

import random
from collections.abc import Collection

from hobbit_jax.cache.policies.interface import Key, Policy


class RandomChoice(Policy[Key]):
    """Evicts each evictable key with the same chance; the same keys in every run."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._random = random.Random(0)
        self._resident: dict[Key, int] = {}  # the key's place in `_keys`
        self._keys: list[Key] = []

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        return key in self._resident

    def victim(self, keep: Collection[Key] = ()) -> Key:
        # Most keys may go, so a few draws nearly always find one.
        for _ in range(8):
            key = self._random.choice(self._keys)
            if key not in keep and key not in self._pinned:
                return key
        allowed = [key for key in self._keys if key not in keep and key not in self._pinned]
        if not allowed:
            raise self._all_in_use()
        return self._random.choice(allowed)

    def _insert(self, key: Key) -> None:
        self._resident[key] = len(self._keys)
        self._keys.append(key)

    def _delete(self, key: Key) -> None:
        place, last = self._resident.pop(key), self._keys.pop()
        if last != key:
            self._keys[place] = last
            self._resident[last] = place
