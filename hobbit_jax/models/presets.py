"""True shapes of models: of those that a synthetic file can have, and of others that a plan knows.

Owns the numbers. Sources: the config.json files that are published with these models; of
Qwen3.6-35B-A3B, that of Qwen3.5-35B-A3B, and of Qwen3-Coder-Next, that of Qwen3-Next-80B-A3B, which
have their shapes.
"""

import math

from hobbit_jax.models.attention import GroupedQuery, Rope, Yarn
from hobbit_jax.models.config import Attention, BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.delta_net import GatedDeltaNet
from hobbit_jax.models.latent_attention import LatentAttention


def _qwen_hybrid(*attentions: Attention) -> tuple[BlockConfig, ...]:
    return tuple(
        BlockConfig(attention, "post_attention_norm", d_shared=512, shared_gate=1)
        for attention in attentions
    )


def _gpt_oss(n_blocks: int, n_experts: int) -> ModelConfig:
    rope = Rope(150000.0, 64, "neox", Yarn(32.0, 4096, 32.0, 1.0, 1 + 0.1 * math.log(32)))
    biased = ("attn_q", "attn_k", "attn_v", "attn_output")
    blocks = [
        BlockConfig(
            GroupedQuery(64, 8, 64, rope, biased=biased, window=window, sinks=True),
            "post_attention_norm",
        )
        for window in (128, 0)
    ]
    return ModelConfig(
        arch="gpt-oss", d_model=2880, vocab_size=201088, context_length=131072, rms_eps=1e-5,
        blocks=(*blocks,) * (n_blocks // 2), tied_head=False,
        router=RouterConfig("softmax_of_chosen", renormalise=False, biased=True),
        n_experts=n_experts, experts_per_token=4, d_expert=2880,
        expert_function="clipped_swiglu", expert_biases=True,
    )  # fmt: skip


def _gemma4_block(
    n_kv_heads: int, head_dim: int, base: float, window: int, divisors: tuple[float, ...] = ()
) -> BlockConfig:
    attention = GroupedQuery(
        16, n_kv_heads, head_dim, Rope(base, head_dim, "neox", divisors=divisors), "head",
        window=window, score_scale=1.0, values_are_keys=not window, value_norm=True,
    )  # fmt: skip
    return BlockConfig(attention, "pre_ffw_norm_2", 0, 0, 0, "post_attention_norm", d_beside=2112)


PRESETS = {
    "qwen3.6-35b-a3b": ModelConfig(
        arch="qwen35moe", d_model=2048, vocab_size=248320, context_length=262144, rms_eps=1e-6,
        blocks=_qwen_hybrid(
            *(GatedDeltaNet(16, 32, 128, 4, "tiled"),) * 3,
            GroupedQuery(16, 2, 256, Rope(1e7, 64, "neox"), "head", gated=True),
        ) * 10,
        router=RouterConfig("softmax", renormalise=True),
        n_experts=256, experts_per_token=8, d_expert=512, tied_head=False,
    ),
    "qwen3-30b-a3b": ModelConfig(
        arch="qwen3moe", d_model=2048, vocab_size=151936, context_length=40960, rms_eps=1e-6,
        blocks=(BlockConfig(GroupedQuery(32, 4, 128, Rope(1e6, 128, "neox"), "head")),) * 48,
        router=RouterConfig("softmax", renormalise=True),
        n_experts=128, experts_per_token=8, d_expert=768, tied_head=False,
    ),
    "mixtral-8x7b": ModelConfig(
        arch="llama", d_model=4096, vocab_size=32000, context_length=32768, rms_eps=1e-5,
        blocks=(BlockConfig(GroupedQuery(32, 8, 128, Rope(1e6, 128, "norm"))),) * 32,
        router=RouterConfig("softmax", renormalise=True),
        n_experts=8, experts_per_token=2, d_expert=14336, tied_head=False,
    ),
    "olmoe-1b-7b": ModelConfig(
        arch="olmoe", d_model=2048, vocab_size=50304, context_length=4096, rms_eps=1e-5,
        blocks=(BlockConfig(GroupedQuery(16, 16, 128, Rope(1e4, 128, "neox"), "full")),) * 16,
        router=RouterConfig("softmax", renormalise=False),
        n_experts=64, experts_per_token=8, d_expert=1024, tied_head=False,
    ),
    # Qwen3's proportions in a few megabytes, for tests.
    "tiny": ModelConfig(
        arch="qwen3moe", d_model=256, vocab_size=1024, context_length=4096, rms_eps=1e-6,
        blocks=(BlockConfig(GroupedQuery(4, 2, 64, Rope(1e6, 64, "neox"), "head")),) * 8,
        router=RouterConfig("softmax", renormalise=True),
        n_experts=32, experts_per_token=4, d_expert=256, tied_head=False,
    ),
}  # fmt: skip

_LATENT_YARN = Yarn(40.0, 4096, 32.0, 1.0, 1.0)
_DEEPSEEK = LatentAttention(16, 512, 0, 128, 128, Rope(1e4, 64, "norm", _LATENT_YARN), 0.0707)
_GLM_FLASH = LatentAttention(20, 512, 768, 192, 256, Rope(1e6, 64, "norm"))
_GLM = GroupedQuery(96, 8, 128, Rope(1e6, 64, "neox"), biased=("attn_q", "attn_k", "attn_v"))

# Models of which no synthetic file is made.
PLANNED = {
    "qwen3-coder-next-80b": ModelConfig(
        arch="qwen3next", d_model=2048, vocab_size=151936, context_length=262144, rms_eps=1e-6,
        blocks=_qwen_hybrid(
            *(GatedDeltaNet(16, 32, 128, 4, "grouped"),) * 3,
            GroupedQuery(16, 2, 256, Rope(1e7, 64, "neox"), "head", gated=True),
        ) * 12,
        router=RouterConfig("softmax", renormalise=True),
        n_experts=512, experts_per_token=10, d_expert=512, tied_head=False,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "gemma-4-26b-a4b": ModelConfig(
        arch="gemma4", d_model=2816, vocab_size=262144, context_length=262144, rms_eps=1e-6,
        blocks=(
            *(_gemma4_block(8, 256, 1e4, 1024),) * 5,
            _gemma4_block(2, 512, 1e6, 0, (1.0,) * 64 + (1e30,) * 192),
        ) * 5,
        router=RouterConfig("softmax", renormalise=True, own_input=True, expert_scale=True),
        n_experts=128, experts_per_token=8, d_expert=704, fused_gate_up=True, tied_head=True,
        expert_function="geglu", embedding_scale=math.sqrt(2816), logit_softcap=30.0,
        rope_divisors=256,
    ),
    "glm-4.7-flash": ModelConfig(
        arch="deepseek2", d_model=2048, vocab_size=154880, context_length=202752, rms_eps=1e-5,
        blocks=(
            BlockConfig(_GLM_FLASH, d_dense=10240),
            *(BlockConfig(_GLM_FLASH, d_shared=1536),) * 46,
        ),
        router=RouterConfig("sigmoid", renormalise=True, scale=1.8, selection_bias=True),
        n_experts=64, experts_per_token=4, d_expert=1536, tied_head=False,
    ),
    "glm-4.5-air": ModelConfig(
        arch="glm4moe", d_model=4096, vocab_size=151552, context_length=131072, rms_eps=1e-5,
        blocks=(
            BlockConfig(_GLM, "post_attention_norm", d_dense=10944),
            *(BlockConfig(_GLM, "post_attention_norm", d_shared=1408),) * 45,
        ),
        router=RouterConfig("sigmoid", renormalise=True, selection_bias=True),
        n_experts=128, experts_per_token=8, d_expert=1408, tied_head=False,
    ),
    "deepseek-v2-lite": ModelConfig(
        arch="deepseek2", d_model=2048, vocab_size=102400, context_length=163840, rms_eps=1e-6,
        blocks=(
            BlockConfig(_DEEPSEEK, d_dense=10944),
            *(BlockConfig(_DEEPSEEK, d_shared=2816),) * 26,
        ),
        router=RouterConfig("softmax", renormalise=False),
        n_experts=64, experts_per_token=6, d_expert=1408, tied_head=False,
    ),
}  # fmt: skip
