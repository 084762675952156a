"""MoE-APEX's cost-aware cache: what an expert's uses cost to load, and whether it was just used.

Owns the cost and the set of experts last used. Called through `interface.Policy`. Source: Tang et
al., "MoE-APEX: an efficient MoE inference system with adaptive precision expert offloading", ASPLOS
2026, section 3.4, equations 3 and 4 (HOBBIT's successor). There an expert t has the cost
C = H + (B_l / B_h) L, with H and L its uses at high and low precision in this sequence and B the
bits of each, and relative to the layer that is running the priority

    C / T + 1 / (D + .1) if the last forward pass used it, else C / T,

with T the tokens so far and D the layers until its turn. Records begin anew with every sequence.

The paper does not say whether layers that this forward pass has left count by this pass or the one
before; here by this one. A prefill chunk is one forward pass.
"""

from __future__ import annotations

from collections.abc import Collection

from hobbit_jax.cache.policies.interface import Key, Step, TablePolicy
from hobbit_jax.cache.policies.priority import PriorityTable, lowest_of

# Of Q2_K over Q4_K, the pair that our plans use most. Without low-precision uses it says nothing.
DEFAULT_LOW_COST = 2.625 / 4.5
_NEAREST = 0.1  # the paper's delta: the distance of an expert of the layer that is running


class Apex(TablePolicy[Key]):
    """Evicts the key with the lowest cost, or cost and nearness if its layer's last pass used it.

    Within a layer the order is that of the costs among those last used, and among the others; so
    there are two tables a layer, and an eviction compares their lowest.

    Args:
        capacity: slots.
        low_cost: of a use at low precision, in uses at high precision; B_l / B_h.
    """

    def __init__(self, capacity: int, low_cost: float = DEFAULT_LOW_COST):
        super().__init__(capacity)
        if not 0 <= low_cost <= 1:
            raise ValueError(f"low_cost is {low_cost}; want 0 to 1")
        self.low_cost = low_cost
        self._cost: dict[Key, float] = {}
        self._layer_of: dict[Key, int] = {}
        # Of each layer: the last pass's keys, resident or not, and the token of that pass.
        self._last_used: dict[int, tuple[int, dict[Key, None]]] = {}
        self._tables: dict[tuple[int, bool], PriorityTable[Key]] = {}  # (layer, was last used)
        self._step = Step(0, 0, 0)
        self._began = 0  # the token at which this sequence began

    def begin_step(self, step: Step) -> None:
        """See `Policy.begin_step`."""
        if step.position == 0 and step.token != self._step.token:
            self._began, self._cost, self._last_used = step.token, {}, {}
            tables, self._tables = self._tables, {}
            for table in tables.values():
                for key in table.clear():
                    self._enter(key)
        self._step = step
        token, before = self._last_used.get(step.layer, (-1, {}))
        if token != step.token:
            self._last_used[step.layer] = (step.token, {})
            for key in before:
                if key in self._resident:
                    self._move(key)

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`."""
        self._cost[key] = self._cost.get(key, 0.0) + (1.0 if native else self.low_cost)
        self._layer_of[key] = self._step.layer
        self._last_used.setdefault(self._step.layer, (self._step.token, {}))[1][key] = None
        if key not in self._resident:
            return False
        self._move(key)
        return True

    def _enter(self, key: Key) -> None:
        layer = self._layer_of[key]
        place = layer, key in self._last_used.get(layer, (-1, ()))[1]
        self._resident[key] = place
        self._tables.setdefault(place, PriorityTable()).set(key, self._cost.get(key, 0.0))

    def _move(self, key: Key) -> None:
        self._tables[self._resident[key]].delete(key)
        self._enter(key)

    def victim(self, keep: Collection[Key] = ()) -> Key:
        """See `Policy.victim`."""
        tokens = self._step.token - self._began + 1
        n_layers = max(layer for layer, _ in self._tables) + 1

        def priority(place: tuple[int, bool], cost: float) -> float:
            layer, was_last_used = place
            ahead = (layer - self._step.layer) % n_layers
            return cost / tokens + (1 / (ahead + _NEAREST) if was_last_used else 0)

        victim = lowest_of(self._tables, priority, keep, self._pinned)
        if victim is None:
            raise self._all_in_use()
        return victim

    def _insert(self, key: Key) -> None:
        # One that no step has used so far is taken to be of the layer that is running.
        self._layer_of.setdefault(key, self._step.layer)
        self._enter(key)

    def _delete(self, key: Key) -> None:
        self._tables[self._resident.pop(key)].delete(key)
