"""The chunks of ggml's products: some rows of a quantised matrix times some rows of activations.

Owns the one tile that the dense op and the expert op are made of, in both of its ways: a dot
product per row and token, or, for many tokens, ggml's product of eight interleaved rows with four
tokens. Activations are rounded by ggml, as llama.cpp does. A token's result depends on how many
tokens its tile has only through the choice between the two.
"""

import numpy as np
from numba import njit

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
    free,
    load_i32,
    malloc,
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


@njit
def function(type_, name):
    """Address of a function of a weight type."""
    return entry(TYPES + TYPE_WORDS * type_ + name)


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
    """Bytes of a row of activations as a type's products want them."""
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
    for first in range(0, tokens, _TOKEN_TILE):
        last = min(tokens, first + _TOKEN_TILE)
        for row in range(rows):
            at = weights + U(row * weight_bytes)
            for token in range(first, last):
                there, x = out + U(4 * (token * rows + row)), rounded + U(token * n_bytes)
                call(dot, (np.int32(columns), there, none, at, none, x, none, np.int32(1)))
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
