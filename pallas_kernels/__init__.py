"""Quantised matrix products on accelerators: weight formats, reference ops, Pallas kernels.

A leaf room: it imports jax and numpy only, and `hobbit_jax` imports it, never the reverse.
"""
