"""Which GGUF type each tensor of a model gets in llama.cpp's Q4_K_M.

Owns that rule. Source: llama.cpp, src/llama-quant.cpp (`tensor_allows_quantization`,
`llama_tensor_get_type_impl`, `tensor_type_fallback`), for the architectures that we run and without
an importance matrix.
"""

from __future__ import annotations

from hobbit_jax.models.config import OUTPUT, TOKEN_EMBEDDING, ModelConfig

FILE_TYPE_F32, FILE_TYPE_Q4_K_M = 0, 15  # llama.cpp's llama_ftype

# For rows that are no multiple of 256; F16 where they are no multiple of 32 either.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def q4_k_m_format(name: str, shape: tuple[int, ...], config: ModelConfig) -> str:
    """The type of the tensor `name` of row-major `shape`.

    Router and norms stay float32; the head is Q6_K (the embedding too when it is the head), the
    embedding Q4_K; `attn_v` and `ffn_down` are Q6_K in the first and last eighth of the layers and
    in every third one between. A model of eight experts has its small attention matrices in more:
    `attn_k` and `attn_v` in Q8_0, `attn_output` in Q5_K.
    """
    if len(shape) == 1 or name.endswith("_norm.weight") or "ffn_gate_inp.weight" in name:
        return "F32"
    format = "Q4_K"
    if name == OUTPUT or (config.tied_head and name == TOKEN_EMBEDDING):
        format = "Q8_0" if shape[-1] % 256 else "Q6_K"
    elif "attn_v.weight" in name or "ffn_down" in name:
        layer, eighth = int(name.split(".")[1]), config.n_blocks // 8
        last = layer >= 7 * config.n_blocks // 8
        if layer < eighth or last or (layer - eighth) % 3 == 2:
            format = "Q6_K"
    if config.n_experts == 8:
        if "attn_v.weight" in name or "attn_k.weight" in name:
            format = "Q8_0"
        elif "attn_output.weight" in name:
            format = "Q5_K"
    if format in _FALLBACK and shape[-1] % 256:
        format = _FALLBACK[format]
    return "F16" if format != "F32" and shape[-1] % 32 else format
