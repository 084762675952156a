"""Makes the goldens of `tests/test_logits.py` and `tests/test_families.py`.

They are logits of Hugging Face's models in float32. Run by hand, in an environment of its own, when
`tests/tiny_models.py` or a file of `tests/families/` changes; names limit it to some goldens:

    python3 -m venv torch-env && torch-env/bin/pip install torch transformers gguf numpy
    PYTHONPATH=. torch-env/bin/python tests/goldens/make_goldens.py [NAME ...]

Nothing of ours reads or computes here: the files are read by `gguf.GGUFReader`, dequantised by
`gguf.quants`, and run by the classes of transformers. Which class and which place a tensor goes to
is `hobbit_jax.baselines.hugging_face`, as for every other comparison with PyTorch: a second copy of
that mapping would prove nothing that the engine does not, which was written from llama.cpp's
source and agrees with these goldens. The hyperparameters are read here, without `read_config`.
Last made with torch 2.13.0 and transformers 5.23.0; 5.24.0 gives the same bits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch

from hobbit_jax.baselines.hugging_face import load
from hobbit_jax.models.attention import GroupedQuery, Rope
from hobbit_jax.models.config import BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.delta_net import GatedDeltaNet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
from families import FAMILIES

# A choice of experts closer than this could fall the other way under another rounding.
LEAST_ROUTER_MARGIN = 1e-3
HYBRIDS = ("qwen35moe", "qwen3next")


def read_hyperparameters(reader: gguf.GGUFReader, names: Container[str]) -> ModelConfig:
    """What the mapping needs, straight from the file; what llama.cpp has in code, by hand."""
    arch = reader.fields["general.architecture"].contents()

    def number(key: str):
        return reader.fields[f"{arch}.{key}"].contents()

    is_dense = "blk.0.ffn_gate.weight" in names
    derived = is_dense or arch in ("llama", "olmoe")
    width = "feed_forward_length" if derived else "expert_feed_forward_length"
    attention = GroupedQuery(
        number("attention.head_count"),
        number("attention.head_count_kv"),
        number("attention.key_length"),
        Rope(
            number("rope.freq_base"),
            number("rope.dimension_count"),
            "norm" if arch == "llama" else "neox",
        ),
        {"olmoe": "full", "qwen3moe": "head"}.get(arch, "head" if arch in HYBRIDS else "none"),
        gated=arch in HYBRIDS,
        biased=("attn_q", "attn_k", "attn_v") if arch in ("qwen2", "qwen2moe") else (),
    )
    block = BlockConfig(attention)
    if arch == "qwen2moe":
        d_shared = number("expert_shared_feed_forward_length")
        block = BlockConfig(attention, d_shared=d_shared, shared_gate=2)
    blocks = (block,) * number("block_count")
    if arch in HYBRIDS:
        delta = GatedDeltaNet(
            number("ssm.group_count"),
            number("ssm.time_step_rank"),
            number("ssm.state_size"),
            number("ssm.conv_kernel"),
            "tiled" if arch == "qwen35moe" else "grouped",
        )
        block = BlockConfig(
            attention,
            "post_attention_norm",
            d_shared=number("expert_shared_feed_forward_length"),
            shared_gate=2,
        )
        interval, count = number("full_attention_interval"), len(blocks)
        blocks = tuple(
            block if (i + 1) % interval == 0 else replace(block, attention=delta)
            for i in range(count - number("nextn_predict_layers"))
        )
    return ModelConfig(
        arch=arch,
        blocks=blocks,
        router=RouterConfig("always" if is_dense else "softmax", arch not in ("olmoe", "qwen2moe")),
        d_model=number("embedding_length"),
        n_experts=1 if is_dense else number("expert_count"),
        experts_per_token=1 if is_dense else number("expert_used_count"),
        d_expert=number(width),
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        context_length=number("context_length"),
        rms_eps=number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in names,
        fused_gate_up="blk.0.ffn_gate_up_exps.weight" in names,
    )


@torch.no_grad()
def golden_logits(path: Path, ids_T: np.ndarray) -> tuple[np.ndarray, float]:
    """float32 [T, V] of the model in `path`, and the least router margin met."""
    reader = gguf.GGUFReader(path)
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = read_hyperparameters(reader, weights)
    model = load(config, weights.__getitem__, attention="eager")
    routed = {} if config.has_dense_ffn else {"output_router_logits": True}
    output = model(torch.from_numpy(ids_T[None].astype(np.int64)), **routed)
    margins, chosen, k = [], [], config.experts_per_token
    for router_TE in output.router_logits if routed else ():
        best_TE = router_TE.sort(descending=True).values
        margins.append(float((best_TE[:, k - 1] - best_TE[:, k]).min()))
        chosen.append(torch.bincount(router_TE.topk(k).indices.flatten()).tolist())
    print(f"  selections per expert: {chosen}")
    return output.logits[0].numpy().astype(np.float32), min(margins, default=np.inf)


def margin(scores_TE: torch.Tensor, k: int) -> float:
    """The least distance between the last of the best k and the next."""
    best_TE = scores_TE.sort(descending=True).values
    return float((best_TE[:, k - 1] - best_TE[:, k]).min())


@torch.no_grad()
def make_family_golden(name: str) -> None:
    """Of a model of `tests/families/`, whose file knows Hugging Face's class itself."""
    family = FAMILIES[name]
    model, ids_T, margins = family.hugging_face(family.weights()), family.tokens(), []
    k = family.keys["expert_used_count"]

    def watch(router, inputs, output):
        given = inputs[1] if len(inputs) > 1 else None  # LFM2's
        scores_TE, bias_E = output[0], getattr(router, "e_score_correction_bias", given)
        if hasattr(router, "moe_statics"):  # ERNIE biases a softmax
            scores_TE = router.moe_statics(scores_TE.softmax(-1))
        if bias_E is not None:
            scores_TE = scores_TE.sigmoid() + bias_E
            if getattr(router, "num_group", 1) > 1:
                grouped = scores_TE.unflatten(1, (router.num_group, -1))
                best_TG = grouped.topk(2).values.sum(-1)
                margins.append(margin(best_TG, router.topk_group))
                kept_TG = best_TG >= best_TG.topk(router.topk_group).values[:, -1:]
                scores_TE = torch.where(kept_TG[..., None], grouped, -torch.inf).flatten(1)
        margins.append(margin(scores_TE, k))

    for path, module in model.named_modules():
        if path.endswith(family.routers):
            module.register_forward_hook(watch)
    logits_TV = model(torch.from_numpy(ids_T[None].astype(np.int64))).logits[0].numpy()
    print(f"{name}: standard deviation {logits_TV.std():.2f}, router margin {min(margins):.1e}")
    if min(margins) < LEAST_ROUTER_MARGIN:
        raise SystemExit(f"{name}: a router margin of {min(margins)}; take another seed")
    np.savez_compressed(
        Path(__file__).with_name(f"{name}.npz"),
        tokens_T=ids_T,
        logits_TV=logits_TV.astype(np.float32),
        weights_sha256=family.sha256(),
    )


def main():
    for name in sys.argv[1:] or [*tiny_models.MODELS, *FAMILIES]:
        if name in FAMILIES:
            make_family_golden(name)
            continue
        model = tiny_models.MODELS[name]
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
