"""Generation, sampling, perplexity, and preparing a model for them."""
