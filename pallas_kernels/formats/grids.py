"""IQ1_S to IQ3_S: a code names a vector of eight or four weights in a grid of ggml's.

Source: `block_iq1_s` to `block_iq3_s` in ggml-common.h and their `dequantize_row_*`. The grids are
gguf-py's own arrays. Exact: d (11 significant bits), a sub-block's scale (at most 5) and a grid
value (at most 6) add up to 22 of a float32's 24.

Planes: `d` f16 (in IQ1_M its nibbles are the tops of `scales`); `quants` grid codes or their low
bits, `high_bits` the rest; `signs` a bit a weight. IQ2_XXS, IQ2_XS and IQ3_XXS store seven signs of
eight: their number of minus signs is even. In IQ1_S and IQ1_M a bit shifts the whole vector by an
eighth up or down.
"""

import functools

import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats.base import (
    D,
    FloatField,
    Format,
    Plane,
    Planes,
    byte_plane,
    shifted_bits,
)

_U16, _U32 = np.dtype(np.uint16), np.dtype(np.uint32)


@functools.cache
def _grid(name: str) -> np.ndarray:
    """Vectors of int8 as words, uint32 [codes, 2 or 1], four values to a little-endian word."""
    type_ = getattr(gguf.quants, name)
    type_.init_grid()
    return np.ascontiguousarray(type_.grid[0, 0].astype(np.int8)).view("<u4")


def _vectors(name: str, codes: jax.Array) -> jax.Array:
    """Grid vectors of codes [...], int8 [..., 8 or 4]."""
    words = jnp.asarray(_grid(name))[codes.astype(jnp.int32)]
    return lax.bitcast_convert_type(words, jnp.int8).reshape(*codes.shape, -1)


def _signed(values: jax.Array, sign_bits: jax.Array) -> jax.Array:
    """int8 [..., 8] with the signs of bytes [...]: bit i negates value i."""
    negative = shifted_bits(sign_bits[..., None], np.arange(8), 1)
    return jnp.where(negative == 1, -values, values)


def _even_signs(seven: jax.Array) -> jax.Array:
    """uint8 of seven sign bits: the eighth makes the number of minus signs even."""
    seven = seven.astype(jnp.uint8)
    return seven | (lax.population_count(seven) << 7)


def _fields(packed: jax.Array, shifts: tuple[int, ...], width: int) -> jax.Array:
    """Bit fields of integers [..., n], [..., n * len(shifts)], those of one integer together."""
    fields = shifted_bits(packed[..., None], np.array(shifts), width)
    return fields.reshape(*packed.shape[:-1], -1)


def _joined(low: jax.Array, high: jax.Array) -> jax.Array:
    """Codes int32 of their low eight bits and the rest."""
    return low.astype(jnp.int32) | (high.astype(jnp.int32) << 8)


def _scaled(blocks: Planes, scales: jax.Array, values: jax.Array) -> jax.Array:
    """d * scales [..., R, G, J] * values int8 [..., R, G, weights in order]."""
    *lead, n_sub = scales.shape
    factor = blocks["d"].astype(jnp.float32) * scales
    return factor[..., None] * values.reshape(*lead, n_sub, -1).astype(jnp.float32)


def _odd(fields: jax.Array, divisor: int = 8) -> jax.Array:
    """(2 * field + 1) / divisor, a power of two: exact."""
    return (2 * fields.astype(jnp.float32) + 1) / divisor


def _four_sign_fields(words: jax.Array) -> jax.Array:
    """uint32 [..., J] of a nibble above 4 times 7 signs, to sign bytes [..., 4 * J]."""
    return _even_signs(_fields(words, (0, 7, 14, 21), 7))


def _unpack_iq2_xxs(blocks: Planes) -> jax.Array:
    *lead, _ = blocks["quants"].shape
    pairs = blocks["quants"].reshape(*lead, 8, 2)  # four codes, then signs and scale
    codes = _fields(pairs[..., 0], (0, 8, 16, 24), 8)
    values = _signed(_vectors("IQ2_XXS", codes), _four_sign_fields(pairs[..., 1]))
    return _scaled(blocks, _odd(pairs[..., 1] >> 28), values)


def _unpack_iq2_xs(blocks: Planes) -> jax.Array:
    quants = blocks["quants"]
    values = _signed(_vectors("IQ2_XS", quants & 511), _even_signs(quants >> 9))
    return _scaled(blocks, _odd(_fields(blocks["scales"], (0, 4), 4)), values)


