"""Ling-mini, Ling-flash and Ring-mini 2.0 (`bailingmoe2`): one matrix of q, k and v, and groups.

Source: llama.cpp, src/models/bailingmoe2.cpp.
"""

from __future__ import annotations

from typing import Any

from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.keys import (
    Keys,
    any_router,
    decoder_metadata,
    dense_then_experts,
    dense_then_experts_metadata,
    ends,
    experts,
    grouped_query,
    router_metadata,
)

_WIDTH = "expert_feed_forward_length"


def read(keys: Keys) -> ModelConfig:
    """See `registry.Family`."""
    about_experts = experts(keys, _WIDTH)
    attention = grouped_query(keys, "neox", qk_norm="head", partial_rope=True, fused=True)
    return ModelConfig(
        **ends(keys),
        **dense_then_experts(keys, attention, about_experts["d_expert"]),
        router=any_router(keys, "softmax"),
        **about_experts,
    )


def metadata(config: ModelConfig) -> dict[str, Any]:
    """See `registry.Family`."""
    return {
        **decoder_metadata(config, _WIDTH),
        **dense_then_experts_metadata(config),
        **router_metadata(config.router),
    }
