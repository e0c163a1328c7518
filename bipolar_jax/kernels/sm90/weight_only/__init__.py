"""Product of float activations and packed weights for few tokens."""
