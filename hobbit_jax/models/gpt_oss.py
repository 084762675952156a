"""gpt-oss (`gpt-oss`): gpt-oss-20b, gpt-oss-120b.

All projections, the router and the experts have biases, and the experts a SwiGLU of their own.
Heads have sinks, and every other layer, from the first on, sees a window.

Source: llama.cpp, src/models/openai-moe.cpp; conversion/gpt_oss.py (gate and up rows apart).
"""

from __future__ import annotations

from dataclasses import replace

from hobbit_jax.model_file.metadata import integer
from hobbit_jax.models.config import BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.keys import Keys, ends, experts, grouped_query

_BIASED = ("attn_q", "attn_k", "attn_v", "attn_output")
_WEIGHTS_OF_CHOSEN = 3  # gguf.ExpertGatingFuncType; files do not say it


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    keys.expect("expert_gating_func", 0, _WEIGHTS_OF_CHOSEN)
    full = replace(grouped_query(keys, "neox", "none", biased=_BIASED), sinks=True)
    windowed = replace(full, window=keys.read("attention.sliding_window", integer(1)))
    blocks = [BlockConfig(a, ffn_norm="post_attention_norm") for a in (windowed, full)]
    return ModelConfig(
        **ends(keys),
        blocks=tuple(blocks[number % 2] for number in range(keys.block_count())),
        router=RouterConfig("softmax_of_chosen", renormalise=False, biased=True),
        expert_function="clipped_swiglu",
        expert_biases=True,
        **experts(keys),
    )
