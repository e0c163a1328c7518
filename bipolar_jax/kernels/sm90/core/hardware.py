"""Limits of an H100 or H200 (SXM) that kernels are sized by, and PTX's names of floating-point types."""

from __future__ import annotations

WARP, WARPGROUP = 32, 128  # threads
MULTIPROCESSORS = 132
# Hopper's limit for one block, less what Mosaic takes for barriers and alignment.
SHARED_MEMORY_BYTES = 227 * 1024 - 4096
TMA_ALIGNMENT = 16  # bytes: addresses and strides of arrays that TMA copies
ALIGNED_WORDS = TMA_ALIGNMENT // 4  # elements of 4 bytes
PTX_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # by name of the dtype
