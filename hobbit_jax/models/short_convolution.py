"""The short convolution in the place of attention (LFM2).

One projection gives three streams b, c and x, and what is added is a projection of c times the
convolved b·x.

Source: llama.cpp, src/models/lfm2.cpp; transformers, models/lfm2_moe.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.models.caches import Arrays, Caches, Places
from hobbit_jax.models.config import Shapes, State
from hobbit_jax.models.delta_net import convolve
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
        return self.output(passed_BTN[..., : self.spec.channels])
