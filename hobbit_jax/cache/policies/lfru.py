"""Least frequently and recently used: a count of uses, divided by age.

Source: the LFRU expert cache proposed for vLLM (pull request 37190): uses / (1 + age).
"""

from collections.abc import Collection
from math import inf

from hobbit_jax.cache.policies.interface import Key, Policy, Step


class LFRU(Policy[Key]):
    """Evicts the key with the lowest uses / (1 + tokens since the last).

    The order of two keys changes as time passes, so every eviction looks at every resident.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._uses: dict[Key, int] = {}
        self._resident: dict[Key, int] = {}  # the token of the last use, or of the admission
        self._token = 0

    def begin_step(self, step: Step) -> None:
        self._token = step.token

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        self._uses[key] = self._uses.get(key, 0) + 1
        if key not in self._resident:
            return False
        self._resident[key] = self._token
        return True

    def victim(self, keep: Collection[Key] = ()) -> Key:
        now, uses = self._token + 1, self._uses
        victim, lowest = None, inf
        for key, last in self._resident.items():
            score = uses.get(key, 1) / (now - last)
            if score < lowest and key not in keep and key not in self._pinned:
                victim, lowest = key, score
        if victim is None:
            raise self._all_in_use()
        return victim

    def _insert(self, key: Key) -> None:
        self._resident[key] = self._token
