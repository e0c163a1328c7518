"""Kernels: a folder for each backend, the contract of them all, and `semantics`, the numbers that they agree on."""
