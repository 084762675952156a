"""The expert op: a layer's selected experts on their tokens, straight from the slots.

Owns the choice of an implementation, and how the gated pair and the down matrix follow each other.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.backends import Implementation, choose
from pallas_kernels.ggml import ops as ggml
from pallas_kernels.matmul_triton import Items, check_shape, grouped_matmul
from pallas_kernels.reference import Bank, Epilogues, ExpertFunction, Signature, Work


def implementation_for(
    signature: Signature,
    d_model: int,
    d_expert: int,
    implementation: Implementation = None,
    platform: str | None = None,
    function: ExpertFunction = "swiglu",
    has_epilogue: bool = False,
) -> str:
    """What `implementation` comes to on this process's device, or on its CPU for `platform` "cpu".

    None takes the fastest that fits.

    Raises:
        NotImplementedError, ValueError: the one asked for cannot do this, and why.
    """

    def check_triton() -> None:
        if function != "swiglu":
            raise NotImplementedError(
                f"the Triton kernels compute the expert function swiglu, and this model has "
                f"{function}"
            )
        if has_epilogue:
            raise NotImplementedError(
                "the Triton kernels know no scales and biases of experts' matrices, which this "
                "model has; take 'xla'"
            )
        for name in (signature.gate, signature.up):
            check_shape(name, d_expert, d_model)
        check_shape(signature.down, d_model, d_expert)

    checks = {"triton": check_triton, **ggml.checks(*signature, platform=platform)}
    return choose(implementation, checks, platform)


def expert_ffn(
    x_TD: jax.Array,
    y_AD: jax.Array,
    weight_A: jax.Array,
    bank: Bank,
    signature: Signature,
    work: Work,
    implementation: Implementation = None,
    function: ExpertFunction = "swiglu",
    epilogues: Epilogues | None = None,
) -> jax.Array:
    """Runs experts on their tokens, each times its routing weight; returns `y_AD`.

    For every assignment a = t * K + k in `work`, with e the expert in its slot:
    y[a] = weight[a] * down_e(gated(gate_e x[t], up_e x[t])), each product with its epilogue.

    A row's result depends neither on the slot that holds its expert nor on the other
    items, so it is the same bits for every size of the pool.

    Args:
        x_TD: float32.
        y_AD: float32, A = T * K; donate it. Rows that `work` does not list keep their values,
            so that several banks can serve one layer in turn.
        weight_A: float32.
        bank: all slots of `signature`, the formats of gate, up and down.
        work: slots and assignments; data, not compiled in.
        implementation: "xla" (float32 throughout), "ggml" (CPUs, on a bank of `RawMatrix`; rounds
            as `ggml/ops.py` says), "ggml_f32" (the same without rounding), "triton" (NVIDIA GPUs;
            rounds as `matmul_triton.py` says), "interpret" (the same kernels, anywhere, slowly), or
            None.
        function: see `reference.gated`.
        epilogues: of the three matrices, where the model has scales (NVFP4) or biases of them.

    Raises:
        NotImplementedError: the implementation asked for does not cover this.
        ValueError: there is no such implementation, or none on this device.
    """
    if isinstance(bank.gate, ggml.RawMatrix):
        chosen = implementation or "ggml"
        if chosen not in ggml.ON_BLOCKS:
            raise ValueError(f"a bank of raw blocks is for ggml, and {chosen!r} was asked")
        return ggml.expert_ffn(
            x_TD, y_AD, weight_A, bank, signature, work, function, epilogues, chosen
        )
    if implementation in ggml.ON_BLOCKS:
        raise ValueError(
            f"{implementation!r} computes on a bank of raw blocks, and this one holds planes"
        )
    if implementation is None and jax.devices()[0].platform == "cpu":
        implementation = "xla"
    sizes, has_epilogue = (x_TD.shape[1], bank.gate_rows), epilogues is not None
    chosen = implementation_for(signature, *sizes, implementation, None, function, has_epilogue)
    if chosen == "xla":
        return reference.expert_ffn(
            x_TD, y_AD, weight_A, bank, signature, work, function, epilogues
        )
    interpret = chosen == "interpret"
    return triton_expert_ffn(x_TD, y_AD, weight_A, bank, signature, work, interpret)


def triton_expert_ffn(
    x_TD: jax.Array,
    y_AD: jax.Array,
    weight_A: jax.Array,
    bank: Bank,
    signature: Signature,
    work: Work,
    interpret: bool = False,
) -> jax.Array:
    """`expert_ffn` in two kernel launches; what lies between is a row of rounding in XLA."""
    k = y_AD.shape[0] // x_TD.shape[0]
    n_items, width = work.assignment_IC.shape
    hidden_IC = jnp.arange(n_items * width, dtype=jnp.int32).reshape(n_items, width)
    count_1 = work.count.reshape(1)
    hidden = jax.ShapeDtypeStruct((n_items * width, bank.gate_rows), jnp.float32)
    items = Items(work.slot_I, work.assignment_IC // k, hidden_IC, count_1)
    hidden_HF = grouped_matmul(
        x_TD, hidden, (bank.gate, bank.up), signature[:2], items, interpret=interpret
    )
    items = Items(work.slot_I, hidden_IC, work.assignment_IC, count_1)
    return grouped_matmul(
        hidden_HF, y_AD, (bank.down,), (signature.down,), items, weight_A, interpret
    )
