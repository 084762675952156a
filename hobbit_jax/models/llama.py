"""Mixtral, whose files are of the architecture `llama` with experts.

The converter permutes rows of q and k for interleaved rotary pairs.

Source: llama.cpp, src/models/llama.cpp; conversion, `LlamaModel.permute`.
"""

from __future__ import annotations

from typing import Any

from hobbit_jax.model_file.metadata import integer
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
    """See `registry.Family`. Raises NotImplementedError for a dense model."""
    if not keys.read("expert_count", integer(), 0):
        raise NotImplementedError(
            f"{keys.path}: a dense llama model (llama.expert_count is 0); supported are llama "
            "models with experts, such as Mixtral"
        )
    block = BlockConfig(grouped_query(keys, rope_style="norm", qk_norm="none"))
    return ModelConfig(
        **ends(keys),
        blocks=(block,) * keys.block_count(),
        router=softmax_router(keys, renormalise=True),
        **experts(keys, _WIDTH),
    )


def metadata(config: ModelConfig) -> dict[str, Any]:
    """See `registry.Family`."""
    return decoder_metadata(config, _WIDTH)
