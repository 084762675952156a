"""Activations as the kernels read them: 15-bit integers in two byte planes, or lanes of floats.

Owns the preparation of the left operand, in plain XLA: once per op, a few kilobytes a token.

Letters: T rows, K columns, V words (four columns each), P groups of columns, B blocks of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Columns under one scale of the int8_split, as in llama.cpp's Q8_K; a multiple of every block.
INT8_SPLIT_BLOCK = 256
# Largest |integer|: 15 bits and a sign. With one more, the int32 sum over one group of a row could
# overflow for Q6_K (16 weights of +-32, a scale of +-128, two fields), Q5_K and IQ4_XS.
LARGEST_INTEGER = 127 * 128


class Int8Split(NamedTuple):
    """x = scale * (256 * high + low) with int8 int8_split, four to a word.

    llama.cpp's kernels round activations to eight bits, which is off by up to .4 % of a block's
    largest; a second digit costs one more integer product per four weights and is off by .003 %.
    """

    high_TV: jax.Array  # uint32
    low_TV: jax.Array  # uint32
    sum_TP: jax.Array  # int32: sums of the integers of each group
    scale_TB: jax.Array  # float32, one per INT8_SPLIT_BLOCK


def _pack(digit_TK: jax.Array) -> jax.Array:
    """int32 in int8's range, four neighbours to a little-endian word."""
    byte_TVb = (digit_TK & 255).astype(jnp.uint32).reshape(*digit_TK.shape[:-1], -1, 4)
    return jnp.sum(byte_TVb << jnp.arange(0, 32, 8, dtype=jnp.uint32)[None, None, :], axis=-1)


def int8_split(x_TK: jax.Array, group: int) -> Int8Split:
    """Rounds float32 x to 15-bit integers and their sums over `group` neighbouring columns."""
    rows, columns = x_TK.shape
    x_TBi = x_TK.reshape(rows, columns // INT8_SPLIT_BLOCK, INT8_SPLIT_BLOCK)
    scale_TB = jnp.max(jnp.abs(x_TBi), axis=-1) / LARGEST_INTEGER
    # A block of zeros, and one so small that its inverse overflows, is all zero.
    inverse_TB = jnp.where(scale_TB > 1e-37, 1 / scale_TB, 0.0)
    integer_TK = jnp.round(x_TBi * inverse_TB[..., None]).astype(jnp.int32).reshape(rows, columns)
    high_TK = (integer_TK + 128) >> 8
    low_TK = integer_TK - (high_TK << 8)
    sum_TP = jnp.sum(integer_TK.reshape(rows, columns // group, group), axis=-1)
    return Int8Split(_pack(high_TK), _pack(low_TK), sum_TP, scale_TB)


def lanes(x_TK: jax.Array, count: int, dtype: type) -> jax.Array:
    """[count, T, K / count]: column count * v + b of x at [b, :, v], in the product's dtype.

    A word holds four neighbouring weights, so a kernel multiplies byte b of its words by every
    fourth column; de-interleaved once here, those columns are neighbours.
    """
    rows, columns = x_TK.shape
    return x_TK.astype(dtype).reshape(rows, columns // count, count).transpose(2, 0, 1)
