"""Qwen3-MoE (`qwen3moe`): Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B.

Source: llama.cpp, src/models/qwen3moe.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, ends, experts, grouped_query, softmax_router


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, rope_style="neox", qk_norm="head"))
    return ModelConfig(
        **ends(keys),
        blocks=(block,) * keys.block_count(),
        router=softmax_router(keys, renormalise=True),
        **experts(keys),
    )
