"""How many elements of K may share a scale, in the products that multiply integers."""

from __future__ import annotations

# The general product unrolls the steps of a group: longer groups would make the mainloop too long.
GEMM_GROUP_SIZES = (32, 64, *range(128, 1024 + 1, 128))

# The product of few tokens covers 256 elements of K by an instruction and 1024 by a load: a group must divide the
# load, and at most four groups share an instruction.
FEW_TOKENS_GROUP_SIZES = (64, 128, 256, 512, 1024)
