"""Experts divided over devices: the bits of one device, each pool whole and within its budget."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from pool_invariants import UsesByExpert, all_keys, check_invariants
from tiny_models import TinyModel, write_model

import hobbit_jax.cache.device_banks as device_banks
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout, Controller, OnRouting, Use
from hobbit_jax.cache.link import Link
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache.policies import Step, policy_factory
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.pool_sizing import pool_slots
from hobbit_jax.cache.promotion import PromotionRule
from hobbit_jax.experts import low_precision
from hobbit_jax.experts.precision import SKIPPED, SelectionPlan, StaticPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, ExpertKey, HostExperts
from hobbit_jax.inference import engine as engine_module
from hobbit_jax.inference import moe
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models import sharding
from hobbit_jax.models.loading import load_model
from hobbit_jax.models.sharding import AXIS, expert_mesh, owner, owners_LE
from pallas_kernels.reference import Signature

pytestmark = pytest.mark.skipif(
    len(jax.local_devices()) < 4, reason="needs four devices; a CPU's are virtual (conftest.py)"
)

# Few shapes, since a program is compiled for each: one chunk, and one context that prompts, scored
# text and generated tokens fill alike.
CHUNK, STEPS = 4, 4
PROMPTS = [[5, 200, 17, 17, 99], [3], [101, 42, 7, 250, 11, 64, 8]]
CONTEXT = max(map(len, PROMPTS)) + 1 + STEPS


# One signature, so that a program has one branch; the conftest's model has two.
ONE_BANK = TinyModel(
    "qwen3moe", 6, 4, 2, 64, 8, 2, 1e6, 1e-6,
    experts=(("Q4_K", "Q4_K", "Q4_K"),) * 3,
    dense=("Q8_0", "Q8_0", "Q8_0", "Q8_0", "F32", "F16", "Q8_0"),
)  # fmt: skip


def with_low(path, folder):
    model = load_model(path, "xla")
    low = low_precision.open_low_precision(
        model.file, model.config, low_precision.LowPrecisionSpec("Q2_K"), folder
    )
    return model, HostExperts(model.config, model.file, [low])


@pytest.fixture(scope="module")
def one_bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_bank")
    write_model(ONE_BANK, folder / "tiny.gguf")
    return with_low(folder / "tiny.gguf", folder)


@pytest.fixture(scope="module")
def store(one_bank):
    return one_bank[1]


@pytest.fixture(scope="module")
def two_banks(two_banks_path):
    model = load_model(two_banks_path, "xla")
    return model, HostExperts(model.config, model.file)


@pytest.fixture(scope="module")
def two_banks_and_low(two_banks_path, tmp_path_factory):
    return with_low(two_banks_path, tmp_path_factory.mktemp("precisions"))


def engine_of(opened, budget=None, plan=None, batch=3, **options) -> Engine:
    return Engine(*opened, CacheConfig(budget, plan=plan, chunk_tokens=CHUNK * batch, **options))


def mixed_plan(store):
    shape = (store.config.n_layers, store.config.n_experts)
    return StaticPlan((np.random.default_rng(0).random(shape) < 0.5).astype(np.int8))


PLANS = {
    "native": uniform_plan,
    "uniform low": lambda store: uniform_plan(store, LOW),
    "mixed": mixed_plan,
    "router weight": lambda store: SelectionPlan("router_weight", (-0.4,), (0, LOW), (0.7, 0.3)),
}


def bits(array: jax.Array) -> np.ndarray:
    """Of float32, so that -0.0 is not 0.0; other numbers as they are."""
    on_host = np.asarray(array)
    return on_host.view(np.int32) if on_host.dtype == np.float32 else on_host


def tokens(engine: Engine, prompts=PROMPTS, **options) -> np.ndarray:
    return np.stack([ids_B for ids_B, _ in engine.generate(prompts, 1 + STEPS, **options)])


def prefill_and_decode(engine: Engine, batch: int) -> list[np.ndarray]:
    """Logits of prompts of different lengths and of forced tokens; one sequence pauses."""
    engine.start(batch, CONTEXT)
    results = [bits(engine.prefill(PROMPTS[-batch:]))]
    for step in range(STEPS):
        active_B = np.asarray([True, step != 1, True])[-batch:]
        logits_BV = engine.decode(np.asarray([9, 8, 7])[-batch:] + step, active_B)
        results.append(bits(logits_BV)[active_B])
    return results


def everything(engine: Engine, batch: int) -> list[np.ndarray]:
    ids_BT = np.random.default_rng(1).integers(0, engine.config.vocab_size, (batch, CONTEXT))
    scored = bits(engine.score(ids_BT))
    return [scored, *prefill_and_decode(engine, batch), tokens(engine, PROMPTS[-batch:])]


def slots_of(plan, store, budget_bytes: int | None, devices: int) -> tuple[dict, int]:
    """Slots of each device's banks, and its bytes that would hold everything."""
    layout, shares_pLE = BankLayout.of_store(store, devices), plan.shares_pLE(store.shape_pLE)
    return pool_slots(shares_pLE, MISS_MODES["fetch"], layout, budget_bytes, 0.5)


