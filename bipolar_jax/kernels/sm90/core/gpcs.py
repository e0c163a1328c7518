"""How many clusters of blocks run at the same time: a cluster's blocks run within one GPC."""

from __future__ import annotations

# Multiprocessors of each GPC. How a chip's 132 are spread differs; an H200 was seen to run fewer than 32 clusters of
# four blocks that have a multiprocessor each. This spread has room for 30.
_MULTIPROCESSORS = (18, 18, 18, 18, 16, 16, 14, 14)


def clusters_at_once(size: int, per_multiprocessor: int = 1) -> int:
    """Clusters of `size` blocks that run at the same time, with so many blocks a multiprocessor."""
    return sum(per_multiprocessor * multiprocessors // size for multiprocessors in _MULTIPROCESSORS)
