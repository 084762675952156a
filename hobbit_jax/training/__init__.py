"""The room that trains the reference model: corpus, training loop, export to GGUF.

Nothing that runs a model needs it.
"""
