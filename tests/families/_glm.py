"""What GLM-4.5 and Ling 2.0 share; transformers' class of the first computes both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiny_models import VOCAB

from families import BLOCK, ROUTED_FFN, Add, Weights, gated_mlp, loaded, settings

D, F, DENSE, KV_HEADS, WIDTH, K = 128, 32, 96, 2, 32, 3
KEYS = {
    "block_count": 3,
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": DENSE,
    "leading_dense_block_count": 1,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "rope.freq_base": 1e6,
    "rope.dimension_count": WIDTH // 2,
    "expert_used_count": K,
    "expert_feed_forward_length": F,
    "expert_gating_func": 2,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
}


def draw(add: Add, keys: Mapping[str, Any], norm: str) -> None:
    """Ends, norms, output projection and FFNs of all blocks; `norm` is that before the FFN."""
    experts = keys["expert_count"]
    add("token_embd.weight", (VOCAB, D), "Q8_0", 1.0)
    add("output_norm.weight", (D,), mean=1.0)
    add("output.weight", (VOCAB, D), "Q8_0", 0.2)
    for layer in range(keys["block_count"]):
        block = f"blk.{layer}"
        for role in ("attn_norm", norm):
            add(f"{block}.{role}.weight", (D,), mean=1.0)
        add(f"{block}.attn_output.weight", (D, keys["attention.head_count"] * WIDTH), "Q8_0")
        if layer == 0:
            gated_mlp(add, block, "", D, DENSE)
            continue
        add(f"{block}.ffn_gate_inp.weight", (experts, D))
        add(f"{block}.exp_probs_b.bias", (experts,), std=0.1)
        gated_mlp(add, block, "_exps", D, F, experts)
        gated_mlp(add, block, "_shexp", D, F)


def hugging_face(
    keys: Mapping[str, Any], qk_norm: bool, weights: Weights, names: Mapping[str, str]
) -> Any:
    """GLM's model, with projections of q, k and v by `names`."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.Glm4MoeConfig(
        **settings(keys, partial_rotary_factor=0.5),
        intermediate_size=DENSE,
        moe_intermediate_size=F,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        attention_bias=not qk_norm,
        use_qk_norm=qk_norm,
        n_routed_experts=keys["expert_count"],
        n_shared_experts=1,
        n_group=keys.get("expert_group_count", 1),
        topk_group=keys.get("expert_group_used_count", 1),
        routed_scaling_factor=keys["expert_weights_scale"],
        norm_topk_prob=True,
        first_k_dense_replace=1,
        num_mtp_layers=0,
    )
    return loaded(transformers.Glm4MoeForCausalLM(config), weights, BLOCK | ROUTED_FFN | names)
