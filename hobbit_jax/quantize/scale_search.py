"""Choose the scales and quants of a K-quant block: the part of encoding that decides the error.

Owns the search, over the numbers of each format's `KQuant`. It stands in for `make_qkx2_quants`
and `make_qx_quants` of ggml-quants.c:

1. Each sub-block is fitted by least squares from several guesses, as in ggml; but for the plain
   squared error (or importance · squared error), where ggml without an importance matrix weighs
   errors by |w| or w², which costs it 11 % at Q2_K on N(0,1).
2. Each sub-block tries the integers next to its fitted (scale, offset) under the *stored* float16
   super-scales, by error. ggml rounds the two apart from each other, and never measures.
3. The super-scales are fitted again to those integers by least squares and rounded. Both steps
   once more lower the error by 0.2 %. (At Q3_K step 3 alone does all but 0.03 % of it.)

Left out, for they lower the error by 0.1 % at most: a third round, more guesses, more first values
of d, and all pairs of (scale, offset) in step 2.

Letters: G super-blocks, W weights of a super-block, J sub-blocks of a super-block, I weights of a
sub-block, C candidates. Arrays lie by lane, [I, J, G], and sums over a sub-block are unrolled: a
pass over all candidates is one element-wise kernel that vectorises over G. (As a reduction over
I, XLA's CPU backend takes 50 times as long.)
"""

# Fields are arrays, and array names end in their shape letters.

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.formats import KQuant

BLOCK_LEN = 256


class _Chunk(NamedTuple):
    """Weights by lane, and their importance or None."""

    x_IJG: Array
    w_IJG: Array | None


class Scales(NamedTuple):
    """The fields of the blocks: float16 as stored, and integers held as float32."""

    d_11G: Array
    dmin_11G: Array
    scale_1JG: Array
    offset_1JG: Array


class _Moments(NamedTuple):
    """Sums of w, w·x, w·q, w·q² and w·x·q over each sub-block, [C, J, G]."""

    w: Array
    wx: Array
    wq: Array
    wqq: Array
    wxq: Array


# Each stage is a compiled call of its own. In one call XLA repeats the passes over the weights, and
# the transpose, in every consumer: 4 times slower, and 27 seconds to compile Q4_K instead of 4.
# (optimization_barrier between the stages did not help on a CPU.) And no compiler can then keep in
# float32 what has to be rounded to float16.
_stage = functools.partial(jax.jit, static_argnames="quant")


def find_scales(
    values_GW: np.ndarray | Array, importance_GW: np.ndarray | None, quant: KQuant
) -> tuple[Array, Scales]:
    """Finds the fields of least squared error for a chunk of super-blocks.

    Args:
        values_GW: float32 [G, 256] within ±1e9, so that no sum of squares overflows.
        importance_GW: float32 [G, 256], above 0, or None to weigh all errors alike.
        quant: the numbers of the format.

    Returns:
        The quants counted from the lowest, uint8 [G, 256], and the scales. The quants are the
        levels nearest to the weights under exactly these scales. A super-scale that overflows
        float16 is infinite.
    """
    values_GW = jnp.asarray(values_GW)  # copied once, for the two that read it
    chunk = _by_lane(values_GW, importance_GW, quant)
    steps = _fit_steps(chunk, _explained_CJG(chunk, quant), quant)
    super_scales = _first_super_scales(*steps, quant)
    scales = _first_scales(*steps, *super_scales, quant)
    for nearby in quant.passes:
        if nearby:
            scales = _nearest_scales(_near_errors_CJG(chunk, scales, quant), scales, quant)
        scales = _fit_super_scales(_chosen_moments(chunk, scales, quant), scales)
    return _stored_q_GW(values_GW, scales, quant), scales


@_stage
def _by_lane(values_GW: Array, importance_GW: Array | None, quant: KQuant) -> _Chunk:
    def transpose(values_GW: Array) -> Array:
        return values_GW.reshape(len(values_GW), -1, quant.sub_len).transpose(2, 1, 0)

    return _Chunk(transpose(values_GW), None if importance_GW is None else transpose(importance_GW))


def inverse(step: Array) -> Array:
    """1/step, but 0 for a step of 0: every weight then takes level 0."""
    return jnp.where(step == 0, 0.0, 1 / jnp.where(step == 0, 1.0, step))


def _affine(scales: Scales) -> tuple[Array, Array]:
    """(step, low) of ŵ = step·q + low."""
    d_11G, dmin_11G = (half_11G.astype(jnp.float32) for half_11G in scales[:2])
    return d_11G * scales.scale_1JG, -dmin_11G * scales.offset_1JG


def _q(x: Array, step: Array, low: Array, quant: KQuant) -> Array:
    """The q nearest to each x under ŵ = step·q + low, as float32."""
    per_step = inverse(step)
    q = jnp.round(x * per_step + -low * per_step)
    # Selects, because XLA's minimum and maximum cost three instructions more to pass on a NaN.
    q_min, q_max = (jnp.float32(q) for q in quant.q_range)
    q = jnp.where(q > q_min, q, q_min)
    return jnp.where(q < q_max, q, q_max)


