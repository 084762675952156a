"""Resident memory of a process, its own told apart from the pages of files.

Owns what is read of /proc and how peaks are found. Linux counts a process's highest resident size
exactly (VmHWM), but not the highest of its parts, so those are sampled; a peak shorter than the
period can be missed there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 0.02

_PARTS = ("VmRSS", "RssAnon", "RssFile")  # in the order of `ResidentBytes`
_HIGHEST_TOTAL = "VmHWM"


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes of one process in memory.

    `anonymous` has no file behind it: the heap, device buffers on a CPU, copies of weights. `file`
    are pages of mapped files: the model's and the libraries'. Memory shared with other processes
    is in `total` only.
    """

    total: int
    anonymous: int
    file: int


def _status(pid: int) -> dict[str, int]:
    """Bytes by field of /proc/PID/status; empty without /proc, such a process, or its memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines)
    wanted = {*_PARTS, _HIGHEST_TOTAL}
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if name in wanted}


def read_resident(pid: int) -> ResidentBytes | None:
    """Of a process now; None where it cannot be read."""
    status = _status(pid)
    return ResidentBytes(*(status[name] for name in _PARTS)) if status else None


class PeakWatch:
    """Samples a process until `stop`."""

    def __init__(self, pid: int):
        self._pid = pid
        self._highest: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        for name, value in _status(self._pid).items():
            self._highest[name] = max(value, self._highest.get(name, 0))

    def stop(self) -> ResidentBytes | None:
        """The highest bytes, each part for itself; None if no sample could be taken."""
        self._ended.set()
        self._thread.join()
        self._sample()
        found = self._highest
        if not found:
            return None
        return ResidentBytes(found[_HIGHEST_TOTAL], found["RssAnon"], found["RssFile"])
