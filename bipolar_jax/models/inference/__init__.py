"""Generation, sampling, perplexity; preparing a model for them, and explaining which kernels it runs."""
