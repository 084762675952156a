"""Encode float32 weights as GGUF blocks: the lower precisions of an expert, whole exported tensors.

Owns the checks, the chunking over cores, and which search serves which format. Scales are chosen
in `scale_search` and `single_scale`; what a block can say, and where, is `pallas_kernels.formats`.

Errors and speeds beside ggml's own: docs/encoders.md.

Shape letters: N rows, K columns; inside, G blocks, W weights of a block, P bytes.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from hobbit_jax.quantize import single_scale
from hobbit_jax.quantize.scale_search import BLOCK_LEN, Scales, find_scales
from pallas_kernels.formats import FORMATS as ALL_FORMATS
from pallas_kernels.formats import Cast, KQuant, Levels, get_format

# What the most generous block, Q6_K, can say at all: d · scale · q.
_LARGEST_WEIGHT = 65504.0 * 128 * 32
# Super-blocks per compiled call; the last chunk is padded, so there is one shape per format. At
# 1 MB of weights the largest temporaries, [C, J, G] float32, stay inside the L2 and L3 caches.
_CHUNK_BLOCKS = 1024
# An importance below this fraction of its block's largest counts as this fraction: every
# least-squares system stays solvable and no choice that matters changes.
_IMPORTANCE_FLOOR = 2.0**-20
FORMATS = tuple(fmt.name for fmt in ALL_FORMATS.values() if fmt.encoder)


def encode(
    weights_NK: np.ndarray, format: str, importance_K: np.ndarray | None = None
) -> np.ndarray:
    """Encodes rows of weights into the blocks of a GGUF format.

    Args:
        weights_NK: float32 [N, K], finite, K a positive multiple of the block (256 for K-quants, 32
            for the others). Taken 1 MB at a time by each core: beside input and output that needs
            some 40 MB a core, and the input once more if it is not contiguous.
        format: one of `FORMATS`.
        importance_K: [K], at least 0, the second moment of the activation that meets each column:
            the search minimises Σ importance · (w − ŵ)² instead of Σ (w − ŵ)². Only its ratios
            inside a block matter, and a block in which it is all zero counts as uniform. Q8_0, F16
            and F32 leave nothing to weigh: there it is checked and has no effect.

    Returns:
        uint8 [N, row_bytes] in ggml's layout. Float16 fields are rounded to nearest, ties to even;
        quants are the nearest levels under the stored scales. The search runs in float32 and is
        deterministic on one backend. encode(2·w) and encode(w) differ only in the exponents of d
        and dmin while these are normal float16 numbers. A block too small for any float16 scale
        becomes all-zero bytes, as a block of zeros does.

    Raises:
        ValueError: wrong rank, dtype or K; NaN or infinite weights; an importance of wrong shape,
            negative, not finite or all zero; weights so large that a float16 field overflows.
        NotImplementedError: a format without an encoder.
    """
    weights_NK = np.asarray(weights_NK)
    block_len = check_shape(weights_NK, format)
    n, k = weights_NK.shape
    importance_K = None if importance_K is None else _checked_importance_K(importance_K, k)

    if isinstance(get_format(format).encoder, Cast):
        check_finite(weights_NK, 0, 1)
        with np.errstate(over="ignore"):  # Reported below, with its row.
            cast_NK = np.ascontiguousarray(weights_NK, get_format(format).planes[0].dtype)
        _check_no_overflow(np.all(np.isfinite(cast_NK), axis=1), format, 0, 1)
        return cast_NK.view(np.uint8)
    importance_GW = None if importance_K is None else block_importance_GW(importance_K, block_len)
    blocks_GP = _encode_chunks(weights_NK, format, block_len, importance_GW)
    return blocks_GP.reshape(n, get_format(format).row_bytes(k))


def check_format(format: str) -> None:
    """Refuses a format without an encoder of ours with NotImplementedError."""
    if format not in FORMATS:
        raise NotImplementedError(
            f"no encoder for {format!r}; the formats with one are {', '.join(FORMATS)}; --method "
            "ggml encodes into every type"
        )


def check_shape(weights_NK: np.ndarray, format: str) -> int:
    """Refuses what no encoder takes; returns the weights of a block.

    Raises:
        ValueError: wrong rank, dtype or K.
        NotImplementedError: a format without an encoder.
    """
    check_format(format)
    if weights_NK.ndim != 2:
        raise ValueError(f"wanted weights of rank 2 [N, K], got shape {weights_NK.shape}")
    if weights_NK.dtype != np.float32:
        raise ValueError(f"wanted float32 weights, got {weights_NK.dtype}")
    block_len = get_format(format).block_weights
    k = weights_NK.shape[1]
    if k == 0 or k % block_len:
        raise ValueError(f"{format}: wanted K a positive multiple of {block_len}, got K={k}")
    return block_len


def _checked_importance_K(importance_K: np.ndarray, k: int) -> np.ndarray:
    """Importance as float64 [K]."""
    importance_K = np.asarray(importance_K, np.float64)
    if importance_K.shape != (k,):
        raise ValueError(f"wanted importance of shape ({k},), got {importance_K.shape}")
    usable_K = np.isfinite(importance_K) & (importance_K >= 0)
    if not usable_K.all():
        column = int(np.argmin(usable_K))
        raise ValueError(
            f"wanted finite importance of at least 0, got {importance_K[column]} in column {column}"
        )
    if not importance_K.any():
        raise ValueError("wanted importance above 0 in some column, got all zeros")
    return importance_K


def block_importance_GW(importance_K: np.ndarray, block_len: int) -> np.ndarray:
    """Importance as float32 [K / block_len, block_len] with largest value 1 in each block."""
    importance_GW = importance_K.reshape(-1, block_len)
    largest_G1 = importance_GW.max(1, keepdims=True)
    uniform_G1 = largest_G1 == 0
    importance_GW = np.where(uniform_G1, 1.0, importance_GW) / np.where(uniform_G1, 1.0, largest_G1)
    return np.maximum(importance_GW, _IMPORTANCE_FLOOR).astype(np.float32)


def check_finite(values_GW: np.ndarray, first: int, row_len: int) -> None:
    """Refuses NaN and infinity; `values_GW[0]` is piece `first`, with `row_len` pieces to a row."""
    finite_G = np.isfinite(values_GW).all(1)
    if not finite_G.all():
        at = int(np.argmin(finite_G))
        bad = values_GW[at][~np.isfinite(values_GW[at])][0]
        raise ValueError(f"wanted finite weights, got {bad} in row {(first + at) // row_len}")


def _check_no_overflow(fits_G: np.ndarray, format: str, first: int, row_len: int) -> None:
    """Refuses weights of which a block, or a value, does not fit its float16 fields."""
    if not fits_G.all():
        row = (first + int(np.argmin(fits_G))) // row_len
        raise ValueError(
            f"{format}: wanted float16 fields within 65504, got an overflow in row {row}"
        )


def check_values(values_GW: np.ndarray, format: str, first: int, row_len: int) -> None:
    """Refuses weights that are not finite or too large for any block, as `check_finite` counts.

    Before a search, because squares of larger weights could overflow float32.
    """
    fits_GW = np.abs(values_GW) <= _LARGEST_WEIGHT  # nor is a NaN
    if not fits_GW.all():
        check_finite(values_GW, first, row_len)
        _check_no_overflow(np.all(fits_GW, axis=1), format, first, row_len)


def check_blocks(blocks_GP: np.ndarray, format: str, first: int, row_len: int) -> None:
    """Refuses blocks of which a float16 field has overflowed, as `check_finite` counts."""
    for at, *_ in get_format(format).float_fields:  # too large weights overflow them
        half_G1 = np.ascontiguousarray(blocks_GP[:, at : at + 2]).view(np.float16)
        _check_no_overflow(np.isfinite(half_G1[:, 0]), format, first, row_len)


def pack(q_GW: jax.Array, scales: Scales, format: str) -> np.ndarray:
    """Blocks uint8 [G, P] of a K-quant's quants, uint8 [G, 256] counted from 0, and its scales."""
    quant = get_format(format).encoder
    assert isinstance(quant, KQuant)
    d_G, dmin_G = np.asarray(scales.d_11G)[0, 0], np.asarray(scales.dmin_11G)[0, 0]
    scale_GJ, offset_GJ = (np.asarray(s)[0].T for s in (scales.scale_1JG, scales.offset_1JG))
    used_GJ = d_G.astype(np.float32)[:, None] * scale_GJ != 0
    if format == "Q3_K":  # stored from 0, where Q6_K's are int8
        scale_GJ = scale_GJ - quant.scale_range[0]
    integers = [np.asarray(q_GW), scale_GJ.astype(np.int8).view(np.uint8)]
    floats = [d_G]
    if quant.has_offsets:
        used_GJ = used_GJ | (dmin_G.astype(np.float32)[:, None] * offset_GJ != 0)
        integers.append(offset_GJ.astype(np.uint8))
        floats.append(dmin_G)
    blocks_GP = get_format(format).pack(integers, floats)
    # A block of zero steps decodes to zeros whatever else it says; like ggml, say nothing.
    blocks_GP[~used_GJ.any(axis=1)] = 0
    return blocks_GP


