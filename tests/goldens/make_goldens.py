"""Makes the goldens of `tests/test_logits.py`: logits of Hugging Face's models in float32.

Run by hand, in an environment of its own, when `tests/tiny_models.py` changes:

    python3 -m venv torch-env && torch-env/bin/pip install torch transformers gguf numpy
    PYTHONPATH=. torch-env/bin/python tests/goldens/make_goldens.py

Nothing of ours computes here: the files are read by `gguf.GGUFReader`, dequantised by
`gguf.quants`, and run by the classes of transformers. Last made with torch 2.13.0 and
transformers 5.23.0.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models

# A choice of experts closer than this could fall the other way under another rounding.
LEAST_ROUTER_MARGIN = 1e-3


def interleaved_to_halves(weights_NK: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes the permutation of q and k rows in llama.cpp's `LlamaModel.permute`."""
    n, k = weights_NK.shape
    return weights_NK.reshape(n_heads, n // n_heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def hugging_face_model(arch: str, number, has_head: bool) -> torch.nn.Module:
    """The empty model; `number(key)` is the file's metadata."""
    shared = {
        "vocab_size": number("vocab"),
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base")},
        "num_experts_per_tok": number("expert_used_count"),
        "tie_word_embeddings": not has_head,
        "attn_implementation": "eager",
        "pad_token_id": None,
    }
    head_dim, n_experts = number("attention.key_length"), number("expert_count")
    if arch == "qwen3moe":
        config = transformers.Qwen3MoeConfig(
            **shared,
            head_dim=head_dim,
            num_experts=n_experts,
            moe_intermediate_size=number("expert_feed_forward_length"),
            norm_topk_prob=True,
        )
        return transformers.Qwen3MoeForCausalLM(config)
    width = number("feed_forward_length")
    if arch == "llama":
        config = transformers.MixtralConfig(
            **shared, head_dim=head_dim, num_local_experts=n_experts, intermediate_size=width
        )
        return transformers.MixtralForCausalLM(config)
    config = transformers.OlmoeConfig(
        **shared, num_experts=n_experts, intermediate_size=width, norm_topk_prob=False
    )
    return transformers.OlmoeForCausalLM(config)


def hugging_face_weights(
    arch: str, weights: dict[str, np.ndarray], n_layers: int, n_heads: int, n_kv_heads: int
) -> dict[str, torch.Tensor]:
    """The file's tensors under the names of transformers 5, gate and up of an expert fused."""
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights.get("output.weight", weights["token_embd.weight"]),
    }
    plain = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }
    for layer in range(n_layers):
        block = {
            name.split(".")[2]: array
            for name, array in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        if arch == "llama":
            block["attn_q"] = interleaved_to_halves(block["attn_q"], n_heads)
            block["attn_k"] = interleaved_to_halves(block["attn_k"], n_kv_heads)
        to = f"model.layers.{layer}."
        state |= {f"{to}{hf}.weight": block[ours] for ours, hf in plain.items() if ours in block}
        gate_up = np.concatenate([block["ffn_gate_exps"], block["ffn_up_exps"]], axis=1)
        state[f"{to}mlp.experts.gate_up_proj"] = gate_up
        state[f"{to}mlp.experts.down_proj"] = block["ffn_down_exps"]
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


@torch.no_grad()
def golden_logits(path: Path, ids_T: np.ndarray) -> tuple[np.ndarray, float]:
    """float32 [T, V] of the model in `path`, and the least router margin met."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}

    def number(key: str):
        if key == "vocab":
            return len(weights["token_embd.weight"])
        return reader.fields[f"{arch}.{key}"].contents()

    model = hugging_face_model(arch, number, "output.weight" in weights).float().eval()
    state = hugging_face_weights(
        arch,
        weights,
        number("block_count"),
        number("attention.head_count"),
        number("attention.head_count_kv"),
    )
    model.load_state_dict(state, strict=True)
    output = model(torch.from_numpy(ids_T[None].astype(np.int64)), output_router_logits=True)
    margins, chosen = [], []
    for router_TE in output.router_logits:
        best_TE = router_TE.sort(descending=True).values
        k = number("expert_used_count")
        margins.append(float((best_TE[:, k - 1] - best_TE[:, k]).min()))
        chosen.append(torch.bincount(router_TE.topk(k).indices.flatten()).tolist())
    print(f"  selections per expert: {chosen}")
    return output.logits[0].numpy().astype(np.float32), min(margins)


def main():
    for name, model in tiny_models.MODELS.items():
        ids_T = tiny_models.tokens(model)
        print(name)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            tiny_models.write_model(model, path)
            logits_TV, margin = golden_logits(path, ids_T)
        print(f"  logits' standard deviation {logits_TV.std():.2f}, router margin {margin:.1e}")
        if margin < LEAST_ROUTER_MARGIN:
            raise SystemExit(f"{name}: a router margin of {margin}; take another seed")
        np.savez_compressed(
            Path(__file__).with_name(f"{name}.npz"),
            tokens_T=ids_T,
            logits_TV=logits_TV,
            weights_sha256=tiny_models.weights_sha256(model),
        )


if __name__ == "__main__":
    main()
