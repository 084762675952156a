"""The way of an expert's bytes from host to device: JAX's own copy, none where the device is the
host, and there an emulated slower link, since a copy costs next to nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels.ggml.ops import address_of

Raw = tuple[np.ndarray, ...]
# An expert on its way: the call gives its arrays when all of its bytes have arrived, or raises a
# RuntimeError if the copy failed.
Upload = Callable[[], tuple[Any, ...]]


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Says what it is that failed, by a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{what} failed: {error}") from error


def in_place(raw: Raw) -> Upload:
    """An expert that is computed where it lies: uint32 [2] of each matrix, see `RawMatrix`."""
    return lambda: tuple(map(address_of, raw))


class Link:
    """JAX's own copy. On a CPU it may hand out the host's own memory, without a copy."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)  # seconds that uploads take

    def send(self, raw: Raw, device: Any) -> Upload:
        """Starts the copy of raw blocks to a `jax.Device`, None for the first of the process.

        It does not wait. RuntimeError if the device refuses it.
        """
        return partial(jax.block_until_ready, jax.device_put(raw, device))


class HostLink(Link):
    """To a device that is the host: the program that writes a slot reads the file's map itself.

    With a copy of JAX's before that, a small expert took four times as long.
    """

    def send(self, raw: Raw, device: Any) -> Upload:
        """See `Link.send`."""
        return lambda: raw


class ProcessorTime:
    """Seconds in which this process computes, and those in which it waits for an upload.

    Nobody sleeps: a wait is only counted, so other load on the machine does not show. It is right
    where nothing else of this process runs during a wait, as in decode. Two threads that compute at
    once count twice.
    """

    def __init__(self):
        self._waited_s = 0.0

    def __call__(self) -> float:
        """Seconds so far."""
        return time.process_time() + self._waited_s

    def sleep(self, seconds: float) -> None:
        """Counts a wait."""
        self._waited_s += seconds


class ThrottledLink(Link):
    """Uploads take their turn: n bytes arrive at max(now, link free) + latency + n / bandwidth.

    One occupies the link whether or not anybody waits for it, so one that nobody waits for runs
    beside the computation, and one that was wrong to start delays those behind it.
    """

    def __init__(self, gb_s: float, latency_us: float, clock: ProcessorTime):
        self.gb_s, self.latency_us, self.clock = gb_s, latency_us, clock
        self._free_s = 0.0

    def send(self, raw: Raw, device: Any) -> Upload:
        """See `Link.send`."""
        arrays, clock = jax.device_put(raw, device), self.clock
        seconds = self.latency_us * 1e-6 + sum(part.nbytes for part in raw) / (self.gb_s * 1e9)
        self._free_s = arrives_s = max(clock(), self._free_s) + seconds

        def wait() -> tuple[jax.Array, ...]:
            while (left_s := arrives_s - clock()) > 0:
                clock.sleep(left_s)
            return arrays

        return wait
