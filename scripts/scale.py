"""Decodes with a synthetic model of a real model's size, under a budget, and records what it took.

    python scripts/scale.py --preset qwen3-30b-a3b --workdir out/scale [--budget_mib 4096] \\
        [--miss_mode fetch_low --low_format Q2_K]

Writes the model into --workdir when it is not there (18.6 GB and some minutes for qwen3-30b-a3b;
a write that was cut off starts again) and the record under it; prints a table of all records that
are there. With --model another file is taken, real or synthetic. On a busy machine read the CPU
seconds.
"""

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli
from hobbit_jax.engine_flags import EngineFlags
from hobbit_jax.evals import full_scale
from hobbit_jax.models.presets import PRESETS
from hobbit_jax.record import read_records, write_record
from hobbit_jax.report.scale_tables import scale_table
from hobbit_jax.synthetic.synthesize import synthesize

_PRESET = flags.DEFINE_enum(
    "preset", "qwen3-30b-a3b", list(PRESETS), "Model whose shapes are taken; without --model."
)
_WORKDIR = flags.DEFINE_string("workdir", "out/scale", "Folder of the model and the records.")
ENGINE = EngineFlags("model", "budget_mib", "policy", "miss_mode", "low_format", budget_mib=4096.0)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 16, "Number of random tokens to start from.", 1, cli.MAX_COUNT
)
_TOKENS = flags.DEFINE_integer(
    "tokens", 16, "Number of tokens to decode; the first of them compiles.", 3, cli.MAX_COUNT
)


def main(_):
    workdir, preset = cli.output_folder("workdir", _WORKDIR.value), str(_PRESET.value)
    model = workdir / f"{preset}.gguf" if ENGINE.value("model") is None else ENGINE.path
    if ENGINE.value("model") is None and not model.is_file():
        synthesize(PRESETS[preset], preset, model)
    setting = "native" if ENGINE.low_format is None else "uniform"
    if ENGINE.value("miss_mode") != "fetch":
        setting = ENGINE.value("miss_mode")
    run = full_scale.Run(
        model, ENGINE.budget_bytes, _PROMPT_TOKENS.value, _TOKENS.value, ENGINE.value("policy"),
        setting, ENGINE.low_format,
    )  # fmt: skip
    with tqdm(desc="load", unit="step", disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        path = write_record(workdir, full_scale.measure(run, progress))
    print(f"{scale_table(read_records(workdir).of(full_scale.STUDY))}\nthe record: {path}")


if __name__ == "__main__":
    cli.run(main)
