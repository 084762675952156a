"""How the reference model was made: corpus, training loop, export to GGUF, re-parametrisation.

Nothing that runs a model needs this room (`tests/test_rooms.py`).
"""
