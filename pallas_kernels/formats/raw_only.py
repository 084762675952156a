"""Types that only ggml computes: their blocks are read, stored and moved, never unpacked here.

Owns their block layouts, as far as the check of damaged scales reads them. Their codebooks are
ggml's own tables. Source: `block_iq1_s` to `block_iq3_s`, `block_tq1_0`, `block_tq2_0`,
`block_nvfp4` and `block_q1_0` of ggml-common.h.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Format, Plane, Planes

_D = Plane("d", jnp.dtype(jnp.float16), 1)


def _bytes(count: int) -> Plane:
    return Plane("quants", jnp.dtype(jnp.uint8), count)


def _raw_only(name: str, weights: int, *planes: Plane) -> Format:
    def refuse(blocks: Planes) -> jax.Array:
        raise NotImplementedError(f"weight type {name} is computed by 'ggml' alone, on a CPU")

    n_bytes = sum(plane.block_bytes for plane in planes)
    return Format(name, weights, n_bytes, planes, refuse)


IQ1_S = _raw_only("IQ1_S", 256, _D, _bytes(48))
IQ1_M = _raw_only("IQ1_M", 256, _bytes(56))  # its scale is spread over four fields
IQ2_XXS = _raw_only("IQ2_XXS", 256, _D, _bytes(64))
IQ2_XS = _raw_only("IQ2_XS", 256, _D, _bytes(72))
IQ2_S = _raw_only("IQ2_S", 256, _D, _bytes(80))
IQ3_XXS = _raw_only("IQ3_XXS", 256, _D, _bytes(96))
IQ3_S = _raw_only("IQ3_S", 256, _D, _bytes(108))
TQ1_0 = _raw_only("TQ1_0", 256, _bytes(52), _D)
TQ2_0 = _raw_only("TQ2_0", 256, _bytes(64), _D)
NVFP4 = _raw_only("NVFP4", 64, _bytes(36))  # four E4M3 scales and the quants
Q1_0 = _raw_only("Q1_0", 128, _D, _bytes(16))
