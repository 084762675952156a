"""The planner: its arithmetic, its sizes against the engine's own, its replays against others.

Oracles: sums done by hand, files that the real loader and store open, an LRU written here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from tiny_models import MODELS, write_model
from trace_figures import overlap, share_of_hot_experts

from hobbit_jax.cache.bandwidth import Bandwidths
from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.cache.pool_sizing import pool_slots
from hobbit_jax.cache.promotion import DEFAULT_PROMOTION
from hobbit_jax.cache.trace import Trace
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.caches import empty_caches
from hobbit_jax.models.loading import load_model
from hobbit_jax.models.presets import PLANNED, PRESETS
from hobbit_jax.planner import candidates, published_benchmarks, routing
from hobbit_jax.planner.cost_model import (
    COMPILED,
    MEASURED,
    Machine,
    Origin,
    Traffic,
    by_engine,
    describe,
    measured,
    token_time,
)
from hobbit_jax.planner.hardware import GPUS, find_gpu
from hobbit_jax.planner.plan import Request, divide_memory, make_plan, plan_record
from hobbit_jax.planner.published_benchmarks import (
    Report,
    compare_reports,
    forecast,
    reports_record,
)
from hobbit_jax.planner.shapes import PRESET_NAMES, open_model, preset_model
from hobbit_jax.planner.traffic import (
    Setting,
    all_on_cpu,
    hot_on_device,
    layers_that_fit,
    replay_setting,
)
from hobbit_jax.record import read_records, write_record
from hobbit_jax.report import planner_tables
from hobbit_jax.report.document import render_plan
from hobbit_jax.synthetic.synthesize import synthesize

CONTEXT = 512
TINY = preset_model("tiny")
NATIVE, LOW = candidates.NATIVE, Setting("low", "fetch", "Q2_K", "low")
FLOOR = Setting("floor", "floor", "Q2_K")
MODES = [s for s in candidates.settings(0.41) if s.low_format in (None, "Q2_K")]


@pytest.fixture(scope="module")
def synthetic_routing() -> Trace:
    return routing.synthetic_routing(TINY.config)[0].trace


def shorter(trace: Trace, n_tokens: int) -> Trace:
    return replace(
        trace,
        ids_TLK=trace.ids_TLK[:n_tokens],
        weights_TLK=trace.weights_TLK[:n_tokens],
        position_T=trace.position_T[:n_tokens],
    )


def test_a_token_by_hand():
    """Each part has another time, so that no two can be mistaken for one another."""
    machine = Machine(
        device_gb_s=500, device_efficiency=0.5, pcie_gb_s=20, pcie_efficiency=0.5, host_gb_s=50,
        host_efficiency=0.5, launches_per_layer=10, launch_us=4, waits_per_layer=2, wait_us=5,
        token_us=100, selection_us=2, exit_us=300, copies_per_expert=3, copy_latency_us=10,
        handover_us=50,
    )  # fmt: skip
    traffic = Traffic(
        layers=40, dense_bytes=0.6e9, kv_bytes=0.1e9, expert_bytes=0.3e9, selections=320, exits=7,
        moved_experts=20, moved_bytes=30e6, host_bytes=75e6, host_layers=6,
    )  # fmt: skip
    time = token_time(traffic, machine)
    assert time.device == pytest.approx(4.0)  # 1 GB at 250 GB/s
    assert time.launches == pytest.approx(2.0)  # 400 of 4 us and 80 of 5
    assert time.host == pytest.approx(0.74)  # 100 us and 320 of 2 us
    assert time.exits == pytest.approx(2.1)
    assert time.link == pytest.approx(3.0 + 0.6)  # 30 MB at 10 GB/s, 60 copies
    assert time.cpu == pytest.approx(3.0 + 0.3)  # 75 MB at 25 GB/s, 6 hand-overs
    assert time.total == pytest.approx(4.0 + 2.0 + 0.74 + 2.1 + 3.6 + 3.3)
    assert time.tokens_per_second == pytest.approx(1e3 / 15.74)
    # At once, 2.1 ms of the link hide behind the CPU's 3 ms; 6.4 ms of uploads stand out by 3.4 ms.
    fewer, more = (replace(traffic, at_once=True, moved_bytes=size) for size in (15e6, 58e6))
    assert token_time(fewer, machine).total == pytest.approx(15.74 - 3.6)
    assert token_time(more, machine).link == pytest.approx(5.8 + 0.6 - 3.0)


def test_measured_bandwidths_take_the_place_of_assumed_ones():
    found = Bandwidths(
        "gpu: NVIDIA GeForce RTX 4070", "a CPU", {"Q4_K": {"4": 30.0}},
        {"mapped": {"1048576": 11.0}, "pinned": {"1048576": 22.0}}, {"host": 1.0, "link": 1.0},
    )  # fmt: skip
    gpu = GPUS["RTX 4070"]
    machines = by_engine(Machine(gpu.device_gb_s, gpu.pcie_gb_s))
    machines = measured(machines, found, gpu, "Q4_K", 900_000)
    moved = Traffic(1, 0, 0, 0, moved_experts=5, moved_bytes=110e6, host_bytes=60e6)
    for engine, milliseconds in (("hobbit_jax", 10), (COMPILED, 5)):
        time = token_time(moved, machines[engine])
        assert (time.link, time.cpu) == (pytest.approx(milliseconds), pytest.approx(2))
    constants = describe(machines["hobbit_jax"], dict.fromkeys(MEASURED, "b.json"))
    assert {c["name"] for c in constants if c["source"] == "b.json"} == set(MEASURED)
    with pytest.raises(ValueError, match=r"RTX 4070, and the plan is for RTX 4080; measure there"):
        measured(machines, found, GPUS["RTX 4080"], "Q4_K", 900_000)


def test_every_constant_has_an_origin():
    constants = describe(Machine(500, 20), {})
    assert [c["name"] for c in constants] == [*vars(Machine(500, 20))]
    assert all(c["unit"] and c["origin"] in get_args(Origin) and c["source"] for c in constants)
    for name in ("pcie_gb_s", "device_efficiency", "wait_us"):
        with pytest.raises(ValueError, match=name):
            replace(Machine(500, 20), **{name: -1.0})


def test_sizes_are_those_of_real_files(tmp_path: Path):
    """Of the preset: a file synthesised with it. Of a file: what the loader puts on the device."""
    synthesize(PRESETS["tiny"], "tiny", tmp_path / "tiny.gguf")
    written = open_model(tmp_path / "tiny.gguf")
    assert (written.dense_bytes, written.native_bytes) == (TINY.dense_bytes, TINY.native_bytes)
    assert written.dense_read_bytes == TINY.dense_read_bytes < TINY.dense_bytes
    tied = tmp_path / "tied.gguf"
    write_model(MODELS["qwen3moe-tied"], tied)
    for path in (tmp_path / "tiny.gguf", tied):
        model, loaded = open_model(path), load_model(path, "xla")
        assert model.dense_bytes == loaded.dense_device_bytes
        caches = empty_caches(loaded.config, 1, CONTEXT)
        assert model.kv_cache_bytes(CONTEXT) == caches.nbytes
    assert open_model(tied).dense_read_bytes == open_model(tied).dense_bytes


def test_residents_are_the_engines_own(tmp_path: Path, synthetic_routing: Trace):
    synthesize(PRESETS["tiny"], "tiny", tmp_path / "tiny.gguf")
    file = open_gguf(tmp_path / "tiny.gguf")
    store, trace = HostExperts(TINY.config, file), shorter(synthetic_routing, 40)
    for share in (0.1, 0.33, 0.7, 1.0, 2.0):
        pool = int(share * store.precision_bytes(0))
        shares_pLE = uniform_plan(store).shares_pLE(store.shape_pLE)
        layout = BankLayout.of_store(store)
        slots, _ = pool_slots(shares_pLE, MISS_MODES["fetch"], layout, pool, 0.0)
        outcome = replay_setting(NATIVE, TINY, trace, pool, CONTEXT)
        assert outcome.residents == sum(slots.values())
        assert sorted(outcome.slots.values()) == sorted(slots.values())


@pytest.mark.parametrize("setting", MODES, ids=lambda s: s.name)
def test_more_memory_is_never_fewer_residents(setting: Setting, synthetic_routing: Trace):
    trace, found = shorter(synthetic_routing, 60), []
    for share in (0.25, 0.4, 0.6, 0.8, 1.01, 2.0):
        try:
            pool = int(share * TINY.native_bytes)
            found.append(replay_setting(setting, TINY, trace, pool, CONTEXT))
        except ValueError:
            assert not found or setting.low_format is not None
    assert len(found) > 2
    for less, more in pairwise(found):
        # Of caches that hold two copies, what they hold in the end depends on the text a little.
        slack = 0 if MISS_MODES[setting.mode].low_banks != "cache" else 13
        assert less.residents <= more.residents + slack
    assert found[-1].residents == TINY.config.n_layers * TINY.config.n_experts
    last = found[-1].traffic
    if setting.mode != "floor" and MISS_MODES[setting.mode].low_banks != "cache":
        assert (last.exits, last.moved_bytes, last.moved_experts) == (0, 0, 0)
    assert last.exits == 0 and found[-1].hit_rate == 1


def test_a_faster_link_or_device_is_never_slower(synthetic_routing: Trace):
    traffic = replay_setting(
        NATIVE, TINY, shorter(synthetic_routing, 60), TINY.native_bytes // 3, CONTEXT
    )
    for name in ("pcie_gb_s", "device_gb_s", "pcie_efficiency", "device_efficiency"):
        totals = [
            token_time(traffic.traffic, replace(Machine(100, 5), **{name: value})).total
            for value in (0.1, 0.2, 0.5, 1.0)
        ]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_a_replay_counts_as_a_plain_lru_does():
    """Misses, exits and bytes of uniform experts, by an LRU of twenty lines with the same start."""
    trace = shorter(routing.synthetic_routing(TINY.config, seed=3)[0].trace, 70)
    expert_bytes = TINY.store("Q2_K").layer(1, 0).expert_bytes
    n_slots = 9  # too few for a protected segment, so SLRU is LRU
    outcome = replay_setting(LOW, TINY, trace, n_slots * expert_bytes, CONTEXT)
    assert outcome.slots == {"Q2_K": n_slots}

    learned, warm = 30, 45  # of 70 tokens, as 300 and 450 of 700
    keys_TLK = trace.keys_TLK.tolist()
    uses = np.bincount(np.ravel(keys_TLK[:learned]), minlength=256)
    hottest = np.argsort(-uses, kind="stable")[:n_slots]
    cache = OrderedDict((int(key), None) for key in hottest[::-1])
    misses = exits = 0
    order_TLK = np.argsort(-trace.weights_TLK, axis=-1, kind="stable").tolist()
    for token in range(learned, 70):
        for keys, order in zip(keys_TLK[token], order_TLK[token], strict=True):
            keys = [keys[i] for i in order]
            for key in keys:
                if key in cache:
                    cache.move_to_end(key)
            missing = sorted(key for key in keys if key not in cache)
            for key in missing:
                if len(cache) == n_slots:
                    del cache[next(old for old in cache if old not in keys)]
                cache[key] = None
            if token >= warm:
                misses, exits = misses + len(missing), exits + bool(missing)
    counted = 70 - warm
    assert outcome.traffic.moved_experts == pytest.approx(misses / counted)
    assert outcome.traffic.moved_bytes == pytest.approx(misses * expert_bytes / counted)
    assert outcome.traffic.exits == pytest.approx(exits / counted)
    assert outcome.traffic.expert_bytes == pytest.approx(8 * 4 * expert_bytes)
    assert outcome.hit_rate == pytest.approx(1 - misses / counted / 32)


def test_a_floor_never_waits_and_reads_both_precisions(synthetic_routing: Trace):
    low = TINY.store("Q2_K")
    pool = low.precision_bytes(1) + TINY.native_bytes // 4
    outcome = replay_setting(FLOOR, TINY, shorter(synthetic_routing, 120), pool, CONTEXT)
    assert outcome.traffic.exits == 0 and outcome.hit_rate == 1
    assert 0.1 < outcome.low_uses < 0.9
    native = TINY.native_bytes / 256 * 32
    expected = (
        outcome.low_uses * low.precision_bytes(1) / 256 * 32 + (1 - outcome.low_uses) * native
    )
    assert outcome.traffic.expert_bytes == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("mode", ["host", "hybrid", "host_low"])
def test_what_the_cpu_computes_is_not_read_by_the_device(mode: str, synthetic_routing: Trace):
    """Every selection is read once, natively or low, and what is missing is not waited for."""
    low = "Q2_K" if mode == "host_low" else None
    setting = Setting(mode, mode, low, link_to_host=1.0)
    trace, pool = shorter(synthetic_routing, 120), TINY.native_bytes // 3
    outcome = replay_setting(setting, TINY, trace, pool, CONTEXT)
    traffic = outcome.traffic
    native, computed = TINY.native_bytes / 256 * 32, TINY.native_bytes / 256 * 32
    if low:
        computed = TINY.store(low).precision_bytes(1) / 256 * 32
    assert 0.3 < outcome.hit_rate < 0.95 and traffic.at_once
    share = traffic.host_bytes / computed
    assert traffic.expert_bytes / native + share == pytest.approx(1, rel=0.02)
    missed = 1 - outcome.hit_rate
    if mode == "hybrid":  # as fast over the link as on the CPU, so it fetches about a half
        assert 0.2 * missed < share < 0.8 * missed
        # What is moved beside the misses that were fetched is promoted.
        promoted = traffic.moved_bytes / native + share - missed
        selections = TINY.config.n_layers * TINY.config.experts_per_token
        assert 0 < promoted <= DEFAULT_PROMOTION.per_token / selections
    else:
        assert share == pytest.approx(missed, rel=0.02)
        assert outcome.low_uses == pytest.approx(missed if low else 0, rel=0.02)


def test_another_models_trace_is_scaled_and_named(synthetic_routing: Trace):
    """Half the layers, half the choices: each selection and each byte read counts for more."""
    half = replace(
        synthetic_routing,
        ids_TLK=synthetic_routing.ids_TLK[:, ::2, :2].copy(),
        weights_TLK=synthetic_routing.weights_TLK[:, ::2, :2].copy(),
    )
    assert routing.recorded(synthetic_routing, TINY.config).extrapolates == ()
    (reason,) = routing.recorded(half, TINY.config).extrapolates
    assert "4 layers, 32 experts, top-2 instead of 8, 32, 4" in reason
    size = TINY.store("Q2_K").layer(1, 0).expert_bytes
    everything = replay_setting(LOW, TINY, shorter(half, 60), 256 * size, CONTEXT)
    assert everything.residents == 256 and everything.traffic.moved_bytes == 0
    assert everything.traffic.expert_bytes == pytest.approx(8 * 4 * size)
    own = replay_setting(LOW, TINY, synthetic_routing, 128 * size, CONTEXT)
    others = replay_setting(LOW, TINY, half, 128 * size, CONTEXT)
    assert others.residents == own.residents == 128
    assert others.hit_rate == pytest.approx(own.hit_rate, abs=0.1)
    assert others.traffic.exits == pytest.approx(own.traffic.exits, rel=0.25)


def test_made_up_routing_is_like_recorded_routing():
    """By the figures that the module gives of DeepSeek-V2-Lite and of Qwen3-30B-A3B."""
    blocks = PRESETS["tiny"].blocks[:1] * 26
    shape = replace(PRESETS["tiny"], blocks=blocks, n_experts=64, experts_per_token=6)
    trace = routing.synthetic_routing(shape)[0].trace
    assert share_of_hot_experts(trace, 0.25) == pytest.approx(0.489, abs=0.03)
    for lag, share in ((1, 0.276), (2, 0.206), (5, 0.182), (20, 0.152)):
        assert overlap(trace, lag) == pytest.approx(share, abs=0.025)
    again = routing.synthetic_routing(shape)[0].trace
    np.testing.assert_array_equal(trace.ids_TLK, again.ids_TLK)
    assert (routing.synthetic_routing(shape, seed=1)[0].trace.ids_TLK != trace.ids_TLK).any()

    generated = routing.synthetic_routing(PRESETS["qwen3-30b-a3b"])[1].trace
    chosen_TLE = np.zeros((len(generated.ids_TLK), routing.LAYERS, 128), bool)
    np.put_along_axis(chosen_TLE, generated.ids_TLK, True, axis=2)
    recent_TLE = np.zeros_like(chosen_TLE)
    for lag in range(1, 9):
        recent_TLE[lag:] |= chosen_TLE[:-lag]
    assert overlap(generated, 1) == pytest.approx(0.45, abs=0.03)
    assert (chosen_TLE & recent_TLE)[8:].sum() / chosen_TLE[8:].sum() == pytest.approx(
        0.8, abs=0.03
    )
    n_slots = int(0.4 * routing.LAYERS * 128)
    assert 0.90 < lru_hit_rate(generated, n_slots) < 0.96
    learned, other = chosen_TLE[:350].sum(axis=0), chosen_TLE[350:].sum(axis=0)
    held_out = other.ravel()[np.argsort(-learned.ravel())[:n_slots]].sum() / other.sum()
    assert 0.65 < held_out < 0.76


def lru_hit_rate(trace: Trace, n_slots: int) -> float:
    """Of the tokens after the first 200."""
    cache, hits, uses = OrderedDict(), 0, 0
    for token, keys in enumerate(trace.keys_TLK.reshape(len(trace.ids_TLK), -1).tolist()):
        for key in keys:
            hits, uses = hits + (token >= 200 and key in cache), uses + (token >= 200)
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > n_slots:
                cache.popitem(last=False)
    return hits / uses


# From memory where no source is said; glm-4.5-air's is with its MTP block.
PUBLISHED_GB = {
    "qwen3-coder-next-80b": 48.5,
    "gpt-oss-20b": 12.1,  # 11.27 GiB in MXFP4 (smeltcore.com)
    "gpt-oss-120b": 63.4,
    "gemma-4-26b-a4b": 16.9,
    "glm-4.7-flash": 18.31,  # hyperspaceai/GLM-4.7-Flash-asym-2bitexp
    "glm-4.5-air": 73.0,
    "deepseek-v2-lite": 10.36,
}


def test_presets_weigh_what_published_files_do():
    """Files' sizes, and figures that others give of keys and values in half precision."""
    assert {*PLANNED} == {*PUBLISHED_GB}
    for name, file_gb in PUBLISHED_GB.items():
        model = preset_model(name)
        total = (model.native_bytes + model.dense_bytes) / 1e9
        assert total == pytest.approx(file_gb, rel=0.04), name
        assert 0 < model.dense_read_bytes <= model.dense_bytes
    qwen3 = preset_model("qwen3-30b-a3b")
    assert (qwen3.native_bytes + qwen3.dense_bytes) / 1e9 == pytest.approx(18.557, rel=0.005)
    for name, tokens, n_bytes in (
        ("qwen3.6-35b-a3b", 1000, 20e6),  # ggml-org/Llama-macOS pull request 63, of Qwen3.5
        ("glm-4.7-flash", 2**14, 0.89e9),  # hyperspaceai/GLM-4.7-Flash-asym-2bitexp-GGUF
    ):
        model = preset_model(name)
        grown = model.kv_cache_bytes(2 * tokens, "float16") - model.kv_cache_bytes(
            tokens, "float16"
        )
        assert grown == pytest.approx(n_bytes, rel=0.03)
    windowed = preset_model("gpt-oss-20b")  # half of its layers see 128 tokens
    read = [windowed.kv_cache_bytes(n, of_windows=True) for n in (8192, 4096)]
    assert read[0] / read[1] == pytest.approx((8192 + 128) / (4096 + 128))
    # Our engine keeps the others too, and its memory is planned so.
    empty = jax.eval_shape(lambda: empty_caches(windowed.config, 1, 8192))
    kept = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(empty))
    assert windowed.kv_cache_bytes(8192) == kept > 1.9 * read[0]
    assert divide_memory(windowed, Request(24, 8192)).kv_cache == kept
    hybrid = preset_model("qwen3.6-35b-a3b")
    state_bytes = 2 * hybrid.kv_cache_bytes(1) - hybrid.kv_cache_bytes(2)
    assert state_bytes == 4 * 30 * (3 * 8192 + 32 * 128 * 128)
    assert len(PRESET_NAMES) == 11  # the ten of the issue, and olmoe


