"""What this machine has free: memory of host and device, and space on a disk.

Owns the three questions and the refusal of what does not fit, so that nothing is computed for a
file that cannot be written.
"""

from __future__ import annotations

import errno
import shutil
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


def disk_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on or, as long as it is not there, will be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_room(path: Path, wanted_bytes: int) -> None:
    """Refuses to begin what will not fit on the disk of `path`.

    Raises:
        OSError: it will not; says path, wanted and free bytes.
    """
    free_bytes = disk_bytes(path)
    if wanted_bytes > free_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{path} wants {wanted_bytes} bytes ({mib(wanted_bytes)}), and {free_bytes} "
            f"({mib(free_bytes)}) are free on its disk; free some or name a folder elsewhere",
        )
