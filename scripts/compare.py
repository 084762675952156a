"""Our engine beside PyTorch or llama.cpp on the same tokens: logits, speed, memory.

    python scripts/compare.py --model M.gguf --peer torch --workdir out/mine
    python scripts/compare.py --model M.gguf --peer llama_cpp --budget_mib 8000 --workdir out/mine

Writes one record into --workdir; `report.py` makes tables of those there. Without a GPU PyTorch
computes in float32, on one in bfloat16, always with every expert resident. A budget is our pool's;
on a GPU llama.cpp leaves those layers' experts to the CPU that do not fit it. Both programs are
loaded at once.
"""

import os
from pathlib import Path

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.peers.comparison import PEERS, Request, compare_model
from hobbit_jax.record import write_record
from hobbit_jax.report.baseline_tables import section
from pallas_kernels.backends import IMPLEMENTATIONS

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_PEER = flags.DEFINE_enum("peer", None, PEERS, "what to compare with", required=True)
_TEXT = flags.DEFINE_string("text", None, "text file; the shipped held-out files by default")
_BUDGET_MIB = flags.DEFINE_float("budget_mib", None, "expert pool; all resident by default", 0.0)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the record.", required=True)
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, IMPLEMENTATIONS, "our matrix products; the device's fastest by default"
)
_TORCH_MODE = flags.DEFINE_enum(
    "torch_mode", None, ("float32", "bfloat16"), "of PyTorch; see above for the default"
)
_WINDOWS = flags.DEFINE_integer("windows", 32, "scored for agreement", 2)
_CONTEXT = flags.DEFINE_integer("context", 256, "tokens of a window", 1)
_TURNS = flags.DEFINE_integer("turns", 10, "timed rows of each program, after a warm-up", 1)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 128, "prefilled in a turn", 1)
_DECODE_TOKENS = flags.DEFINE_integer("decode_tokens", 64, "decoded in a turn", 1)
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_THREADS = flags.DEFINE_integer("threads", _CORES, "processor cores of each program", 1)


def main(_):
    workdir = cli.output_folder("workdir", _WORKDIR.value)
    record = compare_model(
        Request(
            model=Path(_MODEL.value or reference.model_path()),
            peer=_PEER.value,
            text=Path(_TEXT.value) if _TEXT.value else None,
            budget_bytes=None if _BUDGET_MIB.value is None else int(_BUDGET_MIB.value * 2**20),
            implementation=_IMPLEMENTATION.value,
            torch_mode=_TORCH_MODE.value,
            windows=_WINDOWS.value,
            context=_CONTEXT.value,
            turns=_TURNS.value,
            prompt_tokens=_PROMPT_TOKENS.value,
            decode_tokens=_DECODE_TOKENS.value,
            threads=_THREADS.value,
        )
    )
    print(section([record]))
    print(f"written: {write_record(workdir, record)}")


if __name__ == "__main__":
    cli.run(main)
