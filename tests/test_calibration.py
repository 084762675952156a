"""Calibration: sums by hand, its file, whom it refuses; and the scripts that make and use it."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
from conftest import REPOSITORY, TWO_BANKS
from tiny_models import write_model

from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.evals import quality
from hobbit_jax.evals.quality import Windows
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.importance import layer_inputs
from hobbit_jax.importance.calibration import Calibration, calibrate
from hobbit_jax.importance.scores import measure_errors
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.loading import load_model
from hobbit_jax.quantize import encode
from hobbit_jax.quantize.methods import PRIOR_TOKENS, encode_matrix, moment, rarely_seen

CONTEXT = 24


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
    return calibrate(engine, windows, "hessian", folder)


def expert_matrices(engine, layer: int, expert: int) -> list[np.ndarray]:
    """Gate, up and down by gguf-py."""
    experts = engine.store.layer(0, layer)
    return [
        gguf.quants.dequantize(tensor.raw[expert], gguf.GGMLQuantizationType[tensor.format])
        for tensor in (experts.gate, experts.up, experts.down)
    ]


def test_sums_by_hand(engine, windows, calibration):
    """Row by row in float64, from what the engine's observer sees."""
    config, seen = engine.config, []
    with engine.observed_by(OnRouting(seen.append)):
        engine.score(windows.ids_WS[:, :-1])
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
    layers, experts = range(config.n_layers), range(config.n_experts)
    for role, expected in (("ffn_up_exps", inputs), ("ffn_down_exps", hidden)):
        found = [[calibration.hessian_KK(role, n, e) for e in experts] for n in layers]
        close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(expected).max()}
        np.testing.assert_allclose(found, expected, **close)
    np.testing.assert_allclose(
        [calibration.layer_hessian_DD(n) for n in layers], inputs.sum(axis=1), rtol=1e-3, atol=1e-3
    )
    for name, expected in (("input_moments", inputs), ("hidden_moments", hidden)):
        diagonal = np.diagonal(expected, axis1=2, axis2=3)
        np.testing.assert_allclose(getattr(calibration, name), diagonal, rtol=1e-3)
    weights = np.concatenate([routed.weights_TK[routed.valid_T] for routed in seen])
    np.testing.assert_array_equal(calibration.routing.weights_TK, weights)


def test_second_moments_keep_no_inputs(engine, windows, calibration, tmp_path):
    found = calibrate(engine, windows, "second_moment", tmp_path / "c")
    for name in ("input_moments", "hidden_moments"):
        np.testing.assert_array_equal(getattr(found, name), getattr(calibration, name))
    assert found.sha256 != calibration.sha256
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["calibration.npz"]


def test_the_folder_holds_it_all(engine, calibration, folder, tmp_path):
    source = engine.model.file
    loaded = Calibration.load(folder, source)
    assert (loaded.sha256, loaded.tokens) == (calibration.sha256, calibration.tokens)
    for name in ("input_moments", "hidden_moments", "selections_LE"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(calibration, name))
    np.testing.assert_array_equal(loaded.routing.weights_TK, calibration.routing.weights_TK)
    where = ("ffn_down_exps", 1, 2)
    np.testing.assert_array_equal(loaded.hessian_KK(*where), calibration.hessian_KK(*where))
    write_model(replace(TWO_BANKS, seed=9), tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"was made for another model .*; make one"):
        Calibration.load(folder, open_gguf(tmp_path / "other.gguf"))
    with pytest.raises(FileNotFoundError, match=r"scripts/calibrate\.py"):
        Calibration.load(tmp_path / "none", source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no calibration"):
        Calibration.load(tmp_path / "empty", source)
    shutil.copytree(folder, tmp_path / "cut")
    next((tmp_path / "cut").rglob("*.routing.npz")).unlink()
    with pytest.raises(ValueError, match="does not hold the 72 tokens"):
        Calibration.load(tmp_path / "cut", source).hessian_KK(*where)


def test_an_interrupted_calibration_goes_on(engine, windows, calibration, tmp_path, monkeypatch):
    """Neither a finished batch nor a finished layer is computed again; the sums are the same."""
    monkeypatch.setattr(quality, "_LOGIT_BYTES", 0)  # a batch is one window
    path, scored = tmp_path / "c", []
    score, moments = engine.score, layer_inputs._second_moments

    def scoring(ids_BT):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(ids_BT)
        return score(ids_BT)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "score", scoring)
        with pytest.raises(KeyboardInterrupt):
            calibrate(engine, windows, "hessian", path)
    with pytest.raises(ValueError, match="holds no calibration"):
        Calibration.load(path, engine.model.file)
    scored[:], calls = [], []

    def summing(*rows):
        if len(calls) == TWO_BANKS.n_experts + 1:
            raise KeyboardInterrupt
        calls.append(rows)
        return moments(*rows)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "score", lambda ids_BT: scored.append(ids_BT) or score(ids_BT))
        patch.setattr(layer_inputs, "_second_moments", summing)
        with pytest.raises(KeyboardInterrupt):
            calibrate(engine, windows, "hessian", path)
        assert len(scored) == 1
        calls[:] = []
        patch.setattr(layer_inputs, "_second_moments", lambda *r: calls.append(r) or moments(*r))
        found = calibrate(engine, windows, "hessian", path)
    assert (len(scored), len(calls)) == (1, (engine.config.n_layers - 1) * TWO_BANKS.n_experts)
    np.testing.assert_array_equal(found.selections_LE, calibration.selections_LE)
    np.testing.assert_allclose(found.hidden_moments, calibration.hidden_moments, rtol=1e-4)
    other = Windows(windows.ids_WS[::-1], windows.target_bytes_WT)
    again = calibrate(engine, other, "hessian", path)
    assert again.text_sha256 != found.text_sha256 and len(list(path.glob("inputs-*"))) == 1


