"""The dense case: one quantised matrix on all rows (attention projections, the head).

The kernel is the experts' own: matrices of several blocks are a bank, and a block is its slot.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import Implementation, choose
from pallas_kernels.formats import Format, Planes, get_format
from pallas_kernels.ggml import ops as ggml
from pallas_kernels.matmul_triton import Items, check_shape, grouped_matmul, item_rows

# Weights that XLA unpacks to float32 at a time: 64 MiB, twice Qwen3-30B-A3B's largest projection.
MAX_UNPACKED = 1 << 24


def implementation_for(
    format_name: str, rows: int, columns: int, implementation: Implementation = None
) -> str:
    """What `implementation` comes to for a matrix [rows, columns] on this process's device.

    Raises:
        NotImplementedError, ValueError: the one asked for cannot do this, and why.
    """
    checks = {
        "triton": lambda: check_shape(format_name, rows, columns),
        **ggml.checks(format_name),
    }
    return choose(implementation, checks)


def linear(
    x: jax.Array,
    planes: Planes | ggml.RawMatrix,
    format_name: str,
    implementation: Implementation = None,
    index: jax.Array | None = None,
) -> jax.Array:
    """x [..., K], float32, times the transpose of a matrix [N, K]: float32 [..., N].

    Raw blocks are computed by "ggml" or "ggml_f32", planes by the others, as in `expert_ffn`. With
    an `index`, int32 scalar, planes are those of several matrices, [n, N, ...]. The kernels read
    the one at `index` where it lies: a slice would be copied for every product.

    Raises:
        NotImplementedError, ValueError: as for `expert_ffn`.
    """
    if isinstance(planes, ggml.RawMatrix):
        return ggml.linear(x, planes, format_name, implementation or "ggml")
    format = get_format(format_name)
    rows, columns = next(iter(planes.values())).shape[-2], x.shape[-1]
    if implementation is None and jax.devices()[0].platform == "cpu":
        implementation = "xla"
    chosen = implementation_for(format_name, rows, columns, implementation)
    if chosen == "xla":
        if index is not None:
            planes = {name: plane[index] for name, plane in planes.items()}
        return _xla_linear(x, planes, format, rows)
    if index is None:
        planes = {name: plane[None] for name, plane in planes.items()}
    at = jnp.int32(0) if index is None else index
    return triton_linear(x, planes, format_name, at, interpret=chosen == "interpret")


def _xla_linear(x: jax.Array, planes: Planes, format: Format, rows: int) -> jax.Array:
    """`linear` by unpacking, some rows at a time: a head of 152k rows would fill 1.2 GB at once."""
    step = max(1, min(rows, MAX_UNPACKED // x.shape[-1]))
    if step == rows:
        return jnp.einsum("...k,nk->...n", x, format.unpack(planes))

    def some_rows(i: jax.Array, y: jax.Array) -> jax.Array:
        # The last step goes back a little, over rows that it computes again.
        start = jnp.minimum(i * step, rows - step)
        part = {n: jax.lax.dynamic_slice_in_dim(p, start, step) for n, p in planes.items()}
        part_N = jnp.einsum("...k,nk->...n", x, format.unpack(part))
        return jax.lax.dynamic_update_slice_in_dim(y, part_N, start, axis=-1)

    y = jnp.zeros((*x.shape[:-1], rows), jnp.float32)
    return jax.lax.fori_loop(0, -(-rows // step), some_rows, y)


def triton_linear(
    x: jax.Array, planes: Planes, format_name: str, index: jax.Array, interpret: bool = False
) -> jax.Array:
    """`linear` in one kernel launch; planes have a leading axis, as with an `index`."""
    x_TK = x.reshape(-1, x.shape[-1])
    tokens, rows = len(x_TK), next(iter(planes.values())).shape[1]
    width = item_rows(tokens, (format_name,))
    row_IC = np.arange(-(-tokens // width) * width, dtype=np.int32).reshape(-1, width)
    row_IC = jnp.asarray(np.where(row_IC < tokens, row_IC, row_IC[:, :1]))
    items = Items(jnp.full(len(row_IC), index), row_IC, row_IC, jnp.full(1, len(row_IC)))
    y_TN = jax.ShapeDtypeStruct((tokens, rows), jnp.float32)
    y_TN = grouped_matmul(x_TK, y_TN, (planes,), (format_name,), items, interpret=interpret)
    return y_TN.reshape(*x.shape[:-1], rows)
