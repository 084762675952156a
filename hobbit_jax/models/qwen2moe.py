"""Qwen2-MoE (`qwen2moe`): Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B. A shared expert has a gate of its own.

Source: llama.cpp, src/models/qwen2moe.cpp.
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
    shared_expert,
    softmax_router,
)
from hobbit_jax.models.qwen2 import BIASED

_WIDTH = "expert_feed_forward_length"


def read(keys: Keys) -> ModelConfig:
    """See `registry.Family`."""
    attention = grouped_query(keys, rope_style="neox", qk_norm="none", biased=BIASED)
    block = BlockConfig(attention, **shared_expert(keys))
    return ModelConfig(
        **ends(keys),
        blocks=(block,) * keys.block_count(),
        router=softmax_router(keys, renormalise=False),
        **experts(keys, _WIDTH),
    )


def metadata(config: ModelConfig) -> dict[str, Any]:
    """See `registry.Family`."""
    shared = {"expert_shared_feed_forward_length": config.blocks[0].d_shared}
    return decoder_metadata(config, _WIDTH) | shared
