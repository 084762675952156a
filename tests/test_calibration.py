"""Calibration: sums by hand, its file, whom it refuses; and the scripts that make and use it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import REPOSITORY, TWO_BANKS
from tiny_models import write_model

from hobbit_jax.evals.quality import Windows
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.experts.tiers import TierSpec, open_tier
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.quantize import encode
from hobbit_jax.quantize.methods import PRIOR_TOKENS, encode_matrix, moment
from hobbit_jax.signals.calibration import Calibration, calibrate
from hobbit_jax.signals.importance import measure_errors

CONTEXT = 24


@pytest.fixture(scope="module")
def engine(two_banks_path):
    model = load_model(two_banks_path)
    return Engine(model, HostExperts(model.config, model.file))


@pytest.fixture(scope="module")
def windows(engine):
    shape = (3, CONTEXT + 1)
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, shape, np.int32)
    return Windows(ids, np.ones((3, CONTEXT), np.int64))


@pytest.fixture(scope="module")
def calibration(engine, windows):
    return calibrate(engine, windows, "hessian")


def expert_matrices(engine, layer: int, expert: int) -> list[np.ndarray]:
    """Gate, up and down by gguf-py."""
    experts = engine.store.layer(0, layer)
    return [
        gguf.quants.dequantize(tensor.raw[expert], gguf.GGMLQuantizationType[tensor.format])
        for tensor in (experts.gate, experts.up, experts.down)
    ]


def test_sums_by_hand(engine, windows, calibration):
    """Row by row in float64, from what the engine's watcher sees."""
    config, seen = engine.config, []
    engine.watchers.append(seen.append)
    engine.score(windows.ids_WS[:, :-1])
    engine.watchers.clear()
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
    np.testing.assert_allclose(calibration.input_moments, inputs, rtol=1e-4, atol=1e-4)
    scale = np.abs(hidden).max()
    np.testing.assert_allclose(calibration.hidden_moments, hidden, rtol=1e-3, atol=1e-5 * scale)
    weights = np.concatenate([routed.weights_TK[routed.valid_T] for routed in seen])
    np.testing.assert_array_equal(calibration.routing.weights_TK, weights)


def test_second_moments_are_the_diagonals(engine, windows, calibration):
    found = calibrate(engine, windows, "second_moment")
    for name in ("input_moments", "hidden_moments"):
        diagonal = np.diagonal(getattr(calibration, name), axis1=2, axis2=3)
        np.testing.assert_allclose(getattr(found, name), diagonal, rtol=1e-5)
    assert found.sha256 != calibration.sha256


