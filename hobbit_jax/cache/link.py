"""The way of an expert's bytes from host to device.

Owns what a pool asks of a link, and JAX's own copy. Tests have a slower link in virtual time, where
an upload that nobody waits for runs beside the computation.
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
