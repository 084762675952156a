"""The chunks of ggml's products: some rows of a quantised matrix times some rows of activations.

Owns the one tile that the dense op and the expert op are made of, in its three ways. For "ggml" it
is a dot product per row and token, or, for many tokens, ggml's product of eight interleaved rows
with four tokens; activations are rounded by ggml, as llama.cpp does. For "ggml_f32", whose types
have no dot product, rows are unpacked by ggml and multiplied in float32. A token's result depends
on how many tokens its tile has only through the choice between the first two.
"""

import numpy as np

from pallas_kernels.ggml.library import TypeFunctions
from pallas_kernels.ggml.machine import (
    NO_MEMORY,
    TYPE_WORDS,
    TYPES,
    U,
    call,
    clear,
    copy,
    entry,
    floats,
    free,
    load_i32,
    malloc,
    njit,
    store_i32,
    store_i64,
    store_u64,
)

# Words of a type in the table.
(
    BLOCK_WEIGHTS, BLOCK_BYTES, TO_FLOAT, VEC_DOT, FROM_FLOAT, ROUNDED_WEIGHTS, ROUNDED_BYTES,
    REPACK, QUANTIZE_MAT, GEMM, GEMM_TOKENS,
) = range(len(TypeFunctions._fields))  # fmt: skip
_TENSOR_BYTES = 400  # of `struct ggml_tensor` in ggml.h
_TOKEN_TILE = 16  # rounded activations that stay in the first cache beside a row
_UNPACKED = 4096  # weights unpacked at a time, but whole rows, and four of them at least
_PANEL = 1024  # columns of four rows, which stay in the first cache while all tokens pass


@njit
def function(type_, name):
    """Address of a function of a weight type."""
    return entry(TYPES + TYPE_WORDS * type_ + name)


@njit
def four_rows(rows, first, step, width):
    """Four neighbouring rows of `width` floats, `step` bytes from row to row."""
    at = rows + U(first) * step
    two, three = U(2) * step, U(3) * step
    return (
        floats(at, width), floats(at + step, width), floats(at + two, width),
        floats(at + three, width),
    )  # fmt: skip


@njit(fastmath={"reassoc", "contract", "nsz"})
def dots(x_K, rows, stride, scale, out_R):
    """Adds scaled products of x with rows, float32, four at a time: x is read once for them.

    From row to row there are `stride` floats.
    """
    count, width, step = len(out_R), len(x_K), U(4 * stride)
    for r in range(0, count - count % 4, 4):
        row0_K, row1_K, row2_K, row3_K = four_rows(rows, r, step, width)
        sum0 = sum1 = sum2 = sum3 = np.float32(0)
        for i in range(width):
            sum0 += x_K[i] * row0_K[i]
            sum1 += x_K[i] * row1_K[i]
            sum2 += x_K[i] * row2_K[i]
            sum3 += x_K[i] * row3_K[i]
        out_R[r] += sum0 * scale
        out_R[r + 1] += sum1 * scale
        out_R[r + 2] += sum2 * scale
        out_R[r + 3] += sum3 * scale
    for r in range(count - count % 4, count):
        row_K, total = floats(rows + U(r) * step, width), np.float32(0)
        for i in range(width):
            total += x_K[i] * row_K[i]
        out_R[r] += total * scale


@njit
def field(type_, name):
    """An integer of a weight type."""
    return np.int64(function(type_, name))


@njit
def whole_blocks(type_, columns):
    """Columns of a row of weights with its last block filled up."""
    block = field(type_, BLOCK_WEIGHTS)
    return (columns + block - 1) // block * block


@njit
def row_bytes(type_, columns):
    """Bytes of a row of weights."""
    return whole_blocks(type_, columns) // field(type_, BLOCK_WEIGHTS) * field(type_, BLOCK_BYTES)


@njit
def rounded_bytes(type_, columns):
    """Bytes of a row of activations as a type's products want them: rounded, or float32."""
    columns = whole_blocks(type_, columns)
    return columns // field(type_, ROUNDED_WEIGHTS) * field(type_, ROUNDED_BYTES)


@njit
def interleaves(type_, tokens, rows):
    """Whether so many tokens take the interleaved product."""
    return function(type_, GEMM) != U(0) and tokens >= field(type_, GEMM_TOKENS) and rows % 8 == 0


@njit
def padded(tokens):
    """Tokens in whole groups of four."""
    return (tokens + 3) // 4 * 4


@njit
def _row(x, stride, chosen, choices, token):
    """Address of what `token` reads of float32 rows x: its own row, or of an assignment's token."""
    row = np.int64(load_i32(chosen + U(4 * token))) // choices if chosen != U(0) else token
    return x + U(4 * row * stride)