def test_file_holds_it_all(calibration, tmp_path):
    path, other = tmp_path / "c", "0" * 64
    calibration.save(path)
    calibration.save(path)  # again, over itself
    loaded = Calibration.load(path, calibration.model_sha256)
    assert (loaded.sha256, loaded.tokens) == (calibration.sha256, calibration.tokens)
    for name in ("input_moments", "hidden_moments", "selections_LE"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(calibration, name))
    np.testing.assert_array_equal(loaded.routing.weights_TK, calibration.routing.weights_TK)
    with pytest.raises(ValueError, match=r"was made for another model .*; make one"):
        Calibration.load(path, other)
    with pytest.raises(FileNotFoundError, match=r"scripts/calibrate\.py"):
        Calibration.load(tmp_path / "none", other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no calibration"):
        Calibration.load(tmp_path / "empty", other)


def test_refusals(engine, windows, calibration, tmp_path):
    nothing = Windows(windows.ids_WS[:0], windows.target_bytes_WT[:0])
    with pytest.raises(ValueError, match="at least one window"):
        calibrate(engine, nothing, "hessian")
    with pytest.raises(ValueError, match=r"more than the limit of 0\.0 GiB; take second_moment"):
        calibrate(engine, windows, "hessian", limit_bytes=1000)
    with pytest.raises(ValueError, match="statistics is 'all'"):
        calibrate(engine, windows, "all")
    weights_NK = np.ones((2, 256), np.float32)
    where = ("ffn_up_exps", 0, 0)
    with pytest.raises(ValueError, match="method gptq needs a calibration"):
        encode_matrix(weights_NK, "Q2_K", "gptq", None, *where)
    diagonals = calibrate(engine, windows, "second_moment")
    with pytest.raises(ValueError, match="no hessian statistics"):
        encode_matrix(weights_NK, "Q2_K", "gptq", diagonals, *where)
    foreign = replace(calibration, model_sha256="0" * 64)
    spec = TierSpec("Q2_K", "gptq", foreign)
    with pytest.raises(ValueError, match="made for another model"):
        open_tier(engine.model.file, engine.config, spec, tmp_path)


def test_an_expert_never_met_falls_back(calibration):
    """To its layer's average input, and to equal weights where there is none."""
    moments = calibration.input_moments.copy()
    selections_LE = calibration.selections_LE.copy()
    moments[1, 2], selections_LE[1, 2] = 0, 0
    hidden = calibration.hidden_moments.copy()
    hidden[1, 2] = 0
    unmet = replace(
        calibration,
        input_moments=moments,
        hidden_moments=hidden,
        routing=replace(calibration.routing, selections_LE=selections_LE),
    )
    found = moment(unmet, "ffn_gate_exps", 1, 2, full=True)
    average = moments[1].sum(axis=0, dtype=np.float64) / selections_LE[1].sum()
    np.testing.assert_allclose(found, PRIOR_TOKENS * average, rtol=1e-12)
    down = moment(unmet, "ffn_down_exps", 1, 2, full=True)
    np.testing.assert_allclose(down, down[0, 0] * np.eye(len(down)), rtol=1e-6)
    assert down[0, 0] > 0
    weights_NK = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    plain = encode(weights_NK, "Q3_K")
    fallen = encode_matrix(weights_NK, "Q3_K", "importance", unmet, "ffn_down_exps", 1, 2)
    np.testing.assert_array_equal(fallen, plain)


@pytest.mark.slow
def test_measured_errors_are_those_of_the_outputs(engine, windows, calibration, tmp_path):
    """By NumPy on gguf-py's weights; and calibrated tiers lose less than plain ones."""
    file, config = engine.model.file, engine.config
    lows = [
        open_tier(file, config, spec, tmp_path)
        for spec in (TierSpec("Q2_K"), TierSpec("Q2_K", "gptq", calibration))
    ]
    store = HostExperts(config, file, lows)
    found = measure_errors(engine, store, windows)
    seen = []
    engine.watchers.append(seen.append)
    engine.score(windows.ids_WS[:, :-1])
    engine.watchers.clear()
    routed, expert = seen[1], int(seen[1].ids_TK[0, 0])

    def output(matrices, x):
        gate, up, down = (matrix.astype(np.float64) for matrix in matrices)
        gated = gate @ x
        return down @ (gated / (1 + np.exp(-gated)) * (up @ x))

    def stored(tier):
        experts = store.layer(tier, 1)
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


def test_scripts(two_banks_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago - never mind how long precisely. " * 20)
    model, out = f"--model={two_banks_path}", tmp_path / "c"
    sizes = ("--windows=4", f"--context={CONTEXT}")
    made = script("calibrate.py", model, f"--text={text}", f"--out={out}", *sizes)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(f"{4 * CONTEXT} tokens; ")
    low = tmp_path / "low.gguf"
    quantize = ("quantize.py", model, "--format=Q2_K", "--method=gptq", f"--calibration={out}")
    made = script(*quantize, f"--out={low}")
    assert made.returncode == 0, made.stderr
    source, file = open_gguf(two_banks_path), open_gguf(low)
    assert file.metadata["hobbit.tier.method"] == "gptq"
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
            script("quantize.py", model, "--format=Q2_K", "--method=gptq", f"--out={low}x"),
            "method gptq needs a calibration",
        ),
        (
            script("calibrate.py", model, f"--text={text}", f"--out={out}", "--windows=999"),
            "999 were asked for",
        ),
    ]  # fmt: skip
    for done, message in refused:
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not Path(f"{low}x").exists()
