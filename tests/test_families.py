"""Every family of `families/` against Hugging Face in float32, and the engine against itself.

The goldens are logits of transformers' own classes on the dequantised tensors
(`goldens/make_goldens.py`).
"""

from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel, load_model

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4  # another order of float32 sums, on logits of standard deviation 1 to 3
LENGTHS = (21, 5, 13)  # of the prompts of a batch, in pieces of 8 tokens
STEPS = 12


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [T] and logits float32 [T, V]."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        assert str(file["weights_sha256"]) == FAMILIES[name].sha256(), (
            f"families/{name}.py or NumPy's generator changed: run goldens/make_goldens.py {name}"
        )
        return file["tokens_T"], file["logits_TV"]


# The others' parts are those of these two, and of models in test_logits.py.
QUICK_ON_BLOCKS = ("gpt_oss", "gemma4")
CASES = [
    pytest.param(
        (name, backend),
        id=f"{name}-{backend}",
        marks=pytest.mark.slow if backend == "ggml_f32" and name not in QUICK_ON_BLOCKS else (),
    )
    for name in FAMILIES
    for backend in ("xla", "ggml_f32")
]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[str, str, LoadedModel]:
    name, implementation = request.param
    path = tmp_path_factory.mktemp("families") / f"{name}.gguf"
    FAMILIES[name].write(path)
    return name, f"{name} on {implementation}", load_model(path, implementation)


def engine_for(model: LoadedModel, slots_per_layer: int | None, chunk_tokens: int) -> Engine:
    store, config = HostExperts(model.config, model.file), model.config
    share = 1.0 if slots_per_layer is None else slots_per_layer / config.n_experts
    budget = int(store.precision_bytes(0) * share)
    return Engine(model, store, CacheConfig(budget, chunk_tokens=chunk_tokens))


def assert_close(got, wanted, what: str) -> None:
    difference = float(np.abs(np.asarray(got) - np.asarray(wanted)).max())
    print(f"{what}: max difference {difference:.1e}")
    assert difference <= TOLERANCE, what


def test_score(case):
    name, what, model = case
    ids_T, wanted_TV = golden(name)
    assert_close(engine_for(model, None, 64).score(ids_T[None])[0], wanted_TV, what)


@pytest.mark.slow  # a family takes about 20 seconds on each backend, most of them compilation
def test_prefill_and_decode_in_a_batch_at_every_budget(case):
    """Prompts of different lengths in pieces, then token by token; one sequence pauses."""
    name, what, model = case
    ids_T, wanted_TV = golden(name)
    runs = []
    for slots in (model.config.experts_per_token, None):
        engine, lengths_B = engine_for(model, slots, 8 * len(LENGTHS)), np.array(LENGTHS)
        engine.start(len(LENGTHS), len(ids_T))
        logits_NBV = [engine.prefill([ids_T[:length] for length in LENGTHS])]
        wanted_NBV = [wanted_TV[lengths_B - 1]]
        for step in range(STEPS):
            active_B = np.array([True, step not in (2, 3), True])
            logits_NBV.append(engine.decode(ids_T[lengths_B], active_B))
            lengths_B = lengths_B + active_B
            wanted_NBV.append(wanted_TV[lengths_B - 1])
        runs.append(np.stack([np.asarray(logits_BV) for logits_BV in logits_NBV]))
        active_NB = np.ones(runs[-1].shape[:2], bool)
        active_NB[3:5, 1] = False
        got, wanted = runs[-1][active_NB], np.stack(wanted_NBV)[active_NB]
        assert_close(got, wanted, f"{what} with {slots or 'all'} slots a layer")
    assert np.array_equal(runs[0][active_NB].view(np.int32), runs[1][active_NB].view(np.int32))
