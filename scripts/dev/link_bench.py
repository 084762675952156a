"""How fast an expert's bytes reach the device, from memory of either kind.

Owns the measurement of the real link, which the planner's constants and every bound want. What the
store hands out is a NumPy view of a memory map, which a driver copies through pinned memory of its
own; arrays in the device's pinned host memory go straight. On a CPU the figures are those of a copy
within memory.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from hobbit_jax.statistics import spread

PINNED = "pinned_host"


def upload_rates(n_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """GB/s (1e9 bytes) of uploads of `n_bytes`, sources in turns; the first turn warms up.

    Returns:
        One row a source, "numpy" and, where the device has such memory, "pinned_host", with the
        spread of the turns.
    """
    device = jax.local_devices()[0]
    host = np.arange(n_bytes, dtype=np.uint8)
    sources: dict[str, Any] = {"numpy": host}
    if PINNED in {memory.kind for memory in device.addressable_memories()}:
        pinned = SingleDeviceSharding(device, memory_kind=PINNED)
        sources[PINNED] = jax.block_until_ready(jax.device_put(host, pinned))
    target = SingleDeviceSharding(device)
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(repeats + 1):
        for name, source in sources.items():
            began_s = time.perf_counter()
            jax.block_until_ready(jax.device_put(source, target, may_alias=False))
            seconds[name].append(time.perf_counter() - began_s)
    rows = []
    for name, taken in seconds.items():
        gb_s = spread(n_bytes / 1e9 / np.asarray(taken[1:]))
        rows.append({"source": name, "bytes": n_bytes, "gb_s": gb_s})
    return rows
