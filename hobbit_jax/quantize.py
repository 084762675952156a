"""Encode float32 weights as GGUF blocks: the lower tiers of an expert, whole exported tensors.

Owns the checks, the chunking, and the byte layout of Q2_K, Q3_K, Q4_K and Q6_K, and the plain
encodings Q8_0, F16 and F32. Called by the host store (lower tiers) and the GGUF exporter. The
scales are chosen in `hobbit_jax.scale_search`; decoding is `pallas_kernels.formats`.

Source: `block_q2_K`, `block_q3_K`, `block_q4_K`, `block_q6_K` and `block_q8_0` of ggml-common.h.

Root-mean-square error on the 262,144 weights of tests/test_quantize.py: ours; ggml's; ggml's with a
constant importance matrix, its better mode on such data. With a real importance the weighted error
is 2 to 12 % below ggml's.

            N(0,1)                  Student-t(3)
    Q2_K    .2588  .2960  .2675     .4930  .5996  .5204
    Q3_K    .1432  .1505  .1442     .3118  .3252  .3158
    Q4_K    .0699  .0713  .0707     .1540  .1577  .1567
    Q6_K    .0166  .0177  .0173     .0414  .0432  .0425

Speed for Q2_K to Q6_K on one AMD EPYC core, in MB of float32 per second: 210, 255, 198, 221 (with
importance 144, 197, 139, 170); ggml at the same time 69, 332, 61, 134 (30, 108, 35, 137).

Shape letters: N rows, K columns; inside, G blocks, W weights of a block, J sub-blocks of a block,
P bytes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hobbit_jax.scale_search import BLOCK_LEN, K_QUANTS, Scales, find_scales

_Q8_0_LEN = 32
_BLOCK_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q6_K": 210, "Q8_0": 34}
# Where the float16 fields of a block start: these overflow if the weights are too large.
_FLOAT16_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,)}
# What the most generous block, Q6_K, can say at all: d · scale · q.
_LARGEST_WEIGHT = 65504.0 * 128 * 32
# Super-blocks per compiled call; the last chunk is padded, so there is one shape per format. At
# 1 MB of weights the largest temporaries, [C, J, G] float32, stay inside the L2 and L3 caches.
_CHUNK_BLOCKS = 1024
# An importance below this fraction of its block's largest counts as this fraction: every
# least-squares system stays solvable and no choice that matters changes.
_IMPORTANCE_FLOOR = 2.0**-20
_FORMATS = (*K_QUANTS, "Q8_0", "F16", "F32")


def encode(
    weights_NK: np.ndarray, format: str, importance_K: np.ndarray | None = None
) -> np.ndarray:
    """Encodes rows of weights into the blocks of a GGUF format.

    Args:
        weights_NK: float32 [N, K], finite, K a positive multiple of the block (256 for K-quants, 32
            for Q8_0). Taken 1 MB at a time: beside input and output it needs some 40 MB, and the
            input once more if that is not contiguous.
        format: "Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "F16" or "F32".
        importance_K: [K], at least 0, the second moment of the activation that meets each column:
            the K-quants minimise Σ importance · (w − ŵ)² instead of Σ (w − ŵ)². Only its ratios
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
    if format not in _FORMATS:
        raise NotImplementedError(
            f"no encoder for {format!r}; the formats with one are {', '.join(_FORMATS)}"
        )
    weights_NK = np.asarray(weights_NK)
    if weights_NK.ndim != 2:
        raise ValueError(f"wanted weights of rank 2 [N, K], got shape {weights_NK.shape}")
    if weights_NK.dtype != np.float32:
        raise ValueError(f"wanted float32 weights, got {weights_NK.dtype}")
    n, k = weights_NK.shape
    block_len = BLOCK_LEN if format in K_QUANTS else _Q8_0_LEN if format == "Q8_0" else 1
    if k == 0 or k % block_len:
        raise ValueError(f"{format}: wanted K a positive multiple of {block_len}, got K={k}")
    importance_K = None if importance_K is None else _checked_importance_K(importance_K, k)

    if format == "F32":
        _check_finite(weights_NK, 0, 1)
        return np.ascontiguousarray(weights_NK).view(np.uint8)
    if format == "F16":
        _check_finite(weights_NK, 0, 1)
        with np.errstate(over="ignore"):  # Reported below, with its row.
            half_NK = weights_NK.astype(np.float16)
        _check_no_overflow(np.all(np.isfinite(half_NK), axis=1), format, 0, 1)
        return half_NK.view(np.uint8)
    if format == "Q8_0":
        blocks_GP = _encode_chunks(weights_NK, format, _Q8_0_LEN, None)
    else:
        importance_GW = None if importance_K is None else _block_importance_GW(importance_K)
        blocks_GP = _encode_chunks(weights_NK, format, BLOCK_LEN, importance_GW)
    return blocks_GP.reshape(n, k // block_len * _BLOCK_BYTES[format])


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


def _block_importance_GW(importance_K: np.ndarray) -> np.ndarray:
    """Importance as float32 [K/256, 256] with largest value 1 in each block."""
    importance_GW = importance_K.reshape(-1, BLOCK_LEN)
    largest_G1 = importance_GW.max(1, keepdims=True)
    uniform_G1 = largest_G1 == 0
    importance_GW = np.where(uniform_G1, 1.0, importance_GW) / np.where(uniform_G1, 1.0, largest_G1)
    return np.maximum(importance_GW, _IMPORTANCE_FLOOR).astype(np.float32)


def _check_finite(values_GW: np.ndarray, first: int, row_len: int) -> None:
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


def _encode_chunks(
    weights_NK: np.ndarray, format: str, block_len: int, importance_GW: np.ndarray | None
) -> np.ndarray:
    """Blocks as uint8 [N · K / block_len, P]."""
    blocks_GW = np.ascontiguousarray(weights_NK).reshape(-1, block_len)
    row_blocks = weights_NK.shape[1] // block_len
    chunk_blocks = _CHUNK_BLOCKS * BLOCK_LEN // block_len
    out_GP = np.empty((len(blocks_GW), _BLOCK_BYTES[format]), np.uint8)
    for first in range(0, len(blocks_GW), chunk_blocks):
        chunk_GW = blocks_GW[first : first + chunk_blocks]
        count = len(chunk_GW)
        _check_finite(chunk_GW, first, row_blocks)
        # Checked before the search, because squares of larger weights could overflow float32.
        fits_G = np.all(np.abs(chunk_GW) <= _LARGEST_WEIGHT, axis=1)
        _check_no_overflow(fits_G, format, first, row_blocks)
        chunk_GW = np.pad(chunk_GW, ((0, chunk_blocks - count), (0, 0)))
        if format == "Q8_0":
            chunk_GP = _encode_q8_0(chunk_GW)
        else:
            weight_GW = None
            if importance_GW is not None:
                weight_GW = importance_GW[(first + np.arange(chunk_blocks)) % row_blocks]
            chunk_GP = _pack(*find_scales(chunk_GW, weight_GW, K_QUANTS[format]), format)
        chunk_GP = np.asarray(chunk_GP)[:count]
        for at in _FLOAT16_AT[format]:
            half_G1 = np.ascontiguousarray(chunk_GP[:, at : at + 2]).view(np.float16)
            _check_no_overflow(np.isfinite(half_G1[:, 0]), format, first, row_blocks)
        out_GP[first : first + count] = chunk_GP
    return out_GP


@functools.partial(jax.jit, static_argnames="format")
def _pack(q_GW: Array, scales: Scales, format: str) -> Array:
    block_GP = _PACKERS[format](
        q_GW,
        scales.scale_1JG[0].T.astype(jnp.int8),
        scales.offset_1JG[0].T.astype(jnp.uint8),
        lax.bitcast_convert_type(scales.d_11G[0, 0], jnp.uint8),
        lax.bitcast_convert_type(scales.dmin_11G[0, 0], jnp.uint8),
    )
    # A block of zero steps decodes to zeros whatever else it says; like ggml, say nothing.
    steps_1JG = scales.d_11G.astype(jnp.float32) * scales.scale_1JG
    lows_1JG = scales.dmin_11G.astype(jnp.float32) * scales.offset_1JG
    used_G = jnp.any((steps_1JG != 0) | (lows_1JG != 0), axis=(0, 1))
    return jnp.where(used_G[:, None], block_GP, jnp.uint8(0))


def _or_shifted(parts: Array, bits: int) -> Array:
    """Packs uint8 [G, parts, n] into [G, n]: part p goes `bits`·p up."""
    shift = jnp.arange(0, bits * parts.shape[1], bits, dtype=jnp.uint8)
    return jnp.bitwise_or.reduce(parts << shift[None, :, None], axis=1)


def _pack_by_128(q_GW: Array, bits: int) -> Array:
    """Packs 256 fields of `bits` bits: of each 128, weights 32 apart share a byte (4 at 2 bits)."""
    per_byte = 8 // bits
    return _or_shifted(q_GW.reshape(-1, per_byte, 32), bits).reshape(len(q_GW), -1)


def _pack_q2_k(q_GW: Array, scale_GJ: Array, offset_GJ: Array, d_G2: Array, dmin_G2: Array):
    scales_GJ = scale_GJ.astype(jnp.uint8) | offset_GJ << 4
    return jnp.concatenate([scales_GJ, _pack_by_128(q_GW, 2), d_G2, dmin_G2], axis=1)


def _pack_q3_k(q_GW: Array, scale_GJ: Array, offset_GJ: Array, d_G2: Array, dmin_G2: Array):
    scale_GJ = (scale_GJ + 32).astype(jnp.uint8)
    low_G8 = _or_shifted((scale_GJ & 15).reshape(-1, 2, 8), 4)
    high_G4 = _or_shifted((scale_GJ >> 4).reshape(-1, 4, 4), 2)
    high_bit_G32 = _or_shifted((q_GW >> 2).reshape(-1, 8, 32), 1)
    low_bits_G64 = _pack_by_128(q_GW & 3, 2)
    return jnp.concatenate([high_bit_G32, low_bits_G64, low_G8, high_G4, d_G2], axis=1)


def _pack_q4_k(q_GW: Array, scale_GJ: Array, offset_GJ: Array, d_G2: Array, dmin_G2: Array):
    scale_GJ = scale_GJ.astype(jnp.uint8)
    fields_G4 = (
        scale_GJ[:, :4] | scale_GJ[:, 4:] >> 4 << 6,
        offset_GJ[:, :4] | offset_GJ[:, 4:] >> 4 << 6,
        scale_GJ[:, 4:] & 15 | offset_GJ[:, 4:] << 4,
    )
    return jnp.concatenate([d_G2, dmin_G2, *fields_G4, _pack_by_128(q_GW, 4)], axis=1)


def _pack_q6_k(q_GW: Array, scale_GJ: Array, offset_GJ: Array, d_G2: Array, dmin_G2: Array):
    # Of each 128 weights, low nibbles 64 apart share a byte, and high bit pairs 32 apart.
    low_GP = _or_shifted((q_GW & 15).reshape(-1, 2, 64), 4).reshape(len(q_GW), -1)
    high_GP = _pack_by_128(q_GW >> 4, 2)
    scale_bytes_GJ = lax.bitcast_convert_type(scale_GJ, jnp.uint8)
    return jnp.concatenate([low_GP, high_GP, scale_bytes_GJ, d_G2], axis=1)


_PACKERS = {"Q2_K": _pack_q2_k, "Q3_K": _pack_q3_k, "Q4_K": _pack_q4_k, "Q6_K": _pack_q6_k}


def _encode_q8_0(values_GW: np.ndarray) -> Array:
    """Blocks of Q8_0, uint8 [G, 34]; as ggml, but rounded against the stored d, not the exact."""
    return _round_q8_0(values_GW, _d_q8_0_G1(values_GW))


@jax.jit
def _d_q8_0_G1(values_GW: Array) -> Array:
    return (jnp.max(jnp.abs(values_GW), axis=1, keepdims=True) / 127).astype(jnp.float16)


@jax.jit
def _round_q8_0(values_GW: Array, d_G1: Array) -> Array:
    # Where d is 0, division by 1 makes quants of 0: such weights are far below 1.
    step_G1 = jnp.where(d_G1 == 0, jnp.float16(1), d_G1).astype(jnp.float32)
    q_GW = jnp.clip(jnp.round(values_GW / step_G1), -127, 127).astype(jnp.int8)
    halves_G2 = lax.bitcast_convert_type(d_G1[:, 0], jnp.uint8)
    return jnp.concatenate([halves_G2, lax.bitcast_convert_type(q_GW, jnp.uint8)], axis=1)
