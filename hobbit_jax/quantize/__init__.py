"""From float32 weights to GGUF blocks, with or without what calibration knows of the activations.

Read in this order: `scale_search` and `single_scale` (which scales), `encoder` (any matrix to any
format), `gptq` (a matrix and its inputs' second moments to a K-quant), `methods` (which of them
serves an expert). The layouts of blocks are those of `pallas_kernels.formats`.
"""

from hobbit_jax.quantize.encoder import FORMATS, encode

__all__ = ["FORMATS", "encode"]
