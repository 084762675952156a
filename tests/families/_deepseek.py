"""DeepSeek's attention: what V2-Lite and V3 share. Rotary pairs are interleaved in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tiny_models import VOCAB

from families import BLOCK, ROUTED_FFN, Add, Weights, gated_mlp, loaded, settings

D, F, DENSE, HEADS, LATENT, PLAIN, ROPE, VALUE, K = 64, 32, 96, 4, 64, 32, 16, 24, 2
KEYS = {
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": DENSE,
    "leading_dense_block_count": 1,
    "expert_feed_forward_length": F,
    "expert_used_count": K,
    "attention.head_count": HEADS,
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": LATENT,
    "attention.key_length": LATENT + ROPE,
    "attention.value_length": LATENT,
    "attention.key_length_mla": PLAIN + ROPE,
    "attention.value_length_mla": VALUE,
    "rope.dimension_count": ROPE,
}
_NAMES = {
    "attn_q_a": "self_attn.q_a_proj.weight",
    "attn_q_a_norm": "self_attn.q_a_layernorm.weight",
    "attn_q_b": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm.weight",
}


def draw(add: Add, keys: Mapping[str, Any]) -> None:
    """All tensors of a model of these keys."""
    query, query_latent = HEADS * (PLAIN + ROPE), keys.get("attention.q_lora_rank", 0)
    experts, width = keys["expert_count"], F * keys["expert_shared_count"]
    add("token_embd.weight", (VOCAB, D), "Q8_0", 1.0)
    add("output_norm.weight", (D,), mean=1.0)
    add("output.weight", (VOCAB, D), "Q8_0", 0.2)
    for layer in range(keys["block_count"]):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}.{norm}.weight", (D,), mean=1.0)
        if query_latent:
            add(f"{block}.attn_q_a.weight", (query_latent, D), "Q8_0")
            add(f"{block}.attn_q_a_norm.weight", (query_latent,), mean=1.0)
            add(f"{block}.attn_q_b.weight", (query, query_latent), "Q8_0", 0.25)
        else:
            add(f"{block}.attn_q.weight", (query, D), "Q8_0")
        add(f"{block}.attn_kv_a_mqa.weight", (LATENT + ROPE, D), "Q8_0")
        add(f"{block}.attn_kv_a_norm.weight", (LATENT,), mean=1.0)
        add(f"{block}.attn_k_b.weight", (HEADS, LATENT, PLAIN), "Q8_0", 0.3)
        add(f"{block}.attn_v_b.weight", (HEADS, VALUE, LATENT), "F16", 0.2)
        add(f"{block}.attn_output.weight", (D, HEADS * VALUE), "F16", 0.12)
        if layer == 0:
            gated_mlp(add, block, "", D, DENSE)
            continue
        add(f"{block}.ffn_gate_inp.weight", (experts, D))
        if keys["expert_gating_func"] == 2:
            add(f"{block}.exp_probs_b.bias", (experts,), std=0.1)
        gated_mlp(add, block, "_exps", D, F, experts)
        gated_mlp(add, block, "_shexp", D, width)


def hugging_face(kind: type, config: Any, weights: Weights) -> Any:
    """The model of a configuration, with the one epsilon that the file has in every norm."""
    both = {}
    for layer in range(config.num_hidden_layers):
        keys_HZN, values_HVZ = (weights[f"blk.{layer}.attn_{part}_b.weight"] for part in "kv")
        # One matrix, by head the rows of its keys and then those of its values.
        rows_HNZ = np.concatenate([keys_HZN.swapaxes(1, 2), values_HVZ], axis=1)
        name = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        both[name] = rows_HNZ.reshape(-1, LATENT)
    model = loaded(kind(config), weights, BLOCK | ROUTED_FFN | _NAMES, both)
    for path, module in model.named_modules():
        if path.endswith("a_layernorm"):
            module.variance_epsilon = config.rms_norm_eps
    return model


def config_arguments(keys: Mapping[str, Any], **rope: Any) -> dict[str, Any]:
    """What both configurations of transformers call alike."""
    return settings(keys, **rope) | {
        "intermediate_size": DENSE,
        "moe_intermediate_size": F,
        "num_key_value_heads": HEADS,
        "n_shared_experts": keys["expert_shared_count"],
        "n_routed_experts": keys["expert_count"],
        "routed_scaling_factor": keys["expert_weights_scale"],
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "n_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
        "kv_lora_rank": LATENT,
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": PLAIN,
        "v_head_dim": VALUE,
        "first_k_dense_replace": 1,
    }
