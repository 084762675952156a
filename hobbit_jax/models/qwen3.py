"""Qwen3 (`qwen3`), dense.

Source: llama.cpp, src/models/qwen3.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, dense_ffn, ends, grouped_query


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, "neox", "head"))
    return ModelConfig(**ends(keys), blocks=(block,) * keys.block_count(), **dense_ffn(keys))
