"""Measured bandwidths: the file, what is refused, and a real measurement in small."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hobbit_jax.cache.bandwidth import Bandwidths, read_bandwidths
from hobbit_jax.cache.miss_modes import Hybrid
from hobbit_jax.engine_flags import EngineOptions, _link_to_host
from hobbit_jax.evals import bandwidth
from hobbit_jax.planner.shapes import preset_model
from pallas_kernels.formats import get_format

FOUND = Bandwidths(
    "gpu: NVIDIA GeForce RTX 4070",
    "a CPU, 8 threads",
    {"Q4_K": {"4": 30.0, "8": 40.0}, "Q2_K": {"8": 25.0}},
    {"mapped": {"65536": 5.0, "1048576": 12.0}, "pinned": {"65536": 8.0, "1048576": 24.0}},
    {"host": 0.75, "link": 0.5},
)


def test_link_and_host_are_compared_while_both_work(tmp_path: Path):
    FOUND.write(tmp_path / "b.json")
    found = read_bandwidths(tmp_path / "b.json")
    assert found == FOUND
    assert found.host("Q4_K") == 40 and found.link(900_000) == 12 and found.link(1) == 5
    assert found.link(900_000, "pinned") == 24
    assert found.link_to_host("Q4_K", 900_000) == pytest.approx(0.5 * 12 / (0.75 * 40))
    found.check_here(FOUND.device, FOUND.cpu)


def test_rates_of_another_machine_or_format_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"RTX 4070 with a CPU, 8 threads, and this is cpu: x"):
        FOUND.check_here("cpu: x", FOUND.cpu)
    with pytest.raises(ValueError, match="measure here"):
        FOUND.check_here(FOUND.device, "a CPU, 4 threads")
    with pytest.raises(
        ValueError, match=r"no bandwidth of Q3_K was measured; there are Q4_K, Q2_K"
    ):
        FOUND.host("Q3_K")
    path = tmp_path / "b.json"
    whole = json.loads((FOUND.write(path), path.read_text())[1])
    for broken in (
        "[]", "{", "{}", json.dumps({**whole, "at_once": {"host": 1.0}}),
        json.dumps({**whole, "host_gb_s": {"Q4_K": {"8": -1.0}}}),
        json.dumps({**whole, "link_gb_s": {"mapped": {"65536": "fast"}}}),
        json.dumps({**whole, "link_gb_s": {}}), json.dumps({**whole, "host_gb_s": {"Q4_K": 3}}),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"b\.json: .*GB/s|bench_bandwidth"):
            read_bandwidths(path)


@pytest.mark.parametrize("format", ["Q4_K", "MXFP4", "Q8_0"])
def test_a_bank_has_finite_weights(tmp_path: Path, format: str):
    """Or the products would be of other speed; every block's scales are near 1."""
    n_experts = bandwidth.write_bank(tmp_path / "bank", format, 1)
    raw = np.fromfile(tmp_path / "bank", np.uint8)
    layout = get_format(format)
    assert n_experts == bandwidth.EXPERTS_OF_A_STEP
    weights = bandwidth.D_MODEL * bandwidth.D_EXPERT * 3 * n_experts
    assert len(raw) == weights // layout.block_weights * layout.block_bytes
    for at, bits, mask in layout.float_fields:
        field = raw.reshape(-1, layout.block_bytes)[:, at : at + bits.itemsize].copy().view(bits)
        assert ((field & mask) != mask).all() and (field & mask).all()


@pytest.mark.skipif(jax.devices()[0].platform != "cpu", reason="the products run in this process")
def test_rates_are_bytes_over_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a clock that counts calls, and then for real, within what any machine can do."""
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    assert bandwidth._rate(lambda: 2 * 10**9, 3.5) == pytest.approx(4 * 2 / 5)
    monkeypatch.undo()
    path = tmp_path / "bank"
    n_experts = bandwidth.write_bank(path, "Q4_K", 1)
    assert 1e-3 < bandwidth.host_rate(path, "Q4_K", n_experts, 0.05) < 1e3
    for source, once in bandwidth.uploads(path, 1 << 16).items():
        assert source in ("mapped", "pinned")
        assert 1e-4 < bandwidth._rate(once, 0.02) < 1e3


def test_an_engine_takes_the_ratio_of_this_machine(tmp_path: Path):
    """Of the native format and the size of one matrix; a file of another machine is refused."""
    path, store = tmp_path / "b.json", preset_model("tiny").store()
    matrix_bytes = store.layer(0, 0).expert_bytes / 3
    rates = {"mapped": {"1024": 1.0, str(round(matrix_bytes)): 2.0}}
    mine = Bandwidths(*bandwidth.here(), {"Q4_K": {"2": 8.0}}, rates, {"host": 1.0, "link": 1.0})
    options = EngineOptions(miss_mode="hybrid", link_to_host=path)
    for found in (mine, replace(mine, cpu="another CPU")):
        found.write(path)
        if found is mine:
            assert options.mode(store) == Hybrid(link_to_host=0.25)
        else:
            with pytest.raises(ValueError, match="another CPU, and this is"):
                options.mode(store)
    assert _link_to_host("0.5") == 0.5 and _link_to_host(str(path)) == path
    with pytest.raises(ValueError, match="cannot be read"):
        _link_to_host(str(tmp_path / "absent.json"))
