"""Instructions, fragments, synchronization, twins, hardware limits; the only folder with MLIR or private JAX."""
