"""Which files we say we can run: the right numbers from the right keys, and every refusal."""

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hobbit_jax.model_file.gguf_file import FileStamp, GGUFFile, TensorInfo
from hobbit_jax.models.attention import Rope, Yarn
from hobbit_jax.models.config import global_tensors, layer_tensors
from hobbit_jax.models.registry import read_config

D, F, E, HEADS, KV_HEADS, VOCAB, LAYERS = 16, 12, 4, 4, 2, 10, 2


def model_file(arch="qwen3moe", head_dim=8, keys=(), drop=(), tensors=(), tied=False) -> GGUFFile:
    """A file of one family with exactly the tensors that llama.cpp creates for it."""
    width_key = "expert_feed_forward_length" if arch == "qwen3moe" else "feed_forward_length"
    kv_heads = HEADS if arch == "olmoe" else KV_HEADS
    metadata = {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": D,
        "attention.head_count": HEADS,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": E,
        "expert_used_count": 2,
        "rope.freq_base": 1e6,
        width_key: F,
    } | dict(keys)
    metadata = {f"{arch}.{k}": v for k, v in metadata.items() if k not in drop}
    metadata |= {"general.architecture": arch, "tokenizer.ggml.tokens": ["x"] * VOCAB}
    q, kv = HEADS * head_dim, kv_heads * head_dim
    shapes = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, D)
    for layer in range(LAYERS):
        block = {
            "attn_norm": (D,),
            "attn_q": (q, D),
            "attn_k": (kv, D),
            "attn_v": (kv, D),
            "attn_output": (D, q),
            "ffn_norm": (D,),
            "ffn_gate_inp": (E, D),
            "ffn_gate_exps": (E, F, D),
            "ffn_up_exps": (E, F, D),
            "ffn_down_exps": (E, D, F),
        }
        if arch == "qwen3moe":
            block |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        if arch == "olmoe":
            block |= {"attn_q_norm": (q,), "attn_k_norm": (kv,)}
        shapes |= {f"blk.{layer}.{role}.weight": shape for role, shape in block.items()}
    shapes |= dict(tensors)
    infos = {
        name: TensorInfo(name, "F32", shape, np.zeros(0, np.uint8))
        for name, shape in shapes.items()
        if name not in drop
    }
    return GGUFFile((FileStamp(Path("model.gguf"), 0, 0, 0, 0),), metadata, {}, infos)


@pytest.mark.parametrize(
    ("arch", "rope_style", "qk_norm", "renormalise"),
    [
        ("qwen3moe", "neox", "head", True),
        ("llama", "norm", "none", True),
        ("olmoe", "neox", "full", False),
    ],
)
def test_families(arch, rope_style, qk_norm, renormalise):
    file = model_file(arch)
    config = read_config(file)
    attention = config.blocks[0].attention
    assert (attention.rope.style, attention.qk_norm) == (rope_style, qk_norm)
    assert config.router.renormalise is renormalise
    assert (config.n_layers, config.d_model, config.d_expert, config.n_experts) == (LAYERS, D, F, E)
    assert (attention.n_heads, attention.head_dim, attention.rope.dim) == (HEADS, 8, 8)
    assert (config.experts_per_token, config.vocab_size, config.context_length) == (2, VOCAB, 64)
    assert (attention.rope.base, config.rms_eps, config.tied_head) == (1e6, 1e-6, False)
    named = {n for layer in range(LAYERS) for n in layer_tensors(config, layer).values()}
    assert named | set(global_tensors(config).values()) == set(file.tensors)
    assert layer_tensors(config, 1)["router"] == "blk.1.ffn_gate_inp.weight"


