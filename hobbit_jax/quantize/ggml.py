"""ggml's own encoders, of every type that it has, by `ggml_quantize_chunk` (ggml.h)."""

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np

from hobbit_jax.quantize.k_quant_blocks import check_finite
from pallas_kernels.formats import get_format
from pallas_kernels.ggml.library import base_library


@functools.cache
def _library() -> ctypes.CDLL:
    found = base_library()
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, pointer, pointer, count, count, count, pointer
    )  # fmt: skip
    found.ggml_quantize_init.argtypes = (ctypes.c_int,)
    found.ggml_quantize_requires_imatrix.argtypes = (ctypes.c_int,)
    found.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return found


def version() -> str:
    """Of libggml, whose encoders these are; empty where it is not installed."""
    try:
        return metadata.version("libggml-python")
    except metadata.PackageNotFoundError:
        return ""


def check_format(format: str, has_importance: bool) -> int:
    """ggml's number of a format that it can encode so.

    Raises:
        ValueError: ggml demands an importance, and there is none.
        NotImplementedError: no libggml, or a format that we do not know.
    """
    number = get_format(format).number
    if not has_importance and _library().ggml_quantize_requires_imatrix(number):
        raise ValueError(
            f"ggml encodes {format} only under an importance of the columns; give a calibration "
            "with second moments (scripts/calibrate.py)"
        )
    return number


def encode(
    weights_NK: np.ndarray, format: str, importance_K: np.ndarray | None = None
) -> np.ndarray:
    """Blocks of a GGUF type, uint8 [N, row_bytes] of float32 [N, K].

    `importance_K` is a row of llama.cpp's importance matrix, which some types demand and others
    ignore. Rows are shared out to all cores.

    Raises:
        ValueError: weights that are not finite, rows of no whole number of blocks, or no
            importance where ggml demands one.
        NotImplementedError: no libggml, or a format that we do not know.
    """
    kind, layout = check_format(format, importance_K is not None), get_format(format)
    weights_NK = np.ascontiguousarray(weights_NK, np.float32)
    n, k = weights_NK.shape
    check_finite(weights_NK)  # ggml would end the process
    if k % layout.block_weights:  # ggml would end the process
        raise ValueError(
            f"rows of {k} weights are no whole number of {format}'s blocks of "
            f"{layout.block_weights}; fill them up with zeros"
        )
    out_NP = np.empty((n, layout.row_bytes(k)), np.uint8)
    matrix = None
    if importance_K is not None:
        importance_K = np.ascontiguousarray(importance_K, np.float32)
        matrix = importance_K.ctypes.data
    ggml, threads = _library(), os.cpu_count() or 1
    ggml.ggml_quantize_init(kind)

    def encode_rows(rows: np.ndarray) -> int:
        source, out, first = weights_NK.ctypes.data, out_NP.ctypes.data, int(rows[0])
        return ggml.ggml_quantize_chunk(kind, source, out, first * k, len(rows), k, matrix)

    parts = [rows for rows in np.array_split(np.arange(n), threads) if len(rows)]
    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(encode_rows, parts))
    if written != out_NP.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {format}; want {out_NP.nbytes}")
    return out_NP
