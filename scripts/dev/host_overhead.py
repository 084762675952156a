"""Times what a decoded token costs besides arithmetic, in microseconds of each layer.

    python scripts/dev/host_overhead.py [--turns 24] [--tokens 64]

The null-compute model's layers compute next to nothing. To compare two revisions, run this in a
checkout of each.
"""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from hobbit_jax import cli
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.measure import measure, timed_turn
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.model_file.gguf_file import write_gguf
from hobbit_jax.statistics import spread

_TURNS = flags.DEFINE_integer("turns", 24, "Rows decoded with each pool, after a warm-up.", 1)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens decoded of each row.", 1)
_PROMPT = 8
NULL_COMPUTE_LAYERS = 24
WIDTH = 32  # of everything: a layer is a few thousand multiplications
VOCAB = 64


def write_null_compute_model(path: Path, n_layers: int, n_experts: int = 8, k: int = 2) -> None:
    """A `qwen3moe` file in F32 with random weights and as little arithmetic as there can be."""
    rng = np.random.default_rng(0)
    tensors = []

    def add(name: str, *shape: int, ones: bool = False) -> None:
        values = np.ones(shape, np.float32) if ones else rng.normal(0, 0.2, shape)
        raw = np.ascontiguousarray(values, np.float32).view(np.uint8)
        tensors.append((f"{name}.weight", "F32", shape, raw))

    add("token_embd", VOCAB, WIDTH)
    add("output_norm", WIDTH, ones=True)
    for layer in range(n_layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            add(f"{block}.{name}", WIDTH, ones=True)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}", WIDTH, WIDTH)
        add(f"{block}.ffn_gate_inp", n_experts, WIDTH)
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            add(f"{block}.{name}", n_experts, WIDTH, WIDTH)
    keys = {
        "block_count": n_layers,
        "context_length": 256,
        "embedding_length": WIDTH,
        "expert_feed_forward_length": WIDTH,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "attention.key_length": WIDTH,
        "attention.value_length": WIDTH,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e4,
        "expert_count": n_experts,
        "expert_used_count": k,
    }
    metadata = {f"qwen3moe.{key}": value for key, value in keys.items()}
    metadata["tokenizer.ggml.tokens"] = [str(token) for token in range(VOCAB)]
    write_gguf(path, {"general.architecture": "qwen3moe", **metadata}, tensors)


def main(_):
    rng = np.random.default_rng(0)
    ids_RS = rng.integers(0, VOCAB, (_TURNS.value + 1, _PROMPT + _TOKENS.value), np.int32)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "null_compute.gguf"
        write_null_compute_model(path, NULL_COMPUTE_LAYERS)
        model = load_model(path)
        store = HostExperts(model.config, model.file)
        backends = {
            name: functools.partial(
                timed_turn,
                EngineProgram(Engine(model, store, CacheConfig(budget_bytes)), ids_RS.shape[1]),
            )
            for name, budget_bytes in (("all resident", None), ("0.75 MiB", 3 << 18))
        }
        for name, found in measure(backends, ids_RS, _PROMPT).items():
            us_per_layer = spread(1e6 / found.decode_tokens_per_s / NULL_COMPUTE_LAYERS)
            print(json.dumps({"pool": name, "us_per_layer": us_per_layer}))


if __name__ == "__main__":
    cli.run(main)
