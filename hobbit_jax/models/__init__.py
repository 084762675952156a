"""Model families: what a GGUF file of each says, and its layers as Flax modules.

A family is one file here (`qwen3moe.py` is the shortest example) and one line of `registry.py`.
"""
