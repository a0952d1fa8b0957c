"""What a model is here: the reference that stages pass on, its text side, its weights, GGUF files."""
