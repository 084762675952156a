"""The reference expert op in plain XLA: unpack an expert, then multiply.

Owns the meaning of "run these experts on these tokens"; every kernel is tested
against it. Called by `hobbit_jax/moe.py`. All arithmetic is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formats import get_format

Planes = dict[str, jax.Array]


class Signature(NamedTuple):
    """The formats of one expert's three matrices; experts of equal signature share a bank."""

    gate: str
    up: str
    down: str

    def __str__(self) -> str:
        return "/".join(dict.fromkeys(self))


class Bank(NamedTuple):
    """All slots of one signature: planes with a leading slot axis.

    gate and up unpack to [S, F, D], down to [S, D, F].
    """

    gate: Planes
    up: Planes
    down: Planes


def expert_ffn(x_CD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array):
    """SwiGLU of one expert, float32 [C, D]: down(silu(gate x) * up x)."""
    hidden_CF = jax.nn.silu(x_CD @ gate_FD.T) * (x_CD @ up_FD.T)
    return hidden_CF @ down_DF.T


def gather_slots(bank: Bank, slots_G: jax.Array) -> Bank:
    """Copies slots `slots_G` of a bank into a bank of G slots, in that order."""
    return jax.tree.map(lambda plane: plane[slots_G], bank)


def run_experts(
    x_TD: jax.Array,
    y_AD: jax.Array,
    experts: Bank,
    signature: Signature,
    assignments_GC: jax.Array,
    n_groups: jax.Array,
) -> jax.Array:
    """Runs G gathered experts on their tokens and writes the results into `y_AD`.

    An assignment a = t * K + k is the k-th choice of token t. Row g of
    `assignments_GC` lists those of expert g, padded with A (= T * K), which is
    read as a zero row and written nowhere. Groups from `n_groups` on (a traced
    int32) are not computed, so one compiled program serves every number of
    groups, and a row's result depends neither on the slot that held its expert
    nor on the other groups.

    Returns:
        y_AD, float32 [T * K, D], with the listed rows set (not yet weighted).
    """
    n_assignments, tokens = y_AD.shape[0], x_TD.shape[0]
    k = n_assignments // tokens
    formats = [get_format(name) for name in signature]

    def one_expert(group: jax.Array, y_AD: jax.Array) -> jax.Array:
        assignments_C = assignments_GC[group]
        x_CD = jnp.take(x_TD, assignments_C // k, axis=0, mode="fill", fill_value=0)
        gate_FD, up_FD, down_DF = (
            format.unpack({name: plane[group] for name, plane in planes.items()})
            for format, planes in zip(formats, experts, strict=True)
        )
        y_CD = expert_ffn(x_CD, gate_FD, up_FD, down_DF)
        return y_AD.at[assignments_C].set(y_CD, mode="drop")

    return jax.lax.fori_loop(jnp.int32(0), n_groups, one_expert, y_AD)
