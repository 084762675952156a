"""Whole models against Hugging Face in float32, and the engine against itself.

The goldens are logits of transformers' own classes on the dequantised files
(`goldens/make_goldens.py`). We agree to 3e-5. Every bug that was planted to see these tests fail
(rope style, renormalisation, q/k norm, tied head, positions, a lost round) moved a logit by 2 or
more.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import REPOSITORY
from marks import slow_unless
from pool_invariants import UsesByExpert

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf, write_gguf
from hobbit_jax.models.loading import LoadedModel, load_model

GOLDENS = Path(__file__).parent / "goldens"
# Another order of float32 sums, through three layers, on logits of standard deviation 1.7.
TOLERANCE = 1e-4
NAMES = tuple(tiny_models.MODELS)
# Of the others one way is quick enough for every run; `make slow` has the rest.
QUICK = ("qwen3moe", "qwen35moe", "mixtral")


@pytest.fixture(scope="session")
def paths(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tiny_models")
    for name, model in tiny_models.MODELS.items():
        tiny_models.write_model(model, directory / f"{name}.gguf")
    return {name: directory / f"{name}.gguf" for name in NAMES}


@pytest.fixture(scope="session")
def loaded(paths) -> dict[str, LoadedModel]:
    return {name: load_model(path, "xla") for name, path in paths.items()}


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [T] and logits float32 [T, V]."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return file["tokens_T"], file["logits_TV"]


def engine_for(model: LoadedModel, slots_per_layer: int | None = None, **options) -> Engine:
    """An engine whose pool holds so many of each layer's experts; None is all of them."""
    store, config = HostExperts(model.config, model.file), model.config
    share = 1.0 if slots_per_layer is None else slots_per_layer / config.n_experts
    engine = Engine(model, store, CacheConfig(int(store.precision_bytes(0) * share), **options))
    assert set(engine.pool.slots.values()) == {slots_per_layer or config.n_experts}
    return engine


@pytest.mark.parametrize("implementation", ["xla", "ggml"])
def test_experts_that_are_a_tensor_each(paths, tmp_path, implementation):
    """As in Mixtral files of before April 2024, where they are not even in order."""
    stacked, entries = open_gguf(paths["mixtral"]), []
    for name, tensor in stacked.tensors.items():
        if "_exps." not in name:
            entries.append((name, tensor.format, tensor.shape, tensor.raw))
            continue
        for expert, raw in reversed(list(enumerate(tensor.raw))):
            one = name.replace("_exps.", f".{expert}.")
            entries.append((one, tensor.format, tensor.shape[1:], raw))
    np.random.default_rng(0).shuffle(entries)
    write_gguf(tmp_path / "apart.gguf", stacked.metadata, entries, stacked.field_types)
    ids_T, _ = golden("mixtral")
    logits = [
        np.asarray(engine_for(load_model(path, implementation), slots).score(ids_T[None]))
        for path in (paths["mixtral"], tmp_path / "apart.gguf")
        for slots in (2, None)
    ]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])

    fewer = [entry for entry in entries if not entry[0].endswith(".1.weight")]
    write_gguf(tmp_path / "cut.gguf", stacked.metadata, fewer)
    with pytest.raises(NotImplementedError, match=r"one tensor per expert, .*is missing"):
        load_model(tmp_path / "cut.gguf", implementation)


