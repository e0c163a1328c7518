"""Products whose outputs are special: queries, keys and values of prompts; signs."""
