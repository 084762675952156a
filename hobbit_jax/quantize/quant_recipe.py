"""Which GGUF type each tensor of a model gets in llama.cpp's Q4_K_M.

Source: llama.cpp, src/llama-quant.cpp (`tensor_allows_quantization`, `llama_tensor_get_type_impl`,
`tensor_type_fallback`), for the architectures that we run and without an importance matrix.
"""

import re

from hobbit_jax.models.config import OUTPUT, TOKEN_EMBEDDING, ModelConfig
from pallas_kernels.formats import get_format

FILE_TYPE_F32, FILE_TYPE_Q4_K_M = 0, 15  # llama.cpp's llama_ftype

_FLOATS = r"_norm\.weight$|ffn_gate_inp\.weight|ssm_conv1d|shortconv\.conv\.|\.bias$"
# For rows that are no whole number of blocks; F16 where they are no multiple of 32 either.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FALLBACK |= dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")
_FALLBACK |= dict.fromkeys(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
)


def format_in_a_file(format: str, columns: int) -> str:
    """The type that llama.cpp gives rows of `columns` weights where `format` was asked for.

    Raises:
        NotImplementedError: llama.cpp has none for such rows.
    """
    block = get_format(format).block_weights
    if columns % block == 0:
        return format
    if block > 32 and format not in _FALLBACK:
        raise NotImplementedError(
            f"llama.cpp has no type for rows of {columns} weights in the place of {format}, whose "
            f"blocks have {block}; it has one for {', '.join(_FALLBACK)}"
        )
    return "F16" if columns % 32 else _FALLBACK[format]


def q4_k_m_format(name: str, shape: tuple[int, ...], config: ModelConfig) -> str:
    """The type of the tensor `name` of row-major `shape`.

    Router, norms, biases and short convolutions stay float32; queries, keys and values that are
    fused are Q5_K; the head is Q6_K (the embedding too when it is the head), the embedding Q4_K;
    `attn_v` and `ffn_down` are Q6_K in the first and last eighth of the layers and in every third
    one between. A model of eight experts has its small attention matrices in more: `attn_k` and
    `attn_v` in Q8_0, `attn_output` in Q5_K.
    """
    if len(shape) == 1 or re.search(_FLOATS, name):
        return "F32"
    format = "Q4_K"
    if name == OUTPUT or (config.tied_head and name == TOKEN_EMBEDDING):
        format = "Q8_0" if shape[-1] % 256 else "Q6_K"
    elif "attn_qkv.weight" in name:
        format = "Q5_K"
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
    return format_in_a_file(format, shape[-1])