def test_defaults_of_the_format():
    """What llama.cpp assumes for absent keys; the head is tied when the file has no output."""
    optional = ("rope.freq_base", "attention.key_length", "attention.value_length")
    config = read_config(model_file("llama", head_dim=D // HEADS, drop=optional, tied=True))
    attention = config.blocks[0].attention
    assert (attention.head_dim, attention.rope) == (4, Rope(10000.0, 4, "norm"))
    assert config.tied_head and "output" not in global_tensors(config)
    with pytest.raises(ValueError, match=r"'output\.weight' is missing"):
        read_config(model_file("olmoe", tied=True))


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


def test_yarn_is_read():
    """The ends of the ramp and the context may be absent."""
    wanted = Yarn(4.0, 64, 32.0, 1.0, 1 + 0.1 * math.log(4))
    assert read_config(model_file(keys=YARN)).blocks[0].attention.rope.yarn == wanted
    more = {"rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_slow": 2.0}
    wanted = Yarn(4.0, 16, 32.0, 2.0, 1 + 0.1 * math.log(4))
    assert read_config(model_file(keys=YARN | more)).blocks[0].attention.rope.yarn == wanted


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys_are_named(key):
    with pytest.raises(ValueError, match=rf"qwen3moe\.{key} is missing"):
        read_config(model_file(drop=(key,)))


def test_every_missing_or_misshapen_tensor_is_named():
    for name, tensor in model_file().tensors.items():
        if name != "output.weight":  # its absence means a tied head
            with pytest.raises(ValueError, match=f"'{name}' is missing"):
                read_config(model_file(drop=(name,)))
        wrong = (*tensor.shape[:-1], tensor.shape[-1] + 1)
        with pytest.raises(ValueError) as caught:
            read_config(model_file(tensors={name: wrong}))
        message = str(caught.value)
        assert f"{name!r} has shape {wrong}, expected {tensor.shape}" in message


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"arch": "gemma3"}, NotImplementedError, "'gemma3'.*qwen3moe, llama, olmoe"),
        ({"keys": {"rope.scaling.type": "dynamic"}}, NotImplementedError, "'dynamic'"),
        ({"keys": {"rope.scaling.factor": 4.0}}, NotImplementedError, r"4\.0"),
        ({"keys": {**YARN, "rope.scaling.factor": 0.5}}, ValueError, r"scaling\.factor is 0\.5"),
        ({"keys": {**YARN, "rope.scaling.yarn_log_multiplier": 0.1}}, NotImplementedError, "log_m"),
        ({"keys": {**YARN, "rope.freq_base": 1.0}}, ValueError, "freq_base is 1"),
        ({"keys": {"rope.dimension_count": 4}}, NotImplementedError, "4 of 8"),
        ({"keys": {"attention.sliding_window": 32}}, NotImplementedError, "32 tokens.*64"),
        ({"keys": {"attention.value_length": 4}}, NotImplementedError, "one width"),
        ({"keys": {"expert_weights_scale": 2.5}}, NotImplementedError, "expert_weights_scale"),
        ({"keys": {"expert_weights_norm": False}}, NotImplementedError, "expert_weights_norm"),
        ({"keys": {"expert_gating_func": 2}}, NotImplementedError, "expert_gating_func"),
        ({"keys": {"expert_shared_count": 1}}, NotImplementedError, "expert_shared_count"),
        ({"keys": {"attention.clamp_kqv": 8.0}}, NotImplementedError, "clamp_kqv"),
        ({"keys": {"attention.head_count_kv": [2, 4]}}, NotImplementedError, "per layer"),
        ({"tensors": {"rope_freqs.weight": (4,)}}, NotImplementedError, "rotary frequencies"),
        ({"tensors": {"blk.0.attn_q.bias": (32,)}}, NotImplementedError, "biases"),
        ({"tensors": {"blk.0.ffn_up_shexp.weight": (F, D)}}, NotImplementedError, "shared"),
        ({"tensors": {"blk.0.ffn_gate.0.weight": (F, D)}}, NotImplementedError, "April 2024"),
        ({"tensors": {"blk.0.attn_qkv.weight": (64, D)}}, NotImplementedError, "fused q"),
        ({"tensors": {"blk.2.attn_norm.weight": (D,)}}, NotImplementedError, "2 layers"),
        ({"tensors": {"blk.0.attn_q.scale": (2,)}}, ValueError, r"q\.scale'.*\(2,\), ex.*\(1,\)"),
        ({"tensors": {"blk.1.ffn_up_exps.scale": (1,)}}, ValueError, r"\(1,\), expected \(4,\)"),
        ({"tensors": {"blk.0.attn_gate.scale": (1,)}}, NotImplementedError, "not there"),
        ({"tensors": {"blk.2.attn_q.scale": (1,)}}, NotImplementedError, "not there"),
        ({"tensors": {"blk.0.ffn_gate_inp.scale": (1,)}}, NotImplementedError, "none in llama"),
        ({"tensors": {"output.scale": (1,)}, "tied": True}, NotImplementedError, "not there"),
        ({"keys": {"expert_used_count": 5}}, ValueError, "5 experts per token"),
        ({"keys": {"attention.head_count_kv": 3}}, ValueError, "multiple of the 3"),
        ({"keys": {"block_count": 0}}, ValueError, "from 1 to 27"),
        ({"keys": {"block_count": "2"}}, ValueError, "expected an integer"),
    ],
)
def test_refusals(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        read_config(model_file(**arguments))
    assert "\n" not in str(caught.value) and "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "linear"},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0},
        {"rope.scaling.type": "longrope", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "none", "rope.scale_linear": 4.0},
        {"rope.scaling.factor": 1.0, "rope.scale_linear": 4.0},
        {"attention.head_count": [HEADS] * LAYERS},
        {"attention.head_count_kv": [KV_HEADS] * LAYERS},
        {"expert_feed_forward_length": [F] * LAYERS},
        {"expert_feed_forward_length": 0, "feed_forward_length": 2 * F},
        {"expert_feed_forward_length": 0, "feed_forward_length": [2 * F] * LAYERS},
        {"expert_group_count": 1},
        {"attention.sliding_window": 2**32 - 1},
    ],
)
def test_neutral_keys_change_nothing(keys):
    """With each, llama.cpp (build 11549) gives the logits that it gives without, bit for bit."""
    assert read_config(model_file(keys=keys)) == read_config(model_file())


