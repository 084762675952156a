"""How the reference model was made: corpus, training loop, export to GGUF, re-parametrisation.

Nothing that runs a model needs this room. Besides `scripts/reference_model/` only the bench of the
encoders imports it (`tests/test_rooms.py`).
"""
