"""The real PyTorch and llama.cpp beside the engine, on tiny files of every architecture.

The goldens of `test_logits.py` are Hugging Face's logits of the same files, read by gguf-py; here
our reading feeds the same module. Planted: without the q/k permutation Mixtral's logits are off by
more than 1, with gate and up exchanged all are.
"""

import importlib.metadata
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import NEEDS_LLAMA_CPP, REPOSITORY, TWO_BANKS
from families import FAMILIES
from scaled_models import write_pair, write_tiny_pair

from hobbit_jax import reference
from hobbit_jax.baselines import llama_cpp_api
from hobbit_jax.baselines.child import Child, SideSpec
from hobbit_jax.baselines.comparison import BASELINES, Request, compare_model
from hobbit_jax.baselines.llama import layers_on_cpu
from hobbit_jax.engine_flags import EngineOptions
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.loading import load_model
from hobbit_jax.models.registry import read_config
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
    # As near as `test_logits.py` asks of ours: two machines' sums differ by 3e-5.
    np.testing.assert_allclose(baseline.score(ids_T), wanted_TV, atol=1e-4, rtol=0)
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
        if (stack := arrays.get("experts.gate_up_proj")) is not None:
            swapped = {"experts.gate_up_proj": np.roll(stack, stack.shape[1] // 2, axis=1)}
        else:  # a dense FFN
            gate, up = "gate_proj.weight", "up_proj.weight"
            swapped = {gate: arrays[up], up: arrays[gate]}
        return arrays | swapped

    monkeypatch.setattr(hugging_face, "expert_weights", exchanged)
    assert difference() > 1


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
        "--implementation=xla", "--threads=1", "--windows=3", "--context=40", "--turns=2",
        "--prompt_tokens=16", "--decode_tokens=8",
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
def float_path(tmp_path_factory):
    """Two layers without quantisation, so that llama.cpp's activations are not quantised either."""
    model = replace(TWO_BANKS, experts=(("F32",) * 3,) * 2, dense=("F32",) * 7)
    path = tmp_path_factory.mktemp("float") / "float.gguf"
    tiny_models.write_model(model, path)
    return path


@NEEDS_LLAMA_CPP
def test_compare_with_llama_cpp(float_path, text):
    options = EngineOptions(str(float_path), threads=1)
    record = compare_model(Request(options, "llama_cpp", 3, 40, 2, 16, 8, str(text)))
    metrics = record.metrics
    # Its keys and values are in float16.
    assert metrics["logit_max_difference"] < 0.05
    assert metrics["kl_mean_nats"] < 1e-4
    assert metrics["top1_agreement"] > 0.98
    assert metrics["same_greedy_token"] > 0.9
    assert metrics["ours_threads"] == metrics["baseline_threads"] == 1
    assert record.notes["baseline_versions_xllamacpp"] == llama_cpp_api.VERSION
    assert "llama.cpp" in section([record])


def llama_cpp(path, **options):
    """In a process of its own, as the comparison makes it."""
    fixed = {"model": str(path), "context": 64, "budget_bytes": None}
    return Child(SideSpec(BASELINES["llama_cpp"][0], fixed | options, 1), "llama.cpp")


@NEEDS_LLAMA_CPP
def test_llama_cpp_in_float32_is_our_float32(float_path, tmp_path):
    """At once, in pieces and token by token; without float32 keys it is not as near."""
    file, ids_T = open_gguf(float_path), np.arange(40, dtype=np.int32)
    engine = Engine(load_model(float_path, "xla"), HostExperts(read_config(file), file))
    wanted_TV = np.asarray(engine.score(ids_T[None])[0])

    def difference(**options):
        with llama_cpp(float_path, **options) as child:
            got_TV = child.score(ids_T)
            turn = child.turn(ids_T, 20)
        assert list(turn.chosen) == wanted_TV[19:].argmax(axis=-1).tolist()
        return np.abs(got_TV - wanted_TV).max()

    assert difference(kv_format="float32") < 2e-5
    assert difference(kv_format="float32", tokens_at_once=7) < 2e-5
    assert difference(kv_format="float32", tokens_at_once=1) < 2e-5
    assert difference() > 1e-4


@NEEDS_LLAMA_CPP
# llama.cpp takes deepseek2 without attention.q_lora_rank only with 26 or 27 blocks, and ranks
# groups of experts by their two best, which DeepSeek-V2 and transformers do not.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek2_lite", "deepseek2_groups"}))
def test_llama_cpp_in_float32_is_the_golden_of_a_family(name, tmp_path):
    """So the golden belongs to the file's layout, and not to our reading of it."""
    FAMILIES[name].write(tmp_path / "model.gguf", as_float32=True)
    with np.load(GOLDENS / f"{name}.npz") as file:
        ids_T, wanted_TV = file["tokens_T"], file["logits_TV"]
    with llama_cpp(tmp_path / "model.gguf", kv_format="float32") as child:
        difference = np.abs(child.score(ids_T) - wanted_TV).max()
    print(f"{name}: llama.cpp differs by {difference:.1e}")
    # ggml takes GELU from a table in half precision.
    assert difference < (3e-2 if name == "gemma4" else 1e-4)


def between(rng, shape):
    return rng.uniform(0.5, 1.5, shape)


def our_logits(path, ids_T, implementation):
    model = load_model(path, implementation)
    engine = Engine(model, HostExperts(model.config, model.file))
    return np.asarray(engine.score(ids_T[None])[0])


@NEEDS_LLAMA_CPP
# llama.cpp reads scales in every family, and multiplies by all of them in a few only.
@pytest.mark.parametrize("name", ["qwen3moe", "mixtral", "llama", "qwen35moe"])
def test_scales_of_matrices_are_those_of_llama_cpp(name, tmp_path):
    """In qwen35moe but for the block that predicts a further token, which it does not run."""
    paths = write_tiny_pair(name, tmp_path, between, without="blk.2.")
    ids_T, _ = golden(name)
    logits = []
    for path in paths:
        with llama_cpp(path, kv_format="float32") as child:
            logits += [our_logits(path, ids_T, "xla"), child.score(ids_T)]
    for other in logits[1:]:
        np.testing.assert_allclose(logits[0], other, atol=1e-4, rtol=0)


@NEEDS_LLAMA_CPP
def test_nvfp4_experts_with_scales_are_those_of_llama_cpp(tmp_path):
    """Both round activations to 8 bits, by ggml's own product."""
    model = replace(TWO_BANKS, experts=(("NVFP4",) * 3,) * 2, dense=("F32",) * 7)
    tiny_models.write_model(model, tmp_path / "source.gguf")
    scaled, multiplied = write_pair(open_gguf(tmp_path / "source.gguf"), tmp_path, between)
    ids_T = tiny_models.tokens(model)
    ours_TV, exact_TV = our_logits(scaled, ids_T, "ggml"), our_logits(multiplied, ids_T, "xla")
    np.testing.assert_allclose(our_logits(scaled, ids_T, "xla"), exact_TV, atol=1e-4, rtol=0)
    with llama_cpp(scaled, kv_format="float32") as child:
        theirs_TV = child.score(ids_T)
    np.testing.assert_allclose(ours_TV, theirs_TV, atol=1e-4, rtol=0)


def test_torch_multiplies_by_the_scales(torch, tmp_path):
    path, _ = write_tiny_pair("qwen2moe", tmp_path, between)
    ids_T, _ = golden("qwen2moe")
    theirs_TV = side(torch, path, "float32").score(ids_T)
    np.testing.assert_allclose(our_logits(path, ids_T, "xla"), theirs_TV, atol=1e-4, rtol=0)


@NEEDS_LLAMA_CPP
def test_experts_of_the_first_layers_stay_on_the_cpu(float_path, tmp_path):
    """llama.cpp must see the override, and obey."""
    file = open_gguf(float_path)
    config = read_config(file)
    layer_bytes = HostExperts(config, file).precision_bytes(0) // config.n_layers
    cases = {0: 2, layer_bytes - 1: 2, layer_bytes: 1, 2 * layer_bytes - 1: 1, 2 * layer_bytes: 0}
    assert {budget: layers_on_cpu(file, config, budget) for budget in cases} == cases

    logits = {}
    for cpu_layers in (0, 1):
        with llama_cpp_api.Model(float_path, cpu_layers=cpu_layers) as model:
            moved = re.findall(r"tensor (\S+) .*overridden to CPU", model.log)
        roles = ("gate", "up", "down") if cpu_layers else ()
        assert set(moved) == {f"blk.0.ffn_{role}_exps.weight" for role in roles}
        with llama_cpp(float_path, cpu_layers=cpu_layers) as child:
            logits[cpu_layers] = child.score(np.arange(20))
            assert child.facts()["layers_with_experts_on_cpu"] == cpu_layers
    np.testing.assert_array_equal(logits[0], logits[1])


@NEEDS_LLAMA_CPP
def test_a_file_that_llama_cpp_does_not_load(float_path, tmp_path):
    """Its own words arrive as one line, through the child too."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(float_path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"^llama\.cpp does not load .*cut\.gguf: \S.*$"):
        llama_cpp_api.Model(path)


@NEEDS_LLAMA_CPP
def test_another_build_of_the_wheel_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2027.1.1")
    with pytest.raises(NotImplementedError, match=r"xllamacpp 2026\.\S+ installed is 2027\.1\.1: "):
        llama_cpp_api.load_library.__wrapped__()


@NEEDS_LLAMA_CPP
def test_the_structures_are_laid_out_as_the_wheel_lays_them_out():
    """llama.h's defaults stand where the binding has their fields."""
    library = llama_cpp_api.load_library()
    model, context = library.llama_model_default_params(), library.llama_context_default_params()
    fields = ("tensor_buft_overrides", "n_gpu_layers", "split_mode", "load_mode", "vocab_only")
    assert [getattr(model, name) for name in fields] == [None, -1, 1, -1, False]
    assert (model.check_tensors, model.use_extra_bufts) == (False, True)
    fields = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "flash_attn_type")
    assert [getattr(context, name) for name in fields] == [512, 2048, 512, 1, 4, -1]
    assert (context.type_k, context.type_v) == (1, 1)  # float16


@NEEDS_LLAMA_CPP
def test_without_repacking_the_weights_stay_in_the_map():
    buffers = {}
    for repack in (True, False):
        with llama_cpp_api.Model(reference.model_path(), repack=repack) as model:
            buffers[repack] = "CPU_REPACK model buffer" in model.log
    assert buffers == {True: True, False: False}