def test_refusals(engine, windows, calibration, tmp_path, monkeypatch):
    nothing = Windows(windows.ids_WS[:0], windows.target_bytes_WT[:0])
    with pytest.raises(ValueError, match="at least one window"):
        calibrate(engine, nothing, "hessian", tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        patch.setattr(engine, "score", None)
        with pytest.raises(OSError, match=r"wants \d{6} bytes, and 1000 are free"):
            calibrate(engine, windows, "hessian", tmp_path / "full")
    with pytest.raises(ValueError, match="statistics is 'all'"):
        calibrate(engine, windows, "all", tmp_path)
    weights_NK = np.ones((2, 256), np.float32)
    where = ("ffn_up_exps", 0, 0)
    with pytest.raises(ValueError, match="method gptq needs a calibration"):
        encode_matrix(weights_NK, "Q2_K", "gptq", None, *where)
    diagonals = replace(calibration, inputs=None)
    with pytest.raises(ValueError, match=r"no inputs to make Hessians of; .*--statistics=hessian"):
        encode_matrix(weights_NK, "Q2_K", "gptq", diagonals, *where)
    counts = replace(diagonals, input_moments=None)
    with pytest.raises(ValueError, match=r"routing counts alone; .*--statistics=second_moment"):
        encode_matrix(weights_NK, "Q2_K", "importance", counts, *where)
    foreign = replace(calibration, model_sha256="0" * 64)
    spec = LowPrecisionSpec("Q2_K", "gptq", foreign)
    with pytest.raises(ValueError, match="made for another model"):
        open_low_precision(engine.model.file, engine.config, spec, tmp_path)


class Unmet:
    """A calibration whose expert 2 of layer 1 was never chosen."""

    def __init__(self, calibration):
        self.calibration = calibration
        self.input_moments = calibration.input_moments.copy()
        self.hidden_moments = calibration.hidden_moments.copy()
        self.selections_LE = calibration.selections_LE.copy()
        for array in (self.input_moments, self.hidden_moments, self.selections_LE):
            array[1, 2] = 0

    def hessian_KK(self, role, layer, expert):
        found = self.calibration.hessian_KK(role, layer, expert)
        return found * 0 if (layer, expert) == (1, 2) else found

    def layer_hessian_DD(self, layer):
        experts = range(len(self.selections_LE[layer]))
        return sum(self.hessian_KK("ffn_up_exps", layer, expert) for expert in experts)


def test_an_expert_never_met_falls_back(calibration):
    """To its layer's average input, and to equal weights where there is none."""
    unmet = Unmet(calibration)
    found = moment(unmet, "ffn_gate_exps", 1, 2, full=True)
    average = unmet.layer_hessian_DD(1).astype(np.float64) / unmet.selections_LE[1].sum()
    np.testing.assert_allclose(found, PRIOR_TOKENS * average, rtol=1e-12)
    down = moment(unmet, "ffn_down_exps", 1, 2, full=True)
    np.testing.assert_allclose(down, down[0, 0] * np.eye(len(down)), rtol=1e-6)
    assert down[0, 0] > 0
    weights_NK = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    plain = encode(weights_NK, "Q3_K")
    fallen = encode_matrix(weights_NK, "Q3_K", "importance", unmet, "ffn_down_exps", 1, 2)
    np.testing.assert_array_equal(fallen, plain)
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
        open_low_precision(file, config, spec, tmp_path)
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

    error_N, energy = np.zeros(3), 0.0
    chosen_TK = (routed.ids_TK == expert) & routed.valid_T[:, None]
    for t, k in zip(*np.nonzero(chosen_TK), strict=True):
        x, weight = np.asarray(routed.h_TD[t], np.float64), float(routed.weights_TK[t, k])
        native = output(stored(0), x) * weight
        energy += (native**2).sum()
        error_N += [((output(stored(n), x) * weight - native) ** 2).sum() for n in range(3)]
    np.testing.assert_allclose(found.error_NLE[:, 1, expert], error_N, rtol=1e-3)
    assert found.energy_LE[1, expert] == pytest.approx(energy, rel=1e-3)
    assert found.error_NLE[2].sum() < 0.8 * found.error_NLE[1].sum()


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
