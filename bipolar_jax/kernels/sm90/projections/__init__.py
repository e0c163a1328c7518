"""Products with an output of their own: queries, keys and values of prompts; one-bit tokens."""
