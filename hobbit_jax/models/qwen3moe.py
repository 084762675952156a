"""Qwen3 with experts (`qwen3moe`), as Qwen3-30B-A3B and Qwen3-Coder, and dense (`qwen3`).

Source: llama.cpp, src/models/qwen3moe.cpp and qwen3.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, equal_blocks, grouped_query, softmax_router


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, rope_style="neox", qk_norm="head"))
    return equal_blocks(keys, block, softmax_router(keys, renormalise=True))


def read_dense(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    return equal_blocks(keys, BlockConfig(grouped_query(keys, "neox", qk_norm="head")), None)
