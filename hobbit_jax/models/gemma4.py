"""Gemma 4 with experts (`gemma4`): gemma-4-26B-A4B.

Most blocks see a window, with more and narrower key/value heads than the others, whose values are
their raw keys. A dense FFN stands beside the experts, and each part between norms of its own.

Source: llama.cpp, src/models/gemma4.cpp; conversion/gemma.py (the divisors of frequencies).
"""

import math

import numpy as np

from hobbit_jax.model_file.metadata import flag, integer, number, per_layer
from hobbit_jax.models.attention import GroupedQuery, Rope
from hobbit_jax.models.config import ROPE_DIVISORS, BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.keys import ROPE_BASE, Keys, ends, experts

_WINDOWED = "_swa"  # ends the keys of blocks with a window


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`. Raises NotImplementedError for a dense model."""
    if not keys.read("expert_count", integer(), 0):
        raise NotImplementedError(
            f"{keys.path}: a dense Gemma 4 (gemma4.expert_count is 0); supported are Gemma 4 "
            "models with experts, such as gemma-4-26B-A4B"
        )
    n_blocks = keys.block_count()
    windowed_N = keys.read("attention.sliding_window_pattern", per_layer(flag(), n_blocks))
    kv_heads_N = keys.read("attention.head_count_kv", per_layer(integer(1), n_blocks))
    d_beside = keys.of_every_layer("feed_forward_length")
    attentions = [
        _attention(keys, number, *of_block)
        for number, of_block in enumerate(zip(windowed_N, kv_heads_N, strict=True))
    ]
    found = ends(keys)
    return ModelConfig(
        **found,
        blocks=tuple(
            BlockConfig(
                kind,
                ffn_norm="pre_ffw_norm_2",
                attention_out_norm="post_attention_norm",
                d_beside=d_beside,
            )
            for kind in attentions
        ),
        router=RouterConfig("softmax", renormalise=True, own_input=True, expert_scale=True),
        expert_function="geglu",
        rope_divisors=max(len(kind.rope.divisors) for kind in attentions),
        embedding_scale=math.sqrt(found["d_model"]),
        logit_softcap=keys.read("final_logit_softcapping", number(0.0, 1e6), 0.0),
        **experts(keys),
    )


def _attention(keys: Keys, block: int, windowed: bool, n_kv_heads: int) -> GroupedQuery:
    """Of one block.

    Raises:
        ValueError: impossible numbers.
        NotImplementedError: values of another width than keys, or heads that rotate in part.
    """
    kind = _WINDOWED if windowed else ""
    n_heads = keys.of_every_layer("attention.head_count")
    head_dim, value_dim = (
        keys.read(f"attention.{what}_length{kind}", integer(1)) for what in ("key", "value")
    )
    rope_dim = keys.read(f"rope.dimension_count{kind}", integer(1), head_dim)
    if (value_dim, rope_dim) != (head_dim, head_dim):
        raise NotImplementedError(
            f"{keys.path}: heads of {head_dim} (key_length{kind}) and {value_dim} "
            f"(value_length{kind}), of which {rope_dim} rotate; supported are whole heads of one "
            "width"
        )
    if head_dim % 2 or n_heads % n_kv_heads:
        raise keys.contradiction(
            f"{n_heads} heads of {head_dim} in block {block}, expected an even width and a "
            f"multiple of the {n_kv_heads} kv heads"
        )
    base = keys.read(f"rope.freq_base{kind}", ROPE_BASE)
    divisors = () if windowed else _divisors(keys, head_dim // 2)
    return GroupedQuery(
        n_heads,
        n_kv_heads,
        head_dim,
        Rope(base, rope_dim, "neox", divisors=divisors),
        "head",
        window=keys.read("attention.sliding_window", integer(1)) if windowed else 0,
        score_scale=1.0,
        values_are_keys=f"blk.{block}.attn_v.weight" not in keys.file.tensors,
        value_norm=True,
    )


def _divisors(keys: Keys, pairs: int) -> tuple[float, ...]:
    """Of the rotary frequencies of heads without a window; 1e30 stops a pair.

    Raises:
        ValueError: they are missing, or not so many positive float32 numbers.
    """
    tensor = keys.file.tensors.get(ROPE_DIVISORS)
    if tensor is None or tensor.shape != (pairs,) or tensor.format != "F32":
        got = "missing" if tensor is None else f"{tensor.format} {tensor.shape}"
        raise ValueError(
            f"{keys.path}: tensor {ROPE_DIVISORS!r} is {got}, expected F32 of shape ({pairs},); "
            "download or convert the model again"
        )
    values = tensor.raw.view("<f4").reshape(-1)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"{keys.path}: tensor {ROPE_DIVISORS!r} has an entry that is no positive number; "
            "download the model again"
        )
    return tuple(values.tolist())
