"""What the benchmark of language models is made of."""
