"""Calibration: sums by hand, its file, whom it refuses; and the scripts that make and use it."""

import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import gguf
import numpy as np
import pytest
from conftest import REPOSITORY, TWO_BANKS
from tiny_models import write_model

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.evals.quality import Windows
from hobbit_jax.experts import low_precision
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.importance import layer_inputs
from hobbit_jax.importance.calibration import Calibration, calibrate
from hobbit_jax.importance.layer_inputs import run_by, visit_layers
from hobbit_jax.importance.scores import measure_errors
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.loading import load_model
from hobbit_jax.quantize import ggml
from hobbit_jax.quantize.methods import (
    PRIOR_TOKENS,
    encode_matrix,
    importance_K,
    prior_hessian_KK,
    rarely_seen,
)

CONTEXT = 24
DOWN = "ffn_down_exps"


@pytest.fixture(scope="module")
def engine(two_banks_path):
    model = load_model(two_banks_path, "xla")
    return Engine(model, HostExperts(model.config, model.file))


@pytest.fixture(scope="module")
def windows(engine):
    shape = (3, CONTEXT + 1)
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, shape, np.int32)
    return Windows(ids, np.ones((3, CONTEXT), np.int64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration") / "c"


@pytest.fixture(scope="module")
def calibration(engine, windows, folder):
    return calibrate(engine.model, windows, "second_moment", folder)


@pytest.fixture(scope="module")
def layers(engine, windows):
    """What each layer's experts see, by native weights."""
    seen = []
    visit_layers(engine.model, windows, seen.append)
    return seen


def expert_matrices(engine, layer: int, expert: int) -> list[np.ndarray]:
    """Gate, up and down by gguf-py."""
    experts = engine.store.layer(0, layer)
    return [
        gguf.quants.dequantize(tensor.raw[expert], gguf.GGMLQuantizationType[tensor.format])
        for tensor in (experts.gate, experts.up, experts.down)
    ]


def test_sums_by_hand(engine, windows, calibration, layers):
    """Row by row in float64, from what the engine's observer sees."""
    config, seen = engine.config, []
    at_once = Engine(engine.model, engine.store, CacheConfig(chunk_tokens=windows.targets))
    with at_once.observed_by(OnRouting(seen.append)):
        at_once.score(windows.ids_WS[:, :-1])
    selections_LE = np.zeros((config.n_layers, config.n_experts))
    inputs = np.zeros((config.n_layers, config.n_experts, config.d_model, config.d_model))
    hidden = np.zeros((config.n_layers, config.n_experts, config.d_expert, config.d_expert))
    for routed in seen:
        h_TD = np.asarray(routed.h_TD, np.float64)
        chosen_TK = np.broadcast_to(routed.valid_T[:, None], routed.ids_TK.shape)
        for t, k in zip(*np.nonzero(chosen_TK), strict=True):
            expert, weight = routed.ids_TK[t, k], float(routed.weights_TK[t, k])
            gate, up, _ = expert_matrices(engine, routed.layer, expert)
            gated = gate @ h_TD[t]
            row = gated / (1 + np.exp(-gated)) * (up @ h_TD[t])
            selections_LE[routed.layer, expert] += 1
            inputs[routed.layer, expert] += weight**2 * np.outer(h_TD[t], h_TD[t])
            hidden[routed.layer, expert] += weight**2 * np.outer(row, row)
    np.testing.assert_array_equal(calibration.selections_LE, selections_LE)
    experts = range(config.n_experts)
    for role, expected in (("ffn_up_exps", inputs), ("ffn_down_exps", hidden)):
        found = [[layer.hessian_KK(role, e) for e in experts] for layer in layers]
        close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(expected).max()}
        np.testing.assert_allclose(found, expected, **close)
    np.testing.assert_allclose(
        [layer.layer_hessian_DD() for layer in layers], inputs.sum(axis=1), rtol=1e-3, atol=1e-3
    )
    for name, expected in (("input_moments", inputs), ("hidden_moments", hidden)):
        diagonal = np.diagonal(expected, axis1=2, axis2=3)
        np.testing.assert_allclose(getattr(calibration, name), diagonal, rtol=1e-3)
    weights = np.concatenate([routed.weights_TK[routed.valid_T] for routed in seen])
    np.testing.assert_array_equal(calibration.routing.weights_TK, weights)


def test_the_folder_holds_it_all(engine, calibration, folder, tmp_path):
    source = engine.model.file
    loaded = Calibration.load(folder, source)
    assert loaded.sha256 == calibration.sha256
    np.testing.assert_array_equal(loaded.windows.ids_WS, calibration.windows.ids_WS)
    assert [path.name for path in folder.iterdir()] == ["calibration.npz"]
    for name in ("input_moments", "hidden_moments", "selections_LE"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(calibration, name))
    np.testing.assert_array_equal(loaded.routing.weights_TK, calibration.routing.weights_TK)
    write_model(replace(TWO_BANKS, seed=9), tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"was made for another model .*; make one"):
        Calibration.load(folder, open_gguf(tmp_path / "other.gguf"))
    with pytest.raises(FileNotFoundError, match=r"scripts/calibrate\.py"):
        Calibration.load(tmp_path / "none", source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no calibration"):
        Calibration.load(tmp_path / "empty", source)
    whole = (folder / "calibration.npz").read_bytes()
    (tmp_path / "empty" / "calibration.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="holds no calibration"):
        Calibration.load(tmp_path / "empty", source)


def test_an_interrupted_calibration_goes_on(engine, windows, calibration, tmp_path, monkeypatch):
    """A finished layer's moments are not computed again; the sums are the same."""
    model, path, calls = engine.model, tmp_path / "c", []
    moment = layer_inputs._second_moment_K

    def summing(*rows):
        if len(calls) == 2 * TWO_BANKS.n_experts + 1:
            raise KeyboardInterrupt
        calls.append(rows)
        return moment(*rows)

    with monkeypatch.context() as patch:
        patch.setattr(layer_inputs, "_second_moment_K", summing)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, windows, "second_moment", path)
        with pytest.raises(ValueError, match="holds no calibration"):
            Calibration.load(path, model.file)
        calls[:] = []
        patch.setattr(layer_inputs, "_second_moment_K", lambda *r: calls.append(r) or moment(*r))
        found = calibrate(model, windows, "second_moment", path)
    assert len(calls) == (engine.config.n_layers - 1) * 2 * TWO_BANKS.n_experts
    np.testing.assert_array_equal(found.selections_LE, calibration.selections_LE)
    np.testing.assert_array_equal(found.hidden_moments, calibration.hidden_moments)
    assert [path.name for path in path.iterdir()] == ["calibration.npz"]
    other = Windows(windows.ids_WS[::-1], windows.target_bytes_WT)
    assert calibrate(model, other, "second_moment", path).sha256 != found.sha256


def test_gptq_sees_what_the_layers_before_it_leave(engine, windows, calibration, tmp_path):
    """Each Hessian is that of the finished file: of its own layers before, and its gate and up."""
    source, config, seen = engine.model.file, engine.config, {}
    run_text, spec = run_by(engine.model, windows), LowPrecisionSpec("Q2_K", "gptq", calibration)

    def watched(low, visit):
        def keep(layer):
            visit(layer)
            seen[layer.layer] = [layer.hessian_KK(role, 1) for role in ("ffn_up_exps", DOWN)]

        run_text(low, keep)

    made = open_low_precision(source, config, spec, tmp_path, watched)
    found, natively = {}, {}
    for low, hessians in ((made, found), (None, natively)):
        visit_layers(
            engine.model, windows,
            lambda layer, kept=hessians: kept.update(
                {layer.layer: [layer.hessian_KK(role, 1) for role in ("ffn_up_exps", DOWN)]}
            ),
            low,
        )  # fmt: skip
    for layer in range(config.n_layers):
        for mine, wanted in zip(seen[layer], found[layer], strict=True):
            np.testing.assert_array_equal(mine, wanted)
    np.testing.assert_array_equal(seen[0][0], natively[0][0])
    for mine, native in ((seen[0][1], natively[0][1]), *zip(seen[1], natively[1], strict=True)):
        assert np.abs(mine - native).max() > 1e-2 * np.abs(native).max()


def test_drift_by_hand(engine, windows, tmp_path):
    """Row by row in float64, from what two engines' observers see of one text."""
    config = engine.config
    low = open_low_precision(engine.model.file, config, LowPrecisionSpec("Q2_K"), tmp_path)
    store = HostExperts(config, engine.model.file, (low,))
    ids_WT, streams = windows.ids_WS[:, :-1], []
    for precision in (0, 1):
        cache = CacheConfig(plan=uniform_plan(store, precision), chunk_tokens=windows.targets)
        streams.append([])
        keep = lambda routed, kept=streams[-1]: kept.append(  # noqa: E731
            replace(routed, x_TD=np.asarray(routed.x_TD, np.float64))
        )
        Engine(engine.model, store, cache, observers=[OnRouting(keep)]).score(ids_WT)
    found = []
    visit_layers(engine.model, windows, found.append, low)
    native, seen = (stream[1] for stream in streams)

    def hidden(precision, expert, x):
        experts = store.layer(precision, 1)
        gate, up = (
            gguf.quants.dequantize(t.raw[expert], gguf.GGMLQuantizationType[t.format])
            for t in (experts.gate, experts.up)
        )
        return gate @ x / (1 + np.exp(-(gate @ x))) * (up @ x)

    _, up_FD, down_DF = expert_matrices(engine, 1, 1)
    wanted = {"ffn_up_exps": np.zeros(up_FD.shape), DOWN: np.zeros(down_DF.shape)}
    for t, k in np.argwhere((seen.ids_TK == 1) & seen.valid_T[:, None]):
        x, aim = (np.asarray(one.h_TD[t], np.float64) for one in (seen, native))
        weight = float(seen.weights_TK[t, k])
        wanted["ffn_up_exps"] += weight**2 * np.outer(up_FD @ (aim - x), x)
        a = hidden(1, 1, x)
        lag = (native.x_TD[t] - seen.x_TD[t]) * weight / (seen.weights_TK[t] ** 2).sum()
        wanted[DOWN] += weight**2 * np.outer(down_DF @ (hidden(0, 1, aim) - a) + lag, a)
    for role, expected, matrix in zip(wanted, wanted.values(), (up_FD, down_DF), strict=True):
        drift_NK = found[1].drift_NK(role, 1, matrix)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(drift_NK, expected, atol=1e-3 * np.abs(expected).max())


def test_interrupted_gptq_goes_on(engine, windows, calibration, tmp_path, monkeypatch):
    """No finished tensor is encoded again, and the file is the same bytes."""
    source, config, calls = engine.model.file, engine.config, []
    run_text, spec = run_by(engine.model, windows), LowPrecisionSpec("Q2_K", "gptq", calibration)

    def encoding(*arguments):
        if len(calls) == 2 * TWO_BANKS.n_experts + 1:
            raise KeyboardInterrupt
        calls.append(arguments[4:])
        return encode_matrix(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(low_precision, "encode_matrix", encoding)
        threads = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            open_low_precision(source, config, spec, tmp_path / "a", run_text)
        assert threading.active_count() == threads
        calls[:] = []
        patch.setattr(
            low_precision, "encode_matrix", lambda *a: calls.append(a[4:]) or encode_matrix(*a)
        )
        resumed = open_low_precision(source, config, spec, tmp_path / "a", run_text)
    assert len(calls) == (3 * config.n_layers - 2) * config.n_experts
    straight = open_low_precision(source, config, spec, tmp_path / "b", run_text)
    assert resumed.paths[0].read_bytes() == straight.paths[0].read_bytes()


def test_refusals(engine, windows, calibration, layers, tmp_path, monkeypatch):
    model = engine.model
    nothing = Windows(windows.ids_WS[:0], windows.target_bytes_WT[:0])
    with pytest.raises(ValueError, match="at least one window"):
        calibrate(model, nothing, "second_moment", tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OSError, match=r"wants 98304 bytes, and 1000 are free"):
            calibrate(model, windows, "second_moment", tmp_path / "full")
        patch.setattr(layer_inputs, "device_bytes", lambda: 1000)
        with pytest.raises(ValueError, match=r"keys and values of 72 tokens take .* fewer tokens"):
            visit_layers(model, windows, print)
    with pytest.raises(ValueError, match="statistics is 'all'"):
        calibrate(model, windows, "all", tmp_path)
    weights_NK = np.ones((2, 256), np.float32)
    with pytest.raises(ValueError, match="method gptq needs a calibration"):
        encode_matrix(weights_NK, "Q2_K", "gptq", None, "ffn_up_exps", 0)
    with pytest.raises(ValueError, match="method gptq needs a calibration"):
        open_low_precision(model.file, engine.config, LowPrecisionSpec("Q2_K", "gptq"), tmp_path)
    counts = calibration.only("routing")
    assert counts.statistics == "routing" and counts.sha256 != calibration.sha256
    with pytest.raises(ValueError, match=r"no moments for layer 0; .*--statistics=second_moment"):
        spec = LowPrecisionSpec("Q2_K", "ggml", counts)
        open_low_precision(model.file, engine.config, spec, tmp_path)
    assert not list(tmp_path.rglob("*.parts"))
    foreign = replace(calibration, model_sha256="0" * 64)
    spec = LowPrecisionSpec("Q2_K", "gptq", foreign)
    with pytest.raises(ValueError, match="made for another model"):
        open_low_precision(engine.model.file, engine.config, spec, tmp_path)


class Unmet:
    """A layer's inputs with an expert that was never chosen."""

    def __init__(self, layer, expert: int):
        self._layer, self._expert = layer, expert
        self.selections_E = layer.selections_E.copy()
        self.selections_E[expert] = 0

    def second_moments_EK(self, role):
        moments_EK = self._layer.second_moments_EK(role).copy()
        moments_EK[self._expert] = 0
        return moments_EK

    def hessian_KK(self, role, expert):
        return self._layer.hessian_KK(role, expert) * np.float32(expert != self._expert)

    def layer_hessian_DD(self):
        return sum(self.hessian_KK("ffn_up_exps", e) for e in range(len(self.selections_E)))


def test_an_expert_never_met_falls_back(layers):
    """To its layer's average input, and to equal weights where there is none."""
    unmet = Unmet(layers[1], 2)
    found = prior_hessian_KK(unmet, "ffn_gate_exps", 2)
    average = unmet.layer_hessian_DD().astype(np.float64) / unmet.selections_E.sum()
    np.testing.assert_allclose(found, PRIOR_TOKENS * average, rtol=1e-12)
    np.testing.assert_allclose(
        importance_K(unmet, "ffn_gate_exps", 2), np.diagonal(found), rtol=1e-5
    )
    down = prior_hessian_KK(unmet, DOWN, 2)
    np.testing.assert_allclose(down, down[0, 0] * np.eye(len(down)), rtol=1e-6)
    assert down[0, 0] > 0
    weights_NK = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    alike = ggml.encode(weights_NK, "Q3_K", np.ones(256, np.float32))
    fallen = encode_matrix(weights_NK, "Q3_K", "ggml", unmet, DOWN, 2)
    np.testing.assert_array_equal(fallen, alike)
    lines = rarely_seen(np.array([[500, 200], [700, 3], [199, 0]]))
    assert lines[0].startswith("3 of 6 experts saw fewer than 200 tokens")
    assert lines[1:] == [
        "layer 1, 1 experts (expert: tokens): 1: 3",
        "layer 2, 2 experts (expert: tokens): 1: 0, 0: 199",
    ]
    assert rarely_seen(np.full((2, 3), 200)) == []


@pytest.mark.slow
def test_measured_errors_are_those_of_the_outputs(engine, windows, calibration, tmp_path):
    """By NumPy on gguf-py's weights; and calibrated precisions lose less than plain ones."""
    file, config = engine.model.file, engine.config
    lows = [
        open_low_precision(file, config, spec, tmp_path, run_by(engine.model, windows))
        for spec in (LowPrecisionSpec("Q2_K"), LowPrecisionSpec("Q2_K", "gptq", calibration))
    ]
    store = HostExperts(config, file, lows)
    found = measure_errors(engine, store, windows)
    seen = []
    with engine.observed_by(OnRouting(seen.append)):
        engine.score(windows.ids_WS[:, :-1])
    routed, expert = seen[1], int(seen[1].ids_TK[0, 0])

    def output(matrices, x):
        gate, up, down = (matrix.astype(np.float64) for matrix in matrices)
        gated = gate @ x
        return down @ (gated / (1 + np.exp(-gated)) * (up @ x))

    def stored(precision):
        experts = store.layer(precision, 1)
        return [
            gguf.quants.dequantize(tensor.raw[expert], gguf.GGMLQuantizationType[tensor.format])
            for tensor in (experts.gate, experts.up, experts.down)
        ]

    error_N = np.zeros(3)
    chosen_TK = (routed.ids_TK == expert) & routed.valid_T[:, None]
    for t, k in zip(*np.nonzero(chosen_TK), strict=True):
        x, weight = np.asarray(routed.h_TD[t], np.float64), float(routed.weights_TK[t, k])
        native = output(stored(0), x) * weight
        error_N += [((output(stored(n), x) * weight - native) ** 2).sum() for n in range(3)]
    np.testing.assert_allclose(found[:, 1, expert], error_N, rtol=1e-3)
    assert found[2].sum() < 0.8 * found[1].sum()


def script(name: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "scripts" / name), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_scripts(two_banks_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago - never mind how long precisely. " * 20)
    model, out = f"--model={two_banks_path}", tmp_path / "c"
    sizes = ("--windows=4", f"--context={CONTEXT}")
    made = script("calibrate.py", model, f"--text={text}", f"--out={out}", *sizes)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(f"{4 * CONTEXT} tokens; ")
    made = script("calibrate.py", model, f"--text={text}", f"--out={tmp_path / 'all'}")
    assert made.returncode == 0, made.stderr
    # Of the default 48 there are fewer, and a window is as long as the model's context.
    assert re.match(r"the text has \d+ windows of 64 \+ 1 tokens; all of them", made.stdout)
    low = tmp_path / "low.gguf"
    quantize = ("quantize.py", model, "--format=Q2_K", "--method=gptq", f"--calibration={out}")
    made = script(*quantize, f"--out={low}")
    assert made.returncode == 0, made.stderr
    assert f"24 of 24 experts saw fewer than {PRIOR_TOKENS} tokens" in made.stderr
    assert "layer 2, 8 experts (expert: tokens): " in made.stderr
    source, file = open_gguf(two_banks_path), open_gguf(low)
    assert file.metadata["hobbit.low_precision.method"] == "gptq"
    assert {t.format for n, t in file.tensors.items() if "_exps" in n} == {"Q2_K"}
    assert file.tensors.keys() == source.tensors.keys()

    write_model(replace(TWO_BANKS, seed=9), tmp_path / "other.gguf")
    refused = [
        (script(*quantize, f"--out={low}"), "exists; remove it"),
        (
            script("quantize.py", f"--model={tmp_path / 'other.gguf'}", *quantize[2:],
                   f"--out={tmp_path / 'x.gguf'}"),
            "was made for another model",
        ),
        (
            script("calibrate.py", model, f"--text={text}", f"--out={out}", "--windows=999"),
            "999 were asked for",
        ),
    ]  # fmt: skip
    for done, message in refused:
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
