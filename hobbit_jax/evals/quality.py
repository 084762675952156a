"""Quality of a plan on windows of held-out text, beside the native model's cached logits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hobbit_jax.atomic import check_space, new_map, replacing
from hobbit_jax.cache.controller import Observer
from hobbit_jax.evals.logit_comparison import Comparison, compare_logits, summarize
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.tokenizer import Tokenizer

# Logits of a batch of windows; beside them the comparison needs a few times as much.
_LOGIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Windows:
    """Evaluation text."""

    ids_WS: np.ndarray  # token ids, int32 [W, T + 1]
    target_bytes_WT: np.ndarray  # UTF-8 bytes that each target, ids_WS[:, 1:], stands for
    begin_with_bos: bool = False  # whether each window begins with BOS, as texts of this model do

    @property
    def targets(self) -> int:
        """Number of predicted tokens."""
        return self.target_bytes_WT.size

    def first(self, count: int) -> "Windows":
        """The first `count` of them."""
        return Windows(self.ids_WS[:count], self.target_bytes_WT[:count], self.begin_with_bos)


def cut_windows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    count: int,
    context: int,
    seed: int = 0,
    fewer: bool = False,
) -> Windows:
    """`count` windows of `context` + 1 tokens, spread over `texts`, none overlapping.

    Where the file wants texts to begin with BOS each window does (in llama.cpp's perplexity and
    imatrix it overwrites a token; here it stands in front). A BOS that is also the end of text only
    parts documents, and stands where one begins. `fewer` takes as many windows as there are, at
    least one, where `count` are not.

    Raises:
        ValueError: the texts are too short for that many windows.
    """
    bos_id = tokenizer.bos_id if begin_with_bos(tokenizer) else None
    add_bos = None if bos_id is None else False
    encoded = [np.asarray(tokenizer.encode(text, add_bos), np.int32) for text in texts]
    stream = np.concatenate(encoded)
    width = context + (bos_id is None)  # of text
    available = len(stream) // width
    if available < (1 if fewer else count):
        raise ValueError(
            f"the text has {len(stream)} tokens, enough for {available} windows of {context} + 1; "
            f"{count} were asked for; give a longer text or ask for fewer or shorter ones"
        )
    windows_WS = stream[: available * width].reshape(available, width)
    chosen = np.sort(np.random.default_rng(seed).permutation(available)[:count])
    ids_WS = windows_WS[chosen]
    if bos_id is not None:
        ids_WS = np.insert(ids_WS, 0, bos_id, axis=1)
    return Windows(ids_WS, tokenizer.byte_lengths()[ids_WS[:, 1:]], bos_id is not None)


def begin_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether windows of this tokenizer's texts begin with BOS; see `cut_windows`."""
    return tokenizer.add_bos and tokenizer.bos_id != tokenizer.eos_id


def _scored(
    engine: Engine, windows: Windows, description: str
) -> Iterator[tuple[slice, jax.Array]]:
    """Which windows, and their logits [B, T, V]; as many at a time as fit the memory for logits."""
    count, width = windows.ids_WS.shape
    size = max(1, _LOGIT_BYTES // (4 * engine.config.vocab_size * max(1, width - 1)))
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    for part in tqdm(parts, desc=description, leave=False, disable=None):
        yield part, engine.score(windows.ids_WS[part, :-1])


def watch_windows(engine: Engine, windows: Windows, observer: Observer, description: str) -> None:
    """Scores `windows` for what `observer` is told of them; the logits are dropped."""
    with engine.observed_by(observer):
        for _ in _scored(engine, windows, description):
            pass


def write_native_logits(engine: Engine, windows: Windows, path: Path) -> None:
    """Writes native logits, float32 [W, T, V], as a .npy file that can be memory-mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, width = windows.ids_WS.shape
    shape = (count, width - 1, engine.config.vocab_size)
    check_space(path, 4 * math.prod(shape))
    with replacing(path) as partial:
        array_WTV = new_map(partial, np.float32, shape)
        for part, logits_BTV in _scored(engine, windows, "native logits"):
            array_WTV[part] = np.asarray(logits_BTV)
        array_WTV.flush()
        del array_WTV


def evaluate(engine: Engine, windows: Windows, native_WTV: np.ndarray) -> Comparison:
    """Teacher-forced comparison with the native model's logits (nats; perplexity per token)."""
    parts = []
    for part, logits_BTV in _scored(engine, windows, "windows"):
        targets_BT = windows.ids_WS[part, 1:]
        compared = compare_logits(logits_BTV, np.asarray(native_WTV[part]), targets_BT)
        parts.append(jax.device_get(compared))
    return summarize(parts, windows.target_bytes_WT)


def evaluate_decoding(engine: Engine, windows: Windows, native_WTV: np.ndarray) -> Comparison:
    """`evaluate` with every token decoded after the one before, a window at a time.

    For engines whose answers depend on what is resident: this is what a user's reader gets.
    """
    parts = []
    bar = tqdm(windows.ids_WS, desc="decoded windows", leave=False, disable=None)
    for row, ids_S in enumerate(bar):
        engine.start(1, len(ids_S) - 1)
        logits_TV = [engine.decode(np.asarray([token]))[0] for token in ids_S[:-1]]
        native_BTV = np.asarray(native_WTV[row : row + 1])
        compared = compare_logits(jnp.stack(logits_TV)[None], native_BTV, ids_S[None, 1:])
        parts.append(jax.device_get(compared))
    return summarize(parts, windows.target_bytes_WT)
