"""Integer product of 1 to 64 tokens with prepared weights, bound by reading the weights once."""
