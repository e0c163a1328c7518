"""Conversion of models: path rules choose the precision of each layer."""
