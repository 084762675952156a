"""OLMoE (`olmoe`): OLMoE-1B-7B. Norms of q and k go over the whole projection.

Source: llama.cpp, src/models/olmoe.cpp.
"""

from __future__ import annotations

from typing import Any

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import (
    Keys,
    decoder_metadata,
    ends,
    experts,
    grouped_query,
    softmax_router,
)

_WIDTH = "feed_forward_length"


def read(keys: Keys) -> ModelConfig:
    """See `registry.Family`."""
    block = BlockConfig(grouped_query(keys, rope_style="neox", qk_norm="full"))
    return ModelConfig(
        **ends(keys, may_tie_head=False),
        blocks=(block,) * keys.block_count(),
        router=softmax_router(keys, renormalise=False),
        **experts(keys, _WIDTH),
    )


def metadata(config: ModelConfig) -> dict[str, Any]:
    """See `registry.Family`."""
    return decoder_metadata(config, _WIDTH)
