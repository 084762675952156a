"""One matrix product over quantised slots, as a Pallas kernel for Triton.

Owns the loop that every format and every shape goes through: expert or dense, one matrix or a gated
pair, few rows or many.

An *item* is a tile of up to C input rows that all multiply the matrix in one slot. A program takes
one item and R rows of its matrix, and walks the row in groups (`formats/packing.py`). Two ways to
contract:

- few input rows: codes and activation int8_split are multiplied as bytes, four per instruction
  (`dp4a`), exactly; each group's sum is scaled and accumulated in float32. Reading the quants is
  what takes the time, so arithmetic is kept to about two instructions a weight.
- many: weights are scaled in float32, rounded to bfloat16 and multiplied on the tensor cores,
  accumulated in float32.

The left operand is prepared in plain XLA, once per op: a few kilobytes a token. Slot numbers, rows
and the number of items are data; nothing recompiles when a cache changes.

Letters: T rows of x, K columns, V words (four columns each), P groups of columns, B blocks of
columns; R rows of a matrix, J groups of a tile, U the four words of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formats import FORMATS, Planes, get_format
from pallas_kernels.formats.packing import WORDS, Floats, MatrixTile, Packing, lane, neighbours
from pallas_kernels.reference import filled_up


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut. Rows, columns and tokens are powers of two."""

    rows: int  # matrix rows of a program (R)
    columns: int  # matrix columns of a step of its loop, at least 64
    tokens: int  # input rows of an item (C), as `item_rows` gives them
    warps: int = 4  # of a program
    stages: int = 2  # of software pipelining


# Input rows of an item up to which products are taken in integers; from there on the tensor cores,
# which compute 16 rows anyway, do less.
INT8_SPLIT_ROWS = 4
FEWEST_DOT_ROWS = 16  # what a tensor-core instruction takes; fewer rows are padded
MOST_ITEM_ROWS = 64
# What a program of four warps loads of its quants in a step: four 16-byte loads a thread in flight.
_WORDS_OF_STEP = 2048
_ROW_WORDS_OF_STEP = 64
_DOT_GROUPS = 4  # sixteen columns of every lane, the least that a tensor core takes
_COLUMNS = 256  # of which a matrix has a multiple
_ROWS = 16
_FEWEST_COLUMNS = 64  # of a step: the widest group
# Columns under one scale of an `Int8Split`, as in llama.cpp's Q8_K; a multiple of every block.
INT8_SPLIT_BLOCK = 256
# Largest |integer|: 15 bits and a sign. With one more, the int32 sum over one group of a row could
# overflow for Q6_K (16 weights of +-32, a scale of +-128, two fields), Q5_K and IQ4_XS.
LARGEST_INTEGER = 127 * 128


class Items(NamedTuple):
    """Which input rows meet which slot, and where their results go; padded as `reference.Work`."""

    slot_I: jax.Array  # int32
    source_IC: jax.Array  # int32, rows of x
    target_IC: jax.Array  # int32, rows of y
    count_1: jax.Array  # int32; items from there on are not computed


def packing_of(format_name: str) -> Packing | Floats:
    """How these kernels read a format; NotImplementedError for one that they do not."""
    packing = get_format(format_name).packing
    if packing is None:
        known = ", ".join(fmt.name for fmt in FORMATS.values() if fmt.packing)
        raise NotImplementedError(f"the Triton kernels have no {format_name}; they have {known}")
    return packing


def check_shape(format_name: str, rows: int, columns: int) -> None:
    """Refuses what these kernels do not cover.

    Raises:
        NotImplementedError: names the format or the size, and what is supported.
    """
    packing_of(format_name)
    columns = get_format(format_name).padded(columns)
    if columns % _COLUMNS or rows % _ROWS:
        raise NotImplementedError(
            f"the Triton kernels take matrices of a multiple of {_ROWS} rows and {_COLUMNS} "
            f"columns, got [{rows}, {columns}]"
        )


def padded_columns(formats: Sequence[str], columns: int) -> int:
    """Columns of the matrices with their last blocks filled up."""
    return max(get_format(name).padded(columns) for name in formats)


def item_rows(mean_rows: int, formats: Sequence[str]) -> int:
    """Input rows of an item (a power of two) where an expert has `mean_rows` of them on average."""
    rows = 1 << max(0, mean_rows - 1).bit_length()
    if rows <= INT8_SPLIT_ROWS and all(isinstance(packing_of(name), Packing) for name in formats):
        return rows
    return min(max(rows, FEWEST_DOT_ROWS), MOST_ITEM_ROWS)


