"""Compiles the kernels to machine code for GPUs that are not there, and says what they use.

    make kernels                        # installs the compiler beside .venv, then runs this
    python scripts/dev/compile_kernels.py --targets sm_90 --formats Q4_K,Q2_K --workdir out/k

Every format, at the sizes of Qwen3-30B-A3B's experts, one token and many, in the tiles that are in
use. Fails if a kernel does not compile or spills registers to memory, and if a kernel that asks for
more shared memory than there is *does* compile: a check that cannot fail checks nothing.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from hobbit_jax import cli
from hobbit_jax.record import Benchmark, Record, machine, measured, write_record
from pallas_kernels import ahead_of_time, bench
from pallas_kernels.expert_ffn import triton_expert_ffn
from pallas_kernels.formats import FORMATS
from pallas_kernels.matmul_triton import Items, Tile, grouped_matmul
from pallas_kernels.reference import Bank, Signature, Work
from pallas_kernels.tiles import choose_tile, item_rows

PACKED = [fmt.name for fmt in FORMATS.values() if fmt.packing]
_TARGETS = flags.DEFINE_list(
    "targets", ["sm_80", "sm_90"], f"GPUs to compile for, of {list(ahead_of_time.TARGETS)}."
)
_FORMATS = flags.DEFINE_list("formats", PACKED, "Weight formats to compile.")
_MEAN_ROWS = flags.DEFINE_list("mean_rows", ["1", "16"], "Mean numbers of tokens of an expert.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "out/kernels", "Folder of the records of registers, spills and shared memory."
)

STUDY = "kernels"
SHAPE, TOKENS = bench.SHAPES["qwen3-30b-a3b"], 8


def _abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _bank(format_name: str) -> Bank:
    return jax.eval_shape(lambda: bench.random_bank(SHAPE, format_name))


def compile_experts(target: ahead_of_time.Target, name: str, mean_rows: int) -> str:
    """PTX of the expert op's two kernels."""
    signature, width = Signature(name, name, name), item_rows(mean_rows, (name,))
    int32 = functools.partial(jnp.zeros, dtype=jnp.int32)
    work = jax.eval_shape(
        lambda: Work(int32(SHAPE.n_experts), int32((SHAPE.n_experts, width)), int32(()))
    )
    return ahead_of_time.compile_for(
        target,
        lambda x, y, w, bank, work: triton_expert_ffn(x, y, w, bank, signature, work),
        _abstract(TOKENS, SHAPE.d_model),
        _abstract(TOKENS * SHAPE.experts_per_token, SHAPE.d_model),
        _abstract(TOKENS * SHAPE.experts_per_token),
        _bank(name),
        work,
    )


def instructions_per_weight(
    kernel: ahead_of_time.KernelResources, name: str, mean_rows: int
) -> float | None:
    """Issued per weight in the main loop: what bounds decode where memory does not."""
    if kernel.loop_instructions is None:
        return None
    gated = kernel.name.count(name) == 2
    size = (SHAPE.d_expert, SHAPE.d_model) if gated else (SHAPE.d_model, SHAPE.d_expert)
    formats = (name, name) if gated else (name,)
    tile = choose_tile(formats, *size, item_rows(mean_rows, (name,)))
    weights = tile.rows * tile.columns * len(formats)
    return round(kernel.loop_instructions * 32 * tile.warps / weights, 3)


def check_rejection(target: ahead_of_time.Target) -> None:
    """Asks for more shared memory than any GPU has.

    Raises:
        RuntimeError: it was accepted.
    """
    tile = Tile(rows=256, columns=1024, tokens=256, warps=4, stages=4)
    int32 = functools.partial(jnp.zeros, dtype=jnp.int32)
    rows = (1, tile.tokens)
    items = jax.eval_shape(lambda: Items(int32(1), int32(rows), int32(rows), int32(1)))
    y = _abstract(256, SHAPE.d_expert)
    try:
        ahead_of_time.compile_for(
            target,
            lambda x, planes, items: grouped_matmul(x, y, [planes], ["Q8_0"], items, tile),
            _abstract(256, SHAPE.d_model),
            _bank("Q8_0").gate,
            items,
        )
    except Exception as error:
        if "memory" not in str(error):
            raise
        return
    raise RuntimeError(f"{target.name}: a kernel far beyond its shared memory was accepted")


def main(_) -> int:
    unknown = [name for name in _TARGETS.value if name not in ahead_of_time.TARGETS]
    unknown += [name for name in _FORMATS.value if name not in PACKED]
    if unknown:
        raise ValueError(
            f"unknown {', '.join(unknown)}; targets are {', '.join(ahead_of_time.TARGETS)}, "
            f"formats {', '.join(PACKED)}"
        )
    workdir = cli.output_folder("workdir", _WORKDIR.value)
    ptxas = ahead_of_time.check_toolchain()
    count, failures = 0, []
    cases = list(
        itertools.product(_TARGETS.value, _FORMATS.value, cli.numbers(_MEAN_ROWS, int, 1, 2**20))
    )
    for target_name, name, mean_rows in tqdm(cases, desc="kernels", disable=None):
        target = ahead_of_time.TARGETS[target_name]
        case = {"target": target_name, "format": name, "mean_rows": mean_rows}
        try:
            ptx = compile_experts(target, name, mean_rows)
            for kernel in ahead_of_time.resources(target, ptx):
                per_weight = instructions_per_weight(kernel, name, mean_rows)
                found = {**vars(kernel), "instructions_per_weight": per_weight, "ptxas": ptxas}
                asked = Benchmark(STUDY, {**case, "name": found.pop("name")})
                write_record(workdir, Record(STUDY, asked, **vars(measured(found)), **machine()))
                count += 1
                if kernel.spill_bytes:
                    failures.append(f"{target_name} {kernel.name}: spills {kernel.spill_bytes} B")
        except Exception as error:
            failures.append(f"{target_name} {name} {mean_rows}: {str(error).splitlines()[0]}")
    for name in _TARGETS.value:
        check_rejection(ahead_of_time.TARGETS[name])
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{count} kernels compiled for {', '.join(_TARGETS.value)} with ptxas {ptxas}; "
          f"{len(failures)} failures; an impossible one was refused on each")  # fmt: skip
    return 1 if failures or count < 2 * len(cases) else 0


if __name__ == "__main__":
    cli.run(main)
