"""What all backends agree on: how activations are quantized, weights packed, and products finished."""
