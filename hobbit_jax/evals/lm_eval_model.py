"""An engine as lm-eval's language model: likelihoods, rolling likelihoods, generation.

Requests become tokens by lm-eval's own rules; what is too long is cut as in lm-eval's Hugging Face
model, and counted.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from hobbit_jax.evals.responses import Responses
from hobbit_jax.inference.engine import Engine, Prefix
from hobbit_jax.inference.sampling import Sampling
from hobbit_jax.model_file.chat_template import ChatTemplate
from hobbit_jax.model_file.tokenizer import Tokenizer

# Bytes of float32 logits that one call of `Engine.score` may hold; more than one row only below.
_LOGIT_BYTES = 1 << 30
_LEAST_SHARED = 32  # tokens that all prompts begin with, to be run apart
_DEFAULT_NEW_TOKENS = 256  # lm-eval's, for tasks that say nothing
_KNOWN_OPTIONS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}

Pair = tuple[list[int], list[int]]  # context and continuation


@dataclass
class Counts:
    """What happened to requests, summed over a model's life."""

    scored: int = 0
    generated: int = 0
    new_tokens: int = 0
    truncated_contexts: int = 0  # cut from the left to fit the model's context
    shortened_generations: int = 0  # allowed fewer new tokens than the task asked for
    reused: int = 0  # answered by `Responses`


