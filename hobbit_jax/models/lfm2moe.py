"""LFM2 with experts (`lfm2moe`): LFM2-8B-A1B, LFM2-24B-A2B.

Most blocks have a short convolution in the place of attention: one projection gives three streams
b, c and x, and what is added is a projection of c times the convolved b·x.

Source: llama.cpp, src/models/{lfm2,lfm2moe}.cpp; transformers, models/lfm2_moe.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.model_file.metadata import integer, per_layer
from hobbit_jax.models.caches import Arrays, Caches, Places
from hobbit_jax.models.config import ModelConfig, Shapes, State
from hobbit_jax.models.delta_net import convolve
from hobbit_jax.models.keys import Keys, any_router, dense_then_experts, grouped_query
from hobbit_jax.models.modules import BlockWeights


@dataclass(frozen=True)
class ShortConvolution:
    """See `config.Attention`. Each of `channels` sees its last `kernel` tokens."""

    channels: int  # as wide as the stream
    kernel: int
    n_heads: int = 0

    @property
    def passed_width(self) -> int:
        """The output before its matrix."""
        return self.channels

    def tensors(self, d_model: int) -> Shapes:
        """Those of a block."""
        return {
            "shortconv.conv": (self.channels, self.kernel),
            "shortconv.in_proj": (3 * self.channels, d_model),
            "shortconv.out_proj": (d_model, self.channels),
        }

    def states(self) -> tuple[State, ...]:
        """The last inputs."""
        return (State("convolution_window", (self.kernel - 1, self.channels), False),)

    def mixer(self, weights: BlockWeights) -> "ShortConvolutionMixer":
        """See `config.Attention`."""
        return ShortConvolutionMixer(self, weights)


class ShortConvolutionMixer(nnx.Module):
    """The matrices of `ShortConvolution`, and what it computes. See `layer.Mixer`."""

    def __init__(self, spec: ShortConvolution, weights: BlockWeights):
        self.spec = spec
        self.streams = weights.linear("shortconv.in_proj")
        self.kernel_XW = nnx.Param(weights.array("shortconv.conv"))
        self.output = weights.linear("shortconv.out_proj")

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> tuple[jax.Array, Arrays]:
        """c times the convolved b·x, and the inputs that the next tokens need."""
        (window,) = (state.name for state in self.spec.states())
        b_BTX, c_BTX, inputs_BTX = jnp.split(self.streams(x_BTD), 3, axis=-1)
        valid_BT = positions_BT < caches.context
        before_BWX = caches.recurrent[window][places[window]]
        sums_BTX, after_BWX = convolve(
            self.kernel_XW[...], b_BTX * inputs_BTX, before_BWX, valid_BT
        )
        return c_BTX * sums_BTX, {window: after_BWX}

    def mix(
        self, passed_BTN: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> jax.Array:
        """What is added to the stream, [B, T, D]."""
        del positions_BT, caches, places
        return self.output(passed_BTN[..., : self.spec.channels])


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`. A block without kv heads does not attend."""
    kv_heads_N = keys.read("attention.head_count_kv", per_layer(integer(), keys.block_count()))
    attends = grouped_query(keys, "neox", qk_norm="head", n_kv_heads=max(kv_heads_N))
    keys.expect("expert_weights_norm", True)
    router = replace(any_router(keys, "sigmoid"), renormalise=True)
    config = dense_then_experts(keys, attends, router)
    kernel = keys.read("shortconv.l_cache", integer(2, 2**10))
    convolves = ShortConvolution(config.d_model, kernel)
    blocks = tuple(
        block if n_kv_heads else replace(block, attention=convolves)
        for block, n_kv_heads in zip(config.blocks, kv_heads_N, strict=True)
    )
    return replace(config, blocks=blocks, output_norm="token_embd_norm.weight")
