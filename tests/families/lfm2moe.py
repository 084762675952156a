"""LFM2: short convolutions in all blocks but the second, a dense FFN in the first."""

from __future__ import annotations

from typing import Any

from tiny_models import VOCAB

from families import BLOCK, Add, Family, Weights, gated_mlp, loaded, settings

D, F, DENSE, E, K, HEADS, KV_HEADS, WIDTH, KERNEL = 128, 32, 96, 8, 3, 4, 2, 32, 3
ATTENDS = (False, True, False, False)
KEYS = {
    "block_count": len(ATTENDS),
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": DENSE,
    "leading_dense_block_count": 1,
    "attention.head_count": HEADS,
    "attention.head_count_kv": [KV_HEADS * attends for attends in ATTENDS],
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e6,
    "shortconv.l_cache": KERNEL,
    "expert_count": E,
    "expert_used_count": K,
    "expert_feed_forward_length": F,
    "expert_gating_func": 2,
}
_NAMES = BLOCK | {
    "attn_norm": "operator_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    **{f"attn_{role}_norm": f"self_attn.{role}_layernorm.weight" for role in "qk"},
    "attn_output": "self_attn.out_proj.weight",
    **{f"shortconv.{role}.weight": f"conv.{role}.weight" for role in ("in_proj", "out_proj")},
    "ffn_gate": "feed_forward.w1.weight",
    "ffn_up": "feed_forward.w3.weight",
    "ffn_down": "feed_forward.w2.weight",
    "ffn_gate_inp": "feed_forward.gate.weight",
    "ffn_gate_exps + ffn_up_exps": "feed_forward.experts.gate_up_proj",
    "ffn_down_exps": "feed_forward.experts.down_proj",
    "exp_probs_b.bias": "feed_forward.expert_bias",
}


def draw(add: Add) -> None:
    """See `Family`."""
    add("token_embd.weight", (VOCAB, D), "Q8_0", 0.2)
    add("token_embd_norm.weight", (D,), mean=1.0)
    for layer, attends in enumerate(ATTENDS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}.{norm}.weight", (D,), mean=1.0)
        if attends:
            for role, heads in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items():
                add(f"{block}.attn_{role}.weight", (heads * WIDTH, D), "Q8_0")
            for role in "qk":
                add(f"{block}.attn_{role}_norm.weight", (WIDTH,), mean=1.0)
            add(f"{block}.attn_output.weight", (D, HEADS * WIDTH), "Q8_0")
        else:
            add(f"{block}.shortconv.conv.weight", (D, KERNEL), std=0.6)
            add(f"{block}.shortconv.in_proj.weight", (3 * D, D), "Q8_0", 0.1)
            add(f"{block}.shortconv.out_proj.weight", (D, D), "Q8_0", 0.1)
        if layer == 0:
            gated_mlp(add, block, "", D, DENSE)
            continue
        add(f"{block}.ffn_gate_inp.weight", (E, D))
        add(f"{block}.exp_probs_b.bias", (E,), std=0.1)
        gated_mlp(add, block, "_exps", D, F, E)


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.Lfm2MoeConfig(
        **settings(KEYS),
        intermediate_size=DENSE,
        moe_intermediate_size=F,
        num_key_value_heads=KV_HEADS,
        num_experts=E,
        num_dense_layers=1,
        conv_L_cache=KERNEL,
        norm_eps=KEYS["attention.layer_norm_rms_epsilon"],
        layer_types=["full_attention" if attends else "conv" for attends in ATTENDS],
    )
    kernels = {
        f"model.layers.{layer}.conv.conv.weight": weights[f"blk.{layer}.shortconv.conv.weight"]
        for layer, attends in enumerate(ATTENDS)
        if not attends
    }
    kernels = {name: kernel[:, None] for name, kernel in kernels.items()}
    norm = ("token_embd_norm", "embedding_norm")
    return loaded(transformers.Lfm2MoeForCausalLM(config), weights, _NAMES, kernels, norm)


FAMILY = Family("lfm2moe", 3, KEYS, draw, hugging_face, "feed_forward.gate")
