"""From GGUF tensors to the Flax modules: everything of the model except its experts.

Owns the match of tensor names to modules and the one upload of the dense part (attention, router,
embedding, norms, head), which stays in its GGUF formats on the device. For the backend `ggml` there
is no upload: matrices stay in the file's map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, check_finite_scales, open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.config import ModelConfig, block_tensors, global_tensors
from hobbit_jax.models.layer import Block, LayerStack
from hobbit_jax.models.modules import EmbeddingAndHead, Linear, RMSNorm
from hobbit_jax.models.registry import read_config
from hobbit_jax.models.sharding import replicated
from pallas_kernels.backends import KERNELS, Implementation, choose
from pallas_kernels.formats import Format, get_format
from pallas_kernels.ggml.ops import RawMatrix, address_of, check_available
from pallas_kernels.linear import implementation_for


@dataclass(frozen=True)
class LoadedModel:
    """An opened model: its file, its shape, and its dense part on the device."""

    file: GGUFFile
    config: ModelConfig
    layers: LayerStack
    ends: EmbeddingAndHead
    implementation: Implementation  # of its matrix products, dense and expert alike
    mapped_bytes: int = 0  # of dense matrices that stay in the file's map, beyond their addresses

    @property
    def dense_device_bytes(self) -> int:
        """Device bytes of everything but the experts, counted once when tied."""
        arrays = jax.tree.leaves([self.layers.states, nnx.state(self.ends)])
        return sum(array.nbytes for array in arrays) + self.mapped_bytes

    def on(self, mesh: Mesh | None) -> LoadedModel:
        """The same model with its dense part on every device of `mesh`, a whole copy on each."""
        if mesh is None:
            return self
        states = replicated(self.layers.states, mesh)
        graph, ends_state = nnx.split(self.ends)
        ends = nnx.merge(graph, replicated(ends_state, mesh))
        return replace(self, layers=LayerStack(self.layers.kinds, states), ends=ends)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the file itself describes."""
        return Tokenizer.from_gguf(self.file)


# One program per format and shape: a jit of `Format.split` itself would be a new one every time.
@partial(jax.jit, static_argnums=0)
def _split(format: Format, raw: np.ndarray) -> dict[str, jax.Array]:
    return format.split(raw)


@partial(jax.jit, static_argnums=0)
def _float32(format: Format, raw: np.ndarray) -> jax.Array:
    return jnp.asarray(format.unpack(format.split(raw)), jnp.float32)


class _Matrices:
    """Makes the dense matrices of a model; counts what stays in the map."""

    def __init__(self, implementation: Implementation):
        self._implementation, self.mapped_bytes = implementation, 0

    def linear(
        self,
        tensor: TensorInfo,
        implementation: Implementation = None,
        bias_N: jax.Array | None = None,
        scale: TensorInfo | None = None,
        in_stack: bool = False,
    ) -> Linear:
        """A matrix for an implementation, the model's for None; `in_stack` if others of its kind
        are in other blocks."""
        check_finite_scales(tensor)
        rows, columns = tensor.shape
        implementation = implementation or self._implementation
        chosen = implementation_for(tensor.format, rows, columns, implementation)
        factor = None if scale is None else _array(scale).reshape(())
        if chosen == "ggml":
            address = jnp.asarray(address_of(tensor.raw))
            self.mapped_bytes += tensor.nbytes - address.nbytes
            matrix = RawMatrix(address, rows, columns, tensor.nbytes)
            return Linear(tensor.format, matrix, None, bias_N, factor)
        planes = _split(get_format(tensor.format), tensor.raw)
        in_stack &= chosen in KERNELS
        return Linear(tensor.format, planes, chosen, bias_N, factor, in_stack)

    def router(self, tensor: TensorInfo, bias_N: jax.Array | None = None) -> Linear:
        """In float32 everywhere: what it chooses shall not depend on rounding.

        ggml rounds the inputs of a product with anything but float32.
        """
        return self.linear(tensor, self._in_float32(tensor) if tensor.format == "F32" else "xla",
                           bias_N)  # fmt: skip

    def of_heads(self, tensor: TensorInfo) -> Linear:
        """Heads' matrices one below the other, which is how they lie."""
        rows, raw = math.prod(tensor.shape[:-1]), tensor.raw
        shape = (rows, tensor.shape[-1])
        flat = replace(tensor, shape=shape, raw=raw.reshape(rows, -1))
        return self.linear(flat, self._in_float32(flat))

    def _in_float32(self, tensor: TensorInfo) -> Literal["ggml", "xla"]:
        """The kernels of GPUs round: "xla" takes their place."""
        rows, columns = tensor.shape
        chosen = implementation_for(tensor.format, rows, columns, self._implementation)
        return "ggml" if chosen == "ggml" else "xla"


