"""The custom calls of the backend `ggml`, compiled by numba.

Owns four handlers: one matrix on some tokens, experts on their tokens, rows of an embedding, and
attention of tokens to the keys up to their own. A matrix is given as bytes (uint8) or as the
address of its bytes (two uint32); a bank of matrices likewise, an address per slot.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, types

from pallas_kernels.ggml.jobs import FRAME, KIND, SCRATCH, claim, finish_chunk, get, release, run
from pallas_kernels.ggml.machine import (
    NO_ERROR,
    NO_LENGTH,
    NO_MATRIX,
    NO_MEMORY,
    NO_ROW,
    NO_SLOT,
    TABLE,
    TASK,
    U,
    answers_metadata,
    argument,
    call,
    clear,
    copy,
    data,
    error,
    exp,
    floats,
    free,
    from_f16,
    halves,
    integer,
    load_f32,
    load_i32,
    load_i64,
    load_u64,
    malloc,
    njit,
    rank,
    result,
    size,
    store_i64,
)
from pallas_kernels.ggml.products import (
    TO_FLOAT,
    dots,
    four_rows,
    function,
    interleaves,
    padded,
    round_tokens,
    rounded_bytes,
    row_bytes,
    tile,
    whole_blocks,
)

_LINEAR, _EXPERTS, _ATTENTION = range(3)
# Of XLA_FFI_DataType; keys and values of another type are bfloat16.
F16_TYPE, F32_TYPE = 10, 11
_LEAST_ROWS, _MOST_ROWS = 16, 256  # of a chunk; multiples of 8, as the interleaved product wants
_LEAST_PRODUCTS = 65_536  # of a chunk, where that leaves no more rows: some microseconds
_CHUNKS = 16  # of a phase, at least, where that leaves so many rows and products
_TOKENS_ROUNDED = 16  # in a chunk
_NO_SINK = np.float32(-1e30)


@njit
def _matrix(buffer, slot, n_bytes):
    """(address, error's code) of a matrix of a bank; slot -1 is a matrix by itself."""
    if slot >= size(buffer, 0) or slot < -1:
        return U(0), NO_SLOT
    # uint8 [S, rows, row bytes] or uint32 [S, 2]; one axis less by itself.
    in_place = rank(buffer) == (3 if slot >= 0 else 2)
    place = U(max(slot, 0))
    if in_place:
        return data(buffer) + place * U(n_bytes), NO_ERROR
    address = load_u64(data(buffer) + place * U(8))
    return address, NO_ERROR if address != U(0) else NO_MATRIX


@njit
def _chunk_rows(rows, products, groups):
    """Rows of a chunk, each of so many products, so that `groups` matrices make enough chunks."""
    wanted = max(rows * groups // _CHUNKS, _LEAST_PRODUCTS // products)
    return min(max(wanted // 8 * 8, _LEAST_ROWS), _MOST_ROWS)


@njit
def _chunks(rows, products, groups):
    """Chunks of one of these matrices."""
    return -(-rows // _chunk_rows(rows, products, groups))


# One matrix on some tokens. Arguments: x [T, K], matrix, its type [1]. Result: y [T, N]. The
# scratch holds the rounded tokens.


@njit
def _linear(frame):
    x, type_ = argument(frame, 0), integer(argument(frame, 2), 0)
    tokens, columns, rows = size(x, 0), size(x, 1), size(result(frame, 0), 1)
    _, code = _matrix(argument(frame, 1), -1, 0)
    if code:
        return code
    scratch = malloc(U(padded(tokens) * rounded_bytes(type_, columns)))
    if scratch == U(0):
        return NO_MEMORY
    phases = (-(-tokens // _TOKENS_ROUNDED), _chunks(rows, tokens * columns, 1), 0, 0)
    code = run(_LINEAR, frame, scratch, phases, tokens * rows * columns)
    free(scratch)
    return code


@njit
def _linear_chunk(frame, rounded, phase, chunk):
    """Rounds some tokens, then computes some rows."""
    x, y, type_ = argument(frame, 0), result(frame, 0), integer(argument(frame, 2), 0)
    tokens, columns, rows = size(x, 0), size(x, 1), size(y, 1)
    way = interleaves(type_, tokens, rows)
    if phase == 0:
        first = chunk * _TOKENS_ROUNDED
        source, step = data(x) + U(4 * first * columns), min(_TOKENS_ROUNDED, tokens - first)
        target = rounded + U(first * rounded_bytes(type_, columns))
        return round_tokens(type_, way, columns, source, columns, U(0), 1, step, target)
    step = _chunk_rows(rows, tokens * columns, 1)
    first = chunk * step
    step = min(step, rows - first)
    weights, _ = _matrix(argument(frame, 1), -1, 0)
    weights += U(first * row_bytes(type_, columns))
    if tokens == 1:
        return tile(type_, way, columns, weights, step, rounded, tokens, data(y) + U(4 * first))
    part = malloc(U(4 * padded(tokens) * step))
    if part == U(0):
        return NO_MEMORY
    code = tile(type_, way, columns, weights, step, rounded, tokens, part)
    for token in range(tokens):
        there = data(y) + U(4 * (token * rows + first))
        copy(there, part + U(4 * token * step), step)
    free(part)
    return code


# Experts on their tokens. Result: y [A, D]. Arguments: x [T, D filled up], y, weight [A], three
# matrices, numbers [5] (three types, F, the function), slot [I], assignment [I, C], count [],
# scales [R, 3], biases [R, F], [R, F] and [R, D], row [A]; of absent scales and biases R is 0.
# The scratch holds how many rows of activations all items have, in whole groups of four, and how
# many there are before each item, as int64; then those rows, as `_places` says.
(
    X, _, WEIGHT, GATE, UP, DOWN, NUMBERS, SLOT, ASSIGNMENT, COUNT, SCALES, BIAS_GATE, _, _, ROW,
) = range(15)  # fmt: skip
_CLIPPED, _GELU = 1, 2  # functions, as `ops.py` numbers them


@njit
def _type(frame, matrix):
    return integer(argument(frame, NUMBERS), matrix - GATE)


@njit
def _shape(frame, matrix):
    """Rows and columns of gate, up or down."""
    d_model, d_expert = size(result(frame, 0), 1), integer(argument(frame, NUMBERS), 3)
    return (d_model, d_expert) if matrix == DOWN else (d_expert, d_model)


@njit
def _item(frame, item):
    """(address of an item's assignments, how many); padding repeats the first one."""
    width = size(argument(frame, ASSIGNMENT), 1)
    chosen, tokens = data(argument(frame, ASSIGNMENT)) + U(4 * item * width), 1
    while tokens < width and load_i32(chosen + U(4 * tokens)) != load_i32(chosen):
        tokens += 1
    return chosen, tokens


@njit
def _weights(frame, matrix, item):
    """(address, error's code) of one of an item's matrices."""
    slot = integer(argument(frame, SLOT), item)
    if slot < 0:
        return U(0), NO_SLOT
    rows, columns = _shape(frame, matrix)
    n_bytes = rows * row_bytes(_type(frame, matrix), columns)
    return _matrix(argument(frame, matrix), slot, n_bytes)


@njit
def _expert_row(frame, chosen):
    """The row of an item's scales and biases; 0 where there are none."""
    if size(argument(frame, SCALES), 0) == 0:
        return 0
    return integer(argument(frame, ROW), load_i32(chosen))


@njit
def _places(frame, scratch, rows):
    """Where in the scratch begins what gate, up and down read, then the hidden activations and the
    end; gate and up read the same where they have one type."""
    gate, up, down = _type(frame, GATE), _type(frame, UP), _type(frame, DOWN)
    d_model, d_expert = _shape(frame, DOWN)
    hidden = scratch + U(8 * (1 + integer(argument(frame, COUNT), 0)))
    for_gate = hidden + U(4 * rows * whole_blocks(down, d_expert))
    for_down = for_gate + U(rows * rounded_bytes(gate, d_model))
    end = for_down + U(rows * rounded_bytes(down, d_expert))
    if gate == up:
        return for_gate, for_gate, for_down, hidden, end
    return for_gate, end, for_down, hidden, end + U(rows * rounded_bytes(up, d_model))


@njit
def _rounded(frame, scratch, matrix, item):
    """Address of the activations that a matrix reads for an item."""
    row, (_, columns) = load_i64(scratch + U(8 * (1 + item))), _shape(frame, matrix)
    place = _places(frame, scratch, load_i64(scratch))[matrix - GATE]
    return place + U(row * rounded_bytes(_type(frame, matrix), columns))


@njit
def _hidden(frame, scratch, item):
    """(address, floats of a row) of an item's hidden activations."""
    stride = whole_blocks(_type(frame, DOWN), _shape(frame, DOWN)[1])
    place = _places(frame, scratch, load_i64(scratch))[3]
    return place + U(4 * load_i64(scratch + U(8 * (1 + item))) * stride), stride


@njit
def _experts(frame):
    count, n_experts = integer(argument(frame, COUNT), 0), size(argument(frame, SCALES), 0)
    if count > size(argument(frame, ASSIGNMENT), 0):
        return NO_SLOT
    rows, code = 0, NO_ERROR
    for item in range(count):
        chosen, tokens = _item(frame, item)
        rows += padded(tokens)
        expert = _expert_row(frame, chosen)
        if n_experts and (expert < 0 or expert >= n_experts):
            code = max(code, NO_SLOT)
        for matrix in range(GATE, DOWN + 1):
            code = max(code, _weights(frame, matrix, item)[1])
    if code or count <= 0:
        return code
    scratch = malloc(_places(frame, U(0), rows)[4])
    if scratch == U(0):
        return NO_MEMORY
    store_i64(scratch, np.int64(rows))
    before = 0
    for item in range(count):
        store_i64(scratch + U(8 * (1 + item)), np.int64(before))
        before += padded(_item(frame, item)[1])
    d_model, d_expert = _shape(frame, DOWN)
    width = size(argument(frame, ASSIGNMENT), 1)
    hidden_chunks = count * _chunks(d_expert, width * d_model, count)
    phases = count, hidden_chunks, count, count * _chunks(d_model, width * d_expert, count)
    code = run(_EXPERTS, frame, scratch, phases, rows * d_model * d_expert * 3)
    free(scratch)
    return code


@njit
def _experts_chunk(frame, scratch, phase, chunk):
    """Rounds what gate and up read, computes hidden activations, rounds them, computes y."""
    if phase == 0:
        x, chosen = argument(frame, X), _item(frame, chunk)[0]
        stride, choices = size(x, 1), size(result(frame, 0), 0) // size(x, 0)
        code = _round(frame, scratch, GATE, chunk, data(x), stride, chosen, choices)
        if code or _type(frame, GATE) == _type(frame, UP):
            return code
        return _round(frame, scratch, UP, chunk, data(x), stride, chosen, choices)
    if phase == 2:
        source, stride = _hidden(frame, scratch, chunk)
        return _round(frame, scratch, DOWN, chunk, source, stride, U(0), 1)
    rows, columns = _shape(frame, GATE if phase == 1 else DOWN)
    count, products = (
        integer(argument(frame, COUNT), 0),
        size(argument(frame, ASSIGNMENT), 1) * columns,
    )
    step, chunks = _chunk_rows(rows, products, count), _chunks(rows, products, count)
    item, first = chunk // chunks, chunk % chunks * step
    step = min(step, rows - first)
    if phase == 1:
        return _gate_and_up(frame, scratch, item, first, step)
    return _down(frame, scratch, item, first, step)


@njit
def _round(frame, scratch, matrix, item, source, stride, chosen, choices):
    rows, columns = _shape(frame, matrix)
    type_, tokens = _type(frame, matrix), _item(frame, item)[1]
    way, target = interleaves(type_, tokens, rows), _rounded(frame, scratch, matrix, item)
    return round_tokens(type_, way, columns, source, stride, chosen, choices, tokens, target)


@njit
def _product(frame, scratch, matrix, item, first, rows, out):
    """Some rows of an item's matrix times its activations, float32 [padded tokens, rows]."""
    all_rows, columns = _shape(frame, matrix)
    type_, tokens = _type(frame, matrix), _item(frame, item)[1]
    weights = _weights(frame, matrix, item)[0] + U(first * row_bytes(type_, columns))
    rounded = _rounded(frame, scratch, matrix, item)
    way = interleaves(type_, tokens, all_rows)
    return tile(type_, way, columns, weights, rows, rounded, tokens, out)


@njit
def _scale_and_bias(frame, matrix, expert, first, product_R):
    """Applies the epilogue (`reference.Epilogue`) to some rows of the product with a matrix."""
    scales, biases = argument(frame, SCALES), argument(frame, BIAS_GATE + matrix - GATE)
    if size(scales, 0):
        product_R *= load_f32(data(scales) + U(4 * (3 * expert + matrix - GATE)))
    if size(biases, 0):
        at = data(biases) + U(4 * (expert * size(biases, 1) + first))
        product_R += floats(at, len(product_R))


@njit(fastmath={"contract", "arcp", "nsz"})
def _gated(function, gate_R, up_R, out_R):
    """See `reference.gated`; x * sigmoid(2 z) is GELU in its tanh form."""
    one, clip = np.float32(1), np.float32(7)
    if function == _CLIPPED:
        for row in range(len(out_R)):
            gate, up = min(gate_R[row], clip), min(max(up_R[row], -clip), clip)
            out_R[row] = gate / (one + exp(np.float32(-1.702) * gate)) * (up + one)
    elif function == _GELU:
        for row in range(len(out_R)):
            gate = gate_R[row]
            z = np.float32(0.7978845608) * gate * (one + np.float32(0.044715) * gate * gate)
            out_R[row] = gate / (one + exp(np.float32(-2) * z)) * up_R[row]
    else:
        for row in range(len(out_R)):
            out_R[row] = gate_R[row] / (one + exp(-gate_R[row])) * up_R[row]


@njit
def _gate_and_up(frame, scratch, item, first, rows):
    """What the down matrix reads, for some rows of F."""
    chosen, tokens = _item(frame, item)
    part = malloc(U(8 * padded(tokens) * rows))
    if part == U(0):
        return NO_MEMORY
    up = part + U(4 * padded(tokens) * rows)
    code = _product(frame, scratch, GATE, item, first, rows, part)
    if not code:
        code = _product(frame, scratch, UP, item, first, rows, up)
    if code:
        free(part)
        return code
    hidden, stride = _hidden(frame, scratch, item)
    d_expert, expert = _shape(frame, GATE)[0], _expert_row(frame, chosen)
    for token in range(tokens):
        gate_R = floats(part + U(4 * token * rows), rows)
        up_R = floats(up + U(4 * token * rows), rows)
        _scale_and_bias(frame, GATE, expert, first, gate_R)
        _scale_and_bias(frame, UP, expert, first, up_R)
        out_R = floats(hidden + U(4 * (token * stride + first)), rows)
        _gated(integer(argument(frame, NUMBERS), 4), gate_R, up_R, out_R)
        if first == 0:
            at = hidden + U(4 * (token * stride + d_expert))
            clear(at, stride - d_expert)
    free(part)
    return 0


@njit
def _down(frame, scratch, item, first, rows):
    """Some rows of y."""
    chosen, tokens = _item(frame, item)
    part = malloc(U(4 * padded(tokens) * rows))
    if part == U(0):
        return NO_MEMORY
    code = _product(frame, scratch, DOWN, item, first, rows, part)
    expert, d_model = _expert_row(frame, chosen), _shape(frame, DOWN)[0]
    for token in range(tokens):
        assignment = np.int64(load_i32(chosen + U(4 * token)))
        factor = load_f32(data(argument(frame, WEIGHT)) + U(4 * assignment))
        part_R = floats(part + U(4 * token * rows), rows)
        _scale_and_bias(frame, DOWN, expert, first, part_R)
        y_R = floats(data(result(frame, 0)) + U(4 * (assignment * d_model + first)), rows)
        for row in range(rows):
            y_R[row] = part_R[row] * factor
    free(part)
    return code


# Rows of an embedding. Arguments: ids [N], matrix, its type and how many rows it has [2]. Result:
# float32 [N, K].


@njit
def _rows(frame):
    ids, numbers, out = argument(frame, 0), argument(frame, 2), result(frame, 0)
    type_, columns = integer(numbers, 0), size(out, 1)
    n_bytes, convert = row_bytes(type_, columns), function(type_, TO_FLOAT)
    weights, code = _matrix(argument(frame, 1), -1, 0)
    if code:
        return code
    for i in range(size(ids, 0)):
        row = integer(ids, i)
        if row < 0 or row >= integer(numbers, 1):
            return NO_ROW
        source, target = weights + U(row * n_bytes), data(out) + U(4 * i * columns)
        if convert != U(0):
            call(convert, (source, target, np.int64(columns)))
        else:  # float32
            copy(target, source, columns)
    return NO_ERROR


# Attention of tokens to the keys up to their own. Arguments: q [B, T, H, d], keys and values
# [L, B, C, G, d], layer [], positions [B, T], scale [1], window [1] (0 for none), sinks [H] or [0].
# Result: float32 [B, T, H * d]; zeros for a position of C or more.
#
# A chunk is some neighbouring tokens of a sequence and some query heads of one key/value head: its
# queries share each block of keys, which is made float32 once. A query goes through its keys block
# by block with the greatest score so far (Milakov and Gimelshein, arXiv 1805.02867). Blocks begin
# at multiples of `_BLOCK`, so a query's bits depend on its own keys alone.
_BLOCK = 64  # keys
_HEADS, _QUERIES = 8, 32  # of a chunk, at most


@njit
def _float_rows(address, kind, stride, rows, width, scratch):
    """(address, floats from row to row) of rows of keys or values as float32.

    `stride` counts the elements from row to row. Of another type than float32 they are made in
    `scratch`.
    """
    if kind == F32_TYPE:
        return address, stride
    for row in range(rows):
        row_d = floats(scratch + U(4 * row * width), width)
        bits_d = halves(address + U(2 * row * stride), width)
        if kind == F16_TYPE:
            for i in range(width):
                row_d[i] = from_f16(bits_d[i])
        else:
            for i in range(width):
                row_d[i] = np.int32(np.int32(bits_d[i]) << 16).view(np.float32)
    return scratch, width


@njit(fastmath={"contract"})
def _add_rows(out_d, factor_C, rows, stride):
    """Adds rows times their factors, four at a time."""
    count, width, step = len(factor_C), len(out_d), U(4 * stride)
    for c in range(0, count - count % 4, 4):
        row0_d, row1_d, row2_d, row3_d = four_rows(rows, c, step, width)
        factor0, factor1 = factor_C[c], factor_C[c + 1]
        factor2, factor3 = factor_C[c + 2], factor_C[c + 3]
        for i in range(width):
            out_d[i] += (
                factor0 * row0_d[i] + factor1 * row1_d[i]
                + factor2 * row2_d[i] + factor3 * row3_d[i]
            )  # fmt: skip
    for c in range(count - count % 4, count):
        row_d, factor = floats(rows + U(c) * step, width), factor_C[c]
        for i in range(width):
            out_d[i] += factor * row_d[i]


@njit(fastmath={"reassoc", "contract", "nsz"})
def _softmax(scores_C, most):
    """(new greatest score, sum) of e to the scores less the greatest, which take their place."""
    for i in range(len(scores_C)):
        most = max(most, scores_C[i])
    total = np.float32(0)
    for i in range(len(scores_C)):
        scores_C[i] = exp(scores_C[i] - most)
    for i in range(len(scores_C)):
        total += scores_C[i]
    return most, total


@njit(fastmath={"contract"})
def _multiply(out_d, factor):
    for i in range(len(out_d)):
        out_d[i] *= factor


@njit
def _keys_seen(frame, token):
    """(first, behind the last) key that a token attends to; both 0 for padding."""
    position, window = integer(argument(frame, 4), token), integer(argument(frame, 6), 0)
    if position < 0 or position >= size(argument(frame, 1), 2):
        return 0, 0
    return max(position + 1 - window, 0) if window > 0 else 0, position + 1


@njit
def _cut(frame):
    """(heads, tokens) of a chunk."""
    q = argument(frame, 0)
    heads = min(size(q, 2) // size(argument(frame, 1), 3), _HEADS)
    return heads, max(min(size(q, 1), _QUERIES // heads), 1)


@njit
def _attention(frame):
    q, keys, layer = argument(frame, 0), argument(frame, 1), integer(argument(frame, 3), 0)
    if layer < 0 or layer >= size(keys, 0):
        return NO_LENGTH
    batch, tokens, heads, kv_heads = size(q, 0), size(q, 1), size(q, 2), size(keys, 3)
    seen = 0
    for token in range(batch * tokens):
        first, behind = _keys_seen(frame, token)
        seen += behind - first
    of_chunk, tokens_of_chunk = _cut(frame)
    chunks = batch * -(-tokens // tokens_of_chunk) * kv_heads * -(-heads // kv_heads // of_chunk)
    return run(_ATTENTION, frame, U(0), (chunks, 0, 0, 0), 2 * seen * heads * size(q, 3))


@njit
def _queries(frame, chunk):
    """(sequence, first token, tokens, key/value head, first query head, heads) of a chunk."""
    q, kv_heads = argument(frame, 0), size(argument(frame, 1), 3)
    tokens, group, (of_chunk, tokens_of_chunk) = size(q, 1), size(q, 2) // kv_heads, _cut(frame)
    pieces, runs = -(-group // of_chunk), -(-tokens // tokens_of_chunk)
    place, kv_head = chunk // pieces // kv_heads, chunk // pieces % kv_heads
    sequence, token, head = place // runs, place % runs * tokens_of_chunk, chunk % pieces * of_chunk
    n_tokens, n_heads = min(tokens_of_chunk, tokens - token), min(of_chunk, group - head)
    return sequence, sequence * tokens + token, n_tokens, kv_head, kv_head * group + head, n_heads


@njit
def _attention_chunk(frame, chunk):
    q, keys, out = argument(frame, 0), argument(frame, 1), data(result(frame, 0))
    heads, width, length, kv_heads = size(q, 2), size(q, 3), size(keys, 2), size(keys, 3)
    kind = load_i32(keys + U(16))  # XLA_FFI_DataType
    sequence, token, n_tokens, kv_head, first_head, n_heads = _queries(frame, chunk)
    # Per query the greatest score, the sum and the scores of a block; then a block's rows.
    queries = n_tokens * n_heads
    scratch = malloc(U(4 * (queries * (2 + _BLOCK) + _BLOCK * width)))
    if scratch == U(0):
        return NO_MEMORY
    most_Q, total_Q = floats(scratch, queries), floats(scratch + U(4 * queries), queries)
    scores, converted = scratch + U(8 * queries), scratch + U(4 * queries * (2 + _BLOCK))
    oldest, behind = length, 0
    for query in range(queries):
        own_token, head = token + query // n_heads, first_head + query % n_heads
        first, last = _keys_seen(frame, own_token)
        if last:
            oldest, behind = min(oldest, first), max(behind, last)
        clear(out + U(4 * (own_token * heads + head) * width), width)
        most_Q[query], total_Q[query] = _NO_SINK, np.float32(0)
        if size(argument(frame, 7), 0):
            # A score more, without a value.
            most_Q[query], total_Q[query] = load_f32(data(argument(frame, 7)) + U(4 * head)), 1
    row_0 = (integer(argument(frame, 3), 0) * size(q, 0) + sequence) * length
    n_bytes, scale = 4 if kind == F32_TYPE else 2, load_f32(data(argument(frame, 5)))
    for block in range(oldest // _BLOCK, -(-behind // _BLOCK)):
        begin, end = max(block * _BLOCK, oldest), min(block * _BLOCK + _BLOCK, behind)
        offset = U(((row_0 + begin) * kv_heads + kv_head) * width * n_bytes)
        for is_value in range(2):
            rows = data(argument(frame, 1 + is_value)) + offset
            rows, step = _float_rows(rows, kind, kv_heads * width, end - begin, width, converted)
            for query in range(queries):
                own_token, head = token + query // n_heads, first_head + query % n_heads
                first, last = _keys_seen(frame, own_token)
                first, last = max(first, begin), min(last, end)
                if first >= last:
                    continue
                own_rows = rows + U(4 * (first - begin) * step)
                scores_C = floats(scores + U(4 * query * _BLOCK), last - first)
                at = U(4 * (own_token * heads + head) * width)
                out_d = floats(out + at, width)
                if is_value:
                    _add_rows(out_d, scores_C, own_rows, step)
                    continue
                clear(scores + U(4 * query * _BLOCK), last - first)
                dots(floats(data(q) + at, width), own_rows, step, scale, scores_C)
                most, total = _softmax(scores_C, most_Q[query])
                if most > most_Q[query]:
                    factor = exp(most_Q[query] - most)
                    _multiply(out_d, factor)
                    total_Q[query] *= factor
                most_Q[query] = most
                total_Q[query] += total
    for query in range(queries):
        own_token, head = token + query // n_heads, first_head + query % n_heads
        if total_Q[query] > 0:
            out_d = floats(out + U(4 * (own_token * heads + head) * width), width)
            _multiply(out_d, np.float32(1) / total_Q[query])
    free(scratch)
    return NO_ERROR


@njit
def _work(job):
    """Does chunks of a job until none is left."""
    kind, frame, scratch = get(job, KIND), U(get(job, FRAME)), U(get(job, SCRATCH))
    while True:
        phase, chunk = claim(job)
        if phase < 0:
            return
        if kind == _LINEAR:
            finish_chunk(job, _linear_chunk(frame, scratch, phase, chunk))
        elif kind == _EXPERTS:
            finish_chunk(job, _experts_chunk(frame, scratch, phase, chunk))
        else:
            finish_chunk(job, _attention_chunk(frame, chunk))


def _room_stamp() -> int:
    """Changes with every source of this room.

    numba's cache of a function looks at that function's own file alone. As a constant of each
    handler the stamp is part of its key there.
    """
    texts = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return int(hashlib.sha256(b"".join(texts)).hexdigest()[:12], 16)


def _compiled(stamp: int) -> dict[str, Any]:
    """The handlers and the task of a helper, from numba's cache or made now."""
    handler = cfunc(types.uint64(types.uint64), cache=True)

    @cfunc(types.void(types.uint64), cache=True)
    def task(job):
        if stamp:
            _work(job)
            release(job)

    @handler
    def linear(frame):
        return U(0) if answers_metadata(frame, stamp) else error(frame, _linear(frame))

    @handler
    def experts(frame):
        return U(0) if answers_metadata(frame, stamp) else error(frame, _experts(frame))

    @handler
    def rows(frame):
        return U(0) if answers_metadata(frame, stamp) else error(frame, _rows(frame))

    @handler
    def attention(frame):
        return U(0) if answers_metadata(frame, stamp) else error(frame, _attention(frame))

    return {
        "task": task, "linear": linear, "experts": experts, "rows": rows, "attention": attention,
    }  # fmt: skip


HANDLERS = _compiled(_room_stamp())
TABLE[TASK] = HANDLERS.pop("task").address
