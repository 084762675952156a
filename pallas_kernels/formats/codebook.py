"""IQ4_NL, IQ4_XS, MXFP4 and NVFP4: four bits a weight that index a table of 16 signed integers.

Source: `block_iq4_nl`, `block_iq4_xs`, `block_mxfp4`, `block_nvfp4`, `kvalues_iq4nl`,
`kvalues_mxfp4`, `ggml_e8m0_to_fp32_half` and `ggml_ue4m3_to_fp32` in ggml.
Exact: d (11 significant bits), IQ4_XS's scale (at most 5, or the power of two -32) and a table
value (7) add up to 23 of a float32's 24; MXFP4's scale is a power of two, NVFP4's has 4 bits.

Planes: `d` f16; `exponents` E8M0 bytes (MXFP4); `scales_h` 8 little-endian 2-bit fields and
`scales_l` 8 nibbles (IQ4_XS); `scales` unsigned E4M3 bytes, one for 16 weights (NVFP4); `quants`
two weights a byte, weight i low and i+16 high (i+8 in NVFP4).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats.base import (
    D,
    FloatField,
    Format,
    Planes,
    bit_fields,
    byte_plane,
    shifted_bits,
)
from pallas_kernels.formats.packing import (
    MatrixTile,
    Packing,
    Scales,
    Supers,
    low_codes,
    per_group,
    supers,
)

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 values, doubled to be integers: scales are halved to match.
E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def look_up(values: tuple[int, ...], codes: jax.Array) -> jax.Array:
    """`values[codes]` for 16 values of int8 range: codes uint8 [...] in 0..15 -> int32 [...].

    The table lies in four 32-bit words: two select levels find the word, shifts the byte and its
    sign. No gather, so that it vectorises: 5x a `jnp.take` and 3x a tree of 15 selects on XLA's
    CPU backend.
    """
    word0, word1, word2, word3 = np.array(values, np.int8).view("<u4").tolist()
    codes = codes.astype(jnp.uint32)
    word = jnp.where(
        codes < 8,
        jnp.where(codes < 4, jnp.uint32(word0), jnp.uint32(word1)),
        jnp.where(codes < 12, jnp.uint32(word2), jnp.uint32(word3)),
    )
    byte_on_top = word << (24 - 8 * (codes & 3))
    return lax.bitcast_convert_type(byte_on_top, jnp.int32) >> 24


def _codes(blocks: Planes, run: int = 16) -> jax.Array:
    """uint8 [..., R, G, J, 2 * run] in 0..15."""
    *lead, n_bytes = blocks["quants"].shape
    halves = bit_fields(blocks["quants"].reshape(*lead, n_bytes // run, run), 4)
    return halves.reshape(*lead, n_bytes // run, 2 * run)


def _unpack_iq4_nl(blocks: Planes) -> jax.Array:
    values_RGJI = look_up(IQ4_NL_VALUES, _codes(blocks)).astype(jnp.float32)
    return blocks["d"].astype(jnp.float32)[..., None] * values_RGJI


def _unpack_iq4_xs(blocks: Planes) -> jax.Array:
    low = shifted_bits(blocks["scales_l"][..., None], np.array([0, 4]), 4)
    high = shifted_bits(blocks["scales_h"][..., None], np.array([0, 2, 4, 6]), 2)
    lead = low.shape[:-2]
    scales_RGJ = (low.reshape(*lead, 8) | (high.reshape(*lead, 8) << 4)).astype(jnp.int8) - 32
    scale = blocks["d"].astype(jnp.float32) * scales_RGJ.astype(jnp.float32)
    return scale[..., None] * look_up(IQ4_NL_VALUES, _codes(blocks)).astype(jnp.float32)


def _unpack_mxfp4(blocks: Planes) -> jax.Array:
    """value * 2^(exponent - 128), by integers where the result is subnormal.

    XLA's CPU backend flushes subnormals to zero in arithmetic, and GPUs may. Exponents 0 and 1 put
    the scale and the small values below 2^-126: there the scale is taken four times larger and the
    value four times smaller, and values under 4, of which some come out subnormal, are the bits
    value << (21 + exponent), which also hold up to 2^24.
    """
    exponent = blocks["exponents"].astype(jnp.int32)[..., None]
    value = look_up(E2M1_VALUES, _codes(blocks))
    tiny = exponent < 2
    scale = lax.bitcast_convert_type(jnp.where(tiny, exponent + 1, exponent - 1) << 23, jnp.float32)
    product = scale * (value.astype(jnp.float32) * jnp.where(tiny, 0.25, 1.0).astype(jnp.float32))
    magnitude = jnp.abs(value)
    sign_bit = jnp.where(value < 0, jnp.int32(-(2**31)), jnp.int32(0))
    subnormal = sign_bit | (magnitude << (21 + jnp.minimum(exponent, 1)))
    return jnp.where(
        tiny & (magnitude < 4), lax.bitcast_convert_type(subnormal, jnp.float32), product
    )


def _unpack_nvfp4(blocks: Planes) -> jax.Array:
    """E4M3 without a sign: 0 and 0x7F are zero, and so is exponent 0's mantissa 0."""
    byte = blocks["scales"].astype(jnp.int32)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    # mantissa / 8, with the leading 1 of a normal number; the exponent's bias is 7, and one more
    # halves.
    significand = (mantissa + jnp.where(exponent == 0, 0, 8)).astype(jnp.float32)
    power = (jnp.maximum(exponent, 1) - 7 - 3 - 1 + 127) << 23
    scale = significand * lax.bitcast_convert_type(power, jnp.float32)
    scale = jnp.where(byte == 0x7F, 0.0, scale)
    return scale[..., None] * look_up(E2M1_VALUES, _codes(blocks, 8)).astype(jnp.float32)


