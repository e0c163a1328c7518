"""The mathematics of the kernels: which planes meet, how operands lie in memory, what finishes an accumulator."""
