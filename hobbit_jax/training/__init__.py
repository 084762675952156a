"""The room that trains the reference model: corpus, training loop, export to GGUF.

Called by `scripts/train_reference.py` only; nothing that runs a model needs it.
"""
