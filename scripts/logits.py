"""Writes the logits of one token sequence, for comparison with other programs.

    python scripts/logits.py --model M.gguf --tokens ids.npy --out logits.npy [--budget_mib 64]

`ids.npy` is int32 [T]; row t of `logits.npy`, float32 [T, V], scores token t + 1. Without
--budget_mib every expert is resident; the result is the same under any budget.
"""

from pathlib import Path

import numpy as np
from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.atomic import replacing
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.model.modules import KV_FORMATS
from hobbit_jax.model_file.architecture import ModelConfig
from pallas_kernels.backends import IMPLEMENTATIONS
from pallas_kernels.ggml.ops import set_threads

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, IMPLEMENTATIONS, "matrix products; the device's fastest by default"
)
_THREADS = flags.DEFINE_integer(
    "threads", None, "Number of threads on a CPU; those that the process may use by default.", 1
)
_KV_FORMAT = flags.DEFINE_enum(
    "kv_format", "float32", list(KV_FORMATS), "Number format of the keys and values of attention."
)
_TOKENS = flags.DEFINE_string("tokens", None, "token ids: .npy file, int32 [T]", required=True)
_OUT = flags.DEFINE_string("out", None, "logits: .npy file, float32 [T, V]", required=True)
_BUDGET_MIB = flags.DEFINE_float("budget_mib", None, "expert pool; all resident by default", 0.0)


def read_tokens(path: Path, config: ModelConfig) -> np.ndarray:
    """Token ids int32 [T]. Raises ValueError unless the model can score them."""
    ids_T = np.load(path, allow_pickle=False)
    if not isinstance(ids_T, np.ndarray) or ids_T.dtype != np.int32 or ids_T.ndim != 1:
        got = f"{ids_T.dtype} {ids_T.shape}" if isinstance(ids_T, np.ndarray) else "an archive"
        raise ValueError(f"{path}: got {got}; want one array, int32 [T]")
    if not 1 <= len(ids_T) <= config.context_length:
        raise ValueError(
            f"{path}: got {len(ids_T)} tokens; want 1 to the context of {config.context_length}"
        )
    if ids_T.min() < 0 or ids_T.max() >= config.vocab_size:
        raise ValueError(
            f"{path}: got ids from {ids_T.min()} to {ids_T.max()}; want 0 to "
            f"{config.vocab_size - 1}"
        )
    return ids_T


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file, or nothing."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def main(_):
    if _THREADS.value is not None:
        set_threads(_THREADS.value)
    model = load_model(_MODEL.value or reference.model_path(), _IMPLEMENTATION.value)
    ids_T = read_tokens(Path(_TOKENS.value), model.config)
    budget_bytes = None if _BUDGET_MIB.value is None else int(_BUDGET_MIB.value * 2**20)
    store = HostExperts(model.config, model.file)
    engine = Engine(model, store, budget_bytes, kv_format=_KV_FORMAT.value)
    write_array(Path(_OUT.value), np.asarray(engine.score(ids_T[None])[0]))


if __name__ == "__main__":
    cli.run(main)