def test_smaller_files_are_llama_cpps():
    """Of Qwen3-30B-A3B, 14.7 and 11.3 GB with attention in fewer bits too; rows of 2880 have no
    smaller type."""
    qwen3 = preset_model("qwen3-30b-a3b")
    for recipe, file_gb in (("Q3_K_M", 14.71), ("Q2_K", 11.26)):
        smaller = qwen3.smaller_file(recipe)
        assert smaller is not None
        assert (smaller.native_bytes + qwen3.dense_bytes) / 1e9 == pytest.approx(file_gb, rel=0.04)
    assert preset_model("gpt-oss-20b").smaller_file("Q2_K") is None
    gemma = preset_model("gemma-4-26b-a4b").smaller_file("Q2_K")
    assert gemma is not None
    (gate, _, down) = gemma.experts[0]
    assert (gate[0], down[0]) == ("Q2_K", "Q4_0")


def test_baselines_on_the_cpu(synthetic_routing: Trace):
    per_layer = [layer.expert_bytes for layer in TINY.store().precisions[0]]
    everything = all_on_cpu(TINY, CONTEXT)
    assert (everything.expert_bytes, everything.host_layers) == (0, 8)
    assert everything.kv_bytes == TINY.kv_cache_bytes(CONTEXT) / 2  # half precision
    assert everything.host_bytes == 4 * sum(per_layer)
    three = sum(per_layer[-3:]) * 32
    assert (layers_that_fit(TINY, three), layers_that_fit(TINY, three - 1)) == (3, 2)
    some = all_on_cpu(TINY, CONTEXT, 3)
    assert (some.expert_bytes, some.host_bytes) == (4 * sum(per_layer[-3:]), 4 * sum(per_layer[:5]))
    hot, traffic = hot_on_device(TINY, synthetic_routing, TINY.native_bytes // 4, CONTEXT)
    assert 0.35 < hot < 0.6  # of uses, by the most used quarter
    assert traffic.expert_bytes + traffic.host_bytes == pytest.approx(4 * sum(per_layer))
    assert 0 < traffic.host_layers < 8
    assert hot_on_device(TINY, synthetic_routing, TINY.native_bytes, CONTEXT)[0] == 1


def test_the_choice_has_to_earn_what_it_degrades():
    choose = candidates.choose
    assert choose([10, 11.9, 11], [0, 0.01, 0.02]) == 0
    assert choose([10, 12, 14], [0, 0.01, 0.02]) == 1  # 14 is not 1.2 times 12
    assert choose([10, 14.5, 12], [0, 0.02, 0.01]) == 1  # by loss: 12, then 14.5
    assert choose([10, 14.5, 13], [0, 0.01, 0]) == 2  # the fastest that loses nothing is 13
    assert choose([10, 20], [0, 0.057]) == 0  # beyond the limit of the decision document
    assert candidates.expected_loss(LOW, 1.0, 0.0) > candidates.expected_loss(FLOOR, 0.5, 0.0) > 0
    assert candidates.expected_loss(NATIVE, 0.0, 0.0) == 0


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"RTX 9999.*RTX 4070"):
        find_gpu("RTX 9999")
    with pytest.raises(ValueError, match="positive"):
        find_gpu("500,0")
    assert find_gpu("rtx4070") is find_gpu("NVIDIA GeForce RTX 4070") is GPUS["RTX 4070"]
    assert find_gpu("500, 25").device_gb_s == 500
    big = preset_model("mixtral-8x7b")
    with pytest.raises(ValueError, match=r"too small for mixtral-8x7b by \d+\.\d\d GiB: dense"):
        divide_memory(big, Request(2))
    memory = divide_memory(big, Request(24))
    without_experts = (memory.vram - memory.pool) / 2**30
    with pytest.raises(ValueError, match=r"by 0\.20 GiB"):  # a step takes 0.40 GiB
        divide_memory(big, Request(without_experts + 0.2))
    with pytest.raises(ValueError, match="context is 5000; want 1 to 4096"):
        divide_memory(TINY, Request(8, 5000))
    with pytest.raises(ValueError, match="qwen3-30b-a3b"):
        preset_model("qwen")
    trace = routing.synthetic_routing(TINY.config)[0].trace
    with pytest.raises(ValueError, match="30 or more"):
        routing.recorded(shorter(trace, 12), TINY.config)
    parts = memory.dense + memory.kv_cache + memory.scratch + memory.reserve
    assert memory.pool == 24 * 2**30 - parts > 0
    half = divide_memory(big, Request(24, kv_format="float16"))
    assert half.pool - memory.pool == memory.kv_cache / 2