def _divisor(number: int, most: int) -> int:
    """The largest power of two, `most` at most, that divides `number`."""
    return min(most, number & -number)


def choose_tile(formats: Sequence[str], rows: int, columns: int, width: int) -> Tile:
    """How the kernel is cut for matrices [rows, columns] and items of `width` input rows.

    A rule that no GPU has yet confirmed.
    """
    columns = padded_columns(formats, columns)
    packings = [packing_of(name) for name in formats]
    if width >= FEWEST_DOT_ROWS:
        step_columns = max(64, _DOT_GROUPS * min(packing.group_columns for packing in packings))
        # What fits the 99 KiB of shared memory of a desktop card, gated pair included.
        tile_rows = 64 if width <= FEWEST_DOT_ROWS else 32
        return Tile(_divisor(rows, tile_rows), _divisor(columns, step_columns), width)
    fields = min(packing.fields for packing in packings if isinstance(packing, Packing))
    tile_rows = _WORDS_OF_STEP // (_ROW_WORDS_OF_STEP * len(formats))
    step_columns = _divisor(columns, 4 * fields * _ROW_WORDS_OF_STEP)
    return Tile(_divisor(rows, tile_rows), step_columns, width)


def _check_planes(format_name: str, planes: Planes, rows: int, columns: int) -> None:
    check_shape(format_name, rows, columns)
    for name, plane in planes.items():
        # Pallas computes 32-bit element offsets, signed, in arrays of up to 4 GiB.
        if plane.size >= 2**31 and plane.nbytes <= 2**32:
            raise NotImplementedError(
                f"plane {name} of {format_name} has {plane.size} elements in {plane.nbytes} bytes; "
                f"these kernels address fewer than {2**31} elements, or more than 4 GiB"
            )
    for name, wanted in get_format(format_name).plane_shapes(rows, columns).items():
        plane = planes[name]
        if plane.shape[1:] != wanted.shape or plane.dtype != wanted.dtype:
            raise ValueError(
                f"plane {name} of {format_name}: got {plane.dtype} {plane.shape}, "
                f"want {wanted.dtype} [slots, {wanted.shape[0]}, {wanted.shape[1]}]"
            )


class Int8Split(NamedTuple):
    """x = scale * (256 * high + low) with int8 `high` and `low`, four to a word.

    llama.cpp's kernels round activations to eight bits, which is off by up to 0.4 % of a block's
    largest; the second byte costs one more integer product per four weights and is off by 0.003 %.
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


def _left_operand(x_XK: jax.Array, format_name: str, integers: bool) -> Int8Split | jax.Array:
    """The input rows as a format's products take them."""
    packing = packing_of(format_name)
    if isinstance(packing, Packing):
        return int8_split(x_XK, packing.group_weights) if integers else lanes(x_XK, 4, jnp.bfloat16)
    if integers:
        raise NotImplementedError(
            f"{format_name} has no integer product; give its tile at least {FEWEST_DOT_ROWS} rows"
        )
    return lanes(x_XK, 1, packing.operand_dtype)


def _dot4(codes, x, total, signed: bool, interpret: bool):
    """`total` plus the sum over the bytes of each word of code * x, int32, where x is int8."""
    x = jnp.broadcast_to(x, codes.shape)
    if not interpret:
        kind = "s32" if signed else "u32"
        [product] = plgpu.elementwise_inline_asm(
            f"dp4a.{kind}.s32 $0, $1, $2, $3;",
            args=[codes, x, total],
            constraints="=r,r,r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32)],
        )
        return product
    for byte in range(4):
        code = codes << (24 - 8 * byte)
        code = code.astype(jnp.int32) >> 24 if signed else (code >> 24).astype(jnp.int32)
        total += code * ((x << (24 - 8 * byte)).astype(jnp.int32) >> 24)
    return total


