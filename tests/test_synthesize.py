"""Synthetic files: the real models' types and sizes, bytes from a seed, routing like real ones."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from trace_figures import overlap, share_of_hot_experts

from hobbit_jax import atomic, reference
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.cache.trace import Trace, read_trace
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import (
    FileStamp,
    GGUFFile,
    TensorInfo,
    check_finite_scales,
    open_gguf,
    write_gguf,
)
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.config import RouterConfig, tensor_shapes
from hobbit_jax.models.loading import load_model
from hobbit_jax.models.presets import PLANNED, PRESETS
from hobbit_jax.models.registry import read_config
from hobbit_jax.models.written_keys import config_metadata
from hobbit_jax.quantize.quant_recipe import q4_k_m_format
from hobbit_jax.synthetic import synthesize

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "synthesize.py"
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season of Light, it was the season of Darkness, it was the spring of hope, it was the winter "
    "of despair, we had everything before us, we had nothing before us, we were all going direct "
    "to Heaven, we were all going direct the other way. "
)


def formats(preset):
    config = PRESETS[preset]
    shapes = tensor_shapes(config)
    return {name: (q4_k_m_format(name, s, config), s) for name, s in shapes.items()}


def file_bytes(preset):
    total = 0
    for format, shape in formats(preset).values():
        weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
        total += math.prod(shape) // weights * block_bytes
    return total


def test_the_size_is_that_of_the_real_file():
    """Tensor bytes; the published Q4_K_M of Qwen3-30B-A3B is 18.56 GB with 6 MB of metadata."""
    assert file_bytes("qwen3-30b-a3b") == pytest.approx(18.55e9, abs=0.005e9)


@pytest.mark.parametrize("preset", PRESETS)
def test_written_keys_are_read_back(preset):
    config = PRESETS[preset]
    tensors = {
        name: TensorInfo(name, "F32", shape, np.zeros(0, np.uint8))
        for name, shape in tensor_shapes(config).items()
    }
    stamps = (FileStamp(Path("model.gguf"), 0, 0, 0, 0),)
    assert read_config(GGUFFile(stamps, config_metadata(config), {}, tensors)) == config


def test_models_that_no_file_is_made_of_are_refused():
    config = PLANNED["glm-4.5-air"]
    with pytest.raises(NotImplementedError, match="glm4moe is not written; supported are qwen3moe"):
        config_metadata(config)
    dense = replace(PRESETS["tiny"], router=RouterConfig("always", renormalise=False))
    with pytest.raises(NotImplementedError, match="such a model of qwen3moe is not written"):
        config_metadata(dense)


def test_types_of_qwen3():
    of = {name: format for name, (format, _) in formats("qwen3-30b-a3b").items()}
    more = [*range(6), *range(8, 42, 3), *range(42, 48)]
    for layer in range(48):
        wanted = "Q6_K" if layer in more else "Q4_K"
        assert of[f"blk.{layer}.attn_v.weight"] == of[f"blk.{layer}.ffn_down_exps.weight"] == wanted
        for role in ("attn_q", "attn_k", "attn_output", "ffn_gate_exps", "ffn_up_exps"):
            assert of[f"blk.{layer}.{role}.weight"] == "Q4_K"
        for role in ("ffn_gate_inp", "attn_norm", "attn_q_norm"):
            assert of[f"blk.{layer}.{role}.weight"] == "F32"
    assert of["token_embd.weight"] == "Q4_K" and of["output.weight"] == "Q6_K"


def test_qwen36_runs_in_small(tmp_path):
    """Four blocks, one of them attention, with fewer experts and words: read back, and decoded."""
    whole = PRESETS["qwen3.6-35b-a3b"]
    assert file_bytes("qwen3.6-35b-a3b") == pytest.approx(21.2e9, rel=0.02)
    config = replace(whole, blocks=whole.blocks[:4], n_experts=16, vocab_size=2048)
    synthesize.synthesize(config, "small", tmp_path / "m.gguf")
    model = load_model(tmp_path / "m.gguf", "ggml")
    assert model.config == replace(config, rms_eps=float(np.float32(1e-6)))
    store = HostExperts(model.config, model.file)
    engine = Engine(model, store, CacheConfig(store.precision_bytes(0) // 2))
    tokens = [ids_B for ids_B, _ in engine.generate([[1, 2, 3]], 4)]
    assert len(tokens) == 4 and np.isfinite(engine.score(np.asarray([[5, 6, 7]]))).all()
    assert engine.counts.misses > 0


def test_types_of_eight_experts_and_of_odd_widths():
    of = {name: format for name, (format, _) in formats("mixtral-8x7b").items()}
    assert {of[f"blk.{layer}.attn_v.weight"] for layer in range(32)} == {"Q8_0"}
    assert of["blk.9.attn_k.weight"] == "Q8_0" and of["blk.9.attn_output.weight"] == "Q5_K"
    more = [*range(4), *range(6, 28, 3), *range(28, 32)]
    downs = [layer for layer in range(32) if of[f"blk.{layer}.ffn_down_exps.weight"] == "Q6_K"]
    assert downs == more and of["blk.9.attn_q.weight"] == "Q4_K"
    config = PRESETS["qwen3-30b-a3b"]
    narrow = {
        name: q4_k_m_format(f"blk.{layer}.{name}.weight", (64, 1408), config)
        for layer, name in ((7, "attn_q"), (0, "ffn_down_exps"))
    }
    assert narrow == {"attn_q": "Q5_0", "ffn_down_exps": "Q8_0"}
    assert q4_k_m_format("blk.7.attn_q.weight", (64, 100), config) == "F16"
    assert q4_k_m_format("output.weight", (64, 1408), config) == "Q8_0"


def test_the_shipped_model_has_these_types():
    file = open_gguf(reference.model_path())
    config = read_config(file)
    for name, tensor in file.tensors.items():
        assert tensor.format == q4_k_m_format(name, tensor.shape, config)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "tiny.gguf"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--preset", "tiny", "--out", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}: {path.stat().st_size} bytes\n"
    return path


def config_of(file):
    """The file's configuration, with the float32 numbers of GGUF as they were meant."""
    config = read_config(file)
    return replace(config, rms_eps=round(config.rms_eps, 12))


