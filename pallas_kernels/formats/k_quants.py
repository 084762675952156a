"""Q2_K to Q6_K: 256 weights in sub-blocks of 16 or 32, whose small scales share an f16 `d`.

Called through `pallas_kernels.formats`. Source: `block_q2_K` to `block_q6_K` in ggml-common.h.
Exact: significant bits of d (11), the sub-block scale and the quant add up to at most 23
(Q6_K: 11 + 7 + 5, as -128 and -32 are powers of two), so both products fit a float32's 24;
subtracting dmin*min (11 + 6 bits) rounds once, with or without a fused multiply-add.

Planes: `d`, `dmin` f16; `scales` as ggml packs them (bytes; int8 in Q6_K); `quants` the low 2 or
4 bits of a weight, `high_bits` the rest. Sub-block scales are multiplied out only in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import Format, Plane, Planes, bit_fields, shifted_bits

_U8 = jnp.dtype(jnp.uint8)
_F16 = jnp.dtype(jnp.float16)


def _axes(values_RGP: jax.Array, *axes: int) -> jax.Array:
    """[..., R, G, P] -> [..., R, G, *axes]."""
    return values_RGP.reshape(*values_RGP.shape[:-1], *axes)


def _sub_scales(d_RG1: jax.Array, scales_RGJ: jax.Array, *axes: int) -> jax.Array:
    """f16 `d` times the small scales, float32 [..., R, G, *axes]."""
    return _axes(d_RG1.astype(jnp.float32) * scales_RGJ.astype(jnp.float32), *axes)


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


def _affine_k(blocks: Planes, quants: jax.Array) -> jax.Array:
    """Q4_K's and Q5_K's d*scale*quant - dmin*min; quants uint8 [..., R, G, 4, 2, 32]."""
    scales_RGJ, mins_RGJ = _six_bit_scales_and_mins(blocks["scales"])
    # Eight sub-blocks on one axis: Q4_K in less than half the time it takes on two (XLA, CPU).
    quants_RGJI = quants.reshape(*quants.shape[:-3], 8, 32)
    scaled = _sub_scales(blocks["d"], scales_RGJ, 8, 1) * quants_RGJI.astype(jnp.float32)
    return scaled - _sub_scales(blocks["dmin"], mins_RGJ, 8, 1)


# In every unpack below, the axes after G are spelled so that each field is a broadcast of its
# plane and the result lies in weight order. Reshaping between sub-blocks of 16 and runs of 32
# inside the expression instead costs 2 to 4 times on XLA's CPU backend.


def _unpack_q2_k(blocks: Planes) -> jax.Array:
    # half of 128 weights, 2-bit field, 16-weight sub-block of a run of 32, weight
    quants = bit_fields(_axes(blocks["quants"], 2, 2, 16), 2, run_axes=2)
    scale = _sub_scales(blocks["d"], blocks["scales"] & 15, 2, 4, 2, 1)
    offset = _sub_scales(blocks["dmin"], blocks["scales"] >> 4, 2, 4, 2, 1)
    return scale * quants.astype(jnp.float32) - offset


def _unpack_q3_k(blocks: Planes) -> jax.Array:
    # half of 128 weights, 2-bit field, 16-weight sub-block of a run of 32, weight
    low = bit_fields(_axes(blocks["quants"], 2, 2, 16), 2, run_axes=2)
    shifts = np.arange(8).reshape(2, 4, 1, 1)
    high = shifted_bits(_axes(blocks["high_bits"], 1, 1, 2, 16), shifts, 1)
    # A set high bit means "no offset": ggml subtracts 4 where it is clear.
    quants = (low | (high << 2)).astype(jnp.int8) - 4
    # Scale j: nibble of byte j mod 8, with two bits of byte 8 + j mod 4 above it.
    low_scales = bit_fields(_axes(blocks["scales"][..., :8], 2, 4), 4, run_axes=2)
    shifts = np.arange(0, 8, 2).reshape(2, 2, 1)
    high_scales = shifted_bits(_axes(blocks["scales"][..., 8:], 1, 1, 4), shifts, 2)
    scales = (low_scales | (high_scales << 4)).astype(jnp.int8) - 32
    scales_RGJ = scales.reshape(*scales.shape[:-3], 16)
    return _sub_scales(blocks["d"], scales_RGJ, 2, 4, 2, 1) * quants.astype(jnp.float32)


def _unpack_q4_k(blocks: Planes) -> jax.Array:
    # 64 weights, nibble, weight
    return _affine_k(blocks, bit_fields(_axes(blocks["quants"], 4, 32), 4))


def _unpack_q5_k(blocks: Planes) -> jax.Array:
    # 64 weights, nibble, weight
    low = bit_fields(_axes(blocks["quants"], 4, 32), 4)
    shifts = np.arange(8).reshape(4, 2, 1)
    high = shifted_bits(_axes(blocks["high_bits"], 1, 1, 32), shifts, 1)
    return _affine_k(blocks, low | (high << 4))


def _unpack_q6_k(blocks: Planes) -> jax.Array:
    # half of 128 weights, nibble, run of 32 in its 64 bytes, 16-weight sub-block, weight
    low = bit_fields(_axes(blocks["quants"], 2, 2, 2, 16), 4, run_axes=3)
    shifts = np.arange(0, 8, 2).reshape(2, 2, 1, 1)
    high = shifted_bits(_axes(blocks["high_bits"], 2, 1, 1, 2, 16), shifts, 2)
    quants = (low | (high << 4)).astype(jnp.int8) - 32
    scale = _sub_scales(blocks["d"], blocks["scales"], 2, 2, 2, 2, 1)
    return scale * quants.astype(jnp.float32)


_D = Plane("d", _F16, 1)
_DMIN = Plane("dmin", _F16, 1)
_SCALES_12 = Plane("scales", _U8, 12)


def _quants(n_bytes: int) -> Plane:
    return Plane("quants", _U8, n_bytes)


def _high_bits(n_bytes: int) -> Plane:
    return Plane("high_bits", _U8, n_bytes)


Q2_K = Format("Q2_K", 256, 84, (Plane("scales", _U8, 16), _quants(64), _D, _DMIN), _unpack_q2_k)
Q3_K = Format("Q3_K", 256, 110, (_high_bits(32), _quants(64), _SCALES_12, _D), _unpack_q3_k)
Q4_K = Format("Q4_K", 256, 144, (_D, _DMIN, _SCALES_12, _quants(128)), _unpack_q4_k)
Q5_K = Format("Q5_K", 256, 176, (_D, _DMIN, _SCALES_12, _high_bits(32), _quants(128)), _unpack_q5_k)
Q6_K = Format(
    "Q6_K",
    256,
    210,
    (_quants(128), _high_bits(64), Plane("scales", jnp.dtype(jnp.int8), 16), _D),
    _unpack_q6_k,
)
