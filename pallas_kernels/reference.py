"""The reference expert op in plain XLA: unpack an expert, then multiply.

Owns the meaning of "run these experts on these tokens", and the types in which it is said; every
kernel is tested against it. Called through `expert_ffn.py`. All arithmetic is float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formats import get_format
from pallas_kernels.ggml.ops import RawMatrix
from pallas_kernels.materialize import apart

Planes = dict[str, jax.Array]


class Signature(NamedTuple):
    """The formats of one expert's three matrices; experts of equal signature share a bank."""

    gate: str
    up: str
    down: str

    def __str__(self) -> str:
        return "/".join(dict.fromkeys(self))


class Bank(NamedTuple):
    """All slots of one signature: planes with a leading slot axis, or raw blocks for "ggml".

    gate and up unpack to [S, F, D], down to [S, D, F].
    """

    # Planes or a RawMatrix; which of the two an implementation knows by the bank that it made.
    gate: Any
    up: Any
    down: Any

    @property
    def gate_rows(self) -> int:
        """F."""
        if isinstance(self.gate, RawMatrix):
            return self.gate.rows
        return next(iter(self.gate.values())).shape[1]


class Work(NamedTuple):
    """Which slots run on which assignments.

    An assignment a = t * K + k is the k-th choice of token t. An *item* is up to C
    assignments of the expert in one slot; an expert of more has several items. A
    short item is padded by repeating its first assignment, which is computed again
    and written to the same place: nothing needs a mask.

    Attributes:
        slot_I: int32 [I].
        assignment_IC: int32 [I, C].
        count: int32 scalar; items from there on are not computed, so one compiled
            program serves every number of them.
    """

    slot_I: jax.Array
    assignment_IC: jax.Array
    count: jax.Array


def swiglu(
    x_CD: jax.Array,
    gate_FD: jax.Array,
    up_FD: jax.Array,
    down_DF: jax.Array,
    factor_C3: jax.Array | None = None,
):
    """One expert, float32 [C, D]: down(silu(gate x) * up x), each product times its factor."""
    gated_CF, up_CF = _product(x_CD, gate_FD), _product(x_CD, up_FD)
    if factor_C3 is None:
        return _product(jax.nn.silu(gated_CF) * up_CF, down_DF)
    gate_C1, up_C1, down_C1 = jnp.split(factor_C3, 3, axis=1)
    hidden_CF = jax.nn.silu(gate_C1 * gated_CF) * (up_C1 * up_CF)
    return down_C1 * _product(hidden_CF, down_DF)


def _product(x_CK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """`x_CK @ w_NK.T`, said so that XLA on a CPU does not transpose what it unpacks: 5 times faster
    for one row. The rows of w may be filled up to a whole block."""
    return jnp.einsum("ck,nk->cn", filled_up(x_CK, w_NK.shape[1]), w_NK)


def filled_up(x_TK: jax.Array, columns: int) -> jax.Array:
    """x with columns of zeros behind its own, [T, columns]."""
    missing = columns - x_TK.shape[1]
    return jnp.pad(x_TK, ((0, 0), (0, missing))) if missing else x_TK


def gather_slots(bank: Bank, work: Work) -> tuple[Bank, Work]:
    """Copies the slots of `work` into a bank of their own, and says where they are now.

    An XLA program over such a copy does not know how many slots the pool has, so that
    it is compiled once for every budget.
    """
    gathered = jax.tree.map(lambda plane: plane[work.slot_I], bank)
    return gathered, work._replace(slot_I=jnp.arange(len(work.slot_I), dtype=jnp.int32))


def expert_ffn(
    x_TD: jax.Array,
    y_AD: jax.Array,
    weight_A: jax.Array,
    bank: Bank,
    signature: Signature,
    work: Work,
) -> jax.Array:
    """The op of `pallas_kernels.expert_ffn`, one item after another."""
    k = y_AD.shape[0] // x_TD.shape[0]
    formats = [get_format(name) for name in signature]

    def one_item(item: jax.Array, y_AD: jax.Array) -> jax.Array:
        assignment_C, slot = work.assignment_IC[item], work.slot_I[item]
        expert = apart(lambda slot: jax.tree.map(lambda plane: plane[slot], bank), slot)
        matrices = (format.unpack(planes) for format, planes in zip(formats, expert, strict=True))
        x_CD, factors = x_TD[assignment_C // k], weight_A[assignment_C]
        if weight_A.ndim == 2:
            y_CD = swiglu(x_CD, *matrices, factors)
        else:
            y_CD = swiglu(x_CD, *matrices) * factors[:, None]
        return y_AD.at[assignment_C].set(y_CD)

    return jax.lax.fori_loop(jnp.int32(0), work.count, one_item, y_AD)
