"""Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: 32 weights under one f16 scale `d` (and one f16 offset `m`).

Called through `pallas_kernels.formats`. Source: `block_q8_0` and its kin in ggml-common.h.
Exact: d has 11 significant bits and a quant at most 7 (-128 is a power of two), so d*q fits the
24 of a float32; adding m then rounds once, with or without a fused multiply-add.

Planes: `d`, `m` f16; `quants` int8 (Q8_0) or two weights a byte, weight i low and i+16 high;
`high_bits` the fifth bit of weight i at bit i of a little-endian 32-bit word.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import Format, Plane, Planes, bit_fields, shifted_bits

_U8 = jnp.dtype(jnp.uint8)
_F16 = jnp.dtype(jnp.float16)


def _nibbles(blocks: Planes) -> jax.Array:
    """uint8 [..., R, G, 32] in 0..15."""
    nibbles = bit_fields(blocks["quants"], 4)
    return nibbles.reshape(*nibbles.shape[:-2], 32)


def _five_bits(blocks: Planes) -> jax.Array:
    """uint8 [..., R, G, 32] in 0..31."""
    high = shifted_bits(blocks["high_bits"][..., None], np.arange(8), 1)
    return _nibbles(blocks) | (high.reshape(*high.shape[:-2], 32) << 4)


def _signed(quants_RGI: jax.Array, offset: int) -> jax.Array:
    return (quants_RGI.astype(jnp.int8) - offset).astype(jnp.float32)


def _unpack_q8_0(blocks: Planes) -> jax.Array:
    return blocks["quants"].astype(jnp.float32) * blocks["d"].astype(jnp.float32)


def _unpack_q4_0(blocks: Planes) -> jax.Array:
    return blocks["d"].astype(jnp.float32) * _signed(_nibbles(blocks), 8)


def _unpack_q5_0(blocks: Planes) -> jax.Array:
    return blocks["d"].astype(jnp.float32) * _signed(_five_bits(blocks), 16)


def _unpack_q4_1(blocks: Planes) -> jax.Array:
    scaled_RGI = blocks["d"].astype(jnp.float32) * _nibbles(blocks).astype(jnp.float32)
    return scaled_RGI + blocks["m"].astype(jnp.float32)


def _unpack_q5_1(blocks: Planes) -> jax.Array:
    scaled_RGI = blocks["d"].astype(jnp.float32) * _five_bits(blocks).astype(jnp.float32)
    return scaled_RGI + blocks["m"].astype(jnp.float32)


_D = Plane("d", _F16, 1)
_M = Plane("m", _F16, 1)
_HIGH_BITS = Plane("high_bits", _U8, 4)
_NIBBLES = Plane("quants", _U8, 16)

Q8_0 = Format("Q8_0", 32, 34, (_D, Plane("quants", jnp.dtype(jnp.int8), 32)), _unpack_q8_0)
Q4_0 = Format("Q4_0", 32, 18, (_D, _NIBBLES), _unpack_q4_0)
Q4_1 = Format("Q4_1", 32, 20, (_D, _M, _NIBBLES), _unpack_q4_1)
Q5_0 = Format("Q5_0", 32, 22, (_D, _HIGH_BITS, _NIBBLES), _unpack_q5_0)
Q5_1 = Format("Q5_1", 32, 24, (_D, _M, _HIGH_BITS, _NIBBLES), _unpack_q5_1)