def _int8_split_step(matrix, packing: Packing, x: Int8Split, source_C, sums_C, interpret: bool):
    """Adds one tile's products to float32 sums [R, J], one for each of the C input rows."""
    shape = sums_C[0].shape
    scaled_C = [jnp.zeros(shape, jnp.int32) for _ in source_C]
    minima_C = [jnp.zeros(shape, jnp.int32) for _ in source_C]
    d_RJ1, dmin_RJ1 = packing.supers(matrix)
    for field in range(packing.fields):
        place_J = packing.place(matrix.group_J, field)
        codes = [packing.codes(matrix, field, part) for part in range(packing.parts)]
        scale_RJ1, minimum_RJ1 = packing.scales(matrix, field)
        for c, source in enumerate(source_C):
            high_RJU = low_RJU = jnp.zeros((*shape, WORDS), jnp.int32)
            for part, codes_RJU in enumerate(codes):
                word_JU = neighbours((place_J * packing.parts + part) * WORDS)
                high_JU, low_JU = x.high_TV[source, word_JU], x.low_TV[source, word_JU]
                high_RJU = _dot4(codes_RJU, high_JU[None], high_RJU, packing.signed, interpret)
                low_RJU = _dot4(codes_RJU, low_JU[None], low_RJU, packing.signed, interpret)
            product_RJ = (jnp.sum(high_RJU, axis=-1) << 8) + jnp.sum(low_RJU, axis=-1)
            x_sum_RJ = jnp.broadcast_to(x.sum_TP[source, place_J][None], shape)
            if packing.zero:
                product_RJ -= packing.zero * x_sum_RJ
            scaled_C[c] += product_RJ if scale_RJ1 is None else scale_RJ1[..., 0] * product_RJ
            if dmin_RJ1 is not None:
                minima_C[c] += x_sum_RJ if minimum_RJ1 is None else minimum_RJ1[..., 0] * x_sum_RJ
    block_J = matrix.group_J // (INT8_SPLIT_BLOCK // packing.group_columns)
    for c, source in enumerate(source_C):
        total_RJ = d_RJ1[..., 0] * scaled_C[c].astype(jnp.float32)
        if dmin_RJ1 is not None:
            total_RJ -= dmin_RJ1[..., 0] * minima_C[c].astype(jnp.float32)
        sums_C[c] += total_RJ * x.scale_TB[source, block_J][None]
    return sums_C


