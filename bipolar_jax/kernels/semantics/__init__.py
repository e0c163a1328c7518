"""The numbers that all backends agree on, as readable jnp functions; each rule is explained in one place.

- `prologue`: what is computed before activations are quantized (norms, activation functions).
- `activations`: how a token is quantized.
- `weights`: how weights are rounded and packed by given scales.
- `epilogue`: from integer products to the output.
- `hadamard`: rotations that spread outliers before activations are quantized.
- `rotation`: rotary tables as fixed-point numbers.
"""
