"""Layered LRU: whose layer has come by most often without using it goes.

Source: Angelopoulos et al., "Cache management for mixture-of-experts LLMs", arXiv 2509.02408, which
ranks experts by rounds since their use and then by the layers until their turn.
"""

from collections import Counter, defaultdict
from collections.abc import Collection

from hobbit_jax.cache.policies.interface import Key, Policy, Step


class LayeredLRU(Policy[Key]):
    """Evicts the key with the most unused turns, and of several the one whose turn is farthest."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._turns: Counter[int] = Counter()  # of each layer
        self._last: defaultdict[int, dict[Key, int]] = defaultdict(dict)  # turn of the last use
        self._layer = 0

    def begin_step(self, step: Step) -> None:
        self._layer = step.layer
        self._turns[step.layer] += 1

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        if key not in self._resident:
            return False
        self._delete(key)
        self._insert(key)
        return True

    def victim(self, keep: Collection[Key] = ()) -> Key:
        n_layers, found, most = max(self._turns, default=0) + 1, None, (-1, 0)
        for layer, last in self._last.items():
            for key, turn in last.items():  # the longest unused first
                if key not in keep and key not in self._pinned:
                    until = (layer - self._layer) % n_layers or n_layers
                    if (unused := (self._turns[layer] - turn, until)) > most:
                        found, most = key, unused
                    break
        if found is None:
            raise self._all_in_use()
        return found

    def _insert(self, key: Key) -> None:
        # One that is loaded ahead of its use is taken to be of the layer that is running.
        self._resident[key] = self._layer
        self._last[self._layer][key] = self._turns[self._layer]

    def _delete(self, key: Key) -> None:
        del self._last[self._resident.pop(key)][key]
