"""SentencePiece's byte-pair encoding, with llama.cpp's ids also where scores are equal.

Of all neighbours that together are a piece, the best scored is merged first, of equal ones the
leftmost. Libraries rank merges by a total order, which equal scores have not.

Source: llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_spm_session`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

SPACE = "\u2581"  # how SentencePiece writes a space
_CACHED_WORDS = 2**16


class SentencePieceBPE:
    """Encodes text whose spaces are `SPACE`.

    `vocabulary` has the id of each piece. Ids of higher `scores` are merged earlier, and what is no
    piece is spelt in bytes, whose ids are `byte_ids`.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], scores: Sequence[float], byte_ids: Sequence[int]
    ):
        self._ids, self._scores, self._byte_ids = vocabulary, scores, byte_ids
        # Where no piece holds the beginning of a second word, words do not touch each other.
        inside = re.compile(f"[^{SPACE}]{SPACE}")
        spanning = any(inside.search(piece) for piece in vocabulary)
        self._words = re.compile(".+" if spanning else f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+", re.S)
        self._encode_word = functools.lru_cache(_CACHED_WORDS)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return [token for word in self._words.findall(text) for token in self._encode_word(word)]

    def _merge(self, word: str) -> tuple[int, ...]:
        symbols = list(word)  # a merged symbol is empty
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]

        def candidate(left: int, right: int) -> tuple[float, int, int, int] | None:
            text = symbols[left] + symbols[right]
            token = self._ids.get(text)
            return None if token is None else (-self._scores[token], left, right, len(text))

        heap = [c for i in range(len(symbols) - 1) if (c := candidate(i, i + 1)) is not None]
        heapify(heap)
        while heap:
            _, left, right, length = heappop(heap)
            text = symbols[left] + symbols[right]
            if not symbols[left] or not symbols[right] or len(text) != length:
                continue  # one of them has been merged since
            symbols[left], symbols[right] = text, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            for pair in ((before[left], left), (left, after[left])):
                if min(pair) >= 0 and (found := candidate(*pair)) is not None:
                    heappush(heap, found)
        return tuple(token for symbol in symbols if symbol for token in self._spell(symbol))

    def _spell(self, symbol: str) -> list[int]:
        token = self._ids.get(symbol)
        return [self._byte_ids[b] for b in symbol.encode()] if token is None else [token]
