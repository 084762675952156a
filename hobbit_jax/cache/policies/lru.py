"""Least recently used: the baseline of every cache."""

from __future__ import annotations

from hobbit_jax.cache.policies.interface import Key
from hobbit_jax.cache.policies.slru import SLRU


class LRU(SLRU[Key]):
    """Evicts what was used, or admitted, longest ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity, protected_fraction=0.0)
