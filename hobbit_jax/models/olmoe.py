"""OLMoE (`olmoe`): OLMoE-1B-7B. Norms of q and k go over the whole projection, no head is tied.

Source: llama.cpp, src/models/olmoe.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, equal_blocks, grouped_query, softmax_router


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, rope_style="neox", qk_norm="full"))
    router = softmax_router(keys, renormalise=False)
    return replace(equal_blocks(keys, block, router, "feed_forward_length"), tied_head=False)