def _dot(weights_RJU, x_lanes, byte: int, source_C, column_JU, dtype, interpret: bool):
    """Tensor-core product [R, C] of one lane of a tile, accumulated in float32."""
    weights_RK = weights_RJU.reshape(weights_RJU.shape[0], -1).astype(dtype)
    column_K = column_JU.reshape(-1)
    shape = (*source_C.shape, *column_K.shape)
    x_CK = x_lanes[
        byte, jnp.broadcast_to(source_C[:, None], shape), jnp.broadcast_to(column_K[None], shape)
    ]
    # TF32 for float32 operands: float16 weights are exact in it.
    precision = jax.lax.Precision.DEFAULT if dtype != jnp.float32 or interpret else "tensorfloat32"
    return jax.lax.dot_general(
        weights_RK,
        x_CK,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _dot_step(matrix, packing: Packing | Floats, x_lanes, source_C, sum_RC, interpret: bool):
    """Adds one tile's products to float32 sums [R, C], on tensor cores."""
    if isinstance(packing, Floats):
        column_J = matrix.group_J * WORDS
        weights_RJU = matrix.words("weights", column_J)
        column_JU, dtype = neighbours(column_J), packing.operand_dtype
        return sum_RC + _dot(weights_RJU, x_lanes, 0, source_C, column_JU, dtype, interpret)
    d_RJ1, dmin_RJ1 = packing.supers(matrix)
    for field in range(packing.fields):
        scale_RJ1, offset_RJ1 = d_RJ1, dmin_RJ1
        small_RJ1, minimum_RJ1 = packing.scales(matrix, field)
        if small_RJ1 is not None:
            scale_RJ1 = d_RJ1 * small_RJ1.astype(jnp.float32)
        if dmin_RJ1 is not None and minimum_RJ1 is not None:
            offset_RJ1 = dmin_RJ1 * minimum_RJ1.astype(jnp.float32)
        place_J = packing.place(matrix.group_J, field)
        for part in range(packing.parts):
            codes_RJU = packing.codes(matrix, field, part)
            column_JU = neighbours((place_J * packing.parts + part) * WORDS)
            for byte in range(4):
                weights_RJU = lane(codes_RJU, byte, packing.signed)
                if packing.zero:
                    weights_RJU -= float(packing.zero)
                weights_RJU *= scale_RJ1
                if offset_RJ1 is not None:
                    weights_RJU -= offset_RJ1
                sum_RC += _dot(
                    weights_RJU, x_lanes, byte, source_C, column_JU, jnp.bfloat16, interpret
                )
    return sum_RC


def _kernel(
    items: Items, factor_Y, inputs, matrices, _, y_ref, *, formats, tile: Tile, steps, interpret
):
    first_row, item = pl.program_id(0) * tile.rows, pl.program_id(1)
    integers = tile.tokens <= INT8_SPLIT_ROWS
    packings = [packing_of(name) for name in formats]
    groups = [tile.columns // packing.group_columns for packing in packings]

    @pl.when(item < items.count_1[0])
    def _():
        slot = items.slot_I[item]
        if integers:
            source_C = [items.source_IC[item, c] for c in range(tile.tokens)]
            start = [
                [jnp.zeros((tile.rows, n_groups), jnp.float32) for _ in source_C]
                for n_groups in groups
            ]
        else:
            source_C = items.source_IC[item, :]
            start = [jnp.zeros((tile.rows, tile.tokens), jnp.float32) for _ in packings]

        def body(step, sums):
            advanced = []
            for packing, n_groups, x, planes, total in zip(
                packings, groups, inputs, matrices, sums, strict=True
            ):
                group_J = step * n_groups + jnp.arange(n_groups, dtype=jnp.int32)
                matrix = MatrixTile(planes, slot, first_row, tile.rows, group_J)
                if integers:
                    assert isinstance(packing, Packing)
                    total = _int8_split_step(matrix, packing, x, source_C, total, interpret)
                else:
                    total = _dot_step(matrix, packing, x, source_C, total, interpret)
                advanced.append(total)
            return advanced

        sums = jax.lax.fori_loop(0, steps, body, start)
        row_R = first_row + jnp.arange(tile.rows, dtype=jnp.int32)
        if integers:
            for c in range(tile.tokens):
                target = items.target_IC[item, c]
                out_R = _gate([jnp.sum(rows[c], axis=-1) for rows in sums])
                y_ref[target, row_R] = out_R if factor_Y is None else out_R * factor_Y[target]
        else:
            target_C = items.target_IC[item, :]
            out_RC = _gate(sums)
            if factor_Y is not None:
                out_RC *= factor_Y[target_C][None]
            y_ref[
                jnp.broadcast_to(target_C[None, :], out_RC.shape),
                jnp.broadcast_to(row_R[:, None], out_RC.shape),
            ] = out_RC


def _gate(sums):
    """One matrix: its product. A gated pair: silu(gate) * up."""
    if len(sums) == 1:
        return sums[0]
    gate, up = sums
    return gate / (1 + jnp.exp(-gate)) * up


def grouped_matmul(
    x_XK: jax.Array,
    y_YN: jax.Array | jax.ShapeDtypeStruct,
    matrices: Sequence[Planes],
    formats: Sequence[str],
    items: Items,
    factor_Y: jax.Array | None = None,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """Products of input rows with the matrices in their slots, written to rows of y.

    For every item i, row c and t = target_ic:
    y[t] = factor[t] * (W[slot_i] @ x[source_ic]), or, given a gate and an up matrix,
    factor[t] * silu(gate[slot_i] @ x) * (up[slot_i] @ x).

    Args:
        x_XK: float32 input rows.
        y_YN: float32, updated in place where the caller donates it: other rows keep their values.
            A shape alone leaves them undefined.
        matrices: one or two, as planes with a leading slot axis, of N rows and K columns.
        formats: their names.
        items: of C rows each, a width that `item_rows` gives.
        factor_Y: float32 [Y] or None for one.
        interpret: run the kernel in Pallas's interpreter, on any device.
        tile: its rows and columns divide the matrix; None is that of `choose_tile`.

    Returns:
        y_YN. Accumulated in float32; rounding of the operands as the module says.

    Raises:
        NotImplementedError: a format, shape or size without a kernel, named.
    """
    n_rows, columns = y_YN.shape[1], padded_columns(formats, x_XK.shape[1])
    x_XK = filled_up(x_XK, columns)
    tile = tile or choose_tile(formats, n_rows, columns, items.source_IC.shape[1])
    for name, planes in zip(formats, matrices, strict=True):
        _check_planes(name, planes, n_rows, columns)
    inputs = [_left_operand(x_XK, name, tile.tokens <= INT8_SPLIT_ROWS) for name in formats]
    steps, rest = divmod(columns, tile.columns)
    if rest or n_rows % tile.rows or tile.columns < _FEWEST_COLUMNS:
        raise ValueError(f"{tile} does not divide a matrix [{n_rows}, {columns}] of {formats}")
    operands = (items, factor_Y, inputs, [dict(planes) for planes in matrices])
    n_leading = len(jax.tree.leaves(operands))
    return pl.pallas_call(
        partial(_kernel, formats=tuple(formats), tile=tile, steps=steps, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(y_YN.shape, y_YN.dtype),
        grid=(n_rows // tile.rows, items.slot_I.shape[0]),
        input_output_aliases={n_leading: 0} if isinstance(y_YN, jax.Array) else {},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"matmul_{'_'.join(formats)}_{tile.tokens}",
    )(*operands, y_YN if isinstance(y_YN, jax.Array) else None)
