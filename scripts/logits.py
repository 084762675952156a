"""Writes the logits of one token sequence, for comparison with other programs.

    python scripts/logits.py --model M.gguf --tokens ids.npy --out logits.npy [--budget_mib 64]

`ids.npy` is int32 [T]; row t of `logits.npy`, float32 [T, V], scores token t + 1. Without
--budget_mib every expert is resident; the result is the same under any budget, as long as no
--miss_mode serves low copies.
"""

from pathlib import Path

import numpy as np
from absl import flags

from hobbit_jax import cli
from hobbit_jax.atomic import check_space, replacing
from hobbit_jax.engine_flags import engine_flags
from hobbit_jax.models.config import ModelConfig

ENGINE = engine_flags(
    "model", "implementation", "devices", "budget_mib", "policy", "miss_mode", "link_to_host",
    "low_format", "low_share", "profile", "pin_share", "chunk_tokens", "threads", "kv_format",
    "trace_out",
)  # fmt: skip
_TOKENS = flags.DEFINE_string(
    "tokens", None, "Path of the token ids, a .npy file of int32 [T].", required=True
)
_OUT = flags.DEFINE_string(
    "out", None, "Path of the .npy file to write, float32 [T, V].", required=True
)


def read_tokens(path: Path, config: ModelConfig) -> np.ndarray:
    """Token ids int32 [T]. Raises ValueError unless the model can score them."""
    cli.input_file("tokens", path)
    try:
        ids_T = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:  # what np.load makes of any other file
        raise ValueError(f"--tokens: {path} is no .npy file; want one array, int32 [T]") from error
    if not isinstance(ids_T, np.ndarray) or ids_T.dtype != np.int32 or ids_T.ndim != 1:
        got = f"{ids_T.dtype} {ids_T.shape}" if isinstance(ids_T, np.ndarray) else "an archive"
        raise ValueError(f"--tokens: {path} holds {got}; want one array, int32 [T]")
    if not 1 <= len(ids_T) <= config.context_length:
        raise ValueError(
            f"--tokens: {path} holds {len(ids_T)} tokens; want 1 to the model's context of "
            f"{config.context_length}"
        )
    if ids_T.min() < 0 or ids_T.max() >= config.vocab_size:
        raise ValueError(
            f"--tokens: {path} holds ids from {ids_T.min()} to {ids_T.max()}; want 0 to "
            f"{config.vocab_size - 1}"
        )
    return ids_T


def main(_):
    out, options = cli.output_file("out", str(_OUT.value)), ENGINE()
    model = options.load_model()
    ids_T = read_tokens(Path(str(_TOKENS.value)), model.config)
    engine = options.make_engine(model)
    with options.recorded_routing(engine):
        logits_TV = np.asarray(engine.score(ids_T[None])[0])
    check_space(out, logits_TV.nbytes)
    with replacing(out) as partial, partial.open("wb") as file:
        np.save(file, logits_TV)


if __name__ == "__main__":
    cli.run(main)
