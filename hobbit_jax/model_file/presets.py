"""True shapes of models that a synthetic file can have.

Owns the numbers. Sources: the config.json files that Qwen, Mistral AI and the Allen Institute for
AI publish with these models.
"""

from __future__ import annotations

from hobbit_jax.model_file.architecture import ModelConfig

PRESETS = {
    "qwen3-30b-a3b": ModelConfig(
        arch="qwen3moe", n_layers=48, d_model=2048, n_heads=32, n_kv_heads=4, head_dim=128,
        n_experts=128, experts_per_token=8, d_expert=768, vocab_size=151936,
        context_length=40960, rope_base=1e6, rope_dim=128, rope_style="neox", rms_eps=1e-6,
        qk_norm="head", renormalise_topk=True, tied_head=False,
    ),
    "mixtral-8x7b": ModelConfig(
        arch="llama", n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128,
        n_experts=8, experts_per_token=2, d_expert=14336, vocab_size=32000,
        context_length=32768, rope_base=1e6, rope_dim=128, rope_style="norm", rms_eps=1e-5,
        qk_norm="none", renormalise_topk=True, tied_head=False,
    ),
    "olmoe-1b-7b": ModelConfig(
        arch="olmoe", n_layers=16, d_model=2048, n_heads=16, n_kv_heads=16, head_dim=128,
        n_experts=64, experts_per_token=8, d_expert=1024, vocab_size=50304,
        context_length=4096, rope_base=1e4, rope_dim=128, rope_style="neox", rms_eps=1e-5,
        qk_norm="full", renormalise_topk=False, tied_head=False,
    ),
    # Qwen3's proportions in a few megabytes, for tests.
    "tiny": ModelConfig(
        arch="qwen3moe", n_layers=8, d_model=256, n_heads=4, n_kv_heads=2, head_dim=64,
        n_experts=32, experts_per_token=4, d_expert=256, vocab_size=1024,
        context_length=4096, rope_base=1e6, rope_dim=64, rope_style="neox", rms_eps=1e-6,
        qk_norm="head", renormalise_topk=True, tied_head=False,
    ),
}  # fmt: skip
