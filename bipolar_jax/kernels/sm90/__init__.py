"""Pallas kernels for NVIDIA Hopper, a room for each kernel; `entry` has the functions of the backend."""