def _lanes(chunk: _Chunk) -> Iterator[tuple[Array, Array | float]]:
    """Weight and importance of one lane after the other, [1, J, G]."""
    for i in range(len(chunk.x_IJG)):
        yield chunk.x_IJG[i : i + 1], 1.0 if chunk.w_IJG is None else chunk.w_IJG[i : i + 1]


def _moments(chunk: _Chunk, step_CJG: Array, low_CJG: Array, quant: KQuant) -> _Moments:
    """The moments under the nearest q of each (step, low)."""
    sums = (jnp.float32(0.0),) * 5
    for x, w in _lanes(chunk):
        q = _q(x, step_CJG, low_CJG, quant)
        terms = (w, w * x, w * q, w * (q * q), w * (x * q))
        sums = tuple(total + term for total, term in zip(sums, terms, strict=True))
    shape = sums[-1].shape
    return _Moments(*(jnp.broadcast_to(total, shape) for total in sums))


def _least_squares(sums: _Moments, quant: KQuant) -> tuple[Array, Array]:
    """The real-valued (step, low) of least weighted error for given q; low is at most 0."""
    plain_CJG = sums.wxq * inverse(sums.wqq)
    if not quant.has_offsets:
        return plain_CJG, jnp.zeros_like(plain_CJG)
    det_CJG = sums.w * sums.wqq - sums.wq * sums.wq
    # If all q are equal, det is rounding noise, and only the mean can be fitted.
    usable_CJG = det_CJG > 1e-6 * sums.w * sums.wqq
    per_det_CJG = jnp.where(usable_CJG, inverse(det_CJG), 0.0)
    step_CJG = (sums.w * sums.wxq - sums.wx * sums.wq) * per_det_CJG
    low_CJG = (sums.wqq * sums.wx - sums.wq * sums.wxq) * per_det_CJG
    low_CJG = jnp.where(usable_CJG, low_CJG, sums.wx / sums.w)
    step_CJG = jnp.where(low_CJG < 0, step_CJG, plain_CJG)
    return jnp.maximum(step_CJG, 0.0), jnp.minimum(low_CJG, 0.0)


def _guess(chunk: _Chunk, places: Array, quant: KQuant) -> tuple[Array, Array]:
    """The (step, low) of guesses, `places` as in `KQuant.guesses`: [1 or 2, C or 1, 1 or J, …]."""
    high_1JG = jnp.max(chunk.x_IJG, axis=0, keepdims=True)
    low_1JG = jnp.min(chunk.x_IJG, axis=0, keepdims=True)
    if quant.has_offsets:
        bottom_CJG = places[0] * jnp.minimum(low_1JG, 0.0)
        span_CJG = jnp.maximum(places[1] * high_1JG - bottom_CJG, 0.0)
        return span_CJG / quant.q_range[1], bottom_CJG
    extreme_1JG = jnp.where(high_1JG > -low_1JG, high_1JG, low_1JG)
    step_CJG = extreme_1JG / places[0]
    return step_CJG, jnp.zeros_like(step_CJG)


@_stage
def _explained_CJG(chunk: _Chunk, quant: KQuant) -> Array:
    """Σ w·x² less the error of the least-squares fit that starts from each guess."""
    places = jnp.asarray(quant.guesses, jnp.float32).T[:, :, None, None]
    sums = _moments(chunk, *_guess(chunk, places, quant), quant)
    step_CJG, low_CJG = _least_squares(sums, quant)
    return step_CJG * sums.wxq + low_CJG * sums.wx


@_stage
def _fit_steps(chunk: _Chunk, explained_CJG: Array, quant: KQuant) -> tuple[Array, Array]:
    """The fitted (step, low) of the best guess, [1, J, G]; cheaper again than kept for all C."""
    best_1JG = jnp.argmax(explained_CJG, axis=0, keepdims=True)
    places = jnp.asarray(quant.guesses, jnp.float32).T[:, best_1JG]
    return _least_squares(_moments(chunk, *_guess(chunk, places, quant), quant), quant)


@_stage
def _first_super_scales(step_1JG: Array, low_1JG: Array, quant: KQuant) -> tuple[Array, Array]:
    """(d, dmin) under which the largest (step, low) takes the scale furthest from 0, float16.

    A subnormal d is rounded up, and the integers make up for it. So blocks of weights down to 1e-7
    stay nonzero; rounded to nearest, d would vanish below 1e-4 in Q6_K.
    """
    widest_11G = jnp.argmax(jnp.abs(step_1JG), axis=1, keepdims=True)
    d_11G = jnp.take_along_axis(step_1JG, widest_11G, axis=1) / max(quant.scale_range, key=abs)
    dmin_11G = jnp.max(-low_1JG, axis=1, keepdims=True) / quant.scale_range[1]

    def rounded(d_11G: Array) -> Array:
        size_11G = jnp.abs(d_11G)
        up_11G = jnp.copysign(jnp.ceil(size_11G * 2.0**24) * 2.0**-24, d_11G)
        return jnp.where(size_11G < 2.0**-14, up_11G, d_11G).astype(jnp.float16)

    return rounded(d_11G), rounded(dmin_11G)


