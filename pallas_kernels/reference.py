"""The reference expert op in plain XLA: unpack an expert, then multiply.

Owns the meaning of "run these experts on these tokens", and the types in which it is said; every
kernel is tested against it. Called through `expert_ffn.py`. All arithmetic is float32.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import get_format

ExpertFunction = Literal["swiglu", "clipped_swiglu", "geglu"]


class Signature(NamedTuple):
    """The formats of one expert's three matrices; experts of equal signature share a bank."""

    gate: str
    up: str
    down: str

    def __str__(self) -> str:
        return "/".join(dict.fromkeys(self))


class Bank(NamedTuple):
    """All slots of one signature: planes with a leading slot axis, or a `RawMatrix` for "ggml"."""

    gate: Any  # unpacks to [S, F, D]
    up: Any  # [S, F, D]
    down: Any  # [S, D, F]

    @property
    def gate_rows(self) -> int:
        """F, of a bank of planes."""
        return next(iter(self.gate.values())).shape[1]


class Work(NamedTuple):
    """Which slots run on which assignments.

    An assignment a = t * K + k is the k-th choice of token t. An *item* is up to C
    assignments of the expert in one slot; an expert of more has several items. A
    short item is padded by repeating its first assignment, which is computed again
    and written to the same place: nothing needs a mask.
    """

    slot_I: jax.Array  # int32
    assignment_IC: jax.Array  # int32
    # int32 scalar: items from there on are not computed; one program serves every number of them.
    count: jax.Array


def items(
    assignments: Iterable[tuple[int, np.ndarray]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slots int32 [I] and assignments int32 [I, `width`] of pairs of a slot and its assignments."""
    slot_I, rows = [], []
    for slot, assignment_R in assignments:
        for start in range(0, len(assignment_R), width):
            part = assignment_R[start : start + width]
            rows.append(np.pad(part, (0, width - len(part)), constant_values=part[0]))
            slot_I.append(slot)
    return np.asarray(slot_I, np.int32), np.asarray(rows, np.int32).reshape(-1, width)


class Epilogue(NamedTuple):
    """What becomes of the products with an expert's matrices: they are scaled, then biased.

    Float32. Of all experts of all layers, each array has an axis of L * E rows before its own.
    Biases are None where a model has none.
    """

    scale_3: Any  # of gate's, up's and down's products
    gate_F: Any = None
    up_F: Any = None
    down_D: Any = None

    def of_row(self, row: Any) -> "Epilogue":
        """That of one expert of all."""
        return jax.tree.map(lambda array: array[row], self)


class Epilogues(NamedTuple):
    """Those of all experts, and the row of the one that each assignment takes."""

    every: Epilogue
    row_A: Any  # int32

    @classmethod
    def of(cls, every: Epilogue | None, row_A: Any) -> "Epilogues | None":
        """None where there are none."""
        return None if every is None else cls(every, row_A)


def gated(
    function: ExpertFunction, gate: jax.Array, up: jax.Array, epilogue: Epilogue | None = None
) -> jax.Array:
    """The product between an expert's matrices, elementwise.

    swiglu: silu(gate) * up. geglu: the same with GELU in its tanh form. clipped_swiglu (gpt-oss):
    gate is clipped from above and up from both sides, then gate * sigmoid(1.702 * gate) * (up + 1).

    Source: llama.cpp, ggml/src/ggml-cpu/ops.cpp (swiglu_oai, geglu).
    """
    if epilogue is not None:
        gate, up = gate * epilogue.scale_3[0], up * epilogue.scale_3[1]
        if epilogue.gate_F is not None:
            gate, up = gate + epilogue.gate_F[None, :], up + epilogue.up_F[None, :]
    if function == "swiglu":
        return jax.nn.silu(gate) * up
    if function == "geglu":
        return jax.nn.gelu(gate, approximate=True) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def run_expert(
    x_CD: jax.Array,
    matrices: Iterable[jax.Array],
    function: ExpertFunction,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """One expert, float32 [C, D]; `matrices` are gate and up [F, D] and down [D, F], float32."""
    gate_FD, up_FD, down_DF = matrices
    gate_CF, up_CF = _product(x_CD, gate_FD), _product(x_CD, up_FD)
    y_CD = _product(gated(function, gate_CF, up_CF, epilogue), down_DF)
    if epilogue is None:
        return y_CD
    y_CD = y_CD * epilogue.scale_3[2]
    return y_CD if epilogue.down_D is None else y_CD + epilogue.down_D[None, :]


def _product(x_CK: jax.Array, w_NP: jax.Array) -> jax.Array:
    """`x_CK @ w_NK.T`, said so that XLA on a CPU does not transpose what it unpacks: 5 times faster
    for one row. P are the K columns of w, filled up to whole blocks."""
    return jnp.einsum("cp,np->cn", filled_up(x_CK, w_NP.shape[1]), w_NP)


def filled_up(x_TK: jax.Array, columns: int) -> jax.Array:
    """x with columns of zeros behind its own, [T, columns]."""
    missing = columns - x_TK.shape[1]
    return jnp.pad(x_TK, ((0, 0), (0, missing))) if missing else x_TK


def expert_ffn(
    x_TD: jax.Array,
    y_AD: jax.Array,
    weight_A: jax.Array,
    bank: Bank,
    signature: Signature,
    work: Work,
    function: ExpertFunction = "swiglu",
    epilogues: Epilogues | None = None,
) -> jax.Array:
    """The op of `pallas_kernels.expert_ffn`, one item after another."""
    k = y_AD.shape[0] // x_TD.shape[0]
    formats = [get_format(name) for name in signature]

    def one_item(item: jax.Array, y_AD: jax.Array) -> jax.Array:
        assignment_C, slot = work.assignment_IC[item], work.slot_I[item]
        expert = jax.tree.map(lambda plane: plane[slot], bank)
        matrices = (format.unpack(planes) for format, planes in zip(formats, expert, strict=True))
        epilogue = None
        if epilogues is not None:
            epilogue = epilogues.every.of_row(epilogues.row_A[assignment_C[0]])
        y_CD = run_expert(x_TD[assignment_C // k], matrices, function, epilogue)
        return y_AD.at[assignment_C].set(y_CD * weight_A[assignment_C][:, None])

    return jax.lax.fori_loop(jnp.int32(0), work.count, one_item, y_AD)
