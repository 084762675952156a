"""llama.cpp's logits of a GGUF file, through ctypes on the wheel `xllamacpp`; no tests.

Run as a program of its own, MODEL IDS.npy STEP OUT.npy: its ggml and ours do not share a process.
"""

import ctypes
import importlib.util
import os
import struct
import sys
from pathlib import Path

import numpy as np


class _Parameters(ctypes.Structure):  # larger than either structure: only ever passed whole
    _fields_ = [("raw", ctypes.c_uint8 * 512)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


# Of llama_context_params, build 11549: offset, struct code, the default found there, our value.
_N_CTX, _N_BATCH, _N_UBATCH = (0, "I", 512), (4, "I", 2048), (8, "I", 512)
_FLASH_ATTENTION, _TYPE_K, _TYPE_V = (52, "i", -1), (104, "i", 1), (108, "i", 1)
_POINTER = ctypes.c_void_p
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    lib = ctypes.CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so"))
    for name, result, arguments in (
        ("llama_model_default_params", _Parameters, []),
        ("llama_context_default_params", _Parameters, []),
        ("llama_model_load_from_file", _POINTER, [ctypes.c_char_p, _Parameters]),
        ("llama_init_from_model", _POINTER, [_POINTER, _Parameters]),
        ("llama_model_get_vocab", _POINTER, [_POINTER]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [_POINTER]),
        ("llama_batch_init", _Batch, [ctypes.c_int32] * 3),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", ctypes.c_int32, [_POINTER, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [_POINTER, ctypes.c_int32]),
        ("llama_free", None, [_POINTER]),
        ("llama_model_free", None, [_POINTER]),
        ("llama_log_set", None, [_LOG, _POINTER]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def logits(path: Path, ids_T: np.ndarray, step: int) -> np.ndarray:
    """float32 [T, V] of one sequence, `step` tokens a call, keys and values in float32."""
    lib, silent = _library(), _LOG(lambda level, text, _: None)
    lib.llama_log_set(silent, None)
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    room = -(-len(ids_T) // 64) * 64
    parameters = lib.llama_context_default_params()
    for (offset, code, default), value in (
        *((place, room) for place in (_N_CTX, _N_BATCH, _N_UBATCH)),
        *((place, 0) for place in (_FLASH_ATTENTION, _TYPE_K, _TYPE_V)),
    ):
        # Another release may lay the structure out differently.
        assert struct.unpack_from(code, parameters.raw, offset)[0] == default
        struct.pack_into(code, parameters.raw, offset, value)
    context = lib.llama_init_from_model(model, parameters)
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch, rows = lib.llama_batch_init(room, 0, 1), []
    for start in range(0, len(ids_T), step):
        part = ids_T[start : start + step].tolist()
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert lib.llama_decode(context, batch) == 0
        for i in range(len(part)):
            row = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (n_vocab,))
            rows.append(row.copy())
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return np.stack(rows)


if __name__ == "__main__":
    model_path, ids_path, tokens, out_path = sys.argv[1:]
    np.save(out_path, logits(Path(model_path), np.load(ids_path), int(tokens)))
