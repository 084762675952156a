"""Decodes one window for every line on stdin and prints its seconds per token.

yes | head -5 | python scripts/time_decode.py --model M.gguf --tokens 64
"""

import importlib
import importlib.util
import sys
import time

import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string("model", None, "GGUF file", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 64, "decoded in a window", 1)
_BUDGET_MIB = flags.DEFINE_float("budget_mib", None, "expert pool; all resident by default")


def module(room: str, name: str):
    """A module in its room, or beside the rooms, where it was until there was one."""
    here = importlib.util.find_spec(f"hobbit_jax.{name}") is not None
    return importlib.import_module(f"hobbit_jax.{name}" if here else f"hobbit_jax.{room}.{name}")


def main(_):
    model = module("model", "loading").load_model(_MODEL.value)
    budget_bytes = None if _BUDGET_MIB.value is None else int(_BUDGET_MIB.value * 2**20)
    store = module("experts", "store").HostExperts(model.config, model.file)
    engine = module("inference", "engine").Engine(model, store, budget_bytes)
    ids_S = np.random.default_rng(0).integers(0, model.config.vocab_size, _TOKENS.value + 8)
    for _ in sys.stdin:
        engine.start(1, len(ids_S))
        engine.prefill([ids_S[:8].tolist()])
        began = time.perf_counter()
        for token in ids_S[8:]:
            np.asarray(engine.decode(np.asarray([token])))
        print((time.perf_counter() - began) / _TOKENS.value, flush=True)


if __name__ == "__main__":
    app.run(main)
