"""The reference model's text: Python's own standard library and our miniature tasks.

Owns which text is trained on, which is held out, and the tokenizer made from the former. The
library's sources are on every machine that can run this project; a file is held out by a hash of
its module path, so it is the same file under every Python version. Generated tasks are split by
their own content (`hobbit_jax/synthetic_tasks`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hobbit_jax.model_file.pre_tokenizers import QWEN2
from hobbit_jax.synthetic_tasks.documents import TaskMix, task_documents

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 20
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "test", "tests", "idlelib", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """One standard-library module: its path below the library root, and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training, by a hash of its name."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def standard_library() -> list[SourceFile]:
    """Every module of the running interpreter's library, sorted by name, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRECTORIES.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            files.append(SourceFile(relative.as_posix(), text))
    return [file for file in files if file.text.strip()]


def train_tokenizer(files: list[SourceFile], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over training files and a sample of tasks; `END_OF_TEXT` is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Digits stand alone, which lets a small model do arithmetic.
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [file.text for file in files if not file.held_out]
    tokenizer.train_from_iterator(texts + task_documents(0, 20_000), trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One uint16 stream: every document preceded by END_OF_TEXT."""
    boundary = tokenizer.get_vocab()[END_OF_TEXT]
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        stream.append(boundary)
        stream.extend(encoding.ids)
    return np.asarray(stream, np.uint16)


def held_out_windows(
    tokenizer: Tokenizer, files: list[SourceFile], context: int, count: int
) -> np.ndarray:
    """int32 [count, context + 1], spread evenly over the held-out sources."""
    stream = pack(tokenizer, [file.text for file in files if file.held_out])
    available = len(stream) // (context + 1)
    windows = stream[: available * (context + 1)].reshape(available, context + 1)
    return windows[:: max(1, available // count)][:count].astype(np.int32)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: how long, how much of each batch is tasks, how fast it learns."""

    steps: int
    task_rows: int  # of the batch's rows; the others are sources
    mix: TaskMix
    learning_rate: float  # peak, as a factor of the optimiser's


class Batches:
    """Training batches as a pure function of the step, so that a resumed run sees the same data.

    Sources are cut into windows at a fresh offset each epoch and shuffled;
    tasks are generated anew for every block of STEPS_PER_BLOCK steps.
    """

    STEPS_PER_BLOCK = 64

    def __init__(
        self,
        tokenizer: Tokenizer,
        files: list[SourceFile],
        phases: tuple[Phase, ...],
        *,
        batch: int,
        context: int,
        seed: int,
    ):
        self.tokenizer, self.phases = tokenizer, phases
        self.batch, self.context, self.seed = batch, context, seed
        self.source_stream = pack(tokenizer, [f.text for f in files if not f.held_out])
        self._task_block: tuple[tuple[int, int], np.ndarray] | None = None

    def __call__(self, step: int) -> np.ndarray:
        """Token ids int32 [batch, context + 1] of this step."""
        first_row = 0
        for index, phase in enumerate(self.phases):
            source_rows = self.batch - phase.task_rows
            if step < phase.steps:
                sources = self._source_windows(first_row + step * source_rows, source_rows)
                rows = np.concatenate([sources, self._task_windows(index, step)])
                return rows.astype(np.int32)
            step -= phase.steps
            first_row += phase.steps * source_rows
        raise ValueError(f"the phases end {step + 1} steps before this one")

    def _source_windows(self, first: int, count: int) -> np.ndarray:
        per_epoch = len(self.source_stream) // (self.context + 1) - 1
        rows = []
        for index in range(first, first + count):
            epoch, position = divmod(index, per_epoch)
            rng = np.random.default_rng([self.seed, epoch])
            offset = int(rng.integers(self.context + 1))
            start = offset + int(rng.permutation(per_epoch)[position]) * (self.context + 1)
            rows.append(self.source_stream[start : start + self.context + 1])
        return np.stack(rows)

    def _task_windows(self, phase_index: int, step: int) -> np.ndarray:
        phase = self.phases[phase_index]
        block, position = divmod(step, self.STEPS_PER_BLOCK)
        if self._task_block is None or self._task_block[0] != (phase_index, block):
            rows_needed = self.STEPS_PER_BLOCK * phase.task_rows
            stream, part = np.zeros(0, np.uint16), 0
            while len(stream) < rows_needed * (self.context + 1):
                seed = ((self.seed * 64 + phase_index) * 1_000_003 + block) * 64 + part + 1
                documents = task_documents(seed, 4000, phase.mix)
                order = np.random.default_rng([seed, part]).permutation(len(documents))
                packed = pack(self.tokenizer, [documents[i] for i in order])
                stream, part = np.concatenate([stream, packed]), part + 1
            used = stream[: rows_needed * (self.context + 1)]
            windows = used.reshape(rows_needed, self.context + 1)
            self._task_block = ((phase_index, block), windows)
        start = position * phase.task_rows
        return self._task_block[1][start : start + phase.task_rows]
