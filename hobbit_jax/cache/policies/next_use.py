"""NextUse: what followed the last time the model was in a state like this one.

Our own. As Belady's algorithm does, it evicts the expert whose next use is farthest, with an
estimate in place of the future: the same token in the same phrase chooses nearly the same experts,
and so do the tokens after it. The logarithm of the tokens until the next use is taken as the mean
over four recollections, two of this layer and one each of the two layers before it. Each is looked
up in a table by how alike the remembered state was, how soon the expert was used after it, and how
often it is used at all. The tables are learned while running: an expert is watched from each step
on, and what it turns out to do is averaged in.
"""

import random
from collections.abc import Collection, Sequence

import numpy as np

from hobbit_jax.cache.policies import next_use_memory as compiled
from hobbit_jax.cache.policies.interface import Key, Policy, Step

_FIRST_LAYERS, _FIRST_EXPERTS = 8, 64  # that the arrays have room for; doubled as needed


class NextUse(Policy[Key]):
    """Evicts the key whose next use, recalled from similar states, is farthest away."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._random = random.Random(0).random  # chooses the keys that are watched
        self._memory = compiled.empty(_FIRST_LAYERS, _FIRST_EXPERTS)
        # The first row is for what is admitted before any step has used it.
        self._keys: list[list[Key]] = [[]]  # by row and column of the arrays
        self._column: list[dict[Key, int]] = [{}]
        self._row: dict[Key, int] = {}
        self._row_of: dict[int, int] = {}  # of a layer
        self._step = Step(0, 0, 0)
        self._used: list[Key] = []  # accessed since the last estimate
        self._weights: list[float] = []

    def begin_step(self, step: Step) -> None:
        self._take_in()
        self._step = step

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        return not self.access_all((key,), (weight,), native)

    def access_all(
        self, keys: Sequence[Key], weights: Sequence[float], native: bool = True
    ) -> list[Key]:
        self._used += keys
        self._weights += weights
        return [key for key in keys if key not in self._resident]

    def victim(self, keep: Collection[Key] = ()) -> Key:
        """See `Policy.victim`; what the last step used goes only if there is nobody else."""
        self._take_in()
        memory = self._memory
        farthest = compiled.farthest(  # which takes longer for every array that it is given
            memory.estimate_LE, memory.evictable_LE, memory.last_use_LE, memory.farthest_L,
            memory.present_2,
        )  # fmt: skip
        if farthest >= 0:
            row, column = divmod(farthest, memory.estimate_LE.shape[1])
            key = self._keys[row][column]
            if key not in keep:
                return key
        others = [key for key in self._resident if key not in keep and key not in self._pinned]
        if not others:
            raise self._all_in_use()
        return max(others, key=self.expected)

    def expected(self, key: Key) -> float:
        """The token at which a resident key is expected to be used next."""
        return float(self._memory.estimate_LE[self._place(key)])

    def pin(self, key: Key) -> None:
        super().pin(key)
        self._set_evictable(key, False)

    def unpin(self, key: Key) -> None:
        if key in self._pinned:
            self._set_evictable(key, True)
        super().unpin(key)

    def _take_in(self) -> None:
        if not self._used:
            return
        step = self._step
        row = self._row_of.setdefault(step.layer, len(self._keys))
        if row == len(self._keys):
            self._keys.append([])
            self._column.append({})
        chosen = [self._settle(key, row) for key in self._used]
        compiled.take_in(
            self._memory, row, step.token, np.array(chosen), np.array(self._weights),
            len(self._keys[row]), self._random(),
        )  # fmt: skip
        self._used, self._weights = [], []

    def _set_evictable(self, key: Key, evictable: bool) -> None:
        place = row, _ = self._place(key)
        memory = self._memory
        if evictable and memory.last_use_LE[place] != memory.present_2[1]:
            # It was loaded because a use is near.
            memory.estimate_LE[place] = memory.present_2[1] + 1
        memory.evictable_LE[place], memory.farthest_L[row] = evictable, compiled.CHANGED

    def _place(self, key: Key) -> tuple[int, int]:
        """Of a key in the arrays."""
        row = self._row.get(key)
        column = self._settle(key, 0) if row is None else self._column[row][key]
        return self._row[key], column

    def _settle(self, key: Key, row: int) -> int:
        """The column of a key in `row`; it moves there from the row where it was."""
        if key in self._column[row]:
            return self._column[row][key]
        evictable = key in self._resident and key not in self._pinned
        if evictable:
            self._set_evictable(key, False)
        self._row[key], self._column[row][key] = row, len(self._keys[row])
        self._keys[row].append(key)
        n_layers, width = room = self._memory.estimate_LE.shape
        while row >= n_layers:
            n_layers *= 2
        while len(self._keys[row]) > width:
            width *= 2
        if (n_layers, width) != room:
            self._memory = compiled.grown(self._memory, n_layers, width)
        if evictable:
            self._set_evictable(key, True)
        return self._column[row][key]

    def _insert(self, key: Key) -> None:
        self._take_in()
        self._set_evictable(key, True)
        self._resident[key] = None

    def _delete(self, key: Key) -> None:
        self._set_evictable(key, False)
        del self._resident[key]
