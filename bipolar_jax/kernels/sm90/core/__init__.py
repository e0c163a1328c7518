"""Instructions, fragments, synchronization, hardware limits: the only room with MLIR and private JAX."""
