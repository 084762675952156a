"""Logits that are not finite end a run with one line that names the place; edges of sampling."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.inference.sampling import Sampling, sample, seed_key
from hobbit_jax.model_file.gguf_file import write_gguf
from hobbit_jax.models.loading import load_model

# All of floats, so that any weight can be as large as a float gets.
MODEL = replace(tiny_models.MODELS["olmoe"], experts=(("F32",) * 3,) * 2, dense=("F32",) * 7)
REPOSITORY = Path(__file__).resolve().parent.parent


def poison(path: Path, huge: str | None = None, spike: int | None = None) -> Path:
    """The tiny model with finite weights whose products overflow (NaN is refused when it is read).

    Args:
        path: where it is written.
        huge: tensor all of whose weights are huge.
        spike: token that alone meets huge weights, in the values of the first layer.
    """
    entries = []
    for name, (format, shape, raw) in tiny_models._tensors(MODEL).items():
        weights = raw.copy().view(np.float32)
        if name == f"{huge}.weight":
            weights[:] = 3e38
        if spike is not None and name == "token_embd.weight":
            weights[:, 0] = 0
            weights[spike, 0] = 1e6  # 16 after the norm
        if spike is not None and name == "blk.0.attn_v.weight":
            weights[:, 0] = 1e38
        entries.append((name, format, shape, weights.view(np.uint8)))
    write_gguf(path, tiny_models._metadata(MODEL), entries)
    return path


def engine_of(path: Path, budget_bytes: int | None = None) -> Engine:
    model = load_model(path)
    return Engine(
        model,
        HostExperts(model.config, model.file),
        CacheConfig(budget_bytes, chunk_tokens=16),
    )


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("blk.0.ffn_gate_exps", "the experts of layer 0"),
        ("blk.1.attn_v", "the attention of layer 1"),
        pytest.param("blk.1.ffn_gate_inp", "the experts of layer 1", marks=pytest.mark.slow),
        pytest.param("blk.1.ffn_down_exps", "the experts of layer 1", marks=pytest.mark.slow),
        ("output", "the output norm or the output matrix"),
    ],
)
def test_the_part_is_named(tmp_path, tensor, place):
    engine = engine_of(poison(tmp_path / "m.gguf", tensor), 8 << 20)
    ids_BT = tiny_models.tokens(MODEL, 40).reshape(2, 20)
    for call in (
        lambda: engine.score(ids_BT),
        lambda: list(engine.generate([[5, 6], [7]], 4, Sampling(0.8))),
    ):
        with pytest.raises(ValueError, match=f"not finite: NaN or infinity begins in {place}"):
            call()


def test_only_what_is_fed_counts(tmp_path):
    """Only one token meets the damage; before it, and in a sequence that has ended, all is well."""
    engine = engine_of(poison(tmp_path / "m.gguf", spike=77))
    ids_BT = np.full((3, 40), 5, np.int32)
    assert np.isfinite(np.asarray(engine.score(ids_BT))).all()
    ids_BT[2, 31] = 77
    with pytest.raises(ValueError, match="begins in the attention of layer 0;"):
        engine.score(ids_BT)
    engine.start(2, 8)
    engine.prefill([[5], [6, 7]])
    engine.decode(np.array([5, 77]), np.array([True, False]))
    with pytest.raises(ValueError, match="begins in the attention of layer 0;"):
        engine.decode(np.array([77, 8]))
    with pytest.raises(RuntimeError, match="call start first"):
        engine.decode(np.array([5, 8]))


@pytest.mark.parametrize("tokens_per_call", [1, 4])
def test_a_generation_ends_at_the_first_token_that_cannot_be_drawn(tmp_path, tokens_per_call):
    """What is drawn is fed next; the damage shows in the middle of a call of several tokens."""
    whole = engine_of(poison(tmp_path / "whole.gguf", spike=257))
    drawn = [int(ids_B[0]) for ids_B, _ in whole.generate([[5, 6]], 8)]
    target = next(n for n, token in enumerate(drawn) if token not in (5, 6, *drawn[:n]) and n)
    engine = engine_of(poison(tmp_path / "m.gguf", spike=drawn[target]))
    seen = []
    with pytest.raises(ValueError, match="begins in the attention of layer 0;"):
        for ids_B, _ in engine.generate([[5, 6]], 8, tokens_per_call=tokens_per_call):
            seen.append(int(ids_B[0]))
    assert seen == drawn[: len(seen)] and len(seen) <= target + 1


@pytest.mark.slow
def test_generate_script(tmp_path):
    path = poison(tmp_path / "m.gguf", "blk.1.ffn_up_exps")
    flags = (f"--model={path}", "--prompt=ab", "--max_new_tokens=4")
    done = subprocess.run(
        [sys.executable, "scripts/generate.py", *flags],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the logits are not finite: ")
    assert "begins in the experts of layer 1;" in done.stderr and done.stderr.count("\n") == 1


def drawn(logits_BV: jax.Array, sampling: Sampling) -> np.ndarray:
    return np.asarray(sample(logits_BV, seed_key(sampling.seed), sampling))


def seed_bits(seed: int) -> tuple[int, ...]:
    return tuple(jax.random.key_data(seed_key(seed)).tolist())


def test_sampling_edges():
    logits_BV = jax.numpy.asarray([[1.0, 40.0, 40.0 - 1e-5, -3.0], [0.5, 0.25, 9.0, 1.0]])
    for temperature in (1e-45, 1e-40, 1e-38, 1e-37, 1e-31, 1e-30, 1e-12):
        drawn_B = drawn(logits_BV, Sampling(temperature, seed=3))
        assert drawn_B.tolist() == [1, 2], temperature
    for top_p in (1e-300, 1e-50, 1e-40, 1e-9):
        assert drawn(logits_BV, Sampling(1.0, top_p)).tolist() == [1, 2], top_p
    for bad in ({"temperature": v} for v in (float("nan"), -0.1, float("inf"), 1e7)):
        with pytest.raises(ValueError, match=r"temperature is .*want 0 \(greedy\) to 1e\+06"):
            Sampling(**bad)
    for bad in (float("nan"), 0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match=r"top_p is .*want 0 < top_p <= 1"):
            Sampling(1.0, bad)
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match=r"seed is .*want 0 to 9223372036854775807"):
            Sampling(1.0, seed=bad)


def test_seeds():
    """All 63 bits count; seeds of up to 32 bits are `jax.random.key`'s own."""
    keys = {s: seed_bits(s) for s in (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1)}
    assert len(set(keys.values())) == len(keys)
    for seed in (0, 1, 2**31, 2**32 - 1):
        assert keys[seed] == tuple(jax.random.key_data(jax.random.key(seed)).tolist())
