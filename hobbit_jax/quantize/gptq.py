"""Encode a matrix so that its output changes least on known inputs, not its weights.

Owns the minimisation of tr(E·H·Eᵀ) with E = W − Ŵ over everything a K-quant stores: quants, 4- to
8-bit scales and offsets, float16 super-scales. H = Σ x·xᵀ over calibration inputs.

0. Where the inputs are not those that the matrix was made for, because matrices before it have been
   encoded, W is first moved to the weights of least error for the outputs that are wanted (QEP,
   arXiv 2504.09629, has the same move).
1. Error feedback, as in GPTQ (arXiv 2210.17323): columns are rounded in turn, and each one's error
   is moved onto the columns to come. A super-block's scales are searched (`scale_search`) when its
   first column is reached, on the weights as moved by then.
2. Refinement, which GPTQ has not: coordinate descent on single quants under the exact H, then on
   each sub-block's integers (scale, offset), then least squares for d and dmin, some rounds. Every
   move is taken only if it lowers the objective, so the result is never worse than step 1's.

docs/log/2026-11-30-gptq-in-order.md has what each step is worth. Weights lie transposed, so that a
column is contiguous.

Letters: N rows, K columns, W the 256 columns of a super-block, J its sub-blocks, I the columns of a
sub-block, C candidates. G_WN is H·Eᵀ, whose sign says where each weight wants to go.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array, lax

from hobbit_jax.quantize import scale_search
from hobbit_jax.quantize.k_quant_blocks import block_importance_GW, check_weights, k_quant, pack
from hobbit_jax.quantize.scale_search import BLOCK_LEN, Scales
from pallas_kernels.formats import KQuant, get_format

# Added to the diagonal, as a share of its mean: a Hessian is a sample's, and less of it fits the
# sample. docs/log/2026-11-30-gptq-in-order.md has what each share loses on text it has not seen.
DAMPING = 0.5
ROUNDS = 3
_SWEEPS = 2  # over the quants in each round
_REACH = 2  # of the moves of scale and offset


class _Blocks(NamedTuple):
    """One super-block of every row: quants and scales, all float32; d and dmin hold float16s."""

    q_WN: Array
    d_N: Array
    dmin_N: Array
    scale_JN: Array
    offset_JN: Array


def encode(
    weights_NK: np.ndarray, format: str, hessian_KK: np.ndarray, drift_NK: np.ndarray | None = None
) -> np.ndarray:
    """Blocks of least tr(E·H·Eᵀ) found, uint8 [N, row_bytes].

    Args:
        weights_NK: float32 [N, K], finite, K a multiple of 256.
        format: a K-quant.
        hessian_KK: [K, K], symmetric, positive semi-definite, not all zero; its size does not
            matter. Arithmetic is float32, but float64 for its Cholesky factor.
        drift_NK: Σ (y − W·x)·xᵀ over the inputs of which H is the sum, y the outputs wanted; None
            where they are W·x. E is then W + drift·H⁻¹ − Ŵ.

    Raises:
        ValueError: what `check_weights` refuses, or weights too large for this format; a Hessian
            or drift of another shape or not finite; a Hessian that is zero or has a negative
            diagonal.
        NotImplementedError: a format that is no K-quant.
    """
    quant, weights_NK = k_quant(format), np.asarray(weights_NK)
    check_weights(weights_NK)
    n_rows, n_columns = weights_NK.shape
    damped_KK, unit = _conditioned(hessian_KK, n_columns)
    if drift_NK is not None and (
        drift_NK.shape != weights_NK.shape or not np.isfinite(drift_NK).all()
    ):
        raise ValueError(f"wanted a finite drift {weights_NK.shape}, got {drift_NK.shape}")
    if n_rows == 0:
        return np.empty((0, get_format(format).row_bytes(n_columns)), np.uint8)
    target_KN = jnp.asarray(np.ascontiguousarray(weights_NK.T))
    upper_KK, h_KK = _upper_factor(damped_KK), jnp.asarray(damped_KK, jnp.float32)
    if drift_NK is not None:
        target_KN += upper_KK.T @ (upper_KK @ (drift_NK.T / unit))
    blocks = _feed_errors_forward(target_KN, h_KK, upper_KK, quant)
    blocks = _refine(target_KN, h_KK, blocks, quant)
    return np.concatenate([_packed(block, format) for block in blocks], axis=1)


def _conditioned(hessian_KK: np.ndarray, n_columns: int) -> tuple[np.ndarray, float]:
    """H as float64 with a diagonal of mean 1, damped; and the mean that it had."""
    hessian_KK = np.asarray(hessian_KK, np.float64)
    if hessian_KK.shape != (n_columns, n_columns):
        raise ValueError(f"wanted a Hessian [{n_columns}, {n_columns}], got {hessian_KK.shape}")
    diagonal_K = np.diagonal(hessian_KK)
    if not np.isfinite(hessian_KK).all() or (diagonal_K < 0).any() or not diagonal_K.any():
        raise ValueError(
            "wanted a Hessian that is finite, with a diagonal of at least 0, not all 0"
        )
    unit = float(diagonal_K.mean())
    damped_KK = hessian_KK / unit
    np.einsum("kk->k", damped_KK)[:] += DAMPING
    return damped_KK, unit


def _upper_factor(hessian_KK: np.ndarray) -> Array:
    """The upper U of H⁻¹ = Uᵀ·U, float32."""
    # With H's columns and rows reversed, H = L·Lᵀ; L⁻¹, reversed again, is that factor.
    lower_KK = scipy.linalg.cholesky(hessian_KK[::-1, ::-1], lower=True, check_finite=False)
    (invert,) = scipy.linalg.get_lapack_funcs(("trtri",), dtype=np.float64)
    inverse_KK, _ = invert(lower_KK, lower=1, overwrite_c=1)
    return jnp.asarray(inverse_KK[::-1, ::-1], jnp.float32)


def _super_blocks(n_columns: int) -> list[slice]:
    return [slice(at, at + BLOCK_LEN) for at in range(0, n_columns, BLOCK_LEN)]


def _feed_errors_forward(
    target_KN: Array, h_KK: Array, upper_KK: Array, quant: KQuant
) -> list[_Blocks]:
    """Step 1: GPTQ's order of work, with our search of scales.

    Row i of `upper_KK`, over its diagonal, says how column i's error is made good.
    """
    importance_GW = block_importance_GW(np.asarray(jnp.diagonal(h_KK)))
    moved_KN, blocks = target_KN, []
    for index, part in enumerate(_super_blocks(len(h_KK))):
        values_NW = np.asarray(moved_KN[part].T)
        weight_NW = np.broadcast_to(importance_GW[index], values_NW.shape)
        q_NW, scales = scale_search.find_scales(values_NW, weight_NW, quant)
        start = _from_search(q_NW, scales, quant)
        block, error_WN = _feed_forward(moved_KN[part], upper_KK[part, part], start, quant)
        blocks.append(block)
        moved_KN = moved_KN - upper_KK[part].T @ error_WN
    return blocks


@functools.partial(jax.jit, static_argnames="quant")
def _from_search(q_NW: Array, scales: Scales, quant: KQuant) -> _Blocks:
    return _Blocks(
        q_NW.T.astype(jnp.float32) + quant.q_range[0],
        scales.d_11G[0, 0].astype(jnp.float32),
        scales.dmin_11G[0, 0].astype(jnp.float32),
        scales.scale_1JG[0],
        scales.offset_1JG[0],
    )


def _affine(blocks: _Blocks) -> tuple[Array, Array]:
    """(step, low) of ŵ = step·q + low, [J, N]."""
    return blocks.d_N[None] * blocks.scale_JN, -blocks.dmin_N[None] * blocks.offset_JN


def _sub_block(array: Array, j: Array, quant: KQuant, axis: int = 0) -> Array:
    return lax.dynamic_slice_in_dim(array, j * quant.sub_len, quant.sub_len, axis)


def _put_sub_block(array_WN: Array, part_IN: Array, j: Array, quant: KQuant) -> Array:
    return lax.dynamic_update_slice_in_dim(array_WN, part_IN, j * quant.sub_len, axis=0)


def _nearest_q(x_N: Array, step_N: Array, low_N: Array, quant: KQuant) -> Array:
    return jnp.clip(jnp.round((x_N - low_N) * scale_search.inverse(step_N)), *quant.q_range)


def _by_column(of_sub_block_JN: Array, quant: KQuant) -> Array:
    return jnp.repeat(of_sub_block_JN, quant.sub_len, axis=0)


def _decoded_WN(blocks: _Blocks, quant: KQuant) -> Array:
    step_WN, low_WN = (_by_column(part_JN, quant) for part_JN in _affine(blocks))
    return step_WN * blocks.q_WN + low_WN


@functools.partial(jax.jit, static_argnames="quant")
def _feed_forward(
    x_WN: Array, upper_WW: Array, start: _Blocks, quant: KQuant
) -> tuple[_Blocks, Array]:
    """Rounds the columns of one super-block in turn; also the errors over the factor's diagonal."""
    place_I1, (step_JN, low_JN) = jnp.arange(quant.sub_len)[:, None], _affine(start)

    def round_sub_block(j: Array, carry):
        x_WN, q_WN, error_WN = carry
        upper_IW = _sub_block(upper_WW, j, quant)
        upper_II = _sub_block(upper_IW, j, quant, axis=1)
        step_N, low_N = step_JN[j], low_JN[j]

        def round_column(i: Array, carry):
            x_IN, q_IN, error_IN = carry
            q_N = _nearest_q(x_IN[i], step_N, low_N, quant)
            error_N = (x_IN[i] - (step_N * q_N + low_N)) / upper_II[i, i]
            later_I1 = jnp.where(place_I1 > i, upper_II[i][:, None], 0.0)
            return x_IN - later_I1 * error_N[None], q_IN.at[i].set(q_N), error_IN.at[i].set(error_N)

        x_IN = _sub_block(x_WN, j, quant)
        zeros_IN = jnp.zeros_like(x_IN)
        carry = (x_IN, zeros_IN, zeros_IN)
        _, q_IN, error_IN = lax.fori_loop(0, quant.sub_len, round_column, carry)
        q_WN = _put_sub_block(q_WN, q_IN, j, quant)
        error_WN = _put_sub_block(error_WN, error_IN, j, quant)
        return x_WN - upper_IW.T @ error_IN, q_WN, error_WN

    zeros_WN = jnp.zeros_like(x_WN)
    n_sub = BLOCK_LEN // quant.sub_len
    _, q_WN, error_WN = lax.fori_loop(0, n_sub, round_sub_block, (x_WN, zeros_WN, zeros_WN))
    return start._replace(q_WN=q_WN), error_WN


