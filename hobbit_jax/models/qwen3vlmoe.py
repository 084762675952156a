"""The language model of Qwen3-VL with experts (`qwen3vlmoe`): Qwen3-VL-30B-A3B.

On texts it is a Qwen3-MoE: all sections of its rotary embedding share one position, and features of
images that some blocks add (`n_deepstack_layers`) are not there.

Source: llama.cpp, src/models/qwen3vlmoe.cpp.
"""

from hobbit_jax.models.qwen3moe import metadata, read

__all__ = ["metadata", "read"]
