"""Which expert is in which slot of an offloading program, least recently used out first.

Owns the order and the rounds, without any tensor. One order for all layers; it is
`cache.policies.LRU`, the class that our replays run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hobbit_jax.cache.policies import LRU

ExpertKey = tuple[int, int]  # layer, expert


class Round(NamedTuple):
    """Experts that are on the device together, those already there first."""

    slots: dict[ExpertKey, int]
    fetched: list[ExpertKey]  # of them, those to be copied to their slots first


class LRUSlots:
    """Slots for the experts of all layers.

    Args:
        capacity: slots.

    Raises:
        ValueError: no slot.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._lru = LRU[ExpertKey](capacity)
        self._slot_of: dict[ExpertKey, int] = {}
        self.hits = self.misses = 0

    def use(self, keys: Sequence[ExpertKey]) -> Iterator[Round]:
        """One step of a layer: counts its distinct experts, and brings them in by rounds.

        More experts than slots come in several. A round's slots are its own until the next one is
        asked for.
        """
        present = {key: self._lru.access(key) for key in keys}
        hits = sum(present.values())
        self.hits, self.misses = self.hits + hits, self.misses + len(keys) - hits
        ordered = sorted(keys, key=lambda key: not present[key])  # stable
        for start in range(0, len(ordered), self.capacity):
            together = ordered[start : start + self.capacity]
            fetched = [key for key in together if key not in self._lru]
            for key in fetched:
                victim = self._lru.admit(key, together)
                free = len(self._slot_of) if victim is None else self._slot_of.pop(victim)
                self._slot_of[key] = free
            yield Round({key: self._slot_of[key] for key in together}, fetched)
