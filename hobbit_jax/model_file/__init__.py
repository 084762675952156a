"""What a GGUF file says: tensors and metadata, hyperparameters, its tokenizer and chat template."""
