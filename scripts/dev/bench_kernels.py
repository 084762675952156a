"""Times the expert kernels, for one format, shape or implementation, or for all of them.

    make gpu    # everything, on a machine with a GPU
    python scripts/dev/bench_kernels.py --shapes tiny --tokens 1,16 --formats Q4_K --workdir out/k

Without a GPU the implementations are xla and interpret, and the figures only show that it runs.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
from absl import flags
from tqdm import tqdm

from hobbit_jax import cli
from hobbit_jax.record import Benchmark, Record, machine, measured, write_record
from hobbit_jax.report.table import Column, table
from pallas_kernels import bench
from pallas_kernels.formats import FORMATS

ON_GPU = jax.devices()[0].platform == "gpu"
RIVAL = "jax_bf16"  # it has no quantised format

_FORMATS = cli.define_list(
    "formats", flags.EnumParser([fmt.name for fmt in FORMATS.values() if fmt.packing]).parse,
    "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0,Q4_0,Q5_0,IQ4_NL,IQ4_XS,MXFP4,F16,BF16",
    "Weight formats to time.",
)  # fmt: skip
_SHAPES = cli.define_list(
    "shapes", flags.EnumParser(list(bench.SHAPES)).parse,
    "qwen3-30b-a3b,mixtral-8x7b" if ON_GPU else "tiny",
    f"Shapes to time, of {', '.join(bench.SHAPES)}.",
)  # fmt: skip
_TOKENS = cli.define_list(
    "tokens", flags.IntegerParser(1, 2**20).parse, "1,4,16,64,512", "Numbers of tokens of a step."
)
_IMPLEMENTATIONS = cli.define_list(
    "implementations", flags.EnumParser(["triton", "interpret", "xla", RIVAL]).parse,
    f"triton,xla,{RIVAL}" if ON_GPU else "xla,interpret",
    f"Implementations to time, of triton, interpret, xla, {RIVAL}; xla beyond one token only in "
    "four formats.",
)  # fmt: skip
_SECONDS = flags.DEFINE_float("seconds", 0.25, "Seconds spent on timing a case.", 0.01, 3600.0)
_WORKDIR = flags.DEFINE_string(
    "workdir", "out/kernels", "Folder of the records, one a case as soon as it is measured."
)


def cases() -> Iterator[bench.Case]:
    few = ("Q2_K", "Q4_K", "Q6_K", "Q8_0")  # unpacking every expert in XLA takes long
    tokens: list[int] = _TOKENS.value
    for shape, format, n_tokens in itertools.product(_SHAPES.value, _FORMATS.value, tokens):
        for implementation in _IMPLEMENTATIONS.value:
            if implementation == RIVAL:
                if format == _FORMATS.value[0]:
                    yield bench.Case(shape, "BF16", n_tokens, RIVAL)
            elif implementation != "xla" or n_tokens == 1 or format in few or not ON_GPU:
                yield bench.Case(shape, format, n_tokens, implementation)


STUDY = "kernel times"
COLUMNS = (
    *(
        Column(f.name, lambda r, name=f.name: r.setting[name])
        for f in dataclasses.fields(bench.Case)
    ),
    Column("us", "median_s", ".1f", unit=1e-6),
    Column("GB/s", "gb_s", ".1f"),
    Column("of a copy", "fraction_of_copy", ".2f"),
    Column("of bfloat16", "fraction_of_bf16", ".2f"),
    Column("relative error", "relative_error", ".2g"),
    Column("error", lambda r: r.error),
)


def main(_) -> int:
    workdir, records = cli.output_folder("workdir", _WORKDIR.value), []
    device = {"copy_gb_s": bench.copy_gb_s(), "bf16_tflop_s": bench.bf16_tflop_s()}
    wanted = list(cases())
    with ThreadPoolExecutor(8 if ON_GPU else 1) as pool:  # XLA compiles outside the GIL
        futures = [pool.submit(bench.prepare, case) for case in wanted]
        for case, future in zip(tqdm(wanted, desc="cases", disable=None), futures, strict=True):
            row, setting = dict(device), vars(case)
            try:
                found = bench.measure(future.result(), _SECONDS.value)
                row |= {name: value for name, value in found.items() if name not in setting}
                error = None if row.pop("status") == "ok" else "its result is wrong"
            except Exception as failure:
                error = str(failure)[:500]
            if error is None:
                row["fraction_of_copy"] = row["gb_s"] / device["copy_gb_s"]
                row["fraction_of_bf16"] = row["tflop_s"] / device["bf16_tflop_s"]
            record = Record(
                STUDY, Benchmark(STUDY, setting), **vars(measured(row)), **machine(),
                status="failed" if error else "ok", error=error,
            )  # fmt: skip
            records.append(record)
            write_record(workdir, record)
    print(f"copy {device['copy_gb_s']:.0f} GB/s, bfloat16 {device['bf16_tflop_s']:.1f} TFLOP/s")
    print(table(COLUMNS, records))
    return 1 if any(record.error for record in records) else 0


if __name__ == "__main__":
    cli.run(main)