def _refine(target_KN: Array, h_KK: Array, blocks: list[_Blocks], quant: KQuant) -> list[_Blocks]:
    """Step 2: rounds of descent over the super-blocks in turn; the last round moves quants only."""
    blocks, parts = list(blocks), _super_blocks(len(h_KK))
    for refit in (*(True,) * ROUNDS, False):
        # Anew in each round, so that rounding does not add up.
        decoded_KN = jnp.concatenate([_decoded_WN(block, quant) for block in blocks])
        g_KN = h_KK @ (target_KN - decoded_KN)
        for index, part in enumerate(parts):
            new, change_WN = _descend(blocks[index], g_KN[part], h_KK[part, part], quant, refit)
            blocks[index] = new
            if index + 1 < len(parts):
                g_KN = g_KN - h_KK[:, part] @ change_WN
    return blocks


@functools.partial(jax.jit, static_argnames=("quant", "refit"))
def _descend(
    blocks: _Blocks, g_WN: Array, h_WW: Array, quant: KQuant, refit: bool
) -> tuple[_Blocks, Array]:
    """Descends in one super-block, the others fixed; also the change of its decoded weights."""
    before_WN = _decoded_WN(blocks, quant)
    q_WN, g_WN = _descend_quants(blocks, g_WN, h_WW, quant)
    blocks = blocks._replace(q_WN=q_WN)
    if refit:
        blocks, g_WN = _descend_integers(blocks, g_WN, h_WW, quant)
        blocks = _refit_super_scales(blocks, g_WN, h_WW, quant)
    return blocks, _decoded_WN(blocks, quant) - before_WN


