"""The custom calls of the backend `ggml`, compiled by numba.

Owns four handlers: one matrix on some tokens, experts on their tokens, rows of an embedding, and
attention of single tokens to the keys up to their own. A matrix is given as bytes (uint8) or as the
address of its bytes (two uint32); a bank of matrices likewise, an address per slot.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from pallas_kernels.ggml.jobs import (
    ARGUMENTS,
    ERROR,
    KIND,
    PHASE,
    call_helpers,
    claim,
    finish_chunk,
    get,
    new_job,
    put,
    release,
    wait_until_done,
    work_here,
)
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
    call_convert,
    data,
    error,
    exp,
    floats,
    free,
    from_bits,
    from_f16,
    halves,
    load_f32,
    load_i32,
    load_u64,
    malloc,
    rank,
    result,
    size,
    store_i64,
    store_u64,
)
from pallas_kernels.ggml.products import (
    TO_FLOAT,
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
# Of XLA_FFI_DataType; anything else here is bfloat16.
F16_TYPE, F32_TYPE = 10, 11
_LEAST_ROWS, _MOST_ROWS = 16, 256  # of a chunk; multiples of 8, as the interleaved product wants
_CHUNKS = 16  # of a phase, at least, where the rows allow it
_TOKENS_ROUNDED = 16  # in a chunk
_NO_SINK = np.float32(-1e30)

# Words of a linear job.
L_SOURCES, L_WEIGHTS, L_OUT, L_TYPE, L_ROWS, L_COLUMNS, L_TOKENS, L_ROUNDED, L_CHUNK, L_WAY = range(
    ARGUMENTS, ARGUMENTS + 10
)
# Words of an expert job: three matrices' types and, per item, addresses in `E_ITEMS`.
(
    E_TYPE, _, _, E_OUT, E_FACTORS, E_ITEMS, E_HIDDEN, E_D, E_F, E_CHUNK_F, E_CHUNK_D,
    E_ASSIGNMENTS, E_WIDTH, E_N_F, E_N_D, E_FUNCTION, E_SCALED, E_BIASED, E_SCALES, E_BIAS_GATE,
    E_BIAS_UP, E_BIAS_DOWN,
) = range(ARGUMENTS, ARGUMENTS + 22)  # fmt: skip
_CLIPPED, _GELU = 1, 2  # of E_FUNCTION, as `ops.py` numbers them
# Words of an attention job; HEADS are the query heads of a key/value head.
(
    A_Q, A_KEYS, A_VALUES, A_POSITIONS, A_OUT, A_TOKENS, A_HEADS, A_KV_HEADS, A_WIDTH, A_LENGTH,
    A_KIND, A_SCALE, A_WINDOW, A_SINKS,
) = range(ARGUMENTS, ARGUMENTS + 14)  # fmt: skip
# Words of an item: tokens, the first row of its hidden activations, its row of scales and biases,
# then addresses.
(
    I_TOKENS, I_FIRST, I_ROW, I_GATE, I_UP, I_DOWN, I_SOURCES, I_ROUNDED, I_ROUNDED_UP,
    I_ROUNDED_DOWN,
) = range(10)  # fmt: skip
_ITEM_BYTES = 8 * 10


@njit
def _chunk_rows(rows, groups):
    """Rows of a chunk, so that `groups` matrices of `rows` make enough of them."""
    wanted = rows * groups // _CHUNKS // 8 * 8
    return min(max(wanted, _LEAST_ROWS), _MOST_ROWS)


@njit
def _linear_chunk(job, phase, chunk):
    type_, columns = get(job, L_TYPE), get(job, L_COLUMNS)
    tokens, way = get(job, L_TOKENS), get(job, L_WAY) == 1
    rounded = U(get(job, L_ROUNDED))
    if phase == 0:
        first = chunk * _TOKENS_ROUNDED
        return round_tokens(
            type_, way, columns, U(get(job, L_SOURCES)), first,
            min(_TOKENS_ROUNDED, tokens - first), rounded,
        )  # fmt: skip
    rows, step = get(job, L_ROWS), get(job, L_CHUNK)
    first = chunk * step
    step = min(step, rows - first)
    weights = U(get(job, L_WEIGHTS)) + U(first * row_bytes(type_, columns))
    out = U(get(job, L_OUT))
    if tokens == 1:
        return tile(type_, way, columns, weights, step, rounded, tokens, out + U(4 * first))
    part = malloc(U(4 * padded(tokens) * step))
    if part == U(0):
        return NO_MEMORY
    code = tile(type_, way, columns, weights, step, rounded, tokens, part)
    for token in range(tokens):
        floats(out + U(4 * (token * rows + first)), step)[:] = floats(
            part + U(4 * token * step), step
        )
    free(part)
    return code


@njit
def _experts_chunk(job, phase, chunk):
    d_model, d_expert = get(job, E_D), get(job, E_F)
    if phase == 0:
        return _round_item(job, U(get(job, E_ITEMS)) + U(chunk * _ITEM_BYTES), d_model)
    if phase == 1:
        item = U(get(job, E_ITEMS)) + U(chunk // get(job, E_N_F) * _ITEM_BYTES)
        first = chunk % get(job, E_N_F) * get(job, E_CHUNK_F)
        return _gate_and_up(job, item, first, min(get(job, E_CHUNK_F), d_expert - first))
    if phase == 2:
        item = U(get(job, E_ITEMS)) + U(chunk * _ITEM_BYTES)
        return _round_hidden(job, item, d_expert)
    item = U(get(job, E_ITEMS)) + U(chunk // get(job, E_N_D) * _ITEM_BYTES)
    first = chunk % get(job, E_N_D) * get(job, E_CHUNK_D)
    return _down(job, item, first, min(get(job, E_CHUNK_D), d_model - first))


@njit
def _round_item(job, item, d_model):
    d_expert, tokens = get(job, E_F), get(item, I_TOKENS)
    sources = U(get(item, I_SOURCES))
    for matrix in range(2):
        target = U(get(item, I_ROUNDED + matrix))
        if matrix == 1 and target == U(get(item, I_ROUNDED)):
            return 0  # both matrices read the same
        type_ = get(job, E_TYPE + matrix)
        way = interleaves(type_, tokens, d_expert)
        code = round_tokens(type_, way, d_model, sources, 0, tokens, target)
        if code:
            return code
    return 0


@njit
def _assignment(job, item, token):
    """Which assignment the token of an item is."""
    number = (item - U(get(job, E_ITEMS))) // U(_ITEM_BYTES)
    chosen = U(get(job, E_ASSIGNMENTS)) + U(4 * np.int64(number) * get(job, E_WIDTH))
    return np.int64(load_i32(chosen + U(4 * token)))


@njit
def _scale(job, item, matrix):
    return load_f32(U(get(job, E_SCALES)) + U(4 * (3 * get(item, I_ROW) + matrix)))


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
def _add(out_R, bias_R):
    for row in range(len(out_R)):
        out_R[row] += bias_R[row]


@njit
def _gate_and_up(job, item, first, rows):
    """What the down matrix reads, for some rows of F."""
    d_model, d_expert, tokens = get(job, E_D), get(job, E_F), get(item, I_TOKENS)
    part = malloc(U(8 * padded(tokens) * rows))
    if part == U(0):
        return NO_MEMORY
    for matrix in range(2):
        type_ = get(job, E_TYPE + matrix)
        weights = U(get(item, I_GATE + matrix)) + U(first * row_bytes(type_, d_model))
        code = tile(
            type_, interleaves(type_, tokens, d_expert), d_model, weights, rows,
            U(get(item, I_ROUNDED + matrix)), tokens, part + U(4 * matrix * padded(tokens) * rows),
        )  # fmt: skip
        if code:
            free(part)
            return code
    stride = whole_blocks(get(job, E_TYPE + 2), d_expert)
    hidden = U(get(job, E_HIDDEN)) + U(4 * get(item, I_FIRST) * stride)
    up = part + U(4 * padded(tokens) * rows)
    for token in range(tokens):
        gate_R = floats(part + U(4 * token * rows), rows)
        up_R = floats(up + U(4 * token * rows), rows)
        out_R = floats(hidden + U(4 * (token * stride + first)), rows)
        if get(job, E_SCALED):
            gate_R *= _scale(job, item, 0)
            up_R *= _scale(job, item, 1)
        if get(job, E_BIASED):
            at = U(4 * (get(item, I_ROW) * d_expert + first))
            _add(gate_R, floats(U(get(job, E_BIAS_GATE)) + at, rows))
            _add(up_R, floats(U(get(job, E_BIAS_UP)) + at, rows))
        _gated(get(job, E_FUNCTION), gate_R, up_R, out_R)
        if first == 0:
            floats(hidden + U(4 * (token * stride + d_expert)), stride - d_expert)[:] = 0
    free(part)
    return 0


@njit
def _round_hidden(job, item, d_expert):
    type_, tokens = get(job, E_TYPE + 2), get(item, I_TOKENS)
    sources = malloc(U(8 * tokens))
    if sources == U(0):
        return NO_MEMORY
    stride = whole_blocks(type_, d_expert)
    hidden = U(get(job, E_HIDDEN)) + U(4 * get(item, I_FIRST) * stride)
    for token in range(tokens):
        store_u64(sources + U(8 * token), hidden + U(4 * token * stride))
    way = interleaves(type_, tokens, get(job, E_D))
    code = round_tokens(type_, way, d_expert, sources, 0, tokens, U(get(item, I_ROUNDED_DOWN)))
    free(sources)
    return code


@njit
def _down(job, item, first, rows):
    d_model, d_expert, tokens = get(job, E_D), get(job, E_F), get(item, I_TOKENS)
    part = malloc(U(4 * padded(tokens) * rows))
    if part == U(0):
        return NO_MEMORY
    type_ = get(job, E_TYPE + 2)
    weights = U(get(item, I_DOWN)) + U(first * row_bytes(type_, d_expert))
    code = tile(
        type_, interleaves(type_, tokens, d_model), d_expert, weights, rows,
        U(get(item, I_ROUNDED_DOWN)), tokens, part,
    )  # fmt: skip
    for token in range(tokens):
        assignment = _assignment(job, item, token)
        factor = load_f32(U(get(job, E_FACTORS)) + U(4 * assignment))
        part_R = floats(part + U(4 * token * rows), rows)
        if get(job, E_SCALED):
            part_R *= _scale(job, item, 2)
        if get(job, E_BIASED):
            at = U(4 * (get(item, I_ROW) * d_model + first))
            _add(part_R, floats(U(get(job, E_BIAS_DOWN)) + at, rows))
        out_R = floats(U(get(job, E_OUT)) + U(4 * (assignment * d_model + first)), rows)
        for row in range(rows):
            out_R[row] = part_R[row] * factor
    free(part)
    return code


@njit
def _read_row(address, kind, row_d):
    """A row of keys or values as float32."""
    if kind == F32_TYPE:
        row_d[:] = floats(address, len(row_d))
        return
    bits_d = halves(address, len(row_d))
    if kind == F16_TYPE:
        for i in range(len(row_d)):
            row_d[i] = from_f16(bits_d[i])
    else:
        for i in range(len(row_d)):
            row_d[i] = from_bits(np.int32(bits_d[i]) << np.int32(16))


@njit(fastmath={"reassoc", "contract", "nsz"})
def _dot(a_d, b_d):
    total = np.float32(0)
    for i in range(len(a_d)):
        total += a_d[i] * b_d[i]
    return total


@njit(fastmath={"contract"})
def _add_scaled(out_d, factor, row_d):
    for i in range(len(out_d)):
        out_d[i] += factor * row_d[i]


@njit(fastmath={"reassoc", "contract", "nsz"})
def _softmax(scores_C, sink):
    """In place, not divided by the sum, which is returned; it has `sink` as one score more."""
    most, total = max(scores_C[0], sink), np.float32(0)
    for i in range(len(scores_C)):
        most = max(most, scores_C[i])
    for i in range(len(scores_C)):
        scores_C[i] = exp(scores_C[i] - most)
    for i in range(len(scores_C)):
        total += scores_C[i]
    return total + exp(sink - most) if sink > _NO_SINK else total


@njit
def _attention_chunk(job, chunk):
    """One token and key/value head: its query heads attend to the keys of the token's window."""
    kv_heads, group, width = get(job, A_KV_HEADS), get(job, A_HEADS), get(job, A_WIDTH)
    token, kv_head = chunk // kv_heads, chunk % kv_heads
    length, kind = get(job, A_LENGTH), get(job, A_KIND)
    first = (token * kv_heads + kv_head) * group * width
    out = U(get(job, A_OUT)) + U(4 * first)
    floats(out, group * width)[:] = np.float32(0)
    position = np.int64(load_i32(U(get(job, A_POSITIONS)) + U(4 * token)))
    if position < 0 or position >= length:
        return NO_ERROR
    count, query = min(position + 1, get(job, A_WINDOW)), U(get(job, A_Q)) + U(4 * first)
    n_bytes = width * (4 if kind == F32_TYPE else 2)
    oldest = token // get(job, A_TOKENS) * length + position + 1 - count
    start = U((oldest * kv_heads + kv_head) * n_bytes)
    scratch = malloc(U(4 * (group * count + width)))
    if scratch == U(0):
        return NO_MEMORY
    row_d, scale = floats(scratch, width), load_f32(U(get(job, A_SCALE)))
    scores = scratch + U(4 * width)
    for c in range(count):
        _read_row(U(get(job, A_KEYS)) + start + U(c * kv_heads * n_bytes), kind, row_d)
        for head in range(group):
            score = _dot(floats(query + U(4 * head * width), width), row_d) * scale
            floats(scores + U(4 * (head * count + c)), 1)[0] = score
    for head in range(group):
        scores_C = floats(scores + U(4 * head * count), count)
        sink = _NO_SINK
        if get(job, A_SINKS):
            sink = load_f32(U(get(job, A_SINKS)) + U(4 * (kv_head * group + head)))
        total = _softmax(scores_C, sink)
        for c in range(count):
            scores_C[c] /= total
    for c in range(count):
        _read_row(U(get(job, A_VALUES)) + start + U(c * kv_heads * n_bytes), kind, row_d)
        for head in range(group):
            weight = floats(scores + U(4 * (head * count + c)), 1)[0]
            _add_scaled(floats(out + U(4 * head * width), width), weight, row_d)
    free(scratch)
    return NO_ERROR