# How kernels read them.


def _from_table(values: tuple[int, ...]) -> Callable[[MatrixTile, int, int], jax.Array]:
    def codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
        words = low_codes(4)(tile, field, part)
        packed = jnp.zeros_like(words)
        for byte in range(4):
            value = look_up(values, (words >> (8 * byte)) & 15)
            packed |= (value & 255).astype(jnp.uint32) << (8 * byte)
        return packed

    return codes


def _iq4_xs_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, sub_J = tile.group_J // 8, tile.group_J % 8
    low = (tile.at("scales_l", block_J) >> per_group(4 * sub_J)) & 15
    high = tile.at("scales_h", 2 * block_J + sub_J // 4).astype(jnp.uint32)
    scale = low | (((high >> per_group(2 * (sub_J % 4))) & 3) << 4)
    return scale.astype(jnp.int32) - 32, None


def _mxfp4_supers(tile: MatrixTile) -> Supers:
    """2^(exponent - 128). Two subnormal scales are flushed to zero, as a GPU may do anyway."""
    exponent = tile.at("exponents", tile.group_J).astype(jnp.int32)
    biased = jnp.maximum(exponent - 1, 0)
    return lax.bitcast_convert_type(biased << 23, jnp.float32), None


_QUANTS, _IQ4_NL_CODES = byte_plane("quants", 16), _from_table(IQ4_NL_VALUES)
# E8M0 is the exponent of a float alone.
_EXPONENT = FloatField(0, np.dtype("<u1"), 0xFF)

FORMATS = (
    Format(
        "IQ4_NL", 20, 32, (D, _QUANTS), _unpack_iq4_nl,
        packing=Packing(2, 16, 1, _IQ4_NL_CODES, supers(1, "d"), signed=True),
    ),
    Format(
        "IQ4_XS", 23, 256,
        (D, byte_plane("scales_h", 2), byte_plane("scales_l", 4), byte_plane("quants", 128)),
        _unpack_iq4_xs,
        packing=Packing(2, 16, 1, _IQ4_NL_CODES, supers(8, "d"), _iq4_xs_scales, signed=True),
    ),
    Format(
        "MXFP4", 39, 32, (byte_plane("exponents", 1), _QUANTS), _unpack_mxfp4,
        packing=Packing(2, 16, 1, _from_table(E2M1_VALUES), _mxfp4_supers, signed=True),
        other_floats=(_EXPONENT,),
    ),
    Format("NVFP4", 40, 64, (byte_plane("scales", 4), byte_plane("quants", 32)), _unpack_nvfp4),
)  # fmt: skip
