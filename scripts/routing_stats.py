"""Counts how often, and with what weight, a text uses each expert; for a warm start.

    python scripts/routing_stats.py --model M.gguf --text T.txt --out P [--budget_mib 4]
    python scripts/generate.py --model M.gguf --profile P --budget_mib 4 --prompt "def fib(n):"

P is a folder (Orbax), a calibration with nothing but the routing. The table says what caching can
hope for: the entropy of each layer's choice, the share of its most used quarter, and the hit rate
on this text of the best choice of experts that --budget_mib holds and nothing ever evicts. Without
--model and --text the reference model and its calibration text are used.
"""

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.cache.miss_modes import FETCH
from hobbit_jax.cache.pool_sizing import pool_slots
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.importance.calibration import calibrate
from hobbit_jax.importance.routing_summary import table
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import load_model
from pallas_kernels.backends import for_quality

_MODEL = flags.DEFINE_string(
    "model", None, "GGUF file of the model; the shipped reference model by default."
)
_TEXT = flags.DEFINE_string(
    "text", None, "UTF-8 text; the reference's calibration text by default."
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_BUDGET_MIB = flags.DEFINE_float(
    "budget_mib",
    None,
    "Size of the static cache in MiB; a quarter of all experts by default.",
    0.0,
    cli.MAX_MIB,
)
_WINDOWS = flags.DEFINE_integer(
    "windows", 48, "Number of windows to draw from the text.", 1, cli.MAX_COUNT
)
_CONTEXT = flags.DEFINE_integer("context", 512, "Number of tokens of a window.", 1, cli.MAX_COUNT)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draw.", 0, cli.MAX_COUNT)


def main(_):
    out = cli.output_folder("out", str(_OUT.value))
    model = load_model(_MODEL.value or reference.model_path(), for_quality(None))
    store = HostExperts(model.config, model.file)
    budget_bytes = store.precision_bytes(0) // 4
    if _BUDGET_MIB.value is not None:
        budget_bytes = int(_BUDGET_MIB.value * 2**20)
    slots, _ = pool_slots(uniform_plan(store), FETCH, store, budget_bytes, 0.0)
    texts = (
        [cli.input_text("text", _TEXT.value)]
        if _TEXT.value
        else reference.held_out_texts("calibration")
    )
    tokenizer = model.tokenizer()
    windows = cut_windows(tokenizer, texts, _WINDOWS.value, _CONTEXT.value, _SEED.value)
    found = calibrate(Engine(model, store), windows, "routing", out)
    print(f"{found.tokens} tokens; {sum(slots.values())} experts in {budget_bytes / 2**20:g} MiB")
    print(table(found.selections_LE, store, slots))


if __name__ == "__main__":
    cli.run(main)
