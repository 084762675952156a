"""Attention of one new token per sequence, as a Pallas kernel for Triton.

Owns the walk over keys and values where they lie: in the caches of all blocks, up to the token's
own position and no further. XLA would copy a block's keys and values for every token, all that was
allocated, and turn the values of all blocks around first.

A program takes one sequence, one key/value head with the M query heads that share it, and one part
of the keys (arXiv 2311.01282 has the same division). A part gives its largest score, the sum of its
exponentials and its weighted values; `decode_attention` puts parts together. All arithmetic is
float32.

Letters: B sequences, G key/value heads, M query heads of one, H = G · M, d and e the widths of keys
and values, C positions, n blocks, P parts, J the positions of a step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_PROGRAMS = 64  # wanted at least: more keep more of a GPU's cores busy, and leave more to add up
_FEWEST_ROWS = 16  # of a product
_WIDE = 128  # widths above it take fewer positions at a time
_NONE = -1e30  # the score of a key that is not seen


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _kernel(
    place_1, position_B, q_BGMd, k_nBCGd, v_nBCGe, largest_BGPM, sum_BGPM, values_BGPMe,
    *, step: int, scale: float, window: int,
):  # fmt: skip
    sequence, head, part = (pl.program_id(axis) for axis in range(3))
    heads, width = q_BGMd.shape[2:]
    rows = max(_FEWEST_ROWS, _power_of_two(heads))
    context, values_width = k_nBCGd.shape[2], v_nBCGe.shape[-1]
    # Rows beyond the last repeat it, and columns too; but those of queries are 0.
    row_M = jnp.minimum(jnp.arange(rows), heads - 1)
    column_d, column_e = (jnp.arange(_power_of_two(n)) for n in (width, values_width))

    def load(ref, row, column, last, at):
        shape = (*row.shape, *column.shape)
        rows = jnp.broadcast_to(row[:, None], shape)
        columns = jnp.broadcast_to(jnp.minimum(column, last - 1)[None], shape)
        return ref[(*at(rows), columns)].astype(jnp.float32)

    q_Md = load(q_BGMd, row_M, column_d, width, lambda rows: (sequence, head, rows))
    q_Md = jnp.where((column_d < width)[None], q_Md * scale, 0.0)
    place, position = place_1[0], position_B[sequence]
    seen = jnp.where(position < context, position + 1, 0)  # none by a token that is padding
    first = jnp.maximum(seen - window, 0) // step if window else jnp.int32(0)
    steps = pl.cdiv(seen, step) - first
    each = pl.cdiv(steps, pl.num_programs(2))

    def walk(at: jax.Array, carry):
        largest_M, sum_M, values_Me = carry
        position_J = at * step + jnp.arange(step)
        key_J = jnp.minimum(position_J, context - 1)

        def of_block(rows):
            return place, sequence, rows, head

        k_Jd = load(k_nBCGd, key_J, column_d, width, of_block)
        v_Je = load(v_nBCGe, key_J, column_e, values_width, of_block)
        exact = lax.Precision.HIGHEST
        score_MJ = lax.dot_general(q_Md, k_Jd, (((1,), (1,)), ((), ())), precision=exact)
        is_seen_J = position_J < seen
        if window:
            is_seen_J &= position_J >= seen - window
        score_MJ = jnp.where(is_seen_J[None], score_MJ, _NONE)
        new_M = jnp.maximum(largest_M, jnp.max(score_MJ, axis=1))
        share_MJ = jnp.where(is_seen_J[None], jnp.exp(score_MJ - new_M[:, None]), 0.0)
        kept_M = jnp.exp(largest_M - new_M)
        added_Me = lax.dot_general(share_MJ, v_Je, (((1,), (0,)), ((), ())), precision=exact)
        sum_M = sum_M * kept_M + jnp.sum(share_MJ, axis=1)
        return new_M, sum_M, values_Me * kept_M[:, None] + added_Me

    nothing = jnp.full(rows, _NONE), jnp.zeros(rows), jnp.zeros((rows, len(column_e)))
    begin = first + part * each
    end = jnp.minimum(begin + each, first + steps)
    largest_M, sum_M, values_Me = lax.fori_loop(begin, end, walk, nothing)
    largest_BGPM[sequence, head, part, row_M] = largest_M
    sum_BGPM[sequence, head, part, row_M] = sum_M
    shape = values_Me.shape
    columns = jnp.broadcast_to(jnp.minimum(column_e, values_width - 1)[None], shape)
    rows = jnp.broadcast_to(row_M[:, None], shape)
    values_BGPMe[sequence, head, part, rows, columns] = values_Me


def decode_attention(
    q_BHd: jax.Array,
    k_nBCGd: jax.Array,
    v_nBCGe: jax.Array,
    place: jax.Array | int,
    position_B: jax.Array,
    scale: float | None = None,
    window: int = 0,
    sinks_H: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Grouped-query attention of one token per sequence to the keys up to its own, [B, H * e].

    Args:
        q_BHd: float32.
        k_nBCGd, v_nBCGe: the caches of n blocks; key c stands at position c.
        place: the block whose keys and values are meant.
        position_B: int32, of the tokens; one at C or behind is padding and gets zeros.
        scale: of scores; None is 1 over the square root of d.
        window: keys that a token sees, its own among them; 0 for all before it.
        sinks_H: a score of each head that takes weight and has no value.
        interpret: run the kernel in Pallas's interpreter, on any device.
    """
    batch, n_heads, width = q_BHd.shape
    factor = width**-0.5 if scale is None else scale
    _, _, _, groups, values_width = v_nBCGe.shape
    shared = n_heads // groups
    shape_BGPM = (batch, groups, max(1, _PROGRAMS // (batch * groups)), shared)
    step = 32 if _power_of_two(max(width, values_width)) <= _WIDE else 16
    shapes = (shape_BGPM, shape_BGPM, (*shape_BGPM, values_width))
    largest_BGPM, sum_BGPM, values_BGPMe = pl.pallas_call(
        partial(_kernel, step=step, scale=factor, window=window),
        out_shape=tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes),
        grid=shape_BGPM[:3],
        # With four warps its tiles spill registers on the RTX 30 and 40 series.
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(
        jnp.asarray(place, jnp.int32).reshape(1),
        position_B,
        q_BHd.reshape(batch, groups, shared, width),
        k_nBCGd,
        v_nBCGe,
    )
    most_BG1M = jnp.max(largest_BGPM, axis=2, keepdims=True)
    if sinks_H is not None:
        sinks_1G1M = sinks_H.reshape(1, groups, 1, shared)
        most_BG1M = jnp.maximum(most_BG1M, sinks_1G1M)
    share_BGPM = jnp.exp(largest_BGPM - most_BG1M)
    total_BGM = jnp.sum(share_BGPM * sum_BGPM, axis=2)
    if sinks_H is not None:
        total_BGM += jnp.exp(sinks_1G1M - most_BG1M)[:, :, 0]
    values_BGMe = jnp.sum(share_BGPM[..., None] * values_BGPMe, axis=2)
    mixed_BGMe = values_BGMe / jnp.maximum(total_BGM, jnp.finfo(jnp.float32).tiny)[..., None]
    return mixed_BGMe.reshape(batch, n_heads * values_width)