@njit
def _work(job):
    """Does chunks of a job until none is left."""
    kind = get(job, KIND)
    while True:
        phase, chunk = claim(job)
        if phase < 0:
            return
        if kind == _LINEAR:
            finish_chunk(job, _linear_chunk(job, phase, chunk))
        elif kind == _EXPERTS:
            finish_chunk(job, _experts_chunk(job, phase, chunk))
        else:
            finish_chunk(job, _attention_chunk(job, chunk))


@njit
def _run(frame, job, products):
    """Does a job with helpers; returns an error's code."""
    call_helpers(frame, job, products)
    work_here(job)
    wait_until_done(job, get(job, PHASE + 4))
    code = get(job, ERROR)
    release(job)
    return code


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
def _linear(frame):
    x, matrix, type_, y = (
        argument(frame, 0),
        argument(frame, 1),
        argument(frame, 2),
        result(frame, 0),
    )
    number = np.int64(load_i32(data(type_)))
    tokens, columns, rows = size(x, 0), size(x, 1), size(y, 1)
    weights, code = _matrix(matrix, -1, 0)
    if code:
        return code
    way = interleaves(number, tokens, rows)
    scratch = malloc(U(8 * tokens + padded(tokens) * rounded_bytes(number, columns)))
    step = _chunk_rows(rows, 1)
    job = new_job(_LINEAR, -(-tokens // _TOKENS_ROUNDED), -(-rows // step), 0, 0)
    if scratch == U(0) or job == U(0):
        free(scratch)
        free(job)
        return NO_MEMORY
    for token in range(tokens):
        store_u64(scratch + U(8 * token), data(x) + U(4 * token * columns))
    put(job, L_SOURCES, scratch)
    put(job, L_WEIGHTS, weights)
    put(job, L_OUT, data(y))
    put(job, L_TYPE, number)
    put(job, L_ROWS, rows)
    put(job, L_COLUMNS, columns)
    put(job, L_TOKENS, tokens)
    put(job, L_ROUNDED, scratch + U(8 * tokens))
    put(job, L_CHUNK, step)
    put(job, L_WAY, 1 if way else 0)
    code = _run(frame, job, tokens * rows * columns)
    free(scratch)
    return code


@njit
def _item_tokens(chosen, width):
    """Assignments of an item: those after it that repeat the first are padding."""
    tokens = 1
    while tokens < width and load_i32(chosen + U(4 * tokens)) != load_i32(chosen):
        tokens += 1
    return tokens


@njit
def _experts(frame):
    """Arguments: x [T, D filled up], y [A,D], weight [A], gate, up, down, numbers [5] (three types,
    F, the function), slot [I], assignment [I,C], count [], scales [R,3], biases [R,F], [R,F] and
    [R,D], row [A]; of absent scales and biases R is 0. Result: y."""
    x, weight, numbers = argument(frame, 0), argument(frame, 2), data(argument(frame, 6))
    slots, assignments = data(argument(frame, 7)), argument(frame, 8)
    count = np.int64(load_i32(data(argument(frame, 9))))
    if count == 0:
        return NO_ERROR
    width, y = size(assignments, 1), result(frame, 0)
    d_model, x_stride = size(y, 1), size(x, 1)
    d_expert = np.int64(load_i32(numbers + U(12)))
    scale_rows, bias_rows = size(argument(frame, 10), 0), size(argument(frame, 11), 0)
    per_token = size(y, 0) // size(x, 0)
    if count > size(assignments, 0):
        return NO_SLOT
    total, most = 0, 0
    for item in range(count):
        tokens = _item_tokens(data(assignments) + U(4 * item * width), width)
        total += padded(tokens)
        most = max(most, tokens)
    kinds = (
        np.int64(load_i32(numbers)), np.int64(load_i32(numbers + U(4))),
        np.int64(load_i32(numbers + U(8))),
    )  # fmt: skip
    # Both matrices read the same rounded activations where their types round alike.
    shared = kinds[0] == kinds[1]
    bytes_x, bytes_up = rounded_bytes(kinds[0], d_model), rounded_bytes(kinds[1], d_model)
    bytes_h, h_stride = rounded_bytes(kinds[2], d_expert), whole_blocks(kinds[2], d_expert)
    needed = count * _ITEM_BYTES + total * (8 + bytes_x + 4 * h_stride + bytes_h)
    scratch = malloc(U(needed + (0 if shared else total * bytes_up)))
    step_f, step_d = _chunk_rows(d_expert, count), _chunk_rows(d_model, count)
    n_f, n_d = -(-d_expert // step_f), -(-d_model // step_d)
    job = new_job(_EXPERTS, count, count * n_f, count, count * n_d)
    if scratch == U(0) or job == U(0):
        free(scratch)
        free(job)
        return NO_MEMORY
    sources = scratch + U(count * _ITEM_BYTES)
    hidden = sources + U(8 * total)
    rounded = hidden + U(4 * total * h_stride)
    rounded_h = rounded + U(total * bytes_x)
    rounded_up = rounded if shared else rounded_h + U(total * bytes_h)
    first, code = 0, NO_ERROR
    for number in range(count):
        item = scratch + U(number * _ITEM_BYTES)
        chosen = data(assignments) + U(4 * number * width)
        tokens = _item_tokens(chosen, width)
        slot = np.int64(load_i32(slots + U(4 * number)))
        expert_row = np.int64(0)
        if scale_rows > 0:
            expert_row = np.int64(load_i32(data(argument(frame, 14)) + U(4 * load_i32(chosen))))
            if expert_row < 0 or expert_row >= scale_rows:
                code = max(code, NO_SLOT)
        store_i64(item + U(8 * I_ROW), expert_row)
        for matrix in range(3):
            rows, columns = (d_model, d_expert) if matrix == 2 else (d_expert, d_model)
            n_bytes = rows * row_bytes(kinds[matrix], columns)
            bank = argument(frame, 3 + matrix)
            address, failed = _matrix(bank, slot, n_bytes) if slot >= 0 else (U(0), NO_SLOT)
            code = max(code, failed)
            store_u64(item + U(8 * (I_GATE + matrix)), address)
        for token in range(tokens):
            row = np.int64(load_i32(chosen + U(4 * token))) // per_token
            store_u64(sources + U(8 * (first + token)), data(x) + U(4 * row * x_stride))
        store_i64(item + U(8 * I_TOKENS), np.int64(tokens))
        store_i64(item + U(8 * I_FIRST), np.int64(first))
        store_u64(item + U(8 * I_SOURCES), sources + U(8 * first))
        store_u64(item + U(8 * I_ROUNDED), rounded + U(first * bytes_x))
        store_u64(item + U(8 * I_ROUNDED_UP), rounded_up + U(first * bytes_up))
        store_u64(item + U(8 * I_ROUNDED_DOWN), rounded_h + U(first * bytes_h))
        first += padded(tokens)
    if code:
        free(scratch)
        free(job)
        return code
    for matrix in range(3):
        put(job, E_TYPE + matrix, kinds[matrix])
    put(job, E_OUT, data(y))
    put(job, E_FACTORS, data(weight))
    put(job, E_ITEMS, scratch)
    put(job, E_HIDDEN, hidden)
    put(job, E_D, d_model)
    put(job, E_F, d_expert)
    put(job, E_CHUNK_F, step_f)
    put(job, E_CHUNK_D, step_d)
    put(job, E_ASSIGNMENTS, data(assignments))
    put(job, E_WIDTH, width)
    put(job, E_N_F, n_f)
    put(job, E_N_D, n_d)
    put(job, E_FUNCTION, np.int64(load_i32(numbers + U(16))))
    put(job, E_SCALED, scale_rows)
    put(job, E_BIASED, bias_rows)
    for stack in range(4):
        put(job, E_SCALES + stack, data(argument(frame, 10 + stack)))
    code = _run(frame, job, total * d_model * d_expert * 3)
    free(scratch)
    return code


@njit
def _rows(frame):
    """Arguments: ids [N], matrix, type []; result: float32 [N, K]."""
    ids, matrix, out = argument(frame, 0), argument(frame, 1), result(frame, 0)
    number = np.int64(load_i32(data(argument(frame, 2))))
    n_rows = np.int64(load_i32(data(argument(frame, 2)) + U(4)))
    columns = size(out, 1)
    n_bytes, convert = row_bytes(number, columns), function(number, TO_FLOAT)
    weights, code = _matrix(matrix, -1, 0)
    if code:
        return code
    for i in range(size(ids, 0)):
        row = np.int64(load_i32(data(ids) + U(4 * i)))
        if row < 0 or row >= n_rows:
            return NO_ROW
        source, target = weights + U(row * n_bytes), data(out) + U(4 * i * columns)
        if convert != U(0):
            call_convert(convert, source, target, np.int64(columns))
        else:  # float32
            floats(target, columns)[:] = floats(source, columns)
    return NO_ERROR


@njit
def _attention(frame):
    """Arguments: q [B,T,H,d], keys and values [L,B,C,G,d], layer [], positions [B,T], scale [1],
    window [1] (0 for none), sinks [H] or [0].

    Result: float32 [B,T,H*d]; zeros for a position of C or more.
    """
    q, keys, positions = argument(frame, 0), argument(frame, 1), argument(frame, 4)
    batch, tokens, heads, width = size(q, 0), size(q, 1), size(q, 2), size(q, 3)
    length, kv_heads = size(keys, 2), size(keys, 3)
    layer = np.int64(load_i32(data(argument(frame, 3))))
    if layer < 0 or layer >= size(keys, 0):
        return NO_LENGTH
    kind = load_i32(keys + U(16))  # XLA_FFI_DataType
    n_bytes = 4 if kind == F32_TYPE else 2
    layer_bytes = batch * length * kv_heads * width * n_bytes
    window = np.int64(load_i32(data(argument(frame, 6))))
    if window <= 0:
        window = length
    longest = 0
    for i in range(batch * tokens):
        position = load_i32(data(positions) + U(4 * i))
        if position >= 0 and position < length:
            longest = max(longest, min(position + 1, window))
    job = new_job(_ATTENTION, batch * tokens * kv_heads, 0, 0, 0)
    if job == U(0):
        return NO_MEMORY
    put(job, A_Q, data(q))
    put(job, A_KEYS, data(keys) + U(layer * layer_bytes))
    put(job, A_VALUES, data(argument(frame, 2)) + U(layer * layer_bytes))
    put(job, A_POSITIONS, data(positions))
    put(job, A_OUT, data(result(frame, 0)))
    put(job, A_TOKENS, tokens)
    put(job, A_HEADS, heads // kv_heads)
    put(job, A_KV_HEADS, kv_heads)
    put(job, A_WIDTH, width)
    put(job, A_LENGTH, length)
    put(job, A_KIND, kind)
    put(job, A_SCALE, data(argument(frame, 5)))
    put(job, A_WINDOW, window)
    put(job, A_SINKS, data(argument(frame, 7)) if size(argument(frame, 7), 0) > 0 else U(0))
    return _run(frame, job, 2 * batch * tokens * heads * width * longest)


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
        if answers_metadata(frame, stamp):
            return U(0)
        return error(frame, _linear(frame))

    @handler
    def experts(frame):
        if answers_metadata(frame, stamp):
            return U(0)
        return error(frame, _experts(frame))

    @handler
    def rows(frame):
        if answers_metadata(frame, stamp):
            return U(0)
        return error(frame, _rows(frame))

    @handler
    def attention(frame):
        if answers_metadata(frame, stamp):
            return U(0)
        return error(frame, _attention(frame))

    return {
        "task": task, "linear": linear, "experts": experts, "rows": rows, "attention": attention,
    }  # fmt: skip


HANDLERS = _compiled(_room_stamp())
TABLE[TASK] = HANDLERS.pop("task").address
