"""Q2_K to Q6_K: 256 weights in sub-blocks of 16 or 32, whose small scales share an f16 `d`.

Source: `block_q2_K` to `block_q6_K` in ggml-common.h.
Exact: significant bits of d (11), the sub-block scale and the quant add up to at most 23
(Q6_K: 11 + 7 + 5, as -128 and -32 are powers of two), so both products fit a float32's 24;
subtracting dmin*min (11 + 6 bits) rounds once, with or without a fused multiply-add.

Planes: `d`, `dmin` f16; `scales` as ggml packs them (bytes; int8 in Q6_K); `quants` the low 2 or
4 bits of a weight, `high_bits` the rest. Sub-block scales are multiplied out only in float32.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats.base import (
    D,
    Format,
    KQuant,
    Plane,
    Planes,
    bit_fields,
    byte_plane,
    shifted_bits,
)
from pallas_kernels.formats.packing import (
    MatrixTile,
    Packing,
    Scales,
    bits_of,
    low_codes,
    per_group,
    supers,
)

# Quants, then scales and minima of the sub-blocks in order, all as they are stored.
Integers = tuple[jax.Array, ...]


def _axes(values_RGP: jax.Array, *axes: int) -> jax.Array:
    """[..., R, G, P] -> [..., R, G, *axes]."""
    return values_RGP.reshape(*values_RGP.shape[:-1], *axes)


def _unpack(
    integers: Callable[[Planes], Integers],
    axes: tuple[int, ...],
    blocks: Planes,
    zero: int = 0,
    scale_zero: int = 0,
) -> jax.Array:
    """d * (scale - scale_zero) * (quant - zero) - dmin * minimum.

    `axes` are those of the sub-blocks and a last 1 for the weights in one. They are such that each
    field is a broadcast of its plane and the result lies in weight order: a transpose or a change
    between runs of 16 and 32 costs 2 to 4 times on XLA's CPU backend.
    """
    quants, scales_RGJ, *minima_RGJ = integers(blocks)

    def multiplied(d_RG1: jax.Array, small_RGJ: jax.Array) -> jax.Array:
        return _axes(d_RG1.astype(jnp.float32) * small_RGJ.astype(jnp.float32), *axes)

    lead = scales_RGJ.shape[:-1]
    quants = quants.reshape(*lead, *axes[:-1], -1).astype(jnp.int8) - zero
    weights = multiplied(blocks["d"], scales_RGJ.astype(jnp.int8) - scale_zero) * quants.astype(
        jnp.float32
    )
    return weights - multiplied(blocks["dmin"], minima_RGJ[0]) if minima_RGJ else weights


def _six_bit_scales_and_mins(packed_RGP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q4_K's and Q5_K's 12 bytes to 8 scales and 8 mins, uint8 [..., R, G, 8] in 0..63 each.

    Source: `get_scale_min_k4` in ggml-quants.c. Bytes 0-3 hold scales 0-3 and bytes 4-7 mins 0-3
    in their low six bits; the top two bits there, over the nibbles of bytes 8-11, make 4-7.
    """
    first = packed_RGP[..., 0:4]
    second = packed_RGP[..., 4:8]
    third = packed_RGP[..., 8:12]
    scales_RGJ = jnp.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=-1)
    mins_RGJ = jnp.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=-1)
    return scales_RGJ, mins_RGJ


def _two_bits(blocks: Planes) -> jax.Array:
    """[..., half of 128 weights, 2-bit field, 16-weight sub-block of a run of 32, weight]."""
    return bit_fields(_axes(blocks["quants"], 2, 2, 16), 2, run_axes=2)


def _q2_k(blocks: Planes) -> Integers:
    return _two_bits(blocks), blocks["scales"] & 15, blocks["scales"] >> 4


