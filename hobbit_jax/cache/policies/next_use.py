"""NextUse: what followed the last time the model was in a state like this one.

Owns the policy and its estimate of every resident's next use; `next_use_memory.py` owns what it
remembers. Called through `interface.Policy`. Our own. As Belady's algorithm does, it evicts the key
whose next use is farthest, with an estimate in place of the future. Routing repeats itself far
more than recency and frequency can tell: the same token in the same phrase chooses nearly the same
experts, and so do the tokens after it. The logarithm of the tokens until the next use is taken as
the mean over four recollections, two of this layer and one each of the two layers before it.
Each is looked up in a table by how alike the remembered state was, how soon the key was used after
it, and how often the key is used at all. The tables are learned while running: a few keys are
watched from each step on, and what they turn out to do is averaged in.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Collection
from math import exp, log
from operator import itemgetter
from typing import Generic

from hobbit_jax.cache.policies.interface import Key, Step, TablePolicy
from hobbit_jax.cache.policies.next_use_memory import HORIZON, LIKENESSES, LayerMemory

# How often a key is used: a mix of three decayed frequencies, in units of 1 / _WHOLE.
_TIME_CONSTANTS, _MIX = (3.0, 30.0, 400.0), (0.25, 0.35, 0.40)  # tokens; weights
_WHOLE, _OLDEST = 4000, 2000  # the mix of a key used at every token; ages above are taken as this
_DECAYS = [[exp(-age / constant) for age in range(_OLDEST + 1)] for constant in _TIME_CONSTANTS]
_GAINS = [_WHOLE * w * (1 - d[1]) for w, d in zip(_MIX, _DECAYS, strict=True)]
_RATES, _RATES_PER_E = 18, 3  # buckets of the mix, and how many to a factor of e
_RATE_OF = [
    min(_RATES - 1, int(-_RATES_PER_E * log(max(mix, 0.5) / _WHOLE))) for mix in range(_WHOLE)
] + [0, 0]

_LONGEST = 200  # tokens; a next use farther away is learned as this
_WATCHED = 1  # keys watched from each step on
_PRIOR_COUNT, _MOST_COUNT = 8, 2000  # observations: what a first guess weighs, and the past at most
_RECOLLECTIONS = 4
_NOTHING = (-1, 0)  # no past token, no likeness


class _Table:
    """What one recollection is worth: mean log of tokens until the next use, by cell."""

    def __init__(self):
        self.log_tokens: list[float] = []
        for likeness in range(LIKENESSES):
            trust = likeness / LIKENESSES
            for distance in range(HORIZON + 1):
                for rate in range(_RATES):
                    usual = (rate + 0.5) / _RATES_PER_E
                    recalled = log(distance) if distance else usual
                    self.log_tokens.append(trust * recalled + (1 - trust) * usual)
        self.count = [_PRIOR_COUNT] * len(self.log_tokens)


# How soon each key was used after a remembered token; the first cell for its likeness; the table.
_Vote = tuple[bytearray, int, _Table]
# Since which token, and in which cells its outcome belongs.
_Watched = tuple[int, list[tuple[_Table, int]]]


class _Layer(Generic[Key]):
    """One layer's keys, numbered as they are first used."""

    def __init__(self, index: int):
        self.index = index
        self.order: list[Key] = []  # the residents, the soonest next use first
        self.memory = LayerMemory()
        self.numbers: dict[Key, int] = {}
        # By number:
        self.last_token: list[int] = []
        self.frequencies: list[tuple[float, float, float]] = []
        self.watched: list[_Watched | None] = []

    def number(self, key: Key, token: int) -> int:
        """The key's number, a new one if need be."""
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.numbers)
            self.last_token.append(token)
            self.frequencies.append((0.0, 0.0, 0.0))
            self.watched.append(None)
        return number

    def rate(self, number: int, token: int) -> int:
        """The bucket of how often a key is used."""
        age = min(token - self.last_token[number], _OLDEST)
        f = zip(self.frequencies[number], _DECAYS, strict=True)
        return _RATE_OF[int(sum(frequency * decay[age] for frequency, decay in f))]


