"""ggml's own encoder, for comparison; nothing that we ship is made with it.

Owns the one call into it. Source: `ggml_quantize_chunk` of ggml.h.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np

from pallas_kernels.ggml.library import base_library


@functools.cache
def library() -> ctypes.CDLL:
    """libggml-base.

    Raises:
        NotImplementedError: there is none; says how to get one.
    """
    found = base_library()
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = (
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    )
    found.ggml_quantize_init.argtypes = (ctypes.c_int,)
    return found


def encode(
    weights_NK: np.ndarray, format: str, importance_K: np.ndarray | None = None, threads: int = 1
) -> np.ndarray:
    """What `quantize.encode` returns, by ggml: uint8 [N, row_bytes] of float32 [N, K].

    `importance_K` is a row of llama.cpp's importance matrix. Rows are shared out to `threads`.
    """
    kind = gguf.GGMLQuantizationType[format]
    weights_NK = np.ascontiguousarray(weights_NK, np.float32)
    n, k = weights_NK.shape
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    out_NP = np.empty((n, k // block_len * block_bytes), np.uint8)
    matrix_K = None if importance_K is None else np.ascontiguousarray(importance_K, np.float32)
    matrix = None if matrix_K is None else matrix_K.ctypes.data
    ggml = library()
    ggml.ggml_quantize_init(kind)

    def encode_rows(rows: np.ndarray) -> int:
        first, count = int(rows[0]), len(rows)
        return ggml.ggml_quantize_chunk(
            kind, weights_NK.ctypes.data, out_NP.ctypes.data, first * k, count, k, matrix
        )

    parts = [rows for rows in np.array_split(np.arange(n), threads) if len(rows)]
    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(encode_rows, parts))
    if written != out_NP.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {format}; want {out_NP.nbytes}")
    return out_NP
