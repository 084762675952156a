"""What a sweep is refused for before anything runs, and what a dry run says of it."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

from hobbit_jax import resources
from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.miss_modes import miss_mode
from hobbit_jax.cache.pool_sizing import least_bytes, pool_slots
from hobbit_jax.experts.low_precision import (
    LowPrecisionSpec,
    open_low_precision,
    planned_low_precision,
)
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.registry import read_config
from hobbit_jax.record import (
    CacheTrial,
    EvalSizes,
    Inputs,
    MissModeTrial,
    Mixed,
    Native,
    QualityTrial,
    Uniform,
)
from hobbit_jax.sweep import preflight as preflight_module
from hobbit_jax.sweep.preflight import all_low_mib, preflight
from hobbit_jax.sweep.trial import Trial

SIZES = EvalSizes(
    windows=2, context=32, calibration_windows=2, decode_prompt_tokens=4, decode_tokens=4,
    decode_repeats=1, decoded_windows=1,
)  # fmt: skip


@pytest.fixture
def inputs(two_banks_path) -> Inputs:
    return Inputs(str(two_banks_path), "", "")


@pytest.fixture
def cell(inputs):
    def make(
        score="native", fraction=0.0, low="", budget_mib=2.0, method="ggml", mode="fetch",
        sizes=SIZES, on=inputs,
    ) -> Trial:  # fmt: skip
        plan = {
            "native": lambda: Native(),
            "uniform": lambda: Uniform(low, method),
            "residency": lambda: MissModeTrial(mode, 0.0, low, method),
        }.get(score, lambda: Mixed(score, fraction, low, method))()
        return Trial(CacheTrial(plan, budget_mib, on, sizes, 0.1, 0))

    return make


CONFIG = {
    "model": "",
    "cache": {"budget_mib": [0.2, 2.0]},
    "precision": {"low_format": ["Q2_K", "Q9_K"], "method": "gptq", "low_fraction": [0.5, 0.5]},
    "eval": {"windows": 2, "context": 32, "calibration_windows": 2, "decode_repeats": 1},
}


def test_all_problems_are_said_at_once_with_their_fields(cell, tmp_path):
    long = replace(SIZES, windows=10**6)
    cells = [
        cell(),
        cell(budget_mib=0.2),
        cell("uniform", 1.0, "Q9_K"),
        cell("uniform", 1.0, "Q4_0", method="gptq"),
        Trial(QualityTrial(Uniform("Q2_K", through=("IQ2_XXS",)), cell().asked.inputs, SIZES)),
        cell(sizes=long),
        cell(sizes=replace(SIZES, context=65)),
    ]
    config = {**CONFIG, "eval": {**CONFIG["eval"], "windows": 10**6, "context": 65}}
    found = preflight(cells, config, tmp_path)
    for message in (
        "config.cache.budget_mib=0.2: the experts that one token needs of a layer take a pool of ",
        "config.precision.low_format=Q9_K: weight type Q9_K is not supported",
        "no Hessian-based encoder for 'Q4_0'; the formats with one are Q2_K",
        "ggml encodes IQ2_XXS only under an importance",
        "config.eval.windows=1000000: the text has ",
        "config.eval.context=65: 65 tokens; the model has 64",
    ):
        assert sum(message in problem for problem in found.problems) == 1, (message, found)
    assert len(found.problems) == 6
    with pytest.raises(ValueError, match=r"^6 problems, and nothing was run: \(1\) .*\(6\) ") as e:
        found.refuse()
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_equal_cells_are_named_with_the_field_that_repeats(cell, tmp_path):
    low = cell("frequency", 0.5, "Q2_K")
    found = preflight([cell(), low, low], CONFIG, tmp_path)
    (problem,) = found.problems
    assert problem.startswith(f"trial 3 is trial 2 again ({low.name}), since ")
    assert "config.precision.low_fraction has 0.5 twice" in problem


@pytest.mark.parametrize(
    ("score", "fraction", "mode"),
    [
        ("uniform", 1.0, "fetch"),
        ("frequency", 0.5, "fetch"),
        ("router_weight", 0.25, "fetch"),
        ("residency", 0.0, "floor"),
        ("residency", 0.0, "fetch_low"),
    ],
)
def test_the_smallest_pool_is_what_an_engine_takes(cell, tmp_path, score, fraction, mode):
    """At the budget that preflight asks for there are slots, and a byte below there are none."""
    asked = cell(score, fraction, "Q2_K", 0.2, mode=mode)
    found = preflight_module.Preflight({})
    check = preflight_module._Check(open_gguf(asked.inputs.model), [asked], tmp_path, found)
    least = check.least_pool_bytes(asked.asked.plan)
    source = open_gguf(asked.inputs.model)
    config = read_config(source)
    made = open_low_precision(source, config, LowPrecisionSpec("Q2_K"), tmp_path)
    planned = planned_low_precision(source, config, "Q2_K")
    assert {n: t.nbytes for n, t in made.tensors.items()} == {
        n: t.nbytes for n, t in planned.tensors.items()
    }
    store = HostExperts(config, source, [made])
    plan = uniform_plan(store, 1 if score == "uniform" else 0)
    if score not in ("uniform", "residency"):
        plan.precision_LE[:, : round(fraction * config.n_experts)] = 1
    wanted = plan.shares_pLE(store.shape_pLE), miss_mode(mode), BankLayout.of_store(store)
    assert least_bytes(*wanted) == least
    pool_slots(*wanted, least, 0.5)
    with pytest.raises(ValueError, match="needs at least"):
        pool_slots(*wanted, least - 1, 0.5)


def test_memory_and_disk_are_held_against_what_is_free(cell, tmp_path, monkeypatch):
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path / "cache"))
    gptq = cell("uniform", 1.0, "Q2_K", method="gptq")
    found = preflight([gptq], CONFIG, tmp_path)
    assert found.problems == [] and found.host_bytes == 6 * 8 * 256**2
    assert set(found.disk) == {tmp_path / "cache" / "low_precision", tmp_path / "cache"}
    monkeypatch.setattr(preflight_module, "host_bytes", lambda: 1000)
    monkeypatch.setattr(preflight_module, "workers_device_bytes", lambda: 2000)
    monkeypatch.setattr(preflight_module, "free_disk_bytes", lambda path: 3000)
    encoder, device, disk = sorted(preflight([gptq], CONFIG, tmp_path).problems, key=len)
    if "does not fit the device" in encoder:
        encoder, device = device, encoder
    assert encoder.startswith("config.precision.method=gptq: a Hessian of 256 columns takes 3.0 M")
    assert device.startswith("config.cache.budget_mib=2.0: a pool of 2.0 MiB beside the rest")
    assert f"has 3000 bytes (0.0 MiB) free and the sweep wants {sum(found.disk.values())} " in disk

    # On a cluster this machine's memory says nothing.
    (elsewhere,) = preflight([gptq], CONFIG, tmp_path, here=False).problems
    assert elsewhere == disk

    source = open_gguf(gptq.inputs.model)
    open_low_precision(
        source, read_config(source), LowPrecisionSpec("Q2_K"), tmp_path / "cache" / "low_precision"
    )
    plain = cell("uniform", 1.0, "Q2_K")
    assert tmp_path / "cache" / "low_precision" not in preflight([plain], CONFIG, tmp_path).disk


def test_a_model_that_does_not_open_is_one_problem(cell, tmp_path):
    gone = Inputs(str(tmp_path / "none.gguf"), "", "")
    cells = [cell(budget_mib=float(mib), on=gone) for mib in (1, 2)]
    (problem,) = preflight(cells, {"model": gone.model}, tmp_path).problems
    assert problem.startswith(f"config.model={gone.model}: ") and "no such file" in problem


def test_texts_that_cannot_be_read_are_all_named(cell, inputs, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    bad = replace(inputs, calibration_text="none.txt", evaluation_text=str(binary))
    config = {"calibration_text": "none.txt", "evaluation_text": str(binary)}
    evaluated, calibrated = preflight([cell(on=bad)], config, tmp_path).problems
    assert evaluated.startswith(f"config.evaluation_text={binary}: {binary} is no UTF-8 text")
    assert calibrated.startswith("config.calibration_text=none.txt: none.txt cannot be read (No su")


def test_cells_that_share_a_file_count_it_once(cell, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path))
    more = replace(SIZES, task_problems=1)  # another group of cells, on the same texts
    one = preflight([cell("uniform", 1.0, "Q2_K")], CONFIG, tmp_path)
    low = [
        cell("uniform", 1.0, "Q2_K", mib, sizes=size)
        for mib in (2.0, 3.0)
        for size in (SIZES, more)
    ]
    found = preflight([*low, cell("frequency", 0.5, "Q2_K")], CONFIG, tmp_path)
    assert found.disk == one.disk and sum(found.disk.values()) > 0
    assert found.to_encode == {(inputs.model, "Q2_K", "ggml"): 1}
    other = cell("uniform", 1.0, "Q2_K", method="gptq")
    assert len(preflight([*low, other], CONFIG, tmp_path).to_encode) == 2


def test_benchmarks_want_lm_eval_and_data(cell, tmp_path, monkeypatch):
    asked = cell(sizes=replace(SIZES, benchmarks=("gsm8k",)))
    monkeypatch.setenv("HOBBIT_DATA_DIR", str(tmp_path / "none"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    config = {"eval": {"benchmarks": ["gsm8k"]}}
    missing, no_data = preflight([asked], config, tmp_path).problems
    assert missing.startswith("config.eval.benchmarks=gsm8k: lm-eval is not installed")
    assert no_data.startswith(f"$HOBBIT_DATA_DIR is {tmp_path / 'none'}")


def test_floor_runs_where_all_low_experts_fit():
    """As a number written by hand said before: the reference model's 128 take 3.94 MiB at Q2_K."""
    assert all_low_mib("", "Q2_K") == pytest.approx(3.94, abs=0.005)


