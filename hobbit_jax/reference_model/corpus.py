"""The reference model's text: Python's own standard library and our miniature tasks.

Owns which text is trained on, which is held out, and the tokenizer made from the former. The
library's sources are on every machine that can run this project; a file is held out by a hash of
its module path, so it is the same file under every Python version. Generated tasks are split by
their own content (`hobbit_jax/synthetic_tasks`).
"""

import functools
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hobbit_jax.model_file.pre_tokenizers import QWEN2
from hobbit_jax.synthetic_tasks.documents import TaskMix, task_documents

END_OF_TEXT = "<|endoftext|>"
BATCH, CONTEXT, SEED = 16, 512, 0  # rows of a training batch, and tokens of a row
_WIDTH = CONTEXT + 1
_HELD_OUT_ONE_IN = 20
_EXCLUDED_DIRECTORIES = frozenset({"site-packages", "test", "tests", "idlelib", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """One standard-library module: its path below the library root, and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training, by a hash of its name."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0


def standard_library() -> list[SourceFile]:
    """Every module of the running interpreter's library, sorted by name, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED_DIRECTORIES.isdisjoint(relative.parts):
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


def _pack(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One uint16 stream: every document preceded by END_OF_TEXT."""
    boundary = tokenizer.get_vocab()[END_OF_TEXT]
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        stream += [boundary, *encoding.ids]
    return np.asarray(stream, np.uint16)


def held_out_windows(tokenizer: Tokenizer, files: list[SourceFile], count: int) -> np.ndarray:
    """int32 [count, CONTEXT + 1], spread evenly over the held-out sources."""
    stream = _pack(tokenizer, [file.text for file in files if file.held_out])
    available = len(stream) // _WIDTH
    windows = stream[: available * _WIDTH].reshape(available, _WIDTH)
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

    def __init__(self, tokenizer: Tokenizer, files: list[SourceFile], phases: tuple[Phase, ...]):
        self.tokenizer, self.phases = tokenizer, phases
        self.source_stream = _pack(tokenizer, [f.text for f in files if not f.held_out])
        self._task_block = functools.lru_cache(1)(self._make_task_block)

    def __call__(self, step: int) -> np.ndarray:
        """Token ids int32 [BATCH, CONTEXT + 1] of this step."""
        first_row = 0
        for index, phase in enumerate(self.phases):
            source_rows = BATCH - phase.task_rows
            if step < phase.steps:
                sources = self._source_windows(first_row + step * source_rows, source_rows)
                block, position = divmod(step, self.STEPS_PER_BLOCK)
                tasks = self._task_block(index, block)[position * phase.task_rows :]
                return np.concatenate([sources, tasks[: phase.task_rows]]).astype(np.int32)
            step -= phase.steps
            first_row += phase.steps * source_rows
        raise ValueError(f"the phases end {step + 1} steps before this one")

    def _source_windows(self, first: int, count: int) -> np.ndarray:
        per_epoch = len(self.source_stream) // _WIDTH - 1
        rows = []
        for index in range(first, first + count):
            epoch, position = divmod(index, per_epoch)
            rng = np.random.default_rng([SEED, epoch])
            offset = int(rng.integers(_WIDTH))
            start = offset + int(rng.permutation(per_epoch)[position]) * _WIDTH
            rows.append(self.source_stream[start : start + _WIDTH])
        return np.stack(rows)

    def _make_task_block(self, phase_index: int, block: int) -> np.ndarray:
        """The task rows of all steps of one block."""
        phase = self.phases[phase_index]
        rows = self.STEPS_PER_BLOCK * phase.task_rows
        stream, part = np.zeros(0, np.uint16), 0
        while len(stream) < rows * _WIDTH:
            seed = ((SEED * 64 + phase_index) * 1_000_003 + block) * 64 + part + 1
            documents = task_documents(seed, 4000, phase.mix)
            order = np.random.default_rng([seed, part]).permutation(len(documents))
            packed = _pack(self.tokenizer, [documents[i] for i in order])
            stream, part = np.concatenate([stream, packed]), part + 1
        return stream[: rows * _WIDTH].reshape(rows, _WIDTH)
