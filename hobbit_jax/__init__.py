"""Mixed-precision expert caching for mixture-of-experts models in GGUF files, on JAX.

WORKSPACE.md has the map. `pallas_kernels` is imported from here, never the reverse.
"""
