"""Peaks of a process's resident memory, its own told apart from the pages of files, by samples."""

import threading
from dataclasses import dataclass

import psutil

PERIOD_S = 0.02


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes of one process in memory."""

    total: int
    anonymous: int  # without a file behind it: the heap, device buffers on a CPU
    file: int  # of mapped files (the model's, libraries'), and memory shared with other processes


def read_resident(pid: int) -> ResidentBytes | None:
    """Of a process now; None of one that is gone, and where the parts are not told (not Linux)."""
    try:
        found = psutil.Process(pid).memory_info()
        return ResidentBytes(found.rss, found.rss - found.shared, found.shared)
    except (psutil.Error, AttributeError):
        return None


class PeakWatch:
    """Samples a process until `stop`."""

    def __init__(self, pid: int):
        self._pid = pid
        self._highest = ResidentBytes(0, 0, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        ended = False
        while not ended:  # and once more after the end
            ended = self._ended.wait(PERIOD_S)
            if (now := read_resident(self._pid)) is not None:
                pairs = zip(vars(now).values(), vars(self._highest).values(), strict=True)
                self._highest = ResidentBytes(*map(max, pairs))

    def stop(self) -> ResidentBytes | None:
        """The highest bytes, each part for itself; None if no sample could be taken."""
        self._ended.set()
        self._thread.join()
        return self._highest if self._highest.total else None