def _q3_k(blocks: Planes) -> Integers:
    shifts = np.arange(8).reshape(2, 4, 1, 1)
    high = shifted_bits(_axes(blocks["high_bits"], 1, 1, 2, 16), shifts, 1)
    # Scale j: nibble of byte j mod 8, with two bits of byte 8 + j mod 4 above it.
    low_scales = bit_fields(_axes(blocks["scales"][..., :8], 2, 4), 4, run_axes=2)
    shifts = np.arange(0, 8, 2).reshape(2, 2, 1)
    high_scales = shifted_bits(_axes(blocks["scales"][..., 8:], 1, 1, 4), shifts, 2)
    scales = low_scales | (high_scales << 4)
    # A set high bit means "no offset": ggml subtracts 4 where it is clear.
    return _two_bits(blocks) | (high << 2), scales.reshape(*scales.shape[:-3], 16)


def _q4_k(blocks: Planes) -> Integers:
    # 64 weights, nibble, weight
    quants = bit_fields(_axes(blocks["quants"], 4, 32), 4)
    return quants, *_six_bit_scales_and_mins(blocks["scales"])


def _q5_k(blocks: Planes) -> Integers:
    low, *scales = _q4_k(blocks)
    shifts = np.arange(8).reshape(4, 2, 1)
    high = shifted_bits(_axes(blocks["high_bits"], 1, 1, 32), shifts, 1)
    return low | (high << 4), *scales


def _q6_k(blocks: Planes) -> Integers:
    # half of 128 weights, nibble, run of 32 in its 64 bytes, 16-weight sub-block, weight
    low = bit_fields(_axes(blocks["quants"], 2, 2, 2, 16), 4, run_axes=3)
    shifts = np.arange(0, 8, 2).reshape(2, 2, 1, 1)
    high = shifted_bits(_axes(blocks["high_bits"], 2, 1, 1, 2, 16), shifts, 2)
    return low | (high << 4), lax.bitcast_convert_type(blocks["scales"], jnp.uint8)


# How kernels read them. Runs have 32 bytes with four fields in Q2_K and Q3_K (two runs a block,
# sub-blocks of 16), 32 bytes with two fields in Q4_K and Q5_K (four runs, sub-blocks of 32), and 64
# bytes with two fields in Q6_K (two runs, sub-blocks of 16).

_two_bit_codes, _nibble_codes, _wide_nibble_codes = low_codes(2), low_codes(4), low_codes(4, 2)


