"""Files of weights: downloads, reading and writing, fitting to a model, published checkpoints."""
