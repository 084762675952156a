"""Model families: what a GGUF file of each says, and its layers as Flax modules.

A family is a function in `families.py`, or a file here, and one line of `registry.py`.
"""
