"""A fixed choice: the experts that a profile found most used stay."""

from collections.abc import Mapping

from hobbit_jax.cache.policies.interface import Key
from hobbit_jax.cache.policies.priority import PriorityPolicy


class PinnedStatic(PriorityPolicy[Key]):
    """Evicts the key least used in a profile, whatever happens meanwhile.

    The rest streams through the slots that its step leaves, as nothing in use is evicted. `uses`
    are those of each key in the profile; a key that is not there has none.
    """

    def __init__(self, capacity: int, uses: Mapping[Key, float]):
        super().__init__(capacity)
        self._uses = uses

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        return key in self._resident

    def _priority(self, key: Key) -> float:
        return self._uses.get(key, 0.0)