def tiny_plan(pool_share: float) -> dict:
    request = Request(1, CONTEXT, reserve_gib=0)
    spare = divide_memory(TINY, request).pool - int(pool_share * TINY.native_bytes)
    request = replace(request, reserve_gib=spare / 2**30)
    made = [
        replace(made, trace=shorter(made.trace, 100))
        for made in routing.synthetic_routing(TINY.config)
    ]
    return make_plan(TINY, GPUS["RTX 4070"], by_engine(Machine(500, 30)), request, made, {})


def test_a_plan_says_what_it_rests_on(tmp_path: Path):
    """From the record to the text on the screen and to the document's section."""
    summary = {"reports": 7, "median_error": 0.12, "pairs": 5, "pairs_in_order": 4}
    plan = tiny_plan(0.45)
    text = render_plan(plan_record(plan), summary)
    assert "EXTRAPOLATES: no routing of this model" in text
    assert (
        "against 7 public reports, and on no GPU here: median error 12 %, 4 of 5 pairs in order"
        in text
    )
    assert "wait_us 8" in text and "floor Q3_K: left out" in text
    assert published_benchmarks.recorded_check().keys() == summary.keys()
    native, *_ = settings = plan["settings"]
    for least, most in (native["hit_rate"], native["tokens_per_second"]):
        assert least < most  # the second routing is the more local
    assert "device_gb_s" not in plan["assumed"] and "launch_us" in plan["assumed"]
    changed = [entry["changed"] for entry in plan["sensitivity"]]
    assert changed[-1] == "kv_format float16"  # a context of four times the tokens does not fit
    assert {name.split()[0] for name in changed[:-1]} == {*plan["assumed"]}
    for shares in plan["joint"].values():
        assert sum(share for _, share in shares) == pytest.approx(1)

    baselines = [baseline["name"] for baseline in plan["baselines"]]
    assert {f"llama.cpp --n-cpu-moe{file}" for file in ("", ", Q3_K_M file", ", Q2_K file")} <= {
        *baselines
    }
    options = [*settings, *plan["baselines"]]
    for at in range(2):
        speeds = [option["tokens_per_second"][at] for option in options]
        losses = [option["expected_loss"][at] for option in options]
        wanted = options[candidates.choose(speeds, losses)]["name"]
        assert plan["choices"]["overall"][at] == wanted
        here = candidates.choose(speeds[: len(settings)], losses[: len(settings)])
        assert plan["choices"]["here"][at] == settings[here]["name"]
        lossless = candidates.choose(speeds, [1.0 * (loss > 0) for loss in losses])
        assert plan["choices"]["native"][at] == options[lossless]["name"]
    here = " or ".join(dict.fromkeys(plan["choices"]["here"]))
    assert f"Best in this engine: {here}, " in text
    lossy = any(o["expected_loss"][at] for at in range(2) for o in options
                if o["name"] == plan["choices"]["overall"][at])  # fmt: skip
    assert ("Faster with smaller experts: " in text) == lossy

    fits = tiny_plan(1.0)
    assert [s["name"] for s in fits["settings"]] == ["native SLRU"]
    assert [b["name"] for b in fits["baselines"]] == ["llama.cpp --n-cpu-moe"]
    assert fits["baselines"][0]["flag"].startswith("--n-cpu-moe 0")
    assert fits["settings"][0]["traffic"][0]["moved_bytes"] == 0
    text = render_plan(plan_record(fits), summary)
    assert "GB in native: all fit" in text and "smaller experts: " not in text

    write_record(tmp_path, plan_record(plan))
    (shown,) = planner_tables.plans(read_records(tmp_path).of("planner"))
    assert shown.chosen("here") == here and shown.loss("native") == 0 < shown.loss("here")
    least, most = (format(speed, ".1f") for speed in native["tokens_per_second"])
    row = planner_tables.options_table(shown).splitlines()[2]
    assert row.startswith("| native SLRU |") and f"| {least} to {most} |" in row


