"""Attention inside the decode step's kernel."""
