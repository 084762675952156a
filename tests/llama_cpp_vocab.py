"""llama.cpp's tokenizer of a GGUF file, through ctypes on the wheel `xllamacpp`; no tests."""

import ctypes as C  # noqa: N812
import importlib.util
import os
from pathlib import Path


class _Parameters(C.Structure):  # larger than llama_model_params: only ever passed whole
    _fields_ = [("raw", C.c_uint8 * 512)]


_LOG = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
# Of llama_model_params, build 11549: a flag, and the only one that is set, which tells the place.
_VOCAB_ONLY, _USE_EXTRA_BUFTS = 72, 74


class LlamaCppVocab:
    """One file's vocabulary as llama.cpp loads it, and what it warned of meanwhile."""

    def __init__(self, path: Path):
        spec = importlib.util.find_spec("xllamacpp")
        assert spec is not None and spec.origin is not None
        self._lib = lib = C.CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so"))
        for name, result, arguments in (
            ("llama_model_default_params", _Parameters, []),
            ("llama_model_load_from_file", C.c_void_p, [C.c_char_p, _Parameters]),
            ("llama_model_get_vocab", C.c_void_p, [C.c_void_p]),
            ("llama_model_free", None, [C.c_void_p]),
            ("llama_vocab_n_tokens", C.c_int32, [C.c_void_p]),
            ("llama_vocab_is_eog", C.c_bool, [C.c_void_p, C.c_int32]),
            ("llama_vocab_is_control", C.c_bool, [C.c_void_p, C.c_int32]),
            ("llama_vocab_get_add_bos", C.c_bool, [C.c_void_p]),
            ("llama_tokenize", C.c_int32,
             [C.c_void_p, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool,
              C.c_bool]),
            ("llama_log_set", None, [_LOG, C.c_void_p]),
        ):  # fmt: skip
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        said: list[str] = []
        log = _LOG(lambda level, text, _: said.append(text.decode(errors="replace")))
        lib.llama_log_set(log, None)
        parameters = lib.llama_model_default_params()
        assert list(parameters.raw[_VOCAB_ONLY : _USE_EXTRA_BUFTS + 1]) == [0, 0, 1]
        parameters.raw[_VOCAB_ONLY] = 1
        self._model = lib.llama_model_load_from_file(os.fsencode(path), parameters)
        lib.llama_log_set(_LOG(), None)
        self.log = "".join(said)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}: {self.log[-300:]}")
        self._vocab = lib.llama_model_get_vocab(self._model)

    def __enter__(self) -> "LlamaCppVocab":
        return self

    def __exit__(self, *_) -> None:
        self._lib.llama_model_free(self._model)

    @property
    def add_bos(self) -> bool:
        return self._lib.llama_vocab_get_add_bos(self._vocab)

    @property
    def eog_ids(self) -> tuple[int, ...]:
        count = self._lib.llama_vocab_n_tokens(self._vocab)
        return tuple(i for i in range(count) if self._lib.llama_vocab_is_eog(self._vocab, i))

    @property
    def control_ids(self) -> frozenset[int]:
        count = self._lib.llama_vocab_n_tokens(self._vocab)
        return frozenset(
            i for i in range(count) if self._lib.llama_vocab_is_control(self._vocab, i)
        )

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = True) -> list[int]:
        data = text.encode()
        room = (C.c_int32 * (len(data) + 8))()
        found = self._lib.llama_tokenize(
            self._vocab, data, len(data), room, len(room), add_bos, parse_special
        )
        assert found >= 0
        return list(room[:found])
