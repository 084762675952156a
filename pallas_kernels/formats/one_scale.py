"""Q8_0 to Q5_1, TQ1_0, TQ2_0, Q1_0 and Q2_0: one scale a block, weight = d * (code - zero) + m.

Only Q4_1 and Q5_1 have an `m`.
Source: `block_q8_0` and its kin in ggml-common.h and their `dequantize_row_*`. gguf-py 0.19 decodes
neither Q1_0 nor Q2_0, and has no number for Q2_0 (42; of 64 weights, as in ggml).
Exact: d has 11 significant bits and a code at most 7 (-128 is a power of two), so d * (code - zero)
fits the 24 of a float32; adding m then rounds once, with or without a fused multiply-add.

Planes: `d`, `m` f16. `quants` has int8 in Q8_0, two weights a byte (weight i low and i+16 high) in
Q4_0 to Q5_1, four 2-bit fields in TQ2_0 (32 weights apart) and Q2_0 (of neighbours), a bit a weight
in Q1_0, and five base-3 digits a byte (most significant first, as a fraction of 256) in TQ1_0.
`high_bits` has the fifth bit of weight i at bit i of a little-endian 32-bit word in Q5_0 and Q5_1,
and four base-3 digits a byte in TQ1_0.
"""

from collections.abc import Callable
from functools import partial

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
    low_codes,
    quants_of,
    supers,
)


def _unpack(codes: Callable[[Planes], jax.Array], zero: int, blocks: Planes) -> jax.Array:
    """`codes` gives a block's as 8-bit integers [..., R, G, *axes], the weights in order."""
    d_RG1 = blocks["d"].astype(jnp.float32)
    codes_RGI = codes(blocks).astype(jnp.int8).reshape(*d_RG1.shape[:-1], -1) - zero
    scaled_RGI = d_RG1 * codes_RGI.astype(jnp.float32)
    return scaled_RGI + blocks["m"].astype(jnp.float32) if "m" in blocks else scaled_RGI


def _int8(blocks: Planes) -> jax.Array:
    return blocks["quants"]


def _nibbles(blocks: Planes) -> jax.Array:
    return bit_fields(blocks["quants"], 4)


def _five_bits(blocks: Planes) -> jax.Array:
    low = _nibbles(blocks)
    high = shifted_bits(blocks["high_bits"][..., None], np.arange(8), 1)
    return low | (high.reshape(low.shape) << 4)


def _base_3_digits(packed: jax.Array, count: int) -> jax.Array:
    """uint8 [..., n] to the first digits of each byte, [..., count * n]: all first ones first."""
    shifted = [packed * jnp.uint8(3**place) for place in range(count)]  # modulo 256
    digits = (jnp.stack(shifted, axis=-2).astype(jnp.uint16) * 3) >> 8
    return digits.reshape(*packed.shape[:-1], -1).astype(jnp.int8)


def _tq1_0(blocks: Planes) -> jax.Array:
    quants = blocks["quants"]
    parts = ((quants[..., :32], 5), (quants[..., 32:], 5), (blocks["high_bits"], 4))
    return jnp.concatenate([_base_3_digits(packed, count) for packed, count in parts], axis=-1)


def _tq2_0(blocks: Planes) -> jax.Array:
    *lead, _ = blocks["quants"].shape
    return bit_fields(blocks["quants"].reshape(*lead, 2, 32), 2)


def _q1_0(blocks: Planes) -> jax.Array:
    """0 or 2."""
    return shifted_bits(blocks["quants"][..., None], np.arange(8), 1) << 1


def _q2_0(blocks: Planes) -> jax.Array:
    return shifted_bits(blocks["quants"][..., None], np.arange(0, 8, 2), 2)


# How kernels read them.

_nibble_codes = low_codes(4)


def _q8_0_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    return quants_of(tile, 2, part)


def _five_bit_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    """Bit i of a block's `high_bits` completes weight i; word u holds weights 4u to 4u + 3."""
    word_U = jnp.arange(4, dtype=jnp.uint32)[None, None, :]
    four = (tile.at("high_bits", tile.group_J) >> (16 * field + 4 * word_U)) & 15
    spread = four * 0x00204081  # bit k to bit 0 of byte k
    return _nibble_codes(tile, field, part) | bits_of(spread, 0, 1, to=4)


def _d_and_m(tile: MatrixTile) -> Supers:
    d, m = supers(1, "d", "m")(tile)
    assert m is not None
    return d, -m


def _format(name: str, number: int, planes: tuple[Plane, ...], zero: int) -> Format:
    """Two weights a byte, `zero` the code of zero."""
    has_high, has_m = _HIGH in planes, _M in planes
    unpack = partial(_unpack, _five_bits if has_high else _nibbles, zero)
    codes = _five_bit_codes if has_high else _nibble_codes
    packing = Packing(2, 16, 1, codes, _d_and_m if has_m else _D, zero=zero)
    return Format(name, number, 32, planes, unpack, packing=packing)


_M = Plane("m", np.dtype(np.float16), 1)
_HIGH, _QUANTS = byte_plane("high_bits", 4), byte_plane("quants", 16)
_D = supers(1, "d")

FORMATS = (
    Format(
        "Q8_0", 8, 32, (D, Plane("quants", np.dtype(np.int8), 32)), partial(_unpack, _int8, 0),
        packing=Packing(1, 32, 2, _q8_0_codes, _D, signed=True),
    ),
    _format("Q4_0", 2, (D, _QUANTS), 8),
    _format("Q4_1", 3, (D, _M, _QUANTS), 0),
    _format("Q5_0", 6, (D, _HIGH, _QUANTS), 16),
    _format("Q5_1", 7, (D, _M, _HIGH, _QUANTS), 0),
    Format("TQ1_0", 34, 256, (byte_plane("quants", 48), _HIGH, D), partial(_unpack, _tq1_0, 1)),
    Format(
        "TQ2_0", 35, 256, (byte_plane("quants", 64), D), partial(_unpack, _tq2_0, 1),
        packing=Packing(4, 32, 1, low_codes(2), supers(4, "d"), zero=1),
    ),
    Format("Q1_0", 41, 128, (D, _QUANTS), partial(_unpack, _q1_0, 1)),
    Format("Q2_0", 42, 64, (D, _QUANTS), partial(_unpack, _q2_0, 1)),
)  # fmt: skip