def _array(tensor: TensorInfo) -> jax.Array:
    """A small tensor as float32, also where it is no matrix."""
    check_finite_scales(tensor)
    return _float32(get_format(tensor.format), tensor.raw)


class _FileWeights:
    """The parts of one block out of a file; see `modules.BlockWeights`."""

    def __init__(self, file: GGUFFile, config: ModelConfig, block: int, matrices: _Matrices):
        self._rms_eps, self._matrices = config.rms_eps, matrices
        names = block_tensors(config, block)
        self._tensors = {role: file.tensors[name] for role, name in names.items()}

    def linear(self, role: str) -> Linear:
        scale = self._tensors.get(f"{role}.scale")
        return self._matrices.linear(self._tensors[role], None, self._bias(role), scale, True)

    def router(self) -> Linear:
        return self._matrices.router(self._tensors["router"], self._bias("router"))

    def _bias(self, role: str) -> jax.Array | None:
        return self.array(f"{role}.bias") if f"{role}.bias" in self._tensors else None

    def of_heads(self, role: str) -> Linear:
        return self._matrices.of_heads(self._tensors[role])

    def norm(self, role: str) -> RMSNorm:
        return RMSNorm(self.array(role), self._rms_eps)

    def array(self, role: str) -> jax.Array:
        return _array(self._tensors[role])


def load_model(path: str | Path, implementation: Implementation = None) -> LoadedModel:
    """Opens a GGUF file (or the first of a split) and uploads its dense part.

    Expert tensors are not read here; the store checks each expert's scales when it
    is first fetched. From here on this process multiplies float32 in float32 on every device
    (`jax_default_matmul_precision`).

    Args:
        path: of the file.
        implementation: of the matrix products ("xla", "ggml", "triton", "interpret"); None takes
            the fastest that this device and each matrix allow. The kernels for GPUs leave the
            router to "xla".

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: from `open_gguf`,
            `read_config` and `check_finite_scales`, each naming what is wrong.
    """
    checks = {"xla": lambda: None, "triton": lambda: None, "ggml": check_available}
    choose(implementation, checks)  # a name that cannot run here is refused at once
    # XLA would round float32 products to TF32's ten bits on newer GPUs, those of routers too.
    jax.config.update("jax_default_matmul_precision", "highest")
    matrices = _Matrices(implementation)
    file = open_gguf(path)
    config = read_config(file)
    blocks = [
        Block(config, number, _FileWeights(file, config, number, matrices))
        for number in range(config.n_blocks)
    ]
    outer = {role: file.tensors[n] for role, n in global_tensors(config).items()}
    head = None
    if not config.tied_head:
        head = matrices.linear(outer["output"], scale=outer.get("output.scale"))
    ends = EmbeddingAndHead(
        embedding=matrices.linear(outer["token_embedding"]),
        final_norm=RMSNorm(_array(outer["output_norm"]) / config.logit_divisor, config.rms_eps),
        head=head,
        embedding_scale=config.embedding_scale,
        logit_softcap=config.logit_softcap,
    )
    layers = LayerStack.of(config, blocks)
    return LoadedModel(file, config, layers, ends, implementation, matrices.mapped_bytes)
