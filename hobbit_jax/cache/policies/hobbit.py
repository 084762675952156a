"""HOBBIT's multidimensional cache: recency, frequency, high-precision use, layer distance.

Source: Tang et al., "HOBBIT: a mixed precision expert offloading system for fast MoE inference",
arXiv 2411.01433, section 3.4, equation 3. Relative to the layer that is running an expert has the
priority

    w1 R / T + w2 F / T + w3 H / T + w4 (1 - D / L),

with R the token of its last use, F and H its uses and its uses at high precision, T the tokens so
far, D the layers until its turn and L all layers; R, F, H begin anew with every sequence. The paper
chooses the weights on a calibration set and does not give them.
"""

from collections import defaultdict
from collections.abc import Collection
from math import inf

from hobbit_jax.cache.policies.interface import Key, Policy, Step

# The weights: the best of seven mixes on real routing (the law trace, 416 slots: .504; a quarter
# each .473, recency alone .472).
RECENCY, FREQUENCY, NATIVE_USE, DISTANCE = 0.7, 0.1, 0.1, 0.1


class Hobbit(Policy[Key]):
    """Evicts the key with the lowest weighted sum of the four terms.

    Within a layer the last term is the same and the first three share a divisor, so what a table
    of each layer holds changes with uses only.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._layer_of: dict[Key, int] = {}
        self._tables = defaultdict[int, dict[Key, float]](dict)  # by layer, the latest used last
        # Tokens of this sequence up to a key's last use, its uses, and those that asked for native.
        self._used: dict[Key, tuple[int, int, int]] = {}
        self._step = Step(0, 0, 0)
        self._began = 0  # the token at which this sequence began

    def begin_step(self, step: Step) -> None:
        if step.position == 0 and step.token != self._step.token:
            self._began = step.token
            self._used = {}
            for table in self._tables.values():
                table.update(dict.fromkeys(table, 0.0))
        self._step = step

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        _, uses, native_uses = self._used.get(key, (0, 0, 0))
        self._used[key] = self._step.token - self._began + 1, uses + 1, native_uses + native
        resident = key in self._resident
        if resident and self._layer_of[key] != self._step.layer:
            del self._tables[self._layer_of[key]][key]
        self._layer_of[key] = self._step.layer
        if resident:
            self._set(key)
        return resident

    def _set(self, key: Key) -> None:
        last, uses, native_uses = self._used.get(key, (0, 0, 0))
        table = self._tables[self._layer_of[key]]
        table.pop(key, None)
        table[key] = RECENCY * last + FREQUENCY * uses + NATIVE_USE * native_uses

    def victim(self, keep: Collection[Key] = ()) -> Key:
        tokens = self._step.token - self._began + 1
        n_layers = max(self._tables) + 1
        victim, lowest = None, inf
        for layer, table in self._tables.items():
            found, least = None, inf
            for key, score in table.items():
                if score < least and key not in keep and key not in self._pinned:
                    found, least = key, score
            ahead = (layer - self._step.layer) % n_layers / n_layers
            if (priority := least / tokens + DISTANCE * (1 - ahead)) < lowest:
                victim, lowest = found, priority
        if victim is None:
            raise self._all_in_use()
        return victim

    def _insert(self, key: Key) -> None:
        self._resident[key] = None
        # One that no step has used so far is taken to be of the layer that is running.
        self._layer_of.setdefault(key, self._step.layer)
        self._set(key)

    def _delete(self, key: Key) -> None:
        del self._resident[key]
        del self._tables[self._layer_of[key]][key]