def test_calibration_of_a_model_that_does_not_fit_takes_half_of_the_memory(monkeypatch):
    monkeypatch.setattr(resources, "device_bytes", lambda: 1000)
    assert resources.roomy_pool_bytes(500) is None
    assert resources.roomy_pool_bytes(501) == 500


def sweep(*args: str, home: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"), *args]
    env = {k: v for k, v in os.environ.items() if k != "HOBBIT_CACHE_DIR"} | {"HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


@pytest.mark.slow
def test_dry_run(two_banks_path, tmp_path):
    """It says what a sweep would take and makes nothing; the default folder is in the home."""
    small = ("windows=2", "context=32", "calibration_windows=2", "task_problems=0",
             "decode_prompt_tokens=4", "decode_tokens=4", "decode_repeats=1")  # fmt: skip
    args = (
        f"--config={REPOSITORY}/configs/reference.py:demo", f"--config.model={two_banks_path}",
        *(f"--config.eval.{field}" for field in small), f"--workdir={tmp_path / 'w'}", "--dry_run",
    )  # fmt: skip
    done = sweep(*args, home=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("to run    ") for line in lines) == 14
    assert "trials  14, of which 0 are finished" in lines
    assert any(f" in {tmp_path}/.cache/hobbit_jax/low_precision of " in line for line in lines)
    hours = next(line for line in lines if line.startswith("hours "))
    assert 0 < float(hours.split()[1]) < 3
    assert list(tmp_path.rglob("*")) == [tmp_path / "w"]

    done = sweep(*args, "--config.precision.low_format=Q9_K", "--config.cache.budget_mib=0.1",
                 f"--cache_dir={tmp_path / 'c'}", home=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: 2 problems, and nothing was run: ")
    assert "config.precision.low_format=Q9_K" in errors[0]
    assert "config.cache.budget_mib=0.1" in errors[0]
