"""The names that tensors have in DINO and in other implementations; nothing here knows a model."""
