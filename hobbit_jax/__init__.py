"""Mixed-precision expert caching for mixture-of-experts models in GGUF files, on JAX.

The modules read in the order of the data: `gguf_file`, `architecture` and `tokenizer` open a
file and say what is in it; the store, the plan and the cache decide which expert lies where at
which precision; the model and the engine decode. `pallas_kernels` is imported from here, never
the reverse.
"""
