"""The CPU backend `ggml`: both ops on raw GGUF blocks with ggml's own kernels, inside XLA programs.

`library.py` finds ggml's functions, `handlers.py` makes them callable from a compiled program,
`ops.py` is what the two ops call. numba and ggml are imported when the backend is first asked for.
"""
