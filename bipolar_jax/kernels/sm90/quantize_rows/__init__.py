"""Activations quantized and packed in one pass over memory."""
