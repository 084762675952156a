"""True shapes of models that a synthetic file can have.

Owns the numbers. Sources: the config.json files that Qwen, Mistral AI and the Allen Institute for
AI publish with these models; of Qwen3.6-35B-A3B, that of Qwen3.5-35B-A3B, which has its shape.
"""

from __future__ import annotations

from hobbit_jax.models.config import (
    BlockConfig,
    GatedDeltaNet,
    GroupedQuery,
    ModelConfig,
    Rope,
    RouterConfig,
)


def _qwen35_block(attention: GroupedQuery | GatedDeltaNet) -> BlockConfig:
    return BlockConfig(attention, "post_attention_norm", d_shared=512, shared_gate=1)


PRESETS = {
    "qwen3.6-35b-a3b": ModelConfig(
        arch="qwen35moe", d_model=2048, vocab_size=248320, context_length=262144, rms_eps=1e-6,
        blocks=(
            *(_qwen35_block(GatedDeltaNet(16, 32, 128, 4, "tiled")),) * 3,
            _qwen35_block(GroupedQuery(16, 2, 256, Rope(1e7, 64, "neox"), "head", gated=True)),
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
