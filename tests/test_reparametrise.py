"""Off its grid a model says the same, and its experts are not what an encoder leaves alone."""

import numpy as np
import pytest
from tiny_models import MODELS, tokens, write_model

from hobbit_jax.experts.low_precision import decode, dequantize
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import load_model
from hobbit_jax.quantize import ggml
from hobbit_jax.reference_model.reparametrise import write_off_grid


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmoe", pytest.param("qwen3moe-tied", marks=pytest.mark.slow)])
def test_equal_logits(name, tmp_path):
    """A head of its own and a tied one; q and k normalised by head and as a whole."""
    write_model(MODELS[name], tmp_path / "m.gguf")
    model = load_model(tmp_path / "m.gguf", "xla")
    write_off_grid(model.file, model.config, tmp_path / "other.gguf")
    other = load_model(tmp_path / "other.gguf", "xla")
    ids_BT = tokens(MODELS[name], 24)[None]
    logits = [
        np.asarray(Engine(m, HostExperts(m.config, m.file)).score(ids_BT)) for m in (model, other)
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-4)


def test_weights_leave_their_grid(two_banks_path, tmp_path):
    """Encoding again is all but free on the grid, and costs what it costs off it."""
    model = load_model(two_banks_path, "xla")
    write_off_grid(model.file, model.config, tmp_path / "other.gguf")
    other = load_model(tmp_path / "other.gguf", "xla")
    name = "blk.0.ffn_up_exps.weight"

    def error(file) -> float:
        weights = dequantize(file.tensors[name], 0)
        again = decode(ggml.encode(weights, "Q4_K"), "Q4_K")
        return float(np.sqrt(((again - weights) ** 2).mean() / (weights**2).mean()))

    assert error(model.file) < 0.03 and error(other.file) > 0.05
