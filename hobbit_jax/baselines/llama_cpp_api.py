"""llama.cpp's C API in the wheel `xllamacpp`, through ctypes, so that nobody needs a compiler.

Owns the functions, the structures of the one build whose layout they have, and the loading of a
model file. The wheel has a ggml of its own, which shares no process with our backend `ggml`.

Source: llama.h at the commit of the wheel (`xllamacpp/_version.py` names it).
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any, Self

# Releases move the fields of the parameter structures; pyproject.toml has the same number.
VERSION = "2026.10.11549"
_ERROR_LEVEL = 4  # of ggml_log_level
_EXPERT_PATTERN = r"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps"


_POINTER, _TEXT, _INT, _BOOL = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool
_IDS, _LOGITS = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """Of a structure, from types and the names that follow one another with each."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class _Override(ctypes.Structure):  # llama_model_tensor_buft_override
    _fields_ = _fields((_TEXT, "pattern"), (_POINTER, "buffer_type"))


class _ModelParameters(ctypes.Structure):  # llama_model_params
    _fields_ = _fields(
        (_POINTER, "devices tensor_buft_overrides"),
        (_INT, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        (_POINTER, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        (_BOOL, "vocab_only check_tensors use_extra_bufts"),
        (_BOOL * 5, "further_flags"),
    )


class _ContextParameters(ctypes.Structure):  # llama_context_params
    _fields_ = _fields(
        (ctypes.c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq"),
        (ctypes.c_uint32, "n_outputs_max n_outputs_max_per_seq"),
        (_INT, "n_threads n_threads_batch ctx_type rope_scaling_type pooling_type attention_type"),
        (_INT, "flash_attn_type"),
        (ctypes.c_float * 6, "rope_and_yarn"),
        (ctypes.c_uint32, "yarn_orig_ctx"),
        (ctypes.c_float, "defrag_thold"),
        (_POINTER, "cb_eval cb_eval_user_data"),
        (_INT, "type_k type_v"),
        # More than there is: the structure is only ever passed whole.
        (ctypes.c_uint64 * 16, "rest"),
    )


class _Batch(ctypes.Structure):  # llama_batch
    _fields_ = _fields(
        (_INT, "n_tokens"),
        (_IDS, "token"),
        (ctypes.POINTER(ctypes.c_float), "embd"),
        (_IDS, "pos n_seq_id"),
        (ctypes.POINTER(_IDS), "seq_id"),
        (ctypes.POINTER(ctypes.c_int8), "logits"),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, _TEXT, _POINTER)
# Name → result and arguments.
_FUNCTIONS = {
    "ggml_backend_cpu_buffer_type": (_POINTER, []),
    "ggml_version": (_TEXT, []),
    "llama_backend_init": (None, []),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_context_default_params": (_ContextParameters, []),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits": (_LOGITS, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, _ContextParameters]),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_memory_clear": (None, [_POINTER, _BOOL]),
    "llama_model_default_params": (_ModelParameters, []),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_load_from_file": (_POINTER, [_TEXT, _ModelParameters]),
    "llama_n_threads": (_INT, [_POINTER]),
    "llama_print_system_info": (_TEXT, []),
    "llama_supports_gpu_offload": (_BOOL, []),
    "llama_tokenize": (_INT, [_POINTER, _TEXT, _INT, _IDS, _INT, _BOOL, _BOOL]),
    "llama_vocab_get_add_bos": (_BOOL, [_POINTER]),
    "llama_vocab_is_eog": (_BOOL, [_POINTER, _INT]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
}


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library with its functions declared, in the names and types of llama.h.

    Raises:
        NotImplementedError: the wheel is not installed, or is another build than `VERSION`.
    """
    spec = importlib.util.find_spec("xllamacpp")
    how = "pip install -c constraints.txt -e '.[llama-cpp]'"
    if spec is None or spec.origin is None:
        raise NotImplementedError(f"llama.cpp needs the package xllamacpp {VERSION}: {how}")
    # A build for a GPU has a suffix after a plus sign, and the same layout.
    found = importlib.metadata.version("xllamacpp")
    if found.partition("+")[0] != VERSION:
        raise NotImplementedError(
            f"llama.cpp's structures are known for xllamacpp {VERSION}, installed is {found}: {how}"
        )
    library = ctypes.CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so"))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


class Model:
    """A model file as llama.cpp loads it; a context manager that frees it.

    `pointer` is the llama_model, and `log` what llama.cpp logged while it loaded the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_only: bool = False,
        cpu_layers: int = 0,
        repack: bool = True,
    ):
        """Loads the vocabulary alone, or all; the experts of the first `cpu_layers` on the CPU.

        With `repack`, llama.cpp's default, weights that a CPU computes are copied in an order that
        suits it, a second time in memory; without, as under `--no-repack`, the file's map is used.

        Raises:
            NotImplementedError: see `load_library`.
            ValueError: llama.cpp cannot load the file; says what it logged.
        """
        self.library = library = load_library()
        logged: list[tuple[int, str]] = []
        log = _LOG(lambda level, text, _: logged.append((level, text.decode(errors="replace"))))
        parameters = library.llama_model_default_params()
        parameters.vocab_only, parameters.use_extra_bufts = vocab_only, repack
        if cpu_layers:  # `llm_add_n_cpu_ffn_overrides` in llama.cpp's common.h
            cpu = library.ggml_backend_cpu_buffer_type()
            patterns = [_EXPERT_PATTERN.format(layer=n).encode() for n in range(cpu_layers)]
            entries = [*(_Override(pattern, cpu) for pattern in patterns), _Override(None, None)]
            self._overrides = (_Override * len(entries))(*entries)  # llama.cpp keeps the pointer
            parameters.tensor_buft_overrides = ctypes.addressof(self._overrides)
        library.llama_log_set(log, None)
        self.pointer = library.llama_model_load_from_file(os.fsencode(path), parameters)
        library.llama_log_set(_LOG(), None)  # from here on to standard error, as by default
        self.log = "".join(text for _, text in logged)
        if not self.pointer:
            errors = "; ".join(text.strip() for level, text in logged if level == _ERROR_LEVEL)
            raise ValueError(f"llama.cpp does not load {path}: {errors}")
        self.vocab = library.llama_model_get_vocab(self.pointer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.llama_model_free(self.pointer)
