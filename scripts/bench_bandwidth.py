"""Measures what memory and link of this machine carry, for plan.py and the hybrid miss mode.

    python scripts/bench_bandwidth.py --out bandwidth.json [--formats Q4_K,Q6_K] [--threads 4,8]

Host: the expert products of the CPU backend on a bank in a memory map, by format and threads. Link:
copies to the device from that map and from pinned memory, by bytes of a piece. Then both at once.
The file belongs to this device and CPU and is refused elsewhere. About a minute.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from absl import flags

from hobbit_jax import cli
from hobbit_jax.evals.bandwidth import default_thread_counts, measure_bandwidths

_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
_FORMATS = flags.DEFINE_list("formats", ["Q4_K", "Q6_K", "Q3_K", "Q2_K"], "Formats of experts.")
_THREADS = cli.define_list(
    "threads", flags.IntegerParser(1, 4096).parse, None,
    "Numbers of threads; half and all of them by default.",
)  # fmt: skip
_BANK_MIB = flags.DEFINE_integer(
    "bank_mib", 512, "Size of a bank in MiB, beyond the processor's caches.", 1, cli.MAX_COUNT
)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Length of each measurement.", 0.01, 3600.0)


def main(_):
    path = cli.output_file("out", _OUT.value)
    threads = _THREADS.value or default_thread_counts()
    with TemporaryDirectory() as folder:
        bank_bytes = _BANK_MIB.value << 20
        found = measure_bandwidths(
            Path(folder), _FORMATS.value, threads, bank_bytes, _SECONDS.value
        )
    found.write(path)
    print(f"{found.device}; {found.cpu}")
    for what, table, of in (
        ("host", found.host_gb_s, "threads"), ("link", found.link_gb_s, "bytes"),
    ):  # fmt: skip
        for name, rates in table.items():
            shown = ", ".join(f"{rate:.2f} ({at} {of})" for at, rate in rates.items())
            print(f"{what}, {name}: {shown} GB/s")
    left = found.at_once
    print(f"at once: {left['host']:.0%} of the host's rate and {left['link']:.0%} of the link's")


if __name__ == "__main__":
    cli.run(main)
