"""Outputs of the product: a dense matrix, heads of prompts, signs."""
