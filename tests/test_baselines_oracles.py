"""The real PyTorch and llama.cpp beside the engine, on tiny files of every architecture.

The goldens of `test_logits.py` are Hugging Face's logits of the same files, read by gguf-py; here
our reading feeds the same module. Planted: without the q/k permutation Mixtral's logits are off by
more than 1, with gate and up exchanged all are.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import REPOSITORY, TWO_BANKS

from hobbit_jax.baselines.comparison import Request, compare_model
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.model_file.architecture import read_config
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.record import read_records
from hobbit_jax.report.baseline_tables import section

# The libraries warn of their own accord, at import and later.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
NAMES = tuple(tiny_models.MODELS)
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("baselines")
    for name, model in tiny_models.MODELS.items():
        tiny_models.write_model(model, directory / f"{name}.gguf")
    return {name: directory / f"{name}.gguf" for name in NAMES}


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return torch


def side(torch, path, mode):
    from hobbit_jax.baselines.pytorch import PyTorch

    made = PyTorch(str(path), threads=1, context=64, mode=mode)
    assert torch.get_num_threads() == 1
    return made


def golden(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        return file["tokens_T"], file["logits_TV"]


@pytest.mark.parametrize("name", NAMES)
def test_torch_in_float32_is_the_golden(torch, paths, name):
    ids_T, wanted_TV = golden(name)
    baseline = side(torch, paths[name], "float32")
    np.testing.assert_allclose(baseline.score(ids_T), wanted_TV, atol=2e-5, rtol=0)
    # Prefill and decode go on with the cache: the same most probable tokens.
    chosen = [baseline.prefill(ids_T[:20])] + [baseline.decode(int(token)) for token in ids_T[20:]]
    assert chosen == wanted_TV[19:].argmax(axis=-1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_planted_errors_of_the_mapping_show(torch, paths, monkeypatch, name):
    from hobbit_jax.baselines import hugging_face

    def difference():
        ids_T, wanted_TV = golden(name)
        got_TV = side(torch, paths[name], "float32").score(ids_T)
        return np.abs(got_TV - wanted_TV).max()

    if name == "mixtral":
        monkeypatch.setattr(hugging_face, "interleaved_to_halves", lambda weights, heads: weights)
        assert difference() > 1
        monkeypatch.undo()
    expert_weights = hugging_face.expert_weights

    def exchanged(*arguments):
        arrays = expert_weights(*arguments)
        half = arrays["gate_up_proj"].shape[1] // 2
        return {**arrays, "gate_up_proj": np.roll(arrays["gate_up_proj"], half, axis=1)}

    monkeypatch.setattr(hugging_face, "expert_weights", exchanged)
    assert difference() > 1


def request(path, baseline, **changed):
    fixed = Request(path, baseline, None, None, None, None, 3, 40, 2, 16, 8, 1)
    return replace(fixed, **changed)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    letters = np.random.default_rng(0).integers(0x61, 0x7B, 1000, np.uint8)
    path.write_bytes(letters.tobytes())
    return path


def test_compare_with_torch(torch, paths, text, tmp_path, monkeypatch, capsys):
    """The script end to end."""
    workdir = tmp_path / "new"
    arguments = (
        f"--model={paths['mixtral']}", "--baseline=torch", f"--text={text}", f"--workdir={workdir}",
        "--threads=1", "--windows=3", "--context=40", "--turns=2", "--prompt_tokens=16",
        "--decode_tokens=8",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "scripts" / "compare.py"), run_name="__main__")
    assert not ended.value.code
    assert "| mixtral.gguf | PyTorch float32 | 1 |" in capsys.readouterr().out
    (record,) = read_records(workdir).found
    metrics = record.metrics
    assert metrics["logit_max_difference"] < 1e-4 < metrics["logit_std"]
    assert metrics["kl_mean_nats"] < 1e-9
    assert metrics["top1_agreement"] == metrics["same_greedy_token"] == 1.0
    assert record.notes["baseline_precision"] == "float32"
    assert metrics["ours_threads"] == metrics["baseline_threads"] == 1
    assert record.asked.setting["model"] == "mixtral.gguf" and record.notes["text"] == "letters.txt"


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def float_path(tmp_path_factory):
    """Two layers without quantisation, so that llama.cpp's activations are not quantised either."""
    model = replace(TWO_BANKS, experts=(("F32",) * 3,) * 2, dense=("F32",) * 7)
    path = tmp_path_factory.mktemp("float") / "float.gguf"
    tiny_models.write_model(model, path)
    return path


def test_compare_with_llama_cpp(llama_cpp, float_path, text):
    record = compare_model(request(float_path, "llama_cpp", text=text))
    metrics = record.metrics
    # Its keys and values are in float16.
    assert metrics["logit_max_difference"] < 0.05
    assert metrics["kl_mean_nats"] < 1e-4
    assert metrics["top1_agreement"] > 0.98
    assert metrics["same_greedy_token"] > 0.9
    assert metrics["ours_threads"] == metrics["baseline_threads"] == 1
    assert "llama.cpp" in section([record])


def test_experts_of_the_first_layers_stay_on_the_cpu(llama_cpp, float_path, capfd):
    """The binding has no structure for the override: llama.cpp must see ours, and obey."""
    from hobbit_jax.baselines.llama import LlamaCpp, layers_on_cpu

    file = open_gguf(float_path)
    config = read_config(file)
    layer_bytes = HostExperts(config, file).precision_bytes(0) // config.n_layers
    cases = {0: 2, layer_bytes - 1: 2, layer_bytes: 1, 2 * layer_bytes - 1: 1, 2 * layer_bytes: 0}
    assert {budget: layers_on_cpu(file, config, budget) for budget in cases} == cases

    ids_T = np.arange(20, dtype=np.int32)
    logits = {}
    for cpu_layers in (0, 1):
        capfd.readouterr()
        baseline = LlamaCpp(str(float_path), 1, 64, None, cpu_layers)
        logits[cpu_layers] = baseline.score(ids_T)
        overridden = "tensor overrides to CPU are used" in capfd.readouterr().err
        assert overridden == bool(cpu_layers)
        assert baseline.facts()["layers_with_experts_on_cpu"] == cpu_layers
    np.testing.assert_array_equal(logits[0], logits[1])
    wanted_TV = Engine(load_model(float_path, "xla"), HostExperts(config, file)).score(ids_T[None])[
        0
    ]
    np.testing.assert_allclose(logits[0], np.asarray(wanted_TV), atol=0.05)
