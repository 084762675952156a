"""Parts of model families against their definitions, written out naively."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.decode_loop import Inputs, decode_program
from hobbit_jax.inference.engine import Engine
from hobbit_jax.inference.sampling import Sampling
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf
from hobbit_jax.models import delta_net
from hobbit_jax.models.config import RouterConfig
from hobbit_jax.models.loading import load_model
from hobbit_jax.models.modules import Linear
from hobbit_jax.models.presets import PRESETS
from hobbit_jax.models.registry import read_config
from hobbit_jax.models.router import Router


@pytest.fixture(scope="module")
def hybrid_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid") / "hybrid.gguf"
    tiny_models.write_model(tiny_models.MODELS["qwen35moe"], path)
    return path


@pytest.fixture(scope="module")
def hybrid_file(hybrid_path) -> GGUFFile:
    return open_gguf(hybrid_path)


def test_chunks_and_steps_are_the_recurrence():
    """Two full chunks and a part of one, from a state that is not zero, in float64."""
    rng = np.random.default_rng(0)
    batch, tokens, heads, width = 2, 150, 3, 16
    q, k, v = rng.standard_normal((3, batch, tokens, heads, width))
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    log_decay = -rng.exponential(0.3, (batch, tokens, heads))
    strength = rng.uniform(0, 1, (batch, tokens, heads))
    state = start = rng.standard_normal((batch, heads, width, width))
    wanted = np.zeros_like(v)
    for t in range(tokens):
        state = state * np.exp(log_decay[:, t])[..., None, None]
        found = np.einsum("bhde,bhd->bhe", state, k[:, t])
        correction = strength[:, t][..., None] * (v[:, t] - found)
        state = state + np.einsum("bhd,bhe->bhde", k[:, t], correction)
        wanted[:, t] = np.einsum("bhde,bhd->bhe", state, q[:, t])
    inputs = [np.float32(a) for a in (q, k, v, log_decay, strength)]
    end, got = delta_net._in_chunks(jnp.asarray(start, jnp.float32), inputs)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    np.testing.assert_allclose(end, state, atol=2e-5)
    step, stepped = jax.jit(delta_net._one_token), jnp.asarray(start, jnp.float32)
    for t in range(tokens):
        stepped, one = step(stepped, [a[:, t : t + 1] for a in inputs])
        np.testing.assert_allclose(one[:, 0], wanted[:, t], atol=2e-5)


class _Weights:
    """A router's parts; see `modules.BlockWeights`."""

    def __init__(self, weights_ED: np.ndarray, bias_E: np.ndarray):
        self._weights_ED, self._bias_E = weights_ED, bias_E

    def router(self) -> Linear:
        return Linear("F32", {"weights": jnp.asarray(self._weights_ED)}, "xla")

    def array(self, role: str) -> jax.Array:
        assert role == "exp_probs_b.bias"
        return jnp.asarray(self._bias_E)


@pytest.mark.parametrize(
    "settings",
    [
        RouterConfig("softmax", renormalise=False),
        RouterConfig("sigmoid", renormalise=True, scale=2.5),
        RouterConfig("sigmoid", renormalise=False, selection_bias=True),
        RouterConfig("sigmoid", True, 1.8, selection_bias=True, groups=4, groups_used=2),
        RouterConfig("softmax", True, groups=3, groups_used=1),
        RouterConfig("softmax", False, 16.0, groups=4, groups_used=2, ranked_by=1),
        RouterConfig("sqrt_softplus", True, 1.5, selection_bias=True),
    ],
)
def test_a_router_does_what_its_settings_say(settings):
    n_experts, used, d_model = 12, 3, 8
    rng = np.random.default_rng(1)
    weights_ED = rng.standard_normal((n_experts, d_model)).astype(np.float32)
    bias_E = rng.standard_normal(n_experts).astype(np.float32)
    h_TD = rng.standard_normal((40, d_model)).astype(np.float32)
    config = replace(PRESETS["tiny"], router=settings, n_experts=n_experts, experts_per_token=used)
    ids_TK, weights_TK = Router(config, _Weights(weights_ED, bias_E))(jnp.asarray(h_TD))
    for h_D, ids_K, got_K in zip(h_TD, np.asarray(ids_TK), np.asarray(weights_TK), strict=True):
        logits = weights_ED.astype(np.float64) @ h_D
        score = 1 / (1 + np.exp(-logits))
        if settings.gating == "softmax":
            score = np.exp(logits) / np.exp(logits).sum()
        if settings.gating == "sqrt_softplus":
            score = np.sqrt(np.log1p(np.exp(logits)))
        choice = score + bias_E if settings.selection_bias else score.copy()
        size = n_experts // settings.groups
        groups = [range(g * size, (g + 1) * size) for g in range(settings.groups)]
        best = slice(-settings.ranked_by, None)
        groups.sort(key=lambda group: sum(sorted(choice[list(group)])[best]), reverse=True)
        allowed = [expert for group in groups[: settings.groups_used] for expert in group]
        chosen = sorted(allowed, key=lambda expert: -choice[expert])[:used]
        chosen.sort(key=lambda expert: -score[expert])
        wanted_K = score[chosen]
        if settings.renormalise:
            wanted_K = wanted_K / wanted_K.sum()
        assert ids_K.tolist() == chosen
        np.testing.assert_allclose(got_K, wanted_K * settings.scale, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "ggml"])