def least_budget(plan, store, devices: int) -> int:
    """Read from the refusal, as a user does."""
    with pytest.raises(ValueError, match=r"needs at least (\d+) bytes") as refusal:
        slots_of(plan, store, 0, devices)
    return int(str(refusal.value).split("at least ")[1].split()[0])


def check_pools(engine: Engine, devices: int) -> None:
    """Each device's pool is whole; what programs see is their arrays, on their devices."""
    pool = engine.pool
    check_invariants(pool, engine.store)
    assert len(pool.parts) == devices
    for index, (part, device) in enumerate(zip(pool.parts, jax.devices()[:devices], strict=True)):
        assert {owner(key.layer, key.expert, devices) for key in part.slot_of} <= {index}
        arrays = jax.tree.leaves((part.banks, part.table_UE))
        assert all(array.devices() == {device} for array in arrays)
        for array, whole in zip(arrays, jax.tree.leaves((pool.banks, pool.table_UE)), strict=True):
            shard = whole.addressable_shards[index]
            assert shard.device == device
            assert shard.data.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    held_UE = np.max([np.asarray(part.table_UE) for part in pool.parts], axis=0)
    held = [
        ExpertKey(*map(int, divmod(row, engine.config.n_layers)), int(expert))
        for row, expert in np.argwhere(held_UE >= 0)
    ]
    assert frozenset(held) == pool.resident()


def test_every_expert_has_one_owner_and_all_devices_as_many():
    for layers, experts, devices in [(48, 128, 8), (32, 8, 4), (24, 60, 7), (3, 8, 3), (3, 8, 5)]:
        owner_LE = owners_LE(layers, experts, devices)
        counts_LN = np.stack([np.bincount(row_E, minlength=devices) for row_E in owner_LE])
        assert counts_LN.shape == (layers, devices) and (counts_LN.sum(axis=1) == experts).all()
        assert (counts_LN.max(axis=1) - counts_LN.min(axis=1) <= 1).all()
        for first in range(layers - devices + 1):
            assert (counts_LN[first : first + devices].sum(axis=0) == experts).all()


@pytest.fixture(scope="module")
def one_device():
    """Results of one device with all resident."""
    known = {}

    def results(opened, name, batch):
        key = (id(opened), name, batch)
        if key not in known:
            engine = engine_of(opened, None, PLANS[name](opened[1]), batch)
            known[key] = everything(engine, batch)
        return known[key]

    return results


def check_same_bits(engine, devices, wanted, batch):
    for _ in range(2):  # from a cold pool and from a warm one
        for got, result in zip(everything(engine, batch), wanted, strict=True):
            np.testing.assert_array_equal(got, result, strict=True)
    check_pools(engine, devices)


@pytest.fixture(scope="module")
def two(two_banks):
    """Two devices with the fewest slots there may be."""
    budget = least_budget(uniform_plan(two_banks[1]), two_banks[1], 2)
    return engine_of(two_banks, budget, devices=2)


def test_two_devices_give_the_bits_of_one(two_banks, two, one_device):
    check_same_bits(two, 2, one_device(two_banks, "native", 3), 3)
    assert two.counts.host_round_trips > 0