def _place(tile: MatrixTile, per_half: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block, half of it, and which of the half's `per_half` groups, int32 [J] each."""
    group_J = tile.group_J
    return group_J // (2 * per_half), group_J % (2 * per_half) // per_half, group_J % per_half


def _q2_k_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, half_J, part_J = _place(tile, 2)
    word = tile.at("scales", 4 * block_J + 2 * half_J + field // 2) >> per_group(8 * part_J)
    scale = (word >> (16 * (field % 2))) & 15
    minimum = (word >> (16 * (field % 2) + 4)) & 15
    return scale.astype(jnp.int32), minimum.astype(jnp.int32)


def _q3_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    block_J, half_J, part_J = _place(tile, 2)
    high = tile.words("high_bits", 8 * block_J + 4 * part_J) >> per_group(4 * half_J)
    return _two_bit_codes(tile, field, part) | bits_of(high, field, 1, to=2)


def _q3_k_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, half_J, part_J = _place(tile, 2)
    byte_J = 16 * (field % 2) + 8 * part_J
    low = tile.at("scales", 3 * block_J + field // 2) >> per_group(byte_J + 4 * half_J)
    high = tile.at("scales", 3 * block_J + 2) >> per_group(byte_J + 4 * half_J + 2 * (field // 2))
    return ((low & 15) | ((high & 3) << 4)).astype(jnp.int32) - 32, None


def _q5_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    block_J, run_J = tile.group_J // 4, tile.group_J % 4
    high = tile.words("high_bits", 8 * block_J + 4 * part) >> per_group(2 * run_J)
    return _wide_nibble_codes(tile, field, part) | bits_of(high, field, 1, to=4)


def _six_bit_scales(tile: MatrixTile, field: int) -> Scales:
    """`get_scale_min_k4`: sub-blocks 0-3 and 4-7 of a block pack their six bits differently."""
    block_J, sub_J = tile.group_J // 4, tile.group_J % 4 * 2 + field
    byte_J = per_group(sub_J % 4 * 8)
    first, second, third = (tile.at("scales", 3 * block_J + i) >> byte_J for i in range(3))
    early = (sub_J < 4)[None, :, None]
    scale = jnp.where(early, first & 63, (third & 15) | ((first >> 2) & 48))
    minimum = jnp.where(early, second & 63, ((third >> 4) & 15) | ((second >> 2) & 48))
    return scale.astype(jnp.int32), minimum.astype(jnp.int32)


def _q6_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    block_J, half_J, quarter_J = _place(tile, 4)
    high = tile.words("high_bits", 16 * block_J + 8 * half_J + 4 * (quarter_J % 2))
    high >>= per_group(2 * (quarter_J // 2))
    return _nibble_codes(tile, field, part) | bits_of(high, 4 * field, 2, to=4)


def _q6_k_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, half_J, quarter_J = _place(tile, 4)
    word = tile.at("scales", 4 * block_J + 2 * half_J + field)
    return (word << per_group(24 - 8 * quarter_J)).astype(jnp.int32) >> 24, None  # int8


_DMIN = Plane("dmin", np.dtype(np.float16), 1)
_SCALES_12 = byte_plane("scales", 12)

FORMATS = (
    Format(
        "Q2_K", 10, 256, (byte_plane("scales", 16), byte_plane("quants", 64), D, _DMIN),
        partial(_unpack, _q2_k, (2, 4, 2, 1)), _q2_k,
        KQuant(True, 16, (0, 3), (0, 15), tuple(product((1.0, 0.8, 0.6), repeat=2))),
        Packing(4, 32, 1, _two_bit_codes, supers(4, "d", "dmin"), _q2_k_scales),
    ),
    Format(
        "Q3_K", 11, 256, (byte_plane("high_bits", 32), byte_plane("quants", 64), _SCALES_12, D),
        partial(_unpack, _q3_k, (2, 4, 2, 1), zero=4, scale_zero=32), _q3_k,
        KQuant(
            False, 16, (-4, 3), (-32, 31),
            tuple((q,) for q in (-4.8, -4.3, -3.8, 3.0, 3.3, 3.7, 4.2)), passes=(False,),
        ),
        Packing(4, 32, 1, _q3_k_codes, supers(4, "d"), _q3_k_scales, zero=4),
    ),
    Format(
        "Q4_K", 12, 256, (D, _DMIN, _SCALES_12, byte_plane("quants", 128)),
        partial(_unpack, _q4_k, (8, 1)), _q4_k,
        KQuant(True, 32, (0, 15), (0, 63), tuple(product((1.02, 0.97, 0.91), repeat=2))),
        Packing(2, 32, 2, _wide_nibble_codes, supers(4, "d", "dmin"), _six_bit_scales),
    ),
    Format(
        "Q5_K", 13, 256,
        (D, _DMIN, _SCALES_12, byte_plane("high_bits", 32), byte_plane("quants", 128)),
        partial(_unpack, _q5_k, (8, 1)), _q5_k,
        KQuant(True, 32, (0, 31), (0, 63), tuple(product((1.02, 0.985, 0.95), repeat=2))),
        Packing(2, 32, 2, _q5_k_codes, supers(4, "d", "dmin"), _six_bit_scales),
    ),
    Format(
        "Q6_K", 14, 256,
        (byte_plane("quants", 128), byte_plane("high_bits", 64),
         Plane("scales", np.dtype(np.int8), 16), D),
        partial(_unpack, _q6_k, (2, 2, 2, 2, 1), zero=32), _q6_k,
        KQuant(
            False, 16, (-32, 31), (-128, 127),
            tuple((sign * halves / 2,) for halves in range(58, 66) for sign in (-1, 1)),
        ),
        Packing(2, 64, 1, _q6_k_codes, supers(8, "d"), _q6_k_scales, zero=32),
    ),
)  # fmt: skip
