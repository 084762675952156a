"""From float32 weights to GGUF blocks, with or without what calibration knows of the activations.

Read in this order: `ggml` (any matrix to any type, by llama.cpp's encoder), `gptq` (a matrix and
its inputs' second moments to a K-quant, with the scales of `scale_search` in the blocks of
`k_quant_blocks`), `methods` (which of the two serves an expert). The layouts of blocks are those
of `pallas_kernels.formats`.
"""
