"""Counts how often, and with what weight, a text uses each expert; for a warm start.

    python scripts/profile.py --model M.gguf --text T.txt --out P [--budget_mib 4]
    python scripts/generate.py --model M.gguf --profile P --budget_mib 4 --prompt "def fib(n):"

P is a folder (Orbax), a calibration with nothing but the routing. The table says what caching can
hope for: the entropy of each layer's choice, the share of its most used quarter, and the hit rate
on this text of the best choice of experts that --budget_mib holds and nothing ever evicts. Without
--model and --text the reference model and its calibration text are used.
"""

import importlib.machinery
import sys
import sysconfig
from pathlib import Path

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.cache.miss_modes import WAIT
from hobbit_jax.cache.pool_sizing import pool_slots
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.signals.calibration import calibrate
from hobbit_jax.signals.routing_summary import table


def main(_):
    wanted = flags.FLAGS
    model = load_model(wanted.model or reference.model_path())
    store = HostExperts(model.config, model.file)
    budget_bytes = store.tier_bytes(0) // 4
    if wanted.budget_mib is not None:
        budget_bytes = int(wanted.budget_mib * 2**20)
    slots, _ = pool_slots(uniform_plan(store), WAIT, store, budget_bytes, 0.0)
    texts = (
        [Path(wanted.text).read_text(encoding="utf-8")]
        if wanted.text
        else reference.held_out_texts("calibration")
    )
    tokenizer = model.tokenizer()
    windows = cut_windows(tokenizer, texts, wanted.windows, wanted.context, wanted.seed)
    found = calibrate(Engine(model, store), windows, "routing", Path(wanted.out))
    print(f"{found.tokens} tokens; {sum(slots.values())} experts in {budget_bytes / 2**20:g} MiB")
    print(table(found.selections_LE, store, slots))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
    flags.DEFINE_string("text", None, "UTF-8 text; the reference's calibration text by default")
    flags.DEFINE_string("out", None, "folder to write", required=True)
    flags.DEFINE_float("budget_mib", None, "of the static cache; a quarter of all by default", 0.0)
    flags.DEFINE_integer("windows", 48, "windows to draw from the text", 1)
    flags.DEFINE_integer("context", 512, "tokens of a window", 1)
    flags.DEFINE_integer("seed", 0, "of the draw")
    cli.run(main)
else:
    # For the other scripts this folder comes before the standard library, whose module of this
    # name is what cProfile, and so PyTorch, mean by `import profile`: become that one.
    _finder = importlib.machinery.PathFinder
    _standard = _finder.find_spec("profile", [sysconfig.get_path("stdlib")])
    assert _standard is not None and _standard.loader is not None
    _standard.loader.exec_module(sys.modules[__name__])
