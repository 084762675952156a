"""Machine words for numba: memory at an address, calls through a pointer, and XLA's FFI structures.

Owns what a compiled function needs to be a handler of `jax.ffi` without a C compiler: loads, stores
and atomic additions at addresses, calls of functions known by address only, and the fields of
`XLA_FFI_CallFrame` and `XLA_FFI_Buffer`. The process's own addresses stand in one table, which
machine code knows as the external symbol `TABLE`: so numba can keep the code in its cache, and
every process resolves the symbol to its own table.

Source: jaxlib's include/xla/ffi/api/c_api.h, whose list of functions is read for their places.
"""

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

import jax.ffi
import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.np.numpy_support import carray

intrinsic: Any = extending.intrinsic  # whose functions lose their first parameter
# Called by compiled functions alone: Python's way in would be a sixth of the compilation.
_njit: Any = numba.njit
njit = functools.partial(_njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
I64, F32 = ir.IntType(64), ir.FloatType()
U = np.uint64

SYMBOL = "hobbit_jax_ggml_table"
# Words of the table. Error messages follow, then weight types, which `ops.py` fills.
THREADS, TASK, SCHEDULE, ERROR_CREATE, ERROR_DESTROY, VERSION_MINOR, VERSION_MAJOR = range(7)
# Codes of errors, in the order of MESSAGE_TEXTS.
NO_ERROR, NO_MEMORY, NO_SLOT, NO_MATRIX, NO_ROW, NO_LENGTH = range(6)
MESSAGE_TEXTS = (
    b"",
    b"ggml backend: no memory for a product's scratch; free some, or take fewer tokens at a time",
    b"ggml backend: an expert's slot lies outside of its bank",
    b"ggml backend: a matrix has no address: its expert was never loaded",
    b"ggml backend: a token id lies outside of the vocabulary",
    b"ggml backend: the KV cache has no array for this layer",
)
MESSAGES, TYPES, TYPE_WORDS, N_TYPES = 8, 32, 12, 128
# Added to the number of a weight type whose activations stay float32.
IN_FLOAT32 = 64
TABLE = np.zeros(TYPES + TYPE_WORDS * N_TYPES, np.uint64)
_messages = [ctypes.create_string_buffer(text) for text in MESSAGE_TEXTS]
TABLE[MESSAGES : MESSAGES + len(_messages)] = [ctypes.addressof(text) for text in _messages]
llvmlite.binding.add_symbol(SYMBOL, TABLE.ctypes.data)

malloc = types.ExternalFunction("malloc", types.uint64(types.uint64))
free = types.ExternalFunction("free", types.void(types.uint64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())
usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def _pointer(builder, address, type_):
    return builder.inttoptr(address, type_.as_pointer())


@intrinsic
def table(_):
    """Address of `TABLE` in this process."""

    def build(context, builder, signature, args):
        known = builder.module.globals.get(SYMBOL)
        symbol = known or ir.GlobalVariable(builder.module, I64, SYMBOL)
        symbol.linkage = "external"
        return builder.ptrtoint(symbol, I64)

    return types.uint64(), build


def _access(kind):
    """What loads and what stores a value at an address, aligned or not."""

    @intrinsic
    def load(_, address):
        def build(context, builder, signature, args):
            pointer = _pointer(builder, args[0], context.get_value_type(kind))
            return builder.load(pointer, align=1)

        return kind(types.uint64), build

    @intrinsic
    def store(_, address, value):
        def build(context, builder, signature, args):
            pointer = _pointer(builder, args[0], context.get_value_type(kind))
            builder.store(args[1], pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.uint64, kind), build

    return load, store


load_u64, store_u64 = _access(types.uint64)
load_i64, store_i64 = _access(types.int64)
load_i32, store_i32 = _access(types.int32)
load_f32, _ = _access(types.float32)


@njit
def entry(index):
    """A word of `TABLE`."""
    return load_u64(table() + U(8 * index))


@intrinsic
def _void_pointer(_, address):
    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), build


@njit
def floats(address, count):
    """float32 [count] at an address: loops over it become vector instructions."""
    return carray(_void_pointer(address), (count,), np.float32)


@njit
def copy(target, source, count):
    """Copies float32 numbers; numba's own assignment of slices takes ten times as long."""
    target_N, source_N = floats(target, count), floats(source, count)
    for i in range(count):
        target_N[i] = source_N[i]


@njit
def clear(target, count):
    """Sets float32 numbers to zero."""
    target_N = floats(target, count)
    for i in range(count):
        target_N[i] = np.float32(0)


@njit
def halves(address, count):
    """uint16 [count] at an address."""
    return carray(_void_pointer(address), (count,), np.uint16)


@intrinsic
def from_f16(_, bits):
    """The float32 of a float16's bits."""

    def build(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), F32)

    return types.float32(types.uint16), build


