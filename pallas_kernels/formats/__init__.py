"""Every GGUF weight type we can read: its byte layout, its device planes, its exact unpack.

The registry. Source: ggml's block structs; `gguf.quants.dequantize` is the oracle. One module per
family beside it.
"""

from pallas_kernels.formats.base import Format, Plane, Planes
from pallas_kernels.formats.codebook import IQ4_NL, IQ4_XS, MXFP4
from pallas_kernels.formats.floats import BF16, F16, F32
from pallas_kernels.formats.k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from pallas_kernels.formats.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from pallas_kernels.formats.raw_only import (
    IQ1_M,
    IQ1_S,
    IQ2_S,
    IQ2_XS,
    IQ2_XXS,
    IQ3_S,
    IQ3_XXS,
    NVFP4,
    Q1_0,
    TQ1_0,
    TQ2_0,
)

__all__ = ["FORMATS", "RAW_ONLY", "Format", "Plane", "Planes", "check_unpacks", "get_format"]

_FAMILIES = (
    (F32, F16, BF16),
    (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1),
    (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K),
    (IQ4_NL, IQ4_XS, MXFP4),
)

_RAW_ONLY = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, TQ1_0, TQ2_0, NVFP4, Q1_0)

# What every backend computes, and what "ggml" alone does.
FORMATS: dict[str, Format] = {fmt.name: fmt for family in _FAMILIES for fmt in family}
RAW_ONLY: dict[str, Format] = {fmt.name: fmt for fmt in _RAW_ONLY}


def get_format(name: str) -> Format:
    """The format that ggml calls `name`, such as "Q4_K".

    Raises:
        NotImplementedError: we cannot read this type; the message lists those we can.
    """
    found = FORMATS.get(name) or RAW_ONLY.get(name)
    if found is None:
        supported = ", ".join((*FORMATS, *RAW_ONLY))
        raise NotImplementedError(f"weight type {name} is not supported; supported: {supported}")
    return found


def check_unpacks(*names: str) -> None:
    """Refuses types that no program of ours unpacks.

    Raises:
        NotImplementedError: names the type, and who computes it.
    """
    for name in names:
        if get_format(name).name in RAW_ONLY:
            raise NotImplementedError(
                f"weight type {name} is computed by 'ggml' alone, on a CPU; others are "
                f"{', '.join(FORMATS)}"
            )
