"""What a measurement ran on and with, for its record."""

import contextlib
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

REPORTED_PACKAGES = (
    "jax", "jaxlib", "flax", "numpy", "numba", "libggml-python", "gguf", "tokenizers",
)  # fmt: skip


@functools.cache
def machine() -> dict[str, Any]:
    """The fields of a `Record` that say what this process runs on and with, as of its first call.

    A long study runs the code that it started with, whatever the checkout becomes meanwhile.
    """
    device = jax.devices()[0]
    kind = processor_name() if device.platform == "cpu" else device.device_kind
    return {
        "revision": git_revision(),
        "device": f"{device.platform}: {kind}",
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in REPORTED_PACKAGES},
        },
    }


def git_revision() -> str | None:
    """The checkout's commit, with "+dirty" for uncommitted changes; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor_name() -> str:
    """The model of this machine's CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """None where the package is missing, as it may be on a machine that only runs kernels."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
