"""What `next_use.py` remembers of one layer: past choices, and what came after each.

Owns the ring of past tokens, the search for states like the present one, and the record of how soon
every expert was used after a remembered token. Experts are numbers here, from 0, as the layer
first saw them. Memory is bounded: about 200 bytes plus one per expert for each of the last `MEMORY`
tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MEMORY = 4096  # tokens
HORIZON = 16  # tokens after a remembered one within which uses are recorded; below 256
LIKENESSES = 8  # levels of likeness; 0 stands for no recollection
_CHAIN = 16  # past tokens compared with the present one
_BEST = 2  # recollections returned
# A state is a bit set with seven bits per expert: four if it is chosen now, two if it was for the
# token before, one if for that before it. Bits in common are the likeness of two states.
_STRIDE, _NOW, _BEFORE, _LONG_BEFORE = 7, 0b0001111, 0b0110000, 0b1000000
_ABSENT = -(MEMORY + HORIZON)  # earlier than anything remembered


class LayerMemory:
    """The last `MEMORY` choices of one layer."""

    def __init__(self):
        self._width = 64
        self._token = [_ABSENT] * MEMORY  # whose row it is
        self._state = [0] * MEMORY
        self._same_pair = [_ABSENT] * MEMORY  # the token before with the same two experts first
        self._distances = [bytearray() for _ in range(MEMORY)]
        self._latest: dict[int, int] = {}  # pair → the last token that had it
        self._last_use: list[int] = []
        self._present = _ABSENT
        self._chosen = self._chosen_before = 0  # bit sets, the lowest bit of each seven
        self._recent: deque[tuple[int, bytearray]] = deque(maxlen=HORIZON)

    def nothing(self) -> bytearray:
        """The `distances` of a token after which nothing is known."""
        return bytearray(self._width)

    def distances(self, token: int) -> bytearray | None:
        """By expert, how many tokens after `token` it was used; None if that is forgotten.

        0 stands for not within `HORIZON`, or not yet.
        """
        row = token % MEMORY
        return self._distances[row] if self._token[row] == token else None

    def remember(self, token: int, ranked: Sequence[int]) -> list[tuple[int, int]]:
        """Takes in a choice; returns up to two past tokens like it, the most alike first.

        Args:
            token: its number; of a repeated one the uses are noted, and nothing is recalled.
            ranked: the experts, by descending router weight.

        Returns:
            (token, likeness from 1 to `LIKENESSES` - 1).
        """
        self._widen(max(ranked))
        self._record_uses(token, ranked)
        if token == self._present:
            return []
        chosen = 0
        for number in ranked:
            chosen |= 1 << _STRIDE * number
        state = chosen * _NOW | self._chosen * _BEFORE | self._chosen_before * _LONG_BEFORE
        self._chosen, self._chosen_before = chosen, self._chosen
        pair = 1 << ranked[0] | 1 << ranked[min(1, len(ranked) - 1)]
        latest = self._latest.get(pair, _ABSENT)
        row, distances = token % MEMORY, bytearray(self._width)
        found = self._search(token, state, latest)
        self._token[row], self._state[row], self._same_pair[row] = token, state, latest
        self._distances[row] = distances
        self._recent.appendleft((token, distances))
        self._latest[pair] = self._present = token
        return found

    def _search(self, token: int, state: int, place: int) -> list[tuple[int, int]]:
        """The past tokens of one chain that are most like the present one."""
        states, tokens, same_pair = self._state, self._token, self._same_pair
        scored = []
        for _ in range(_CHAIN):
            row = place % MEMORY
            if tokens[row] != place or place <= token - MEMORY:
                break
            scored.append(((states[row] & state).bit_count(), place))
            place = same_pair[row]
        scored.sort(reverse=True)
        most = state.bit_count() + 1
        return [(place, 1 + score * (LIKENESSES - 1) // most) for score, place in scored[:_BEST]]

    def _record_uses(self, token: int, numbers: Sequence[int]) -> None:
        """Notes at the tokens before how far away this use was, back to the last use."""
        last_use, recent, horizon = self._last_use, self._recent, token - HORIZON
        for number in numbers:
            oldest = last_use[number]
            if oldest < horizon:
                oldest = horizon
            for past, distances in recent:
                if past < oldest:
                    break
                distances[number] = token - past
            last_use[number] = token

    def _widen(self, number: int) -> None:
        """Makes room for a number seen for the first time."""
        while len(self._last_use) <= number:
            self._last_use.append(_ABSENT)
        while number >= self._width:
            for row in self._distances:
                if row:  # those never written get their width when they are
                    row.extend(bytes(self._width))
            self._width *= 2