def test_the_file_is_the_preset(tiny_path):
    file = open_gguf(tiny_path)
    assert config_of(file) == PRESETS["tiny"]
    assert list(file.tensors) == list(tensor_shapes(PRESETS["tiny"]))
    for name, (format, shape) in formats("tiny").items():
        tensor = file.tensors[name]
        assert (tensor.format, tensor.shape) == (format, shape)
        check_finite_scales(tensor)
    experts = file.tensors["blk.3.ffn_up_exps.weight"].raw
    assert len({expert.tobytes() for expert in experts}) == 32
    embedding = file.tensors["token_embd.weight"].raw
    assert len({row.tobytes() for row in embedding}) == len(embedding)


def test_a_seed_is_a_file(tiny_path, tmp_path):
    for seed in (0, 1):
        synthesize.synthesize(PRESETS["tiny"], "tiny", tmp_path / f"{seed}.gguf", seed=seed)
    same, other = (open_gguf(tmp_path / f"{seed}.gguf") for seed in (0, 1))
    for name, tensor in open_gguf(tiny_path).tensors.items():
        np.testing.assert_array_equal(tensor.raw, same.tensors[name].raw)
        if "norm" not in name:
            assert (tensor.raw != other.tensors[name].raw).any()


def test_the_vocabulary_is_a_tokenizer(tiny_path):
    tokenizer = Tokenizer(open_gguf(tiny_path))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and max(ids) < 1024 and len(ids) < 0.7 * len(TEXT)
    for count in (257, 300, 70_000):
        made = synthesize.made_up_vocabulary(count)
        tokens = made["tokenizer.ggml.tokens"]
        assert len(tokens) == len(set(tokens)) == count == len(made["tokenizer.ggml.token_type"])
        assert len(made.get("tokenizer.ggml.merges", [])) == count - 257
    with pytest.raises(ValueError, match="n_tokens is 256"):
        synthesize.made_up_vocabulary(256)


