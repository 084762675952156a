"""Both ops on raw GGUF blocks on a CPU, inside compiled programs.

Owns the matrices as blocks (`RawMatrix`), what the backend covers, and the calls of its handlers.
Rounding of "ggml": activations to 8 bits in blocks of 32 or 256, as ggml does for each weight type;
products are summed in float32 in one of ggml's two orders, by how many rows the product has
(`products.py`). So a row's result depends neither on the slot of its expert nor on other experts,
but in its last bits on how many rows share it. "ggml_f32" rounds no activations: ggml unpacks
weights to float32, and a row has the same bits whatever rows share its product.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import get_format
from pallas_kernels.ggml import library
from pallas_kernels.reference import Bank, Epilogues, ExpertFunction, Signature, Work, filled_up

ON_BLOCKS = ("ggml", "ggml_f32")  # the implementations of this room
THREADS_VARIABLE = "NPROC"  # XLA's CPU client reads it when it is made


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data",),
    meta_fields=("rows", "columns", "bytes"),
)
@dataclass(frozen=True)
class RawMatrix:
    """A matrix [rows, columns], or a bank of them, as GGUF blocks.

    `data` are the blocks, uint8 [..., rows, row bytes], or their addresses in this process, uint32
    [..., 2], low word first. Whoever makes addresses keeps alive what they point to.
    """

    data: Any
    rows: int
    columns: int
    bytes: int  # of one matrix

    @property
    def in_place(self) -> bool:
        """Whether `data` holds the blocks' bytes; otherwise it holds their addresses."""
        return self.data.dtype == np.uint8

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, wherever they lie."""
        lead = self.data.shape[: -2 if self.in_place else -1]
        return int(np.prod(lead, dtype=np.int64)) * self.bytes


def address_of(raw: np.ndarray) -> np.ndarray:
    """Where the bytes of an array begin, uint32 [2], low word first."""
    if not raw.flags.c_contiguous:
        raise RuntimeError("raw blocks are not contiguous")
    return np.asarray([raw.ctypes.data], "<u8").view("<u4")


@functools.cache
def check_available(platform: str | None = None) -> None:
    """Refuses where the backend cannot run at all, on `platform` or this process's device.

    Raises:
        NotImplementedError: no CPU device, no numba, no libggml, or a processor without AVX2.
    """
    device = jax.devices(platform)[0]
    if device.platform != "cpu":
        raise NotImplementedError(
            f"backend 'ggml' computes on a CPU, and this process has {device.device_kind}; set "
            "JAX_PLATFORMS=cpu, or take 'triton' or 'xla'"
        )
    if importlib.util.find_spec("numba") is None:
        raise NotImplementedError(
            "backend 'ggml' needs the package numba; install it, or take 'xla'"
        )
    library.check_processor()


def checks(*format_names: str, platform: str | None = None) -> dict[str, Callable[[], None]]:
    """For each implementation of this room what refuses it, on `platform` or this process's device.

    They raise NotImplementedError, which names the weight type that ggml has no product for.
    """

    def check(implementation: str) -> None:
        check_available(platform)
        for name in format_names:
            library.type_functions(name, implementation)

    return {name: functools.partial(check, name) for name in ON_BLOCKS}


# Numbers by which the handlers know the functions of `reference.gated`.
_FUNCTIONS = {"swiglu": 0, "clipped_swiglu": 1, "geglu": 2}


@functools.cache
def _ready() -> None:
    """Registers the handlers, once in a process."""
    from pallas_kernels.ggml import handlers, machine

    machine.read_api()
    wanted = os.environ.get(THREADS_VARIABLE, "")
    machine.TABLE[machine.THREADS] = int(wanted) if wanted.isdecimal() else default_threads()
    for name, handler in handlers.HANDLERS.items():
        capsule = jax.ffi.pycapsule(handler.ctypes)
        jax.ffi.register_ffi_target(f"hobbit_jax_{name}", capsule, platform="cpu")


@functools.cache
def _number(format_name: str, implementation: str) -> int:
    """By which the handlers then know a weight type and what becomes of its activations."""
    from pallas_kernels.ggml import machine

    _ready()
    number = get_format(format_name).number
    number += machine.IN_FLOAT32 if implementation == "ggml_f32" else 0
    words = library.type_functions(format_name, implementation)
    start = machine.TYPES + machine.TYPE_WORDS * number
    machine.TABLE[start : start + len(words)] = words
    return number


def default_threads() -> int:
    """The processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def set_threads(threads: int) -> None:
    """Sets how many threads a product uses, the calling one included. Call it before the first one.

    XLA's own pool, whose threads they are, gets as many if no device was used so far.

    Raises:
        ValueError: fewer than one.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; want 1 or more (--threads)")
    os.environ[THREADS_VARIABLE] = str(threads)


def linear(
    x: jax.Array, matrix: RawMatrix, format_name: str, implementation: str = "ggml"
) -> jax.Array:
    """x [..., K] times the transpose of a matrix [N, K]: float32 [..., N]."""
    x_TK = x.reshape(-1, matrix.columns)
    result = jax.ShapeDtypeStruct((x_TK.shape[0], matrix.rows), jnp.float32)
    call = jax.ffi.ffi_call("hobbit_jax_linear", result)
    number = np.asarray([_number(format_name, implementation)], np.int32)
    return call(x_TK, matrix.data, number).reshape(*x.shape[:-1], matrix.rows)


def take_rows(ids: jax.Array, matrix: RawMatrix, format_name: str) -> jax.Array:
    """Rows `ids` [...] as float32 [..., K]; an id outside of the matrix is an XLA error."""
    ids_N = ids.reshape(-1)
    result = jax.ShapeDtypeStruct((ids_N.shape[0], matrix.columns), jnp.float32)
    about = np.asarray([_number(format_name, "ggml_f32"), matrix.rows], np.int32)
    rows = jax.ffi.ffi_call("hobbit_jax_rows", result)(ids_N, matrix.data, about)
    return rows.reshape(*ids.shape, matrix.columns)


def expert_ffn(
    x_TD: jax.Array,
    y_AD: jax.Array,
    weight_A: jax.Array,
    bank: Bank,
    signature: Signature,
    work: Work,
    function: ExpertFunction,
    epilogues: Epilogues | None,
    implementation: str = "ggml",
) -> jax.Array:
    """The op of `pallas_kernels.expert_ffn`; see there."""
    columns = max(get_format(name).padded(x_TD.shape[1]) for name in signature[:2])
    numbers = (_number(name, implementation) for name in signature)
    about = [*numbers, bank.gate.rows, _FUNCTIONS[function]]
    every, row_A = epilogues or ([None] * 4, np.zeros(0, np.int32))
    stacks = (np.zeros((0, 0), np.float32) if stack is None else stack for stack in every)
    result = jax.ShapeDtypeStruct(y_AD.shape, jnp.float32)
    call = jax.ffi.ffi_call("hobbit_jax_experts", result, input_output_aliases={1: 0})
    return call(
        filled_up(x_TD, columns), y_AD, weight_A, *(matrix.data for matrix in bank),
        np.asarray(about, np.int32), work.slot_I, work.assignment_IC, work.count.reshape(()),
        *stacks, row_A,
    )  # fmt: skip


def attention(
    q_BTHd: jax.Array,
    k_LBCGd: jax.Array,
    v_LBCGd: jax.Array,
    layer: jax.Array,
    positions_BT: jax.Array,
    scale: float | None = None,
    window: int = 0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention of each token to the keys up to its own position, [B, T, H * d].

    Reads no key behind them and none before the window, so its time does not grow with C, and
    neither do its bits depend on it. Keys and values are float32, float16 or bfloat16; sums are
    float32. Key c stands at position c; a token at C or behind gets zeros. `scale` (None: 1 over
    the square root of d), `window` and sinks are as in `models.attention.GroupedQuery`.
    """
    _ready()
    batch, tokens, heads, width = q_BTHd.shape
    result = jax.ShapeDtypeStruct((batch, tokens, heads * width), jnp.float32)
    call = jax.ffi.ffi_call("hobbit_jax_attention", result)
    sinks = np.zeros(0, np.float32) if sinks_H is None else sinks_H
    factor = np.float32(1) / np.sqrt(np.float32(width)) if scale is None else scale
    about = np.asarray([factor], np.float32), np.asarray([window], np.int32)
    return call(q_BTHd, k_LBCGd, v_LBCGd, layer.astype(jnp.int32), positions_BT, *about, sinks)
