"""Numbers of an H100 or H200 (SXM) that kernels are sized by, and PTX's names of number types."""

from __future__ import annotations

WARP, WARPGROUP = 32, 128  # threads
MULTIPROCESSORS = 132
# What Hopper lets one block have, less what Mosaic takes for barriers and alignment.
SHARED_MEMORY_BYTES = 227 * 1024 - 4096
TMA_ALIGNMENT = 16  # bytes, of the strides of what TMA copies
PTX_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # by name of the dtype