def test_the_width_of_an_expert_may_be_derived():
    absent = {"drop": ("expert_feed_forward_length",), "keys": {"feed_forward_length": 2 * F + 1}}
    assert read_config(model_file(**absent)).d_expert == F


@pytest.mark.parametrize(
    ("name", "value", "refusal"),
    [
        ("rope_freqs.weight", 1.0, None),
        ("rope_freqs.weight", 2.0, "rotary frequencies"),
        ("blk.0.ffn_up_exps.input_scale", 0.5, None),
    ],
)
def test_factors_of_one_change_nothing(name, value, refusal):
    file = model_file()
    raw = np.full(4, value, np.float32).view(np.uint8)
    file.tensors[name] = TensorInfo(name, "F32", (4,), raw)
    if refusal is None:
        assert read_config(file) == read_config(model_file())
    else:
        with pytest.raises(NotImplementedError, match=refusal):
            read_config(file)


WRONG = (math.nan, math.inf, -math.inf, -1, 0, 2**31, 2**64, 1.5, True, "3", [], ["a"], None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in (*REQUIRED, "attention.head_count_kv") for value in WRONG),
        *(("rope.freq_base", value) for value in WRONG if value not in (2**31, 2**64, 1.5)),
        *(("rope.dimension_count", value) for value in WRONG),
    ],
)
def test_impossible_values_are_refused_by_key(key, value):
    """Of any type: nothing passes, and nothing else than one line comes."""
    with pytest.raises((ValueError, NotImplementedError), match=key.replace(".", r"\.")) as caught:
        read_config(model_file(keys={key: value}))
    assert type(caught.value) in (ValueError, NotImplementedError)
    assert "\n" not in str(caught.value) and "model.gguf" in str(caught.value)


def test_a_count_of_layers_is_held_against_the_tensors():
    start = time.process_time()
    with pytest.raises(
        ValueError, match=r"block_count is 4294967295.* 1 to 27 \(the file's number"
    ):
        read_config(model_file(keys={"block_count": 2**32 - 1}))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("metadata", "tensor", "match"),
    [
        ({"general.type": "adapter"}, None, "LoRA adapter.*llama-export-lora"),
        ({}, "blk.0.attn_q.weight.lora_a", "LoRA adapter"),
        ({"general.type": "mmproj"}, None, "images.*language model"),
        ({"general.architecture": "clip"}, None, "images"),
        ({"general.type": "imatrix"}, None, "importance matrix"),
        ({"general.architecture": "controlvector"}, None, "control vector"),
        ({"general.type": "vocab"}, None, "without tensors"),
    ],
)
def test_gguf_files_that_are_no_model_say_what_they_are(metadata, tensor, match):
    file = model_file(tensors={tensor: (4, 8)} if tensor else ())
    with pytest.raises(ValueError, match=rf"^model\.gguf: is .*{match}"):
        read_config(replace(file, metadata=file.metadata | metadata))


def test_a_window_as_long_as_the_context_is_no_window():
    assert read_config(model_file(keys={"attention.sliding_window": 64})).context_length == 64
