"""Parts of every model: a matrix in its GGUF format, a norm, a gated FFN, embedding and head.

All arithmetic outside the matrix products is float32. A `BlockWeights` gives a block's parts by
role: from a file (`loading.py`), or fresh ones for training.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.models.config import ModelConfig
from pallas_kernels.backends import Implementation
from pallas_kernels.formats import get_format
from pallas_kernels.ggml import ops as ggml
from pallas_kernels.ggml.ops import RawMatrix
from pallas_kernels.linear import linear
from pallas_kernels.reference import ExpertFunction, gated


class Stacked(nnx.Variable):
    """A plane of one matrix in each of several blocks, [n, N, ...], which kernels read in place."""


class Place(nnx.Variable):
    """Which of the matrices in `Stacked` planes is meant, int32 scalar."""


class Linear(nnx.Module):
    """A matrix W [N, K] in its GGUF format, as planes or raw blocks.

    y = x @ W.T * scale + bias in float32; both may be absent. With `in_stack` the planes are kept
    as a stack of one, to which `LayerStack` adds those of the other blocks.
    """

    def __init__(
        self,
        format_name: str,
        planes: dict[str, jax.Array] | RawMatrix,
        implementation: Implementation = None,
        bias_N: jax.Array | None = None,
        scale: jax.Array | None = None,
        in_stack: bool = False,
    ):
        self.bias = None if bias_N is None else nnx.Param(bias_N)
        self.scale = None if scale is None else nnx.Param(scale)
        self.format_name, self.implementation = format_name, implementation
        if isinstance(planes, RawMatrix):
            self.raw_shape = (planes.rows, planes.columns, planes.bytes)
            planes = {"raw": planes.data}
        else:
            self.raw_shape = None
        self.index = Place(jnp.int32(0)) if in_stack else None
        held = (lambda plane: Stacked(plane[None])) if in_stack else nnx.Param
        self.planes = nnx.Dict({name: held(plane) for name, plane in planes.items()})

    def weights(self) -> jax.Array:
        """Unpacked float32 [N, K]."""
        arrays = self._arrays()
        if isinstance(arrays, RawMatrix):
            return self.rows(jnp.arange(arrays.rows, dtype=jnp.int32))
        return get_format(self.format_name).unpack(self._one(arrays))

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows `ids` [...] unpacked to float32 [..., K]; only those rows are read."""
        arrays = self._arrays()
        if isinstance(arrays, RawMatrix):
            return ggml.take_rows(ids, arrays, self.format_name)
        planes = self._one(arrays)
        return get_format(self.format_name).unpack({n: p[ids] for n, p in planes.items()})

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., K] to y [..., N]."""
        index = None if self.index is None else self.index[...]
        y = linear(x, self._arrays(), self.format_name, self.implementation, index)
        y = y if self.scale is None else y * self.scale[...]
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)

    @property
    def is_raw(self) -> bool:
        """Whether it holds raw blocks, so that the device is a CPU with the backend `ggml`."""
        return self.raw_shape is not None

    def _arrays(self) -> dict[str, jax.Array] | RawMatrix:
        if self.raw_shape is not None:
            return RawMatrix(self.planes["raw"][...], *self.raw_shape)
        return {name: plane[...] for name, plane in self.planes.items()}

    def _one(self, planes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if self.index is None:
            return planes
        return {name: plane[self.index[...]] for name, plane in planes.items()}


def rms_normalised(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, float32."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, float32."""

    def __init__(self, scale: jax.Array, eps: float):
        self.scale = nnx.Param(scale)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised x, float32 of the same shape."""
        normalised = rms_normalised(x, self.eps)
        return jnp.multiply(normalised, jnp.broadcast_to(self.scale[...], x.shape))


class BlockWeights(Protocol):
    """The parts of one block, by role (`config.block_shapes`)."""

    def linear(self, role: str) -> Linear:
        """A matrix, with its bias and scale where the block has them."""
        ...

    def router(self) -> Linear:
        """In float32 everywhere: what it chooses shall not depend on rounding."""
        ...

    def of_heads(self, role: str) -> Linear:
        """A matrix for every head [H, N, K], as one of H * N rows that is not multiplied whole."""
        ...

    def norm(self, role: str) -> RMSNorm:
        """With a learned scale."""
        ...

    def array(self, role: str) -> jax.Array:
        """A small tensor as float32."""
        ...


class GatedMLP(nnx.Module):
    """A dense FFN (suffix ""), or a shared expert ("_shexp"); see `reference.gated`."""

    def __init__(self, weights: BlockWeights, suffix: str, function: ExpertFunction = "swiglu"):
        self.function: ExpertFunction = function
        self.gate, self.up, self.down = (
            weights.linear(f"ffn_{role}{suffix}") for role in ("gate", "up", "down")
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] to [..., D]."""
        return self.down(gated(self.function, self.gate(x), self.up(x)))


class EmbeddingAndHead(nnx.Module):
    """What stands before the first layer and after the last: embedding, final norm, head.

    A tied head (None) shares the embedding's planes; nothing is held twice.
    """

    def __init__(
        self, config: ModelConfig, embedding: Linear, final_norm: RMSNorm, head: Linear | None
    ):
        self.embedding, self.final_norm, self.head = embedding, final_norm, head
        self.embedding_scale, self.logit_softcap = config.embedding_scale, config.logit_softcap

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids [...] to float32 [..., D]."""
        x = self.embedding.rows(ids)
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def logits(self, x: jax.Array) -> jax.Array:
        """Residual stream [..., D] to float32 logits [..., V]."""
        head = self.embedding if self.head is None else self.head
        y = head(self.final_norm(x))
        cap = self.logit_softcap
        return jnp.tanh(y / cap) * cap if cap else y