def _encode_chunks(
    weights_NK: np.ndarray, format: str, block_len: int, importance_GW: np.ndarray | None
) -> np.ndarray:
    """Blocks as uint8 [N · K / block_len, P]."""
    blocks_GW = np.ascontiguousarray(weights_NK).reshape(-1, block_len)
    row_blocks = weights_NK.shape[1] // block_len
    chunk_blocks = _CHUNK_BLOCKS * BLOCK_LEN // block_len
    out_GP = np.empty((len(blocks_GW), get_format(format).block_bytes), np.uint8)

    def encode_chunk(first: int) -> None:
        chunk_GW = blocks_GW[first : first + chunk_blocks]
        count = len(chunk_GW)
        check_values(chunk_GW, format, first, row_blocks)
        if count < chunk_blocks:
            chunk_GW = np.pad(chunk_GW, ((0, chunk_blocks - count), (0, 0)))
        weight_GW = None
        if importance_GW is not None:
            weight_GW = importance_GW[(first + np.arange(chunk_blocks)) % row_blocks]
        quant = get_format(format).encoder
        if isinstance(quant, KQuant):
            chunk_GP = pack(*find_scales(chunk_GW, weight_GW, quant), format)[:count]
        else:
            assert isinstance(quant, Levels)
            codes_GW, d_G = single_scale.encode_blocks(chunk_GW, weight_GW, quant)
            integers = (np.asarray(codes_GW)[:count],)
            chunk_GP = get_format(format).pack(integers, (np.asarray(d_G)[:count],))
        check_blocks(chunk_GP, format, first, row_blocks)
        out_GP[first : first + count] = chunk_GP

    # A chunk's programs run on the thread that calls them, so cores are used by several callers.
    workers = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        # In order, so that the first bad row is the one reported.
        for _ in pool.map(encode_chunk, range(0, len(blocks_GW), chunk_blocks)):
            pass
    return out_GP
