"""Scales beside matrices, as NVFP4 files have them, against a file whose weights they multiplied.

All are powers of two, so both files give the same bits in whatever order they multiply;
`test_baselines_oracles.py` compares others with llama.cpp.
"""

from pathlib import Path

import numpy as np
import pytest
from marks import slow_unless
from scaled_models import write_tiny_pair

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.evals.quality import Windows
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.importance.calibration import calibrate
from hobbit_jax.importance.scores import measure_errors
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf, write_gguf
from hobbit_jax.models.loading import load_model

PROMPTS = [[5, 200, 17, 17, 99], [3], [101, 42, 7, 250, 11]]
STEPS = 3


def decode(engine: Engine, prompts: list[list[int]]) -> np.ndarray:
    """Logits of prompts in pieces and of forced tokens after them, [steps, B, V]."""
    engine.start(len(prompts), 16)
    parts = [np.asarray(engine.prefill(prompts))]
    ids_SB = np.random.default_rng(2).integers(0, engine.config.vocab_size, (STEPS, len(prompts)))
    return np.stack(parts + [np.asarray(engine.decode(ids_B)) for ids_B in ids_SB])


def engine_of(path: Path, implementation: str, share: float | None = None, **cache) -> Engine:
    """A pool for a share of the experts."""
    model = load_model(path, implementation)
    store = HostExperts(model.config, model.file)
    budget = None if share is None else int(share * store.precision_bytes(0))
    return Engine(model, store, CacheConfig(budget, chunk_tokens=9, **cache))


# A shared expert behind a gate and biased projections; biased experts; dense; fused gate and up
# beside delta nets; the router's own scale; latent attention.
NAMES = ("qwen2moe", "gpt_oss", "qwen2", "qwen35moe", "gemma4", "deepseek2")
QUICK = (("qwen2moe", "xla"), ("gpt_oss", "ggml"))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [slow_unless((n, i) in QUICK, n, i) for n in NAMES for i in ("xla", "ggml")],
)
def test_scales_multiply_products_at_every_budget(name, implementation, tmp_path):
    scaled, multiplied = write_tiny_pair(name, tmp_path)
    config = load_model(scaled, implementation).config
    least = config.experts_per_token / config.n_experts
    budgets = [{}, {"share": least}]
    if implementation == "ggml":  # which the CPU computes misses with too
        budgets.append({"share": 0.0, "mode": "host"})
    elif (name, implementation) not in QUICK:
        budgets.append({"share": least, "devices": 2})
    for prompts in (PROMPTS, PROMPTS[:1]):
        wanted = decode(engine_of(multiplied, implementation), prompts)
        for budget in budgets:
            got = decode(engine_of(scaled, implementation, **budget), prompts)
            np.testing.assert_array_equal(got, wanted, err_msg=str(budget))
        if implementation == "xla":  # beside which ggml computes in float32 too, in another order
            got = decode(engine_of(scaled, implementation, share=0.0, mode="host"), prompts)
            np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)
        budgets = budgets[1:2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Engines of both files, natively."""
    folder = tmp_path_factory.mktemp("scales")
    return [engine_of(path, "xla") for path in write_tiny_pair("qwen3moe", folder)]


def test_calibration_sees_the_multiplied_weights(pair, tmp_path):
    ids_WS = np.random.default_rng(0).integers(0, 256, (2, 17), np.int32)
    windows = Windows(ids_WS, np.ones((2, 16), np.int64))
    scaled, multiplied = (
        calibrate(engine.model, windows, "second_moment", tmp_path / str(i))
        for i, engine in enumerate(pair)
    )
    for name in ("input_moments", "hidden_moments", "selections_LE"):
        np.testing.assert_array_equal(getattr(scaled, name), getattr(multiplied, name))


def test_low_copies_keep_the_scales(pair, tmp_path):
    """They are encoded from what the scales multiply, and multiplied alike."""
    results = []
    ids_WS = np.random.default_rng(1).integers(0, 256, (1, 9), np.int32)
    windows = Windows(ids_WS, np.ones((1, 8), np.int64))
    for engine in pair:
        config, file = engine.config, engine.model.file
        low = open_low_precision(file, config, LowPrecisionSpec("Q4_K"), tmp_path)
        store = HostExperts(config, file, [low])
        cache = CacheConfig(plan=uniform_plan(store, 1), chunk_tokens=9)
        errors = measure_errors(engine, store, windows)
        logits = decode(Engine(engine.model, store, cache), PROMPTS)
        results.append((logits, errors))
        # As a model of its own.
        np.testing.assert_array_equal(decode(engine_of(low.paths[0], "xla"), PROMPTS), logits)
    for got, wanted in zip(*results, strict=True):
        # Some of the multiplied blocks have scales that are subnormal in float16, and lose bits.
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("role", ["attn_q", "ffn_up_exps"])
def test_a_damaged_scale_is_named(pair, tmp_path, role):
    file, path = pair[0].model.file, tmp_path / "damaged.gguf"
    entries = []
    for name, tensor in file.tensors.items():
        raw = np.array(tensor.raw)
        if name == f"blk.1.{role}.scale":
            raw.view("<f4")[-1] = np.nan
        entries.append((name, tensor.format, tensor.shape, raw))
    write_gguf(path, file.metadata, entries, file.field_types)
    with pytest.raises(ValueError, match=rf"'blk\.1\.{role}\.scale': a NaN or infinite") as caught:
        model = load_model(path, "xla")
        HostExperts(model.config, model.file)
    assert "\n" not in str(caught.value)


def test_a_scale_of_another_type_is_named(pair, tmp_path):
    file, path, name = pair[0].model.file, tmp_path / "half.gguf", "blk.1.ffn_up_exps.scale"
    entries = {n: (n, t.format, t.shape, t.raw) for n, t in file.tensors.items()}
    entries[name] = (name, "F16", (8,), np.ones(8, np.float16).view(np.uint8))
    write_gguf(path, file.metadata, list(entries.values()), file.field_types)
    opened = open_gguf(path)
    with pytest.raises(NotImplementedError, match=rf"'{name}' is F16; supported are scales"):
        HostExperts(pair[0].config, opened)
