"""Slices that are written to memory before they are read, where XLA would rather not.

Owns one trick. XLA's CPU backend fuses a slice (an expert's slot, a layer of a stack, rows of a
matrix) into the loop that unpacks it, past any optimisation barrier; the loop then computes a place
in the whole array for every weight and is 4 to 7 times slower than over a slice of its own. What a
conditional returns is always memory. Other backends get the plain slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


# Smaller slices are left to XLA: a conditional takes longer to compile than they to unpack.
_LEAST_BYTES = 1 << 18


def apart(take: Callable[[jax.Array], Tree], index: jax.Array | int) -> Tree:
    """`take(index)`: the same arrays, on a CPU in buffers of their own. `index` is 0 or more."""
    index = jnp.asarray(index)
    shapes = jax.eval_shape(take, index)
    if sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes)) < _LEAST_BYTES:
        return take(index)

    def never(index: jax.Array) -> Tree:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def on_cpu(index: jax.Array) -> Tree:
        return jax.lax.cond(index >= 0, take, never, index)

    return jax.lax.platform_dependent(index, cpu=on_cpu, default=take)
