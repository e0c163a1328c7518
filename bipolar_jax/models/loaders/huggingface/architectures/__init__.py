"""What config.json and the tensors of each architecture say, a file an architecture."""
