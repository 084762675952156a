"""Encode blocks of 32 weights under one scale: Q8_0, Q4_0 and IQ4_NL.

Owns the choice of the scale. For the 4-bit formats it stands in for `quantize_row_iq4_nl_impl` and
`make_qx_quants` of ggml-quants.c, whose errors are 0.5 to 12 % larger (tests/test_quantize.py):
several guesses of the scale, each refined by least squares, and the best kept as measured under its
stored float16 value.

Shape letters: G blocks, W the 32 weights of a block, V the 16 levels, C candidates.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.formats import Levels

# First guesses: the weight of largest magnitude lies at this multiple of the outermost level.
_GUESSES = (-1.12, -1.05, -1.0, -0.94, -0.88, 0.88, 0.94, 1.0, 1.06, 1.14)


def encode_blocks(
    values_GW: np.ndarray, importance_GW: np.ndarray | None, levels: Levels
) -> tuple[Array, Array]:
    """Codes uint8 [G, 32] and scales float16 [G] of weights and importance (above 0) [G, 32].

    A scale that overflows float16 is infinite. Q8_0 leaves nothing to weigh: as in ggml its scale
    is the largest weight over 127, but weights are rounded against the stored scale.
    """
    if len(levels.values) > 16:
        d_G1 = _d_q8_0_G1(values_GW)
        return _round_q8_0(values_GW, d_G1), d_G1[:, 0]
    if importance_GW is None:
        importance_GW = np.ones_like(values_GW)
    d_G1 = _fit_d_G1(values_GW, importance_GW, levels)
    codes_GW = _round_4_bit(values_GW, d_G1, levels)
    return codes_GW, jnp.where(d_G1 == 0, jnp.float16(0), d_G1)[:, 0]


@jax.jit
def _d_q8_0_G1(values_GW: Array) -> Array:
    return (jnp.max(jnp.abs(values_GW), axis=1, keepdims=True) / 127).astype(jnp.float16)


def _step(d_G1: Array) -> Array:
    """d as float32, but 1 where it is 0: quants are then those of weights far below 1."""
    return jnp.where(d_G1 == 0, jnp.float16(1), d_G1).astype(jnp.float32)


@jax.jit
def _round_q8_0(values_GW: Array, d_G1: Array) -> Array:
    q_GW = jnp.clip(jnp.round(values_GW / _step(d_G1)), -127, 127).astype(jnp.int8)
    return lax.bitcast_convert_type(q_GW, jnp.uint8)


def _nearest(scaled_GW: Array, levels: Levels) -> tuple[Array, Array]:
    """Index (as float32) and value of the level nearest to each weight over d.

    Counted by comparison with the midpoints, as one element-wise pass.
    """
    levels_V = np.asarray(levels.values, np.float32)
    index_GW, value_GW = jnp.zeros_like(scaled_GW), jnp.full_like(scaled_GW, levels_V[0])
    for low, high in itertools.pairwise(levels_V):
        above_GW = scaled_GW > np.float32((low + high) / 2)
        index_GW = index_GW + above_GW.astype(jnp.float32)
        value_GW = jnp.where(above_GW, high, value_GW)
    return index_GW, value_GW


def _refit(values_GW: Array, importance_GW: Array, d_G1: Array, levels: Levels) -> Array:
    """The d of least weighted error for the levels that `d_G1` chooses."""
    _, level_GW = _nearest(values_GW / jnp.where(d_G1 == 0, 1.0, d_G1), levels)
    weighted_GW = importance_GW * level_GW
    norm_G1 = jnp.sum(weighted_GW * level_GW, axis=1, keepdims=True)
    fitted_G1 = jnp.sum(weighted_GW * values_GW, axis=1, keepdims=True) / norm_G1
    return jnp.where(d_G1 == 0, 0.0, fitted_G1)


@functools.partial(jax.jit, static_argnames="levels")
def _fit_d_G1(values_GW: Array, importance_GW: Array, levels: Levels) -> Array:
    """The best scale, float16 [G, 1]."""
    at_G1 = jnp.argmax(jnp.abs(values_GW), axis=1, keepdims=True)
    extreme_G1 = jnp.take_along_axis(values_GW, at_G1, axis=1)
    outermost = np.abs(np.asarray(levels.values, np.float32)).max()

    def better(best: tuple[Array, Array], guess: Array) -> tuple[tuple[Array, Array], None]:
        d_G1 = extreme_G1 / (guess * outermost)
        for _ in range(2):
            d_G1 = _refit(values_GW, importance_GW, d_G1, levels)
        d_G1 = d_G1.astype(jnp.float16)
        miss_GW = values_GW - _step(d_G1) * _nearest(values_GW / _step(d_G1), levels)[1]
        error_G1 = jnp.sum(importance_GW * miss_GW * miss_GW, axis=1, keepdims=True)
        better_G1 = error_G1 < best[1]
        return (
            jnp.where(better_G1, d_G1, best[0]),
            jnp.where(better_G1, error_G1, best[1]),
        ), None

    # Where every guess vanishes in float16, as where it overflows, the first one stands.
    first_G1 = (extreme_G1 / (_GUESSES[0] * outermost)).astype(jnp.float16)
    start = (first_G1, jnp.full_like(extreme_G1, jnp.inf))
    (d_G1, _), _ = lax.scan(better, start, jnp.asarray(_GUESSES, jnp.float32))
    return d_G1


@functools.partial(jax.jit, static_argnames="levels")
def _round_4_bit(values_GW: Array, d_G1: Array, levels: Levels) -> Array:
    index_GW, _ = _nearest(values_GW / _step(d_G1), levels)
    # A step of zero decodes to zeros whatever else the block says.
    return jnp.where(d_G1 == 0, jnp.uint8(0), index_GW.astype(jnp.uint8))
