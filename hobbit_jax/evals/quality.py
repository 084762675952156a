"""Quality of a plan: likelihood of held-out text, and distance from the native model.

Owns evaluation windows, the cached native logits, and the per-token figures: negative
log-likelihood, KL(native || plan) and top-1 agreement. Figures are per token; intervals are over
windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hobbit_jax.atomic import replacing
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.statistics import Interval, bootstrap

# Logits of a batch of windows; beside them the comparison needs a few times as much.
_LOGIT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Windows:
    """Evaluation text: token ids int32 [W, T + 1], and the UTF-8 bytes each target stands for."""

    ids_WS: np.ndarray
    target_bytes_WT: np.ndarray

    @property
    def targets(self) -> int:
        """Number of predicted tokens."""
        return self.target_bytes_WT.size

    def first(self, count: int) -> Windows:
        """The first `count` of them."""
        return Windows(self.ids_WS[:count], self.target_bytes_WT[:count])


def cut_windows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    count: int,
    context: int,
    seed: int = 0,
    fewer: bool = False,
) -> Windows:
    """`count` windows of `context` + 1 tokens, spread over `texts`, none overlapping.

    `fewer` takes as many as there are, at least one, where `count` are not.

    Raises:
        ValueError: the texts are too short for that many windows.
    """
    stream = np.concatenate([np.asarray(tokenizer.encode(text), np.int32) for text in texts])
    available = len(stream) // (context + 1)
    if available < (1 if fewer else count):
        raise ValueError(
            f"the text has {len(stream)} tokens, enough for {available} windows of {context} + 1; "
            f"{count} were asked for; give a longer text or ask for fewer or shorter ones"
        )
    windows_WS = stream[: available * (context + 1)].reshape(available, context + 1)
    chosen = np.sort(np.random.default_rng(seed).permutation(available)[:count])
    ids_WS = windows_WS[chosen]
    return Windows(ids_WS, tokenizer.byte_lengths()[ids_WS[:, 1:]])


def batches(windows: Windows, vocab_size: int) -> list[slice]:
    """Windows to score at a time, as many as fit the memory for logits; at least one."""
    count, width = windows.ids_WS.shape
    size = max(1, _LOGIT_BYTES // (4 * vocab_size * max(1, width - 1)))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def watch_windows(engine: Engine, windows: Windows, watch: Callable, description: str) -> None:
    """Scores `windows` for what `watch` sees of every layer's routing; the logits are dropped."""
    with engine.watched_by(watch):
        for part in tqdm(batches(windows, engine.config.vocab_size), desc=description, leave=False):
            engine.score(windows.ids_WS[part, :-1])


def write_native_logits(engine: Engine, windows: Windows, path: Path) -> None:
    """Writes native logits, float32 [W, T, V], as a .npy file that can be memory-mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, width = windows.ids_WS.shape
    shape = (count, width - 1, engine.config.vocab_size)
    with replacing(path) as partial:
        array_WTV = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        parts = batches(windows, engine.config.vocab_size)
        for part in tqdm(parts, desc="native logits", leave=False):
            array_WTV[part] = np.asarray(engine.score(windows.ids_WS[part, :-1]))
        array_WTV.flush()
        del array_WTV


@jax.jit
def _compare(logits_BTV: jax.Array, native_BTV: jax.Array, targets_BT: jax.Array):
    log_q_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    log_p_BTV = jax.nn.log_softmax(native_BTV, axis=-1)
    nll_BT = -jnp.take_along_axis(log_q_BTV, targets_BT[..., None], axis=-1)[..., 0]
    kl_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    agree_BT = jnp.argmax(logits_BTV, axis=-1) == jnp.argmax(native_BTV, axis=-1)
    return nll_BT, kl_BT, agree_BT


@dataclass(frozen=True)
class Quality:
    """Figures of one plan on one set of windows; all with 95 % intervals over windows.

    `kl_by_window` has each window's mean, so that two plans can be compared in pairs.
    """

    tokens: int
    bits_per_byte: Interval
    perplexity: Interval
    kl_mean: Interval
    kl_p99: Interval
    top1_agreement: Interval
    kl_by_window: list[float]


def evaluate(engine: Engine, windows: Windows, native_WTV: np.ndarray) -> Quality:
    """Teacher-forced comparison with the native model's logits (nats; perplexity per token)."""
    parts = []
    for part in batches(windows, engine.config.vocab_size):
        ids_BS = windows.ids_WS[part]
        logits_BTV = engine.score(ids_BS[:, :-1])
        native_BTV = np.asarray(native_WTV[part])
        parts.append(jax.device_get(_compare(logits_BTV, native_BTV, ids_BS[:, 1:])))
    return _figures(parts, windows)


def evaluate_decoding(engine: Engine, windows: Windows, native_WTV: np.ndarray) -> Quality:
    """`evaluate` with every token decoded after the one before, a window at a time.

    For engines whose answers depend on what is resident: this is what a user's reader gets.
    """
    parts = []
    for row, ids_S in enumerate(tqdm(windows.ids_WS, desc="decoded windows", leave=False)):
        engine.start(1, len(ids_S) - 1)
        logits_TV = [engine.decode(np.asarray([token]))[0] for token in ids_S[:-1]]
        native_BTV = np.asarray(native_WTV[row : row + 1])
        compared = _compare(jnp.stack(logits_TV)[None], native_BTV, ids_S[None, 1:])
        parts.append(jax.device_get(compared))
    return _figures(parts, windows)


def _figures(parts: Sequence[tuple], windows: Windows) -> Quality:
    """Figures of the compared batches of `windows`, in their order."""
    nll_WT, kl_WT, agree_WT = (np.concatenate(part) for part in zip(*parts, strict=True))
    nll_W = nll_WT.sum(axis=1, dtype=np.float64)
    bytes_W = windows.target_bytes_WT.sum(axis=1, dtype=np.float64)
    count, width = nll_WT.shape

    def interval(statistic) -> Interval:
        return bootstrap(statistic, count)

    return Quality(
        tokens=nll_WT.size,
        bits_per_byte=interval(lambda w: nll_W[w].sum() / np.log(2) / bytes_W[w].sum()),
        perplexity=interval(lambda w: np.exp(nll_W[w].sum() / (width * len(w)))),
        kl_mean=interval(lambda w: kl_WT[w].mean(dtype=np.float64)),
        kl_p99=interval(lambda w: np.quantile(kl_WT[w], 0.99)),
        top1_agreement=interval(lambda w: agree_WT[w].mean(dtype=np.float64)),
        kl_by_window=[float(f"{kl:.5g}") for kl in kl_WT.mean(axis=1, dtype=np.float64)],
    )
