"""The products of the backend, and the choice of kernel and tiling for each."""
