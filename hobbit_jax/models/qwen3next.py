"""Qwen3-Next (`qwen3next`): Qwen3-Next-80B-A3B, Qwen3-Coder-Next.

As Qwen3.5 (`qwen35moe.py`), but for the order of value heads.

Source: llama.cpp, src/models/qwen3next.cpp and conversion/qwen.py.
"""

from __future__ import annotations

from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.keys import Keys
from hobbit_jax.models.qwen35moe import read_hybrid


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    return read_hybrid(keys, "grouped")
