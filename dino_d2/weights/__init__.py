"""Files of weights: getting and reading them, fitting them to a model, publishing them."""
