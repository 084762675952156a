"""What this machine has free: memory of host and device, and space on a disk.

Owns the questions, and the budget of a pool for which there is no other rule.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import psutil


def mib(n_bytes: float) -> str:
    """A number of bytes for people: "12.3 MiB", from 1 GiB on "4.56 GiB"."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def host_bytes() -> int:
    """Host memory that processes can still get, in bytes."""
    return psutil.virtual_memory().available


def device_bytes() -> int:
    """Memory that arrays can still get on the first device, in bytes; the host's on a CPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return host_bytes()
    return stats["bytes_limit"] - stats["bytes_in_use"]


def workers_device_bytes() -> int:
    """`device_bytes` of a process yet to be started; this one must not take a GPU from it."""
    if shutil.which("nvidia-smi") is None:
        return host_bytes()
    code = "from hobbit_jax import resources; print(resources.device_bytes())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(asked.stdout.split()[-1])


def roomy_pool_bytes(all_bytes: int) -> int | None:
    """Budget of a pool whose size does not matter: None, for all experts, or half of the memory.

    Logits are the same bits at every budget, so this is for calibration and native logits of a
    model that may not fit the device.
    """
    half = device_bytes() // 2
    return None if all_bytes <= half else half


def existing(path: Path) -> Path:
    """`path` or, as long as it is not there, the nearest folder above it that is."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on or, as long as it is not there, will be on."""
    return shutil.disk_usage(existing(path)).free
