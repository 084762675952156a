"""Tokens to logits: prefill, the decode program, the engine, and what serves a miss."""
