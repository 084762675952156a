"""Model families: what a GGUF file of each says, and its layers as Flax modules."""
