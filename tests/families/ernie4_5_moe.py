"""ERNIE 4.5: interleaved rotary pairs, a softmax whose choice is biased, two shared experts."""

from __future__ import annotations

from typing import Any

from tiny_models import VOCAB

from families import BLOCK, ROUTED_FFN, Add, Family, Weights, gated_mlp, loaded, settings

LAYERS, D, F, DENSE, E, K, HEADS, KV_HEADS, WIDTH = 3, 64, 32, 128, 8, 3, 4, 2, 32
KEYS = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": DENSE,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
    "rope.dimension_count": WIDTH,
    "expert_count": E,
    "expert_used_count": K,
    "expert_feed_forward_length": F,
    "expert_shared_count": 2,
    "expert_shared_feed_forward_length": DENSE // KV_HEADS,  # as the converter computes it
}
_PROJECTIONS = {"q": HEADS * WIDTH, "k": KV_HEADS * WIDTH, "v": KV_HEADS * WIDTH}


def draw(add: Add) -> None:
    """See `Family`."""
    add("token_embd.weight", (VOCAB, D), "Q8_0", 1.0)
    add("output_norm.weight", (D,), mean=1.0)
    add("output.weight", (VOCAB, D), "Q8_0", 0.2)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}.{norm}.weight", (D,), mean=1.0)
        for role, rows in _PROJECTIONS.items():
            add(f"{block}.attn_{role}.weight", (rows, D), "Q8_0")
        add(f"{block}.attn_output.weight", (D, HEADS * WIDTH), "Q8_0", 0.12)
        if layer == 0:
            gated_mlp(add, block, "", D, DENSE)
            continue
        add(f"{block}.ffn_gate_inp.weight", (E, D))
        add(f"{block}.exp_probs_b.bias", (E,), std=0.1)
        gated_mlp(add, block, "_exps", D, F, E)
        gated_mlp(add, block, "_shexp", D, 2 * F)


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.Ernie4_5_MoeConfig(
        **settings(KEYS),
        intermediate_size=DENSE,
        moe_intermediate_size=F,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        moe_num_experts=E,
        moe_k=K,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        tie_word_embeddings=False,
    )
    bias = "mlp.gate.moe_statics.e_score_correction_bias"
    biases = {
        f"model.layers.{layer}.{bias}": weights[f"blk.{layer}.exp_probs_b.bias"][None]
        for layer in range(1, LAYERS)
    }
    names = {ours: theirs for ours, theirs in (BLOCK | ROUTED_FFN).items() if ours[:3] != "exp"}
    return loaded(transformers.Ernie4_5_MoeForCausalLM(config), weights, names, biases)


FAMILY = Family("ernie4_5-moe", 2, KEYS, draw, hugging_face, "mlp.gate")
