"""OLMoE (`olmoe`): OLMoE-1B-7B. Norms of q and k go over the whole projection.

Source: llama.cpp, src/models/olmoe.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, ends, experts, grouped_query, softmax_router


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, rope_style="neox", qk_norm="full"))
    return ModelConfig(
        **ends(keys, may_tie_head=False),
        blocks=(block,) * keys.block_count(),
        router=softmax_router(keys, renormalise=False),
        **experts(keys, "feed_forward_length"),
    )