def _unpack_iq2_s(blocks: Planes) -> jax.Array:
    codes = _joined(blocks["quants"], _fields(blocks["high_bits"], (0, 2, 4, 6), 2))
    values = _signed(_vectors("IQ2_S", codes), blocks["signs"])
    return _scaled(blocks, _odd(_fields(blocks["scales"], (0, 4), 4)), values)


def _unpack_iq3_xxs(blocks: Planes) -> jax.Array:
    *lead, _ = blocks["quants"].shape
    vectors = _vectors("IQ3_XXS", blocks["quants"]).reshape(*lead, 32, 8)
    values = _signed(vectors, _four_sign_fields(blocks["scales"]))
    return _scaled(blocks, _odd(blocks["scales"] >> 28, 4), values)


def _unpack_iq3_s(blocks: Planes) -> jax.Array:
    *lead, _ = blocks["quants"].shape
    codes = _joined(blocks["quants"], _fields(blocks["high_bits"], tuple(range(8)), 1))
    vectors = _vectors("IQ3_S", codes).reshape(*lead, 32, 8)
    scales = _odd(_fields(blocks["scales"], (0, 4), 4), 1)
    return _scaled(blocks, scales, _signed(vectors, blocks["signs"]))


def _shifted(vectors: jax.Array, minus: jax.Array) -> jax.Array:
    """Eight times (vectors [..., n, 8] plus or minus an eighth); `minus` [..., n] is not 0."""
    return 8 * vectors + jnp.where(minus == 0, 1, -1).astype(jnp.int8)[..., None]


def _unpack_iq1_s(blocks: Planes) -> jax.Array:
    high = blocks["high_bits"]
    codes = _joined(blocks["quants"], _fields(high, (0, 3, 6, 9), 3))
    values = _shifted(_vectors("IQ1_S", codes), jnp.repeat(high >> 15, 4, axis=-1))
    return _scaled(blocks, _odd((high >> 12) & 7), values)


def _unpack_iq1_m(blocks: Planes) -> jax.Array:
    nibbles = _fields(blocks["high_bits"], (0, 4), 4)
    codes = _joined(blocks["quants"], nibbles & 7)
    values = _shifted(_vectors("IQ1_M", codes), nibbles & 8)
    tops = blocks["scales"] >> 12
    d_bits = tops[..., 0] | (tops[..., 1] << 4) | (tops[..., 2] << 8) | (tops[..., 3] << 12)
    d_RG1 = lax.bitcast_convert_type(d_bits, jnp.float16)[..., None]
    return _scaled({"d": d_RG1}, _odd(_fields(blocks["scales"], (0, 3, 6, 9), 3)), values)


_CODES_32, _CODES_64 = byte_plane("quants", 32), byte_plane("quants", 64)
_HIGH_8, _SIGNS = byte_plane("high_bits", 8), byte_plane("signs", 32)
# The exponent of IQ1_M's d: all of the last nibble but its sign, and two bits of the one before.
_IQ1_M_D = FloatField(52, np.dtype("<u4"), 0x7000C000)

FORMATS = (
    Format("IQ1_S", 19, 256, (D, _CODES_32, Plane("high_bits", _U16, 8)), _unpack_iq1_s),
    Format("IQ1_M", 29, 256, (_CODES_32, byte_plane("high_bits", 16), Plane("scales", _U16, 4)),
           _unpack_iq1_m, other_floats=(_IQ1_M_D,)),
    Format("IQ2_XXS", 16, 256, (D, Plane("quants", _U32, 16)), _unpack_iq2_xxs),
    Format("IQ2_XS", 17, 256, (D, Plane("quants", _U16, 32), byte_plane("scales", 8)),
           _unpack_iq2_xs),
    Format("IQ2_S", 22, 256, (D, _CODES_32, _SIGNS, _HIGH_8, byte_plane("scales", 8)),
           _unpack_iq2_s),
    Format("IQ3_XXS", 18, 256, (D, _CODES_64, Plane("scales", _U32, 8)), _unpack_iq3_xxs),
    Format("IQ3_S", 21, 256, (D, _CODES_64, _HIGH_8, _SIGNS, byte_plane("scales", 4)),
           _unpack_iq3_s),
)  # fmt: skip
