"""TQ1_0, TQ2_0, Q1_0 and Q2_0: two, three or four evenly spaced levels under one f16 `d`.

Source: `block_tq1_0`, `block_tq2_0`, `block_q1_0`, `block_q2_0` in ggml-common.h and their
`dequantize_row_*`. gguf-py 0.19 decodes neither Q1_0 nor Q2_0, and has no number for Q2_0 (42; of
64 weights, as in ggml). Exact: a level is -1, 0, 1 or 2.

Planes: `quants` five base-3 digits a byte (TQ1_0, most significant first, as a fraction of 256),
four 2-bit fields 32 weights apart (TQ2_0) or of neighbours (Q2_0), or one bit a weight (Q1_0);
`high_bits` four base-3 digits a byte (TQ1_0).
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import D, Format, Planes, bit_fields, byte_plane, shifted_bits
from pallas_kernels.formats.packing import Packing, no_scales, supers, two_bit_codes


def _times_d(blocks: Planes, levels: jax.Array) -> jax.Array:
    """Levels int8 [..., R, G, *axes] times d."""
    *lead, _ = blocks["d"].shape
    d = blocks["d"].astype(jnp.float32).reshape(*lead, *(1,) * (levels.ndim - len(lead)))
    return d * levels.astype(jnp.float32)


def _base_3_digits(packed: jax.Array, count: int) -> jax.Array:
    """uint8 [..., n] to the first digits of each byte, [..., count * n]: all first ones first."""
    shifted = [packed * jnp.uint8(3**place) for place in range(count)]  # modulo 256
    digits = (jnp.stack(shifted, axis=-2).astype(jnp.uint16) * 3) >> 8
    return digits.reshape(*packed.shape[:-1], -1).astype(jnp.int8)


def _unpack_tq1_0(blocks: Planes) -> jax.Array:
    quants = blocks["quants"]
    digits = [
        _base_3_digits(quants[..., :32], 5),
        _base_3_digits(quants[..., 32:], 5),
        _base_3_digits(blocks["high_bits"], 4),
    ]
    return _times_d(blocks, jnp.concatenate(digits, axis=-1) - 1)


def _unpack_tq2_0(blocks: Planes) -> jax.Array:
    *lead, _ = blocks["quants"].shape
    fields = bit_fields(blocks["quants"].reshape(*lead, 2, 32), 2)
    return _times_d(blocks, fields.astype(jnp.int8) - 1)


def _unpack_q1_0(blocks: Planes) -> jax.Array:
    bits = shifted_bits(blocks["quants"][..., None], np.arange(8), 1)
    return _times_d(blocks, 2 * bits.astype(jnp.int8) - 1)


def _unpack_q2_0(blocks: Planes) -> jax.Array:
    fields = shifted_bits(blocks["quants"][..., None], np.arange(0, 8, 2), 2)
    return _times_d(blocks, fields.astype(jnp.int8) - 1)


FORMATS = (
    Format("TQ1_0", 34, 256, (byte_plane("quants", 48), byte_plane("high_bits", 4), D),
           _unpack_tq1_0),
    Format("TQ2_0", 35, 256, (byte_plane("quants", 64), D), _unpack_tq2_0,
           packing=Packing(4, 32, 1, two_bit_codes, supers(4, "d"), no_scales, zero=1)),
    Format("Q1_0", 41, 128, (D, byte_plane("quants", 16)), _unpack_q1_0),
    Format("Q2_0", 42, 64, (D, byte_plane("quants", 16)), _unpack_q2_0),
)  # fmt: skip
