"""DeepSeek-V3: queries from a latent vector, biased sigmoid scores, groups, a scale."""

from __future__ import annotations

from typing import Any

from families import Family, Weights, _deepseek

KEYS = _deepseek.KEYS | {
    "block_count": 3,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.q_lora_rank": 32,
    "expert_count": 8,
    "expert_shared_count": 1,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
    "expert_weights_scale": 1.8,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "rope.freq_base": 1e6,
}


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.DeepseekV3Config(
        **_deepseek.config_arguments(KEYS),
        rope_interleave=True,
        num_mtp_layers=0,
    )
    return _deepseek.hugging_face(transformers.DeepseekV3ForCausalLM, config, weights)


FAMILY = Family(
    "deepseek2", 3, KEYS, lambda add: _deepseek.draw(add, KEYS), hugging_face, "mlp.gate"
)