def assert_close(got, wanted, what: str, tolerance: float = TOLERANCE) -> None:
    difference = float(np.abs(np.asarray(got) - np.asarray(wanted)).max())
    print(f"{what}: max difference {difference:.1e}")
    assert difference <= tolerance, what


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_golden(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        wanted = str(file["weights_sha256"])
    assert tiny_models.weights_sha256(tiny_models.MODELS[name]) == wanted, (
        "tests/tiny_models.py or NumPy's generator changed: run goldens/make_goldens.py"
    )


@pytest.mark.parametrize(
    ("name", "rounds", "chunk_tokens"),
    [
        slow_unless(
            name in QUICK[:1] or (name in QUICK and rounds == 2), name, rounds, chunk_tokens
        )
        for name in NAMES
        for rounds, chunk_tokens in [(1, 2048), (2, 2048), (1, 20)]
    ],
)
def test_score(loaded, name, rounds, chunk_tokens):
    """All experts resident, or half of each layer's: two rounds. Cold, then warm."""
    ids_T, wanted_TV = golden(name)
    n_experts = loaded[name].config.n_experts
    slots = max(1, n_experts // rounds)
    engine = engine_for(loaded[name], slots, chunk_tokens=chunk_tokens)
    engine.controller.observers.append(counted := UsesByExpert(engine.store.shape_pLE))
    assert_close(engine.score(ids_T[None])[0], wanted_TV, f"{name} cold")
    # Every expert is chosen (make_goldens.py prints how often), so each is fetched.
    assert (counted.misses > 0).all()
    counted.misses[:] = 0
    assert_close(engine.score(ids_T[None])[0], wanted_TV, f"{name} warm")
    assert counted.misses.any() == (slots < n_experts)


@pytest.mark.parametrize("name", [slow_unless(name == "qwen35moe", name) for name in NAMES])
def test_prefill_and_decode(loaded, name):
    """A prompt in uneven chunks, then token by token, under the smallest budget there is."""
    ids_T, wanted_TV = golden(name)
    least = loaded[name].config.experts_per_token
    engine = engine_for(loaded[name], least, chunk_tokens=8)
    engine.start(1, len(ids_T))
    assert_close(engine.prefill([ids_T[:13]])[0], wanted_TV[12], f"{name} prefill")
    for t in range(13, len(ids_T)):
        assert_close(engine.decode(ids_T[t : t + 1])[0], wanted_TV[t], f"{name} token {t}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [slow_unless(name == "qwen35moe", name) for name in ("qwen3moe", "qwen35moe", "mixtral")],
)
def test_batch_of_different_lengths(loaded, name):
    """Padding changes nothing: each sequence of a batch is what it is alone.

    Two are the golden's beginning, so that they are also right; one of them pauses.
    """
    ids_T, wanted_TV = golden(name)
    prompts = [ids_T[:21], ids_T[:5], ids_T[30:41]]
    engine = engine_for(loaded[name], loaded[name].config.n_experts // 2, chunk_tokens=24)
    alone = engine_for(loaded[name])
    wanted_BTV = [wanted_TV, wanted_TV, np.asarray(alone.score(ids_T[None, 30:])[0])]
    lengths_B = np.array([len(prompt) for prompt in prompts])

    engine.start(len(prompts), 30)
    logits_BV = engine.prefill(prompts)
    active_B = np.array([True, True, True])
    for step in range(6):
        for row in np.flatnonzero(active_B):
            wanted_V = wanted_BTV[row][lengths_B[row] - 1]
            assert_close(logits_BV[row], wanted_V, f"{name} row {row} step {step}")
        active_B[1] = step not in (2, 3)
        ids_B = np.array([ids_T[lengths_B[0]], ids_T[lengths_B[1]], ids_T[30 + lengths_B[2]]])
        logits_BV = engine.decode(ids_B, active_B)
        lengths_B = lengths_B + active_B


def run_script(name: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / name, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def logits_script():
    """The script's functions; run once, as absl refuses flags that are defined twice."""
    return runpy.run_path(str(REPOSITORY / "scripts" / "logits.py"), run_name="logits")


@pytest.mark.slow
def test_logits_script(paths, tmp_path):
    name = "mixtral"
    ids_T, wanted_TV = golden(name)
    np.save(tmp_path / "ids.npy", ids_T)
    files = (f"--tokens={tmp_path / 'ids.npy'}", f"--out={tmp_path / 'logits.npy'}")
    files = (*files, "--implementation=xla")
    # The budget that the message names must be enough.
    small = run_script("logits.py", f"--model={paths[name]}", *files, "--budget_mib=0.01")
    assert (small.returncode, small.stdout) == (2, "") and small.stderr.count("\n") == 1
    budget = re.fullmatch(r"error: .*\(--budget_mib=([\d.]+)\)\n", small.stderr)[1]
    assert not (tmp_path / "logits.npy").exists()
    done = run_script("logits.py", f"--model={paths[name]}", *files, f"--budget_mib={budget}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    logits_TV = np.load(tmp_path / "logits.npy")
    assert logits_TV.dtype == np.float32 and logits_TV.shape == wanted_TV.shape
    assert_close(logits_TV, wanted_TV, "logits.py")
    assert {path.name for path in tmp_path.iterdir()} == {"ids.npy", "logits.npy"}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(3, np.int64), r"holds int64 \(3,\); want one array, int32 \[T\]"),
        (np.zeros((1, 3), np.int32), r"holds int32 \(1, 3\)"),
        (np.zeros(0, np.int32), "holds 0 tokens; want 1 to the model's context of 64"),
        (np.zeros(65, np.int32), "holds 65 tokens"),
        (np.array([0, -1], np.int32), "holds ids from -1 to 0; want 0 to 257"),
        (np.array([258], np.int32), "holds ids from 258 to 258"),
        (None, r"is no \.npy file"),
    ],
)
def test_refused_tokens(loaded, logits_script, tmp_path, ids, message):
    path = tmp_path / "ids.npy"
    path.write_bytes(b"") if ids is None else np.save(path, ids)
    with pytest.raises(ValueError, match=rf"--tokens: .*{message}"):
        logits_script["read_tokens"](path, loaded["mixtral"].config)


def test_generate_script(paths, loaded):
    """Streams exactly what the engine generates, and reports the pool."""
    model = loaded["olmoe"]
    tokenizer = model.tokenizer()
    engine = engine_for(model)
    steps = list(engine.generate([tokenizer.encode("hello")], 12, stop_ids=[tokenizer.eos_id]))
    text = "".join(tokenizer.decode_stream(int(ids_B[0]) for ids_B, _ in steps))
    args = ("--prompt=hello", "--max_new_tokens=12", "--budget_mib=3", "--implementation=xla")
    done = run_script("generate.py", f"--model={paths['olmoe']}", *args)
    assert (done.returncode, done.stdout) == (0, text + "\n"), done.stderr
    report = dict(line.split(": ") for line in done.stderr.splitlines())
    assert 0 < float(report["hit rate"]) < 1
    assert int(report["bytes moved"]) > 0
    assert int(report["dense bytes"]) == model.dense_device_bytes
    assert int(report["pool bytes"].split()[0]) <= 3 * 2**20
