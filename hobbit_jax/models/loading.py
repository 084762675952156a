"""From GGUF tensors to the Flax modules: everything of the model except its experts.

Owns the one upload of the dense part (attention, router, embedding, norms, head), which stays in
its GGUF formats on the device. For the backend `ggml` matrices stay in the file's map.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

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
from pallas_kernels.ggml.ops import ON_BLOCKS, RawMatrix, address_of, check_available
from pallas_kernels.linear import implementation_for


@dataclass(frozen=True)
class LoadedModel:
    """An opened model: its file, its shape, and its dense part on the device."""

    file: GGUFFile
    config: ModelConfig
    layers: LayerStack
    ends: EmbeddingAndHead
    implementation: Implementation  # of its matrix products, dense and expert alike
    mapped_bytes: int  # of dense matrices that stay in the file's map, beyond their addresses

    @property
    def dense_device_bytes(self) -> int:
        """Device bytes of everything but the experts, counted once when tied."""
        arrays = jax.tree.leaves([self.layers.states, nnx.state(self.ends)])
        return sum(array.nbytes for array in arrays) + self.mapped_bytes

    def on(self, mesh: Mesh | None) -> Self:
        """The same model with its dense part on every device of `mesh`, a whole copy on each."""
        if mesh is None:
            return self
        states = replicated(self.layers.states, mesh)
        graph, ends_state = nnx.split(self.ends)
        ends = nnx.merge(graph, replicated(ends_state, mesh))
        return replace(self, layers=LayerStack(self.layers.kinds, states), ends=ends)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the file itself describes."""
        return Tokenizer(self.file)


# One program per format and shape: a jit of `Format.split` itself would be a new one every time.
@partial(jax.jit, static_argnums=0)
def _split(format: Format, raw: np.ndarray) -> dict[str, jax.Array]:
    return format.split(raw)


@partial(jax.jit, static_argnums=0)
def unpacked(format: Format, raw: np.ndarray) -> jax.Array:
    """float32 weights of raw blocks."""
    return jnp.asarray(format.unpack(format.split(raw)), jnp.float32)


@dataclass
class _FileWeights:
    """Parts of a model out of a file, by role; see `modules.BlockWeights`."""

    _tensors: dict[str, TensorInfo]
    _rms_eps: float
    _implementation: Implementation
    _in_stack: bool  # other blocks have matrices of the same roles
    mapped_bytes: int = 0  # see `LoadedModel`, of the parts made so far

    def linear(self, role: str) -> Linear:
        tensor, bias_N = self._tensors[role], self._optional(f"{role}.bias")
        scale = self._optional(f"{role}.scale")
        return self._matrix(tensor, self._chosen(tensor), bias_N, scale, self._in_stack)

    def router(self) -> Linear:
        tensor = self._tensors["router"]
        return self._matrix(tensor, self._in_float32(tensor), self._optional("router.bias"))

    def of_heads(self, role: str) -> Linear:
        # Heads' matrices lie one below the other.
        tensor = self._tensors[role]
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        flat = replace(tensor, shape=(rows, columns), raw=tensor.raw.reshape(rows, -1))
        return self._matrix(flat, self._in_float32(flat))

    def norm(self, role: str) -> RMSNorm:
        return RMSNorm(self.array(role), self._rms_eps)

    def array(self, role: str) -> jax.Array:
        tensor = self._tensors[role]
        check_finite_scales(tensor)
        return unpacked(get_format(tensor.format), tensor.raw)

    def _optional(self, role: str) -> jax.Array | None:
        return self.array(role) if role in self._tensors else None

    def _chosen(self, tensor: TensorInfo) -> Implementation:
        rows, columns = tensor.shape
        return implementation_for(tensor.format, rows, columns, self._implementation)

    def _in_float32(self, tensor: TensorInfo) -> Implementation:
        """What takes the place of an implementation that rounds activations."""
        return "ggml_f32" if self._chosen(tensor) in ON_BLOCKS else "xla"

    def _matrix(
        self,
        tensor: TensorInfo,
        implementation: Implementation,
        bias_N: jax.Array | None = None,
        scale: jax.Array | None = None,
        in_stack: bool = False,
    ) -> Linear:
        check_finite_scales(tensor)
        scale = None if scale is None else scale.reshape(())
        if implementation in ON_BLOCKS:
            address, (rows, columns) = jnp.asarray(address_of(tensor.raw)), tensor.shape
            self.mapped_bytes += tensor.nbytes - address.nbytes
            matrix = RawMatrix(address, rows, columns, tensor.nbytes)
            return Linear(tensor.format, matrix, implementation, bias_N, scale)
        planes = _split(get_format(tensor.format), tensor.raw)
        in_stack &= implementation in KERNELS
        return Linear(tensor.format, planes, implementation, bias_N, scale, in_stack)


def load_model(path: str | Path, implementation: Implementation = None) -> LoadedModel:
    """Opens a GGUF file (or the first of a split) and uploads its dense part.

    From here on this process multiplies float32 in float32 on every device
    (`jax_default_matmul_precision`), and where no device was used before, a call on a CPU returns
    when it has ended (`jax_cpu_enable_async_dispatch`). The `implementation` is that of the matrix
    products (one of `IMPLEMENTATIONS`); None takes the fastest that this device and each matrix
    allow.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: from `open_gguf`,
            `read_config` and `check_finite_scales`, each naming what is wrong.
    """
    # On a CPU another thread would run each call while this one waits for it. It must be said
    # before JAX looks for devices.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # A name that cannot run here is refused at once.
    choose(implementation, {"triton": lambda: None, **dict.fromkeys(ON_BLOCKS, check_available)})
    # XLA would round float32 products to TF32's ten bits on newer GPUs, those of routers too.
    jax.config.update("jax_default_matmul_precision", "highest")
    file = open_gguf(path)
    config = read_config(file)

    def weights(names: dict[str, str], in_stack: bool) -> _FileWeights:
        tensors = {role: file.tensors[name] for role, name in names.items()}
        return _FileWeights(tensors, config.rms_eps, implementation, in_stack)

    of_blocks = [weights(block_tensors(config, n), in_stack=True) for n in range(config.n_blocks)]
    outer = weights(global_tensors(config), in_stack=False)
    blocks = [Block(config, number, of_block) for number, of_block in enumerate(of_blocks)]
    final_norm = RMSNorm(outer.array("output_norm") / config.logit_divisor, config.rms_eps)
    head = None if config.tied_head else outer.linear("output")
    ends = EmbeddingAndHead(config, outer.linear("token_embedding"), final_norm, head)
    mapped_bytes = sum(part.mapped_bytes for part in (*of_blocks, outer))
    layers = LayerStack.of(config, blocks)
    return LoadedModel(file, config, layers, ends, implementation, mapped_bytes)