def _descend_quants(
    blocks: _Blocks, g_WN: Array, h_WW: Array, quant: KQuant
) -> tuple[Array, Array]:
    """Sets each quant in turn to the level nearest to its best real value, the others fixed."""
    n_sub, (step_JN, low_JN) = BLOCK_LEN // quant.sub_len, _affine(blocks)

    def move_sub_block(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        q_WN, g_WN = carry
        j = turn % n_sub
        h_IW, q_IN = _sub_block(h_WW, j, quant), _sub_block(q_WN, j, quant)
        h_II = _sub_block(h_IW, j, quant, axis=1)
        step_N, low_N = step_JN[j], low_JN[j]

        def move(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            q_IN, g_IN = carry
            best_N = step_N * q_IN[i] + low_N + g_IN[i] / h_II[i, i]
            q_N = jnp.where(step_N == 0, q_IN[i], _nearest_q(best_N, step_N, low_N, quant))
            change_N = step_N * (q_N - q_IN[i])
            return q_IN.at[i].set(q_N), g_IN - h_II[i][:, None] * change_N[None]

        moved_IN, _ = lax.fori_loop(0, quant.sub_len, move, (q_IN, _sub_block(g_WN, j, quant)))
        g_WN = g_WN - h_IW.T @ (step_N[None] * (moved_IN - q_IN))
        return _put_sub_block(q_WN, moved_IN, j, quant), g_WN

    return lax.fori_loop(0, _SWEEPS * n_sub, move_sub_block, (blocks.q_WN, g_WN))


def _descend_integers(
    blocks: _Blocks, g_WN: Array, h_WW: Array, quant: KQuant
) -> tuple[_Blocks, Array]:
    """Moves each sub-block's scale and offset to the best within reach, its quants fixed."""
    moves_2C1 = scale_search.moves(quant, _REACH)[:, :, None]

    def move(j: Array, carry: tuple[_Blocks, Array]) -> tuple[_Blocks, Array]:
        blocks, g_WN = carry
        h_IW, q_IN, g_IN = (_sub_block(x, j, quant) for x in (h_WW, blocks.q_WN, g_WN))
        h_II = _sub_block(h_IW, j, quant, axis=1)
        scale_1N, offset_1N = blocks.scale_JN[j][None], blocks.offset_JN[j][None]
        scale_CN, offset_CN = scale_search.neighbours(scale_1N, offset_1N, moves_2C1, quant)
        # The change of ŵ is a·q + b; of the objective, quadratic in a and b.
        a_CN = blocks.d_N[None] * (scale_CN - scale_1N)
        b_CN = -blocks.dmin_N[None] * (offset_CN - offset_1N)
        hq_IN, h1_I1 = h_II @ q_IN, jnp.sum(h_II, axis=1, keepdims=True)
        qhq_1N = jnp.sum(q_IN * hq_IN, axis=0, keepdims=True)
        qh1_1N = jnp.sum(q_IN * h1_I1, axis=0, keepdims=True)
        gq_1N = jnp.sum(g_IN * q_IN, axis=0, keepdims=True)
        g1_1N = jnp.sum(g_IN, axis=0, keepdims=True)
        cost_CN = (
            a_CN * (a_CN * qhq_1N + 2 * (b_CN * qh1_1N - gq_1N))
            + b_CN * (b_CN * jnp.sum(h1_I1) - 2 * g1_1N)
        )  # fmt: skip
        best_1N = jnp.argmin(cost_CN, axis=0)[None]
        pick = functools.partial(jnp.take_along_axis, indices=best_1N, axis=0)
        change_IN = pick(a_CN) * q_IN + pick(b_CN)
        blocks = blocks._replace(
            scale_JN=blocks.scale_JN.at[j].set(pick(scale_CN)[0]),
            offset_JN=blocks.offset_JN.at[j].set(pick(offset_CN)[0]),
        )
        return blocks, g_WN - h_IW.T @ change_IN

    return lax.fori_loop(0, BLOCK_LEN // quant.sub_len, move, (blocks, g_WN))


def _refit_super_scales(blocks: _Blocks, g_WN: Array, h_WW: Array, quant: KQuant) -> _Blocks:
    """d and dmin by least squares, rounded to float16; kept where that does not help."""
    a_WN = _by_column(blocks.scale_JN, quant) * blocks.q_WN
    b_WN = -_by_column(blocks.offset_JN, quant)
    ha_WN, hb_WN = h_WW @ a_WN, h_WW @ b_WN

    def dot(left_WN: Array, right_WN: Array) -> Array:
        return jnp.sum(left_WN * right_WN, axis=0)

    aa_N, ab_N, bb_N = dot(a_WN, ha_WN), dot(a_WN, hb_WN), dot(b_WN, hb_WN)
    ag_N, bg_N = dot(a_WN, g_WN), dot(b_WN, g_WN)
    det_N = aa_N * bb_N - ab_N * ab_N
    both_N = det_N > 1e-6 * aa_N * bb_N
    per_det_N = 1 / jnp.where(both_N, det_N, 1.0)
    alone_N = ag_N / jnp.where(aa_N > 0, aa_N, 1.0)
    move_d_N = jnp.where(both_N, (ag_N * bb_N - bg_N * ab_N) * per_det_N, alone_N)
    move_dmin_N = jnp.where(both_N, (bg_N * aa_N - ag_N * ab_N) * per_det_N, 0.0)

    def rounded(new_N: Array) -> Array:
        return new_N.astype(jnp.float16).astype(jnp.float32)

    d_N, dmin_N = rounded(blocks.d_N + move_d_N), rounded(blocks.dmin_N + move_dmin_N)
    d_change_N, dmin_change_N = d_N - blocks.d_N, dmin_N - blocks.dmin_N
    cost_N = (
        d_change_N * (d_change_N * aa_N + 2 * (dmin_change_N * ab_N - ag_N))
        + dmin_change_N * (dmin_change_N * bb_N - 2 * bg_N)
    )  # fmt: skip
    # ggml reads a negative dmin, but no encoder writes one.
    better_N = (cost_N < 0) & (dmin_N >= 0) & jnp.isfinite(d_N) & jnp.isfinite(dmin_N)
    return blocks._replace(
        d_N=jnp.where(better_N, d_N, blocks.d_N),
        dmin_N=jnp.where(better_N, dmin_N, blocks.dmin_N),
    )


def _packed(blocks: _Blocks, format: str) -> np.ndarray:
    """The blocks of one super-block of every row, uint8 [N, block_bytes]."""
    scales = Scales(
        blocks.d_N.astype(jnp.float16)[None, None],
        blocks.dmin_N.astype(jnp.float16)[None, None],
        blocks.scale_JN[None],
        blocks.offset_JN[None],
    )
    q_NW = (blocks.q_WN.T - k_quant(format).q_range[0]).astype(jnp.uint8)
    return pack(q_NW, scales, format)
