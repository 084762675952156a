"""Every GGUF weight type we can read: its byte layout, its device planes, its exact unpack.

The registry. Source: ggml's block structs; `gguf.quants.dequantize` is the oracle. One module per
family beside it.
"""

from pallas_kernels.formats.base import Format, Plane, Planes
from pallas_kernels.formats.codebook import IQ4_NL, IQ4_XS, MXFP4
from pallas_kernels.formats.floats import BF16, F16, F32
from pallas_kernels.formats.k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from pallas_kernels.formats.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

__all__ = ["FORMATS", "Format", "Plane", "Planes", "get_format"]

_FAMILIES = (
    (F32, F16, BF16),
    (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1),
    (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K),
    (IQ4_NL, IQ4_XS, MXFP4),
)

FORMATS: dict[str, Format] = {fmt.name: fmt for family in _FAMILIES for fmt in family}


def get_format(name: str) -> Format:
    """The format that ggml calls `name`, such as "Q4_K".

    Raises:
        NotImplementedError: we cannot read this type; the message lists those we can.
    """
    if name not in FORMATS:
        supported = ", ".join(FORMATS)
        raise NotImplementedError(f"weight type {name} is not supported; supported: {supported}")
    return FORMATS[name]
