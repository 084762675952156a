"""F32, F16 and BF16: one plane, `weights`, in the file's own dtype.

Called through `pallas_kernels.formats`. Source: `gguf.quants.dequantize`. Exact: a widening
conversion of a finite value is, and F32 is returned as it is (training differentiates it).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Format, Plane, Planes


def _unpack(blocks: Planes) -> jax.Array:
    return blocks["weights"].astype(jnp.float32)


def _float_format(name: str, scalar_type: type) -> Format:
    dtype = jnp.dtype(scalar_type)
    return Format(
        name=name,
        block_weights=1,
        block_bytes=dtype.itemsize,
        planes=(Plane("weights", dtype, 1),),
        unpack_blocks=_unpack,
    )


F32 = _float_format("F32", jnp.float32)
F16 = _float_format("F16", jnp.float16)
BF16 = _float_format("BF16", jnp.bfloat16)
