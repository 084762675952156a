"""One way to time a decode, for our engine and every baseline, in this process or in another.

A row's prompt is prefilled and the rest is decoded, forced, so that every program meets the same
text. Backends take turns row by row, in an order that is turned round in every other one, so that a
busy machine slows all of them alike. No JAX here: baselines run this in processes of their own.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hobbit_jax.cache.counts import Counts
from hobbit_jax.statistics import spread

Clock = Callable[[], float]


@dataclass(frozen=True)
class Turn:
    """One row under one backend."""

    first_token_s: float  # seconds to prefill the prompt, until the host knew the next token
    token_s: tuple[float, ...]  # of each decoded token, by the turn's clock
    token_cpu_s: tuple[float, ...]  # the same of all processors of the process
    chosen: tuple[int, ...]  # most probable next token after the prompt and each decoded one
    tokens: tuple[Counts, ...] = ()  # of each decoded token; none of a program without counts


class Program(Protocol):
    """One model, one sequence at a time; a call ends when the host knows the next token."""

    def prefill(self, ids_T: np.ndarray) -> int:
        """Begins a fresh sequence, int32 ids; the most probable next token."""
        ...

    def decode(self, token: int) -> int:
        """Appends one token; the most probable next one."""
        ...

    def counts(self) -> Counts | None:
        """What was done so far; None where nothing is counted."""
        ...


def timed_turn(
    program: Program, ids_S: np.ndarray, prompt_tokens: int, clock: Clock = time.perf_counter
) -> Turn:
    """Prefills the first `prompt_tokens` of a row and decodes the rest, forced.

    Counting happens between tokens and is not timed.
    """
    began = clock()
    chosen = [program.prefill(ids_S[:prompt_tokens])]
    first_token_s, last = clock() - began, program.counts()
    token_s, token_cpu_s, tokens = [], [], []
    for token in ids_S[prompt_tokens:]:
        began, cpu_began = clock(), time.process_time()
        chosen.append(program.decode(int(token)))
        token_s.append(clock() - began)
        token_cpu_s.append(time.process_time() - cpu_began)
        now = program.counts()
        if now is not None and last is not None:
            tokens.append(now - last)
        last = now
    return Turn(first_token_s, tuple(token_s), tuple(token_cpu_s), tuple(chosen), tuple(tokens))


@dataclass(frozen=True)
class Measurement:
    """All turns of one backend that count."""

    prompt_tokens: int
    turns: tuple[Turn, ...]

    @property
    def tokens(self) -> int:
        """Decoded in all turns that count."""
        return sum(len(turn.token_s) for turn in self.turns)

    @property
    def counts(self) -> Counts | None:
        """Of the tokens decoded in all turns that count; None for a program without counts."""
        counted = [counts for turn in self.turns for counts in turn.tokens]
        return sum(counted, Counts()) if counted else None

    @property
    def decode_s(self) -> np.ndarray:
        """Seconds of each turn's decode, [turns]."""
        return np.array([sum(turn.token_s) for turn in self.turns])

    @property
    def first_token_s(self) -> np.ndarray:
        """Seconds to the first token of each turn, [turns]."""
        return np.array([turn.first_token_s for turn in self.turns])

    @property
    def decode_tokens_per_s(self) -> np.ndarray:
        """[turns]."""
        return self.tokens / len(self.turns) / self.decode_s

    @property
    def prefill_tokens_per_s(self) -> np.ndarray:
        """[turns]."""
        return self.prompt_tokens / self.first_token_s

    def figures(self) -> dict[str, Any]:
        """Names and units of a record's; shares are 0-1, times have their spread over turns."""
        per_turn = self.tokens / len(self.turns)
        cpu_s = np.array([sum(turn.token_cpu_s) for turn in self.turns]) / per_turn
        found = {
            "decode_tokens": self.tokens,
            "decode_tokens_per_s": spread(self.decode_tokens_per_s),
            "prefill_tokens_per_s": spread(self.prefill_tokens_per_s),
            "first_token_s": spread(self.first_token_s),
            "repeat_s": [round(seconds, 6) for seconds in self.decode_s.tolist()],
            "decode_cpu_s_per_token": spread(cpu_s),
            **self.counted_figures(),
            **self.counted_samples(),
        }
        if self.counts is not None:
            found["link_wait_s_per_token"] = self.counts.link_wait_s / self.tokens
        return found

    def counted_samples(self) -> dict[str, list[float]]:
        """Of each turn, what has an interval over prompts; none for a program without counts."""
        of_turns = [(sum(turn.tokens, Counts()), len(turn.tokens)) for turn in self.turns]
        if not all(tokens for _, tokens in of_turns):
            return {}
        names = ("bytes_moved", "bytes_computed", "host_round_trips", "hits", "uses")
        return {
            f"{name}_per_token_R": [getattr(counts, name) / tokens for counts, tokens in of_turns]
            for name in names
        }

    def counted_figures(self) -> dict[str, float | None]:
        """What does not depend on the machine's speed; none for a program without counts."""
        found, tokens = self.counts, self.tokens
        if found is None:
            return {}
        ahead = 1 - found.bytes_dropped / found.bytes_ahead if found.bytes_ahead else None
        return {
            "hit_rate": found.hit_rate,
            "demoted_share": 1 - found.native_uses / found.uses if found.uses else None,
            "demoted_selection_share": found.demoted / found.selections,
            "skipped_share": found.skipped / found.selections,
            "host_round_trips_per_token": found.host_round_trips / tokens,
            "bytes_moved_per_token": found.bytes_moved / tokens,
            "bytes_read_per_token": found.bytes_read / tokens,
            "bytes_computed_per_token": found.bytes_computed / tokens,
            "bytes_ahead_per_token": found.bytes_ahead / tokens,
            "bytes_ahead_used_share": ahead,
        }


def measure(
    backends: Mapping[str, Callable[[np.ndarray, int], Turn]],
    ids_RS: np.ndarray,
    prompt_tokens: int,
) -> dict[str, Measurement]:
    """Decodes every row with every backend, in turns.

    Args:
        backends: by name, what times one row: `functools.partial(timed_turn, program)`, or a child
            process's.
        ids_RS: int32 [repeats + 1, prompt and decoded tokens]; the first row warms up.
        prompt_tokens: of each row, prefilled.

    Raises:
        ValueError: no row to count, or none longer than the prompt.
    """
    if len(ids_RS) < 2 or not 0 < prompt_tokens < ids_RS.shape[1]:
        raise ValueError(
            f"got rows {ids_RS.shape} and a prompt of {prompt_tokens}; want at least 2 "
            "rows, longer than a prompt of at least one token"
        )
    turns: dict[str, list[Turn]] = {name: [] for name in backends}
    for row, ids_S in enumerate(ids_RS):
        for name in list(backends)[:: -1 if row % 2 else 1]:
            turns[name].append(backends[name](ids_S, prompt_tokens))
    return {name: Measurement(prompt_tokens, tuple(found[1:])) for name, found in turns.items()}
