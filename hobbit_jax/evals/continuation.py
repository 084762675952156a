"""The text of one generated sequence, watched for stop strings as its tokens come.

Owns the decoding token by token and the cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lm_eval.models.utils import postprocess_generated_text

from hobbit_jax.model_file.tokenizer import Tokenizer


class Continuation:
    """The text of one sequence as its tokens come, until one of `stops` occurs in it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._pending: deque[int | None] = deque()
        self._pieces = tokenizer.decode_stream(iter(self._pending.popleft, None))
        self._stops = stops
        self._reach = max(map(len, stops), default=0)
        self.text = ""
        self.ended = False

    def add(self, token: int) -> None:
        """Appends a token; afterwards `ended` says whether a stop string has occurred."""
        self._pending.append(token)
        piece = next(self._pieces)
        self.text += piece
        # A stop string may have begun in earlier tokens.
        tail = self.text[-(len(piece) + self._reach) :]
        self.ended = any(stop in tail for stop in self._stops)

    def finish(self) -> str:
        """The text before the first stop string."""
        self._pending.append(None)
        self.text += "".join(self._pieces)
        return postprocess_generated_text(self.text, list(self._stops), None)
