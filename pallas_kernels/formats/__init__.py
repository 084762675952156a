"""Every GGUF weight type we can read: its bytes, planes, exact unpack, encoder and kernel.

The registry. A type is one `Format` in the file of its family, and every other list derives from
it. Source: ggml's block structs; `gguf.quants.dequantize` is the oracle.
"""

from pallas_kernels.formats import codebook, floats, grids, k_quants, one_scale
from pallas_kernels.formats.base import Format, KQuant, Planes

__all__ = ["FORMATS", "Format", "KQuant", "Planes", "get_format"]

_FAMILIES = (floats, one_scale, k_quants, codebook, grids)

FORMATS: dict[str, Format] = {fmt.name: fmt for family in _FAMILIES for fmt in family.FORMATS}


def get_format(name: str) -> Format:
    """The format that ggml calls `name`, such as "Q4_K".

    Raises:
        NotImplementedError: we cannot read this type; the message lists those we can.
    """
    if name not in FORMATS:
        raise NotImplementedError(
            f"weight type {name} is not supported; supported: {', '.join(FORMATS)}"
        )
    return FORMATS[name]
