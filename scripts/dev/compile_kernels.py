"""Compiles the kernels to machine code for GPUs that are not there, and says what they use.

    make kernels                        # installs the compiler beside .venv, then runs this
    python scripts/dev/compile_kernels.py --targets sm_90 --formats Q4_K,Q2_K --workdir out/k

Every format, at the sizes of Qwen3-30B-A3B's experts, one token and many, in the tiles that are in
use. Fails if a kernel does not compile or spills registers to memory, and if a kernel that asks for
more shared memory than there is *does* compile: a check that cannot fail checks nothing.
"""

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from gpu_compiler import TARGETS, Target, check_toolchain, compile_for
from tqdm import tqdm

from hobbit_jax import cli
from hobbit_jax.record import Benchmark, Record, machine, measured, write_record
from pallas_kernels import bench
from pallas_kernels.attention_triton import decode_attention
from pallas_kernels.expert_ffn import triton_expert_ffn
from pallas_kernels.formats import FORMATS
from pallas_kernels.matmul_triton import Items, Tile, choose_tile, grouped_matmul, item_rows
from pallas_kernels.reference import Bank, Signature, Work

# What ptxas says of a kernel; of a figure that it gives twice, the sum.
_FIGURES = {
    "registers": r"Used (\d+) registers",
    "spill_bytes": r"(\d+) bytes spill (?:stores|loads)",
    "static_shared_bytes": r"(\d+) bytes smem",
}


def _longest_loop(function: str) -> int | None:
    """Instructions of a disassembled function's longest loop, from a branch back to its target."""
    start, number, longest = {}, 0, 0
    for label, instruction in re.findall(
        r"^(\.L_x_\d+):|/\*[0-9a-f]{4,5}\*/(.*)", function, re.MULTILINE
    ):
        if label:
            start[label] = number
            continue
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if branch and branch[1] in start:
            longest = max(longest, number - start[branch[1]] + 1)
        number += 1
    return longest if longest > 1 else None  # a kernel ends in a branch to itself


def resources(target: Target, ptx: str) -> Iterator[dict[str, Any]]:
    """What ptxas says of our kernels in `ptx`, and a thread's instructions in the main
    loop, None where there is no loop left.

    Raises:
        RuntimeError: ptxas rejects the code; with what it said.
    """
    # Each module of a dump starts with its version; ptxas takes one at a time.
    for module in re.split(r"(?=^\.version)", ptx, flags=re.MULTILINE):
        if not re.search(r"\.entry (?:matmul_|decode_attention)", module):
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            source.write_text(module)
            command = ["ptxas", "-v", f"-arch={target.architecture}", source, "-o", binary]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"ptxas for {target.architecture}: {result.stderr[:400]}")
            listing = subprocess.run(
                ["nvdisasm", "-c", binary], capture_output=True, text=True, check=True
            ).stdout
        functions = re.split(r"\n\s*\.section\s+\.text\.", listing)[1:]
        loops = {text.split(",", 1)[0].strip(): _longest_loop(text) for text in functions}
        found = re.findall(
            r"entry function '((?:matmul|decode_attention)\w*)'(.*?Used .*?)\n", result.stderr,
            re.DOTALL,
        )  # fmt: skip
        for name, text in found:
            numbers = {
                figure: sum(map(int, re.findall(pattern, text)))
                for figure, pattern in _FIGURES.items()
            }
            yield {"name": name, **numbers, "loop_instructions": loops.get(name)}


PACKED = [fmt.name for fmt in FORMATS.values() if fmt.packing]
_TARGETS = cli.define_list(
    "targets", flags.EnumParser(list(TARGETS)).parse, "sm_80,sm_90",
    f"GPUs to compile for, of {', '.join(TARGETS)}.",
)  # fmt: skip
_FORMATS = cli.define_list(
    "formats", flags.EnumParser(PACKED).parse, ",".join(PACKED), "Weight formats to compile."
)
_MEAN_ROWS = cli.define_list(
    "mean_rows", flags.IntegerParser(1, 2**20).parse, "1,16", "Mean numbers of tokens of an expert."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "out/kernels", "Folder of the records of registers, spills and shared memory."
)

STUDY = "kernels"
SHAPE, TOKENS = bench.SHAPES["qwen3-30b-a3b"], 8