@pytest.mark.slow
def test_four_devices_with_some_slots_to_spare(two_banks, one_device):
    budget = 3 * least_budget(uniform_plan(two_banks[1]), two_banks[1], 4) // 2
    engine = engine_of(two_banks, budget, devices=4)
    check_same_bits(engine, 4, one_device(two_banks, "native", 3), 3)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_at_every_budget(two_banks_and_low, one_device, name, batch, devices):
    store = two_banks_and_low[1]
    plan = PLANS[name](store)
    least = least_budget(plan, store, devices)
    for budget in (least, 3 * least // 2, None):
        engine = engine_of(two_banks_and_low, budget, plan, batch, devices=devices)
        check_same_bits(engine, devices, one_device(two_banks_and_low, name, batch), batch)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorded:
    """The plan that asks for the very precisions that served a run, found by the router's
    weights.
    """

    layer_N: np.ndarray
    expert_N: np.ndarray
    weight_N: np.ndarray
    precision_N: np.ndarray

    def assign(self, layer, ids_TK, weights_TK):
        layer_N, expert_N, weight_N, precision_N = (
            jnp.asarray(array)[None, None]
            for array in (self.layer_N, self.expert_N, self.weight_N, self.precision_N)
        )
        same = (layer_N == layer) & (ids_TK[..., None] == expert_N)
        same = same & (weights_TK[..., None] == weight_N)
        return jnp.max(jnp.where(same, precision_N, -100), axis=-1).clip(SKIPPED).astype(jnp.int8)

    def shares_pLE(self, shape_pLE):
        return np.ones(shape_pLE)


def record(engine: Engine, monkeypatch) -> dict:
    """The precision that serves each (layer, expert, weight) of what the engine does from now
    on.
    """
    served_by, rows, k = [], {}, engine.config.experts_per_token
    count = engine.controller.count_selections

    def counting(asked, served):
        served_by.extend(served.reshape(-1, k))  # of one layer [T, K] or several [I, A]
        count(asked, served)

    def watch(routed):
        served_TK = [served_by.pop(0) for _ in routed.ids_TK]
        for token in np.flatnonzero(routed.valid_T):
            for expert, weight, precision in zip(
                routed.ids_TK[token], routed.weights_TK[token], served_TK[token], strict=True
            ):
                key = (routed.layer, int(expert), float(weight))
                assert rows.setdefault(key, int(precision)) == int(precision)

    monkeypatch.setattr(engine.controller, "count_selections", counting)
    engine.controller.observers.append(OnRouting(watch))
    return rows


def recorded_plan(rows: dict) -> Recorded:
    layers, experts, weights = zip(*rows, strict=True)
    integers = (np.asarray(part, np.int32) for part in (layers, experts, list(rows.values())))
    layer_N, expert_N, precision_N = integers
    return Recorded(layer_N, expert_N, np.asarray(weights, np.float32), precision_N)


def check_mode(opened, mode, devices, batch, plan, monkeypatch):
    """Served as it was, by one device that has all copies: the same bits. And twice the same."""
    store = opened[1]
    budget = 5 * least_budget(mixed_plan(store), store, devices) // 4
    if MISS_MODES[mode].low_banks == "all":
        budget = store.precision_bytes(NATIVE) // (2 * devices) + store.precision_bytes(LOW)
    runs = []
    for _ in range(2):
        rule = PromotionRule(after_uses=2, per_token=2)
        engine = engine_of(opened, budget, plan, batch, devices=devices, mode=mode, promotion=rule)
        rows = record(engine, monkeypatch)
        results = prefill_and_decode(engine, batch)
        check_pools(engine, devices)
        moved = engine.counts.bytes_moved
        runs.append((results, rows, engine.counts, engine.pool.resident(), moved))
    for got, again in zip(runs[0][0], runs[1][0], strict=True):
        np.testing.assert_array_equal(got, again, strict=True)
    assert runs[0][1:] == runs[1][1:]
    assert 0 < engine.counts.demoted < engine.counts.selections
    oracle = engine_of(opened, None, recorded_plan(rows), batch)
    for got, result in zip(prefill_and_decode(oracle, batch), results, strict=True):
        np.testing.assert_array_equal(got, result, strict=True)


@pytest.mark.slow
def test_a_miss_mode_and_a_plan_on_three_devices(one_bank, monkeypatch):
    """Three do not divide eight experts, nor those of the plan."""
    plan = mixed_plan(one_bank[1])
    check_mode(one_bank, "fetch_low", 3, 1, plan, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("mode", ["use_low_if_resident", "fetch_low", "hobbit", "floor"])
def test_every_miss_mode(two_banks_and_low, mode, devices, monkeypatch):
    plan = uniform_plan(two_banks_and_low[1])
    check_mode(two_banks_and_low, mode, devices, 3, plan, monkeypatch)


def test_the_host_is_asked_once_a_call_and_nothing_is_compiled_again(two, transfers):
    wanted = tokens(two)
    tokens(two)  # from a warm pool
    two.counts.take()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "compile" in event else None
    )
    steps = two.generate(PROMPTS, 1 + STEPS)
    rows = [next(steps)[0]]  # the prefill, which does ask
    transfers[0] = 0
    rows += [ids_B for ids_B, _ in steps]
    assert transfers[0] == STEPS + two.counts.host_round_trips and two.counts.host_round_trips > 0
    assert not compiled
    jax.jit(lambda x: x * 3)(1.0)  # the listener does hear
    assert compiled
    np.testing.assert_array_equal(np.stack(rows), wanted)


def test_nothing_is_copied_between_devices(two, monkeypatch):
    """Uploads go to the owner; the caches and the banks stay where they are."""
    uploads = []

    def putting(arrays, device=None, **options):
        if isinstance(arrays, tuple) and isinstance(arrays[0], np.ndarray):
            uploads.append(device)
        return put(arrays, device, **options)

    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", putting)
    monkeypatch.setattr(two.pool, "link", Link())  # not the host's, which sends nothing
    two.start(3, CONTEXT)
    two.prefill(PROMPTS)

    def pointers(tree) -> list[int]:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return [shard.data.unsafe_buffer_pointer() for shard in shards]

    uploads.clear()
    two.controller.observers.append(counted := UsesByExpert(two.store.shape_pLE))
    caches, banks = pointers(two._carry.caches), pointers(two.pool.banks)
    for step in range(STEPS):
        two.decode(np.asarray([9, 8, 7]) + step)
    assert pointers(two._carry.caches) == caches and pointers(two.pool.banks) == banks
    assert all(array.is_fully_replicated for array in jax.tree.leaves(two._carry.caches))
    misses_LE, owner_LE = counted.misses[NATIVE], owners_LE(*two.store.shape_pLE[1:], 2)
    misses = [int(misses_LE[owner_LE == index].sum()) for index in range(2)]
    assert [uploads.count(device) for device in jax.devices()[:2]] == misses and all(misses)
    assert len(uploads) == sum(misses)


@pytest.mark.parametrize("what", ["device_put", "_write_slot"])
def test_a_fault_on_one_device(two, monkeypatch, what):
    """Every pool is whole, the sequences are given up, and the next ones are right."""
    wanted, second = tokens(two), jax.devices()[1]
    function, failed = getattr(jax if what == "device_put" else device_banks, what), []

    def failing(first, second_argument, *rest, **options):
        if what == "device_put":
            here = isinstance(first, tuple) and second_argument is second
        else:
            here = second_argument.devices() == {second}
            if here:
                function(first, second_argument, *rest)  # donated, and the successors lost
        if here:
            failed.append(what)
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return function(first, second_argument, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(two.pool, "link", Link())
        patch.setattr(jax if what == "device_put" else device_banks, what, failing)
        with pytest.raises(RuntimeError, match="out of memory") as raised:
            tokens(two)
    assert len(failed) == 1
    if what == "device_put":
        assert f"to {second} failed" in str(raised.value)
    check_pools(two, 2)
    with pytest.raises(RuntimeError, match="call start first"):
        two.decode(np.asarray([9, 8, 7]))
    np.testing.assert_array_equal(tokens(two), wanted)


@pytest.mark.parametrize("devices", [2, 3])
def test_pools_are_whole_after_any_requests(store, devices):
    """Random uses, pins and staged uploads, without an engine."""
    plan, mesh = uniform_plan(store), expert_mesh(devices)
    budget = 2 * least_budget(plan, store, devices)
    slots, _ = slots_of(plan, store, budget, devices)
    controller = Controller(BankLayout.of_store(store, devices), slots, policy_factory("slru"))
    pool = SlotPool(store, controller, budget, mesh=mesh)
    engine = type("Whole", (), {"pool": pool, "store": store, "config": store.config})
    rng, pinned = np.random.default_rng(devices), set()
    for operation in rng.choice(["use", "pin", "unpin", "reserve", "promote"], 40):
        layer, count = int(rng.integers(3)), int(rng.integers(1, 9))
        keys = [ExpertKey(NATIVE, layer, int(n)) for n in rng.permutation(8)[:count]]
        if operation == "use":
            batches = controller.batches(keys)
            assert sorted(key for part in batches for key in part) == sorted(keys)
            pool.begin(controller.decide(Step(0, layer, 0), [Use(key) for key in keys]))
            for part in batches:
                pool.load(part)
                assert set(part) <= pool.resident() and all(key in pool for key in part)
        elif operation == "pin":
            try:
                pool.pin(keys[:1])
                pinned.add(keys[0])
            except ValueError as refusal:
                assert "slots to stream through" in str(refusal)
        elif operation == "unpin":
            pool.unpin(keys)
            pinned -= set(keys)
        elif operation == "reserve":
            for key in keys:
                pool.reserve(key)
        else:
            pool.promote()
        assert pinned <= pool.resident()
        check_pools(engine, devices)
    assert pool.device_bytes <= pool.budget_bytes == devices * budget
    assert pool.slots == {signature: devices * n for signature, n in slots.items()}


def test_equal_slots_hold_what_the_fullest_device_may_ask_for(store):
    """Without a budget all is resident, also where the plan's experts do not divide evenly."""
    for name in PLANS:
        for devices in (1, 2, 3, 5):
            plan = PLANS[name](store)
            slots, total = slots_of(plan, store, None, devices)
            asked = {signature: np.zeros(devices, int) for signature in slots}
            shares = plan.shares_pLE(store.shape_pLE)
            for key in [*all_keys(store, NATIVE), *all_keys(store, LOW)]:
                if shares[key.precision][key.layer, key.expert] > 0:
                    asked[store.signature(key)][owner(key.layer, key.expert, devices)] += 1
            assert slots == {signature: counts.max() for signature, counts in asked.items()}
            size = {store.signature(key): store.expert_bytes(key) for key in all_keys(store, LOW)}
            size |= {store.signature(key): store.expert_bytes(key) for key in all_keys(store, 0)}
            assert total == sum(size[signature] * n for signature, n in slots.items())


def test_what_is_called_replicated_is(two, monkeypatch):
    """Traced under JAX's own check, which is off for the kernels' sake; and the check can fail."""

    def trace(**changes):
        seen = []
        real = engine_module.decode_program

        def tracing(spec):
            spec = replace(spec, **changes)
            return lambda *args: seen.append(real.__wrapped__(spec).trace(*args)) or 1 / 0

        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "decode_program", tracing)
            patch.setattr(two, "_programs", {})
            two.start(3, CONTEXT)
            with pytest.raises(ZeroDivisionError):
                two.decode(np.asarray([9, 8, 7]))
        return seen

    shard_map = jax.shard_map
    monkeypatch.setattr(
        sharding.jax, "shard_map", lambda *a, **o: shard_map(*a, **{**o, "check_vma": True})
    )
    assert trace()
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "sum_of_parts", lambda part_AD, mesh: part_AD)
        with pytest.raises(Exception, match=r"varying|replicat"):
            trace()


