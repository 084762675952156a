"""Two small task families with worked answers, for training and scoring the reference model.

`arithmetic` stands in for GSM8K and `functions` for HumanEval at a size that a model of 14M
parameters can learn. Each has `generate`, whose splits "train" and "heldout" are apart by
construction (`drawing`), and `score`, which judges a completion.
"""
