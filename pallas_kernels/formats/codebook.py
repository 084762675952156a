"""IQ4_NL, IQ4_XS and MXFP4: four bits a weight that index a table of 16 signed integers.

Called through `pallas_kernels.formats`. Source: `block_iq4_nl`, `block_iq4_xs`, `block_mxfp4`,
`kvalues_iq4nl`, `kvalues_mxfp4` and `ggml_e8m0_to_fp32_half` in ggml.
Exact: d (11 significant bits), IQ4_XS's scale (at most 5, or the power of two -32) and a table
value (7) add up to 23 of a float32's 24; MXFP4's scale is a power of two.

Planes: `d` f16; `exponents` E8M0 bytes (MXFP4); `scales_h` 8 little-endian 2-bit fields and
`scales_l` 8 nibbles (IQ4_XS); `quants` two weights a byte, weight i low and i+16 high.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats.base import Format, Plane, Planes, bit_fields, shifted_bits

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 values, doubled to be integers: the scale is halved to match.
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_U8 = jnp.dtype(jnp.uint8)
_F16 = jnp.dtype(jnp.float16)


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


def _codes(blocks: Planes) -> jax.Array:
    """uint8 [..., R, G, J, 32] in 0..15."""
    *lead, n_bytes = blocks["quants"].shape
    nibbles = bit_fields(blocks["quants"].reshape(*lead, n_bytes // 16, 16), 4)
    return nibbles.reshape(*lead, n_bytes // 16, 32)


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
    value = look_up(MXFP4_VALUES, _codes(blocks))
    tiny = exponent < 2
    scale = lax.bitcast_convert_type(jnp.where(tiny, exponent + 1, exponent - 1) << 23, jnp.float32)
    product = scale * (value.astype(jnp.float32) * jnp.where(tiny, 0.25, 1.0).astype(jnp.float32))
    magnitude = jnp.abs(value)
    sign_bit = jnp.where(value < 0, jnp.int32(-(2**31)), jnp.int32(0))
    subnormal = sign_bit | (magnitude << (21 + jnp.minimum(exponent, 1)))
    return jnp.where(
        tiny & (magnitude < 4), lax.bitcast_convert_type(subnormal, jnp.float32), product
    )


_D = Plane("d", _F16, 1)

IQ4_NL = Format("IQ4_NL", 32, 18, (_D, Plane("quants", _U8, 16)), _unpack_iq4_nl)
IQ4_XS = Format(
    "IQ4_XS",
    256,
    136,
    (_D, Plane("scales_h", _U8, 2), Plane("scales_l", _U8, 4), Plane("quants", _U8, 128)),
    _unpack_iq4_xs,
)
MXFP4 = Format(
    "MXFP4",
    32,
    17,
    (Plane("exponents", _U8, 1, e8m0=True), Plane("quants", _U8, 16)),
    _unpack_mxfp4,
)