@njit(fastmath={"contract"})
def exp(x):
    """e**x in float32 to 2 units in the last place, without a branch: from -87 to 88.

    Source: Cephes, expf.c.
    """
    f = np.float32
    x = min(max(x, f(-87)), f(88))
    n = np.floor(x * f(1.44269504) + f(0.5))
    r = x - n * f(0.693359375) - n * f(-2.12194440e-4)
    y = f(1.9875691500e-4)
    y = y * r + f(1.3981999507e-3)
    y = y * r + f(8.3334519073e-3)
    y = y * r + f(4.1665795894e-2)
    y = y * r + f(1.6666665459e-1)
    y = y * r + f(5.0000001201e-1)
    y = y * r * r + r + f(1)
    return y * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@intrinsic
def add_i64(_, address, value):
    """Adds to an integer that other threads add to; returns what it was."""

    def build(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.uint64, types.int64), build


@intrinsic
def shared_i64(_, address):
    """An integer that other threads write."""

    def build(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.uint64), build


@intrinsic
def call(_, function, arguments):
    """Calls the C function at an address; the types of the tuple are those of its parameters.

    Returns 64 bits, which mean nothing where the function returns nothing.
    """

    def build(context, builder, signature, args):
        parameters = [context.get_value_type(kind) for kind in arguments]
        pointer = _pointer(builder, args[0], ir.FunctionType(I64, parameters))
        return builder.call(pointer, cgutils.unpack_tuple(builder, args[1]))

    return types.uint64(types.uint64, arguments), build


@intrinsic
def _on_stack(_, words):
    """Address of a tuple of words, good until the calling function returns."""

    def build(context, builder, signature, args):
        return builder.ptrtoint(cgutils.alloca_once_value(builder, args[0]), I64)

    return types.uint64(words), build


@njit
def argument(frame, index):
    """Address of the `XLA_FFI_Buffer` of an argument."""
    return load_u64(load_u64(frame + U(72)) + U(8 * index))


@njit
def result(frame, index):
    """Address of the `XLA_FFI_Buffer` of a result."""
    return load_u64(load_u64(frame + U(112)) + U(8 * index))


@njit
def data(buffer):
    """Address of a buffer's elements."""
    return load_u64(buffer + U(24))


@njit
def rank(buffer):
    """Number of a buffer's axes."""
    return load_i64(buffer + U(32))


@njit
def size(buffer, axis):
    """Length of an axis."""
    return load_i64(load_u64(buffer + U(40)) + U(8 * axis))


@njit
def integer(buffer, i):
    """Element `i` of a buffer of int32."""
    return np.int64(load_i32(data(buffer) + U(4 * i)))


@njit
def answers_metadata(frame, stamp):
    """Whether XLA only asks for the handler's version, which is then written.

    `stamp` is not 0; see `handlers.py`.
    """
    extension = load_u64(frame + U(8))
    if stamp == 0 or extension == U(0) or load_i32(extension + U(8)) != 1:
        return False
    metadata = load_u64(extension + U(24))
    store_i32(metadata + U(24), np.int32(entry(VERSION_MAJOR)))
    store_i32(metadata + U(28), np.int32(entry(VERSION_MINOR)))
    store_i32(metadata + U(32), np.int32(0))
    return True


@njit
def call_xla(frame, place, words):
    """Calls the function of `XLA_FFI_Api` whose place is a word of the table; returns its result.

    Its arguments are a structure: its size, a pointer to extensions, and then these uint64.
    """
    arguments = _on_stack((U(16 + 8 * len(words)), U(0), *words))
    return call(load_u64(load_u64(frame + U(16)) + entry(place)), (arguments,))


@njit
def error(frame, code):
    """An `XLA_FFI_Error` with a message of the table; 0 for code 0."""
    if code == 0:
        return U(0)
    internal = U(13)  # a broken invariant, not a bad input
    return call_xla(frame, ERROR_CREATE, (entry(MESSAGES + code), internal))


@functools.cache
def read_api() -> None:
    """Reads version and places of `XLA_FFI_Api`'s functions into the table.

    Raises:
        NotImplementedError: jaxlib's header is missing or of another major version.
    """
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text() if header.is_file() else ""
    version = [re.search(rf"define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    names = re.findall(r"^  _XLA_FFI_API_STRUCT_FIELD\((\w+)\);", text, re.MULTILINE)
    major, minor = (int(match.group(1)) if match else -1 for match in version)
    wanted = ("XLA_FFI_ThreadPool_Schedule", "XLA_FFI_Error_Create", "XLA_FFI_Error_Destroy")
    if major != 0 or not set(wanted) <= set(names):
        raise NotImplementedError(
            f"backend 'ggml' needs XLA's FFI of major version 0 with {', '.join(wanted)}, and "
            f"{header} is missing or differs; take 'xla'"
        )
    TABLE[VERSION_MAJOR], TABLE[VERSION_MINOR] = major, minor
    first = 48  # after the structure's size, extensions, version and internal functions
    places = [first + 8 * names.index(name) for name in wanted]
    TABLE[SCHEDULE], TABLE[ERROR_CREATE], TABLE[ERROR_DESTROY] = places