def test_a_vocabulary_can_be_borrowed(tiny_path, tmp_path):
    source = open_gguf(tiny_path)
    small = {**source.metadata, **synthesize.made_up_vocabulary(300)}
    write_gguf(tmp_path / "small.gguf", small, [("x", "F32", (4,), np.zeros(16, np.uint8))])
    vocabulary = open_gguf(tmp_path / "small.gguf")
    synthesize.synthesize(PRESETS["tiny"], "tiny", tmp_path / "f.gguf", vocabulary)
    file = open_gguf(tmp_path / "f.gguf")
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert tokens[:300] == vocabulary.metadata["tokenizer.ggml.tokens"]
    assert tokens[300:302] == ["[PAD0]", "[PAD1]"] and len(tokens) == 1024
    assert config_of(file) == PRESETS["tiny"]
    ids = Tokenizer(file).encode(TEXT)
    assert ids == Tokenizer(vocabulary).encode(TEXT)
    with pytest.raises(ValueError, match="has 1024 tokens; want 1 to the model's 500"):
        synthesize.borrowed_vocabulary(source, 500)


def test_failures_leave_no_file(tmp_path, monkeypatch):
    path = tmp_path / "f.gguf"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthesize._Weights, "_random", interrupt)
        with pytest.raises(KeyboardInterrupt):
            synthesize.synthesize(PRESETS["tiny"], "tiny", path)
    disk = type("Disk", (), {"free": 1000})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(OSError, match=r"f\.gguf wants \d+ bytes, and 1000 are free"):
        synthesize.synthesize(PRESETS["tiny"], "tiny", path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def routed(tiny_path):
    """Routing of a text by the tiny file."""
    model = load_model(tiny_path, "xla")
    steps = []
    store = HostExperts(model.config, model.file)
    engine = Engine(
        model, store, CacheConfig(chunk_tokens=512), observers=[OnRouting(steps.append)]
    )
    ids_T = np.asarray(model.tokenizer().encode(TEXT * 3)[:512], np.int32)
    logits_TV = np.asarray(engine.score(ids_T[None])[0])
    assert np.isfinite(logits_TV).all() and 0.3 < logits_TV.std() < 3
    ids, weights = (
        np.stack([getattr(step, name) for step in steps], axis=1)
        for name in ("ids_TK", "weights_TK")
    )
    return Trace("tiny", ids.astype(np.int64), weights, np.arange(512), 32)


def test_routing_is_like_real_routing(routed):
    """Ranges around the real traces' figures; `synthetic/synthesize.py` has the comparison."""
    assert 0.42 < share_of_hot_experts(routed, 1 / 4) < 0.60
    overlaps = [overlap(routed, lag) for lag in (1, 2, 5)]
    assert 0.25 < overlaps[0] < 0.40 and overlaps == sorted(overlaps, reverse=True)
    assert overlaps[0] > 1.3 * overlaps[2]


def test_figures_of_a_trace():
    ids_TLK = np.array([[[0, 1]], [[1, 2]], [[2, 0]], [[1, 2]]])
    trace = Trace("t", ids_TLK, np.full(ids_TLK.shape, 0.5), np.array([0, 1, 2, 0]), 4)
    assert overlap(trace, 1) == 0.5 and overlap(trace, 2) == 0.5
    assert share_of_hot_experts(trace, 0.25) == 3 / 8


def test_real_routing_has_the_figures_we_compare_with(data_dir):
    for name, hot_experts, overlaps in (
        ("intent", 0.530, (0.262, 0.196, 0.179)), ("law", 0.447, (0.290, 0.216, 0.184)),
    ):  # fmt: skip
        path = data_dir / "traces" / f"deepseek_v2_lite_{name}.npz"
        if not path.is_file():
            pytest.skip(f"no trace at {path}")
        trace = read_trace(path)
        assert share_of_hot_experts(trace, 1 / 4) == pytest.approx(hot_experts, abs=0.001)
        assert [overlap(trace, lag) for lag in (1, 2, 5)] == pytest.approx(overlaps, abs=0.001)
