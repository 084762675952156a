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

Slot numbers, rows and the number of items are data; nothing recompiles when a cache changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import INT8_SPLIT_BLOCK, Int8Split, int8_split, lanes
from pallas_kernels.formats import FORMATS, get_format
from pallas_kernels.formats.packing import WORDS, Floats, Packing, lane
from pallas_kernels.reference import Planes, filled_up


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        rows: matrix rows of a program (R); a power of two.
        columns: matrix columns of a step of its loop; a power of two, at least 64.
        tokens: input rows of an item (C); a power of two. Up to `MOST_INT8_SPLIT_ROWS` the product
            is in integers, from 16 on tensor cores; nothing in between.
        warps: warps of a program.
        stages: software-pipelining depth.
    """

    rows: int
    columns: int
    tokens: int
    warps: int = 4
    stages: int = 2


MOST_INT8_SPLIT_ROWS = 8
FEWEST_DOT_ROWS = 16  # what a tensor-core instruction takes; fewer rows are padded
_COLUMNS = 256  # of which a matrix has a multiple
_ROWS = 16
_FEWEST_COLUMNS = 64  # of a step: the widest group


class Items(NamedTuple):
    """Which input rows meet which slot, and where their results go; padded as `reference.Work`.

    Attributes:
        slot_I: int32 [I].
        source_IC: int32 [I, C], rows of x.
        target_IC: int32 [I, C], rows of y.
        count_1: int32 [1]; items from there on are not computed.
    """

    slot_I: jax.Array
    source_IC: jax.Array
    target_IC: jax.Array
    count_1: jax.Array


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


class _Matrix:
    """The part of one matrix under a program: R rows of a slot, J groups (`packing.MatrixTile`)."""

    def __init__(self, refs, slot, first_row, tile_rows: int, group_J):
        self._refs, self._slot, self.group_J = refs, slot, group_J
        self._row_R = first_row + jnp.arange(tile_rows, dtype=jnp.int32)

    def at(self, plane, column_J):
        return self._load(plane, column_J[:, None])

    def words(self, plane, column_J):
        return self._load(plane, _neighbours(column_J))

    def _load(self, plane, column_JU):
        shape = (*self._row_R.shape, *column_JU.shape)
        row_RJU = jnp.broadcast_to(self._row_R[:, None, None], shape)
        column_RJU = jnp.broadcast_to(column_JU[None], shape)
        return self._refs[plane][self._slot, row_RJU, column_RJU]


def _neighbours(column_J):
    """int32 [J, U]: the four columns from each on."""
    return column_J[:, None] + jnp.arange(WORDS, dtype=jnp.int32)[None, :]


def _dot4(codes, int8_split, total, signed: bool, interpret: bool):
    """`total` plus the sum over the bytes of each word of code * digit, int32; int8_split are
    int8.
    """
    int8_split = jnp.broadcast_to(int8_split, codes.shape)
    if not interpret:
        kind = "s32" if signed else "u32"
        [product] = plgpu.elementwise_inline_asm(
            f"dp4a.{kind}.s32 $0, $1, $2, $3;",
            args=[codes, int8_split, total],
            constraints="=r,r,r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32)],
        )
        return product
    for byte in range(4):
        code = codes << (24 - 8 * byte)
        code = code.astype(jnp.int32) >> 24 if signed else (code >> 24).astype(jnp.int32)
        total += code * ((int8_split << (24 - 8 * byte)).astype(jnp.int32) >> 24)
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
                word_JU = _neighbours((place_J * packing.parts + part) * WORDS)
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
        column_JU, dtype = _neighbours(column_J), packing.operand_dtype
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
            column_JU = _neighbours((place_J * packing.parts + part) * WORDS)
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
    integers = tile.tokens <= MOST_INT8_SPLIT_ROWS
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
                matrix = _Matrix(planes, slot, first_row, tile.rows, group_J)
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
    tile: Tile,
    factor_Y: jax.Array | None = None,
    interpret: bool = False,
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
        items: with C = `tile.tokens`.
        tile: its rows and columns must divide the matrix.
        factor_Y: float32 [Y] or None for one.
        interpret: run the kernel in Pallas's interpreter, on any device.

    Returns:
        y_YN. Accumulated in float32; rounding of the operands as the module says.

    Raises:
        NotImplementedError: a format, shape or size without a kernel, named.
    """
    n_rows, columns = y_YN.shape[1], padded_columns(formats, x_XK.shape[1])
    x_XK = filled_up(x_XK, columns)
    for name, planes in zip(formats, matrices, strict=True):
        _check_planes(name, planes, n_rows, columns)
    inputs = [_left_operand(x_XK, name, tile.tokens <= MOST_INT8_SPLIT_ROWS) for name in formats]
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
