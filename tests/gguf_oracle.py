"""Weights of raw blocks by others' decoders: gguf-py's, and ggml's for types that it lacks."""

import ctypes

import gguf
import numpy as np

from pallas_kernels.ggml.library import type_functions

_ONLY_GGML = {"Q1_0", "Q2_0"}  # gguf-py 0.19 has no decoder


def dequantize(raw: np.ndarray, name: str) -> np.ndarray:
    """Raw blocks uint8 [..., row bytes] to float32 [..., weights].

    MXFP4's two largest exponents overflow to infinity, there as here.
    """
    if name not in _ONLY_GGML:
        with np.errstate(over="ignore"):
            return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    functions = type_functions(name, "ggml_f32")
    raw = np.ascontiguousarray(raw)
    count = raw.shape[-1] // functions.block_bytes * functions.block_weights
    weights = np.empty((*raw.shape[:-1], count), np.float32)
    to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    to_float(functions.to_float)(raw.ctypes.data, weights.ctypes.data, weights.size)
    return weights
