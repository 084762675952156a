"""What the kernels are measured against: bfloat16 experts, resident, in JAX and in PyTorch.

The most favourable case for the rivals: weights in the precision that their matrix units take,
tokens sorted by expert beforehand, one grouped product per matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def sorted_assignments(ids_TK: np.ndarray, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Assignments in the order of their experts, int32 [A], and assignments per expert, [E]."""
    flat_A = ids_TK.reshape(-1)
    order_A = np.argsort(flat_A, kind="stable").astype(np.int32)
    return order_A, np.bincount(flat_A, minlength=n_experts).astype(np.int32)


def jax_bf16(x_TD, gate_EFD, up_EFD, down_EDF, order_A, sizes_E, k: int) -> jax.Array:
    """float32 [A, D], in the order of `order_A`, by XLA's ragged dot."""
    contract_last = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])

    def product(x_AK, w_ENK):
        return jax.lax.ragged_dot_general(
            x_AK, w_ENK, sizes_E, contract_last, preferred_element_type=jnp.float32
        )

    x_AD = x_TD.astype(jnp.bfloat16)[order_A // k]
    hidden_AF = jax.nn.silu(product(x_AD, gate_EFD)) * product(x_AD, up_EFD)
    return product(hidden_AF.astype(jnp.bfloat16), down_EDF)


def torch_bf16(
    x_TD: np.ndarray, ids_TK: np.ndarray, d_expert: int, n_experts: int, rotations: int
) -> Callable[[int], None]:
    """A function of n that runs n rounds of `rotations` layers and waits for them.

    On a GPU a round is one CUDA graph of grouped products, so that launches cost PyTorch
    nothing; on a CPU it is a loop over experts.
    """
    import torch  # pyright: ignore[reportMissingImports]

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    d_model, k = x_TD.shape[1], ids_TK.shape[1]
    order_A, sizes_E = sorted_assignments(ids_TK, n_experts)
    token_A = torch.from_numpy(order_A.astype(np.int64) // k).to(device)
    x = torch.from_numpy(np.array(x_TD)).to(device, torch.bfloat16)

    def weights(rows: int, columns: int):
        size = (n_experts, rows, columns)
        return 0.02 * torch.randn(size, dtype=torch.bfloat16, device=device)

    gate, up = weights(d_expert, d_model), weights(d_expert, d_model)
    down = weights(d_model, d_expert)
    sizes = [np.roll(sizes_E, i * k) for i in range(rotations)]
    ends = [torch.from_numpy(np.cumsum(s).astype(np.int32)).to(device) for s in sizes]
    silu = torch.nn.functional.silu

    def grouped(i: int) -> None:
        def product(x_AK, w_ENK):
            multiply = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
            return multiply(x_AK, w_ENK.transpose(1, 2), ends[i])

        x_AD = x[token_A]
        product(silu(product(x_AD, gate)) * product(x_AD, up), down)

    def one_by_one(i: int) -> None:
        x_AD, stops = x[token_A], np.cumsum(sizes[i])
        for expert in np.flatnonzero(sizes[i]):
            part = x_AD[stops[expert] - sizes[i][expert] : stops[expert]]
            hidden = silu(part @ gate[expert].T) * (part @ up[expert].T)
            torch.matmul(hidden, down[expert].T)

    if not on_gpu:

        @torch.no_grad()
        def run(n: int) -> None:
            for i in range(n * rotations):
                one_by_one(i % rotations)

        return run

    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            grouped(0)  # libraries are set up outside the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(rotations):
                grouped(i)

    def replay(n: int) -> None:
        for _ in range(n):
            graph.replay()
        torch.cuda.synchronize()

    return replay
