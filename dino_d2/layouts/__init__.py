"""Names of tensors in DINO and in other implementations, independent of the models."""
