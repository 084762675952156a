"""llama.cpp's tokenizer of a GGUF file, through the baseline's binding; no tests."""

import ctypes
from pathlib import Path

from hobbit_jax.baselines.llama_cpp_api import Model


class LlamaCppVocab(Model):
    """One file's vocabulary as llama.cpp loads it."""

    def __init__(self, path: Path):
        super().__init__(path, vocab_only=True)

    @property
    def add_bos(self) -> bool:
        return self.library.llama_vocab_get_add_bos(self.vocab)

    @property
    def eog_ids(self) -> tuple[int, ...]:
        count = self.library.llama_vocab_n_tokens(self.vocab)
        return tuple(i for i in range(count) if self.library.llama_vocab_is_eog(self.vocab, i))

    def encode(self, text: str, add_bos: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        found = self.library.llama_tokenize(
            self.vocab, data, len(data), room, len(room), add_bos, parse_special
        )
        assert found >= 0
        return list(room[:found])
