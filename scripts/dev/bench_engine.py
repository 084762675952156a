"""Measures what the engine's design rests on: guesses of later layers, uploads, prefill's overlap.

    python scripts/dev/bench_engine.py --out out/engine.json [--model M.gguf]

Prints one JSON line per figure and writes all of them to --out. Prefill's overlap is measured on an
emulated link.
"""

import json
from pathlib import Path

from absl import flags
from link_bench import upload_rates
from prediction import prediction_accuracy
from prefill_bench import prefill_overlap

from hobbit_jax import cli, reference
from hobbit_jax.atomic import write_json
from hobbit_jax.evals.quality import Windows, cut_windows
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import load_model
from hobbit_jax.record import machine

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default.")
_TURNS = flags.DEFINE_integer("turns", 6, "Rows of each setting, after a warm-up.", 2)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.", required=True)
_POOL_BYTES = 4 << 20
_STAGED_EXPERTS = (2, 8, 16)


def main(_):
    model = load_model(_MODEL.value or reference.model_path())
    store = HostExperts(model.config, model.file)
    rows = []

    def record(row):
        rows.append(row)
        print(json.dumps(row), flush=True)

    def windows(part: reference.Part, count: int, context: int) -> Windows:
        texts = reference.held_out_texts(part)
        return cut_windows(model.tokenizer(), texts, count, context, seed=1)

    accuracy = prediction_accuracy(
        Engine(model, store), windows("evaluation", 64, 256), windows("calibration", 64, 256)
    )
    record({"setting": "prediction accuracy", **accuracy})
    for row in upload_rates(store.largest_expert_bytes, 4 * _TURNS.value):
        record({"setting": "upload of an expert", **row})
    prompts_RS = windows("evaluation", _TURNS.value + 1, 512).ids_WS
    for staged in _STAGED_EXPERTS:
        row = prefill_overlap(model, store, _POOL_BYTES, prompts_RS, 1.0, staged)
        record({"setting": "prefill overlap", **row})
    write_json(Path(_OUT.value), {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
