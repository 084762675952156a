"""Qwen2 and Qwen2.5 (`qwen2`), dense: Qwen2.5-Coder-1.5B and others.

Source: llama.cpp, src/models/qwen2.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, dense_ffn, ends, grouped_query

BIASED = ("attn_q", "attn_k", "attn_v")


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, "neox", "none", biased=BIASED))
    return ModelConfig(**ends(keys), blocks=(block,) * keys.block_count(), **dense_ffn(keys))