@jax.jit
def _target_scores(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log probability of each target in nats, and whether it is the most probable token."""
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    log_p_BT = chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_p_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT


def _rounded(tokens: int, most: int) -> int:
    """Few lengths, since a program is compiled for each: 64, 128, 256 and multiples of 256."""
    if tokens > 256:
        return min(most, -(-tokens // 256) * 256)
    return min(most, max(64, 1 << (tokens - 1).bit_length()))


class _Continuation:
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


class EngineLM(TemplateLM):
    """`TemplateLM` over an engine and its tokenizer.

    Args:
        engine, tokenizer: of one file; the engine's budget changes no answer.
        responses: finished requests, and where new ones are remembered; sampled ones never are.
        chat: the file's template, for `apply_chat_template`.
        batch_size: sequences at once. Answers differ between batch sizes by rounding only.
        max_length: tokens of context in use; None is all that the model has.
        max_new_tokens: overrides what tasks ask for; None does not.

    Raises:
        ValueError: a `max_length` beyond the model's context, or a file without any token that a
            text could begin with.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        responses: Responses | None = None,
        *,
        chat: ChatTemplate | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
    ):
        super().__init__()
        context = engine.config.context_length
        self.max_length = context if max_length is None else max_length
        if not 2 <= self.max_length <= context:
            raise ValueError(f"max_length is {max_length}; want 2 to the context of {context}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; want 1 or more")
        prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if prefix is None:
            raise ValueError("the file names neither a BOS nor an EOS token to begin a text with")
        self._prefix_id: int = prefix
        self._engine, self._text = engine, tokenizer
        self._responses = responses or Responses(None, {})
        self._chat, self._batch_size, self._max_new_tokens = chat, batch_size, max_new_tokens
        self.counts = Counts()

    @property
    def eot_token_id(self) -> int:
        """The end of text, or what stands in for it."""
        return self._prefix_id if self._text.eos_id is None else self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: BOS, or EOS where there is none."""
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Told apart by prompts, which `Responses` sees whole."""
        return "gguf"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template in use."""
        return self._chat.source if chat_template and self._chat is not None else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation with the file's template.

        Raises:
            ValueError: the model was made without one.
        """
        if self._chat is None:
            raise ValueError("a chat template is asked for, but the model was made without one")
        return self._chat.render(chat_history, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of `string`; BOS in front where the file wants it and the text has none yet."""
        return self._text.encode(string, add_bos=add_special_tokens)

    def _answered(
        self,
        kind: str,
        asked: Sequence[tuple[Any, ...]],
        solve: Callable[[list[int]], Iterator[dict[int, Any]]],
        is_kept: Callable[..., bool] = lambda *_: True,
    ) -> list[Any]:
        """Answers to the requests `asked`; what is not remembered `solve` gives, batch by batch.

        `is_kept` says whether a request's answer may be remembered.
        """
        answers = [self._responses.find(kind, *one) if is_kept(*one) else None for one in asked]
        missing = [index for index, answer in enumerate(answers) if answer is None]
        self.counts.reused += len(asked) - len(missing)
        for batch in solve(missing):
            for index, answer in batch.items():
                answers[index] = answer
                if is_kept(*asked[index]):
                    self._responses.add(answer, kind, *asked[index])
            self._responses.flush()
        return answers

    # Likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log probability (nats) of each continuation, and whether greedy decoding writes it."""

        def solve(missing: list[int]) -> Iterator[dict[int, Any]]:
            order = sorted(missing, key=lambda i: -len(requests[i][1] + requests[i][2]))
            pairs = [(requests[i][1], requests[i][2]) for i in order]
            for start, scores in self._score(pairs, "loglikelihood"):
                yield dict(zip(order[start:], scores, strict=False))

        texts = [request[0] for request in requests]
        return [(p, greedy) for p, greedy in self._answered("loglikelihood", texts, solve)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log probability (nats) of each whole text, conditioned on the prefix token.

        The text itself gets no BOS: it is the prefix, and no token that the model has to guess.
        """
        asked: list[Any] = [request.args for request in requests]

        def solve(missing: list[int]) -> Iterator[dict[int, float]]:
            owned = [(index, pair) for index in missing for pair in self._windows(*asked[index])]
            left = Counter(index for index, _ in owned)
            totals = dict.fromkeys(missing, 0.0)
            yield {index: 0.0 for index in missing if not left[index]}
            for start, scores in self._score([pair for _, pair in owned], "rolling windows"):
                for (index, _), (log_p, _) in zip(owned[start:], scores, strict=False):
                    totals[index] += log_p
                    left[index] -= 1
                yield {i: totals.pop(i) for i in list(totals) if not left[i]}

        return self._answered("loglikelihood_rolling", asked, solve)

    def _windows(self, text: str) -> Iterator[Pair]:
        ids = self.tok_encode(text, add_special_tokens=False)
        ids = ids[1:] if ids[:1] == [self._prefix_id] else ids
        windows = get_rolling_token_windows(ids, self._prefix_id, self.max_length, context_len=1)
        return map(make_disjoint_window, windows)

    def _score(
        self, pairs: Sequence[Pair], what: str
    ) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """Yields, batch by batch, its place and (log probability, greedy) of the pairs in order."""
        with tqdm(total=len(pairs), desc=what, leave=False, disable=None) as bar:
            start = 0
            while start < len(pairs):
                batch = pairs[start : start + self._batch_size]
                longest = min(self.max_length, max(len(c) + len(t) - 1 for c, t in batch))
                row_bytes = 4 * self._engine.config.vocab_size * _rounded(longest, self.max_length)
                batch = batch[: max(1, _LOGIT_BYTES // row_bytes)]
                yield start, self._score_batch(batch)
                self.counts.scored += len(batch)
                bar.update(len(batch))
                start += len(batch)

    def _score_batch(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        rows = []
        for context, continuation in pairs:
            if not 0 < (count := len(continuation)) <= self.max_length:
                raise ValueError(
                    f"a continuation of {count} tokens; want 1 to the context in use, "
                    f"{self.max_length}"
                )
            rows.append((context + continuation)[-(self.max_length + 1) :])
            self.counts.truncated_contexts += len(rows[-1]) < len(context) + count
        width = _rounded(max(map(len, rows)) - 1, self.max_length)
        # Padding stands to the right, where no earlier token sees it.
        ids_BS = np.full((len(rows), width + 1), self._prefix_id, np.int32)
        for index, row in enumerate(rows):
            ids_BS[index, : len(row)] = row
        parts, at = [], 1
        for logits_BTV in self._engine.score_parts(ids_BS[:, :-1]):
            end = at + logits_BTV.shape[1]
            parts.append(jax.device_get(_target_scores(logits_BTV, ids_BS[:, at:end])))
            at = end
        scores = (np.concatenate(of_all, axis=1) for of_all in zip(*parts, strict=True))
        answers = []
        for row, (_, continuation), log_p_T, greedy_T in zip(rows, pairs, *scores, strict=True):
            scored = slice(len(row) - 1 - len(continuation), len(row) - 1)
            log_p = float(log_p_T[scored].sum(dtype=np.float64))
            answers.append((log_p, bool(greedy_T[scored].all())))
        return answers

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to a stop string, an end token or the task's limit.

        Raises:
            NotImplementedError: options of generation other than those listed.
        """
        asked: list[Any] = [request.args for request in requests]

        def solve(missing: list[int]) -> Iterator[dict[int, str]]:
            groups: dict[str, list[int]] = defaultdict(list)
            for index in missing:
                groups[repr(asked[index][1])].append(index)
            with tqdm(total=len(missing), desc="generating", leave=False, disable=None) as bar:
                for group in groups.values():
                    prompts = {index: self.tok_encode(asked[index][0]) for index in group}
                    prefix = self._shared_prefix(list(prompts.values()))
                    group.sort(key=lambda index: -len(prompts[index]))
                    for start in range(0, len(group), self._batch_size):
                        batch = group[start : start + self._batch_size]
                        rows, options = [prompts[index] for index in batch], asked[batch[0]][1]
                        texts = self._generate_batch(rows, options, batch[0], prefix)
                        yield dict(zip(batch, texts, strict=True))
                        bar.update(len(batch))

        return self._answered("generate_until", asked, solve, _is_greedy)

    def _shared_prefix(self, prompts: Sequence[list[int]]) -> Prefix | None:
        """What all prompts begin with, such as examples of a task, run once for all of them.

        None where that is little, where a prompt is too long for the context and will be cut, or
        where what serves a selection depends on what ran before.
        """
        if self._engine.serves_by_residency or max(map(len, prompts)) >= self.max_length:
            return None
        first, last = min(prompts), max(prompts)
        pairs = enumerate(zip(first, last, strict=False))
        same = next((at for at, (a, b) in pairs if a != b), len(first))
        # At least one token of each is left, for its logits.
        same = min(same, min(map(len, prompts)) - 1)
        if len(prompts) == 1 or same < _LEAST_SHARED:
            return None
        return self._engine.read_prefix(first[:same])

    def _generate_batch(
        self, prompts: list[list[int]], options: dict[str, Any], number: int, prefix: Prefix | None
    ) -> list[str]:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, _DEFAULT_NEW_TOKENS))
        unknown = {name for name, value in wanted.items() if value is not None} - _KNOWN_OPTIONS
        if unknown:
            raise NotImplementedError(
                f"generation with {', '.join(sorted(unknown))}; supported are "
                f"{', '.join(sorted(_KNOWN_OPTIONS))}"
            )
        limit = self._allowed_tokens(wanted["max_gen_toks"], len(prompts))
        kept = self.max_length - limit
        self.counts.truncated_contexts += sum(len(prompt) > kept for prompt in prompts)
        rows = [prompt[-kept:] or [self._prefix_id] for prompt in prompts]
        sampling = Sampling(
            temperature=wanted["temperature"] if wanted["do_sample"] else 0.0,
            top_p=wanted.get("top_p") or 1.0,
            seed=number,  # another batch is other requests, or a task's same ones again
        )
        texts = [_Continuation(self._text, [s for s in wanted["until"] if s]) for _ in rows]
        longest = max(map(len, rows))
        # Room in round numbers, so that few programs are compiled; the loop ends at the limit.
        room = _rounded(longest + limit, self._engine.config.context_length) - longest
        ends = {*self._text.eog_ids, *(i for stop in wanted["until"] for i in self._special(stop))}
        begun = prefix if longest == max(map(len, prompts)) else None  # none of them was cut
        greedy, ids = sampling.temperature == 0, sorted(ends)
        steps = self._engine.generate(
            rows, room, sampling, ids, prefix=begun, least_batch=1 if greedy else None
        )
        for step, (ids_B, _) in enumerate(steps):
            for text, token in zip(texts, ids_B.tolist(), strict=True):
                if token < 0:
                    text.ended = True
                elif not text.ended:
                    text.add(token)
                    self.counts.new_tokens += 1
            if step + 1 == limit or all(text.ended for text in texts):
                break
        self.counts.generated += len(rows)
        return [text.finish() for text in texts]

    def _special(self, stop: str) -> list[int]:
        """The token of a stop string that is one, such as `<|im_end|>`: it leaves no text."""
        ids = self._text.encode(stop, add_bos=False)
        return ids if len(ids) == 1 and not self._text.decode(ids, skip_special=True) else []

    def _allowed_tokens(self, asked: int, rows: int) -> int:
        """New tokens per row: as asked, but half of the context where all of it is asked for."""
        asked = asked if self._max_new_tokens is None else self._max_new_tokens
        allowed = min(asked, self.max_length // 2) if asked >= self.max_length else asked
        self.counts.shortened_generations += rows * (allowed < asked)
        return allowed


def _is_greedy(_: str, options: dict[str, Any]) -> bool:
    asked = options.get("do_sample")
    return not (options.get("temperature") if asked is None else asked)