@_stage
def _first_scales(
    step_1JG: Array, low_1JG: Array, d_11G: Array, dmin_11G: Array, quant: KQuant
) -> Scales:
    """The integers nearest to fitted steps."""
    scale_1JG = jnp.round(step_1JG * inverse(d_11G.astype(jnp.float32)))
    offset_1JG = jnp.round(-low_1JG * inverse(dmin_11G.astype(jnp.float32)))
    scale_1JG = jnp.clip(scale_1JG, *quant.scale_range)
    return Scales(d_11G, dmin_11G, scale_1JG, jnp.clip(offset_1JG, 0, quant.scale_range[1]))


def neighbours(scale: Array, offset: Array, moves: Array, quant: KQuant) -> tuple[Array, Array]:
    """The (scale, offset) that `moves`, [2, …], lead to, within their ranges."""
    offset = jnp.clip(offset + moves[1], 0, quant.scale_range[1])
    return jnp.clip(scale + moves[0], *quant.scale_range), offset


def moves(quant: KQuant, reach: int = 1) -> Array:
    """The C moves from a (scale, offset), float32 [2, C], staying first: it wins the ties."""
    steps = (0, *(sign * far for far in range(1, reach + 1) for sign in (1, -1)))
    pairs = itertools.product(steps, steps if quant.has_offsets else (0,))
    return jnp.asarray(list(pairs), jnp.float32).T


@_stage
def _near_errors_CJG(chunk: _Chunk, start: Scales, quant: KQuant) -> Array:
    """The weighted squared error of each move from `start`, its d and dmin unchanged."""
    near = neighbours(*start[2:], moves(quant)[:, :, None, None], quant)
    step_CJG, low_CJG = _affine(Scales(*start[:2], *near))
    error_CJG = jnp.float32(0.0)
    for x, w in _lanes(chunk):
        miss_CJG = x - (step_CJG * _q(x, step_CJG, low_CJG, quant) + low_CJG)
        error_CJG = error_CJG + w * (miss_CJG * miss_CJG)
    return error_CJG


@_stage
def _nearest_scales(error_CJG: Array, start: Scales, quant: KQuant) -> Scales:
    """`start` after the best moves."""
    best_1JG = jnp.argmin(error_CJG, axis=0, keepdims=True)
    return Scales(*start[:2], *neighbours(*start[2:], moves(quant)[:, best_1JG], quant))


@_stage
def _chosen_moments(chunk: _Chunk, scales: Scales, quant: KQuant) -> _Moments:
    return _moments(chunk, *_affine(scales), quant)


@jax.jit
def _fit_super_scales(sums: _Moments, scales: Scales) -> Scales:
    """The d and dmin of least weighted error for given integers; unchanged where not determined."""

    def total(terms_1JG: Array) -> Array:
        # Unrolled for the same reason as the sums over lanes.
        return sum(jnp.split(terms_1JG, terms_1JG.shape[1], axis=1), start=jnp.float32(0.0))

    # ŵ = d·a − dmin·b with a = scale·q and b = offset.
    scale_1JG, offset_1JG = scales.scale_1JG, scales.offset_1JG
    aa_11G = total(scale_1JG * scale_1JG * sums.wqq)
    ax_11G = total(scale_1JG * sums.wxq)
    ab_11G = total(scale_1JG * offset_1JG * sums.wq)
    bb_11G = total(offset_1JG * offset_1JG * sums.w)
    bx_11G = total(offset_1JG * sums.wx)
    det_11G = aa_11G * bb_11G - ab_11G * ab_11G
    both_11G = det_11G > 1e-6 * aa_11G * bb_11G
    per_det_11G = inverse(det_11G)
    d_11G = jnp.where(
        both_11G, (ax_11G * bb_11G - bx_11G * ab_11G) * per_det_11G, ax_11G * inverse(aa_11G)
    )
    dmin_11G = (ax_11G * ab_11G - bx_11G * aa_11G) * per_det_11G
    d_known_11G = both_11G | ((aa_11G > 0) & (bb_11G == 0))
    return scales._replace(
        d_11G=jnp.where(d_known_11G, d_11G.astype(jnp.float16), scales.d_11G),
        dmin_11G=jnp.where(both_11G, dmin_11G.astype(jnp.float16), scales.dmin_11G),
    )


@_stage
def _stored_q_GW(values_GW: Array, scales: Scales, quant: KQuant) -> Array:
    """The quants as stored, from 0 up, uint8 [G, W]; in the order of the weights, not by lane."""
    step_GJ1, low_GJ1 = (part_1JG[0].T[:, :, None] for part_1JG in _affine(scales))
    x_GJI = values_GW.reshape(len(values_GW), -1, quant.sub_len)
    q_GJI = _q(x_GJI, step_GJ1, low_GJ1, quant) - quant.q_range[0]
    return q_GJI.astype(jnp.uint8).reshape(-1, BLOCK_LEN)
