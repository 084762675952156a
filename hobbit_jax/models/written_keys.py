"""Metadata of the files that we make: what the families of such files read.

Source: llama.cpp, gguf-py/gguf/constants.py and src/models/ (keys that it wants though none reads).
"""

from typing import Any

from hobbit_jax.models.attention import GroupedQuery
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.delta_net import GatedDeltaNet

# By architecture, the key of an expert's width.
_WIDTH_KEYS = {
    **dict.fromkeys(("qwen3moe", "qwen35moe"), "expert_feed_forward_length"),
    **dict.fromkeys(("llama", "olmoe"), "feed_forward_length"),
}


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """What `registry.read_config` reads: the metadata of a file of this model, but its tokenizer.

    Raises:
        NotImplementedError: a dense model, YaRN, or an architecture of which we make no files.
    """
    attentions = [block.attention for block in config.blocks]
    grouped = [attention for attention in attentions if isinstance(attention, GroupedQuery)]
    if config.arch not in _WIDTH_KEYS or config.has_dense_ffn or grouped[0].rope.yarn:
        raise NotImplementedError(
            f"metadata of such a model of {config.arch} is not written; supported are "
            f"{', '.join(_WIDTH_KEYS)} with experts and without YaRN"
        )
    attends = grouped[0]
    keys = {
        "block_count": config.n_blocks,
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        # Of a dense layer, which no model here has; llama.cpp wants the key all the same.
        "feed_forward_length": config.d_expert * config.experts_per_token,
        _WIDTH_KEYS[config.arch]: config.d_expert,
        "attention.head_count": attends.n_heads,
        "attention.head_count_kv": attends.n_kv_heads,
        "attention.key_length": attends.head_dim,
        "attention.value_length": attends.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "rope.freq_base": attends.rope.base,
        "rope.dimension_count": attends.rope.dim,
        "expert_count": config.n_experts,
        "expert_used_count": config.experts_per_token,
        "vocab_size": config.vocab_size,
    }
    for delta in {attention for attention in attentions if isinstance(attention, GatedDeltaNet)}:
        third, left = divmod(attends.rope.dim // 2, 3)
        keys |= {
            "expert_shared_feed_forward_length": config.blocks[0].d_shared,
            "full_attention_interval": attentions.index(attends) + 1,
            "ssm.conv_kernel": delta.kernel,
            "ssm.state_size": delta.d_state,
            "ssm.group_count": delta.n_key_heads,
            "ssm.time_step_rank": delta.n_value_heads,
            "ssm.inner_size": delta.value_width,
            # Which llama.cpp wants: they matter for images, a text has one position for all.
            "rope.dimension_sections": [third + (left > 0), third + (left > 1), third, 0],
        }
    of_arch = {f"{config.arch}.{key}": value for key, value in keys.items()}
    return {"general.architecture": config.arch, **of_arch}
