"""ggml's functions in the wheel `libggml-python`, by address.

Owns the loading of the two libraries and the table of what each weight type can do: the dot product
of a row with activations that were rounded to 8 bits (`vec_dot`, `from_float`), the unpacking of a
row (`to_float`), and on x86 the product of eight interleaved rows with four activations (`repack`,
`quantize_mat`, `gemm`). Source: ggml.h, ggml-cpu.h; repack.cpp for the third, which has no C
interface and is found by its mangled C++ names.
"""

import ctypes
import functools
import importlib.util
import platform
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.formats import get_format

# Types whose interleaved product ggml vectorises for AVX2 (arch/x86/repack.cpp): the types of block
# and activations as its template writes them, and from how many tokens of one matrix on it is
# faster: it begins with interleaving the matrix
# (docs/log/2026-12-01-attention-and-calls-on-a-cpu.md).
_INTERLEAVED = {
    "Q4_0": ("block_q4_0", 8, 4),
    "IQ4_NL": ("block_iq4_nl", 8, 4),
    "Q4_K": ("block_q4_K", 15, 16),
}
_SUFFIXES = (".so", ".dylib", ".dll")


class _Traits(ctypes.Structure):  # ggml_type_traits
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block_weights", ctypes.c_int64),
        ("block_weights_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    ]  # and more


class _CpuTraits(ctypes.Structure):  # ggml_type_traits_cpu
    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
    ]  # and more


class TypeFunctions(NamedTuple):
    """One weight type: its block, and addresses of its functions; 0 where ggml has none.

    Without a `vec_dot`, activations stay float32, and rows are unpacked.
    """

    block_weights: int
    block_bytes: int
    to_float: int
    vec_dot: int = 0
    from_float: int = 0  # of the activations' type
    activation_block_weights: int = 1
    activation_block_bytes: int = 4
    repack: int = 0
    quantize_mat: int = 0
    gemm: int = 0
    gemm_tokens: int = 0  # the least for which the interleaved product is faster


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    spec = importlib.util.find_spec("libggml")
    if spec is None or spec.origin is None:
        raise NotImplementedError(
            "backend 'ggml' needs the package libggml-python; install it, or take 'xla'"
        )
    folders = [Path(spec.origin).parent / name for name in ("lib64", "lib", "bin")]
    found = []
    for name in ("ggml-base", "ggml-cpu"):
        paths = [f / f"{p}{name}{s}" for f in folders for p in ("lib", "") for s in _SUFFIXES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise NotImplementedError(
                f"libggml-python has no library {name} for this system; take 'xla'"
            )
        # Not RTLD_GLOBAL: another ggml in the process, such as llama.cpp's, would call this one's.
        found.append(ctypes.CDLL(str(path)))
    base, cpu = found
    base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    cpu.ggml_cpu_init()  # fills the tables of float16
    return base, cpu


def base_library() -> ctypes.CDLL:
    """libggml-base, which encodes and decodes. NotImplementedError without the wheel."""
    return _libraries()[0]


@functools.cache
def check_processor() -> None:
    """Refuses a processor that the wheel's kernels are not built for.

    Raises:
        NotImplementedError: what is missing: the wheel, or AVX2 on x86.
    """
    _, cpu = _libraries()
    if platform.machine().lower() in ("x86_64", "amd64"):
        # The wheel is built for AVX2, FMA and F16C; it would end the process without them.
        missing = [f for f in ("avx2", "fma", "f16c") if not getattr(cpu, f"ggml_cpu_has_{f}")()]
        flags = processor_flags()
        missing += [f for f in ("avx2", "fma", "f16c") if flags and f not in flags]
        if missing:
            raise NotImplementedError(
                f"backend 'ggml' needs a processor with {', '.join(sorted(set(missing)))}; take "
                "'xla'"
            )


def processor_flags() -> set[str]:
    """What /proc/cpuinfo says that the processor can do; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def _interleaved(name: str) -> tuple[int, ...]:
    """The last four of `TypeFunctions`; none where ggml has no vectorised product."""
    if name not in _INTERLEAVED or platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    _, cpu = _libraries()
    block, activations, tokens = _INTERLEAVED[name]
    mangled, type_ = f"{len(block)}{block}", f"9ggml_type{activations}"
    functions = (
        f"_ZN4ggml3cpu6repack6repackI{mangled}Ll8ELl8EEEiP11ggml_tensorPKvm",
        f"_Z19ggml_quantize_mat_tILl8EL{type_}EEvPKfPvll",
        f"_ZN4ggml3cpu6repack4gemmI{mangled}Ll8ELl8EL{type_}EEEviPfmPKvS7_ii",
    )
    if not all(hasattr(cpu, function) for function in functions):
        return ()  # another release of ggml may name them otherwise
    found = (ctypes.cast(cpu[function], ctypes.c_void_p).value for function in functions)
    return *(address or 0 for address in found), tokens


@functools.cache
def type_functions(name: str, implementation: str) -> TypeFunctions:
    """What ggml has for a weight type, for "ggml" or "ggml_f32".

    Raises:
        NotImplementedError: no libggml, or in it no product or no unpacking of this type.
    """
    base, cpu = _libraries()
    number = get_format(name).number
    traits = base.ggml_get_type_traits(number).contents
    blocks = traits.block_weights, traits.block_bytes, traits.to_float or 0
    if implementation == "ggml_f32":
        if not traits.to_float and name != "F32":
            raise NotImplementedError(f"ggml cannot unpack weight type {name}")
        return TypeFunctions(*blocks)
    on_cpu = cpu.ggml_get_type_traits_cpu(number).contents
    rounded = base.ggml_get_type_traits(on_cpu.vec_dot_type).contents
    from_float = cpu.ggml_get_type_traits_cpu(on_cpu.vec_dot_type).contents.from_float
    if not on_cpu.vec_dot or not from_float:
        raise NotImplementedError(f"ggml has no dot product of weight type {name} on a CPU")
    return TypeFunctions(
        *blocks, on_cpu.vec_dot, from_float, rounded.block_weights, rounded.block_bytes,
        *_interleaved(name),
    )  # fmt: skip
