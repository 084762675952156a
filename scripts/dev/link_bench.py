"""Measures how fast an expert's bytes reach the device, from memory of either kind.

    python scripts/dev/link_bench.py [--expert_bytes 2654208]

The store hands out NumPy views of a memory map, which a driver copies through pinned memory of its
own; arrays in the device's pinned host memory go straight. On a CPU the figures are those of a copy
within memory. `scripts/plan.py --gpu` takes measured GB/s.
"""

import json
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import SingleDeviceSharding

from hobbit_jax import cli
from hobbit_jax.statistics import spread

PINNED = "pinned_host"
_EXPERT_BYTES = flags.DEFINE_integer(
    "expert_bytes", 2_654_208, "Bytes of an upload; an expert of Qwen3-30B-A3B by default.", 1
)
_TURNS = flags.DEFINE_integer("turns", 24, "Number of uploads from each source.", 1)


def upload_rates(n_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """GB/s (1e9 bytes) of uploads of `n_bytes`, sources in turns; the first turn warms up."""
    device = jax.local_devices()[0]
    host = np.arange(n_bytes, dtype=np.uint8)
    sources: dict[str, Any] = {"numpy": host}
    if PINNED in {memory.kind for memory in device.addressable_memories()}:
        pinned = SingleDeviceSharding(device, memory_kind=PINNED)
        sources[PINNED] = jax.block_until_ready(jax.device_put(host, pinned))
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(repeats + 1):
        for name, source in sources.items():
            began_s = time.perf_counter()
            jax.block_until_ready(
                jax.device_put(source, SingleDeviceSharding(device), may_alias=False)
            )
            seconds[name].append(time.perf_counter() - began_s)
    return [
        {"source": name, "bytes": n_bytes, "gb_s": spread(n_bytes / 1e9 / np.array(taken[1:]))}
        for name, taken in seconds.items()
    ]


def main(_):
    for row in upload_rates(_EXPERT_BYTES.value, _TURNS.value):
        print(json.dumps(row))


if __name__ == "__main__":
    cli.run(main)
