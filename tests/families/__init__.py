"""Tiny random models, one file a family: what is in the GGUF file, and Hugging Face's model of it.

`goldens/make_goldens.py` makes the goldens of `test_families.py` from them. A family's file draws
its tensors by their names in the file, and its `hugging_face` undoes by hand what the converter of
llama.cpp does: nothing of `hobbit_jax.models` is asked.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import tiny_models
from tiny_models import VOCAB

from hobbit_jax.model_file.gguf_file import write_gguf

TOKENS = 40  # of a golden; more than any sliding window here
Weights = Mapping[str, np.ndarray]  # float32 by name in the file


class Add(Protocol):
    """Draws a tensor of normal numbers, or of random codes of a format."""

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        format: str = "F32",
        std: float = 0.15,
        mean: float | np.ndarray = 0.0,
    ) -> None: ...


@dataclass(frozen=True)
class Family:
    """One tiny model.

    Attributes:
        arch: of the file.
        seed: of weights and tokens.
        keys: metadata, without the architecture's prefix.
        draw: adds all tensors.
        hugging_face: transformers' model with these weights. Imports its library itself.
        routers: how the names of its router modules end, which return a score of every expert
            first.
    """

    arch: str
    seed: int
    keys: Mapping[str, Any]
    draw: Callable[[Add], None]
    hugging_face: Callable[[Weights], Any]
    routers: str

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
        """(format, shape, raw bytes) by name."""
        rng, found = np.random.default_rng(self.seed), {}

        def add(name, shape, format="F32", std=0.15, mean=0.0) -> None:
            if format == "F32":
                values = mean + std * rng.standard_normal(shape)
                raw = np.asarray(values, np.float32).view(np.uint8)
            else:
                raw = tiny_models.blocks(rng, format, shape, std)
            found[name] = (format, shape, raw)

        self.draw(add)
        return found

    def weights(self) -> dict[str, np.ndarray]:
        """What a reader of the file sees, float32."""
        return {
            name: np.asarray(
                gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format]), np.float32
            ).reshape(shape)
            for name, (format, shape, raw) in self.tensors().items()
        }

    def write(self, path: Path, as_float32: bool = False) -> None:
        """Writes the file, or one of the same weights as float32."""
        tensors = self.tensors()
        if as_float32:
            raws = {name: w.view(np.uint8) for name, w in self.weights().items()}
            tensors = {name: ("F32", tensors[name][1], raw) for name, raw in raws.items()}
        metadata = {
            "general.architecture": self.arch,
            **{f"{self.arch}.{key}": value for key, value in self.keys.items()},
            **tiny_models.TOKENIZER,
        }
        write_gguf(path, metadata, [(name, *tensor) for name, tensor in tensors.items()])

    def tokens(self) -> np.ndarray:
        """Random token ids, int32 [TOKENS]."""
        return np.random.default_rng(100 + self.seed).integers(0, VOCAB, TOKENS, np.int32)

    def sha256(self) -> str:
        """Digest of the metadata and of every tensor."""
        digest = hashlib.sha256(repr(sorted(self.keys.items())).encode())
        for name, (format, shape, raw) in self.tensors().items():
            digest.update(f"{name} {format} {shape}\n".encode())
            digest.update(np.ascontiguousarray(raw).data)
        return digest.hexdigest()


def gated_mlp(add: Add, block: str, suffix: str, d: int, width: int, experts: int = 0) -> None:
    """Draws gate, up and down of a block, for all experts where there are some."""
    lead = (experts,) if experts else ()
    for role, rows, columns in (("gate", width, d), ("up", width, d), ("down", d, width)):
        name, std = f"{block}.ffn_{role}{suffix}.weight", 1.2 * columns**-0.5
        add(name, (*lead, rows, columns), "Q8_0" if role == "down" else "Q5_0", std)


# Of a block's tensors: names in the file, without "weight", and in most of transformers' classes.
BLOCK = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    **{f"attn_{role}": f"self_attn.{role[0]}_proj.weight" for role in ("q", "k", "v", "output")},
    **{f"attn_{role}_norm": f"self_attn.{role}_norm.weight" for role in "qk"},
}
_PARTS = {"": "mlp", "_shexp": "mlp.shared_experts"}
ROUTED_FFN = {
    **{
        f"ffn_{role}{suffix}": f"{part}.{role}_proj.weight"
        for suffix, part in _PARTS.items()
        for role in ("gate", "up", "down")
    },
    "ffn_gate_inp": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_exps + ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


def settings(keys: Mapping[str, Any], **rope: Any) -> dict[str, Any]:
    """What most configurations of transformers call alike; `rope` is their rotary parameters'."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": keys["block_count"] - keys.get("nextn_predict_layers", 0),
        "num_attention_heads": keys["attention.head_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": keys["context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": keys["rope.freq_base"], **rope},
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def loaded(
    model: Any,
    weights: Weights,
    names: Mapping[str, str],
    others: Mapping[str, np.ndarray] | None = None,
    norm: tuple[str, str] = ("output_norm", "norm"),
) -> Any:
    """A model of transformers with the weights of a file: every parameter, and no other.

    Args:
        model: of transformers.
        weights: of the file.
        names: as `BLOCK` has them; "a + b" are rows of one matrix. Absent ones are left out.
        others: what the file has otherwise, by transformers' whole names.
        norm: our name and theirs of the last norm.
    """
    import torch  # pyright: ignore[reportMissingImports]

    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        f"model.{norm[1]}.weight": weights[f"{norm[0]}.weight"],
        "lm_head.weight": weights.get("output.weight", weights["token_embd.weight"]),
    }
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in names.items():
            roles = [role if "." in role else f"{role}.weight" for role in ours.split(" + ")]
            parts = [weights.get(f"blk.{layer}.{role}") for role in roles]
            if parts[0] is not None:
                whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
                state[f"model.layers.{layer}.{theirs}"] = whole
    state |= others or {}
    model.load_state_dict({n: torch.tensor(np.ascontiguousarray(w)) for n, w in state.items()})
    return model.eval()


# By the name of its file here and of its golden.
FAMILIES: dict[str, Family] = {
    path.stem: importlib.import_module(f"families.{path.stem}").FAMILY
    for path in sorted(Path(__file__).parent.glob("[!_]*.py"))
}
