"""Decodes with a synthetic model of a real model's size, under a budget, and records what it took.

    python scripts/scale.py --preset qwen3-30b-a3b --workdir out/scale [--budget_mib 4096] \\
        [--setting fetch_low --low_format Q2_K]

Writes the model into --workdir when it is not there (18.6 GB and some minutes for qwen3-30b-a3b;
a write that was cut off starts again) and the record beside it, PRESET-BUDGET-SETTING.json;
PRESET.md is a table of all records that are there. With --model another file is taken, real or
synthetic; a low tier is made beside it, once. On a busy machine read the figures per CPU second.
"""

import json
from pathlib import Path

from absl import flags
from tqdm import tqdm

from hobbit_jax import cli
from hobbit_jax.atomic import replacing, write_json
from hobbit_jax.cache.policies import POLICIES
from hobbit_jax.evals import full_scale
from hobbit_jax.model_file.presets import PRESETS
from hobbit_jax.record import machine
from hobbit_jax.synthetic.synthesize import synthesize

_PRESET = flags.DEFINE_enum("preset", "qwen3-30b-a3b", list(PRESETS), "whose shapes")
_WORKDIR = flags.DEFINE_string("workdir", "out/scale", "where the model and the record go")
_MODEL = flags.DEFINE_string("model", None, "GGUF file; WORKDIR/PRESET.gguf by default")
_BUDGET_MIB = flags.DEFINE_string("budget_mib", "4096", "expert pool, or all")
_SETTING = flags.DEFINE_enum("setting", "native", full_scale.SETTINGS, "who goes low, and when")
_LOW_FORMAT = flags.DEFINE_string("low_format", None, "of the low tier, for others than native")
_POLICY = flags.DEFINE_enum("policy", "slru", POLICIES, "of eviction")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 16, "random tokens to start from", 1)
_TOKENS = flags.DEFINE_integer("tokens", 16, "decoded, the first of which compiles", 3)


def main(_):
    workdir, preset = Path(_WORKDIR.value), str(_PRESET.value)
    workdir.mkdir(parents=True, exist_ok=True)
    model = Path(_MODEL.value or workdir / f"{preset}.gguf")
    if _MODEL.value is None and not model.is_file():
        synthesize(PRESETS[preset], preset, model)
    budget_mib = None if _BUDGET_MIB.value == "all" else float(_BUDGET_MIB.value)
    run = full_scale.Run(
        model, None if budget_mib is None else int(budget_mib * 2**20), _PROMPT_TOKENS.value,
        _TOKENS.value, _POLICY.value, _SETTING.value, _LOW_FORMAT.value,
    )  # fmt: skip
    here = machine()  # now: the checkout may be another by the end
    with tqdm(desc="open", unit="step", disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        record = {**full_scale.measure(run, progress), "machine": here}
    setting = "-".join(filter(None, (_SETTING.value, _LOW_FORMAT.value, _POLICY.value)))
    out = workdir / f"{model.stem}-{_BUDGET_MIB.value}MiB-{setting}.json"
    write_json(out, record)
    keys = ("open_s", "load_s", "compile_s", "prefill_tokens_per_s", "decode", "own_memory")
    print(json.dumps({key: record[key] for key in keys}, indent=1))
    paths = sorted(workdir.glob(f"{model.stem}-*MiB-*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    with replacing(workdir / f"{model.stem}.md") as partial:
        partial.write_text("\n".join([*full_scale.table(records), ""]), encoding="utf-8")
    print(f"the record: {out}; the table: {workdir / f'{model.stem}.md'}")


if __name__ == "__main__":
    cli.run(main)
