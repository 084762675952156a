"""The way of an expert's bytes from host to device.

Owns what a pool asks of a link, JAX's own copy, and an emulated slower link for machines whose
device is the CPU, where a copy costs next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from pallas_kernels.ggml.ops import address_of

Raw = tuple[np.ndarray, ...]


class Upload(Protocol):
    """One expert on its way."""

    def wait(self) -> tuple[Any, ...]:
        """The expert's arrays, when all of its bytes have arrived.

        Raises:
            RuntimeError: the copy failed.
        """
        ...


class Sleeper(Protocol):
    """A clock, in seconds, that can wait."""

    def __call__(self) -> float:
        """Seconds so far."""
        ...

    def sleep(self, seconds: float) -> None:
        """Lets so many pass."""
        ...


class Link(Protocol):
    """Copies to the device, begun in the order in which they are sent."""

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds by which its uploads take their time."""
        ...

    def send(self, raw: Raw, device: Any) -> Upload:
        """Starts the copy of an expert's raw blocks to a `jax.Device`, the process's first for
        None; does not wait for it.

        Raises:
            RuntimeError: the device refused it.
        """
        ...


@dataclass(frozen=True)
class _Direct:
    arrays: tuple[jax.Array, ...]

    def wait(self) -> tuple[jax.Array, ...]:
        return jax.block_until_ready(self.arrays)


@dataclass(frozen=True)
class InPlace:
    """The upload of an expert that is computed where it lies: its addresses in the file's map."""

    raw: Raw

    def wait(self) -> tuple[np.ndarray, ...]:
        """uint32 [2] of each matrix; see `RawMatrix`."""
        return tuple(address_of(matrix) for matrix in self.raw)


class DirectLink:
    """`jax.device_put`. On a CPU it may hand out the host's own memory, without a copy."""

    clock = staticmethod(time.perf_counter)

    def send(self, raw: Raw, device: Any) -> Upload:
        """See `Link.send`."""
        return _Direct(jax.device_put(raw, device))


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


@dataclass(frozen=True)
class _Throttled:
    arrays: tuple[jax.Array, ...]
    arrives_s: float
    clock: Sleeper

    def wait(self) -> tuple[jax.Array, ...]:
        while (left_s := self.arrives_s - self.clock()) > 0:
            self.clock.sleep(left_s)
        return self.arrays


class ThrottledLink:
    """Uploads take their turn: n bytes arrive at max(now, link free) + latency + n / bandwidth.

    One occupies the link whether or not anybody waits for it, so one that nobody waits for runs
    beside the computation, and one that was wrong to start delays those behind it.
    """

    def __init__(self, gb_s: float, latency_us: float, clock: Sleeper):
        self.gb_s, self.latency_us, self.clock = gb_s, latency_us, clock
        self._free_s = 0.0

    def send(self, raw: Raw, device: Any) -> Upload:
        """See `Link.send`."""
        arrays = jax.device_put(raw, device)
        seconds = self.latency_us * 1e-6 + sum(part.nbytes for part in raw) / (self.gb_s * 1e9)
        self._free_s = max(self.clock(), self._free_s) + seconds
        return _Throttled(arrays, self._free_s, self.clock)
