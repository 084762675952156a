"""From a GGUF file's tensors to Hugging Face's own module of the same model.

Owns the one mapping of our architectures to transformers' classes: hyperparameters, names, and the
order of q and k rows.

Source: transformers 5, models/{qwen3_moe,mixtral,olmoe} (an expert's gate and up are one tensor,
gate first); llama.cpp's conversion, `LlamaModel.permute`. transformers' own GGUF loader is no help:
it has no expert width for Qwen3 and loads a Mixtral file as a dense model without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from hobbit_jax.models.config import (
    OUTPUT,
    OUTPUT_NORM,
    TOKEN_EMBEDDING,
    ModelConfig,
    layer_tensors,
)

# A torch.nn.Module of transformers; PyTorch types each of its attributes as a tensor.
HuggingFaceModel = Any

# Our role → theirs within a layer; experts are apart.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "router": "mlp.gate",
}


def interleaved_to_halves(weights_NK: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation of q or k rows: rotary pairs (2i, 2i + 1) to (i, i + d/2)."""
    n, k = weights_NK.shape
    return weights_NK.reshape(n_heads, n // n_heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def empty_model(
    config: ModelConfig, kernel: str = "sdpa", experts: str | None = None
) -> HuggingFaceModel:
    """The module without weights (on PyTorch's meta device), in float32.

    Args:
        config: of the file.
        kernel: of attention, transformers' `attn_implementation`.
        experts: its `experts_implementation`; None is its own choice.
    """
    attention = config.blocks[0].attention
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.base},
        "num_experts_per_tok": config.experts_per_token,
        "tie_word_embeddings": config.tied_head,
        "attn_implementation": kernel,
        "experts_implementation": experts,
        "pad_token_id": None,
    }
    library: Any = transformers  # its classes take what their types do not say
    if config.arch == "qwen3moe":
        made = library.Qwen3MoeConfig(
            **shared,
            head_dim=attention.head_dim,
            num_experts=config.n_experts,
            moe_intermediate_size=config.d_expert,
            norm_topk_prob=config.router.renormalise,
        )
        kind = library.Qwen3MoeForCausalLM
    elif config.arch == "llama":
        made = library.MixtralConfig(
            **shared,
            head_dim=attention.head_dim,
            num_local_experts=config.n_experts,
            intermediate_size=config.d_expert,
        )
        kind = library.MixtralForCausalLM
    elif config.arch == "olmoe":
        made = library.OlmoeConfig(
            **shared,
            num_experts=config.n_experts,
            intermediate_size=config.d_expert,
            norm_topk_prob=config.router.renormalise,
        )
        kind = library.OlmoeForCausalLM
    else:
        raise NotImplementedError(f"architecture {config.arch!r} has no Hugging Face module here")
    with torch.device("meta"):
        model = kind(made)
    # Its frequencies are no weights: nothing would fill them.
    model.model.rotary_emb = type(model.model.rotary_emb)(made)
    return model.eval()


def dense_weights(
    config: ModelConfig, tensor: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the module, float32 array) of all but the experts, one tensor at a time.

    Args:
        config: of the file.
        tensor: dequantised float32 by its name in the file.
    """
    yield "model.embed_tokens.weight", tensor(TOKEN_EMBEDDING)
    yield "model.norm.weight", tensor(OUTPUT_NORM)
    if not config.tied_head:
        yield "lm_head.weight", tensor(OUTPUT)
    attention = config.blocks[0].attention
    heads = {"attn_q": attention.n_heads, "attn_k": attention.n_kv_heads}
    for layer in range(config.n_layers):
        names = layer_tensors(config, layer)
        for role, theirs in _LAYER_NAMES.items():
            if role not in names:
                continue
            array = tensor(names[role])
            if attention.rope.style == "norm" and role in heads:
                array = interleaved_to_halves(array, heads[role])
            yield f"model.layers.{layer}.{theirs}.weight", array


def expert_weights(
    config: ModelConfig, tensor: Callable[[str], np.ndarray], layer: int
) -> dict[str, np.ndarray]:
    """The experts of a layer: gate_up_proj [E, 2F, D] and down_proj [E, D, F], float32."""
    names = layer_tensors(config, layer)
    gate_EFD, up_EFD = tensor(names["ffn_gate_exps"]), tensor(names["ffn_up_exps"])
    return {
        "gate_up_proj": np.concatenate([gate_EFD, up_EFD], axis=1),
        "down_proj": tensor(names["ffn_down_exps"]),
    }


def fill(
    model: HuggingFaceModel,
    named: Iterable[tuple[str, np.ndarray]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Gives places of an empty module their weights, rounded to `dtype`, on `device`.

    Raises:
        RuntimeError: a weight has another shape than its place.
    """
    for name, array in named:
        place = model.get_parameter(name)
        if tuple(place.shape) != array.shape:
            raise RuntimeError(f"{name} is {array.shape}; the module wants {tuple(place.shape)}")
        # A copy: an F32 tensor is a view of the file.
        weight = torch.from_numpy(np.array(array)).to(device, dtype)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(weight, requires_grad=False))


def finish(model: HuggingFaceModel, device: str = "cpu") -> HuggingFaceModel:
    """Ties the head where it is tied, and checks that every place was filled.

    Raises:
        RuntimeError: a place got no weight.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise RuntimeError(f"no weight for {', '.join(missing)}")
    return model.to(device)


def load(
    config: ModelConfig,
    tensor: Callable[[str], np.ndarray],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
    experts: str | None = None,
) -> HuggingFaceModel:
    """The whole model on `device`; arguments as of `empty_model` and `dense_weights`."""
    model = empty_model(config, attention, experts)
    fill(model, dense_weights(config, tensor), dtype, device)
    for layer in range(config.n_layers):
        to = f"model.layers.{layer}.mlp.experts."
        arrays = expert_weights(config, tensor, layer)
        fill(model, ((to + name, array) for name, array in arrays.items()), dtype, device)
    return finish(model, device)
