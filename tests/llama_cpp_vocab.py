"""llama.cpp's tokenizer of a GGUF file, through the baseline's binding; no tests."""

import ctypes
from pathlib import Path

from hobbit_jax.baselines.llama_cpp_api import Model


class LlamaCppVocab:
    """One file's vocabulary as llama.cpp loads it."""

    def __init__(self, path: Path):
        self._model = Model(path, vocab_only=True)
        self._library, self._vocab = self._model.library, self._model.vocab

    def __enter__(self) -> "LlamaCppVocab":
        return self

    def __exit__(self, *how) -> None:
        self._model.__exit__(*how)

    @property
    def add_bos(self) -> bool:
        return self._library.llama_vocab_get_add_bos(self._vocab)

    @property
    def eog_ids(self) -> tuple[int, ...]:
        count = self._library.llama_vocab_n_tokens(self._vocab)
        return tuple(i for i in range(count) if self._library.llama_vocab_is_eog(self._vocab, i))

    def encode(self, text: str, add_bos: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        found = self._library.llama_tokenize(
            self._vocab, data, len(data), room, len(room), add_bos, parse_special
        )
        assert found >= 0
        return list(room[:found])
