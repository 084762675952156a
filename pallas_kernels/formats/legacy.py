"""Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: 32 weights under one f16 scale `d` (and one f16 offset `m`).

Source: `block_q8_0` and its kin in ggml-common.h.
Exact: d has 11 significant bits and a quant at most 7 (-128 is a power of two), so d*q fits the
24 of a float32; adding m then rounds once, with or without a fused multiply-add.

Planes: `d`, `m` f16; `quants` int8 (Q8_0) or two weights a byte, weight i low and i+16 high;
`high_bits` the fifth bit of weight i at bit i of a little-endian 32-bit word.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import (
    D,
    Format,
    Plane,
    Planes,
    bit_fields,
    byte_plane,
    shifted_bits,
)
from pallas_kernels.formats.packing import (
    MatrixTile,
    Packing,
    Supers,
    bits_of,
    nibble_codes,
    no_scales,
    quants_of,
    supers,
)


def _nibbles(blocks: Planes) -> jax.Array:
    """uint8 [..., R, G, 32] in 0..15."""
    found = bit_fields(blocks["quants"], 4)
    return found.reshape(*found.shape[:-2], 32)


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


# How kernels read them.


def _q8_0_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    return quants_of(tile, 2, part)


def _five_bit_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    """Bit i of a block's `high_bits` completes weight i; word u holds weights 4u to 4u + 3."""
    word_U = jnp.arange(4, dtype=jnp.uint32)[None, None, :]
    four = (tile.at("high_bits", tile.group_J) >> (16 * field + 4 * word_U)) & 15
    spread = four * 0x00204081  # bit k to bit 0 of byte k
    return nibble_codes(tile, field, part) | bits_of(spread, 0, 1, to=4)


def _d_and_m(tile: MatrixTile) -> Supers:
    d, m = supers(1, "d", "m")(tile)
    assert m is not None
    return d, -m


def _packing(codes, read=_d_and_m, zero: int = 0) -> Packing:
    return Packing(2, 16, 1, codes, read, no_scales, zero=zero)


_M = Plane("m", np.dtype(np.float16), 1)
_HIGH, _QUANTS, _INT8 = byte_plane("high_bits", 4), byte_plane("quants", 16), np.dtype(np.int8)
_D = supers(1, "d")

FORMATS = (
    Format(
        "Q8_0", 8, 32, (D, Plane("quants", _INT8, 32)), _unpack_q8_0,
        packing=Packing(1, 32, 2, _q8_0_codes, _D, no_scales, signed=True),
    ),
    Format(
        "Q4_0", 2, 32, (D, _QUANTS), _unpack_q4_0,
        packing=_packing(nibble_codes, _D, zero=8),
    ),
    Format("Q4_1", 3, 32, (D, _M, _QUANTS), _unpack_q4_1, packing=_packing(nibble_codes)),
    Format(
        "Q5_0", 6, 32, (D, _HIGH, _QUANTS), _unpack_q5_0,
        packing=_packing(_five_bit_codes, _D, zero=16),
    ),
    Format("Q5_1", 7, 32, (D, _M, _HIGH, _QUANTS), _unpack_q5_1, packing=_packing(_five_bit_codes)),
)  # fmt: skip
