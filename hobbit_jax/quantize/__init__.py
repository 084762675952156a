"""From float32 weights to GGUF blocks, with or without what calibration knows of the activations.

Read in this order: `ggml` (any matrix to any type, by llama.cpp's encoder), `gptq` (a matrix and
its inputs' second moments to a K-quant), `methods` (which of the two serves an expert).
"""
