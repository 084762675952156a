"""K-quant blocks, for an encoder: which weights they can take, and their bytes from their fields.

Shape letters: N rows, K columns; inside, G blocks, W weights of a block, P bytes.
"""

import jax
import numpy as np

from hobbit_jax.quantize.scale_search import BLOCK_LEN, Scales
from pallas_kernels.formats import FORMATS, KQuant, get_format

# What the most generous block, Q6_K, can say at all: d · scale · q.
_LARGEST_WEIGHT = 65504.0 * 128 * 32
# An importance below this fraction of its block's largest counts as this fraction: every
# least-squares system stays solvable and no choice that matters changes.
_IMPORTANCE_FLOOR = 2.0**-20


def k_quant(format: str) -> KQuant:
    """The numbers of a K-quant; refuses another format with NotImplementedError."""
    quants = {name: f.encoder for name, f in FORMATS.items() if f.encoder is not None}
    if format not in quants:
        raise NotImplementedError(
            f"no Hessian-based encoder for {format!r}; the formats with one are "
            f"{', '.join(quants)}; --method ggml encodes into every type"
        )
    return quants[format]


def check_weights(weights_NK: np.ndarray) -> None:
    """Refuses weights that no K-quant takes, before their squares overflow float32 in a search.

    Raises:
        ValueError: wrong rank, dtype or K; NaN or infinite weights, or such as are too large.
    """
    if weights_NK.ndim != 2:
        raise ValueError(f"wanted weights of rank 2 [N, K], got shape {weights_NK.shape}")
    if weights_NK.dtype != np.float32:
        raise ValueError(f"wanted float32 weights, got {weights_NK.dtype}")
    k = weights_NK.shape[1]
    if k == 0 or k % BLOCK_LEN:
        raise ValueError(f"wanted K a positive multiple of {BLOCK_LEN}, got K={k}")
    fits_NK = np.abs(weights_NK) <= _LARGEST_WEIGHT  # nor is a NaN
    if not fits_NK.all():
        check_finite(weights_NK)
        _check_no_overflow(fits_NK)


def check_finite(weights_NK: np.ndarray) -> None:
    """Refuses NaN and infinity."""
    finite_NK = np.isfinite(weights_NK)
    if not finite_NK.all():
        row, column = np.argwhere(~finite_NK)[0]
        raise ValueError(f"wanted finite weights, got {weights_NK[row, column]} in row {row}")


def _check_no_overflow(fits_NK: np.ndarray) -> None:
    if not fits_NK.all():
        row = np.argwhere(~fits_NK)[0, 0]
        raise ValueError(f"wanted float16 fields within 65504, got an overflow in row {row}")


def block_importance_GW(importance_K: np.ndarray) -> np.ndarray:
    """Importance as float32 [K / 256, 256] with largest value 1 in each block."""
    importance_GW = importance_K.reshape(-1, BLOCK_LEN)
    largest_G1 = importance_GW.max(1, keepdims=True)
    uniform_G1 = largest_G1 == 0
    importance_GW = np.where(uniform_G1, 1.0, importance_GW) / np.where(uniform_G1, 1.0, largest_G1)
    return np.maximum(importance_GW, _IMPORTANCE_FLOOR).astype(np.float32)


def pack(q_GW: jax.Array, scales: Scales, format: str) -> np.ndarray:
    """Blocks uint8 [G, P] of a K-quant's quants, uint8 [G, 256] counted from 0, and its scales.

    Raises:
        ValueError: a float16 field has overflowed.
    """
    quant = k_quant(format)
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
    _check_no_overflow(np.isfinite(np.stack(floats, axis=1)))
    blocks_GP = get_format(format).pack(integers, floats)
    # A block of zero steps decodes to zeros whatever else it says; like ggml, say nothing.
    blocks_GP[~used_GJ.any(axis=1)] = 0
    return blocks_GP
