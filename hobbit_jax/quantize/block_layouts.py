"""Where the fields of a K-quant lie in its block: from quants and scales to ggml's bytes.

Owns the byte layout of Q2_K to Q6_K. Decoding is `pallas_kernels.formats`.

Source: `block_q2_K`, `block_q3_K`, `block_q4_K`, `block_q5_K` and `block_q6_K` of ggml-common.h.

Shape letters: G blocks, W weights of a block, J sub-blocks of a block, P bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from hobbit_jax.quantize.scale_search import Scales


@functools.partial(jax.jit, static_argnames="format")
def pack(q_GW: Array, scales: Scales, format: str) -> Array:
    """Blocks uint8 [G, P] of quants counted from 0, uint8 [G, 256], and their scales."""
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


def _six_bit_fields(scale_GJ: Array, offset_GJ: Array) -> tuple[Array, Array, Array]:
    """Eight scales and eight offsets of 6 bits in 12 bytes, as three [G, 4]."""
    scale_GJ = scale_GJ.astype(jnp.uint8)
    return (
        scale_GJ[:, :4] | scale_GJ[:, 4:] >> 4 << 6,
        offset_GJ[:, :4] | offset_GJ[:, 4:] >> 4 << 6,
        scale_GJ[:, 4:] & 15 | offset_GJ[:, 4:] << 4,
    )


def _pack_q4_k(q_GW: Array, scale_GJ: Array, offset_GJ: Array, d_G2: Array, dmin_G2: Array):
    fields_G4 = _six_bit_fields(scale_GJ, offset_GJ)
    return jnp.concatenate([d_G2, dmin_G2, *fields_G4, _pack_by_128(q_GW, 4)], axis=1)


def _pack_q5_k(q_GW: Array, scale_GJ: Array, offset_GJ: Array, d_G2: Array, dmin_G2: Array):
    fields_G4 = _six_bit_fields(scale_GJ, offset_GJ)
    high_bit_G32 = _or_shifted((q_GW >> 4).reshape(-1, 8, 32), 1)
    low_bits_GP = _pack_by_128(q_GW & 15, 4)
    return jnp.concatenate([d_G2, dmin_G2, *fields_G4, high_bit_G32, low_bits_GP], axis=1)


def _pack_q6_k(q_GW: Array, scale_GJ: Array, offset_GJ: Array, d_G2: Array, dmin_G2: Array):
    # Of each 128 weights, low nibbles 64 apart share a byte, and high bit pairs 32 apart.
    low_GP = _or_shifted((q_GW & 15).reshape(-1, 2, 64), 4).reshape(len(q_GW), -1)
    high_GP = _pack_by_128(q_GW >> 4, 2)
    scale_bytes_GJ = lax.bitcast_convert_type(scale_GJ, jnp.uint8)
    return jnp.concatenate([low_GP, high_GP, scale_bytes_GJ, d_G2], axis=1)


_PACKERS = {
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k,
    "Q6_K": _pack_q6_k,
}