def test_reports_are_compared_and_their_misses_kept(monkeypatch: pytest.MonkeyPatch):
    """With a forecast of twice and of half, the errors and the order are known by hand."""
    speeds = {"a referee's": 10.0, "listed before": 20.0, "found since": 40.0}
    reports = published_benchmarks.read_reports()
    found = [replace(report, tokens_per_second=speeds[report.group]) for report in reports]
    monkeypatch.setattr(published_benchmarks, "read_reports", lambda: found)
    monkeypatch.setattr(published_benchmarks, "forecast", lambda report: 20.0)
    compared = compare_reports()
    assert compared["median_errors"] == {"a referee's": 1.0, "listed before": 0, "found since": 0.5}
    assert (
        compared["summary"]["pairs"] > 0 == compared["summary"]["pairs_in_order"]
    )  # equal forecasts order nothing
    record = reports_record(compared)
    assert record.under("median_errors_") == compared["median_errors"]
    assert planner_tables.reports_table(record).count("thecodacus/llama.cpp pull request 5") == 4


def test_forecasts_of_reports_are_the_cost_models():
    """Of each placement, by sums done here."""
    machine = by_engine(Machine(360, 31.5))[COMPILED]
    report = Report("made up", "tiny", "RTX 3060", "layers_on_cpu", 0, 1.0, "nobody")

    def seconds(placement: str, amount: float = 0, **others) -> float:
        return 1 / forecast(replace(report, placement=placement, amount=amount, **others))

    for layers in (0, 8):
        traffic = all_on_cpu(TINY, published_benchmarks.CONTEXT, 8 - layers)
        wanted = token_time(traffic, machine).total * 1e-3
        assert seconds("layers_on_cpu", layers) == pytest.approx(wanted, rel=1e-3)
    active = TINY.native_bytes * 4 / 32
    wanted = (TINY.dense_read_bytes + active) / 70e9 + TINY.kv_cache_bytes(4096, "float16") / 270e9
    assert seconds("no_gpu", host_gb_s=100) - 150e-6 == pytest.approx(wanted, rel=0.01)
    more = seconds("hit_rate", 0.0) - seconds("hit_rate", 1.0)
    assert more == pytest.approx(active / 25.2e9 + 8 * 100e-6 + 32 * 3 * 10e-6, rel=0.01)
    half = seconds("hot_gb", TINY.native_bytes / 2e9)
    assert seconds("layers_on_cpu", 8) > half > seconds("layers_on_cpu", 0)
    larger = (2 * TINY.native_bytes + TINY.dense_bytes) / 1e9
    twice = seconds("layers_on_cpu", 0, file_gb=larger) - seconds("layers_on_cpu", 0)
    assert twice == pytest.approx(active / 270e9, rel=0.01)