@pytest.mark.slow
def test_the_kernels_under_shard_map(one_bank):
    """Interpreted; two devices give the bits of one."""
    model, store = one_bank
    kernels = (replace(model, implementation="interpret"), store)
    results = []
    for devices in (1, 2):
        engine = engine_of(kernels, store.precision_bytes(NATIVE) // (2 * devices), devices=devices)
        results.append(prefill_and_decode(engine, 3))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_the_expert_op_lowers_for_two_gpus():
    """With Triton kernels, for H200s that are not there."""
    signature, rows = Signature("Q4_K", "Q4_K", "Q6_K"), 4
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((2,), (AXIS,), abstract_device=device)
    config = type("Shape", (), {"d_model": 256, "d_expert": 256})
    whole = (device_banks.empty_bank(config, signature, 2 * rows), jnp.zeros((2 * rows * 2, 256)))
    work = moe.Work(
        jnp.zeros(2 * rows, jnp.int32), jnp.zeros((2 * rows, 1), jnp.int32), jnp.zeros(2, jnp.int32)
    )
    args = (jnp.zeros((rows, 256)), whole[1], jnp.zeros(rows * 2), whole[0], work)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)

    def run(*args):
        return moe._expert_ffn(*args, signature, "triton", mesh, "swiglu", None)

    with use_abstract_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        # There is no GPU, and `choose` would say so.
        patch.setattr("pallas_kernels.expert_ffn.implementation_for", lambda *_, **__: "triton")
        text = jax.jit(run).trace(*abstract).lower(lowering_platforms=("cuda",)).as_text()
    assert "matmul_Q4_K" in text and "matmul_Q6_K" in text


def test_devices_that_are_not_there(one_bank):
    with pytest.raises(ValueError, match="5 devices were asked for and this process has 4"):
        engine_of(one_bank, devices=5)
    with pytest.raises(ValueError, match="devices is 0; want 1 or more"):
        engine_of(one_bank, devices=0)


@pytest.mark.slow
def test_the_script():
    """Two devices write what one does; more than there are is one line."""

    def run(*args):
        command = [
            sys.executable,
            "scripts/generate.py",
            "--prompt=def f(",
            "--budget_mib=2",
            *args,
        ]
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )

    one, two, three = (run(f"--devices={devices}") for devices in (1, 2, 3))
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout == two.stdout and one.stderr != two.stderr
    assert three.returncode == 2 and three.stderr.count("\n") == 1
    assert three.stderr.startswith("error: 3 devices were asked for and this process has 2")
