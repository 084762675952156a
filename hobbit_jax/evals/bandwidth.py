"""Measures what `cache/bandwidth.py` holds: host memory under expert products, the link, and both.

Products run in a child process on the CPU, on a bank in the map of a file that is larger than the
processor's caches; every step takes other experts of it.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from hobbit_jax.cache.bandwidth import Bandwidths
from hobbit_jax.record.machine import machine, processor_name
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.formats import get_format
from pallas_kernels.ggml.ops import RawMatrix, default_threads, set_threads
from pallas_kernels.reference import Bank, Signature, Work

# An expert of Qwen3-30B-A3B, and how many a step runs.
D_MODEL, D_EXPERT, EXPERTS_OF_A_STEP = 2048, 768, 8
_SHAPES = ((D_EXPERT, D_MODEL), (D_EXPERT, D_MODEL), (D_MODEL, D_EXPERT))
_STEPS = 16  # of one program
PIECES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)


def here() -> tuple[str, str]:
    """This process's device and processor, as `Bandwidths` names them."""
    return machine()["device"], f"{processor_name()}, {default_threads()} threads"


def write_bank(path: Path, format: str, n_bytes: int) -> int:
    """Writes experts of random blocks with finite scales; returns how many."""
    layout, rng = get_format(format), np.random.default_rng(0)
    raw = rng.integers(0, 256, _expert_bytes(format), np.uint8)
    blocks = raw.reshape(-1, layout.block_bytes)
    for at, bits, exponent_mask in layout.float_fields:
        # Half of the exponent's bits: a number near 1, whatever the format.
        middle = np.array([exponent_mask & (exponent_mask >> 1)], bits).view(np.uint8)
        blocks[:, at : at + bits.itemsize] = middle
    n_experts = max(EXPERTS_OF_A_STEP, n_bytes // len(raw))
    with path.open("wb") as file:
        file.writelines([raw.tobytes()] * n_experts)
    return n_experts


def _expert_bytes(format: str) -> int:
    return sum(rows * get_format(format).row_bytes(columns) for rows, columns in _SHAPES)


def host_rate(path: Path, format: str, n_experts: int, seconds: float) -> float:
    """GB/s that expert products read of a mapped bank, for about so long, after a warm-up."""
    expert, layout = _expert_bytes(format), get_format(format)
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    matrices, at = [], 0
    for rows, columns in _SHAPES:
        n_bytes = rows * layout.row_bytes(columns)
        places = raw.ctypes.data + at + expert * np.arange(n_experts, dtype=np.uint64)
        address = places.astype("<u8").view("<u4").reshape(-1, 2)
        matrices.append(RawMatrix(jnp.asarray(address), rows, columns, n_bytes))
        at += n_bytes
    signature, k = Signature(format, format, format), EXPERTS_OF_A_STEP
    weight_A, assignment_IC = jnp.full(k, 1 / k), jnp.arange(k, dtype=jnp.int32)[:, None]

    def step(x_TD: jax.Array, slot_I: jax.Array) -> tuple[jax.Array, None]:
        work, y_AD = Work(slot_I, assignment_IC, jnp.int32(k)), jnp.zeros((k, D_MODEL))
        y_AD = expert_ffn(x_TD, y_AD, weight_A, Bank(*matrices), signature, work)
        return jnp.tanh(y_AD.sum(axis=0, keepdims=True)), None

    run = jax.jit(lambda x_TD, slot_SI: jax.lax.scan(step, x_TD, slot_SI)[0])
    x_TD, next_expert = jnp.ones((1, D_MODEL)), 0

    def once() -> int:
        nonlocal x_TD, next_expert
        slots = (next_expert + np.arange(_STEPS * k, dtype=np.int32)) % n_experts
        next_expert = int(slots[-1]) + 1
        x_TD = jax.block_until_ready(run(x_TD, slots.reshape(_STEPS, k)))
        return _STEPS * k * expert

    once()
    return _rate(once, seconds)


def _rate(once: Callable[[], int], seconds: float, goes_on: Callable[[], bool] | None = None):
    """GB/s of an operation that returns its bytes, repeated for so long, or while `goes_on`."""
    began, moved = time.perf_counter(), 0
    while moved == 0 or (goes_on() if goes_on else time.perf_counter() - began < seconds):
        moved += once()
    return moved / (time.perf_counter() - began) / 1e9


def uploads(path: Path, n_bytes: int) -> dict[str, Callable[[], int]]:
    """One upload of a piece from the map and, where the device has such memory, from pinned."""
    device, raw = jax.local_devices()[0], np.memmap(path, np.uint8, "r").view(np.ndarray)
    target, rng = SingleDeviceSharding(device), np.random.default_rng(0)

    def send(source: Callable[[], Any]) -> Callable[[], int]:
        def once() -> int:
            jax.block_until_ready(jax.device_put(source(), target, may_alias=False))
            return n_bytes

        return once

    def piece() -> np.ndarray:
        start = int(rng.integers(max(1, len(raw) - n_bytes)))
        return raw[start : start + n_bytes]

    found = {"mapped": send(piece)}
    if "pinned_host" in {memory.kind for memory in device.addressable_memories()}:
        kind = SingleDeviceSharding(device, memory_kind="pinned_host")
        pinned = jax.block_until_ready(jax.device_put(piece(), kind))
        found["pinned"] = send(lambda: pinned)
    return found


def _on_cpu(threads: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    set_threads(threads)


def measure_bandwidths(
    folder: Path, formats: Sequence[str], threads: Sequence[int], bank_bytes: int, seconds: float
) -> Bandwidths:
    """All rates of this machine, each measured for so many seconds.

    Banks lie in `folder`; one should have more bytes than the processor's last cache. Link and
    products are measured at once for the first format, the last number of threads and the
    largest piece.

    Raises:
        NotImplementedError: a CPU or a format that ggml's products do not cover.
    """
    host: dict[str, dict[str, float]] = {format: {} for format in formats}
    link: dict[str, dict[str, float]] = {}
    at_once: dict[str, float] = {}
    bar = tqdm(desc="writing banks", leave=False, disable=None)
    banks = {f: (folder / f, f, write_bank(folder / f, f, bank_bytes)) for f in formats}
    for n_bytes in PIECES:
        for source, once in uploads(folder / formats[0], n_bytes).items():
            bar.set_description(f"link, {source}, {n_bytes} bytes")
            once()
            link.setdefault(source, {})[str(n_bytes)] = _rate(once, seconds)
    spawn = multiprocessing.get_context("spawn")
    for count in threads:
        with ProcessPoolExecutor(1, spawn, initializer=_on_cpu, initargs=(count,)) as child:
            for format, bank in banks.items():
                bar.set_description(f"host, {format}, {count} threads")
                host[format][str(count)] = child.submit(host_rate, *bank, seconds).result()
            if count == threads[-1]:
                bar.set_description("both at once")
                once = uploads(folder / formats[0], PIECES[-1])["mapped"]
                beside = child.submit(host_rate, *banks[formats[0]], 4 * seconds)
                beside_link = _rate(once, 0, lambda running=beside: not running.done())
                at_once["host"] = min(1.0, beside.result() / host[formats[0]][str(count)])
                at_once["link"] = min(1.0, beside_link / link["mapped"][str(PIECES[-1])])
    bar.close()
    return Bandwidths(*here(), host, link, at_once)


def default_thread_counts() -> list[int]:
    """Half of the processors that this process may use, and all."""
    return sorted({max(1, default_threads() // 2), default_threads()})
