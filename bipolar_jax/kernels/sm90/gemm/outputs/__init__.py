"""Ways out of the product: dense tiles, heads of prompts, signs."""