def test_the_decode_loop_copies_no_cache(hybrid_path, implementation):
    """Neither keys and values nor a recurrence's matrices, whatever kinds of block there are."""
    model = load_model(hybrid_path, implementation)
    engine = Engine(model, HostExperts(model.config, model.file))
    engine.start(3, 40)
    three = np.zeros(3, np.int32)
    inputs = Inputs(
        np.bool_(True), three, np.ones(3, bool), three, np.int32(1), np.int32(0), engine._key, three
    )
    program = decode_program(engine._loop_spec(Sampling(), 1)).lower(
        engine._arrays, engine.pool.banks, engine.pool.table_UE, engine._started(), inputs
    )
    text = program.compile().as_text()
    caches = engine._started().caches
    shapes = {f"f32[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(caches)}
    assert len(shapes) == 3 and all(shape in text for shape in shapes)
    copies = re.findall(r"= (f32\[[\d,]*\])\S* copy(?:-start)?\(", text)
    assert not shapes & set(copies)


@pytest.mark.parametrize(
    ("keys", "drop", "error", "match"),
    [
        ({"ssm.inner_size": 320}, "", NotImplementedError, "inner_size is 320.*192 in all"),
        ({"ssm.time_step_rank": 5}, "", ValueError, "5 value heads.*multiple of the 2 key heads"),
        ({"attention.recurrent_layers": [True]}, "", ValueError, "a list of 3 values"),
        ({"nextn_predict_layers": 3}, "", ValueError, "from 0 to 2"),
        ({"nextn_predict_layers": 0}, "", NotImplementedError, "blk.2.attn_k.*3 layers"),
        ({"attention.recurrent_layers": [False, True, False]}, "", NotImplementedError, "blk.0"),
        ({}, "blk.1.attn_q_norm.weight", ValueError, "'blk.1.attn_q_norm.weight' is missing"),
        ({}, "blk.0.ssm_a", ValueError, "'blk.0.ssm_a' is missing"),
        ({"expert_weights_norm": False}, "", NotImplementedError, "expert_weights_norm"),
    ],
)
def test_refusals_of_a_hybrid(hybrid_file, keys, drop, error, match):
    metadata = hybrid_file.metadata | {f"qwen35moe.{key}": value for key, value in keys.items()}
    tensors = {name: t for name, t in hybrid_file.tensors.items() if name != drop}
    with pytest.raises(error, match=match) as caught:
        read_config(replace(hybrid_file, metadata=metadata, tensors=tensors))
    assert "\n" not in str(caught.value)


def test_layers_are_blocks_with_experts(hybrid_file):
    """The last block predicts a further token and is none of the model."""
    config = read_config(hybrid_file)
    assert (config.n_blocks, config.n_layers, config.skipped_blocks) == (2, 2, 1)
    dense = replace(config, blocks=(replace(config.blocks[0], d_dense=64), *config.blocks))
    assert (dense.n_blocks, dense.n_layers, dense.block_of_layer) == (3, 2, (1, 2))
    places = [place["delta_matrix"] for place in dense.state_places]
    assert places == [0, 1, 2]  # the last one has none: past the end