@njit
def round_tokens(type_, interleaved, columns, x, stride, chosen, choices, tokens, target):
    """Rounds the activations of some tokens as the products with a weight type want them.

    A row of x has `stride` floats, of which those for whole blocks of weights are read. Token t
    reads row t, or where `chosen` is not 0 and points to assignments, row chosen[t] // choices.
    `target` is room for all tokens in whole groups of four; missing rows of the last are zeros.
    Returns an error's code.
    """
    n_bytes, columns = rounded_bytes(type_, columns), whole_blocks(type_, columns)
    if not interleaved:
        for token in range(tokens):
            source = _row(x, stride, chosen, choices, token)
            there = target + U(token * n_bytes)
            if function(type_, FROM_FLOAT) == U(0):
                copy(there, source, columns)
            else:
                call(function(type_, FROM_FLOAT), (source, there, np.int64(columns)))
        return 0
    group = malloc(U(16 * columns))
    if group == U(0):
        return NO_MEMORY
    for start in range(0, tokens, 4):
        for i in range(4):
            row = group + U(4 * i * columns)
            if start + i < tokens:
                copy(row, _row(x, stride, chosen, choices, start + i), columns)
            else:
                clear(row, columns)
        there = target + U(start * n_bytes)
        call(function(type_, QUANTIZE_MAT), (group, there, np.int64(4), np.int64(columns)))
    free(group)
    return 0


@njit
def tile(type_, interleaved, columns, weights, rows, rounded, tokens, out):
    """`rows` rows at `weights` times `tokens` rounded rows: float32 [padded tokens, rows].

    Returns an error's code.
    """
    weight_bytes, n_bytes = row_bytes(type_, columns), rounded_bytes(type_, columns)
    columns = whole_blocks(type_, columns)
    if interleaved:
        return _interleaved_tile(type_, columns, weights, rows, rounded, tokens, out)
    dot, none = function(type_, VEC_DOT), U(0)
    if dot == none:
        return _float32_tile(type_, columns, weights, rows, rounded, tokens, out)
    for first in range(0, tokens, _TOKEN_TILE):
        last = min(tokens, first + _TOKEN_TILE)
        for row in range(rows):
            at = weights + U(row * weight_bytes)
            for token in range(first, last):
                there, x = out + U(4 * (token * rows + row)), rounded + U(token * n_bytes)
                call(dot, (np.int32(columns), there, none, at, none, x, none, np.int32(1)))
    return 0


@njit
def _float32_tile(type_, columns, weights, rows, x, tokens, out):
    unpack, weight_bytes, step = function(type_, TO_FLOAT), row_bytes(type_, columns), rows
    unpacked = weights
    if unpack != U(0):
        step = min(rows, max(_UNPACKED // columns // 4, 1) * 4)
        unpacked = malloc(U(4 * step * columns))
        if unpacked == U(0):
            return NO_MEMORY
    for first in range(0, rows, step):
        step = min(step, rows - first)
        if unpack != U(0):
            source = weights + U(first * weight_bytes)
            call(unpack, (source, unpacked, np.int64(step * columns)))
        for token in range(tokens):
            clear(out + U(4 * (token * rows + first)), step)
        for start in range(0, columns, _PANEL):
            width, panel = min(_PANEL, columns - start), unpacked + U(4 * start)
            for token in range(tokens):
                x_K = floats(x + U(4 * (token * columns + start)), width)
                out_R = floats(out + U(4 * (token * rows + first)), step)
                dots(x_K, panel, columns, np.float32(1), out_R)
    if unpack != U(0):
        free(unpacked)
    return 0


@njit
def _interleaved_tile(type_, columns, weights, rows, rounded, tokens, out):
    n_bytes = U(rows * row_bytes(type_, columns))
    # `struct ggml_tensor`: type, lengths of four axes, data.
    tensor = malloc(U(_TENSOR_BYTES) + n_bytes)
    if tensor == U(0):
        return NO_MEMORY
    blocks = tensor + U(_TENSOR_BYTES)
    store_i32(tensor, np.int32(type_))
    store_i64(tensor + U(16), np.int64(columns))
    store_i64(tensor + U(24), np.int64(rows))
    store_i64(tensor + U(32), np.int64(1))
    store_i64(tensor + U(40), np.int64(1))
    store_u64(tensor + U(248), blocks)
    call(function(type_, REPACK), (tensor, weights, n_bytes))
    tokens = np.int32(padded(tokens))
    call(
        function(type_, GEMM),
        (np.int32(columns), out, U(rows), blocks, rounded, tokens, np.int32(rows)),
    )
    free(tensor)
    return 0
