"""Our engine beside PyTorch or llama.cpp on the same tokens: logits, speed, memory.

    python scripts/compare.py --model M.gguf --baseline torch --workdir out/mine
    python scripts/compare.py --model M.gguf --baseline llama_cpp --budget_mib 8000 --workdir
    out/mine

Writes one record into --workdir; `report.py` makes tables of those there. Without a GPU PyTorch
computes in float32, on one in bfloat16, always with every expert resident. A budget is our pool's;
on a GPU llama.cpp leaves those layers' experts to the CPU that do not fit it. Both programs are
loaded at once.
"""

from absl import flags

from hobbit_jax import cli
from hobbit_jax.baselines.comparison import BASELINES, Request, compare_model
from hobbit_jax.engine_flags import engine_flags
from hobbit_jax.record import write_record
from hobbit_jax.report.baseline_tables import section

ENGINE = engine_flags("model", "implementation", "budget_mib", "policy", "threads")
_BASELINE = flags.DEFINE_enum(
    "baseline", None, BASELINES, "Program to compare with.", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the record.", required=True)
_TEXT = flags.DEFINE_string(
    "text", "", "UTF-8 text or .jsonl file to score; the shipped held-out files by default."
)
_TORCH_MODE = flags.DEFINE_enum(
    "torch_mode", None, ("float32", "bfloat16"), "Precision of PyTorch; see above for the default."
)
_SIZES = {
    name: flags.DEFINE_integer(name, default, text, least, cli.MAX_COUNT)
    for name, default, text, least in (
        ("windows", 32, "Number of windows scored for agreement.", 2),
        ("context", 256, "Number of tokens of a window.", 1),
        ("turns", 10, "Number of timed rows of each program, after a warm-up.", 1),
        ("prompt_tokens", 128, "Number of tokens prefilled in a turn.", 1),
        ("decode_tokens", 64, "Number of tokens decoded in a turn.", 1),
    )
}
_JSON = flags.DEFINE_bool("json", False, "Whether to print the JSON instead of tables.")


def main(_):
    workdir = cli.output_folder("workdir", str(_WORKDIR.value))
    sizes = {name: flag.value for name, flag in _SIZES.items()}
    request = Request(
        ENGINE(), str(_BASELINE.value), **sizes, text=_TEXT.value, torch_mode=_TORCH_MODE.value
    )
    record = compare_model(request)
    written = write_record(workdir, record)
    if _JSON.value:
        print(written.read_text(encoding="utf-8"), end="")
    else:
        print(f"{section([record])}\nwritten: {written}")


if __name__ == "__main__":
    cli.run(main)