def _abstract(*shape, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


_int32 = functools.partial(_abstract, dtype=jnp.int32)


def _bank(format: str) -> Bank:
    return jax.eval_shape(lambda: bench.random_bank(SHAPE, format))


def compile_experts(target: Target, name: str, mean_rows: int) -> str:
    """PTX of the expert op's two kernels."""
    signature, width = Signature(name, name, name), item_rows(mean_rows, (name,))
    work = Work(_int32(SHAPE.n_experts), _int32(SHAPE.n_experts, width), _int32())
    return compile_for(
        target,
        lambda x, y, w, bank, work: triton_expert_ffn(x, y, w, bank, signature, work),
        _abstract(TOKENS, SHAPE.d_model),
        _abstract(TOKENS * SHAPE.experts_per_token, SHAPE.d_model),
        _abstract(TOKENS * SHAPE.experts_per_token),
        _bank(name),
        work,
    )[0]


def compile_attention(target: Target) -> str:
    """PTX of decode's attention, with Qwen3-30B-A3B's heads."""
    context, (heads, groups, width) = 4096, (32, 4, 128)
    cache = _abstract(48, 1, context, groups, width)
    return compile_for(
        target,
        lambda q, k, v, place, at: decode_attention(q, k, v, place, at, width**-0.5),
        _abstract(1, heads, width), cache, cache, _int32(), _int32(1),
    )[0]  # fmt: skip


def instructions_per_weight(kernel: Mapping[str, Any], format: str, mean_rows: int) -> float | None:
    """Issued per weight in the main loop: what bounds decode where memory does not."""
    if kernel["loop_instructions"] is None:
        return None
    gated = kernel["name"].count(format) == 2
    size = (SHAPE.d_expert, SHAPE.d_model) if gated else (SHAPE.d_model, SHAPE.d_expert)
    formats = (format, format) if gated else (format,)
    tile = choose_tile(formats, *size, item_rows(mean_rows, (format,)))
    weights = tile.rows * tile.columns * len(formats)
    return round(kernel["loop_instructions"] * 32 * tile.warps / weights, 3)


def check_rejection(target: Target) -> None:
    """Asks for more shared memory than any GPU has.

    Raises:
        RuntimeError: it was accepted.
    """
    tile = Tile(rows=256, columns=1024, tokens=256, warps=4, stages=4)
    items = Items(_int32(1), _int32(1, tile.tokens), _int32(1, tile.tokens), _int32(1))
    y = _abstract(256, SHAPE.d_expert)
    try:
        compile_for(
            target,
            lambda x, planes, items: grouped_matmul(x, y, [planes], ["Q8_0"], items, tile=tile),
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
    workdir, ptxas = cli.output_folder("workdir", _WORKDIR.value), check_toolchain()
    count, failures = 0, []

    def keep(setting: dict[str, Any], kernel: dict[str, Any], **figures: Any) -> None:
        nonlocal count
        asked = Benchmark(STUDY, {**setting, "name": kernel.pop("name")})
        found = measured({**kernel, **figures, "ptxas": ptxas})
        write_record(workdir, Record(STUDY, asked, **vars(found), **machine()))
        count += 1
        if spilled := kernel["spill_bytes"]:
            failures.append(f"{asked.setting}: spills {spilled} B")

    cases: list[tuple[str, str, int]] = list(
        itertools.product(_TARGETS.value, _FORMATS.value, _MEAN_ROWS.value)
    )
    for name, format, mean_rows in tqdm(cases, desc="kernels", disable=None):
        target, case = TARGETS[name], {"target": name, "format": format, "mean_rows": mean_rows}
        try:
            for kernel in resources(target, compile_experts(target, format, mean_rows)):
                per_weight = instructions_per_weight(kernel, format, mean_rows)
                keep(case, kernel, instructions_per_weight=per_weight)
        except Exception as error:
            failures.append(f"{case}: {str(error).splitlines()[0]}")
    for name in _TARGETS.value:
        target = TARGETS[name]
        for kernel in resources(target, compile_attention(target)):
            keep({"target": name}, kernel)
        check_rejection(target)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{count} kernels compiled for {', '.join(_TARGETS.value)} with ptxas {ptxas}; "
          f"{len(failures)} failures; an impossible one was refused on each")  # fmt: skip
    return 1 if failures or count < 2 * len(cases) else 0


if __name__ == "__main__":
    cli.run(main)