class NextUse(TablePolicy[Key]):
    """Evicts the key whose next use, recalled from similar states, is farthest away.

    Args:
        capacity: slots.
        seed: chooses the keys that are watched.
    """

    def __init__(self, capacity: int, seed: int = 0):
        super().__init__(capacity)
        self._random = random.Random(seed).random
        self._tables = [_Table() for _ in range(_RECOLLECTIONS)]
        self._resident: dict[Key, float] = {}  # the token of the next use
        # The first is for what is admitted before any step has used it.
        self._layers: list[_Layer[Key]] = [_Layer(0)]
        self._farthest = [-1.0]  # next use of the last in each layer's order; -1 without any
        self._layer_of: dict[int, _Layer[Key]] = {}
        self._home: dict[Key, _Layer[Key]] = {}
        self._step = Step(0, 0, 0)
        self._used: list[tuple[float, Key]] = []  # accessed since the last estimate
        self._coming: dict[Key, float] = {}  # estimates of those that are about to be admitted
        # The best recollection of each layer before, in this token.
        self._before: list[tuple[int, int]] = [_NOTHING, _NOTHING]

    def begin_step(self, step: Step) -> None:
        """See `Policy.begin_step`."""
        if self._used:
            self._take_in()
        if step.token != self._step.token:
            self._before = [_NOTHING, _NOTHING]
        self._step = step

    def access(self, key: Key, weight: float = 1.0, native: bool = True) -> bool:
        """See `Policy.access`."""
        self._used.append((-weight, key))
        return key in self._resident

    def admit(self, key: Key, keep: Collection[Key] = ()) -> Key | None:
        """See `Policy.admit`."""
        if self._used:
            self._take_in()
        return super().admit(key, keep)

    def _take_in(self) -> None:
        """Learns from a step's choice, and estimates anew when the layer's keys are used next."""
        token, layer = self._step.token, self._layer_of.get(self._step.layer)
        if layer is None:
            layer = self._layer_of[self._step.layer] = _Layer(len(self._layers))
            self._layers.append(layer)
            self._farthest.append(-1.0)
        self._used.sort(key=itemgetter(0))
        used = [key for _, key in self._used]
        self._used = []
        ranked = [layer.number(key, token) for key in used]
        missing = []
        for key, number in zip(used, ranked, strict=True):
            self._count_use(layer, number)
            if key not in self._resident:
                missing.append(key)
            elif self._home[key] is not layer:
                self._home[key].order.remove(key)
                self._note_farthest(self._home[key])
                layer.order.append(key)
            self._home[key] = layer
        keys = layer.order + missing
        votes = self._votes(layer, ranked)
        estimates = self._estimate(layer, keys, votes)
        self._resident.update(zip(layer.order, estimates, strict=False))
        self._coming = dict(zip(missing, estimates[len(layer.order) :], strict=True))
        layer.order.sort(key=self._resident.__getitem__)
        self._note_farthest(layer)
        for _ in range(_WATCHED):
            self._watch(layer, layer.numbers[keys[int(self._random() * len(keys))]], votes)

    def _count_use(self, layer: _Layer[Key], number: int) -> None:
        """Frequencies of a key used now, and the outcome if it was watched."""
        token, (f0, f1, f2) = self._step.token, layer.frequencies[number]
        age = token - layer.last_token[number]
        if age > _OLDEST:
            age = _OLDEST
        layer.frequencies[number] = (
            f0 * _DECAYS[0][age] + _GAINS[0],
            f1 * _DECAYS[1][age] + _GAINS[1],
            f2 * _DECAYS[2][age] + _GAINS[2],
        )
        layer.last_token[number] = token
        watched = layer.watched[number]
        if watched is not None and watched[0] < token:
            self._conclude(watched)
            layer.watched[number] = None

    def _votes(self, layer: _Layer[Key], ranked: list[int]) -> list[_Vote]:
        """Recollections: two of this layer, then those of the two layers before it."""
        recalled = layer.memory.remember(self._step.token, ranked)
        recalled += [_NOTHING] * (2 - len(recalled))
        before = self._before
        places = (*recalled, before[-1], before[-2])
        before.append(recalled[0])
        votes = []
        for (place, likeness), table in zip(places, self._tables, strict=True):
            distances = layer.memory.distances(place)
            if distances is None:
                distances, likeness = layer.memory.nothing(), 0
            votes.append((distances, likeness * (HORIZON + 1) * _RATES, table))
        return votes

    def _estimate(self, layer: _Layer[Key], keys: list[Key], votes: list[_Vote]) -> list[float]:
        """The token of each key's next use."""
        token, numbers = self._step.token, layer.numbers
        last_token, frequencies = layer.last_token, layer.frequencies
        decay0, decay1, decay2 = _DECAYS
        looks = [(distances, first, table.log_tokens) for distances, first, table in votes]
        estimates = []
        for key in keys:
            number = numbers[key]
            age = token - last_token[number]
            if age > _OLDEST:
                age = _OLDEST
            f0, f1, f2 = frequencies[number]
            rate = _RATE_OF[int(f0 * decay0[age] + f1 * decay1[age] + f2 * decay2[age])]
            total = 0.0
            for distances, first, log_tokens in looks:
                total += log_tokens[first + distances[number] * _RATES + rate]
            estimates.append(token + exp(total / _RECOLLECTIONS))
        return estimates

    def _watch(self, layer: _Layer[Key], number: int, votes: list[_Vote]) -> None:
        """Keeps what is told of a key from now on, to learn how it turns out."""
        token, watched = self._step.token, layer.watched[number]
        if watched is not None:
            if token - watched[0] < _LONGEST:
                return
            self._conclude(watched)
        rate = layer.rate(number, token)
        cells = [(t, first + distances[number] * _RATES + rate) for distances, first, t in votes]
        layer.watched[number] = (token, cells)

    def _conclude(self, watched: _Watched) -> None:
        """Averages an outcome into the cells from which it was to be told."""
        outcome = log(min(self._step.token - watched[0], _LONGEST))
        for table, cell in watched[1]:
            count = table.count[cell] = min(table.count[cell] + 1, _MOST_COUNT)
            table.log_tokens[cell] += (outcome - table.log_tokens[cell]) / count

    def victim(self, keep: Collection[Key] = ()) -> Key:
        """See `Policy.victim`."""
        if self._used:
            self._take_in()
        resident, pinned = self._resident, self._pinned
        farthest = max(self._farthest)
        order = self._layers[self._farthest.index(farthest)].order
        if order and order[-1] not in keep and order[-1] not in pinned:
            return order[-1]
        victim, farthest = None, -1.0
        for layer in self._layers:
            for key in reversed(layer.order):
                if resident[key] <= farthest:
                    break
                if key not in keep and key not in pinned:
                    victim, farthest = key, resident[key]
                    break
        if victim is None:
            raise self._all_in_use()
        return victim

    def _insert(self, key: Key) -> None:
        # A key that nobody asked for in this step was loaded because a use is near.
        self._resident[key] = self._coming.get(key, self._step.token + 1.0)
        layer = self._home.setdefault(key, self._layers[0])
        insort(layer.order, key, key=self._resident.__getitem__)
        self._note_farthest(layer)

    def _delete(self, key: Key) -> None:
        layer = self._home[key]
        if layer.order[-1] == key:
            layer.order.pop()
        else:
            layer.order.remove(key)
        del self._resident[key]
        self._note_farthest(layer)

    def _note_farthest(self, layer: _Layer[Key]) -> None:
        self._farthest[layer.index] = self._resident[layer.order[-1]] if layer.order else -1.0
