"""F32, F16 and BF16: one plane, `weights`, in the file's own dtype.

Source: `gguf.quants.dequantize`. Exact: a widening conversion of a finite value is, and F32 is
returned as it is (training differentiates it).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Format, Plane, Planes
from pallas_kernels.formats.packing import Floats


def _unpack(blocks: Planes) -> jax.Array:
    return blocks["weights"].astype(jnp.float32)


def _floats(name: str, number: int, dtype: type, operand: type) -> Format:
    plane = Plane("weights", jnp.dtype(dtype), 1)
    return Format(name, number, 1, (plane,), _unpack, packing=Floats(operand))


FORMATS = (
    _floats("F32", 0, jnp.float32, jnp.float32),
    _floats("F16", 1, jnp.float16, jnp.float32),
    _floats("BF16", 30, jnp.bfloat16, jnp.bfloat16),
)
