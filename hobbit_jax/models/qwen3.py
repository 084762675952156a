"""Qwen3 (`qwen3`), dense.

Source: llama.cpp, src/models/qwen3.cpp.
"""

from __future__ import annotations

from typing import Any

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, decoder_metadata, dense_ffn, ends, grouped_query


def read(keys: Keys) -> ModelConfig:
    """See `registry.Family`."""
    block = BlockConfig(grouped_query(keys, "neox", "head"))
    return ModelConfig(**ends(keys), blocks=(block,) * keys.block_count(), **dense_ffn(keys))


def metadata(config: ModelConfig) -> dict[str, Any]:
    """See `registry.Family`."""
    return decoder_metadata(config, "feed_forward_length")
