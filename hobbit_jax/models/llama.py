"""Llama 2 and 3, Mistral, and Mixtral with its experts (`llama`).

The converter permutes rows of q and k for interleaved rotary pairs.

Source: llama.cpp, src/models/llama.cpp; conversion, `LlamaModel.permute`.
"""

from __future__ import annotations

from hobbit_jax.model_file.metadata import integer
from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, equal_blocks, grouped_query, softmax_router


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, rope_style="norm", qk_norm="none"))
    has_experts = keys.read("expert_count", integer(), 0)
    router = softmax_router(keys, renormalise=True) if has_experts else None
    return equal_blocks(keys, block, router, "feed_forward_length")
